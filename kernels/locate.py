"""locate: label ids -> cell of the location-aware palette, a batch at a time, in three launches and no host
round trip.

    labels (B, H, W) integers in [-1, N), N <= 1024 -> cells (B, H, W) in [0, side^2), -1 where ignored
1. moments: pixel count and sums of rows and columns of every label of every image, by integer atomics, so
exact.
   Only the two ends of each run of equal labels in a row add something, in closed form: a run [s, e] has
   e + 1 - s pixels and its columns sum to (e (e + 1) - s (s - 1)) / 2.
2. assign: one program an image; merges what is beyond side^2 segments, then lets the segments choose one
after
   another. Integers all through, so ties are ties.
3. remap: label -> cell.

Bytes a pixel, int64 labels, int8 cells: reads 8 twice, writes 1.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import operator

BLOCK, WARPS = 1024, 4  # pixels a program of 1 and 3. Not swept on a GPU yet
MAX_LABELS = 1024
MAX = tl.constexpr(2**63 - 1)


@triton.jit
def ids(ptr, mask, below):
    """Labels in [0, below) as int32, -1 for all others."""
    label = tl.load(ptr, mask=mask, other=0)
    return tl.where(mask & (label >= 0) & (label < below), label.to(tl.int32), -1)


@triton.jit
def moments_kernel(labels_ptr, moments_ptr, below, H, W, blocks, N: tl.constexpr, BLOCK: tl.constexpr):
    """labels (B, H, W) -> moments (B, 3, N) int64, zero before: counts, rows, columns."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row, col, inside = (p // W).to(tl.int64), (p % W).to(tl.int64), p < H * W
    at = labels_ptr + b * H * W + p
    left, label = ids(at - 1, inside & (col > 0), below), ids(at, inside, below)
    right = ids(at + 1, inside & (col < W - 1), below)
    # column 0 adds 0
    starts, ends = (label >= 0) & (left != label) & (col > 0), (label >= 0) & (right != label)
    to = moments_ptr + b * 3 * N + label
    tl.atomic_add(to, -col, mask=starts, sem="relaxed")
    tl.atomic_add(to, col + 1, mask=ends, sem="relaxed")
    tl.atomic_add(to + N, -col * row, mask=starts, sem="relaxed")
    tl.atomic_add(to + N, (col + 1) * row, mask=ends, sem="relaxed")
    tl.atomic_add(to + 2 * N, -(col * (col - 1) // 2), mask=starts, sem="relaxed")
    tl.atomic_add(to + 2 * N, col * (col + 1) // 2, mask=ends, sem="relaxed")


@triton.jit
def round_half_even(a, b):
    """(a - b / 2) / b for integers a >= 0 and b > 0, rounded to the nearest integer, halves to the even
    one."""
    up = a // b
    return up - ((a % b == 0) & (up % 2 == 1)).to(tl.int64)


@triton.jit
def total(x):
    return tl.sum(x, axis=0)


@triton.jit(do_not_specialize=["H", "W", "side"])
def assign_kernel(
    # (B, 3, N) int64; the same of hinted pixels alone, if HINTS; (B, N) int16 to write
    moments_ptr, hinted_ptr, cell_ptr,
    # K: side^2, up to a power of two
    H, W, side, HINTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    count = tl.load(moments_ptr + b * 3 * N + n)
    rows, cols = tl.load(moments_ptr + b * 3 * N + N + n), tl.load(moments_ptr + b * 3 * N + 2 * N + n)
    present, classes, rank = count > 0, side * side, count
    if HINTS:
        at = hinted_ptr + b * 3 * N + n
        hinted, hinted_rows, hinted_cols = tl.load(at), tl.load(at + N), tl.load(at + 2 * N)
        rank = tl.where(hinted > 0, count + H * W, count)  # the last to be merged
    left, largest = total(present.to(tl.int32)), tl.argmax(count, axis=0)  # ties: the lowest label
    kept = present
    if left > classes:  # merge the smallest into the largest
        kept = n == tl.argmax(rank, axis=0)
        for _ in range(1, classes):
            kept = kept | (n == tl.argmax(tl.where(kept, -1, rank), axis=0))
        largest = tl.argmax(tl.where(kept, count, -1), axis=0)
        spare, big = present & ~kept, n == largest
        count += tl.where(big, total(tl.where(spare, count, 0)), 0)
        rows += tl.where(big, total(tl.where(spare, rows, 0)), 0)
        cols += tl.where(big, total(tl.where(spare, cols, 0)), 0)
        if HINTS:
            hinted += tl.where(big, total(tl.where(spare, hinted, 0)), 0)
            hinted_rows += tl.where(big, total(tl.where(spare, hinted_rows, 0)), 0)
            hinted_cols += tl.where(big, total(tl.where(spare, hinted_cols, 0)), 0)
        left = classes

    key = tl.where(kept, n.to(tl.int64), MAX)  # the lowest key chooses next
    if HINTS:  # before all others, by where the hints are
        first = kept & (hinted > 0)
        key = tl.where(first, key - N, key)
        count, rows = tl.where(first, hinted, count), tl.where(first, hinted_rows, rows)
        cols = tl.where(first, hinted_cols, cols)
    size = tl.maximum(count, 1)  # in grid units p = a / (2 size H) - 1/2
    a_row, a_col = (2 * rows + size) * side, (2 * cols + size) * side
    wanted = (round_half_even(a_row, 2 * size * H) * side + round_half_even(a_col, 2 * size * W)).to(tl.int32)
    a_row, a_col = a_row - size * H, a_col - size * W  # p = a / (2 size H)

    grid = tl.arange(0, K)
    row, col, free = (grid // side).to(tl.int64), (grid % side).to(tl.int64), grid < classes
    away = (row * row + col * col) * H * W
    cell = tl.zeros((N,), tl.int32) - 1
    for _ in range(left):
        chooser = n == tl.argmin(key, axis=0)
        # squared distance to every cell, less |p|^2, times size H W
        distance = total(tl.where(chooser, size, 0)) * away - total(tl.where(chooser, a_row, 0)) * W * row \
            - total(tl.where(chooser, a_col, 0)) * H * col
        distance = tl.where(grid == total(tl.where(chooser, wanted, 0)), -MAX, distance)
        taken = tl.argmin(tl.where(free, distance, MAX), axis=0)  # ties: the first in raster order
        cell = tl.where(chooser, taken, cell)
        free = free & (grid != taken)
        key = tl.where(chooser, MAX, key)
    cell = tl.where(kept, cell, total(tl.where(n == largest, cell, 0)))
    tl.store(cell_ptr + b * N + n, cell.to(tl.int16))


@triton.jit
def remap_kernel(labels_ptr, cell_ptr, out_ptr, below, HW, blocks, N: tl.constexpr, BLOCK: tl.constexpr):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    label = ids(labels_ptr + b * HW + p, p < HW, below)
    cell = tl.load(cell_ptr + b * N + label, mask=label >= 0, other=-1)
    tl.store(out_ptr + b * HW + p, cell.to(out_ptr.dtype.element_ty), mask=p < HW)


def renumbered(labels, classes):
    """(B, H, W) of any ids, -1 = ignored -> the same segments in int64 from 0, in ascending order, and the
    largest number.

    In maps of more than MAX_LABELS segments only the `classes` largest are kept; the others join the largest.
    """
    flat = labels.flatten(1)
    index, n = ranks(flat)
    if n > MAX_LABELS:
        pixels = torch.zeros(len(flat), n + 1, dtype=torch.int64, device=flat.device)
        place = torch.where(index < 0, n, index)
        pixels = pixels.scatter_add_(1, place, torch.ones_like(place))[:, :n]
        by_size = pixels.argsort(dim=1, descending=True, stable=True)  # (B, n); ties: the lowest first
        same = torch.arange(n, device=flat.device).expand(len(flat), n)
        new = same.scatter(1, by_size[:, classes:], by_size[:, :1].expand(-1, n - classes))
        index, n = ranks(torch.where(index < 0, -1, new.gather(1, index.clamp(min=0))))
    return index.view(labels.shape), n - 1


def ranks(flat):
    """(B, N) ids -> (B, N) int64: each id's rank among its row's, -1 = ignored; and the largest number of ids
    in a row."""
    value, order = flat.long().sort(1)
    first = torch.ones_like(value)
    first[:, 1:] = value[:, 1:] != value[:, :-1]
    first *= value != -1
    rank = torch.empty_like(value).scatter_(1, order, first.cumsum(1) - 1).masked_fill_(flat == -1, -1)
    return rank, max(1, int(rank.max()) + 1)


@operator
def locate(labels: Tensor, side: int, dtype: torch.dtype, labels_below: int,
           hints: Optional[Tensor] = None) -> Tensor:
    """The launcher. labels (B, H, W) contiguous, every id in [-1, labels_below): what is not counts as
    ignored."""
    B, H, W = labels.shape
    N, K = max(16, triton.next_power_of_2(labels_below)), triton.next_power_of_2(side * side)
    blocks = triton.cdiv(H * W, BLOCK)
    maps = [labels] if hints is None else [labels, torch.where(hints, labels, -1).contiguous()]
    moments = torch.zeros(len(maps), B, 3, N, dtype=torch.int64, device=labels.device)
    cell = torch.empty(B, N, dtype=torch.int16, device=labels.device)
    out = torch.empty(labels.shape, dtype=dtype, device=labels.device)
    for part, sums in zip(maps, moments):
        moments_kernel[(B * blocks,)](part, sums, labels_below, H, W, blocks, N=N, BLOCK=BLOCK,
                                      num_warps=WARPS)
    # as its registers bear
    warps = 1 if max(N, K) <= 256 else 4 if hints is None else 8 if K <= 16 else 16
    assign_kernel[(B,)](moments[0], moments[-1], cell, H, W, side, HINTS=hints is not None, N=N, K=K,
                        num_warps=warps)
    remap_kernel[(B * blocks,)](labels, cell, out, labels_below, H * W, blocks, N=N, BLOCK=BLOCK,
                                num_warps=WARPS)
    return out


@locate.register_fake
def _(labels, side, dtype, labels_below, hints=None):
    return torch.empty(labels.shape, dtype=dtype, device=labels.device)
