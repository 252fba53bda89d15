"""metrics.py against brute force: every pair of pixels for ARI, every possible matching for IoU."""

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch

from metrics import contingency, iou_matrix, scores


def ari_of_pairs(pred, true):
    """Hubert & Arabie by counting every pair of valid pixels, in exact fractions."""
    pred, true = pred[true != -1].tolist(), true[true != -1].tolist()
    count = {key: 0 for key in itertools.product((False, True), repeat=2)}
    for i, j in itertools.combinations(range(len(pred)), 2):
        count[pred[i] == pred[j], true[i] == true[j]] += 1
    a, b, c, d = count[True, True], count[True, False], count[False, True], count[False, False]
    denominator = (a + b) * (b + d) + (a + c) * (c + d)
    return float(Fraction(2 * (a * d - b * c), denominator)) if denominator else 1.0


def iou_of_matchings(pred, true):
    """The best summed IoU over every one-to-one matching; over #true and over max(#true, #pred)."""
    pred, true = pred[true != -1], true[true != -1]
    P, T = [pred == i for i in np.unique(pred)], [true == i for i in np.unique(true)]
    iou = np.array([[(p & t).sum() / (p | t).sum() for t in T] for p in P])
    iou = iou if len(P) >= len(T) else iou.T
    matchings = itertools.permutations(range(len(iou)), iou.shape[1])              # a row for every column
    best = max(sum(iou[r, c] for c, r in enumerate(rows)) for rows in matchings)
    return best / len(T), best / max(len(T), len(P))


def check(pred, true):
    s = scores(torch.from_numpy(pred), torch.from_numpy(true))
    for i in range(len(pred)):
        iou, hiou = iou_of_matchings(pred[i], true[i])
        assert s["ari"][i].item() == pytest.approx(ari_of_pairs(pred[i], true[i]), abs=1e-12)
        assert (s["iou"][i].item(), s["hiou"][i].item()) == pytest.approx((iou, hiou), abs=1e-12)


@pytest.mark.parametrize("P,T", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 5), (6, 3)])
@pytest.mark.parametrize("H,W", [(1, 2), (6, 7), (11, 3)])                         # (1, 2): the fewest pixels with a pair
def test_random_maps(P, T, H, W):
    rng = np.random.default_rng(10 * P + T)
    true = rng.integers(0, T, (3, H, W))
    pred = np.where(rng.random((3, H, W)) < 0.6, true % P, rng.integers(0, P, (3, H, W)))   # more alike than chance
    true[:2][rng.random((2, H, W)) < 0.3] = -1
    true[:, 0, 0] = 0                                                              # never nothing
    check(pred, true)


def test_ids_far_apart_and_of_any_type():
    rank = np.random.default_rng(0).integers(0, 4, (2, 2, 6, 6))
    huge = np.array([2**62, -(2**62), -1, 2**62 + 1])                              # -1: a segment in pred, ignored in true
    check(huge[rank[0]], huge[rank[1]])
    check(np.array([255, 0, 7, 9], np.uint8)[rank[0]], np.array([-(2**15), 5, -1, -2], np.int16)[rank[1]])


def test_a_map_scores_the_same_in_any_batch():
    rng = np.random.default_rng(3)
    pred, true = (torch.from_numpy(rng.integers(-1, [[[2]], [[9]], [[5000]]], (3, 9, 9))) for _ in range(2))
    together, alone = scores(pred, true), [scores(pred[i : i + 1], true[i : i + 1]) for i in range(3)]
    for key in ("ari", "iou", "hiou"):
        assert torch.allclose(together[key], torch.cat([s[key] for s in alone]), atol=1e-14)


def test_names_and_order_of_segments_do_not_matter():
    rng = np.random.default_rng(4)
    pred, true = (torch.from_numpy(rng.integers(0, 5, (1, 20, 20))) for _ in range(2))
    renamed = torch.tensor([30, -7, 12, 10**9, 0])[pred]
    a, b = scores(pred, true), scores(renamed, true)
    assert all(torch.allclose(a[key], b[key], atol=1e-14) for key in a)
    assert torch.equal(scores(pred, true)["ari"], scores(true, pred)["ari"])


