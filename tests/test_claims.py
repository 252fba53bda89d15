"""claims.py against brute force on tiny maps: how near leaves are to hints, who gets them, what is free."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree import evidence_of, hints_at, network, same

from answers import claims as module
from answers.claims import (
    ahead,
    claims,
    features,
    first_owner,
    flood,
    highest,
    leaves_of,
    odds,
    piece_odds,
)
from answers.tree import confidence, gather, grow, learnt

RNG = np.random.default_rng
HINTS = hints_at((12, 11), (1, (2, 2)), (2, (9, 8)), (3, (9, 1)), (1, (3, 8)))


def all_pairs(n, i, j, cost, join):
    """The least `join` of the costs on any way between two of n nodes, by Floyd's algorithm: (n, n)."""
    best = np.full((n, n), np.inf)
    for a, b, c in zip(i, j, cost):
        best[a, b] = best[b, a] = min(best[a, b], c)
    for k, a, b in itertools.product(range(n), repeat=3):
        best[a, b] = min(best[a, b], join(best[a, k], best[k, b]))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_the_highest_cost_on_the_way_in_a_tree(seed):
    rng, n = RNG(seed), 9
    i = np.arange(1, n)
    j = np.array([rng.integers(k) for k in i])  # a random tree
    cost, seeds = rng.normal(0, 2, n - 1), np.array([3, 0, 7])
    want = all_pairs(n, i, j, cost, max)[:, seeds]
    want[seeds, np.arange(3)] = -np.inf
    assert np.allclose(highest(i, j, cost, seeds, n), want)


def test_by_how_much_each_is_ahead_of_the_others():
    values = np.array([[3.0, 1, 2.5], [0, 0, -1], [-2, 5, 5]])
    assert np.allclose(ahead(values), [[0.5, -2, -0.5], [0, 0, -1], [-7, 0, 0]])
    assert ahead(values[:, :1]).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("seed", range(3))
def test_how_near_leaves_are_to_hints(seed):
    evidence = evidence_of(seed)
    grown = grow(evidence, network(seed), HINTS)
    leaves, region, n = leaves_of(evidence, grown, HINTS), grown.region, grown.region.max() + 1
    assert [set(leaves.held[region[HINTS == k]]) for k in (1, 2, 3)] == [{1}, {2}, {3}]
    jumps = {}
    for axis in (0, 1):
        for y, x in np.ndindex(evidence.jump[axis].shape):
            a, b = region[y, x], region[y + (axis == 0), x + (axis == 1)]
            if a != b:
                jumps.setdefault((min(a, b), max(a, b)), []).append(evidence.jump[axis][y, x])
    i, j = np.array(sorted(jumps)).T
    values = [jumps[pair] for pair in zip(i, j)]
    passes = all_pairs(n, i, j, [min(v) for v in values], max)
    ways = all_pairs(n, i, j, [np.mean(v) + 0.05 for v in values], lambda a, b: a + b)
    meet = np.full((n, n), np.inf)
    members = [{k} for k in range(n)]
    for (a, b), height in zip(grown.children, grown.height):
        members.append(members[a] | members[b])
        for p, q in itertools.product(members[a], members[b]):
            meet[p, q] = meet[q, p] = height
    for leaf, k in itertools.product(range(n), (1, 2, 3)):
        at = np.flatnonzero(leaves.held == k)
        got = leaves.near[leaf, k - 1]
        if leaves.held[leaf] != k:
            assert got[0] == pytest.approx(-min(4, passes[leaf, at].min()), abs=2e-3)
            assert got[2] == pytest.approx(-min(20, ways[leaf, at].min()))
            assert got[4] == pytest.approx(np.clip(meet[leaf, at].max(), -6, 6))
    for k in (0, 2, 4, 6):
        assert np.allclose(leaves.near[..., k + 1], ahead(leaves.near[..., k]))


def test_features_of_a_leaf_and_a_hint():
    evidence = evidence_of(3)
    grown = grow(evidence, network(3), HINTS)
    leaves, region = leaves_of(evidence, grown, HINTS), grown.region
    owner = first_owner(leaves)
    x, view = features(leaves, owner), evidence.views[0]
    for leaf, k in itertools.product(range(len(owner)), (1, 2, 3)):
        inside, theirs = region == leaf, np.isin(region, np.flatnonzero(owner == k))
        same_code = [(a[inside][:, None] == a[theirs]).mean() for a in view.cells]
        assert x[leaf, k - 1, 8] == pytest.approx(np.mean(same_code))
        look = abs(evidence.appearance[inside].mean(0) - evidence.appearance[theirs].mean(0))
        assert np.allclose(x[leaf, k - 1, 20:48], look)
        bits = [min(abs(v[inside].mean(0) - v[theirs].mean(0)).sum() / 2, 2) for v in view.soft]
        assert np.allclose(x[leaf, k - 1, 12:14], [np.mean(bits), np.min(bits)])
        assert x[leaf, k - 1, 16] == pytest.approx(np.log(theirs.mean()))
        assert x[leaf, k - 1, 18] == (owner[leaf] == k)


