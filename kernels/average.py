"""average: x averaged along rows, then along columns, several times, but not across the edges of an image.

    x (B, K, H, W) float32, keep and share of each direction, of diffusion.edge_aware -> the same shape
y[i] = share[i] * sum over j of x[j] exp(-distance of i and j): two scans, down[i] = x[i] + keep[i] down[i -
1] and up[i] = x[i] + keep[i + 1] up[i + 1]; x[i] counts in both. A program has whole lines of one channel and
makes both scans in registers; a launch is one direction.

Bytes a pixel and launch, K = 6: reads 24 and 8 (keep and share, once for all channels, if the cache holds
them), writes 24.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import operator

ELEMENTS, WARPS = 2048, 4  # of a program. Not swept on a GPU yet


@triton.jit
def chain(keep1, x1, keep2, x2):
    """Two stretches of a scan, one after the other: what is kept through both, and the sum at their end."""
    return keep1 * keep2, x1 * keep2 + x2


@triton.jit
def average_kernel(
    out_ptr, x_ptr, keep_ptr, share_ptr,  # (B, K, H, W) twice; (B, H, W) with a longer line; (B, H, W)
    K, lines, n, line, place,  # n pixels a line; elements between lines, and between a line's pixels
    keep_line, keep_sample, blocks,
    N: tl.constexpr, LINES: tl.constexpr,  # n, up to a power of two
):
    plane = (tl.program_id(0) // blocks).to(tl.int64)  # a channel of a sample
    i = (tl.program_id(0) % blocks * LINES + tl.arange(0, LINES))[:, None]
    j = tl.arange(0, N)[None, :]
    inside = (i < lines) & (j < n)
    at, kept = i * line + j * place, plane // K * keep_sample + i * keep_line + j * place
    x = tl.load(x_ptr + plane * lines * n + at, mask=inside, other=0)
    before = tl.load(keep_ptr + kept, mask=inside, other=0)
    after = tl.load(keep_ptr + kept + place, mask=inside, other=0)
    share = tl.load(share_ptr + plane // K * lines * n + at, mask=inside, other=0)
    down = tl.associative_scan((before, x), 1, chain)[1]
    up = tl.associative_scan((after, x), 1, chain, reverse=True)[1]
    tl.store(out_ptr + plane * lines * n + at, (down + up - x) * share, mask=inside)


@operator
def average(x: Tensor, keep: Tensor, share: Tensor, along_rows: bool) -> Tensor:
    """The launcher, for one direction. x (B, K, H, W), keep (B, H, W + 1) along rows, else (B, H + 1, W),
    share (B, H, W): float32, contiguous."""
    B, K, H, W = x.shape
    lines, n, line, place = (H, W, W, 1) if along_rows else (W, H, 1, W)
    N = triton.next_power_of_2(n)
    many = max(1, min(ELEMENTS // N, triton.next_power_of_2(lines)))
    out, blocks = torch.empty_like(x), triton.cdiv(lines, many)
    average_kernel[(B * K * blocks,)](
        out, x, keep, share, K, lines, n, line, place, W + 1 if along_rows else 1, keep[0].numel(), blocks,
        N=N, LINES=many, num_warps=WARPS)
    return out


@average.register_fake
def _(x, keep, share, along_rows):
    return torch.empty_like(x)
