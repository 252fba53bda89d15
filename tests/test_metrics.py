"""metrics.py against brute force: every pair of pixels, explicit sets of pixels, every possible matching."""

import itertools
import time
from collections import Counter
from fractions import Fraction
from math import comb, isnan, log2

import numpy as np
import pytest
import torch

from metrics import (
    all_scores,
    bootstrap,
    boundary_f,
    calibration_error,
    contingency,
    diversity,
    energy_distance,
    iou_matrix,
    pairwise,
    quality,
    reliability,
    scores,
)


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
    matchings = itertools.permutations(range(len(iou)), iou.shape[1])  # a row for every column
    best = max(sum(iou[r, c] for c, r in enumerate(rows)) for rows in matchings)
    return best / len(T), best / max(len(T), len(P))


def check(pred, true):
    s = scores(torch.from_numpy(pred), torch.from_numpy(true))
    for i in range(len(pred)):
        iou, hiou = iou_of_matchings(pred[i], true[i])
        assert s["ari"][i].item() == pytest.approx(ari_of_pairs(pred[i], true[i]), abs=1e-12)
        assert (s["iou"][i].item(), s["hiou"][i].item()) == pytest.approx((iou, hiou), abs=1e-12)


@pytest.mark.parametrize("factor,n", [(1, 7), (1000, 7), (2**58, 7), (1, 400)])  # few, sparse, huge, many ids
def test_contingency_counts_every_pair(factor, n):
    """A row for each id of its own map, in order, even if all its pixels are ignored; zeros behind them."""
    rng = np.random.default_rng(n)
    pred, true = rng.integers(-4, n, (3, 11, 13)) * factor, rng.integers(-4, n, (3, 11, 13)) * factor
    true[rng.random(true.shape) < 0.3], true[2] = -1, -1
    table = contingency(torch.from_numpy(pred), torch.from_numpy(true))
    assert table.dtype == torch.float64
    for i in range(3):
        rows, columns = np.unique(pred[i]), np.unique(true[i][true[i] != -1])
        want = torch.zeros(table.shape[1:], dtype=torch.float64)
        for r, c in itertools.product(range(len(rows)), range(len(columns))):
            want[r, c] = ((pred[i] == rows[r]) & (true[i] == columns[c])).sum()
        mine = table[i][:, table[i].sum(0) > 0]
        assert torch.equal(mine, want[:, : mine.shape[1]]) and mine.shape[1] == len(columns)


@pytest.mark.parametrize("P,T", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 5), (6, 3)])
@pytest.mark.parametrize("H,W", [(1, 2), (6, 7), (11, 3)])  # (1, 2): the fewest pixels with a pair
def test_random_maps(P, T, H, W):
    rng = np.random.default_rng(10 * P + T)
    true = rng.integers(0, T, (3, H, W))
    # more alike than chance
    pred = np.where(rng.random((3, H, W)) < 0.6, true % P, rng.integers(0, P, (3, H, W)))
    true[:2][rng.random((2, H, W)) < 0.3] = -1
    true[:, 0, 0] = 0  # never nothing
    check(pred, true)