@pytest.mark.parametrize("seed", range(3))
def test_a_leaf_is_compared_with_the_click_that_it_is_most_alike(seed):
    """Of hint 1, which lies in two leaves, either may be it; a click looks like its leaf and all that meets
    it, at odds above 0, before any other hint's."""
    evidence = evidence_of(seed)
    grown = grow(evidence, network(seed, bias=1.0), HINTS)
    leaves, region, view = leaves_of(evidence, grown, HINTS), grown.region, evidence.views[0]
    n, seeds = len(leaves.held), np.flatnonzero(leaves.held)
    meet, members = np.full((n, n), np.inf), [{k} for k in range(n)]
    for (a, b), height in zip(grown.children, grown.height):
        members.append(members[a] | members[b])
        for p, q in itertools.product(members[a], members[b]):
            meet[p, q] = meet[q, p] = height
    shared, want = 0, np.full((n, 3, 5), -np.inf)
    for at in seeds:
        others = [k for k in seeds if leaves.held[k] != leaves.held[at]]
        own = [k for k in range(n) if k == at or meet[k, at] > max(0, *meet[k, others])]
        shared += len(own) > 1
        theirs = np.isin(region, own)
        for leaf in range(n):
            inside = region == leaf
            alike = []
            for cells in view.cells:
                p, q = (np.bincount(cells[m], minlength=16) / m.sum() for m in (inside, theirs))
                alike.append(p @ q / max(1e-6, np.sqrt((p @ p) * (q @ q))))
            bits = [min(abs(v[inside].mean(0) - v[theirs].mean(0)).sum() / 2, 2) for v in view.soft]
            look = abs(evidence.appearance[inside].mean(0) - evidence.appearance[theirs].mean(0))
            values = [np.log(np.mean(alike) + 0.02), -np.mean(bits), -np.linalg.norm(look[:3]),
                      -look[8:].sum(), -look[3:6].sum()]
            row = want[leaf, leaves.held[at] - 1]
            row[:] = np.maximum(row, values)
    assert shared and np.allclose(leaves.looks[..., :10:2], want)
    for k in range(0, 10, 2):
        assert np.allclose(leaves.looks[..., k + 1], ahead(leaves.looks[..., k]))
    assert np.allclose(leaves.looks[:, :, 10:], np.log([[2, 3], [1, 4], [1, 4]]))
    assert np.allclose(features(leaves, first_owner(leaves))[..., 49:], leaves.looks)


def test_of_a_hint_of_very_many_clicks_the_largest_are_compared_with(monkeypatch):
    evidence = evidence_of(0)
    grown = grow(evidence, network(0, bias=1.0), HINTS)
    every = leaves_of(evidence, grown, HINTS).looks[..., :10:2]
    monkeypatch.setattr(module, "PARTS", 1)
    largest = leaves_of(evidence, grown, HINTS).looks[..., :10:2]
    assert np.allclose(every[:, 1:], largest[:, 1:])  # these hints have one part
    assert (every[:, 0] >= largest[:, 0] - 1e-9).all() and (every[:, 0] > largest[:, 0] + 1e-3).any()


def test_odds_of_a_file_of_before_see_what_it_knew():
    evidence, net = evidence_of(1), network(1)
    leaves = leaves_of(evidence, grow(evidence, net, HINTS), HINTS)
    cut = {k: v[..., :49] if k in ("hint_mean", "hint_scale", "hint_w1") else v for k, v in net.items()}
    silent = {**net, "hint_w1": np.where(np.arange(61) < 49, net["hint_w1"], 0)}
    owner = first_owner(leaves)
    assert np.allclose(odds(leaves, owner, cut), odds(leaves, owner, silent))
    assert not np.allclose(odds(leaves, owner, cut), odds(leaves, owner, net))


