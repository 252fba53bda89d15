"""noise: cells -> palette code -> analog bits -> alpha x0 + sigma eps in one pass, the noise drawn inside.

    cells (B, H, W) integers, alpha and sigma (B,), seeds (B,) -> xt (B, K, H, W), or the network's whole input
    (B, K + 3 [+ K], H, W): cat(xt, image[, x_self]), in the network's dtype and layout.

Bytes a pixel: reads one cell (1 to 8) [, 3 uint8 or 3 floats of the image, K of x_self], writes every output channel
once. At K = 6, bfloat16, int8 cells: 1 + 12, and 4 + 18 for the whole input. Neither x0 nor eps exists in memory.
eps is a function of (seed, stream, pixel, channel) alone: see `normals` in common.py; so keep the seed, not the noise.
Rows of K + 3 channels have no common alignment in channels_last (9 x 2 bytes): there the stores are one element each,
side by side over a warp; the kernel's cost is the arithmetic of the noise.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import empty, normals, part, target_bit

BLOCK, WARPS = 1024, 4                           # pixels a program. Not swept on a GPU yet


@triton.jit
def by_channel(c, a, b, d):
    return tl.where(c == 0, a, tl.where(c == 1, b, d))


@triton.jit(do_not_specialize=["stream"])
def noise_kernel(
    out_ptr,                                     # (B, C, H, W) in the layout LAST says
    cells_ptr, codes_ptr,                        # (B, H, W) if CELLS; (K^2,) if TABLE
    alpha_ptr, sigma_ptr, seeds_ptr,             # (B,) float32, float32, int64; the first two if CELLS
    image_ptr, sizes_ptr, keep_ptr,              # (B, H, W, 3) uint8 and (B, 2), or (B, 3, H, W); (B,) 0 or 1
    self_ptr,                                    # (B, K, H, W)
    stream, HW, W, blocks,
    K: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr, TABLE: tl.constexpr, IMAGE: tl.constexpr,
    SELF: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):
    b, p0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    b64 = b.to(tl.int64)
    out_ptr += b64 * HW * C
    cells_ptr += b64 * HW
    seed = tl.load(seeds_ptr + b)
    kind = out_ptr.dtype.element_ty
    for j in tl.static_range(K):                                                   # the noisy bits
        e, p, c, inside = part(j, p0, HW, K, BLOCK, LAST)
        x = normals(seed, stream, j, p0, K, BLOCK, LAST)
        if CELLS:
            cell = tl.load(cells_ptr + p, mask=inside, other=-1).to(tl.int32)
            x = tl.load(sigma_ptr + b) * x + tl.load(alpha_ptr + b) * target_bit(cell, c, codes_ptr, inside, K, TABLE)
        if LAST and C != K:
            e = p * C + c
        tl.store(out_ptr + e, x.to(kind), mask=inside)
    if IMAGE != "none":
        keep = tl.load(keep_ptr + b).to(tl.float32)
        for j in tl.static_range(3):
            e, p, c, inside = part(j, p0, HW, 3, BLOCK, LAST)
            if IMAGE == "uint8":
                h, w = tl.load(sizes_ptr + 2 * b).to(tl.int32), tl.load(sizes_ptr + 2 * b + 1).to(tl.int32)
                visible = inside & (p // W < h) & (p % W < w)
                x = tl.load(image_ptr + b64 * HW * 3 + p * 3 + c, mask=inside, other=0).to(tl.float32) / 255.0
                x = (x - by_channel(c, 0.485, 0.456, 0.406)) / by_channel(c, 0.229, 0.224, 0.225)      # ImageNet
                x = tl.where(visible, x, 0.0)
            else:
                x = tl.load(image_ptr + b64 * HW * 3 + e, mask=inside, other=0).to(tl.float32)
            to = p * C + K + c if LAST else (K + c) * HW + p
            tl.store(out_ptr + to, (x * keep).to(kind), mask=inside)
    if SELF != "none":
        for j in tl.static_range(K):
            e, p, c, inside = part(j, p0, HW, K, BLOCK, LAST)
            x = tl.zeros((BLOCK,), tl.float32)
            if SELF == "given":
                x = tl.load(self_ptr + b64 * HW * K + e, mask=inside, other=0).to(tl.float32)
            to = p * C + K + 3 + c if LAST else (K + 3 + c) * HW + p
            tl.store(out_ptr + to, x.to(kind), mask=inside)


@torch.library.custom_op("bitseg::noise", mutates_args=())
def noise(seeds: Tensor, stream: int, height: int, width: int, bits: int, dtype: torch.dtype, last: bool,
          cells: Optional[Tensor] = None, alpha: Optional[Tensor] = None, sigma: Optional[Tensor] = None,
          codes: Optional[Tensor] = None, image: Optional[Tensor] = None, sizes: Optional[Tensor] = None,
          keep: Optional[Tensor] = None, x_self: Optional[Tensor] = None, self_condition: bool = False) -> Tensor:
    """The launcher. All tensors contiguous, image and x_self in the layout that `last` says (uint8 image: HWC)."""
    B, HW = len(seeds), height * width
    C = bits + (3 if image is not None else 0) + (bits if self_condition else 0)
    out = empty((B, C, height, width), last, dtype, seeds.device)
    blocks = triton.cdiv(HW, BLOCK)
    noise_kernel[(B * blocks,)](
        out, seeds if cells is None else cells, seeds if codes is None else codes, alpha, sigma, seeds, image, sizes,
        keep, x_self, stream, HW, width, blocks, K=bits, C=C, CELLS=cells is not None, TABLE=codes is not None,
        IMAGE="none" if image is None else "uint8" if image.dtype == torch.uint8 else "float",
        SELF="none" if not self_condition else "zeros" if x_self is None else "given",
        LAST=last, BLOCK=BLOCK, num_warps=WARPS)
    return out


@noise.register_fake
def _(seeds, stream, height, width, bits, dtype, last, cells=None, alpha=None, sigma=None, codes=None, image=None,
      sizes=None, keep=None, x_self=None, self_condition=False):
    C = bits + (3 if image is not None else 0) + (bits if self_condition else 0)
    return empty((len(seeds), C, height, width), last, dtype, seeds.device)