def test_ids_far_apart_and_of_any_type():
    rank = np.random.default_rng(0).integers(0, 4, (2, 2, 6, 6))
    huge = np.array([2**62, -(2**62), -1, 2**62 + 1])  # -1: a segment in pred, ignored in true
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
    ([5, 5, 5, 5], [0, 0, 0, 0], 1.0, 1.0, 1.0),  # both one segment
    ([0, 0, 0, 0], [0, 0, 1, 1], 0.0, 0.25, 0.25),  # one predicted, two true
    ([0, 0, 1, 1], [3, 3, 3, 3], 0.0, 0.5, 0.25),  # two predicted, one true
    ([0, 1, 2, 3], [4, 5, 6, 7], 1.0, 1.0, 1.0),  # every pixel its own segment
    ([0, 1, 2, 3], [4, 4, 4, 4], 0.0, 0.25, 0.0625),
    ([0, 1, 0, 1], [0, 0, 1, 1], -0.5, 1 / 3, 1 / 3),  # worse than chance: all pairs cut
    ([0, 9, 9, 9], [0, -1, -1, -1], 1.0, 1.0, 1.0),  # one valid pixel: no pair at all
    ([0, 9, 9, 0], [0, -1, -1, 0], 1.0, 1.0, 1.0),  # segment 9 lies in ignored pixels only
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
    S = 1000  # pairs of pixels beyond 2^32
    y, x = np.mgrid[:S, :S]
    pred, true = (y // 300) * 4 + x // 250, (y + x) // 400
    table = [[int(n) for n in row] for row in np.histogram2d(pred.ravel(), true.ravel(),
                                                             (range(17), range(6)))[0]]
    both = sum(comb(n, 2) for row in table for n in row)
    rows, cols = sum(comb(sum(r), 2) for r in table), sum(comb(sum(c), 2) for c in zip(*table))
    expected = Fraction(rows * cols, comb(S * S, 2))
    s = scores(torch.from_numpy(pred)[None], torch.from_numpy(true)[None])
    assert s["ari"].item() == pytest.approx(float((both - expected) / (Fraction(rows + cols, 2) - expected)),
                                            abs=1e-12)
    same = scores(torch.from_numpy(pred)[None], torch.from_numpy(pred)[None])
    assert [v.item() for v in same.values()] == pytest.approx([1.0] * 3, abs=1e-12)


def test_contingency_and_iou_matrix():
    pred, true = torch.tensor([[[0, 0, 1], [1, 1, 2]]]), torch.tensor([[[5, 5, 5], [6, -1, 6]]])
    table = contingency(pred, true)[0]
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]  # rows or columns may be empty
    assert table.tolist() == [[2, 0], [1, 1], [0, 1]]
    assert torch.allclose(iou_matrix(table[None])[0],
                          torch.tensor([[2 / 3, 0], [1 / 4, 1 / 3], [0, 1 / 2]]).double())


@pytest.mark.parametrize("pred,true", [((1, 4, 4), (1, 4, 5)), ((2, 4, 4), (1, 4, 4)), ((4, 4), (4, 4))])
def test_wrong_shapes(pred, true):
    with pytest.raises(ValueError, match="label maps of one shape"):
        scores(torch.zeros(pred).long(), torch.zeros(true).long())


def test_fractions_are_no_ids():  # which ToTensor makes: all 0 as integers, and all would be one segment
    with pytest.raises(ValueError, match="label maps are of integers"):
        scores(torch.zeros(1, 2, 2).long(), torch.rand(1, 2, 2))


# ------------------------------------------------------------------------------------------------------------
# The rest of all_scores, by definition


def sets(labels, valid):
    """The segments as sets of pixel numbers."""
    flat, valid = labels.ravel().tolist(), valid.ravel().tolist()
    return [{k for k, v in enumerate(flat) if v == i and valid[k]} for i in set(v for v,
                                                                                ok in zip(flat, valid) if ok)]


def by_definition(pred, true):
    """Every score of one image by explicit sets and loops."""
    valid = true != -1
    P, T, n = sets(pred, valid), sets(true, valid), int(valid.sum())
    iou = [[len(p & t) / len(p | t) for t in T] for p in P]
    p_of, t_of = pred[valid].tolist(), true[valid].tolist()
    agree = [(p_of[i] == p_of[j]) == (t_of[i] == t_of[j]) for i, j in itertools.combinations(range(n), 2)]

    def entropy(values):
        return -sum(c / n * log2(c / n) for c in Counter(values).values())

    mutual = entropy(p_of) + entropy(t_of) - entropy(zip(p_of, t_of))
    return {"covering": sum(len(t) * max(row[k] for row in iou) for k, t in enumerate(T)) / n,
            "pri": sum(agree) / len(agree) if agree else 1.0,
            "voi": entropy(p_of) + entropy(t_of) - 2 * mutual,
            "pred": len(P) - sum(max(row) <= 0.5 and 2 * len(p) < (pred == pred.flat[next(iter(p))]).sum()
                                 for p, row in zip(P, iou)),
            "true": len(T), "matched": sum(v > 0.5 for row in iou for v in row),
            "overlap": sum(v for row in iou for v in row if v > 0.5),
            "boundary": boundary_by_distance(pred, true, valid)}


