"""norm: GroupNorm, then SiLU or not, of channels_last activations, forward and backward.

    x (B, C, H, W), weight, bias (C,) -> y = silu(x_hat weight + bias)
with x_hat = (x - mean) rstd, of each group of a sample. A program has a tile of whole pixels, whatever the
groups; PyTorch copies NHWC to NCHW and back around GroupNorm, under autocast in float32.

Bytes an element of s bytes: forward reads 2 s and writes s; backward, which computes all but the statistics
again, reads x and y's gradient twice, 4 s, and writes s. Deterministic: every sum has a fixed order. Safe
where the mean is far from 0: squares are of distances from a tile's mean, and tiles are joined by Chan's
formula.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import doubt, like, once, operator

ELEMENTS, CHANNELS, WARPS = 8192, 512, 8  # of a program, at most. Not swept on a GPU yet


@triton.jit
def tile(HW, C, blocks, P: tl.constexpr, N: tl.constexpr):
    """P pixels, N channels: sample, its start, elements (P, N) from there, channels (1, N), what exists."""
    p = tl.program_id(0) % blocks * P + tl.arange(0, P)[:, None]
    c = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    b = (tl.program_id(0) // blocks).to(tl.int64)
    return b, b * HW * C, p * C + c, c, (p < HW) & (c < C)


@triton.jit
def store_sums(ptr, first, second, C, c):
    """Two numbers of each channel of this tile, (B, blocks, 2, C)."""
    ptr += tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(ptr + c, first, mask=c < C)
    tl.store(ptr + C + c, second, mask=c < C)


@triton.jit
def load_pair(ptr, b, c, C, each):
    """Two numbers of each channel's group, which has `each` channels, (B, 2, groups)."""
    ptr += b * (C // each * 2) + c // each
    return tl.load(ptr, mask=c < C, other=0), tl.load(ptr + C // each, mask=c < C, other=0)


@triton.jit
def norm_moments_kernel(parts_ptr, x_ptr, HW, C, blocks, P: tl.constexpr, N: tl.constexpr):
    """Of each channel of a tile: mean, and sum of the squared distances from it."""
    _, base, e, c, inside = tile(HW, C, blocks, P, N)
    x = tl.load(x_ptr + base + e, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(x, 0, keep_dims=True) / tl.minimum(HW - tl.program_id(0) % blocks * P, P)
    off = tl.where(inside, x - mean, 0.0)
    store_sums(parts_ptr, mean, tl.sum(off * off, 0, keep_dims=True), C, c)


@triton.jit
def norm_statistics_kernel(stats_ptr, parts_ptr, HW, C, blocks, each, eps: tl.float32, P: tl.constexpr,
                           N: tl.constexpr, T: tl.constexpr):
    """mean and rstd of a group, from its channels in T tiles at a time; `each` is at most N."""
    b, g = (tl.program_id(0) // (C // each)).to(tl.int64), tl.program_id(0) % (C // each)
    ptr, c, squares = parts_ptr + b * blocks * 2 * C + g * each, tl.arange(0, N)[None, :], 0.0
    mean = tl.load(ptr)  # of one channel of one tile
    for _ in range(2):  # the second round has distances from the group's mean
        total, squared = tl.zeros((T, N), tl.float32), tl.zeros((T, N), tl.float32)
        for start in range(0, blocks, T):
            i = start + tl.arange(0, T)[:, None]
            inside, pixels = (i < blocks) & (c < each), tl.minimum(HW - i * P, P)
            off = tl.load(ptr + i * 2 * C + c, mask=inside, other=mean) - mean
            total += pixels * off
            squared += tl.load(ptr + i * 2 * C + C + c, mask=inside, other=0) + pixels * off * off
        mean, squares = mean + tl.sum(total) / (HW * each), tl.sum(squared)
    ptr = stats_ptr + b * (C // each * 2) + g
    tl.store(ptr, mean)
    tl.store(ptr + C // each, 1 / tl.sqrt_rn(squares / (HW * each) + eps))


@triton.jit
def normalised(x_ptr, stats_ptr, weight_ptr, bias_ptr, b, base, e, c, inside, C, each):
    """x_hat, weight, x_hat weight + bias, rstd."""
    x = tl.load(x_ptr + base + e, mask=inside, other=0).to(tl.float32)
    mean, rstd = load_pair(stats_ptr, b, c, C, each)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0).to(tl.float32)
    x_hat = (x - mean) * rstd
    return x_hat, weight, x_hat * weight + tl.load(bias_ptr + c, mask=c < C, other=0).to(tl.float32), rstd


@triton.jit
def norm_forward_kernel(y_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, HW, C, blocks, each,
                        SILU: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    b, base, e, c, inside = tile(HW, C, blocks, P, N)
    z = normalised(x_ptr, stats_ptr, weight_ptr, bias_ptr, b, base, e, c, inside, C, each)[2]
    y = z * doubt(-0.5 * z) if SILU else z  # doubt(-z / 2) is sigmoid(z)
    tl.store(y_ptr + base + e, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(out_ptr, g_ptr, means_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, HW, C, blocks,
                         each, SILU: tl.constexpr, SUMS: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """With d the gradient of x_hat weight + bias: of each channel of a tile the sums of d and d x_hat (SUMS);
    or x's gradient, from the means of d weight and d weight x_hat in each group."""
    b, base, e, c, inside = tile(HW, C, blocks, P, N)
    x_hat, weight, z, rstd = normalised(x_ptr, stats_ptr, weight_ptr, bias_ptr, b, base, e, c, inside, C,
                                        each)
    d = tl.load(g_ptr + base + e, mask=inside, other=0).to(tl.float32)
    if SILU:
        s = doubt(-0.5 * z)
        d *= s * (1 + z * (1 - s))
    if SUMS:
        store_sums(out_ptr, tl.sum(d, 0, keep_dims=True), tl.sum(d * x_hat, 0, keep_dims=True), C, c)
    else:
        mean, slope = load_pair(means_ptr, b, c, C, each)
        d = rstd * (d * weight - mean - x_hat * slope)
        tl.store(out_ptr + base + e, d.to(out_ptr.dtype.element_ty), mask=inside)


def tiles(x):
    """(H W, C, tiles of a sample), the grid, the tile, and room for two numbers of each channel of a tile."""
    B, C, H, W = x.shape
    N = min(CHANNELS, triton.next_power_of_2(C))
    P = min(ELEMENTS // N, triton.next_power_of_2(H * W))
    blocks = triton.cdiv(H * W, P)
    return ((H * W, C, blocks), (B * blocks, triton.cdiv(C, N)), dict(P=P, N=N, num_warps=WARPS),
            torch.empty(B, blocks, 2, C, dtype=torch.float32, device=x.device))


@operator
def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                 silu: bool) -> Tuple[Tensor, Tensor]:
    """The launcher. x channels_last, weight and bias contiguous -> y, and mean and rstd, (B, 2, groups)."""
    (sizes, grid, block, parts), each = tiles(x), x.shape[1] // groups
    y, stats, N = torch.empty_like(x), parts.new_empty(len(x), 2, groups), triton.next_power_of_2(each)
    norm_moments_kernel[grid](parts, x, *sizes, **block)
    norm_statistics_kernel[(len(x) * groups,)](stats, parts, *sizes, each, eps, P=block["P"], N=N,
                                               T=max(1, 256 // N), num_warps=1)
    norm_forward_kernel[grid](y, x, stats, weight, bias, *sizes, each, SILU=silu, **block)
    return y, stats


@operator
def norm_backward(g: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor,
                  silu: bool) -> Tuple[Tensor, Tensor]:
    """y's gradient g, channels_last -> x's, and those of bias and weight, (2, C) float32."""
    (sizes, grid, block, parts), groups, dx = tiles(x), stats.shape[2], torch.empty_like(x)
    given = x, stats, weight, bias, *sizes, x.shape[1] // groups
    norm_backward_kernel[grid](parts, g, None, *given, SILU=silu, SUMS=True, **block)
    # (B, 2, C), in float64: the order in which PyTorch adds depends on the number of samples
    sums = parts.sum(1, dtype=torch.float64)
    means = ((sums * weight.double()).unflatten(2, (groups, -1)).mean(3) / sizes[0]).float()
    norm_backward_kernel[grid](dx, g, means, *given, SILU=silu, SUMS=False, **block)
    return dx, sums.sum(0).float()


@norm_forward.register_fake
def _(x, weight, bias, groups, eps, silu):
    return torch.empty_like(x), torch.empty(len(x), 2, groups, dtype=torch.float32, device=x.device)


@norm_backward.register_fake
def _(g, x, stats, weight, bias, silu):
    return torch.empty_like(x), torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        y, stats = norm_forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, stats, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, g):
        once()
        x, stats, weight, bias = ctx.saved_tensors
        dx, (d_bias, d_weight) = norm_backward(like(g, True), x, stats, weight, bias, ctx.silu)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None
