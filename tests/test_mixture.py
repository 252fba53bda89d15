"""Mixtures of data sets and composed scenes."""

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from sources import scenes


def folder(path, value, ids, count=4):
    """Images of one grey value, label maps with the given ids in vertical stripes."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (path / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path / f"images/{split}/{i}.png")
            label = np.repeat(np.array(ids, np.uint8), 32 // len(ids))[None].repeat(32, 0)
            Image.fromarray(label).save(path / f"labels/{split}/{i}.png")
    return path


def options(tmp_path):
    return dict(cache=tmp_path / "cache", workers=1)


def test_parts():
    assert data.parse_part("photos") == ("photos", 1.0, dict(components=False, unlabelled=None, void=()))
    assert data.parse_part("a/b:2.5:components:ignore:void=255:void=0") == ("a/b", 2.5,
                                                                            dict(components=True,
                                                                                 unlabelled="ignore",
                                                                                 void=(0, 255)))
    assert data.parse_part(r"C:\photos:ignore:3") == (r"C:\photos", 3.0,
                                                      dict(components=False, unlabelled="ignore", void=()))
    assert data.parse_part("photos:0")[0] == "photos:0"  # no weight: no such folder, says load
    with pytest.raises(ValueError, match="not a data set"):
        data.parse_part(":3")


def test_a_folder_of_just_this_name_is_one_set(tmp_path):
    odd = folder(tmp_path / "a,b:3", 10, [1, 2])
    assert len(data.load(str(odd), "train", 32, **options(tmp_path))) == 4
    assert train.parse(["--dataset", str(odd)]).out == "out/a,b:3-small"


def test_shares_follow_the_weights(tmp_path):
    a, b = folder(tmp_path / "a", 10, [1, 2]), folder(tmp_path / "b", 200, [1, 2, 3, 4])
    mixed = data.load(f"{a}:3,{b}", "train", 32, **options(tmp_path))
    images, labels, sizes = mixed.get(range(2000))
    dark = (images.flatten(1).float().mean(1) < 100).float().mean()
    assert abs(dark - 0.75) < 0.04  # 4 standard deviations
    assert images.shape == (2000, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert len({tuple(label.unique().tolist()) for label in labels}) == 2 and sizes.tolist() == [[32,
                                                                                                  32]] * 2000


def test_a_sample_depends_on_its_number_alone(tmp_path):
    a = folder(tmp_path / "a", 10, [1, 2])
    mixed = data.load(f"{a},shapes", "train", 32, compose=0.5, **options(tmp_path))
    whole, part = mixed.get(range(20)), mixed.get([7, 3])
    for full, few in zip(whole, part):
        assert torch.equal(full[[7, 3]], few)
    other = data.load(f"{a},shapes", "train", 32, compose=0.5, seed=1, **options(tmp_path)).get(range(20))
    assert not torch.equal(whole[0], other[0])


def test_ignore_and_components_hold_for_one_part(tmp_path):
    a, b = folder(tmp_path / "a", 10, [0, 1]), folder(tmp_path / "b", 200, [0, 5, 0, 5])
    images, labels, _ = data.load(f"{a},{b}:components:ignore", "train", 32,
                                  **options(tmp_path)).get(range(60))
    for image, label in zip(images, labels):
        ids = set(label.unique().tolist())
        assert ids == {0, 1} if image.float().mean() < 100 else len(ids) == 3 and -1 in ids


def test_val_is_of_the_first_alone(tmp_path):
    a, b = folder(tmp_path / "a", 10, [1, 2]), folder(tmp_path / "b", 200, [1, 2])
    val = data.load(f"{a},{b}", "val", 32, **options(tmp_path))
    assert len(val) == 4 and (val.get(range(4))[0] == 10).all()


def test_wrong_use(tmp_path):
    a = folder(tmp_path / "a", 10, [1, 2])
    with pytest.raises(ValueError, match="nowhere"):
        data.load(f"{a},nowhere", "train", 32, **options(tmp_path))
    with pytest.raises(ValueError, match="compositions need real images"):
        data.load("shapes", "train", 32, compose=0.5)
    with pytest.raises(ValueError, match="--compose must be from 0 to 1, not 1.5"):
        train.parse(["--compose", "1.5"])


def test_a_composition_is_a_picture_of_its_labels():
    """Photos of flat colours: in a composition, pixels of one segment have one colour, and the top piece
    hides the rest."""
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [90, 90, 90]], np.uint8)
    halves = np.repeat([1, 2], 16)[None].repeat(32, 0)
    seen = 0
    for number in range(50):
        rng = np.random.default_rng(number)

        def photo():
            pair = colours[rng.permutation(4)[:2]]
            return pair[halves - 1], halves, np.array([32, 32])

        image, labels, size = scenes.compose(rng, photo)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and size.tolist() == [32, 32]
        ids = np.unique(labels)
        assert ids.tolist() == list(range(len(ids)))  # dense, so that a bound is known
        for i in ids:
            assert len(np.unique(image[labels == i], axis=0)) == 1, number
        seen += len(ids)
    assert seen > 150  # 3 segments and more, on average


def test_texture_stays_inside_its_segment():
    """A red disc on blue: a texture is all red or all blue, never both."""
    y, x = np.mgrid[:40, :40]
    label = np.where((y - 20) ** 2 + (x - 20) ** 2 < 150, 1, 2)
    image = np.where((label == 1)[..., None], [255, 0, 0], [0, 0, 255]).astype(np.uint8)
    kinds = set()
    for number in range(20):
        canvas = scenes.texture(np.random.default_rng(number), image, label, 40)
        assert canvas.shape == (40, 40, 3)
        values = np.unique(canvas.reshape(-1, 3), axis=0)
        assert len(values) == 1
        kinds.add(tuple(values[0].tolist()))
    assert len(kinds) == 2


def test_cut_out_keeps_pixels_and_moves_maps_alike():
    array = np.arange(48).reshape(6, 8)
    assert (scenes.cut_out(array, 1, 2, 3, 4, 3, 4) == array[1:4, 2:6]).all()  # no change of size: the pixels
    assert (scenes.cut_out(array, 0, 0, 6, 8, 12, 16) == array.repeat(2, 0).repeat(2, 1)).all()