def boundary_by_distance(pred, true, valid, tolerance=0.0075):
    """F-measure by the distance from each boundary pixel to each boundary pixel of the other map."""
    H, W = valid.shape
    limit = tolerance * np.hypot(valid.any(1).sum(), valid.any(0).sum())

    def edge(m):
        return [(y, x) for y, x in itertools.product(range(H), range(W)) if valid[y, x] and any(
            y + a < H and x + b < W and valid[y + a, x + b] and m[y, x] != m[y + a, x + b] for a,
            b in ((0, 1), (1, 0), (1, 1)))]

    def share(a, b):
        return sum(any(np.hypot(y - v, x - u) <= limit for v, u in b) for y, x in a) / len(a) if a else 0.0

    a, b = edge(pred), edge(true)
    precision, recall = share(a, b), share(b, a)
    if not a and not b:
        return 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(rng, n, H, W, k):
    """n maps of at most k straight-edged regions: pixels belong to the nearest of k random points."""
    points = rng.random((n, k, 2)) * [H, W]
    y, x = np.mgrid[:H, :W]
    return ((y[None, None] - points[..., 0, None, None]) ** 2 + (x[None, None] - points[..., 1, None,
                                                                                        None]) ** 2).argmin(1)


@pytest.mark.parametrize("H,W,P,T,ignored",
                         [(6, 9, 4, 3, 0.0), (1, 13, 2, 5, 0.2), (12, 5, 1, 4, 0.3), (9, 9, 6, 1, 0.1)])
def test_all_scores(H, W, P, T, ignored):
    rng = np.random.default_rng(H * W)
    true = blobs(rng, 4, H, W, T)
    pred = np.where(rng.random(true.shape) < 0.7, true * 3 + 2, blobs(rng, 4, H, W, P))
    true[rng.random(true.shape) < ignored] = -1
    true[:, 0, :2] = 0
    s = all_scores(torch.from_numpy(pred), torch.from_numpy(true))
    for i in range(len(true)):
        for key, value in by_definition(pred[i], true[i]).items():
            assert s[key][i].item() == pytest.approx(value, abs=1e-9), key


# 0.0075 * diagonal: 0.4 to 4.5
@pytest.mark.parametrize("size,pixels", [(40, 0), (110, 1), (190, 2), (300, 3), (420, 4)])
def test_boundary_within_a_tolerance(size, pixels):
    rng = np.random.default_rng(size)
    true = blobs(rng, 1, size, size, 5)
    at = rng.random((size, size)) < 15 / size**2  # and some specks
    near, far = np.roll(true, pixels, axis=2), np.roll(true, pixels + 2, axis=2)
    for pred in (near, far, np.where(at, 9, near)):
        pred = np.ascontiguousarray(pred[:, :, 10:])
        expected = boundary_by_transform(pred[0], true[0][:, 10:])
        f = boundary_f(torch.from_numpy(pred), torch.from_numpy(true[:, :, 10:].copy()))
        assert f.item() == pytest.approx(expected, abs=1e-12)


def boundary_by_transform(pred, true):
    """The same by scipy's exact Euclidean distance transform."""
    from scipy.ndimage import distance_transform_edt

    def edge(m):
        out = np.zeros(m.shape, bool)
        out[:, :-1] |= m[:, 1:] != m[:, :-1]
        out[:-1] |= m[1:] != m[:-1]
        out[:-1, :-1] |= m[1:, 1:] != m[:-1, :-1]
        return out

    a, b, limit = edge(pred), edge(true), 0.0075 * np.hypot(*true.shape)
    precision = (distance_transform_edt(~b)[a] <= limit).mean()
    recall = (distance_transform_edt(~a)[b] <= limit).mean()
    return 2 * precision * recall / (precision + recall)


def test_the_tolerance_is_of_each_image():
    """Two images of different valid size in one batch, scored as alone."""
    true = torch.from_numpy(blobs(np.random.default_rng(5), 2, 200, 200, 6))
    pred = true.roll(1, 2)
    true[1, 60:], true[1, :, 90:] = -1, -1  # diagonal 108: less than 1 pixel
    together = boundary_f(pred, true)
    alone = torch.cat([boundary_f(pred[:1], true[:1]), boundary_f(pred[1:, :60, :90], true[1:, :60, :90])])
    assert torch.allclose(together, alone, atol=1e-12) and together[0] > together[1] + 0.2


