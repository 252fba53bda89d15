"""How alike two label maps are, how spread out a set of them is, and how far a probability can be trusted.

What it is: batched functions on (B, H, W) integer label maps, any ids, on any device; nearly all of them from
one contingency table. What it is not: it knows nothing of images or models.

Use it alone:
    from metrics import scores, all_scores
    s = scores(predicted, true)    # pixels where true == -1 do not count
    s["ari"], s["iou"], s["hiou"]  # each (B,) float64; nan where nothing is valid

Sources: ARI: Hubert & Arabie 1985; IoU: section 4.1 of "Towards Agnostic and Holistic Universal Image
Segmentation with Bit Diffusion" (NLDL 2026), after Qi et al. 2023; PQ: Kirillov et al. 2019; covering, Rand
index and variation of information as in BSDS500: Arbelaez et al. 2011; energy distance: Kohl et al. 2018.
"""

import numpy as np
import torch
import torch.nn.functional as F


def contingency(pred, true):
    """Pixels of each pair (predicted segment, true segment): (B, P, T) float64; a row or column may be all
    zero.

    pred, true (B, H, W) integers of any size. Pixels with true == -1 do not count; every predicted id is a
    segment.
    """
    if pred.shape != true.shape or pred.dim() != 3:
        raise ValueError(f"two (B, H, W) label maps of one shape are needed, not {tuple(pred.shape)}, "
                         f"{tuple(true.shape)}")
    if pred.is_floating_point() or true.is_floating_point():
        raise ValueError("label maps are of integers: ToTensor and the like make fractions of their ids")
    pred, true = pred.long(), true.long()
    (low_p, P), (low_t, T) = span(pred), span(true)
    if P * T > 2**16:  # sparse ids, or many
        pred, true = ranks(pred), ranks(true).masked_fill_(true == -1, -1)
        (low_p, P), (low_t, T) = span(pred), span(true)
    image = torch.arange(len(pred), device=pred.device)[:, None, None]
    key = (pred - low_p).mul_(T).add_(true).sub_(low_t - P * T * image)
    table = torch.bincount(key.view(-1), minlength=len(pred) * P * T).view(-1, P, T)
    table = present(table, 1)
    if low_t <= -1 < low_t + T:
        table[:, :, -1 - low_t] = 0
    return present(table, 2).double()


def span(labels):
    """(the smallest id, how many numbers there are from it to the largest)."""
    low, high = (int(v) for v in labels.aminmax())
    return low, high - low + 1


def ranks(labels):
    """Renumber each map on its own, from 0 on, in ascending order: (B, H, W) int64 -> the same."""
    low, n = span(labels)
    if n <= 4096:  # no sort needed
        flat = labels.flatten(1) - low
        seen = torch.zeros(len(flat), n, dtype=torch.int64, device=flat.device).scatter_(1, flat, 1)
        return (seen.cumsum(1) - 1).gather(1, flat).view(labels.shape)
    return torch.stack([m.unique(return_inverse=True)[1] for m in labels])


def present(table, dim):
    """(B, P, T) -> its rows (dim 1) or columns (dim 2) with a pixel, in order: as many as any map has."""
    rank = (table.sum(3 - dim) > 0).cumsum(1).sub_(1).clamp_(min=0)
    shape = list(table.shape)
    shape[dim] = int(rank.max()) + 1
    return table.new_zeros(shape).scatter_add_(dim, rank.unsqueeze(3 - dim).expand_as(table), table)


# ------------------------------------------------------------------------------------------------------------
# From a contingency table (B, P, T), (B,) float64 each; nan where the table is empty. Absent segments have
# size 0.


def or_nan(value, table):
    return torch.where(table.sum((1, 2)) > 0, value, torch.nan)


def pairs(n):
    return n * (n - 1) / 2


