"""tree.py against plain Python on tiny maps: regions, pairs of them, merging round by round, cuts."""

import heapq
import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from answers import tree
from answers.tree import (
    GRAINS,
    LEARNT,
    LEVELS,
    PLACE,
    SMALLER,
    Graph,
    appearance_of,
    confidence,
    forest,
    gather,
    grow,
    grow_each,
    lab,
    learnt,
    log_odds,
    regions,
    regrow,
)

RNG = np.random.default_rng


def evidence_of(seed, h=12, w=11, n=3, codes=16, smooth=True, times=1):
    """Random samples of a random photo, each so many times: soft bits of `codes` codes, mostly in patches."""
    rng, bits = RNG(seed), codes.bit_length() - 1
    image = rng.integers(0, 256, (h, w, 3))
    if smooth:
        image = gaussian_filter(image.astype(float), (1, 1, 0))
    cells = rng.integers(0, codes, (n, -(-h // 3), -(-w // 3))).repeat(3, 1).repeat(3, 2)[:, :h, :w]
    soft = (cells[..., None] >> np.arange(bits) & 1) * 2.0 - 1
    soft = (
        (soft * rng.uniform(0.2, 1, soft.shape) + rng.normal(0, 0.3, soft.shape)).clip(-1, 1).repeat(times, 0)
    )
    return gather(image.astype(np.uint8), soft, ((soft > 0) << np.arange(bits)).sum(-1), codes)


def network(seed, bias=0.0):
    """Random weights of the kind that fit_tree.py fits."""
    rng, net = RNG(seed), {}
    for name, inputs in (("", 53), ("hint_", 61)):
        shapes = dict(w1=(8, inputs), b1=(8,), w2=(6, 8), b2=(6,), w3=(1, 6))
        net[name + "mean"], net[name + "scale"] = rng.normal(0, 1, inputs), rng.uniform(0.5, 3, inputs)
        net |= {name + key: rng.normal(0, 0.4, shape) for key, shape in shapes.items()}
        net[name + "b3"] = np.full(1, bias)
    return {**net, "confidence": rng.normal(0, 1, 4)}


def hints_at(shape, *points):
    out = np.zeros(shape, int)
    for number, (y, x) in points:
        out[y, x] = number
    return out


def same(a, b):
    """Whether two label maps are one partition."""
    pairs = len(np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))


def finer(a, b):
    """Whether every segment of a lies within one of b."""
    return len(np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).T) == len(np.unique(a))


def neighbours(h, w):
    """Pairs of pixels: (axis, pixel, the next one down or to the right)."""
    for y, x in np.ndindex(h, w):
        for axis, (v, u) in enumerate(((y + 1, x), (y, x + 1))):
            if v < h and u < w:
                yield axis, (y, x), (v, u)


# ---- regions


def flood(jump, marker):
    """The cheapest step from a wet pixel to a dry one comes next."""
    out, steps = marker.copy(), {}
    for axis, a, b in neighbours(*marker.shape):
        steps.setdefault(a, []).append((jump[axis][a], b))
        steps.setdefault(b, []).append((jump[axis][a], a))
    edge = [(cost, to, int(out[at])) for at in zip(*np.nonzero(out)) for cost, to in steps.get(at, [])]
    heapq.heapify(edge)
    while edge:
        _, at, number = heapq.heappop(edge)
        if not out[at]:
            out[at] = number
            for cost, to in steps[at]:
                heapq.heappush(edge, (cost, to, number))
    return out


@pytest.mark.parametrize(
    "h,w,markers", [(1, 1, 1), (1, 9, 2), (7, 1, 3), (2, 2, 2), (9, 12, 1), (9, 12, 5), (9, 12, 40)]
)
def test_a_forest_is_a_priority_flood(h, w, markers):
    for seed in range(20):
        rng = RNG(seed)
        jump = [rng.random((h - 1, w)), rng.random((h, w - 1))]
        marker = np.zeros(h * w, int)
        where = rng.permutation(h * w)[: 2 * markers]
        marker[where] = (
            rng.integers(1, markers + 1, len(where)) * 3
        )  # numbers with gaps, markers in several pieces
        marker = marker.reshape(h, w)
        assert same(forest(jump, marker), flood(jump, marker))


def test_regions_are_the_minima_and_the_hints():
    """One for each place of a hint, and for each minimum that is not near a hint."""
    points = ((1, 1), (10, 9), (5, 5))
    for seed in range(10):
        evidence = evidence_of(seed)
        hints = hints_at((12, 11), *zip((2, 2, 1), points))
        region = regions(evidence, hints)
        places = {region[point] for point in points}
        assert len(places) == 3
        minima = {
            region[y, x]
            for y, x in np.argwhere(evidence.low)
            if min(np.hypot(y - v, x - u) for v, u in points) >= tree.CLEAR
        }
        assert minima.isdisjoint(places) and len(minima) > 2
        assert minima | places == set(np.unique(region)) == set(range(region.max() + 1))


# ---- evidence and pairs of regions


def test_lab_golden():
    """CIE's values for sRGB white, black, red, green, blue and middle grey (Lindbloom)."""
    rgb = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    want = [
        [100, 0, 0],
        [0, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [53.39, 0, 0],
    ]
    assert np.allclose(lab(rgb), want, atol=0.1)


def pair_by_force(region, image, soft, cells, codes, a, b):
    """What the network sees of two regions, from their pixels and borders one by one: (53,)."""
    look, colour = appearance_of(image, max(image.shape[:2])), lab(image / 255) / 20
    calm = np.stack([gaussian_filter(v, 1) for v in np.moveaxis(colour, 2, 0)], axis=2)
    far, (h, w) = np.pad(calm, ((1, 1), (1, 1), (0, 0)), "edge"), region.shape
    border, inner = [], {a: [], b: []}
    for axis, (y, x), (v, u) in neighbours(h, w):
        sides = {region[y, x], region[v, u]}
        if not sides <= {a, b}:
            continue
        dy, dx = v - y, u - x
        step = [
            np.linalg.norm(colour[y, x] - colour[v, u]),
            np.linalg.norm(far[y + 1 - dy, x + 1 - dx] - far[y + 1 + 2 * dy, x + 1 + 2 * dx]),
            np.mean([min(1, abs(s[y, x] - s[v, u]).sum() / 2) for s in soft]),
            np.mean([c[y, x] != c[v, u] for c in cells]),
        ]
        (border if len(sides) == 2 else inner[region[y, x]]).append(step)
    p, q = region == a, region == b
    small, large = (a, b) if p.sum() < q.sum() else (b, a)
    apart = abs(look[p].mean(0) - look[q].mean(0))
    bits = [min(2, abs(s[p].mean(0) - s[q].mean(0)).sum() / 2) for s in soft]
    share = {
        k: [np.bincount(c[region == k], minlength=codes) / (region == k).sum() for c in cells] for k in (a, b)
    }
    pure = {k: [(v**2).sum() for v in share[k]] for k in (a, b)}
    together = [(v * u).sum() for v, u in zip(share[a], share[b])]
    alike = [t / (v * u) ** 0.5 for t, v, u in zip(together, pure[a], pure[b])]
    seen = [
        np.mean(bits),
        min(bits),
        np.mean(together),
        np.log(np.mean(together) + 0.02),
        np.mean(alike),
        np.log(np.mean(alike) + 0.02),
        np.mean(np.array(alike) > 0.5),
        np.mean(pure[small]),
        np.mean(pure[large]),
    ]
    inside = [np.mean(inner[k], axis=0) if inner[k] else np.zeros(4) for k in (small, large)]
    area = {k: (region == k).sum() for k in (a, b)}
    sizes = [len(border) / area[small] ** 0.5, area[large] / region.size, area[small] / region.size]
    return np.concatenate(
        [[np.linalg.norm(apart[:3])], apart, seen, np.mean(border, axis=0), *inside, np.log(sizes)]
    )


def touching(region):
    pairs = {tuple(sorted((region[a], region[b]))) for _, a, b in neighbours(*region.shape)}
    return sorted((i, j) for i, j in pairs if i != j)


def test_features_pixel_by_pixel_and_after_merges():
    rng, h, w, codes = RNG(0), 9, 8, 4
    image, soft = rng.integers(0, 256, (h, w, 3)).astype(np.uint8), rng.uniform(-1, 1, (2, h, w, 3))
    cells = rng.integers(0, codes, (2, h, w))
    evidence = gather(image, soft, cells, codes)
    region = regions(evidence)
    region = np.unique(region, return_inverse=True)[1].reshape(h, w)
    assert np.allclose(np.moveaxis(evidence.appearance[..., PLACE] * 9, 2, 0), np.mgrid[:h, :w])
    graph = Graph(evidence, region)
    for _ in range(3):  # as they are, and twice after merges of several regions at once
        assert list(zip(graph.i, graph.j)) == touching(region) and graph.n == region.max() + 1
        for row, i, j in zip(graph.features(), graph.i, graph.j):
            want = pair_by_force(region, image, soft, cells, codes, i, j)
            sure = np.ones(53, bool)
            # of equal size: which of the two is the smaller is anybody's choice
            if (region == i).sum() == (region == j).sum():
                sure[36:38] = sure[42:50] = False
            assert np.allclose(row[sure], want[sure], atol=1e-9)
            assert np.exp(row[SMALLER]) == pytest.approx(min((region == i).mean(), (region == j).mean()))
        new = Graph(evidence, region)
        assert np.allclose(graph.features(), new.features(), atol=1e-9)
        # anything with anything
        to = np.unique(rng.integers(0, graph.n * 2 // 3, graph.n), return_inverse=True)[1]
        graph.merge(to, to.max() + 1)
        region = to[region]


def test_equally_good_pairs_join_one_after_the_other():
    """Four strips of three samples, each with one border, after another strip: each pair is as likely."""
    strip = np.arange(48)[None].repeat(12, 0) // 12
    cells = np.stack([strip > k for k in range(3)]).astype(int)
    soft = np.stack([cells * 2.0 - 1] * 2, axis=-1)
    tree = grow(gather(np.full((12, 48, 3), 128, np.uint8), soft, cells, 4))
    assert len(np.unique(tree.odds.round(6))) > 1  # once two are joined, the next is another question
    assert [len(np.unique(tree.cut(grain, 0.25))) for grain in GRAINS] == [1, 2, 4]


@pytest.mark.parametrize("name, inputs", [("", 53), ("hint_", 61)])
def test_the_networks_are_what_torch_computes(name, inputs):
    net = learnt()
    w = len(net[name + "b1"])
    linear, silu = torch.nn.Linear, torch.nn.SiLU()
    model = torch.nn.Sequential(linear(inputs, w), silu, linear(w, w), silu, linear(w, 1)).double()
    for p, key in zip(model.parameters(), ("w1", "b1", "w2", "b2", "w3", "b3")):
        p.data = torch.from_numpy(net[name + key])
    mean, scale = net[name + "mean"], net[name + "scale"]
    x = mean + scale * RNG(0).normal(0, 4, (5, 10, inputs))
    want = model(torch.from_numpy((x - mean) / scale).clamp(-6, 6))[..., 0].detach().numpy()
    assert np.allclose(tree.perceptron(x, net, name), want)
    if not name:
        assert np.allclose(log_odds(x[0], net), want[0])


def test_a_lost_file_is_named(tmp_path):
    (tmp_path / "b.npz").write_bytes(b"nothing")
    whole = LEARNT.read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "d.npz", **{**learnt(), "w1": np.zeros((48, 52))})
    np.save(tmp_path / "e.npy", np.zeros(3))
    (tmp_path / "e.npy").rename(tmp_path / "e.npz")
    (tmp_path / "f.npz").write_bytes(b"")
    np.savez(tmp_path / "g.npz", **{k: v for k, v in learnt().items() if k != "confidence"})
    np.savez(tmp_path / "h.npz", **{**learnt(), "offset": np.zeros(2)})
    for name, inputs in (("i.npz", 60), ("before.npz", 49)):  # of hints, files of before knew fewer features
        few = {k: v[..., :inputs] if k in ("hint_mean", "hint_scale", "hint_w1") else v
               for k, v in learnt().items()}
        np.savez(tmp_path / name, **few)
    assert len(learnt(tmp_path / "before.npz")["hint_mean"]) == 49
    for name in ("a.npz", "b.npz", "c.npz", "d.npz", "e.npz", "f.npz", "g.npz", "h.npz", "i.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            learnt(tmp_path / name)


# ---- the tree


@pytest.mark.parametrize("hinted", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_regions_join_level_by_level(seed, hinted):
    """In each round all mutual favourites join that are above the highest level with any."""
    evidence, net, rounds = evidence_of(seed), network(seed), []
    hints = hints_at((12, 11), (1, (2, 2)), (2, (9, 8)), (3, (9, 1)), (1, (3, 8))) if hinted else None
    grown = grow(evidence, net, hints, watch=lambda *seen: rounds.append([np.copy(v) for v in seen]))
    level, start = 0, rounds[0][0]
    assert same(start, regions(evidence, hints)) and len(rounds) > 3
    for (region, features, i, j), after in zip(rounds, [*(r[0] for r in rounds[1:]), None]):
        graph = Graph(evidence, region)
        assert list(zip(i, j)) == list(zip(graph.i, graph.j))
        assert np.allclose(features, graph.features(), atol=1e-9)
        score = dict(zip(zip(i.tolist(), j.tolist()), log_odds(features, net)))
        best = {k: max((s for pair, s in score.items() if k in pair), default=-np.inf)
                for k in range(graph.n)}
        mutual = [pair for pair, s in score.items() if s == best[pair[0]] == best[pair[1]]]
        while mutual and level < len(LEVELS) and not any(score[pair] > LEVELS[level] for pair in mutual):
            level += 1
        lowest = LEVELS[level] if level < len(LEVELS) else -np.inf
        want = region.copy()
        for a, b in mutual:
            if score[a, b] > lowest:
                want[want == b] = a
        assert len(np.unique(want)) == 1 if after is None else same(want, after)
    assert len(grown.odds) == len(np.unique(start)) - 1 and len(np.unique(grown.cut(1))) == 1


def test_many_regions_have_numbers_that_their_pairs_fit_into():
    assert grow(evidence_of(0)).region.dtype == np.int64  # of 50,000 regions, up to 50,000^2


def test_the_way_to_the_root_gets_shorter():
    to = [0, *range(9)]
    assert tree.root(to, 9) == 0 and to[9] == 7 and tree.root(to, 9) == 0 and to[9] <= 5


def cut_by_force(grown, bar):
    """Merges at more than `bar`, one after the other, as far as all below them are there."""
    label, members = grown.region.copy(), {k: {k} for k in range(grown.region.max() + 1)}
    height = dict.fromkeys(members, np.inf)
    for k, ((a, b), odds) in enumerate(zip(grown.children, grown.odds), len(members)):
        members[k], height[k] = members[a] | members[b], min(odds, height[a], height[b])
        if height[k] > bar:
            label[np.isin(grown.region, list(members[k]))] = min(members[k])
    return label


@pytest.mark.parametrize(
    "net", [None, network(1), network(2, bias=2.0)], ids=["samples alone", "net", "coarser net"]
)
def test_cuts_are_what_the_merges_say_and_nest(net):
    for seed in range(3):
        grown = grow(evidence_of(seed), net)
        leaves = grown.region.max() + 1
        chain = [grown.cut("normal", offset) for offset in (-9, -1, -0.3, 0.2, 1, 9)]  # ever finer
        for grain, bar in GRAINS.items():
            for offset in (0.0, 0.4):
                assert same(grown.cut(grain, offset), cut_by_force(grown, bar + offset))
        numbers = [grown.cut(k) for k in range(1, leaves + 2)]
        assert [len(np.unique(m)) for m in numbers] == [min(leaves, k) for k in range(1, leaves + 2)]
        claimed = RNG(seed).integers(0, 3, leaves)  # half of two claims, the rest free
        claims = [grown.cut(k, claimed=claimed) for k in range(1, leaves + 2)]  # claims count, too
        for maps in ([grown.cut(g) for g in ("coarse", "normal", "fine")], chain, numbers, claims):
            assert all(finer(b, a) and set(np.unique(b)) == set(range(b.max() + 1))
                       for a, b in itertools.pairwise(maps))
        owner = claimed[grown.region]
        least = len(np.unique(claims[0]))  # two claims and a rest, which may be in pieces
        for k, m in enumerate(claims, 1):
            assert len(np.unique(m[owner == 1])) == len(np.unique(m[owner == 2])) == 1
            assert any(same(m[owner == 0], free[owner == 0]) for free in numbers)
            assert len(np.unique(m)) == min(max(k, least), 2 + (claimed == 0).sum())
        assert least == 3
    with pytest.raises(ValueError, match="'huge' is not one of coarse, normal, fine"):
        grown.cut("huge")
    with pytest.raises(ValueError, match="at least 1 segment, not 0"):
        grown.cut(0)


def test_the_samples_alone_join_what_most_join():
    """A photo without contrast; five samples see halves, two of them quarters."""
    cells = np.zeros((5, 16, 16), int)
    cells[:, :, 8:] = 1  # all
    cells[:2, 8:] += 2  # two
    soft = (cells[..., None] >> np.arange(2) & 1) * 2.0 - 1
    halves = np.arange(16) // 8 + np.zeros((16, 1), int)
    labels = grow(gather(np.full((16, 16, 3), 200, np.uint8), soft, cells, 4)).cut()
    assert same(labels, halves)
    cells[2] += 2 * (np.arange(16)[:, None] >= 8)  # now three: most part the quarters
    soft = (cells[..., None] >> np.arange(2) & 1) * 2.0 - 1
    labels = grow(gather(np.full((16, 16, 3), 200, np.uint8), soft, cells, 4)).cut()
    assert same(labels, halves + 2 * (np.arange(16)[:, None] >= 8))


@pytest.mark.parametrize("net", [None, network(3), learnt()], ids=["samples alone", "random", "learnt"])
def test_a_sample_twice_is_a_sample(net):
    for seed in range(5):
        one, two = (evidence_of(seed, 20, 17, n=1, times=times) for times in (1, 2))
        a, b = grow(one, net), grow(two, net)
        assert (
            np.array_equal(a.region, b.region)
            and np.array_equal(a.children, b.children)
            and np.allclose(a.odds, b.odds)
        )
        labels = a.cut()
        assert np.allclose(confidence(a, labels, net)[0], confidence(b, labels, net)[0])


def test_a_tree_grows_once_for_the_same(monkeypatch):
    evidence, nets, grown = evidence_of(1), (network(1), network(2)), []
    a, b = hints_at((12, 11), (1, (2, 2)), (2, (9, 8))), hints_at((12, 11), (1, (2, 2)))
    monkeypatch.setattr(tree, "grow", lambda *given: grown.append(given) or grow(*given))
    asked = [(nets[0], None, 0), (nets[0], a, 0), (nets[0], b, 0), (None, b, 0), (nets[1], b, 0),
             (nets[1], b, 5), (nets[1], None, 5)]
    for number, given in enumerate(asked, 1):
        first = regrow(evidence, *given)
        net, hints, least = given
        assert regrow(evidence, net, None if hints is None else hints.copy(), least) is first
        want = grow(evidence, *given)
        assert (first.region == want.region).all() and (first.odds == want.odds).all()
        assert len(grown) == number


@pytest.mark.parametrize("net", [None, {**learnt(), "offset": np.ones(1)}], ids=["samples alone", "learnt"])
def test_trees_that_grow_together_are_those_that_grow_alone(net):
    """Of maps of other sizes, too, and numbers of codes."""
    given = [evidence_of(seed, 20 + seed, 31 - 2 * seed) for seed in range(5)]
    given[1].codes = 19  # some are not used
    for together, evidence in zip(grow_each(given, net, 3), given, strict=True):
        alone = grow(evidence, net, least=3)
        assert np.array_equal(together.region, alone.region)
        assert np.array_equal(together.children, alone.children)
        assert np.allclose(together.odds, alone.odds) and np.allclose(together.height, alone.height)
        for grain in "coarse", "fine", 4:
            assert np.array_equal(together.cut(grain), alone.cut(grain))
        labels = alone.cut("fine")
        assert np.allclose(confidence(together, labels, net)[0], confidence(alone, labels, net)[0])


@pytest.mark.parametrize("net", [None, learnt()], ids=["samples alone", "learnt"])
def test_trees_grow_together_with_tiles_and_look_at_their_photo_once(net):
    given = []
    for seed in range(3):  # other samples of the same photo, each with two tiles
        other = evidence_of(seed, 18, 22).views[0]
        left, right = (tree.View(other.soft[:2, :, at], other.cells[:2, :, at], np.ones((18, 13)), left=first)
                       for at, first in ((slice(0, 13), 0), (slice(9, 22), 9)))
        image = RNG(9).integers(0, 256, (18, 22, 3)).astype(np.uint8)
        said = image, other.soft[:2], other.cells[:2], 16, [left, right]
        given.append(gather(*said, like=given[0] if given else None))
        again = gather(*said)
        assert np.array_equal(given[-1].appearance, again.appearance)
        assert all(np.array_equal(a, b) for name in ("steps", "jump")
                   for a, b in zip(getattr(given[-1], name), getattr(again, name)))
    for together, evidence in zip(grow_each(given, net), given, strict=True):
        alone = grow(evidence, net)
        assert np.array_equal(together.children, alone.children) and len(alone.children) > 5
        assert np.allclose(together.odds, alone.odds)


def test_trees_of_unlike_evidence_do_not_grow_together():
    with pytest.raises(ValueError, match="as many samples, bits and views of each"):
        grow_each([evidence_of(0), evidence_of(0, n=2)])


def test_small_regions_join_first():
    for seed in range(5):
        evidence = evidence_of(seed, 24, 20)
        grown = grow(evidence, network(seed, bias=-3.0), least=9)
        assert min(np.bincount(grown.cut("fine").ravel())) >= 9 > min(np.bincount(grown.region.ravel()))


# ---- confidence


def test_sureness_by_hand():
    """Pairs of pixels inside, by the merges that joined them; outside, by the odds of every border pixel."""
    evidence, net = evidence_of(5), network(5)
    grown = grow(evidence, net)
    labels = grown.cut(4)  # 4 segments
    inside, outside, share, _ = tree.sureness(grown, labels, net)
    members = {k: {k} for k in range(grown.region.max() + 1)}
    together = {k: [] for k in range(4)}
    area = np.bincount(grown.region.ravel())
    for k, ((a, b), odds) in enumerate(zip(grown.children, grown.odds), len(members)):
        members[k] = members[a] | members[b]
        owners = {int(labels[grown.region == m][0]) for m in members[k]}
        if len(owners) == 1:
            count = sum(area[m] for m in members[a]) * sum(area[m] for m in members[b])
            together[owners.pop()].append((count, 1 / (1 + np.exp(-odds))))
    for k in range(4):
        want = sum(c * p for c, p in together[k]) / sum(c for c, _ in together[k]) if together[k] else 1.0
        assert inside[k] == pytest.approx(want) and share[k] == pytest.approx((labels == k).mean())
    graph, chance = Graph(evidence, labels), {}
    for i, j, p in zip(
        graph.i, graph.j, 1 / (1 + np.exp(log_odds(graph.features(), net)))
    ):
        chance[i, j] = chance[j, i] = p
    for k in range(4):
        sides = [(labels[a], labels[b]) for _, a, b in neighbours(*labels.shape) if labels[a] != labels[b]]
        seen = [chance[pair] for pair in sides if k in pair]
        assert outside[k] == pytest.approx(np.mean(seen))