PERFECT = {"ari": 1, "iou": 1, "hiou": 1, "covering": 1, "pri": 1, "voi": 0, "boundary": 1}


@pytest.mark.parametrize("labels", [[[3, 3], [3, 3]], [[0, 1], [2, 3]], [[5, 5], [5, -1]], [[0, 0], [7, 7]]])
def test_identical_maps_are_perfect(labels):
    true = torch.tensor([labels])
    s = all_scores(true * 5 + 1, true)
    assert {key: s[key].item() for key in PERFECT} == pytest.approx(PERFECT, abs=1e-12)
    assert all((a / b).item() == 1 for a, b in quality(s).values())


def test_independent_random_maps():
    g = torch.Generator().manual_seed(0)
    pred, true = torch.randint(0, 6, (2, 8, 96, 96), generator=g)
    s = all_scores(pred, true)
    p = 1 / 6  # both join or both part a pair
    assert s["ari"].abs().max() < 2e-3 and s["pri"].mean().item() == pytest.approx(p * p + (1 - p) ** 2,
                                                                                   abs=2e-3)
    assert s["voi"].mean().item() == pytest.approx(2 * log2(6), abs=0.01) and s["matched"].sum() == 0


def test_nothing_valid_is_nan_in_every_score():
    true = torch.full((2, 4, 4), -1)
    true[1] = 2
    for key, value in all_scores(torch.zeros(2, 4, 4).long(), true).items():
        assert value.dtype == torch.float64 and value[0].isnan() and not value[1].isnan(), key


def test_what_lies_mostly_in_void_is_no_false_positive():
    """Kirillov et al. 2019: void labels."""
    true = torch.tensor([[[0, 0, 0, 0, 1, -1, -1, -1], [0, 0, 0, 0, 1, 1, -1, -1]]])
    pred = torch.tensor([[[0, 0, 0, 0, 1, 5, 5, 5], [0, 0, 0, 0, 1, 5, 2, 9]]])  # 5: 3 pixels void, 1 valid
    s = all_scores(pred, true)
    assert (s["pred"], s["true"], s["matched"]) == (2, 2, 2)
    assert torch.allclose(s["overlap"], torch.tensor([1 + 2 / 3]).double())
    pred[0, 0, 5] = 0  # now 5 has 2 pixels in void, which is no more than half of it, but for one
    assert all_scores(pred, true)["pred"] == 2
    pred[0, 1, 4] = 5
    assert all_scores(pred, true)["pred"] == 3  # 2 of 4 are void: wrong
    both = all_scores(torch.cat([pred, pred]), torch.cat([true, pred.clamp(max=1)]))
    assert both["pred"].tolist() == [3, 5]  # an image without void beside one with it


def test_panoptic_quality_of_two_images_together():
    """Kirillov et al. 2019, Eq. 1, with the counts of both images added up before dividing."""
    true = torch.tensor([[[0, 0, 0, 0, 1, 1]], [[0, 0, 0, 1, 1, 1]]])
    pred = torch.tensor([[[0, 0, 0, 1, 2, 2]], [[5, 5, 5, 5, 5, 5]]])  # IoU 3/4 and 1; then 1/2 is no match
    s = all_scores(pred, true)
    tp, fp, fn, overlap = 2, 1 + 1, 0 + 2, 3 / 4 + 1
    q = {key: (a.sum() / b.sum()).item() for key, (a, b) in quality(s).items()}
    assert q == pytest.approx({"pq": overlap / (tp + fp / 2 + fn / 2), "sq": overlap / tp,
                               "rq": tp / (tp + fp / 2 + fn / 2)})


def test_covering_has_a_direction():
    whole, halves = torch.zeros(1, 2, 4).long(), torch.tensor([[[0, 0, 1, 1]] * 2])
    assert all_scores(halves, whole)["covering"].item() == 0.5  # the best half covers half of the whole
    assert all_scores(torch.tensor([[[0, 0, 0, 1]] * 2]), whole)["covering"].item() == 0.75