def ari(table):
    """Adjusted Rand index: 1 for equal partitions, 0 expected for random ones."""
    n = pairs(table.sum((1, 2)))
    both, pred, true = pairs(table).sum((1, 2)), pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected, most = pred * true / n.clamp(min=1), (pred + true) / 2
    # both trivial: the same
    return or_nan(torch.where(most == expected, 1.0, (both - expected) / (most - expected)), table)


def rand_index(table):
    """Share of the pairs of pixels that both maps join or both part; its mean over annotators is the PRI of
    BSDS500."""
    n = pairs(table.sum((1, 2)))
    both, pred, true = pairs(table).sum((1, 2)), pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    return or_nan(torch.where(n > 0, 1 - (pred + true - 2 * both) / n.clamp(min=1), 1.0), table)


def voi(table):
    """Variation of information in bits, H(pred | true) + H(true | pred): 0 for equal partitions."""
    n = table.sum((1, 2)).clamp(min=1)

    def entropy(count):  # (B, ...)
        p = count.flatten(1) / n[:, None]
        return -torch.special.xlogy(p, p).sum(1) / np.log(2)

    return or_nan((2 * entropy(table) - entropy(table.sum(1)) - entropy(table.sum(2))).clamp(min=0), table)


def iou_matrix(table):
    """Intersection over union of every pair: (B, P, T), 0 for absent segments."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp(min=1)


def covering(table):
    """Covering of the true segments by the predicted: each pixel's true segment's best IoU. Not symmetric."""
    size = table.sum(1)  # (B, T)
    return or_nan((size * iou_matrix(table).amax(1)).sum(1) / size.sum(1).clamp(min=1), table)


def segment_counts(table):
    """(predicted, true) numbers of segments with a valid pixel, float64."""
    return (table.sum(2) > 0).sum(1).double(), (table.sum(1) > 0).sum(1).double()


def matched_iou(table):
    """(iou, hiou): the Hungarian match's summed IoU over #true, and over max(#true, #predicted)."""
    from scipy.optimize import linear_sum_assignment  # here, for sample.py does without and starts sooner
    matrices = iou_matrix(table).cpu().numpy()
    total = torch.tensor([m[linear_sum_assignment(m, maximize=True)].sum() for m in matrices],
                         dtype=torch.float64)
    total, (n_pred, n_true) = total.to(table.device), segment_counts(table)
    return or_nan(total / n_true, table), or_nan(total / torch.maximum(n_true, n_pred), table)


def matches(table):
    """(matched pairs, their summed IoU): pairs with IoU > 0.5, of which no segment can have two. For PQ."""
    iou = iou_matrix(table)
    hit = iou > 0.5
    return or_nan(hit.sum((1, 2)).double(), table), or_nan((iou * hit).sum((1, 2)), table)


def in_void(pred, true):
    """How many predicted segments have some valid pixels, but more where true is -1, and no match: (B,)
    float64. In PQ, these are not wrong (Kirillov et al. 2019, void labels). -1 must not be padding."""
    counts = []
    for one, truth in zip(pred, true):
        owner, valid = one.unique(return_inverse=True)[1], truth != -1
        seen, void = (owner[of].bincount(minlength=int(owner.max()) + 1) for of in (valid, ~valid))
        found = (iou_matrix(contingency(one[None], truth[None]))[0] > 0.5).any(1)
        counts.append(((seen > 0) & (void > seen) & ~found).sum())
    return torch.stack(counts).double()


def object_precision(pred, true):
    """Objects found, at IoU above one half: TP / (TP + FP + FN), (B,) float64; nan where nothing is id 0.

    pred, true as for `contingency`. Background, which is no object: id 0 of true, the largest segment of
    pred. This is the measure of the Data Science Bowl 2018 (Caicedo et al. 2019), at one threshold.
    """
    table = contingency(pred, true)  # id 0, where there is one, is column 0
    hit = iou_matrix(table) > 0.5
    hit[:, :, 0] = False
    hit[torch.arange(len(hit)), table.sum(2).argmax(1)] = False
    found, (n_pred, n_true) = hit.sum((1, 2)).double(), segment_counts(table)
    every = n_pred - 1 + n_true - 1 - found
    return torch.where((true == 0).any(2).any(1), torch.where(every > 0, found / every.clamp(min=1), 1.0),
                       torch.nan)


