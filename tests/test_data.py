"""The data sets of data.py: synthetic scenes, and folders and COCO panoptic made here. Files:
test_images.py."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import load, order, selection, uniforms
from sources import packing
from sources.formats import find_folder, read_image, read_label
from sources.scenes import draw_scene, paint

PIXEL = (np.arange(6 * 8 * 3) * 250 // 143).astype(np.uint8).reshape(6, 8, 3)  # 8 wide, 6 high
LABEL = np.repeat(np.arange(8, dtype=np.uint8)[None] // 3 * 50, 6, 0)  # three bands: 0, 50, 100


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def get_all(dataset, draw=0.0):
    return dataset.get(range(len(dataset)), np.full(len(dataset), draw))


# ----------------------------------------------------------------------------------------------------- synthe


def test_scenes_are_reproducible_and_differ():
    train, val, other = load("shapes", "train", 32), load("shapes", "val", 32), load("shapes", "train", 32,
                                                                                     seed=1)
    images, labels, sizes = train.get([0, 5, 2**31 - 1])
    assert images.shape == (3, 32, 32, 3) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert sizes.tolist() == [[32, 32]] * 3
    again = load("shapes", "train", 32).get([2**31 - 1, 5])  # in another order, another batch
    assert torch.equal(again[0], images[[2, 1]]) and torch.equal(again[1], labels[[2, 1]])
    scenes = [d.get([i])[0] for d in (train, val, other) for i in range(20)]
    assert len({s.numpy().tobytes() for s in scenes}) == 60


def test_no_split_and_seed_share_a_scene():
    keys = {}
    for seed in range(3):
        for split in ("train", "val", "test"):
            keys[split, seed] = load("shapes", split, 16, seed=seed).get(range(3))[0].numpy().tobytes()
    assert len(set(keys.values())) == 9


def test_two_to_nine_segments():
    _, labels, _ = load("shapes", "val", 32).get(range(400))
    counts = {len(m.unique()) for m in labels}
    assert counts == set(range(2, 10))  # all of them occur


def test_label_maps_are_exact():
    """Every pixel is painted with its own segment's parameters: change those of one, and only its pixels
    change."""
    labels, params, noise = draw_scene(np.random.default_rng(3), 48)
    assert labels.max() < len(params)
    labels, noise = labels[None], noise[None]
    before = paint(labels, params[None], noise)
    for segment in np.unique(labels):
        other = params.copy()
        other[segment] = np.random.default_rng(4).random(params.shape[1])
        changed = (paint(labels, other[None], noise) != before).any(-1)
        assert not (changed & (labels != segment)).any() and (changed & (labels == segment)).any()


# ------------------------------------------------------------------------------------------------------------


def folder(root, stems, split="", annotators=0):
    for n, stem in enumerate(stems):
        write(root / "images" / split / f"{stem}.png", PIXEL + np.uint8(n))
        for a in range(max(1, annotators)):
            name = f"{stem}_a{a}.png" if annotators else f"{stem}.png"
            write(root / "labels" / split / name, np.minimum(LABEL, 50 * a + 50))
    return root


def test_folder_with_splits(tmp_path):
    folder(tmp_path / "d", ["x", "y"], "train"), folder(tmp_path / "d", ["z"], "val")
    train, val = (load(str(tmp_path / "d"), split, 8, cache=tmp_path / "cache") for split in ("train", "val"))
    images, labels, sizes = get_all(train)
    assert (train.names, val.names, len(train)) == (["x", "y"], ["z"], 2) and sizes.tolist() == [[6, 8]] * 2
    assert (images[1, :6].numpy() == PIXEL + 1).all()
    assert (labels[0, :6].numpy() == np.minimum(LABEL, 50) // 50).all()
    assert (labels[:, 6:] == -1).all() and (images[:, 6:] == 0).all()
    assert torch.equal(train.get([3])[0], images[[1]])  # positions go round


def test_folder_without_splits_keeps_a_tenth_for_val_whatever_else_comes(tmp_path):
    stems = [f"i{n:03}" for n in range(200)]
    root = folder(tmp_path / "d", stems[50:])
    train, val = (load(str(root), split, 8, cache=tmp_path).names for split in ("train", "val"))
    assert 8 <= len(val) <= 24 and sorted(train + val) == stems[50:]
    folder(root, stems[:50])  # which come first
    assert set(load(str(root), "val", 8, cache=tmp_path).names) & set(stems[50:]) == set(val)
    for names in (["a", "b", "c"], ["x", "y"], ["i0", "i5"], [f"q{k}" for k in range(5)]):
        few = folder(tmp_path / "few" / names[0], names)
        train, val = (load(str(few), split, 8, cache=tmp_path).names for split in ("train", "val"))
        assert train and val and sorted(train + val) == sorted(names)


def test_annotators_are_drawn(tmp_path):
    dataset = load(str(folder(tmp_path / "d", ["x", "cat_a", "y_b"], "val", annotators=2)), "val", 8,
                   cache=tmp_path)
    assert dataset.names == ["cat_a", "x", "y_b"] and [len(dataset.maps(i)) for i in range(3)] == [2, 2, 2]
    for draw, ids in ((0.0, 2), (0.49, 2), (0.5, 3), (0.999999, 3)):  # two segments, then three
        assert all(len(m[:6].unique()) == ids for m in get_all(dataset, draw)[1])
    assert all((m == 0).sum() == 3 * 6 for i in range(3) for m in dataset.maps(i))


def test_a_stem_that_looks_like_an_annotator(tmp_path):
    items = find_folder(folder(tmp_path / "d", ["img_a1", "img_a2"], "val"), "val")[1]()
    assert [[os.path.basename(p) for p in (i.image, *i.labels)] for i in items] == [["img_a1.png"] * 2,
                                                                                    ["img_a2.png"] * 2]


def test_unlabelled_zero(tmp_path):
    root = folder(tmp_path / "d", ["x"], "val")
    segment, ignore = (get_all(load(str(root), "val", 8, cache=tmp_path,
                                    unlabelled=u))[1] for u in ("segment", "ignore"))
    assert (segment[0, :6].numpy() != -1).all() and ((ignore[0, :6].numpy() == -1) == (LABEL == 0)).all()


def test_the_cache_is_used_and_notices_changes(tmp_path, monkeypatch):
    root, cache = folder(tmp_path / "d", ["x"], "val"), tmp_path / "cache"
    first = get_all(load(str(root), "val", 8, cache=cache))[1]
    monkeypatch.setattr(packing, "convert", None)  # reading again would fail
    assert torch.equal(get_all(load(str(root), "val", 8, cache=cache))[1], first)
    monkeypatch.undo()
    os.utime(write(root / "labels/val/x.png", 0 * LABEL), ns=(1, 1))
    assert (get_all(load(str(root), "val", 8, cache=cache))[1][0, :6] == 0).all()
    assert not list(cache.glob("*.part*"))


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not in ../shared/data")
@pytest.mark.parametrize("index", sorted(SHARED.glob("*/index.json")), ids=lambda p: p.parent.name)
def test_real_folders_as_their_index_says(index):
    entries = {(e["split"], e["id"]): e for e in json.loads(index.read_text())["items"]}
    found = {(split.name, Path(item.image).stem): (item.image,
                                                   item.labels)
                                                   for split in (index.parent / "images").iterdir()
             for item in find_folder(index.parent, split.name)[1]()}
    assert found.keys() == entries.keys()
    for key in sorted(found)[::100]:  # reading all would take a minute
        (image, maps), entry = found[key], entries[key]
        labels = [read_label(p) for p in maps]
        assert list(read_image(image).size) == entry["size"]
        assert {m.shape for m in labels} == {tuple(entry["size"][::-1])}
        assert [len(set(m.ravel().tolist()) - {0}) for m in labels] == entry["n_segments"]


# ------------------------------------------------------------------------------------------------------------


def coco(root):
    """One image with segments 5 and 70,000 and an unlabelled corner."""
    ids = np.where(LABEL > 0, 70_000, 5)
    ids[0, 0] = 0
    write(root / "val2017/000000000007.jpg", PIXEL)
    rgb = np.dstack([ids % 256, ids // 256 % 256, ids // 65536]).astype(np.uint8)
    write(root / "annotations/panoptic_val2017/000000000007.png", rgb)
    image = {"id": 7, "file_name": "000000000007.jpg"}
    annotation = {"image_id": 7, "file_name": "000000000007.png",
                  "segments_info": [{"id": 70_000}, {"id": 5}]}
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps({"images": [image],
                                                                        "annotations": [annotation]}))
    return ids


def test_coco_panoptic(tmp_path):
    ids = coco(tmp_path / "coco")
    images, labels, sizes = get_all(load("coco", "val", 8, root=tmp_path, cache=tmp_path / "cache"))
    pairs = set(zip(labels[0, :6].flatten().tolist(), ids.ravel().tolist()))
    assert len(pairs) == 3 and sizes.tolist() == [[6, 8]] and (labels[0, 6:] == -1).all()
    ignore = get_all(load("coco", "val", 8, root=tmp_path, cache=tmp_path / "cache", unlabelled="ignore"))[1]
    assert ((ignore[0, :6].numpy() == -1) == (ids == 0)).all()


# ------------------------------------------------------------------------------------------------------ wrong


def test_wrong_use_names_the_thing(tmp_path):
    def fails(text, name=None, split="train", **options):
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            load(str(name or tmp_path / "d"), split, 8, cache=tmp_path / "cache", **options)

    fails("'nowhere' is neither shapes, nor coco, nor a folder", "nowhere")
    fails("COCO is not complete: .*val2017.*cocodataset.org", "coco", "val", root=tmp_path)
    fails("'segment' or 'ignore', not 'drop'", unlabelled="drop")
    (tmp_path / "d" / "images").mkdir(parents=True)
    fails("no folder labels")
    root = folder(tmp_path / "d", ["x", "y"], "train")
    fails("train, but no val/", split="val")
    (root / "labels/train/y.png").unlink()
    fails("y.png has no label")
    (root / "labels/train/y.png").write_bytes(b"not a png")
    fails("labels/train/y.png: not a readable label map")
    write(root / "labels/train/y.png", PIXEL)
    fails("labels/train/y.png: 48 colours, most of them in single pixels: no label map")
    write(root / "labels/train/y.png", LABEL[:5])
    fails("y.png is 8 x 5 pixels, its image .*y.png 8 x 6")
    write(root / "labels/train/y.png", LABEL)
    (root / "images/train/y.png").write_bytes((root / "images/train/x.png").read_bytes()[:50])
    fails("images/train/y.png: not a readable image")
    (root / "images/train/y.png").unlink()
    fails("y.png has no image")
    assert not list((tmp_path / "cache").glob("*/index.json"))  # nothing half-made passes for whole


def test_order_is_a_permutation_in_every_epoch_and_resumes():
    whole = order(0, 70, 10, seed=3)
    epochs = whole.reshape(7, 10)
    assert all(sorted(e) == list(range(10))
               for e in epochs.tolist()) and len({tuple(e) for e in epochs.tolist()}) > 1
    pieces = [order(start, 7, 10, seed=3) for start in range(0, 70, 7)]  # 7: batches straddle epochs
    assert (np.concatenate(pieces) == whole).all()
    assert (order(0, 70, 10, seed=4) != whole).any() and order(5, 3, 2**31, 0).tolist() == [5, 6, 7]
    assert sorted(order(0, 9, 3, 0).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # a batch of several epochs


def test_a_selection_is_of_all_parts_of_a_data_set():
    """The same at every call, and of a larger one a part."""
    data = range(5000)  # ten cities of 500 images
    few, many = selection(data, 100), selection(data, 400)
    assert few == sorted(set(few)) == selection(data, 100) and len(few) == 100 and set(few) < set(many)
    counts = np.bincount([i // 500 for i in few], minlength=10)
    assert len(counts) == 10 and counts.min() >= 3 and counts.max() <= 20
    assert selection(data, 5000) == selection(data, 9000) == list(data)
    assert selection(load("shapes", "val", 16), 3) == [0, 1, 2]


def test_uniforms_belong_to_the_sample():
    whole = uniforms(0, 100, seed=1)
    assert whole.shape == (100, 16) and (uniforms(40, 7, seed=1) == whole[40:47]).all()
    assert ((whole >= 0) & (whole < 1)).all() and abs(whole.mean() - 0.5) < 0.03
    assert len(np.unique(whole)) > 1590
    assert (uniforms(0, 100, seed=2) != whole).mean() > 0.99
