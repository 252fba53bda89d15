"""Label maps to analog bits and back: Gray codes, palettes, the location-aware palette, the three encodings.

What it is: everything between a label map (any integer ids, -1 = ignore) and the channels that the network
denoises.
    labels --locate--> cells of an s x s grid --Codec.encode--> x0 (B, C, H, W) --Codec.decode--> cells
What it is not: it knows nothing of noise, networks or files. It needs torch, numpy and einops only.

Use it alone:
    from bits import Codec
    codec = Codec(bits=6)  # 64 segments, 8 x 8 cells, 2D Gray code
    cells = codec.cells(labels)
    x0 = codec.encode(cells)
    assert (codec.decode(x0) == cells)[cells >= 0].all()

Source: "Towards Agnostic and Holistic Universal Image Segmentation with Bit Diffusion" (NLDL 2026), sections
3.2 and 3.4; analog bits: Chen et al. 2023 (arXiv 2208.04202); the RGB baseline and its decoder: UniGS (CVPR
2024).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

PALETTES = ("similar", "random", "different", "range", "none")
DEFAULT_ACTIVATION = {"bits": "tanh", "onehot": "none", "rgb": "tanh"}  # of an x-predicting network
ACTIVATIONS = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
               "softmax": lambda x: x.softmax(1)}


# ------------------------------------------------------------------------------------------------------------
# Gray code and palettes


def gray(i):
    """Reflected binary Gray code of an integer or of an integer array or tensor."""
    return i ^ (i >> 1)


def palette(side, order="similar", seed=0):
    """Code of each cell of a side x side grid, in raster order: int64 array (side^2,).

    similar: 2D Gray code, horizontal and vertical neighbours differ in one bit (paper, section 3.4);
    different: a greedy walk to the unused code at the largest Hamming distance, laid out in a snake; random:
    a seeded permutation;
    range: the raster index itself.
    """
    n = side * side
    if order in ("similar", "different") and side & (side - 1):
        raise ValueError(f"palette '{order}' needs a grid side that is a power of two, not {side}: use "
                         f"'random'")
    if order == "similar":
        g = gray(np.arange(side))
        return (g[:, None] * side | g[None, :]).reshape(n)  # g(row) << k/2 | g(column)
    if order == "random":
        return np.random.default_rng(seed).permutation(n)
    if order == "range":
        return np.arange(n)
    if order == "different":
        code, unused = [0], np.ones(n, bool)
        unused[0] = False
        for _ in range(n - 1):
            distance = np.where(unused, popcount(np.arange(n) ^ code[-1]), -1)
            code.append(int(distance.argmax()))  # argmax: the first on ties
            unused[code[-1]] = False
        grid = np.array(code).reshape(side, side)
        grid[1::2] = grid[1::2, ::-1]
        return grid.reshape(n)
    raise ValueError(f"palette '{order}' is not one of {', '.join(PALETTES)}")


def finer_bits(few, many):
    """Where the `few` bits of a `similar` palette are among the `many` of a finer one, whose grid has
    2^((many - few) / 2) times as many cells a side: column bits, then row bits, each the high ones."""
    more = (many - few) // 2
    return [b + (more if b < few // 2 else 2 * more) for b in range(few)]


def popcount(i):
    """Number of set bits of non-negative integers below 2^32."""
    return sum((i >> b) & 1 for b in range(32))


# ------------------------------------------------------------------------------------------------------------
# Location-aware palette


def locate(labels, side, hints=None):
    """Location-aware palette: every segment gets the grid cell nearest to its centroid, no two the same one.

    labels (B, H, W), any integer type, -1 = ignore -> cells (B, H, W) int64 in [0, side^2), -1 where ignored.
    Segments choose in ascending label order: the cell that holds the centroid if it is free, else the free
    cell nearest to the centroid, the first in raster order on ties. Beyond side^2 segments the smallest ones
    are merged into the largest. hints (B, H, W) bool: segments with hinted pixels choose before all others,
    by the centroid of these pixels, and are the last to be merged. Raises ValueError for labels that are not
    (B, H, W) integers, and for maps whose distances 64 bits do not hold.
    """
    if labels.dim() == 3 and labels.shape[1] * labels.shape[2] * side >= 2**31.5:
        raise ValueError(f"labels must have below 3.0e9 / {side} pixels a map, not {tuple(labels.shape)}")
    index, counts, rows, cols = segment_sums(labels)
    (B, H, W), K, device = labels.shape, side * side, labels.device
    hinted = ()
    if hints is not None:
        n = counts.shape[1]
        hinted = totals(index.where(hints.reshape(B, -1), n), n, labels.shape)

    if int((counts > 0).sum(1).max()) > K:  # 1) too many: merge the smallest
        rank = counts + H * W * (hinted[0] > 0) if hinted else counts
        by_size = rank.argsort(dim=1, descending=True, stable=True)  # (B, n)
        kept = torch.zeros_like(counts, dtype=torch.bool).scatter_(1, by_size[:, :K], True)
        largest = counts.where(kept, -1).argmax(1, keepdim=True)
        for total in (counts, rows, cols, *hinted):
            spare = torch.where(kept, 0, total).sum(1, keepdim=True)
            total.mul_(kept).scatter_add_(1, largest, spare)
    else:
        largest, kept = None, counts > 0
    kept = kept & (counts > 0)
    key = torch.where(kept, 1, 2)
    if hinted:
        key = torch.where(hinted[0] > 0, 0, key)
        counts, rows, cols = (part.where(hinted[0] > 0, whole) for part,
                              whole in zip(hinted, (counts, rows, cols)))

    # 2) the centroid in grid units, p = (sum / n + 1/2) / H * side - 1/2, kept as the fraction a / 2nH: int64
    # is exact, so that ties are ties, on every device.
    n = counts.clamp(min=1)
    a_row, a_col = (2 * rows + n) * side - n * H, (2 * cols + n) * side - n * W  # (B, n)
    wanted = round_half_even(a_row, 2 * n * H) * side + round_half_even(a_col, 2 * n * W)

    # 3) the segments choose one after the other, all images at once (B, M), ascending labels on ties
    turn = key.argsort(dim=1, stable=True)[:, : max(1, int(kept.sum(1).max()))]
    r, c = torch.arange(K, device=device) // side, torch.arange(K, device=device) % side
    # squared distance to every cell, less |p|^2, times nHW: (B, M, K); none is nearer than a free cell that
    # is wanted
    mine = [v.gather(1, turn)[..., None] for v in (n * (H * W), W * a_row, H * a_col)]
    distance = mine[0] * (r**2 + c**2) - mine[1] * r - mine[2] * c
    distance.scatter_(2, wanted.gather(1, turn)[..., None], torch.iinfo(torch.int64).min)
    taken = torch.zeros(B, K, dtype=torch.bool, device=device)
    chosen = torch.empty_like(turn)
    for j in range(turn.shape[1]):  # absent segments come last, and take what is left
        chosen[:, j] = cell = distance[:, j].masked_fill(taken, torch.iinfo(torch.int64).max).argmin(1)
        taken.scatter_(1, cell[:, None], True)
    cell_of = torch.full_like(wanted, -1).scatter_(1, turn, chosen.masked_fill(~kept.gather(1, turn), -1))
    if largest is not None:
        merged = ~kept & (cell_of < 0)
        cell_of = torch.where(merged, cell_of.gather(1, largest), cell_of)
    return paint(cell_of, index, labels.shape)


def round_half_even(a, b):
    """a / b for integers, b positive and even, rounded to the nearest integer, halves to the even one."""
    up = (a + b // 2) // b
    return up - ((a + b // 2) % b == 0) * (up % 2)


def paint(cells, index, shape):
    """Each pixel's cell, from each segment's: cells (B, n), index (B, H*W) in [0, n], where n stands for
    ignored, -1."""
    return torch.cat([cells, torch.full_like(cells[:, :1], -1)], dim=1).gather(1, index).view(shape)


def segment_sums(labels):
    """Pixel count and sums of the coordinates of every segment.

    (B, H, W) integers -> index (B, H*W) int64 of each pixel's segment, in ascending label order, n where
    ignored; and count, sum of rows, sum of columns, each (B, n) int64, where n covers every label of the
    batch (count 0: absent).
    """
    if labels.dim() != 3 or labels.is_floating_point() or labels.numel() == 0:
        raise ValueError(f"labels must be integers of shape (B, H, W), not {labels.dtype} "
                         f"{tuple(labels.shape)}")
    B, H, W = labels.shape
    flat = labels.reshape(B, H * W).long()
    low, high = (int(v) for v in flat.aminmax())
    if high - low < 4096:  # small ids: no sort needed
        index, n = flat - low, high - low + 1
    else:
        unique, index = flat.unique(return_inverse=True)
        n = len(unique)
    index.masked_fill_(flat == -1, n)
    return index, *totals(index, n, labels.shape)


def segment_counts(labels, below):
    """index and count of `segment_sums` for labels in [-1, below), with n = below: nothing waits for a
    device."""
    flat = labels.flatten(1).long()
    index = torch.where(flat >= 0, flat, below)
    counts = torch.zeros(len(flat), below + 1, dtype=torch.int64, device=flat.device)
    return index, counts.scatter_add_(1, index, torch.ones_like(index))[:, :below]


def totals(index, n, shape):
    """Pixels, sum of rows, sum of columns of segments 0 to n - 1: index (B, H*W) in [0, n] -> each (B, n)."""
    (B, H, W), index = shape, index.view(shape)
    # runs of one segment within a row, of which there are far fewer than pixels
    starts = F.pad(index[:, :, 1:] != index[:, :, :-1], (1, 0), value=True)
    image, row, col = starts.nonzero().unbind(1)
    first = (image * H + row) * W + col
    length = first.diff(append=first.new_full((1,), B * H * W))
    key = index.view(-1)[first] + (n + 1) * image

    def total(weights):  # (B, n); bincount's float64 is exact
        return torch.bincount(key, weights, minlength=B * (n + 1)).view(B, n + 1)[:, :n].long()

    return total(length), total(length * row), total(length * (2 * col + length - 1) // 2)


def random_cells(labels, order, below=None):
    """The `none` palette: segments get cells by their size. labels (B, H, W), -1 = ignore; order (B, classes)
    int64: what the largest segment of each map gets, the second largest, ... -> (B, H, W).

    below: a promise that all labels lie in [-1, below), with which nothing waits for a device.
    """
    index, counts, *_ = segment_counts(labels, below) if below else segment_sums(labels)
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 = the largest segment
    rank = torch.where(rank < order.shape[1], rank, 0)  # too many: into the largest
    return paint(order.gather(1, rank), index, labels.shape)


# ------------------------------------------------------------------------------------------------------------
# Encodings


@dataclass
class Codec:
    """How segments become channels and back: `bits` (the paper's), `onehot` or `rgb` (its baselines).

    bits: an even number from 2 to 10; there are 2^bits classes (rgb has 121, or 125 with palette none).
    Raises ValueError for anything else that is unknown.
    """

    encoding: str = "bits"
    bits: int = 6
    palette: str = "similar"
    seed: int = 0  # of the random palette
    activation: str = ""  # of the network's x-prediction; "" = the encoding's own
    classes: int = field(init=False)
    channels: int = field(init=False)

    def __post_init__(self):
        if self.encoding not in DEFAULT_ACTIVATION:
            raise ValueError(f"encoding '{self.encoding}' is not one of {', '.join(DEFAULT_ACTIVATION)}")
        if self.palette not in PALETTES:
            raise ValueError(f"palette '{self.palette}' is not one of {', '.join(PALETTES)}")
        if self.bits not in (2, 4, 6, 8, 10):
            raise ValueError(f"bits must be 2, 4, 6, 8 or 10 (an even number: the palette is square), not "
                             f"{self.bits}")
        self.activation = self.activation or DEFAULT_ACTIVATION[self.encoding]
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation '{self.activation}' is not one of {', '.join(ACTIVATIONS)}")
        if self.encoding == "rgb" and self.palette == "similar":
            self.palette = "random"  # 11 x 11 colours have no Gray code
        located = self.palette != "none"
        free_rgb = self.encoding == "rgb" and not located
        # of the grid of cells; without a palette of a grid with as many places
        self.side = 12 if free_rgb else 11 if self.encoding == "rgb" else 2 ** (self.bits // 2)
        self.classes = 125 if free_rgb else self.side**2
        code = torch.from_numpy(palette(self.side, self.palette,
                                        self.seed)) if located else torch.arange(self.classes)
        self.cell_of_code = code.argsort()  # the inverse permutation
        if self.encoding == "bits":
            # (K, k), least significant first
            table = 2.0 * (code[:, None] >> torch.arange(self.bits) & 1) - 1
        elif self.encoding == "onehot":
            table = torch.eye(self.classes)[code]  # (K, K)
        else:
            digits = torch.stack([code // 25, code % 25 // 5, code % 5], dim=1)  # (K, 3), base 5
            table = (digits * 64).clamp(max=255) / 127.5 - 1
        self.channels = table.shape[1]
        # each channel is a bit: hints, initial maps and entropy make sense
        self.has_bits = self.encoding == "bits"
        self.clusters = self.encoding == "rgb"  # decode finds clusters of its own, not cells of the palette
        self.table = torch.cat([table, torch.zeros(1, self.channels)])  # the last row: cell -1, ignored

    def cells(self, labels, generator=None, hints=None):
        """labels (B, H, W) -> cells (B, H, W) int64 in [0, classes), -1 = ignore.

        generator: for palette none; hints (B, H, W) bool: for the others, see `locate`.
        """
        if self.palette == "none":
            device = labels.device if generator is None else generator.device
            draws = torch.rand(len(labels), self.classes, generator=generator, device=device)
            return random_cells(labels, draws.argsort(1).to(labels.device))
        return locate(labels, self.side, hints=hints)

    def encode(self, cells):
        """cells (B, H, W) -> x0 (B, C, H, W) float32 in [-1, 1], 0 where ignored (channels_last in
        memory)."""
        rows = torch.where(cells < 0, self.classes, cells)  # the table's last row
        return rearrange(F.embedding(rows, self.table.to(cells.device)), "b h w c -> b c h w")

    def decode(self, x):
        """x (B, C, H, W) -> cells (B, H, W) int64. rgb: cluster numbers, not cells. Raises ValueError."""
        if x.shape[1] != self.channels:
            raise ValueError(f"{self.encoding} has {self.channels} channels, x has {tuple(x.shape)}")
        if self.clusters:
            return torch.stack([dichotomy((v.float() + 1) * 127.5) for v in x])
        if self.encoding == "onehot":
            return self.cell_of_code.to(x.device)[x.argmax(1)]
        code = torch.zeros_like(x[:, 0], dtype=torch.int16)
        for bit in x.unbind(1)[::-1]:
            code.mul_(2).add_(bit > 0)
        return self.cell_of_code.to(x.device).index_select(0, code.int().view(-1)).view(code.shape)

    def activate(self, out):
        """The activation that ends an x-predicting network: out (B, C, H, W) -> the same shape."""
        return ACTIVATIONS[self.activation](out)


def hint_bits(x0, hints):
    """x0 (B, C, H, W) where hints (B, H, W) bool, 0 elsewhere."""
    return x0 * hints[:, None]


def dichotomy(rgb):
    """Progressive dichotomy (UniGS): split the colours of one image by 2-means until every cluster is tight.

    rgb (3, H, W) in 0..255 -> cluster numbers (H, W) int64. The lowest-numbered unfinished cluster is next;
    one is finished below 20 pixels, after 10 splits, or when the mean distance to its mean colour is below
    10.
    """
    pixels = rgb.flatten(1).T  # (N, 3)
    cluster = torch.zeros(len(pixels), dtype=torch.int64, device=rgb.device)
    splits, current = [0], 0
    while current < len(splits):
        member = (cluster == current).nonzero()[:, 0]
        colours = pixels[member]
        spread = (colours - colours.mean(0)).norm(dim=1)
        if len(member) < 20 or splits[current] == 10 or spread.mean() < 10:
            current += 1
            continue
        far = colours[spread.argmax()]  # 2-means from two far colours
        centres = torch.stack([colours[(colours - far).norm(dim=1).argmax()], far])
        for _ in range(20):
            second = torch.cdist(colours, centres).argmin(1) == 1
            moved = torch.stack([colours[~second].mean(0), colours[second].mean(0)])
            if torch.equal(moved, centres):
                break
            centres = moved
        splits[current] += 1
        cluster[member[second]] = len(splits)
        splits.append(splits[current])
    return cluster.view(rgb.shape[1:])


# ------------------------------------------------------------------------------------------------------------
# What soft bits say (paper, Eq. 3). x (B, k, H, W), clamped to [-1, 1]; each bit is right with probability (1
# + |x|)/2.


def confidence(x):
    """Probability of the code that the signs of x decode to: prod_b (1 + |x_b|) / 2, (B, H, W)."""
    return ((1 + x.float().clamp(-1, 1).abs()) / 2).prod(1)


def entropy(x):
    """Entropy of the code at each pixel, in bits (0 to k): the sum of k binary entropies, (B, H, W)."""
    p = (1 + x.float().clamp(-1, 1)) / 2
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(1) / np.log(2)
