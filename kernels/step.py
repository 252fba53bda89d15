"""step: one update of the sampler, from the network's output to the next xt.

    out (B or 2B, K, H, W), xt (B, K, H, W) -> a xt + b x_hat + c eps (B, K, H, W), in xt's dtype [, x_hat]
with x_hat = (1 + w) x_hat(image) - w x_hat(no image) if out holds both halves, clamped to [-1, 1] or not,
0 outside `valid`. DDPM, DDIM and the last step differ only in a, b and c (c = 0: no noise); see diffusion.py.

Bytes a pixel, K = 6, bfloat16 out, float32 xt: reads 12 for each half, 24 and 1 (valid), writes 24. eps is
drawn inside.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import normals, operator, part, x_hat_of

BLOCK, WARPS = 1024, 4  # pixels a program. Not swept on a GPU yet


@triton.jit(do_not_specialize=["stream"])
def step_kernel(
    next_ptr, x_hat_ptr,  # (B, K, H, W) to write; the second if X_HAT
    # (B or 2B, K, H, W); (B, K, H, W); (B, H, W) if MASK; (B,) if NOISE
    out_ptr, xt_ptr, valid_ptr, seeds_ptr,
    alpha: tl.float32, sigma: tl.float32, w: tl.float32, a: tl.float32, b: tl.float32, c: tl.float32,
    stream, half, HW, blocks,  # half: elements of the first half of out, 64-bit where needed
    K: tl.constexpr, GUIDED: tl.constexpr, MASK: tl.constexpr, NOISE: tl.constexpr, X_HAT: tl.constexpr,
    CLAMP: tl.constexpr, PREDICTION: tl.constexpr, TANH: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, p0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    base = sample.to(tl.int64) * HW
    if NOISE:
        seed = tl.load(seeds_ptr + sample)
    for j in tl.static_range(K):
        e, p, channel, inside = part(j, p0, HW, K, BLOCK, LAST)
        xt = tl.load(xt_ptr + base * K + e, mask=inside, other=0).to(tl.float32)
        out = tl.load(out_ptr + base * K + e, mask=inside, other=0).to(tl.float32)
        x = x_hat_of(out, xt, alpha, sigma, PREDICTION, TANH)
        if GUIDED:
            out = tl.load(out_ptr + half + base * K + e, mask=inside, other=0).to(tl.float32)
            x = (1 + w) * x - w * x_hat_of(out, xt, alpha, sigma, PREDICTION, TANH)
        if CLAMP:
            x = tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))  # a nan stays one
        if MASK:
            x = tl.where(tl.load(valid_ptr + base + p, mask=inside, other=0) != 0, x, 0.0)
        if X_HAT:
            tl.store(x_hat_ptr + base * K + e, x, mask=inside)
        x = a * xt + b * x
        if NOISE:
            x += c * normals(seed, stream, j, p0, K, BLOCK, LAST)
        tl.store(next_ptr + base * K + e, x.to(next_ptr.dtype.element_ty), mask=inside)


@operator
def step(out: Tensor, xt: Tensor, last: bool, alpha: float, sigma: float, a: float, b: float, c: float,
         valid: Optional[Tensor], guidance: float, seeds: Optional[Tensor], stream: int, prediction: str,
         tanh: bool, with_x_hat: bool, clamp: bool = True) -> Tuple[Tensor, Tensor]:
    """The launcher. out and xt in the layout that `last` says, valid contiguous -> next xt, x_hat (float32,
    or empty)."""
    B, K, H, W = xt.shape
    block = BLOCK if K <= 8 else BLOCK // 2  # the registers do not hold more
    blocks = triton.cdiv(H * W, block)
    after = torch.empty_like(xt)
    x_hat = torch.empty_like(xt, dtype=torch.float32) if with_x_hat else xt.new_empty(0, dtype=torch.float32)
    step_kernel[(B * blocks,)](
        after, x_hat, out, xt, out if valid is None else valid.view(torch.uint8), seeds, alpha, sigma,
        guidance, a, b, c, stream, xt.numel(), H * W, blocks, K=K, GUIDED=len(out) > B,
        MASK=valid is not None, NOISE=seeds is not None, X_HAT=with_x_hat, CLAMP=clamp,
        PREDICTION=prediction, TANH=tanh, LAST=last, BLOCK=block, num_warps=WARPS)
    return after, x_hat


@step.register_fake
def _(out, xt, last, alpha, sigma, a, b, c, valid, guidance, seeds, stream, prediction, tanh, with_x_hat,
      clamp=True):
    x_hat = torch.empty_like(xt, dtype=torch.float32) if with_x_hat else xt.new_empty(0, dtype=torch.float32)
    return torch.empty_like(xt), x_hat