def test_leaves_of_a_piece_share_their_odds_unless_it_has_several_hints():
    evidence = evidence_of(4)
    grown = grow(evidence, network(4), HINTS)
    leaves, rng = leaves_of(evidence, grown, HINTS), RNG(4)
    n, (first, second) = len(leaves.held), np.flatnonzero(leaves.held)[[0, -1]]
    assert leaves.held[first] != leaves.held[second]
    piece, score = rng.integers(1, 4, n), rng.normal(0, 5, (n, 3))
    piece[leaves.held > 0] = 3
    piece[first], piece[second] = 0, 0
    got, area = piece_odds(leaves, piece, score), np.bincount(grown.region.ravel())
    for leaf in range(n):
        together = [k for k in range(n) if piece[k] == piece[leaf]]
        hints = {leaves.held[k] for k in together} - {0}
        want = sum(area[k] * score[k].clip(-6, 6) for k in together) / sum(area[k] for k in together)
        if leaves.held[leaf]:
            want = score[leaf]
        elif len(hints) > 1:
            want = score[leaf].clip(-6, 6)
        assert np.allclose(got[leaf], want)
    one = piece == 1
    assert one.sum() > 1 and (got[one] == got[one][0]).all() and len(np.unique(got[piece == 0], axis=0)) > 1


def test_a_piece_of_the_tree_goes_to_one_hint(monkeypatch):
    """Whatever its leaves look like by themselves: all leaves of a piece that no hint lies in."""
    several = 0
    for seed in range(6):
        evidence, net = evidence_of(seed), network(seed)
        hints = hints_at((12, 11), (1, (2, 2)), (2, (9, 8)))
        grown = grow(evidence, net, hints)
        noise = RNG(seed).normal(0, 3, (grown.graph.n, 2))
        monkeypatch.setattr(module, "odds", lambda leaves, owner, net, noise=noise: noise)
        monkeypatch.setattr(module, "flood", lambda leaves, score: score.argmax(1) + 1)
        owner, piece = claims(evidence, grown, hints, net, True), grown.cut("normal", module.PIECES)
        for k in range(piece.max() + 1):
            inside = piece == k
            if not hints[inside].any():
                assert len(set(owner[grown.region[inside]])) == 1
                several += len(set(grown.region[inside])) > 1
    assert several


def test_what_a_hint_gets_is_connected_to_it():
    for seed in range(6):
        evidence = evidence_of(seed)
        grown = grow(evidence, network(seed), HINTS)
        leaves = leaves_of(evidence, grown, HINTS)
        owner = flood(leaves, RNG(seed).normal(0, 1, (len(leaves.held), 3)))
        assert set(owner) == {1, 2, 3} and (owner[leaves.held > 0] == leaves.held[leaves.held > 0]).all()
        reached = leaves.held > 0
        for _ in owner:
            for a, b in zip(*leaves.links):
                if owner[a] == owner[b]:
                    reached[a] = reached[b] = reached[a] or reached[b]
        assert reached.all()


def test_segments_without_a_hint_stay_unless_one_wants_them(monkeypatch):
    evidence, net = evidence_of(2), network(2)
    hints = hints_at((12, 11), (1, (2, 2)), (2, (9, 8)))
    grown = grow(evidence, net, hints)
    labels = grown.cut("normal")

    def doubtful(leaves, owner, net):
        return np.where(leaves.held[:, None] == [1, 2], 9.0, -1.0)

    monkeypatch.setattr(module, "odds", doubtful)
    owner = claims(evidence, grown, hints, net)
    hinted = np.isin(labels, labels[hints > 0])
    assert not hinted.all() and np.array_equal(owner[grown.region] > 0, hinted)
    monkeypatch.setattr(module, "WANTED", [(-2, 0)])  # all are wanted more than that
    assert (claims(evidence, grown, hints, net) > 0).all()
    monkeypatch.undo()
    assert (claims(evidence, grown, hints, net, closed=True) > 0).all()


@pytest.mark.parametrize("count, least", [(1, 4.0), (2, 2.1), (4, 0.2), (8, -0.3)])
def test_the_more_hints_the_less_they_have_to_want_a_segment(monkeypatch, count, least):
    evidence, net = evidence_of(2, 30, 30), network(2)
    places = [(2, 2), (9, 8), (2, 8), (9, 2), (2, 5), (9, 5), (5, 8), (5, 2)][:count]
    hints = hints_at((30, 30), *((number, place) for number, place in enumerate(places, 1)))
    grown = grow(evidence, net, hints)
    for over in (-0.01, 0.01):
        same = np.full((grown.graph.n, count), least + over)
        monkeypatch.setattr(module, "odds", lambda *_, same=same: same)
        assert (claims(evidence, grown, hints, net) > 0).all() == (over > 0)


