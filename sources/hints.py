"""Hints: the bits of a few pixels of a few segments, as input channels of the network.

What it is: `draw_hints`, the clicks, strokes and ellipses of training samples. What it is not: it knows
nothing of noise or networks, and no hints that a user gives (answers/prompts.py); bits.hint_bits makes input
channels of both.

    # (B, H, W) bool: which pixels are hinted
    mask = draw_hints(labels, torch.rand(len(labels), NUMBERS), share=0.5)
    x0 = codec.encode(codec.cells(labels, hints=mask))  # hinted segments choose their cells first
    channels = hint_bits(x0, mask)  # (B, C, H, W): what is known, else 0
"""

import torch
import torch.nn.functional as F

from bits import segment_counts, segment_sums

SEGMENTS, CLICKS = 20, 3  # most segments a sample, most clicks a segment
TRIES = 4  # pixels that each click is the best of
RADIUS = 0.5, 2.2  # of a click's disc, in pixels
STROKES, ELLIPSES, POINTS = 0.2, 0.1, 64  # shares of the samples with hints; points of a stroke
PARTS = (3, 512, SEGMENTS, SEGMENTS * CLICKS, SEGMENTS * CLICKS * TRIES)
NUMBERS = sum(PARTS)  # uniform numbers a sample


def draw_hints(labels, u, share, below=None):
    """Hinted pixels of training samples: (B, H, W) bool.

    labels (B, H, W) integers, -1 = ignored; u (B, NUMBERS) in [0, 1): each sample's random numbers. With
    probability `share` a sample has hints: of 1 to 20 segments (log-uniform; larger ones are likelier, by the
    root of their area), each 1 to 3 clicks, discs of 0.5 to 2.2 pixels radius that prefer the middle of the
    segment; or strokes from one click to another; or an ellipse of half the size of the segment's bounding
    box. All of it lies inside its segment. below: a promise that labels are in [-1, below); then nothing
    waits for a device.
    """
    (B, H, W), device = labels.shape, labels.device
    index, counts = segment_counts(labels, below) if below else segment_sums(labels)[:2]
    index = index.view(B, H, W)
    per_sample, lot, number, size, spot = u.to(device).split(PARTS, 1)
    hinted, kind, many = per_sample.T
    top = likely_segments(counts, lot)  # (B, M)
    M = top.shape[1]
    most = ((SEGMENTS + 1) ** many).long().clamp(max=SEGMENTS)
    used = (torch.arange(M, device=device) < most[:, None]) & (counts.gather(1, top) > 0)
    used &= (hinted < share)[:, None]

    # discs at the clicks and, for strokes, along the line from the first to the second
    click = middles(index, counts, top, spot)  # (B, M, CLICKS)
    stroke, ellipse = kind < STROKES, kind >= 1 - ELLIPSES
    clicks = (number.view(B, SEGMENTS, 1)[:, :M] * CLICKS).long() + 1  # (B, M, 1)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size.view(B, SEGMENTS, CLICKS)[:, :M]
    on = used[..., None] & (torch.arange(CLICKS, device=device) < clicks) & ~stroke[:, None, None]
    way = torch.linspace(0, 1, POINTS, device=device)
    y, x = (torch.cat([v, (v[..., :1] + way * (v[..., 1:2] - v[..., :1])).round().long()], 2)
            for v in (click // W, click % W))  # (B, M, CLICKS + POINTS)
    radius = torch.cat([radius, radius[..., :1].expand(-1, -1, POINTS)], 2)
    on = torch.cat([on, (used & stroke[:, None])[..., None].expand(-1, -1, POINTS)], 2)

    n = counts.shape[1]
    chosen = torch.zeros(B, n + 1, dtype=torch.bool, device=device).scatter_(1, top, used)
    in_ellipse = in_half_box(index, n) & chosen.gather(1, index.view(B, -1)).view(B, H, W)
    return torch.where(ellipse[:, None, None], in_ellipse, discs(index, top, y, x, radius, on))


def likely_segments(counts, lot):
    """Segments with these numbers of pixels (B, n), drawn without replacement, larger ones likelier: (B, M).

    The largest of u^(1 / weight) is such a draw (Efraimidis & Spirakis 2006). lot (B, 512): the numbers u.
    """
    rank = ((counts > 0).cumsum(1) - 1).clamp(min=0) % lot.shape[1]  # the same in every batch
    key = lot.gather(1, rank).log() / counts.sqrt()
    return key.masked_fill(counts == 0, -torch.inf).topk(min(SEGMENTS, counts.shape[1]), dim=1).indices


def middles(index, counts, top, spot):
    """Pixels of the segments `top`, the best of TRIES random ones each: (B, M, CLICKS), y W + x.

    The best one's 7 x 7 neighbourhood has most of the segment.
    """
    (B, H, W), M = index.shape, top.shape[1]
    by_segment, first = index.view(B, -1).argsort(dim=1, stable=True), counts.cumsum(1) - counts
    at = (spot.view(B, SEGMENTS, -1)[:, :M] * counts.gather(1, top)[..., None]).long()
    at += first.gather(1, top)[..., None]
    pixel = by_segment.gather(1, at.clamp(max=H * W - 1).view(B, -1))  # (B, M * CLICKS * TRIES)
    around = torch.arange(7, device=index.device)
    near = (pixel // W * (W + 6) + pixel % W)[..., None] + (around[:, None] * (W + 6) + around).view(-1)
    padded = F.pad(index, (3, 3, 3, 3), value=-1).view(B, -1)
    segment = index.view(B, -1).gather(1, pixel)[..., None]
    pure = (padded.gather(1, near.view(B, -1)).view(near.shape) == segment).sum(2).view(B, M, CLICKS, TRIES)
    return pixel.view(pure.shape).gather(3, pure.argmax(3, keepdim=True))[..., 0]


def discs(index, top, y, x, radius, on):
    """Pixels of discs that lie in their segments: (B, H, W) bool. y, x, radius, on (B, M, P): of the discs
    in each of the segments `top` (B, M), their middles and which there are."""
    B, H, W = index.shape
    reach = torch.arange(-int(RADIUS[1]), int(RADIUS[1]) + 1, device=index.device)
    dy, dx = (v.reshape(-1) for v in torch.meshgrid(reach, reach, indexing="ij"))
    y, x = y[..., None] + dy, x[..., None] + dx  # (B, M, P, 25)
    on = on[..., None] & (dy**2 + dx**2 <= radius[..., None] ** 2) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    to = (y * W + x).clamp(0, H * W - 1)
    on &= index.view(B, -1).gather(1, to.view(B, -1)).view(to.shape) == top[..., None, None]
    mask = torch.zeros(B, H * W + 1, dtype=torch.bool, device=index.device)  # the last: of those that are not
    mask.scatter_(1, to.where(on, H * W).view(B, -1), True)
    return mask[:, :-1].view(B, H, W)


def in_half_box(index, n):
    """Whether a pixel is in the ellipse of half the size of its segment's bounding box: (B, H, W) bool. index
    (B, H, W): segments in [0, n]."""
    B, H, W = index.shape
    pixel, index = torch.arange(H * W, device=index.device).expand(B, -1), index.view(B, -1)
    far = torch.zeros(B, H * W, device=index.device)
    for place, side in ((pixel // W, H), (pixel % W, W)):
        low = torch.full((B, n + 1), side, device=index.device).scatter_reduce_(1, index, place, "amin")
        high = torch.zeros_like(low).scatter_reduce_(1, index, place, "amax")
        middle, half = (low + high) / 2, (high - low + 1) / 4
        far += ((place - middle.gather(1, index)) / half.gather(1, index)) ** 2
    return (far <= 1).view(B, H, W)
