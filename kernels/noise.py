"""noise: cells -> palette code -> analog bits -> alpha x0 + sigma eps in one pass, the noise drawn inside.

    cells (B, H, W) integers, alpha and sigma (B,), seeds (B,) -> xt (B, K, H, W), or the network's whole
    input (B, K + I [+ K], H, W): cat(xt, image[, x_self]), in the network's dtype and layout; I = 3, or
    3 d^2 of a folded image.

Bytes a pixel: reads one cell (1 to 8) [, I floats of the image, K of x_self], writes every output channel
once. At K = 6, bfloat16, int8 cells: 1 + 12, and 13 + 18 for the whole input. Neither x0 nor eps exists in
memory. eps is a function of (seed, stream, pixel, channel) alone: see `normals` in common.py; so keep the
seed, not the noise. A thread has as many pixels as 16 bytes hold elements, so that even rows of 9 x 2 bytes
leave it in pieces of 16.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cell_of, code_of, empty, four_normals, is_last, load_rows, operator, signed, store_rows

GROUPS, WARPS = 128, 4  # one group of pixels a thread. Not swept on a GPU yet


@triton.jit(do_not_specialize=["stream"])
def noise_kernel(
    out_ptr,  # (B, C, H, W) in the layout LAST says
    cells_ptr, codes_ptr,  # (B, H, W) if CELLS; (2^K,) if TABLE
    alpha_ptr, sigma_ptr, seeds_ptr,  # (B,) float32, float32, int64; the first two if CELLS
    image_ptr, keep_ptr,  # (B, I, H, W) in the layout IMAGE_LAST says, and (B,) float32, if I
    self_ptr,  # (B, K, H, W)
    stream, HW, blocks,
    K: tl.constexpr, I: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr, TABLE: tl.constexpr,
    SELF: tl.constexpr, LAST: tl.constexpr, IMAGE_LAST: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
):
    b = tl.program_id(0) // blocks
    b64 = b.to(tl.int64) * HW
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)  # of V pixels, one a thread
    bits, seed = (), tl.load(seeds_ptr + b)
    for i in tl.static_range(V * K // 4):  # V x K normal numbers, pixel by pixel
        bits = bits + four_normals(seed, stream, group * (V * K // 4) + i,
                                   out_ptr.dtype.element_ty.primitive_bitwidth == 16)
    if CELLS:
        cells = load_rows(cells_ptr + b64, group, HW, 1, V, False)
        alpha, sigma = tl.load(alpha_ptr + b), tl.load(sigma_ptr + b)
    if I > 0:
        image = load_rows(image_ptr + b64 * I, group, HW, I, V, IMAGE_LAST)
        keep = tl.load(keep_ptr + b)
    if SELF == "given":
        x_self = load_rows(self_ptr + b64 * K, group, HW, K, V, LAST)

    rows = ()
    for q in tl.static_range(V):
        p = group * V + q
        if CELLS:
            cell = cell_of(cells[q], K)
            code, size = code_of(cell, codes_ptr, p < HW, K, TABLE), tl.where(cell >= 0, alpha, 0.0)
        for c in tl.static_range(K):
            x = bits[q * K + c]
            if CELLS:
                x = sigma * x + signed(size, code, c)
            rows = rows + (x,)
        if I > 0:
            for c in tl.static_range(I):
                rows = rows + (image[q * I + c].to(tl.float32) * keep,)
        if SELF != "none":
            for c in tl.static_range(K):
                rows = rows + (x_self[q * K + c].to(tl.float32) if SELF == "given"
                               else tl.zeros_like(bits[0]),)
    store_rows(out_ptr + b64 * C, rows, group, HW, C, V, LAST)


@operator
def noise(seeds: Tensor, stream: int, height: int, width: int, bits: int, dtype: torch.dtype, last: bool,
          cells: Optional[Tensor] = None, alpha: Optional[Tensor] = None, sigma: Optional[Tensor] = None,
          codes: Optional[Tensor] = None, image: Optional[Tensor] = None, keep: Optional[Tensor] = None,
          x_self: Optional[Tensor] = None, self_condition: bool = False) -> Tensor:
    """The launcher. All tensors contiguous, x_self in the layout that `last` says, the image in either."""
    B, HW = len(seeds), height * width
    I = 0 if image is None else image.shape[1]
    C = bits + I + (bits if self_condition else 0)
    out = empty((B, C, height, width), last, dtype, seeds.device)
    # pixels a thread: 8 of more channels do not fit its registers
    V = 16 // out.element_size() if C <= 20 else 4
    blocks = triton.cdiv(HW, GROUPS * V)
    noise_kernel[(B * blocks,)](
        out, seeds if cells is None else cells, seeds if codes is None else codes, alpha, sigma, seeds, image,
        keep, x_self, stream, HW, blocks, K=bits, I=I, C=C, CELLS=cells is not None, TABLE=codes is not None,
        SELF="none" if not self_condition else "zeros" if x_self is None else "given",
        LAST=last, IMAGE_LAST=image is not None and is_last(image), V=V, GROUPS=GROUPS, num_warps=WARPS)
    return out


@noise.register_fake
def _(seeds, stream, height, width, bits, dtype, last, cells=None, alpha=None, sigma=None, codes=None,
      image=None, keep=None, x_self=None, self_condition=False):
    C = bits + (0 if image is None else image.shape[1]) + (bits if self_condition else 0)
    return empty((len(seeds), C, height, width), last, dtype, seeds.device)
