"""decode: soft bits -> cell, and the probability and entropy of the code (paper, Eq. 3).

    x (B, K, H, W) -> cells (B, H, W) [, confidence, entropy (B, H, W)]
The 2^K class probabilities are never formed.

Bytes a pixel, K = 6, bfloat16: reads 12, writes the cell (1 to 8) and 4 for each of confidence and entropy. A
thread needs all channels of its pixels: it takes as many pixels as 16 bytes hold elements, reads their K x 16
bytes in K accesses, in either layout, and takes them apart in registers.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import load_rows, put_together, store_rows

GROUPS, WARPS = 128, 4  # one group of pixels a thread. Not swept on a GPU yet


@triton.jit
def binary_entropy(x):
    """Entropy, in bits, of a bit that is 1 with probability (1 + x) / 2."""
    p, q = (1 + x) / 2, (1 - x) / 2
    return -p * tl.log2(tl.maximum(p, 1e-30)) - q * tl.log2(tl.maximum(q, 1e-30))  # 0 log 0 = 0


@triton.jit
def cell_of(code, table_ptr, K: tl.constexpr, TABLE: tl.constexpr):
    """The inverse of code_of in common.py; 2D Gray unless TABLE: the prefix-xor of each half."""
    if TABLE:
        code = tl.load(table_ptr + code).to(tl.int32)
    else:
        for s in tl.static_range(3):  # by 1, 2, 4: a half has 5 bits at most
            if (1 << s) < K // 2:
                code = code ^ ((code >> (1 << s)) & ~(((1 << (1 << s)) - 1) << (K // 2 - (1 << s))))
    return code


@triton.jit
def decode_kernel(
    x_ptr, valid_ptr, table_ptr,  # (B, K, H, W); (B, H, W) if MASK; (2^K,) if TABLE
    cells_ptr, confidence_ptr, entropy_ptr,  # (B, H, W); the last two if SOFT
    HW, blocks,
    K: tl.constexpr, V: tl.constexpr, LAST: tl.constexpr, MASK: tl.constexpr, TABLE: tl.constexpr,
    SOFT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)  # of V pixels, one a thread
    rows = load_rows(x_ptr + b * HW * K, group, HW, K, V, LAST)
    codes, sure, spread = (), (), ()
    for q in tl.static_range(V):
        code, entropy = tl.zeros((GROUPS,), tl.int32), tl.zeros((GROUPS,), tl.float32)
        confidence = entropy + 1
        for c in tl.static_range(K):
            x = rows[q * K + c].to(tl.float32)
            x = tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))
            code += (x > 0).to(tl.int32) << c
            if SOFT:
                confidence *= (1 + tl.abs(x)) / 2
                entropy += binary_entropy(x)
        codes, sure, spread = codes + (code,), sure + (confidence,), spread + (entropy,)
    pixel = group[:, None] * V + tl.arange(0, V)[None, :]  # (GROUPS, V)
    cell = cell_of(put_together(codes, V), table_ptr, K, TABLE)
    if MASK:
        cell = tl.where(tl.load(valid_ptr + b * HW + pixel, mask=pixel < HW, other=0) != 0, cell, -1)
    tl.store(cells_ptr + b * HW + pixel, cell.to(cells_ptr.dtype.element_ty), mask=pixel < HW)
    if SOFT:
        store_rows(confidence_ptr + b * HW, sure, group, HW, 1, V, False)
        store_rows(entropy_ptr + b * HW, spread, group, HW, 1, V, False)


def results(x, dtype, soft):
    B, _, H, W = x.shape
    confidence, entropy = (x.new_empty((B, H, W) if soft else 0, dtype=torch.float32) for _ in range(2))
    return x.new_empty((B, H, W), dtype=dtype), confidence, entropy


@torch.library.custom_op("bitseg::decode", mutates_args=())
def decode(x: Tensor, last: bool, valid: Optional[Tensor], table: Optional[Tensor], dtype: torch.dtype,
           soft: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """The launcher. x (B, K, H, W) in the layout that `last` says -> cells, confidence, entropy: empty unless
    soft."""
    B, K, H, W = x.shape
    # pixels a thread: 8 of more channels do not fit its registers
    V = 16 // x.element_size() if K <= 8 else 4
    blocks = triton.cdiv(H * W, GROUPS * V)
    cells, confidence, entropy = results(x, dtype, soft)
    decode_kernel[(B * blocks,)](
        x, x if valid is None else valid.view(torch.uint8), table, cells, confidence, entropy, H * W, blocks,
        K=K, V=V,
        LAST=last, MASK=valid is not None, TABLE=table is not None, SOFT=soft, GROUPS=GROUPS, num_warps=WARPS)
    return cells, confidence, entropy


@decode.register_fake
def _(x, last, valid, table, dtype, soft):
    return results(x, dtype, soft)
