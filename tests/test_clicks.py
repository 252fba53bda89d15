"""clicks.py: simulated users and baselines against loops, dense algebra and toy objects."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label

import metrics
from answers import clicks, scoring
from answers.clicks import (
    baselines,
    clicks_of,
    clicks_to,
    hints_of,
    middle_of_largest,
    nearest_click,
    random_walker,
)
from answers.jobs import prepare
from answers.segment import segment
from answers.tree import gather, lab
from diffusion import Diffusion
from model import UNet
from sources.formats import Item, read_image


def depth(mask, y, x):
    """Distance from a pixel to the nearest one that is not of the mask; what is outside of the map is not."""
    h, w = mask.shape
    return min(
        np.hypot(y - v, x - u)
        for v in range(-1, h + 1)
        for u in range(-1, w + 1)
        if not (0 <= v < h and 0 <= u < w and mask[v, u])
    )


def test_annotators_click_where_segments_are_deepest():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        true = rng.integers(-1, 4, (4, 3)).repeat(3, 0).repeat(4, 1)[:11, :10]
        points = clicks_of(true)
        ids = [true[p] for p in points]
        area = [(true == k).sum() for k in ids]
        assert sorted(ids) == sorted(set(true[true >= 0])) and area == sorted(area, reverse=True)
        for (y, x), k in zip(points, ids):
            mask = true == k
            assert depth(mask, y, x) == pytest.approx(max(depth(mask, v, u) for v, u in np.argwhere(mask)))
        hints = hints_of(points[:2], true.shape)
        assert [tuple(np.argwhere(hints == k)[0]) for k in (1, 2)] == points[:2] and (hints > 0).sum() == 2
    assert clicks_of(np.full((3, 3), -1)) == []


def test_the_walker_is_a_dense_solution():
    """The chance of reaching a hint is the neighbours' mean, weighted by how easy each step is."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        photo = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
        photo = (photo // 8 + 100).astype(np.uint8)  # of like colours: the walk goes everywhere
        hints = np.zeros(25, int)
        hints[rng.permutation(25)[:5]] = 7, 2, 2, 4, 7
        colour, A, b = lab(photo / 255).reshape(25, 3), np.eye(25), np.zeros((25, 3))
        numbers = [2, 4, 7]
        for p in range(25):
            if hints[p]:
                b[p, numbers.index(hints[p])] = 1
                continue
            near = [q for q in range(25) if abs(p // 5 - q // 5) + abs(p % 5 - q % 5) == 1]
            ease = np.array([np.exp(-0.02 * ((colour[p] - colour[q]) ** 2).sum()) + 1e-6 for q in near])
            A[p, near] -= ease / ease.sum()
        want = np.array(numbers)[np.linalg.solve(A, b).argmax(1)]
        assert (random_walker(photo, hints.reshape(5, 5)).ravel() == want).all()


def test_nearest_click_and_watershed_are_loops():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        photo = rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)
        hints = np.zeros(72, int)
        hints[rng.permutation(72)[:4]] = 3, 1, 2, 2
        hints = hints.reshape(8, 9)
        near = nearest_click(hints)
        for y, x in np.ndindex(8, 9):
            far = {k: min(np.hypot(y - v, x - u) for v, u in np.argwhere(hints == k)) for k in (1, 2, 3)}
            assert far[near[y, x]] == min(far.values())

        colour, wet = lab(photo / 255), hints.copy()
        while (wet == 0).any():  # the lowest step from wet to dry
            steps = [
                (np.linalg.norm(colour[y, x] - colour[v, u]), (v, u), wet[y, x])
                for y, x in np.argwhere(wet)
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                if 0 <= v < 8 and 0 <= u < 9 and not wet[v, u]
            ]
            _, at, number = min(steps, key=lambda step: step[0])
            wet[at] = number
        methods = baselines(photo, torch.ones(1, 2, 8, 9))
        flooded = methods["watershed, Lab"](hints)
        assert all(len({flooded[p] for p in zip(*np.nonzero(wet == k))}) == 1 for k in (1, 2, 3))
        assert len(np.unique(flooded)) == 3
        assert (methods["nearest click"](hints) == near).all()
        # samples without a segment say nothing: the photo alone is left
        assert (methods["watershed, samples"](hints) == flooded).all()


def test_the_middle_of_the_largest_wrong_part():
    wrong = np.zeros((9, 12), bool)
    wrong[0:2, 0:2], wrong[3:8, 4:9] = True, True
    assert middle_of_largest(wrong) == (25, 5, 6) and middle_of_largest(np.zeros((3, 3), bool)) == (0, 0, 0)
    wrong[:] = True
    assert middle_of_largest(wrong)[0] == 108 and label(wrong)[1] == 1


@pytest.fixture
def disc():
    """An object in the photo's pixels, 60 x 80, and the network's, 12 x 16."""
    y, x = np.mgrid[:60, :80]
    truth = (y - 28) ** 2 + (x - 40) ** 2 < 18**2
    photo = np.where(truth[..., None], (200, 60, 40), (40, 90, 200)).astype(np.uint8)
    return truth, truth[2::5, 2::5].astype(int), Image.fromarray(photo)


def test_clicks_until_an_object_is_right(disc):
    truth, small, picture = disc
    seen = []

    def perfect(hints):
        seen.append(hints.copy())
        return small

    def everything(hints):
        return np.zeros_like(small)

    def halves(hints):
        """The first click brings one half of the object, the second the other."""
        return np.where(np.arange(16) <= 8, small, 0) if (hints == 1).sum() == 1 else small

    def too_much(hints):
        """All, until somebody says what does not belong."""
        return small if (hints == 2).any() else np.ones_like(small)

    ask = lambda method, target=0.85: clicks_to(method, truth, (12, 16), picture, target, 20)
    assert ask(perfect) == 1 and ask(halves) == ask(too_much) == 2 and ask(everything) == 20
    assert (seen[0] > 0).sum() == 1 and seen[0][5, 8] == 1  # in the middle of the object
    assert ask(perfect, 0.999) == 20  # which no map of the network's pixels reaches


@pytest.fixture
def scene(tmp_path):
    """Three photos of a bright disc on dark ground, and the discs' masks."""
    y, x = np.mgrid[:48, :64]
    maps, items = [], []
    for k in range(3):
        disc = (y - 20 - k) ** 2 + (x - 30) ** 2 < 14**2
        rng = np.random.default_rng(k)
        photo = np.where(disc[..., None], 200, 60) + rng.integers(-9, 9, (48, 64, 3))
        Image.fromarray(photo.astype(np.uint8)).save(tmp_path / f"{k}.png")
        maps.append(disc)
        items.append(
            Item(str(tmp_path / f"{k}.png"), ["a", "b"], lambda item: [item.arg.astype(int) + 1] * 2, disc)
        )
    return maps, items


class Packed:
    """The part of a packed data set that clicks.py asks for, at the network's 12 x 16."""

    def __init__(self, maps, files):
        self.disc, self.items = maps, list(range(len(files)))

    def __len__(self):
        return len(self.items)

    def maps(self, i):
        small = torch.from_numpy(self.disc[i][2::4, 2::4].astype(np.int64))
        out = torch.full((2, 16, 16), -1)
        out[:, :12] = small
        out[1, :, 8:][out[1, :, 8:] == 0] = 2  # the second one parts the background
        return out


def evidence_for(maps, files):
    """clicks.to_click without a network: samples that see the disc, and nothing else; of a model that sees
    hints only those that have seen hints."""

    def to_click(model, data, positions, n, *_, **asked):
        for i in positions:
            small = maps[i][2::4, 2::4].astype(int)
            photo = np.array(Image.open(files[i].image).resize((16, 12), Image.Resampling.BOX))
            soft = np.stack([small * 2.0 - 1, -np.ones_like(small)], axis=2)[None].repeat(n, 0)
            plain = gather(photo, soft, small[None].repeat(n, 0), 4)
            blind = gather(photo, -np.ones_like(soft), np.zeros_like(small)[None].repeat(n, 0), 4)
            by_baseline = baselines(photo, torch.from_numpy(soft).permute(0, 3, 1, 2))
            yield (i, data.maps(i)[:, :12].numpy(), by_baseline,
                   lambda hints=None: blind if hints is None and model.diffusion.hints else plain)

    return to_click


class Plain:
    """A model whose samples are joined as they are."""

    tidy = dict(least=0, merge=0.0)
    diffusion = Diffusion()


def test_the_curve_of_clicks(scene, monkeypatch):
    maps, files = scene
    data = Packed(maps, files)
    monkeypatch.setattr(clicks, "to_click", evidence_for(maps, files))
    curve = clicks.clicks_curve(Plain(), data, [0, 1, 2], [0, 2, "all"], n=2)
    methods = {"open", "closed", "nearest click", "watershed, Lab", "random walker", "watershed, samples"}
    assert curve.keys() == methods and {k: len(v) for k, v in curve["open"].items()} == {0: 3, 2: 3, "all": 3}
    assert all(curve[m].keys() == {2, "all"} for m in methods - {"open"})  # without clicks, nothing
    for i, one in enumerate(curve["open"][0]):
        truth = data.maps(i)[:, :12]
        answer = torch.from_numpy(maps[i][2::4, 2::4].astype(np.int64)).expand(2, -1, -1)
        assert one["ari"] == pytest.approx(float(metrics.scores(answer, truth)["ari"].mean()))
        assert 0.3 < one["ari"] < 1  # the second annotator has three segments
    for name in methods - {"open"}:  # a segment for each click
        assert all(one["pred"] == 2 for one in curve[name][2])
        assert all(one["pred"] == one["true"] == 2.5 for one in curve[name]["all"])


def test_a_network_that_sees_hints_samples_again(scene, monkeypatch):
    maps, files = scene
    hinted = Plain()
    hinted.diffusion = Diffusion(hints=0.5)
    monkeypatch.setattr(clicks, "to_click", evidence_for(maps, files))
    data, plain = Packed(maps, files), Plain()
    without, curve = (clicks.clicks_curve(m, data, [0], [0, 2], n=2) for m in (plain, hinted))
    assert curve.keys() - without.keys() == {"open, at once", "closed, at once"}
    assert curve["open"][2] == without["open"][2] and curve["closed"][2] == without["closed"][2]
    assert curve["open, at once"][2][0]["ari"] < curve["open"][2][0]["ari"]  # what was sampled before
    needed, _ = clicks.clicks_needed(hinted, data, files, 0.85, objects=2, n=2)
    assert needed["tree"] == [1, 1] and sum(needed["tree, at once"]) > 2
    needed, _ = clicks.clicks_needed(hinted, data, files, 0.85, objects=2, n=2, at_once=True)
    assert "tree" in needed and "tree, at once" not in needed


def test_samples_that_have_seen_clicks(model, monkeypatch):
    """The same as `segment` makes of the same hints: they get more guidance only if asked for."""
    net = UNet(11, 4, width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    hinted = dataclasses.replace(model, net=net, diffusion=Diffusion(hints=0.5),
                                 sampling={**model.sampling, "guidance": 8.0})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    hints = np.zeros((16, 16), int)
    hints[3, 3], hints[12, 9] = 1, 2
    for module in (clicks, scoring):
        monkeypatch.setattr(module, "packed_job", lambda data, i, seed=0: prepare(picture, hinted, seed=seed))
    data = type("Data", (), dict(maps=lambda self, i: torch.zeros(1, 16, 16, dtype=torch.long)))()
    ((_, _, _, evidence),) = clicks.to_click(hinted, data, [0], 2, 5, 1, 1, None)
    same = segment(picture, hinted, n=2, seed=clicks.seed_of(5, 0), hints=hints)
    less = segment(picture, hinted, n=2, seed=clicks.seed_of(5, 0), hints=hints, guidance=3.0)
    more = segment(picture, hinted, n=2, seed=clicks.seed_of(5, 0), hints=hints, guidance=8.0)
    assert torch.equal(same.x_hat, less.x_hat) and not torch.equal(same.x_hat, more.x_hat)
    assert (evidence(hints).views[0].soft == same.evidence.views[0].soft).all()
    ((_, _, _, asked),) = clicks.to_click(hinted, data, [0], 2, 5, 1, 1, None, guidance=8.0)
    assert (asked(hints).views[0].soft == more.evidence.views[0].soft).all()
    ((_, _, _, before),) = clicks.to_click(hinted, data, [0], 2, 5, 1, 1, None, True)
    assert before(hints) is before() and not np.array_equal(before().views[0].soft, same.x_hat.numpy())
    assert (evidence().views[0].soft != same.evidence.views[0].soft).any() and evidence() is evidence(None)
    hints[1, :16], hints[5, 5] = np.arange(20, 36), 17  # more than the 16 codes
    many = segment(picture, hinted, n=2, seed=clicks.seed_of(5, 0), hints=hints)
    assert (evidence(hints).views[0].soft == many.evidence.views[0].soft).all()


def test_tiles_see_the_clicks_too(model, scene):
    """The same as `segment` makes of the photo's file with the same hints, whose pixels are larger there."""
    maps, files = scene
    net = UNet(11, 4, width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    hinted = dataclasses.replace(model, net=net, diffusion=Diffusion(hints=0.5))
    photo = read_image(files[1].image)
    data = Packed(maps, files)
    data.get = lambda i: (torch.from_numpy(np.array(photo.resize((16, 12))))[None], None, [(12, 16)])
    data.photo = lambda i: np.array(photo.resize((16, 12)))
    hints = np.zeros((12, 16), int)
    hints[2, 3], hints[5, 8] = 2, 1
    ((_, _, methods, evidence),) = clicks.to_click(hinted, data, [1], 3, 4, 1, 2, files)
    seed = clicks.seed_of(4, 1)
    for given in (None, hints):
        own = None if given is None else given.repeat(4, 0).repeat(4, 1)
        same = segment(photo, hinted, n=3, seed=seed, hints=own, tiles=2).evidence
        for a, b in zip(evidence(given).views, same.views, strict=True):
            assert (a.soft == b.soft).all()
    assert len(same.views) == 5 and methods["watershed, samples"](hints).shape == (12, 16)
    curve = clicks.clicks_curve(hinted, data, [1], [2], 2, tiles=2, files=files)
    assert {"open", "closed", "open, at once"} < curve.keys() and curve["closed"][2][0]["pred"] <= 2
    # of fewer pixels than the packed one: no click is lost
    small = Image.fromarray(np.asarray(photo)[::16, ::16])
    for k, item in enumerate(files):
        small.save(item.image)
        job = scoring.job_of(data, k, hinted, 0, 2, files, hints)
        assert small.size < (12, 16)[::-1] and set(np.unique(job.hints)) == {0, 1, 2}
    # a map of another size than the clicks is looked up where the click is
    fine = maps[1].astype(int)[::2, ::2]
    assert clicks_to(lambda hints: fine, maps[1], (12, 16), photo, 0.85, 20) == 1


def test_clicks_that_objects_need(scene, monkeypatch):
    maps, files = scene
    monkeypatch.setattr(clicks, "to_click", evidence_for(maps, files))
    data = Packed(maps, files)
    counts, left_out = clicks.clicks_needed(Plain(), data, files, 0.85, objects=4, n=2)
    assert left_out == 0 and {len(v) for v in counts.values()} == {4}
    assert counts["tree"] == [1] * 4 and sum(counts["nearest click"]) > 8
    counts, left_out = clicks.clicks_needed(Plain(), data, files, 0.999, objects=100, n=2)
    assert left_out == 6 and counts == {}  # two objects an image: none survives the network's pixels so well