def test_alike_samples_decide_without_a_network():
    """Two halves in all samples, no contrast in the photo: each hint gets its half, closed or not."""
    cells = np.repeat([0, 1], 10)[None, None].repeat(16, 1).repeat(3, 0)
    soft = (cells[..., None] >> np.arange(2) & 1) * 2.0 - 1
    evidence = gather(np.full((16, 20, 3), 90, np.uint8), soft, cells, 4)
    hints = hints_at((16, 20), (1, (3, 3)), (2, (12, 15)))
    grown = grow(evidence, None, hints)
    for closed in (False, True):
        owner = claims(evidence, grown, hints, None, closed)[grown.region]
        assert same(owner, cells[0]) and owner[0, 0] == 1 and owner[0, 19] == 2


def test_a_box_bounds_its_segment_and_no_other():
    """All samples say one segment; leaves whose larger part lies outside the first hint's box are not its."""
    evidence = evidence_of(5, 24, 30, 2, 4)
    hints, net = hints_at((24, 30), (1, (12, 8)), (2, (2, 27))), network(0)
    grown = grow(evidence, net, hints)
    within = np.ones((2, 24, 30), bool)
    within[0] = False
    within[0, 6:18, 2:15] = True
    for offset in (-2.0, 0.0):
        free, bound = (claims(evidence, grown, hints, net, False, offset, limit) for limit in (None, within))
        for leaf in range(grown.graph.n):
            share = within[0][grown.region == leaf].mean()
            assert bound[leaf] != 1 or share >= 0.5 or hints[grown.region == leaf].any()
        every = claims(evidence, grown, hints, net, False, offset, np.ones_like(within))
        assert (every == free).all()
    closed = claims(evidence, grown, hints, net, True, 0.0, within)  # leaves nothing: to the other one
    outside = np.bincount(grown.region.ravel(), within[0].ravel()) < 0.5 * np.bincount(grown.region.ravel())
    assert (closed > 0).all() and (closed[outside] == 2).all()
    # where no other is, it ends there as well
    alone = hints_at((24, 30), (1, (12, 8)))
    grown = grow(evidence, net, alone)
    outside = np.bincount(grown.region.ravel(), within[0].ravel()) < 0.5 * np.bincount(grown.region.ravel())
    for limit, most in ((None, len(outside)), (within[:1], 0)):
        owner = claims(evidence, grown, alone, net, False, -9.0, limit)  # one segment
        assert (owner[outside] == 1).sum() == min(most, outside.sum()) and outside.any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_hints_are_kept_at_every_size(data):
    """From 1 x 1 on, with ties everywhere (a constant photo): together, apart, closed, the same again."""
    h, w = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)), "size")
    n, seed = data.draw(st.integers(1, 3), "n"), data.draw(st.integers(0, 99), "seed")
    if data.draw(st.booleans(), "flat"):
        evidence = gather(np.full((h, w, 3), 90, np.uint8), np.ones((n, h, w, 2)), np.full((n, h, w), 3), 4)
    else:
        evidence = evidence_of(seed, h, w, n, 4, smooth=False)
    net = data.draw(st.sampled_from([None, network(0), learnt()]), "net")
    pixels = st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=h * w, max_size=h * w)
    hints = np.array(data.draw(pixels, "hints")).reshape(h, w)
    numbers = [k for k in (1, 2, 3) if (hints == k).any()]
    if not numbers:
        return
    hints = np.searchsorted(numbers, hints) * (hints > 0) + (hints > 0)  # numbered from 1 on
    numbers = range(1, len(numbers) + 1)
    grown = grow(evidence, net, hints)
    for closed in (False, True):
        claimed = claims(evidence, grown, hints, net, closed)
        for grain in ("coarse", "fine", 1, 5):
            labels = grown.cut(grain, claimed=claimed)
            mine = [set(labels[hints == k]) for k in numbers]
            assert (
                labels.shape == (h, w)
                and all(len(s) == 1 for s in mine)
                and len(set().union(*mine)) == len(numbers)
            )
            if closed:
                assert set(labels.flat) == set().union(*mine)
            sure, borders = confidence(grown, labels, net)
            assert sure.shape == (labels.max() + 1,) and ((0 <= sure) & (sure <= 1)).all()
            assert all(0 <= p <= 1 for _, _, p in borders)


def test_a_click_splits_what_all_samples_join():
    """Everything says one segment; clicks of two hints make two, of any grain."""
    flat = gather(np.full((20, 24, 3), 90, np.uint8), np.ones((4, 20, 24, 3)), np.full((4, 20, 24), 7), 8)
    assert len(np.unique(grow(flat).cut("fine"))) == 1
    hints = hints_at((20, 24), (1, (10, 4)), (1, (0, 23)), (2, (10, 20)))
    grown = grow(flat, hints=hints)
    for grain in ("coarse", 17):
        labels = grown.cut(grain, claimed=claims(flat, grown, hints))
        assert labels[10, 4] == labels[0, 23] != labels[10, 20] and set(np.unique(labels)) == {0, 1}
