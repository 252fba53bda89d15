"""Closer looks: tiles of a photo, what they see, and one answer from all of them, without seams."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import answers.segment as segmenting
import sample
from answers import tree
from answers.checkpoints import Model
from answers.jobs import LOOKS, TILES, jobs_of, prepare
from answers.prompts import hint_map
from answers.scoring import otsu, watershed
from answers.segment import denoise, evidence_of, rise, segment, without_gaps
from bits import Codec
from diffusion import Diffusion, host_seed
from frame import resize_image
from metrics import ari, contingency, object_precision

SIZE = 32


class Net(torch.nn.Module):
    """Nothing of it is asked but its device."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def model_of(hints=0.0, merge=0.0):
    sampling = dict(steps=1, guidance=0.0, sampler="ddpm", variance="large", smooth=0.0)
    return Model(Net(), Codec(bits=6), Diffusion(hints=hints), SIZE, sampling, "none", 0,
                 dict(least=0, merge=merge))


def crowd(side=128, across=8, radius=5, seed=0):
    """across x across discs of grey levels from 60 on, on black: a PIL image, and their map (side, side)."""
    truth = Image.new("I", (side, side))
    pen, levels = ImageDraw.Draw(truth), np.random.default_rng(seed).permutation(across**2)
    for k, level in enumerate(levels):
        x, y = ((v + 0.5) * side / across for v in (k % across, k // across))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), int(level) + 1)
    truth = np.array(truth)
    grey = np.where(truth > 0, 60 + truth * 3, 0).astype(np.uint8)
    return Image.fromarray(np.stack([grey] * 3, -1)), truth


@pytest.fixture
def by_grey(monkeypatch):
    """In place of sampling: bits that name each grey level, by another code in every pass."""
    calls = []

    def sampled(net, image, valid, channels, seeds, callback=None, **given):
        grey = ((image[:, 0] * 0.229 + 0.485) * 255).round()
        level = torch.where(grey > 40, ((grey - 60) / 3).round().clamp(1, 62), 0).long()  # (B, S, S)
        out = []
        for one, seed in zip(level, seeds):
            code = torch.from_numpy(np.random.default_rng(int(seed) % 2**40).permutation(64))[one]
            out.append(torch.stack([(code >> b & 1) * 2.0 - 1 for b in range(channels)]))
        calls.append((list(seeds), given))
        return torch.stack(out)

    monkeypatch.setattr(segmenting, "sample", sampled)
    return calls


def alike(labels, truth):
    return float(ari(contingency(torch.as_tensor(labels).long()[None], torch.as_tensor(truth).long()[None])))


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (31, 77), (300, 5), (60, 100), (1000, 100)])
@pytest.mark.parametrize("t", [2, 3, 4])
def test_tiles_cover_the_photo_and_share_its_pixels(size, t):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    tiles = jobs_of(image, model_of(), None, None, 5, t)
    job = replace(jobs_of(image, model_of(), None, None, 5, 1)[0], tiles=tiles)
    h, w = job.scene.shape[:2]
    whole, kept = resize_image(image, max(h, w))
    assert kept == (h, w) and np.array_equal(job.scene, whole[:h, :w])
    assert max(h, w) >= SIZE * (3 * t + 1) // 4
    seen = np.zeros((h, w))
    for tile in tiles:
        assert max(tile.size) <= SIZE and (max(tile.size) == SIZE or len(tiles) == TILES)
        seen[tile.place] += rise(tile, (h, w))
    assert (seen > 0).all()
    if size == (128, 128):
        assert np.allclose(seen, 1)  # each pixel counts alike
    assert len({tile.seed for tile in tiles} | {5}) == 1 + len(tiles)


@pytest.mark.parametrize("size, t, rows, columns", [
    ((96, 64), 2, 2, 2), ((64, 96), 2, 2, 2), ((96, 48), 2, 2, 2), ((30, 90), 2, 3, 1),
    ((1000, 100), 2, 1, 11), ((100, 1000), 3, 16, 2), ((90, 90), 3, 3, 3), ((1000, 100), 1, 1, 1)])
def test_a_panorama_has_more_tiles_along_its_length_and_none_is_narrow(size, t, rows, columns):
    tiles = jobs_of(Image.new("RGB", size), model_of(), None, None, 0, t)
    assert (len({tile.top for tile in tiles}), len({tile.left for tile in tiles})) == (rows, columns)
    assert len(tiles) == rows * columns
    if t > 1:
        assert min(min(tile.size) for tile in tiles) * 2 >= SIZE


