"""decode: soft bits -> cell, and the probability and entropy of the code (paper, Eq. 3), over n samples of an image.

    x (B, n, K, H, W) -> cells (B, H, W) [, mean of the clamped bits (B, K, H, W)] [, confidence, entropy (B, H, W)]
n = 1 is plain decoding. For n > 1 everything is of the mean bit over the samples, which is twice the bit's probability
minus 1: the cell is the vote in every bit. The 2^K class probabilities are never formed.

Bytes a pixel, K = 6, bfloat16, n = 1: reads 12, writes the cell (1 to 8) and 4 for each of confidence and entropy.
A thread needs all channels of its pixels: in channels_last it takes as many pixels as 16 bytes hold channels, reads
their K x 16 bytes in K accesses and takes them apart in registers.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import empty

GROUPS, WARPS = 128, 4                           # one group of pixels a thread. Not swept on a GPU yet


@triton.jit
def take_apart(x, V: tl.constexpr):
    """(N, V) -> the V columns, each (N,), as a tuple; V is 2, 4 or 8."""
    x = tl.reshape(x, (x.shape[0], V // 2, 2))
    a, b = tl.split(x)                                                             # even and odd columns
    if V == 2:
        return tl.reshape(a, (x.shape[0],)), tl.reshape(b, (x.shape[0],))
    elif V == 4:
        a, b = take_apart(a, 2), take_apart(b, 2)
        return a[0], b[0], a[1], b[1]
    else:
        a, b = take_apart(a, 4), take_apart(b, 4)
        return a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]


@triton.jit
def put_together(xs, V: tl.constexpr):
    """A tuple of V vectors (N,) -> (N, V); V is 1, 2, 4 or 8."""
    if V == 1:
        x = tl.reshape(xs[0], (xs[0].shape[0], 1))
    elif V == 2:
        x = tl.join(xs[0], xs[1])
    elif V == 4:
        x = tl.join(tl.join(xs[0], xs[2]), tl.join(xs[1], xs[3]))
    else:
        x = tl.join(tl.join(tl.join(xs[0], xs[4]), tl.join(xs[2], xs[6])),
                    tl.join(tl.join(xs[1], xs[5]), tl.join(xs[3], xs[7])))
    return tl.reshape(x, (xs[0].shape[0], V))


@triton.jit
def binary_entropy(x):
    """Entropy, in bits, of a bit that is 1 with probability (1 + x) / 2."""
    p, q = (1 + x) / 2, (1 - x) / 2
    return -(tl.where(p > 0, p * tl.log2(tl.maximum(p, 1e-30)), 0.0) + tl.where(q > 0, q * tl.log2(tl.maximum(q, 1e-30)), 0.0))


@triton.jit
def cell_of(code, table_ptr, K: tl.constexpr, TABLE: tl.constexpr):
    """The inverse of code_of in common.py; 2D Gray unless TABLE: the prefix-xor of each half."""
    if TABLE:
        code = tl.load(table_ptr + code).to(tl.int32)
    else:
        for s in tl.static_range(3):                                               # shifts 1, 2, 4; a half has 5 bits at most
            if (1 << s) < K // 2:
                code = code ^ ((code >> (1 << s)) & ~(((1 << (1 << s)) - 1) << (K // 2 - (1 << s))))
    return code


@triton.jit
def decode_kernel(
    x_ptr, valid_ptr, table_ptr,                 # (B, n, K, H, W); (B, H, W) if MASK; (2^K,) if TABLE
    cells_ptr, mean_ptr, confidence_ptr, entropy_ptr,          # (B, H, W); (B, K, H, W) NCHW if MEAN; (B, H, W) if SOFT
    n, HW, blocks,
    K: tl.constexpr, V: tl.constexpr, LAST: tl.constexpr, MASK: tl.constexpr, TABLE: tl.constexpr, SOFT: tl.constexpr,
    MEAN: tl.constexpr, GROUPS: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)              # of V pixels
    v = tl.arange(0, V)
    pixel = group[:, None] * V + v[None, :]                                        # (GROUPS, V)
    sums = ()
    for c in tl.static_range(K):
        sums = sums + (tl.zeros((GROUPS, V), tl.float32),)
    for i in range(n):
        x_row = x_ptr + (b * n + i) * HW * K
        new = ()
        for j in tl.static_range(K):
            if LAST:
                e = group[:, None] * (V * K) + j * V + v[None, :]
                x = tl.load(x_row + e, mask=e < HW * K, other=0)
            else:
                x = tl.load(x_row + j * HW + pixel, mask=pixel < HW, other=0)
            x = x.to(tl.float32)
            new = new + (sums[j] + tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x)),)
        sums = new
    bits = ()                                                                      # LAST: V x K vectors (GROUPS,)
    if LAST:
        for j in tl.static_range(K):
            bits = bits + take_apart(sums[j], V)
    bits_in_order = ()
    for c in tl.static_range(K):                                                   # K arrays (GROUPS, V) in both layouts
        if LAST:
            mine = ()
            for q in tl.static_range(V):
                mine = mine + (bits[q * K + c],)
            bits_in_order = bits_in_order + (put_together(mine, V),)
        else:
            bits_in_order = bits_in_order + (sums[c],)
    code = tl.zeros((GROUPS, V), tl.int32)
    sure, spread = tl.zeros((GROUPS, V), tl.float32) + 1, tl.zeros((GROUPS, V), tl.float32)
    inside = pixel < HW
    for c in tl.static_range(K):
        m = bits_in_order[c] / n
        code += (m > 0).to(tl.int32) << c
        if SOFT:
            sure *= (1 + tl.abs(m)) / 2
            spread += binary_entropy(m)
        if MEAN:
            tl.store(mean_ptr + (b * K + c) * HW + pixel, m, mask=inside)
    cell = cell_of(code, table_ptr, K, TABLE)
    if MASK:
        cell = tl.where(tl.load(valid_ptr + b * HW + pixel, mask=inside, other=0) != 0, cell, -1)
    tl.store(cells_ptr + b * HW + pixel, cell.to(cells_ptr.dtype.element_ty), mask=inside)
    if SOFT:
        tl.store(confidence_ptr + b * HW + pixel, sure, mask=inside)
        tl.store(entropy_ptr + b * HW + pixel, spread, mask=inside)


def results(x, dtype, soft, mean):
    B, _, K, H, W = x.shape
    def new(wanted, kind, *shape):
        return torch.empty(shape if wanted else 0, dtype=kind, device=x.device)
    return (new(True, dtype, B, H, W), new(mean, torch.float32, B, K, H, W), new(soft, torch.float32, B, H, W),
            new(soft, torch.float32, B, H, W))


@torch.library.custom_op("bitseg::decode", mutates_args=())
def decode(x: Tensor, last: bool, valid: Optional[Tensor], table: Optional[Tensor], dtype: torch.dtype, soft: bool,
           mean: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The launcher. x (B, n, K, H, W), every sample in the layout that `last` says -> cells, mean, confidence, entropy.

    What is not asked for is empty.
    """
    B, n, K, H, W = x.shape
    V = 16 // x.element_size() if x.element_size() > 1 else 8
    blocks = triton.cdiv(H * W, GROUPS * V)
    cells, average, confidence, entropy = results(x, dtype, soft, mean)
    decode_kernel[(B * blocks,)](
        x, x if valid is None else valid.view(torch.uint8), table, cells, average, confidence, entropy, n, H * W, blocks,
        K=K, V=V, LAST=last, MASK=valid is not None, TABLE=table is not None, SOFT=soft, MEAN=mean, GROUPS=GROUPS,
        num_warps=WARPS)
    return cells, average, confidence, entropy


@decode.register_fake
def _(x, last, valid, table, dtype, soft, mean):
    return results(x, dtype, soft, mean)
