"""loss: the weighted loss of each sample, and its gradient, straight from the network's output.

    out (B, K, H, W), cells (B, H, W), weight (B,) -> loss (B,) = weight * sum_bits mean_valid (x_hat - x0)^2
with x_hat from an x, eps or v prediction (tanh or none for x) and x0 recomputed from the cell: neither exists
in memory.
BCE: -log sigmoid(2 x0 out) in place of the square, with the gradient tanh(out) - x0.

Bytes a pixel, K = 6, bfloat16, int8 cells: forward reads 12 + 1; backward reads 12 + 1 and writes 12. Keeping
the gradient from the forward pass and only scaling it would be 13 + 12, then 12 + 12: more traffic, one more
array, two roundings, and an underflow in float16; so backward computes it again from `out`. eps and v read xt
(B, K, H, W), too.
Deterministic: every program sums its pixels in a fixed order, and one program a sample sums those sums.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cell_of,
    code_of,
    doubt,
    exp2,
    load_rows,
    log2,
    once,
    operator,
    signed,
    store_rows,
    x_hat_of,
)

GROUPS, WARPS = 128, 4  # one group of pixels a thread. Not swept on a GPU yet


@triton.jit
def loss_forward_kernel(
    out_ptr, cells_ptr, codes_ptr,  # (B, K, H, W); (B, H, W); (2^K,) if TABLE
    xt_ptr, alpha_ptr, sigma_ptr,  # (B, K, H, W), (B,), (B,) unless PREDICTION is x
    sums_ptr, counts_ptr,  # (B, blocks) float32, int32: squared error, valid pixels
    HW, blocks,
    K: tl.constexpr, TABLE: tl.constexpr, PREDICTION: tl.constexpr, TANH: tl.constexpr, BCE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
):
    b = tl.program_id(0) // blocks
    base = b.to(tl.int64) * HW
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)  # of V pixels, one a thread
    cells = load_rows(cells_ptr + base, group, HW, 1, V, False)
    outs = load_rows(out_ptr + base * K, group, HW, K, V, LAST)
    if PREDICTION != "x":
        xts = load_rows(xt_ptr + base * K, group, HW, K, V, LAST)
        alpha, sigma = tl.load(alpha_ptr + b), tl.load(sigma_ptr + b)
    total, count = tl.zeros((GROUPS,), tl.float32), tl.zeros((GROUPS,), tl.int32)
    for q in tl.static_range(V):
        cell, inside = cell_of(cells[q], K), group * V + q < HW
        code, error = code_of(cell, codes_ptr, inside, K, TABLE), tl.zeros((GROUPS,), tl.float32)
        for c in tl.static_range(K):
            out = outs[q * K + c].to(tl.float32)
            if BCE:  # log(1 + e^z), for any z
                z = signed(-2 * out, code, c)
                e = exp2(-1.4426950408889634 * tl.abs(z))
                error += tl.maximum(z, 0.0) + 0.6931471805599453 * log2(1 + e)
            elif TANH:  # x0 - tanh out is 2 x0 doubt(x0 out)
                x = doubt(signed(out, code, c))
                error += 4 * x * x
            else:
                x = out
                if PREDICTION != "x":
                    x = x_hat_of(out, xts[q * K + c].to(tl.float32), alpha, sigma, PREDICTION, False)
                x = signed(x, code, c) - 1
                error += x * x
        valid = inside & (cell >= 0)
        total += tl.where(valid, error, 0.0)
        count += valid.to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count))


@triton.jit
def loss_sum_kernel(sums_ptr, counts_ptr, weight_ptr, loss_ptr, valid_ptr, blocks, N: tl.constexpr):
    """Adds up a sample's blocks: loss (B,) and the number of valid pixels (B,), at least 1, float32."""
    b = tl.program_id(0)
    total, count = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.int32)
    for start in range(0, blocks, N):
        i = start + tl.arange(0, N)
        total += tl.load(sums_ptr + b.to(tl.int64) * blocks + i, mask=i < blocks, other=0.0)
        count += tl.load(counts_ptr + b.to(tl.int64) * blocks + i, mask=i < blocks, other=0)
    valid = tl.maximum(tl.sum(count), 1).to(tl.float32)
    tl.store(loss_ptr + b, tl.load(weight_ptr + b) * tl.sum(total) / valid)
    tl.store(valid_ptr + b, valid)