def test_a_crowd_is_told_apart_and_nothing_is_cut_at_a_seam(by_grey):
    image, truth = crowd()
    plain, closer = (segment(image, model_of(), 2, tiles=t) for t in (1, 2))
    small = torch.from_numpy(truth)
    assert closer.cells.shape[1:] == (56, 56)
    one, four = (alike(r.answer.labels, truth) for r in (plain, closer))
    assert four > 0.9 and four > one
    for labels in [*closer.labels, closer.answer.labels]:
        for number in np.unique(truth[truth > 0]):  # the disc's most frequent label covers it
            inside = labels[small == number]
            assert (inside == inside.mode().values).float().mean() > 0.7, number
    # the background, which is larger than a tile, is one
    assert (closer.answer.labels[small == 0] == closer.answer.labels[0, 0]).float().mean() > 0.95


def test_off_is_as_before_and_seeds_are_of_each_samples_own(by_grey):
    image, _ = crowd()
    result = segment(image, model_of(), 3, seed=7)
    assert [s for seeds, _ in by_grey for s in seeds] == [7, 8, 9]
    by_grey.clear()
    again = segment(image, model_of(), 3, seed=7, tiles=2, batch=4)
    seeds = [s for seeds, _ in by_grey for s in seeds]
    assert seeds[:3] == [7, 8, 9] and len(seeds) == len(set(seeds)) == 3 + 4 * LOOKS
    assert all(torch.equal(a, b) for a, b in zip(result.x_hat, again.x_hat))
    # and so has their noise, though a CPU's generator takes 32 bits
    noise = [torch.randn(9, generator=torch.Generator().manual_seed(host_seed(int(s)))) for s in seeds]
    assert len({tuple(v.tolist()) for v in noise}) == len(seeds)
    two = segment(image, model_of(), 2, seed=7, tiles=2)
    one = segment(image, model_of(), 1, seed=8, tiles=2)  # the second sample by itself
    assert alike(one.cells[0], again.cells[1]) == alike(two.cells[1], again.cells[1]) == 1


def test_by_default_learnt_odds_look_closer_and_raw_samples_do_not(tmp_path, monkeypatch):
    image, raw = crowd()[0], model_of()
    learnt = replace(raw, tidy=dict(least=0, merge=1.0))
    assert prepare(image, raw).tiles == prepare(image, learnt, tiles=1).tiles == []
    assert len(prepare(image, learnt).tiles) == 4
    image.convert("RGB").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for more, tiles in (((), 2), (("--merge", "0"), None), (("--tiles", "1"), None), (("--tiles", "3"), 3)):
        a = sample.arguments(["a.png", "--ckpt", str(sample.SHIPPED), "--device", "cpu", *more])
        assert sample.prepare_run(a).info.get("tiles") == tiles


def test_mistakes_of_those_who_call_it_get_a_sentence(by_grey):
    image, model = crowd()[0], model_of()
    few = "n and batch are at least 1"
    for wrong, words in ((dict(n=0), few), (dict(batch=-1), few), (dict(closed=True), "need hints"),
                         (dict(boxes={1: (0, 0, 9, 9)}), "need hints")):
        with pytest.raises(ValueError, match=words):
            segment(image, model, **{"n": 1, **wrong})
    for other in (np.zeros((4, 4, 3), np.uint8), "photo.jpg"):
        with pytest.raises(ValueError, match=f"not {type(other).__name__}: formats.read_image gives one"):
            segment(other, model)
    with pytest.raises(ValueError, match="need hints"):
        segment(image, model, 1).cut(closed=True)


