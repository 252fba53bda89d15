"""contingency: how many pixels each pair (predicted segment, true segment) has, for ARI and IoU.

    pred (B, H, W) in [0, P), true (B, H, W) in [-1, T) -> (B, P, T) int64; pixels with true == -1 do not count
Integer atomics, so exact. Only the two ends of each run of equal pairs in a row add something: a run of columns
[s, e] adds e + 1 at its end and -s at its start.

Bytes a pixel, two int64 maps: reads 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4                           # pixels a program. Not swept on a GPU yet


@triton.jit
def pair(pred_ptr, true_ptr, at, mask, T):
    """Number of the pair at a pixel, int64; -1 where it does not count."""
    pred = tl.load(pred_ptr + at, mask=mask, other=-1).to(tl.int64)
    true = tl.load(true_ptr + at, mask=mask, other=-1).to(tl.int64)
    return tl.where((pred >= 0) & (true >= 0) & (true < T), pred * T + true, -1)


@triton.jit(do_not_specialize=["P", "T"])
def contingency_kernel(pred_ptr, true_ptr, table_ptr, H, W, P, T, blocks, BLOCK: tl.constexpr):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    col, inside, at = (p % W).to(tl.int64), p < H * W, b * H * W + p
    here = pair(pred_ptr, true_ptr, at, inside, T)
    left = pair(pred_ptr, true_ptr, at - 1, inside & (col > 0), T)
    right = pair(pred_ptr, true_ptr, at + 1, inside & (col < W - 1), T)
    counted, to = (here >= 0) & (here < P.to(tl.int64) * T), table_ptr + b * P * T + here
    tl.atomic_add(to, -col, mask=counted & (left != here) & (col > 0), sem="relaxed")
    tl.atomic_add(to, col + 1, mask=counted & (right != here), sem="relaxed")


@torch.library.custom_op("bitseg::contingency", mutates_args=())
def contingency(pred: Tensor, true: Tensor, P: int, T: int) -> Tensor:
    """The launcher. pred, true (B, H, W) contiguous; ids outside [0, P) and [0, T) do not count."""
    B, H, W = pred.shape
    table, blocks = torch.zeros(B, P, T, dtype=torch.int64, device=pred.device), triton.cdiv(H * W, BLOCK)
    contingency_kernel[(B * blocks,)](pred, true, table, H, W, P, T, blocks, BLOCK=BLOCK, num_warps=WARPS)
    return table


@contingency.register_fake
def _(pred, true, P, T):
    return pred.new_empty((len(pred), P, T), dtype=torch.int64)
