"""How alike two label maps are: adjusted Rand index and IoU after matching, all from one contingency table.

What it is: batched functions on (B, H, W) integer label maps, any ids, on any device. What it is not: it knows nothing
of images or models.

Use it alone:
    from metrics import scores
    s = scores(predicted, true)                  # pixels where true == -1 do not count
    s["ari"], s["iou"], s["hiou"]                # each (B,) float64; nan where nothing is valid

Source: ARI: Hubert & Arabie 1985; IoU: section 4.1 of "Towards Agnostic and Holistic Universal Image Segmentation with
Bit Diffusion" (NLDL 2026), after Qi et al. 2023.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def contingency(pred, true):
    """Pixels of each pair (predicted segment, true segment): (B, P, T) float64; a row or column may be all zero.

    pred, true (B, H, W) integers of any size. Pixels with true == -1 do not count; every predicted id is a segment.
    """
    if pred.shape != true.shape or pred.dim() != 3:
        raise ValueError(f"two (B, H, W) label maps of one shape are needed, not {tuple(pred.shape)}, {tuple(true.shape)}")
    B, valid = len(pred), (true != -1).reshape(-1)
    (p, P), (t, T) = ranks(pred), ranks(true)
    image = torch.arange(B, device=pred.device).repeat_interleave(pred[0].numel())
    key = ((image * P + p) * T + t)[valid]
    return torch.bincount(key, minlength=B * P * T).view(B, P, T).double()


def ranks(labels):
    """Renumber every map of a batch on its own: (B, H, W) -> (B*H*W,) ids from 0, and the largest number of ids."""
    flat = labels.reshape(len(labels), -1).long()
    low, high = (int(v) for v in flat.aminmax())
    if high - low < 4096:                                                          # no sort needed
        seen = torch.zeros(len(flat), high - low + 1, dtype=torch.int64, device=flat.device)
        rank = seen.scatter_(1, flat - low, 1).cumsum(1) - 1
        return rank.gather(1, flat - low).reshape(-1), int(rank.max()) + 1
    each = [row.unique(return_inverse=True)[1] for row in flat]
    return torch.cat(each), max(int(r.max()) for r in each) + 1


def ari(table):
    """Adjusted Rand index of each table (B, P, T): 1 for equal partitions, 0 expected for random ones, nan if empty."""
    def pairs(n):
        return n * (n - 1) / 2

    n = pairs(table.sum((1, 2)))
    both, pred, true = pairs(table).sum((1, 2)), pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected, most = pred * true / n.clamp(min=1), (pred + true) / 2
    index = torch.where(most == expected, 1.0, (both - expected) / (most - expected))   # both trivial, and so the same
    return torch.where(table.sum((1, 2)) > 0, index, torch.nan)


def iou_matrix(table):
    """Intersection over union of every pair: (B, P, T), 0 for absent segments."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return table / union.clamp(min=1)


def matched_iou(table):
    """(iou, hiou), each (B,): the Hungarian match's summed IoU over #true, and over max(#true, #predicted)."""
    matrices = iou_matrix(table).cpu().numpy()
    total = np.array([m[linear_sum_assignment(m, maximize=True)].sum() for m in matrices])
    total = torch.from_numpy(total).to(table.device)
    n_true, n_pred = (table.sum(1) > 0).sum(1), (table.sum(2) > 0).sum(1)
    nothing = torch.where(n_true > 0, 0.0, torch.nan)
    return total / n_true.clamp(min=1) + nothing, total / torch.maximum(n_true, n_pred).clamp(min=1) + nothing


def scores(pred, true):
    """{"ari", "iou", "hiou"}: (B,) float64 each, of (B, H, W) label maps; true == -1 does not count."""
    table = contingency(pred, true)
    iou, hiou = matched_iou(table)
    return {"ari": ari(table), "iou": iou, "hiou": hiou}
