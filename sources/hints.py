"""Hints: the bits of a few pixels of a few segments, as input channels of the network.

What it is: `draw_hints`, the clicks, strokes and ellipses of training samples. What it is not: it knows
nothing of noise or networks, and no hints that a user gives (answers/segment.py); bits.hint_bits makes input
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
    n = counts.shape[1]
    per_sample, lot, some, size, spot = u.to(device).split(PARTS, 1)
    hinted, kind, many = per_sample.T

    # 1) which segments: the largest of u^(1 / weight) is a draw without replacement (Efraimidis & Spirakis
    # 2006)
    mine = ((counts > 0).cumsum(1) - 1).clamp(min=0) % lot.shape[1]  # the same in every batch
    key = lot.gather(1, mine).log() / counts.sqrt()
    top = key.masked_fill(counts == 0, -torch.inf).topk(min(SEGMENTS, n), dim=1).indices  # (B, M)
    M, area = top.shape[1], counts.gather(1, top)
    number = ((SEGMENTS + 1) ** many).long().clamp(max=SEGMENTS)
    used = (torch.arange(M, device=device) < number[:, None]) & (area > 0) & (hinted < share)[:, None]

    # 2) where: of a few random pixels of the segment the one whose 7 x 7 neighbourhood has most of the
    # segment
    by_segment, first = index.argsort(dim=1, stable=True), counts.cumsum(1) - counts
    at = (spot.view(B, SEGMENTS, -1)[:, :M] * area[..., None]).long() + first.gather(1, top)[..., None]
    pixel = by_segment.gather(1, at.clamp(max=H * W - 1).view(B, -1))  # (B, M * CLICKS * TRIES)
    around = torch.arange(7, device=device)
    near = (pixel // W * (W + 6) + pixel % W)[..., None] + (around[:, None] * (W + 6) + around).view(-1)
    padded = F.pad(index.view(B, H, W), (3, 3, 3, 3), value=-1).view(B, -1)
    own = index.gather(1, pixel)[..., None]
    pure = (padded.gather(1, near.view(B, -1)).view(near.shape) == own).sum(2).view(B, M, CLICKS, TRIES)
    click = pixel.view(pure.shape).gather(3, pure.argmax(3, keepdim=True))[..., 0]  # (B, M, CLICKS)

    # 3) discs at the clicks and, for strokes, along the line from the first to the second
    stroke, ellipse = kind < STROKES, kind >= 1 - ELLIPSES
    clicks = (some.view(B, SEGMENTS, 1)[:, :M] * CLICKS).long() + 1  # (B, M, 1)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size.view(B, SEGMENTS, CLICKS)[:, :M]
    on = used[..., None] & (torch.arange(CLICKS, device=device) < clicks) & ~stroke[:, None, None]
    y, x = click // W, click % W
    part = torch.linspace(0, 1, POINTS, device=device)
    line = [(v[..., :1] + part * (v[..., 1:2] - v[..., :1])).round().long() for v in (y, x)]  # (B, M, POINTS)
    y, x = (torch.cat([v, w], 2) for v, w in zip((y, x), line))
    radius = torch.cat([radius, radius[..., :1].expand(-1, -1, POINTS)], 2)
    on = torch.cat([on, (used & stroke[:, None])[..., None].expand(-1, -1, POINTS)], 2)
    reach = torch.arange(-int(RADIUS[1]), int(RADIUS[1]) + 1, device=device)
    dy, dx = (v.reshape(-1) for v in torch.meshgrid(reach, reach, indexing="ij"))
    y, x = y[..., None] + dy, x[..., None] + dx  # (B, M, CLICKS + POINTS, 25)
    on = on[..., None] & (dy**2 + dx**2 <= radius[..., None] ** 2) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    to = (y * W + x).clamp(0, H * W - 1).view(B, -1)
    on = on.view(B,
                 -1) & (index.gather(1, to) == top[..., None].expand(-1, -1, to.shape[1] // M).reshape(B, -1))
    mask = torch.zeros(B, H * W + 1, dtype=torch.bool, device=device)  # the last: of those that are not
    mask = mask.scatter_(1, to.where(on, H * W), True)[:, :-1]

    # 4) ellipses: each pixel looks at the bounding box of its segment
    whole = torch.arange(H * W, device=device).expand(B, -1)
    far = torch.zeros(B, H * W, device=device)
    for place, side in ((whole // W, H), (whole % W, W)):
        low = torch.full((B, n + 1), side, device=device).scatter_reduce_(1, index, place, "amin")
        high = torch.zeros_like(low).scatter_reduce_(1, index, place, "amax")
        middle, half = (low + high) / 2, (high - low + 1) / 4
        far += ((place - middle.gather(1, index)) / half.gather(1, index)) ** 2
    chosen = torch.zeros(B, n + 1, dtype=torch.bool, device=device).scatter_(1, top, used).gather(1, index)
    return torch.where(ellipse[:, None], chosen & (far <= 1), mask).view(B, H, W)