# ------------------------------------------------------------------------------------------------------------
# Boundaries


def boundaries(labels, valid):
    """Pixels that differ from the one to the right, below or below right, where both are valid: (B, H, W)
    bool."""
    H, W = labels.shape[1:]
    edge = torch.zeros_like(valid)
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        a, b = (slice(None), slice(H - dy), slice(W - dx)), (slice(None), slice(dy, None), slice(dx, None))
        edge[a] |= (labels[a] != labels[b]) & valid[a] & valid[b]
    return edge


def dilate(mask, square):
    """Pixels whose squared distance to a True pixel is at most `square`: (B, H, W) bool -> the same."""
    H, W = mask.shape[1:]
    r = int(square**0.5)
    if r == 0:
        return mask
    count = F.pad(mask.int().cumsum(2), (r + 1, 0))  # count[x + r + 1]: Trues up to x
    count = torch.cat([count, count[:, :, -1:].expand(-1, -1, r)], dim=2)
    near = torch.zeros_like(mask)
    for dy in range(-min(r, H - 1), min(r, H - 1) + 1):
        half = int((square - dy * dy) ** 0.5)
        rows = count[:, max(0, dy) : H + min(0, dy)]
        right, left = rows[:, :, r + half + 1 :][:, :, :W], rows[:, :, r - half :][:, :, :W]
        near[:, max(0, -dy) : H - max(0, dy)] |= right > left
    return near


def boundary_f(pred, true, tolerance=0.0075):
    """F-measure of boundary pixels within tolerance * diagonal of the valid part: (B,). 1 if neither map has
    a boundary.

    A pixel is right if the other map has a boundary pixel that near (no one-to-one matching, unlike
    BSDS500's).
    """
    valid = true != -1
    height, width = valid.any(2).sum(1), valid.any(1).sum(1)  # (B,) each
    squares = (tolerance**2 * (height**2 + width**2).double()).floor().long().tolist()
    a, b = boundaries(pred, valid), boundaries(true, valid)
    hit = torch.zeros(2, len(pred), dtype=torch.float64, device=pred.device)
    for square in set(squares):
        same_square = torch.tensor([i for i, s in enumerate(squares) if s == square], device=pred.device)
        x, y = (a, b) if len(same_square) == len(a) else (a[same_square], b[same_square])
        hit[0, same_square] = (x & dilate(y, square)).sum((1, 2)).double()
        hit[1, same_square] = (y & dilate(x, square)).sum((1, 2)).double()
    n_a, n_b = a.sum((1, 2)), b.sum((1, 2))
    precision, recall = hit[0] / n_a.clamp(min=1), hit[1] / n_b.clamp(min=1)
    f = torch.where((n_a == 0) & (n_b == 0), 1.0,
                    2 * precision * recall / (precision + recall).clamp(min=1e-12))
    return torch.where(valid.any(2).any(1), f, torch.nan)


# ------------------------------------------------------------------------------------------------------------
# All of it


def scores(pred, true):
    """{"ari", "iou", "hiou"}: (B,) float64 each, of (B, H, W) label maps; true == -1 does not count."""
    table = contingency(pred, true)
    iou, hiou = matched_iou(table)
    return {"ari": ari(table), "iou": iou, "hiou": hiou}