@pytest.mark.parametrize("segments, side", [(64, 8), (65, 15), (225, 15), (226, 30), (901, 60)])
def test_a_palette_grows_with_the_segments_and_stays_coloured(segments, side, tmp_path):
    maps = np.arange(64 * 64).reshape(1, 64, 64) % segments
    for first in (8, 16) if side > 8 else (8,):  # 16: of 8 bits
        cells, found = segmenting.placed(np.concatenate([maps, maps[:, ::-1]]), first)
        assert found == side and [len(np.unique(one)) for one in cells] == [segments] * 2
        assert 0 <= cells.min() and cells.max() < side**2
    sample.save_ids(cells[0].numpy(), side, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == ("P" if side < 16 else "I;16")


def test_two_samples_of_the_tiles_take_turns(by_grey):
    job = next(denoise([prepare(crowd()[0], model_of(), tiles=2)], model_of(), 5))
    assert [len(each.x_hat) for each in (job, *job.tiles)] == [5, 2, 2, 2, 2]
    for k, draw in ((0, 0), (3, 1), (4, 0)):
        each = [view.soft for view in evidence_of(job, model_of().codec, slice(k, k + 1)).views[1:]]
        for soft, tile in zip(each, job.tiles):
            assert np.allclose(soft, tile.x_hat[draw].clamp(-1, 1).permute(1, 2, 0)[None])
    whole, *tiles = evidence_of(job, model_of().codec).views
    assert [len(view.soft) for view in (whole, *tiles)] == [5, 2, 2, 2, 2]
    again = [replace(v, soft=v.soft[[0, 1, 0, 1, 0]], cells=v.cells[[0, 1, 0, 1, 0]]) for v in tiles]
    few, many = (tree.gather(job.scene, whole.soft, whole.cells, 64, views) for views in (tiles, again))
    region = tree.regions(few)
    a, b = (tree.Graph(evidence, region) for evidence in (few, many))
    assert np.allclose(a.seen, b.seen) and np.allclose(a.count, b.count)


def test_a_job_keeps_its_samples_and_gets_those_that_it_lacks(by_grey):
    image, _ = crowd()
    whole, job = (prepare(image, model_of(), seed=7, tiles=2) for _ in range(2))
    (all_at_once,) = denoise([whole], model_of(), 3, 1)
    first = replace(job, tiles=[])  # the same list of samples
    assert next(denoise([first], model_of(), 2, 1)) is first and not first.lacks(2) and first.tiles == []
    for n, made in ((2, 8), (3, 1), (3, 0), (1, 0)):
        by_grey.clear()
        assert next(denoise([job], model_of(), n, 1)) is job and not job.lacks(n) and len(by_grey) == made
    for a, b in zip((whole, *whole.tiles), (job, *job.tiles)):
        assert len(a.x_hat) == len(b.x_hat) and all(map(torch.equal, a.x_hat, b.x_hat))


def test_hints_reach_every_tile_that_they_lie_in(by_grey):
    image, _ = crowd()
    hints = hint_map(128, 128, "64,64; 10,10")
    job = prepare(image, model_of(hints=0.5), hints, tiles=2)
    tiles = job.tiles
    assert [int((tile.known[:, : tile.size[0]].abs().sum(0) > 0).any()) for tile in tiles] == [1] * 4
    count = [len(torch.unique(tile.known.flatten(1).mT, dim=0)) - 1 for tile in tiles]
    assert count == [2, 1, 1, 1]
    answer = segment(image, model_of(hints=0.5), 1, hints=hints, closed=True, tiles=2).answer
    assert len(answer.segments) == 2
    corner = prepare(image, model_of(hints=0.5), hint_map(128, 128, "10,10"), tiles=2)
    assert [bool(tile.known.any()) for tile in corner.tiles] == [True, False, False, False]
    next(denoise([corner], model_of(hints=0.5), 1, batch=8))  # they fit into one batch


def test_auto_looks_closer_where_segments_are_small(by_grey):
    few, many = (crowd(across=a, radius=r)[0] for a, r in ((2, 25), (6, 7)))
    chosen = [len(next(denoise([prepare(image, model_of(), tiles="auto")], model_of(), 1)).tiles)
              for image in (few, many)]
    assert chosen[0] == 0 and chosen[1] in (9, 16)
    with pytest.raises(ValueError, match="tiles are a number from 1 to 16 a side, or auto, not 0"):
        segment(few, model_of(), tiles=0)


def test_stopped_halfway_what_is_whole_counts(by_grey):
    job = next(denoise([prepare(crowd()[0], model_of(), tiles=2)], model_of(), 3))
    job.tiles[3].x_hat.pop()
    part = job.first(3)
    assert len(part.x_hat) == 3 and {len(tile.x_hat) for tile in part.tiles} == {1}
    job.tiles[0].x_hat.clear()
    assert len(job.first(3).x_hat) == 3 and job.first(3).tiles == []
    job.clear()
    assert not job.x_hat and len(job.tiles) == 4 and not any(tile.x_hat for tile in job.tiles)


def test_views_of_all_that_say_the_same_change_nothing():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 14, 3)).astype(np.uint8)
    soft = rng.normal(size=(2, 12, 14, 3)).clip(-1, 1)
    cells = ((soft > 0) << np.arange(3)).sum(-1)
    same = [tree.View(soft, cells, np.full((12, 14), 0.7))]
    one, two = (tree.gather(image, soft, cells, 8, tiles) for tiles in ((), same))
    a, b = (tree.Graph(e, tree.regions(one)) for e in (one, two))
    for _ in range(2):
        assert len(b.part) == 2 * len(a.part) and np.allclose(a.features(), b.features())
        to = np.arange(a.n) // 2
        a.merge(to, to.max() + 1)
        b.merge(to, to.max() + 1)