@triton.jit
def loss_backward_kernel(
    grad_ptr, g_ptr, weight_ptr, valid_ptr,  # (B, K, H, W) to write; (B,) each
    out_ptr, cells_ptr, codes_ptr, xt_ptr, alpha_ptr, sigma_ptr, HW, blocks,
    K: tl.constexpr, TABLE: tl.constexpr, PREDICTION: tl.constexpr, TANH: tl.constexpr, BCE: tl.constexpr,
    LAST: tl.constexpr, V: tl.constexpr, GROUPS: tl.constexpr,
):
    b = tl.program_id(0) // blocks
    base = b.to(tl.int64) * HW
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)  # of V pixels, one a thread
    scale = tl.load(g_ptr + b).to(tl.float32) * tl.load(weight_ptr + b) / tl.load(valid_ptr + b)
    cells = load_rows(cells_ptr + base, group, HW, 1, V, False)
    outs = load_rows(out_ptr + base * K, group, HW, K, V, LAST)
    if PREDICTION != "x":
        xts = load_rows(xt_ptr + base * K, group, HW, K, V, LAST)
        alpha, sigma = tl.load(alpha_ptr + b), tl.load(sigma_ptr + b)
        scale *= -sigma / alpha if PREDICTION == "eps" else -sigma  # the slope of x_hat
    grads = ()
    for q in tl.static_range(V):
        cell = cell_of(cells[q], K)
        code, size = code_of(cell, codes_ptr, group * V + q < HW, K, TABLE), tl.where(cell >= 0, scale, 0.0)
        for c in tl.static_range(K):
            out = outs[q * K + c].to(tl.float32)
            if TANH:  # tanh out - x0 is -2 x0 doubt(x0 out),
                x = doubt(signed(out, code, c))  # 1 - tanh^2 is 4 doubt (1 - doubt)
                grad = signed(size, code, c) * (-2 * x if BCE else -16 * x * x * (1 - x))
            else:
                x = out
                if PREDICTION != "x":
                    x = x_hat_of(out, xts[q * K + c].to(tl.float32), alpha, sigma, PREDICTION, False)
                target = signed(tl.full((GROUPS,), 1.0, tl.float32), code, c)
                grad = tl.where(cell >= 0, 2 * size * (x - target), 0.0)
            grads = grads + (grad,)
    store_rows(grad_ptr + base * K, grads, group, HW, K, V, LAST)


def pixels(out, prediction):
    """Of a thread: as many as 16 bytes hold elements, if its registers hold all their channels, else 4."""
    return 16 // out.element_size() if out.shape[1] <= 8 and prediction == "x" else 4


@operator
def loss_forward(out: Tensor, cells: Tensor, weight: Tensor, prediction: str, tanh: bool, bce: bool,
                 last: bool, xt: Optional[Tensor], alpha: Optional[Tensor], sigma: Optional[Tensor],
                 codes: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """The launcher. out and xt in the layout that `last` says, the rest contiguous -> loss (B,), valid pixels
    (B,)."""
    (B, K, H, W), V = out.shape, pixels(out, prediction)
    blocks = triton.cdiv(H * W, GROUPS * V)
    sums = torch.empty(B * blocks, dtype=torch.float32, device=out.device)
    counts = torch.empty(B * blocks, dtype=torch.int32, device=out.device)
    loss, valid = (torch.empty(B, dtype=torch.float32, device=out.device) for _ in range(2))
    loss_forward_kernel[(B * blocks,)](
        out, cells, cells if codes is None else codes, xt, alpha, sigma, sums, counts, H * W, blocks, K=K,
        TABLE=codes is not None, PREDICTION=prediction, TANH=tanh and prediction == "x", BCE=bce, LAST=last,
        V=V, GROUPS=GROUPS, num_warps=WARPS)
    loss_sum_kernel[(B,)](sums, counts, weight, loss, valid, blocks, N=128, num_warps=1)
    return loss, valid


@operator
def loss_backward(g: Tensor, weight: Tensor, valid: Tensor, out: Tensor, cells: Tensor, prediction: str,
                  tanh: bool, bce: bool, last: bool, xt: Optional[Tensor], alpha: Optional[Tensor],
                  sigma: Optional[Tensor], codes: Optional[Tensor]) -> Tensor:
    (B, K, H, W), V = out.shape, pixels(out, prediction)
    blocks = triton.cdiv(H * W, GROUPS * V)
    grad = torch.empty_like(out)
    loss_backward_kernel[(B * blocks,)](
        grad, g, weight, valid, out, cells, cells if codes is None else codes, xt, alpha, sigma, H * W,
        blocks, K=K,
        TABLE=codes is not None, PREDICTION=prediction, TANH=tanh and prediction == "x", BCE=bce, LAST=last,
        V=V, GROUPS=GROUPS, num_warps=WARPS)
    return grad


@loss_forward.register_fake
def _(out, cells, weight, prediction, tanh, bce, last, xt, alpha, sigma, codes):
    return tuple(torch.empty(len(out), dtype=torch.float32, device=out.device) for _ in range(2))


@loss_backward.register_fake
def _(g, weight, valid, out, cells, prediction, tanh, bce, last, xt, alpha, sigma, codes):
    return torch.empty_like(out)


class Loss(torch.autograd.Function):
    """Arguments as of loss_forward -> (B,)."""

    @staticmethod
    def forward(ctx, out, cells, weight, *rest):
        loss, valid = loss_forward(out, cells, weight, *rest)
        prediction, tanh, bce, last, xt, alpha, sigma, codes = rest
        ctx.save_for_backward(weight, valid, out, cells, xt, alpha, sigma, codes)
        ctx.rest = prediction, tanh, bce, last
        return loss

    @staticmethod
    def backward(ctx, g):
        once()
        weight, valid, out, cells, xt, alpha, sigma, codes = ctx.saved_tensors
        grad = loss_backward(g.contiguous(), weight, valid, out, cells, *ctx.rest, xt, alpha, sigma, codes)
        return grad, *[None] * 10