def all_scores(pred, true):
    """scores and covering, pri, voi, boundary, pred, true (numbers of segments), matched, overlap: (B,)
    float64 each.

    PQ, SQ and RQ of any set of images are ratios of sums of the last four, see `quality`. pred leaves out
    what `in_void` counts, so that maps must have no padding.
    """
    table = contingency(pred, true)
    iou, hiou = matched_iou(table)
    n_pred, n_true = (or_nan(n, table) for n in segment_counts(table))
    matched, overlap = matches(table)
    if (true == -1).any():
        n_pred = n_pred - in_void(pred, true)
    return {"ari": ari(table), "iou": iou, "hiou": hiou, "covering": covering(table),
            "pri": rand_index(table), "voi": voi(table),
            "boundary": boundary_f(pred, true), "pred": n_pred, "true": n_true, "matched": matched,
            "overlap": overlap}


def quality(s):
    """{"pq", "sq", "rq"}: (numerator, denominator) each; the sums of both over images give the value of the
    set."""
    segment_mean = (s["pred"] + s["true"]) / 2  # TP + FP / 2 + FN / 2
    return {"pq": (s["overlap"], segment_mean), "sq": (s["overlap"], s["matched"]),
            "rq": (s["matched"], segment_mean)}


def bootstrap(value, weight=None, resamples=1000, seed=0):
    """(mean, low, high): sum(value) / sum(weight) over images and its 95 % percentile interval, resampling
    images.

    value (N,), weight (N,) or None for 1; images whose value is nan do not count.
    """
    value = np.asarray(value, np.float64)
    weight = np.where(np.isnan(value), 0, 1 if weight is None else np.asarray(weight, np.float64))
    if not weight.sum() > 0:
        return (float("nan"),) * 3
    count = np.random.default_rng(seed).multinomial(len(value), np.full(len(value), 1 / len(value)),
                                                    resamples)
    value = np.nan_to_num(value)
    with np.errstate(invalid="ignore"):
        low, high = np.nanpercentile(count @ value / (count @ weight), [2.5, 97.5])
    return float(value.sum() / weight.sum()), float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# Sets of maps of one image


def pairwise(maps):
    """ARI and covering, the mean of both directions, of every two of N maps (N, H, W): two (N, N) float64, 1
    on the diagonal.

    Pixels that are -1 in either map do not count.
    """
    N = len(maps)
    i, j = torch.triu_indices(N, N, 1, device=maps.device)
    out = torch.eye(N, dtype=torch.float64, device=maps.device).repeat(2, 1, 1)
    if N > 1:
        table = contingency(maps[i], maps[j].masked_fill(maps[i] == -1, -1))
        values = torch.stack([ari(table), (covering(table) + covering(table.mT)) / 2])
        out[:, i, j] = out[:, j, i] = values
    return out[0], out[1]


def energy_distance(distance, n):
    """2 E d(s, y) - E d(s, s') - E d(y, y') of the first n maps (s) and the rest (y), from d (N, N): a float.

    Expectations are over all pairs, a map with itself included: 0 if both sets are the same.
    """
    s, y, cross = distance[:n, :n], distance[n:, n:], distance[:n, n:]
    return float(2 * cross.mean() - s.mean() - y.mean())


def diversity(distance):
    """Mean distance of two different maps of a set, from d (N, N); nan for a single map."""
    N = len(distance)
    return float(distance.sum() / (N * (N - 1))) if N > 1 else float("nan")


# ------------------------------------------------------------------------------------------------------------
# Calibration


def reliability(probability, outcome, low=0.0, bins=10, weight=1.0):
    """Sums over `bins` equal bins of [low, 1]: (bins, 3) float64: of the weights, and of the probabilities
    and the outcomes times these."""
    p, o = probability.reshape(-1).double(), outcome.reshape(-1).double()
    where = ((p - low) / (1 - low) * bins).long().clamp(0, bins - 1)
    return torch.stack([torch.bincount(where, weight * v, bins) for v in (torch.ones_like(p), p, o)],
                       dim=1).double()


def calibration_error(table):
    """Expected calibration error of a reliability table: the mean |probability - outcome| of its bins."""
    return float((table[:, 1] - table[:, 2]).abs().sum() / table[:, 0].sum())