@pytest.mark.parametrize("pred,true,ari,iou,hiou", [
    ([5, 5, 5, 5], [0, 0, 0, 0], 1.0, 1.0, 1.0),                                   # both one segment
    ([0, 0, 0, 0], [0, 0, 1, 1], 0.0, 0.25, 0.25),                                 # one predicted, two true
    ([0, 0, 1, 1], [3, 3, 3, 3], 0.0, 0.5, 0.25),                                  # two predicted, one true
    ([0, 1, 2, 3], [4, 5, 6, 7], 1.0, 1.0, 1.0),                                   # every pixel its own segment
    ([0, 1, 2, 3], [4, 4, 4, 4], 0.0, 0.25, 0.0625),
    ([0, 1, 0, 1], [0, 0, 1, 1], -0.5, 1 / 3, 1 / 3),                              # worse than chance: all pairs cut
    ([0, 9, 9, 9], [0, -1, -1, -1], 1.0, 1.0, 1.0),                                # one valid pixel: no pair at all
    ([0, 9, 9, 0], [0, -1, -1, 0], 1.0, 1.0, 1.0),                                 # segment 9 lies in ignored pixels only
])
def test_degenerate(pred, true, ari, iou, hiou):
    s = scores(torch.tensor([[pred]]), torch.tensor([[true]]))
    assert [s[k].item() for k in ("ari", "iou", "hiou")] == pytest.approx([ari, iou, hiou], abs=1e-12)


def test_nothing_valid_is_nan_and_leaves_the_others_alone():
    pred, true = torch.zeros(2, 3, 3).long(), torch.full((2, 3, 3), -1)
    true[1] = 4
    for value in scores(pred, true).values():
        assert value.dtype == torch.float64 and value[0].isnan() and value[1] == 1
    assert all(v.isnan().all() for v in scores(pred, torch.full((2, 3, 3), -1)).values())


def test_large_maps_in_exact_integers():
    S = 1000                                                                       # pairs of pixels beyond 2^32
    y, x = np.mgrid[:S, :S]
    pred, true = (y // 300) * 4 + x // 250, (y + x) // 400
    table = [[int(n) for n in row] for row in np.histogram2d(pred.ravel(), true.ravel(), (range(17), range(6)))[0]]
    both = sum(comb(n, 2) for row in table for n in row)
    rows, cols = sum(comb(sum(r), 2) for r in table), sum(comb(sum(c), 2) for c in zip(*table))
    expected = Fraction(rows * cols, comb(S * S, 2))
    s = scores(torch.from_numpy(pred)[None], torch.from_numpy(true)[None])
    assert s["ari"].item() == pytest.approx(float((both - expected) / (Fraction(rows + cols, 2) - expected)), abs=1e-12)
    same = scores(torch.from_numpy(pred)[None], torch.from_numpy(pred)[None])
    assert [v.item() for v in same.values()] == pytest.approx([1.0] * 3, abs=1e-12)


def test_contingency_and_iou_matrix():
    pred, true = torch.tensor([[[0, 0, 1], [1, 1, 2]]]), torch.tensor([[[5, 5, 5], [6, -1, 6]]])
    table = contingency(pred, true)[0]
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]                           # rows or columns may be empty
    assert table.tolist() == [[2, 0], [1, 1], [0, 1]]
    assert torch.allclose(iou_matrix(table[None])[0], torch.tensor([[2 / 3, 0], [1 / 4, 1 / 3], [0, 1 / 2]]).double())


@pytest.mark.parametrize("pred,true", [((1, 4, 4), (1, 4, 5)), ((2, 4, 4), (1, 4, 4)), ((4, 4), (4, 4))])
def test_wrong_shapes(pred, true):
    with pytest.raises(ValueError, match="label maps of one shape"):
        scores(torch.zeros(pred).long(), torch.zeros(true).long())