# ------------------------------------------------------------------------------------------------------------
# Sets of maps, intervals, calibration


def test_pairwise_and_energy_distance():
    rng = np.random.default_rng(0)
    maps = blobs(rng, 5, 7, 8, 4)
    maps[rng.random(maps.shape) < 0.1] = -1
    agreement, cover = pairwise(torch.from_numpy(maps))
    for i, j in itertools.product(range(5), repeat=2):
        valid = (maps[i] != -1) & (maps[j] != -1)
        a, b = (np.where(valid, m, -1) for m in (maps[i], maps[j]))
        c = (by_definition(a, b)["covering"] + by_definition(b, a)["covering"]) / 2
        assert (agreement[i, j].item(), cover[i, j].item()) == pytest.approx((ari_of_pairs(a, b), c)
                                                                             if i != j else (1, 1), abs=1e-9)

    d = 1 - agreement
    mean = {key: np.mean([d[i, j].item() for i in a for j in b]) for key, (a, b) in
            dict(cross=((0, 1), (2, 3, 4)), s=((0, 1), (0, 1)), y=((2, 3, 4), (2, 3, 4))).items()}
    assert energy_distance(d, 2) == pytest.approx(2 * mean["cross"] - mean["s"] - mean["y"], abs=1e-12)
    assert diversity(d[2:, 2:]) == pytest.approx((d[2, 3] + d[2, 4] + d[3, 4]).item() / 3, abs=1e-12)
    assert isnan(diversity(d[:1, :1]))


def test_energy_distance_of_a_set_and_itself_is_0():
    maps = torch.from_numpy(blobs(np.random.default_rng(1), 3, 9, 9, 4))
    for agreement in pairwise(torch.cat([maps, maps])):
        assert energy_distance(1 - agreement, 3) == pytest.approx(0, abs=1e-12)
        assert energy_distance(1 - agreement[:4, :4], 1) > 0  # one answer for three annotators


def test_bootstrap():
    rng = np.random.default_rng(0)
    value = rng.normal(3, 2, 400)
    mean, low, high = bootstrap(value)
    half = 1.96 * value.std() / 400**0.5  # the normal interval
    assert mean == pytest.approx(value.mean()) and (mean - low, high - mean) == pytest.approx((half, half),
                                                                                              rel=0.15)
    weight = rng.integers(1, 9, 400)
    assert bootstrap(value * weight, weight)[0] == pytest.approx(np.average(value, weights=weight))
    assert bootstrap([1.0, float("nan"), 3.0])[0] == 2 and bootstrap([5.0]) == (5, 5, 5)
    assert all(isnan(v) for v in bootstrap([float("nan")] * 3))


def test_reliability():
    p, hit = torch.tensor([0.5, 0.52, 0.58, 0.99, 1.0, 0.76]), torch.tensor([0, 1, 1, 1, 0, 1])
    t = reliability(p, hit, low=0.5, bins=5)  # bins of 0.1
    assert t[:, 0].tolist() == [3, 0, 1, 0, 2] and t[:, 2].tolist() == [2, 0, 1, 0, 1]
    assert calibration_error(t) == pytest.approx((abs(1.6 - 2) + abs(0.76 - 1) + abs(1.99 - 1)) / 6, abs=1e-6)
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=g)
    # calibrated by construction
    assert calibration_error(reliability(p, torch.rand(200_000, generator=g) < p)) < 0.006
    error = calibration_error(reliability(p, torch.rand(200_000, generator=g) < p**2))
    assert error == pytest.approx(1 / 6, abs=0.006)
    shares = torch.arange(9) / 8  # shares of 8 samples: a bin each
    assert reliability(shares, shares, bins=9)[:, 0].tolist() == [1] * 9


def test_256_images_take_under_a_second():
    true = torch.from_numpy(blobs(np.random.default_rng(0), 32, 128, 128, 20)).repeat(8, 1, 1)
    pred = true.roll(3, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        all_scores(pred[:8], true[:8])
        start = time.process_time()  # not disturbed by other processes
        all_scores(pred, true)
        assert time.process_time() - start < 1
    finally:
        torch.set_num_threads(threads)