def test_what_a_view_says_of_a_pair_is_what_it_sees_of_it():
    """Two regions left and right; one view of all, blind to them, and one of the middle, which parts them."""
    h, w = 6, 8
    region = np.repeat(np.arange(2), 4)[None].repeat(h, 0)
    blind, middle = np.ones((1, h, w, 2)), np.where(region[None, :, 2:6, None] == 0, -1.0, 1.0).repeat(2, 3)
    view = tree.View(middle, (middle > 0).any(3).astype(int), np.ones((h, 4)), left=2)
    evidence = tree.gather(np.zeros((h, w, 3), np.uint8), blind, np.zeros((1, h, w), int), 2, [view])
    features = tree.Graph(evidence, region).features()
    # it sees all of the border, and half of each region; the whole's view sees all of both, but less well
    share = 1 * 0.5 / (1 * 0.5 + tree.WHOLE**2)
    assert features.shape[0] == 1 and features[0, 29] == pytest.approx(2 * share)  # bits that differ
    assert features[0, 31] == pytest.approx(1 - share)  # together
    assert evidence.steps[1][0, 3, 4] == pytest.approx(1 / (1 + tree.WHOLE))
    assert evidence.steps[1][0, 0, 4] == 0


def test_codes_without_gaps_are_the_same_maps():
    cells = np.random.default_rng(0).choice([0, 3, 7, 40, 200], (5, 6, 7))
    cells[2], cells[3] = 9, np.where(cells[3] == 7, 0, cells[3])
    new = without_gaps(cells)
    assert new.shape == cells.shape
    assert [one.max() + 1 for one in new] == [len(np.unique(one)) for one in cells]
    for a, b in zip(cells, new):
        assert ((a.ravel()[:, None] == a.ravel()) == (b.ravel()[:, None] == b.ravel())).all()


def test_object_precision_by_hand():
    true = torch.zeros(2, 10, 10, dtype=torch.long)
    true[0, 1:4, 1:4], true[0, 6:9, 6:9], true[1] = 1, 2, 5
    pred = torch.full((2, 10, 10), 9)
    pred[0, 1:4, 1:4], pred[0, 6:8, 6:7], pred[0, 0, 5:9] = 3, 4, 7
    ap = object_precision(pred, true)
    assert ap[0] == pytest.approx(1 / (1 + 2 + 1)) and ap[1].isnan()  # one right, two wrong, one missed


@pytest.mark.parametrize("dark", [False, True])
def test_baselines_for_cells(dark):
    image, truth = crowd(across=4, radius=8)
    image = 255 - np.asarray(image) if dark else np.asarray(image)
    assert alike(otsu(image), truth) == 1
    assert len(watershed(image).unique()) == 17 and alike(watershed(image), truth) > 0.95
    two = np.zeros((40, 60, 3), np.uint8)
    y, x = np.mgrid[:40, :60]
    two[((y - 20) ** 2 + (x - 20) ** 2 < 144) | ((y - 20) ** 2 + (x - 38) ** 2 < 144)] = 200
    assert len(otsu(two).unique()) == 2 and len(watershed(two).unique()) == 3  # two discs that overlap


@pytest.mark.parametrize("side, mode", [(8, "L"), (16, "I;16"), (256, "RGB")])
def test_ids_of_any_number_are_kept(tmp_path, side, mode):
    labels = np.arange(side * side).reshape(side, side)
    sample.save_ids(labels, side, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == ("P" if mode == "L" else mode)
        ids = np.asarray(picture).astype(int)
    assert np.array_equal(ids @ [1, 256, 65536] if mode == "RGB" else ids, labels + 1)
