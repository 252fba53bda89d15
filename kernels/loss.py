"""loss: the weighted loss of each sample, and its gradient, straight from the network's output.

    out (B, K, H, W), cells (B, H, W), weight (B,) -> loss (B,) = weight * sum_bits mean_valid (x_hat - x0)^2
with x_hat from an x, eps or v prediction (tanh or none for x) and x0 recomputed from the cell: neither exists in memory.
BCE: -log sigmoid(2 x0 out) in place of the square, with the gradient tanh(out) - x0.

Bytes a pixel, K = 6, bfloat16, int8 cells: forward reads 12 + 1; backward reads 12 + 1 and writes 12. Keeping the
gradient from the forward pass and only scaling it would be 13 + 12, then 12 + 12: more traffic, one more array, two
roundings, and an underflow in float16; so backward computes it again from `out`. eps and v read xt (B, K, H, W), too.
Deterministic: every program sums its pixels in a fixed order, and one program a sample sums those sums.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import part, target_bit, tanh, x_hat_of

BLOCK, WARPS = 1024, 4                           # pixels a program. Not swept on a GPU yet


@triton.jit
def loss_forward_kernel(
    out_ptr, cells_ptr, codes_ptr,               # (B, K, H, W); (B, H, W); (2^K,) if TABLE
    xt_ptr, alpha_ptr, sigma_ptr,                # (B, K, H, W), (B,), (B,) unless PREDICTION is x
    sums_ptr, counts_ptr,                        # (B, blocks) float32, int32: squared error, valid elements
    HW, blocks,
    K: tl.constexpr, TABLE: tl.constexpr, PREDICTION: tl.constexpr, TANH: tl.constexpr, BCE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, p0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    base = b.to(tl.int64) * HW
    total, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for j in tl.range(0, K, loop_unroll_factor=K if K <= 8 else K // 2):           # all 10 at once do not fit the registers
        e, p, c, inside = part(j, p0, HW, K, BLOCK, LAST)
        cell = tl.load(cells_ptr + base + p, mask=inside, other=-1).to(tl.int32)
        out = tl.load(out_ptr + base * K + e, mask=inside, other=0).to(tl.float32)
        xt, alpha, sigma = out, 1.0, 0.0
        if PREDICTION != "x":
            xt = tl.load(xt_ptr + base * K + e, mask=inside, other=0).to(tl.float32)
            alpha, sigma = tl.load(alpha_ptr + b), tl.load(sigma_ptr + b)
        target = target_bit(cell, c, codes_ptr, inside, K, TABLE)
        if BCE:
            z = -2 * target * out                                                  # log(1 + e^z), for any z
            error = tl.maximum(z, 0.0) + tl.log(1 + tl.exp(-tl.abs(z)))
        else:
            error = x_hat_of(out, xt, alpha, sigma, PREDICTION, TANH) - target
            error *= error
        total += tl.where(cell >= 0, error, 0.0)
        count += (cell >= 0).to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count))


@triton.jit
def loss_sum_kernel(sums_ptr, counts_ptr, weight_ptr, loss_ptr, valid_ptr, blocks, K: tl.constexpr, N: tl.constexpr):
    """Adds up a sample's blocks: loss (B,) and the number of valid pixels (B,), at least 1, float32."""
    b = tl.program_id(0)
    total, count = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.int32)
    for start in range(0, blocks, N):
        i = start + tl.arange(0, N)
        total += tl.load(sums_ptr + b.to(tl.int64) * blocks + i, mask=i < blocks, other=0.0)
        count += tl.load(counts_ptr + b.to(tl.int64) * blocks + i, mask=i < blocks, other=0)
    valid = tl.maximum(tl.sum(count) // K, 1).to(tl.float32)
    tl.store(loss_ptr + b, tl.load(weight_ptr + b) * tl.sum(total) / valid)
    tl.store(valid_ptr + b, valid)


@triton.jit
def loss_backward_kernel(
    grad_ptr, g_ptr, weight_ptr, valid_ptr,      # (B, K, H, W) to write; (B,) each
    out_ptr, cells_ptr, codes_ptr, xt_ptr, alpha_ptr, sigma_ptr, HW, blocks,
    K: tl.constexpr, TABLE: tl.constexpr, PREDICTION: tl.constexpr, TANH: tl.constexpr, BCE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, p0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    base = b.to(tl.int64) * HW
    scale = (1 if BCE else 2) * tl.load(g_ptr + b).to(tl.float32) * tl.load(weight_ptr + b) / tl.load(valid_ptr + b)
    outs, xts = (), ()
    for j in tl.static_range(K):                                                   # all reads before the first write
        e, p, c, inside = part(j, p0, HW, K, BLOCK, LAST)
        outs = outs + (tl.load(out_ptr + base * K + e, mask=inside, other=0),)
        if PREDICTION != "x":
            xts = xts + (tl.load(xt_ptr + base * K + e, mask=inside, other=0),)
    for j in tl.static_range(K):
        e, p, c, inside = part(j, p0, HW, K, BLOCK, LAST)
        cell = tl.load(cells_ptr + base + p, mask=inside, other=-1).to(tl.int32)
        out = outs[j].to(tl.float32)
        target = target_bit(cell, c, codes_ptr, inside, K, TABLE)
        if PREDICTION == "x":
            x_hat = tanh(out) if TANH else out
            slope = 1 - x_hat * x_hat if TANH and not BCE else 1.0
        else:
            alpha, sigma = tl.load(alpha_ptr + b), tl.load(sigma_ptr + b)
            x_hat = x_hat_of(out, xts[j].to(tl.float32), alpha, sigma, PREDICTION, TANH)
            slope = -sigma / alpha if PREDICTION == "eps" else -sigma
        grad = tl.where(cell >= 0, scale * (x_hat - target) * slope, 0.0)
        tl.store(grad_ptr + base * K + e, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("bitseg::loss_forward", mutates_args=())
def loss_forward(out: Tensor, cells: Tensor, weight: Tensor, prediction: str, tanh: bool, bce: bool, last: bool,
                 xt: Optional[Tensor], alpha: Optional[Tensor], sigma: Optional[Tensor],
                 codes: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """The launcher. out and xt in the layout that `last` says, the rest contiguous -> loss (B,), valid pixels (B,)."""
    (B, K, H, W), blocks = out.shape, triton.cdiv(out[0, 0].numel(), BLOCK)
    sums = torch.empty(B * blocks, dtype=torch.float32, device=out.device)
    counts = torch.empty(B * blocks, dtype=torch.int32, device=out.device)
    loss, valid = (torch.empty(B, dtype=torch.float32, device=out.device) for _ in range(2))
    loss_forward_kernel[(B * blocks,)](
        out, cells, cells if codes is None else codes, xt, alpha, sigma, sums, counts, H * W, blocks, K=K,
        TABLE=codes is not None, PREDICTION=prediction, TANH=tanh, BCE=bce, LAST=last, BLOCK=BLOCK, num_warps=WARPS)
    loss_sum_kernel[(B,)](sums, counts, weight, loss, valid, blocks, K=K, N=128, num_warps=1)
    return loss, valid


@torch.library.custom_op("bitseg::loss_backward", mutates_args=())
def loss_backward(g: Tensor, weight: Tensor, valid: Tensor, out: Tensor, cells: Tensor, prediction: str, tanh: bool,
                  bce: bool, last: bool, xt: Optional[Tensor], alpha: Optional[Tensor], sigma: Optional[Tensor],
                  codes: Optional[Tensor]) -> Tensor:
    (B, K, H, W), blocks = out.shape, triton.cdiv(out[0, 0].numel(), BLOCK)
    grad = torch.empty_like(out)
    loss_backward_kernel[(B * blocks,)](
        grad, g, weight, valid, out, cells, cells if codes is None else codes, xt, alpha, sigma, H * W, blocks, K=K,
        TABLE=codes is not None, PREDICTION=prediction, TANH=tanh, BCE=bce, LAST=last, BLOCK=BLOCK, num_warps=WARPS)
    return grad


@loss_forward.register_fake
def _(out, cells, weight, prediction, tanh, bce, last, xt, alpha, sigma, codes):
    return tuple(torch.empty(len(out), dtype=torch.float32, device=out.device) for _ in range(2))


@loss_backward.register_fake
def _(g, weight, valid, out, cells, prediction, tanh, bce, last, xt, alpha, sigma, codes):
    return torch.empty_like(out)


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, cells, weight, *rest):
        loss, valid = loss_forward(out, cells, weight, *rest)
        prediction, tanh, bce, last, xt, alpha, sigma, codes = rest
        ctx.save_for_backward(weight, valid, out, cells, xt, alpha, sigma, codes)
        ctx.rest = prediction, tanh, bce, last
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, valid, out, cells, xt, alpha, sigma, codes = ctx.saved_tensors
        grad = loss_backward(g.contiguous(), weight, valid, out, cells, *ctx.rest, xt, alpha, sigma, codes)
        return grad, *[None] * 10


def loss(*args):
    """Arguments as of loss_forward -> (B,)."""
    return Loss.apply(*args)
