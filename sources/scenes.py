"""Scenes without end: synthetic shapes, mixtures of data sets, and compositions of pieces of their images.

What it is: data sets as data.py's `load` returns them, with len(), get(positions) and name; every sample is
drawn from its own number alone, the same on every machine. What it is not: it reads no files (formats.py,
packing.py do).

    from sources.scenes import Shapes
    # (4, 64, 64, 3) uint8, (4, 64, 64) int64, (4, 2): height and width
    images, labels, sizes = Shapes("train", 64).get([0, 1, 2, 3])
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
import torch
from PIL import Image, ImageDraw

from frame import coarser
from sources.packing import Packed

# ------------------------------------------------------------------------------------------------------------
# Synthetic scenes: 1 to 8 textured ellipses and polygons over each other, on a textured background.


@dataclass
class Shapes:
    """An endless data set; scene i of a split and seed is always the same. Train and val share no seed."""

    split: str
    size: int  # side of the label maps
    seed: int = 0
    detail: int = 1  # the images' side, as a multiple of `size`
    name = "shapes"
    labels_below = 9  # all ids are below it

    def __len__(self):
        return 2**31

    def get(self, positions, draws=None):
        """Scenes number `positions`: images (B, d S, d S, 3) uint8, labels (B, S, S) int64, sizes (B, 2)."""
        stream = ("train", "val", "test").index(self.split)
        scenes = [draw_scene(np.random.Generator(np.random.Philox(key=[3 * self.seed + stream, int(i)])),
                             self.size * self.detail)
                  for i in positions]
        labels, params, noise = (np.stack(part) for part in zip(*scenes))
        images = torch.from_numpy(paint(labels, params, noise))
        return images, *coarser(torch.from_numpy(labels.astype(np.int64)),
                                torch.full((len(labels), 2), self.size * self.detail), self.detail)

    def photo(self, position):
        """One scene at the label maps' resolution, (S, S, 3) uint8; its noise is another."""
        return replace(self, detail=1).get([position])[0][0].numpy()

    def maps(self, position):
        """All label maps of one scene: (1, S, S)."""
        return self.get([position])[1]


def draw_scene(rng, size, shapes=8):
    """One scene's label map (S, S) uint8, texture parameters (9, 13) and pixel noise (S, S, 3); 2 to 9
    segments."""
    return (draw_shapes(rng, size, shapes), rng.random((shapes + 1, 13), np.float32),
            rng.standard_normal((size, size, 3), np.float32))


def draw_shapes(rng, size, shapes):
    """1 to `shapes` ellipses and polygons over each other: a label map (S, S) uint8, 0 = background."""
    canvas = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(canvas)
    for j in range(1, rng.integers(1, shapes + 1) + 1):
        sides = 48 if rng.random() < 0.5 else int(rng.integers(3, 8))  # 48 corners: an ellipse
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)
        radius = np.ones(sides)
        if sides < 48:  # a star-shaped polygon
            angle = angle + rng.uniform(-0.3, 0.3, sides) * 2 * np.pi / sides
            radius = rng.uniform(0.6, 1.2, sides)
        stretch, turn = rng.uniform(0.5, 1.0), rng.uniform(0, np.pi)
        extent = size * 0.09 * (0.40 / 0.09) ** rng.random()  # log-uniform
        x, y = extent * radius * np.cos(angle), extent * stretch * radius * np.sin(angle)
        cx, cy = rng.uniform(0.05, 0.95, 2) * size
        points = np.stack([cx + x * np.cos(turn) - y * np.sin(turn),
                           cy + x * np.sin(turn) + y * np.cos(turn)], 1)
        pen.polygon([tuple(p) for p in points], fill=j)
    return np.array(canvas)


def paint(labels, params, noise):
    """Textures: each segment has two colours and a pattern between them. (B, S, S) ids -> (B, S, S, 3)
    uint8."""
    B, S = labels.shape[:2]
    angle, freq = params[..., 6] * np.pi, (3 + params[..., 7] * S / 8) * 2 * np.pi  # 3 and more cycles
    contrast = (params[..., 3:6] - 0.5) * 0.6
    at = labels + params.shape[1] * np.arange(B)[:, None, None]

    def of(values):  # of segments -> of their pixels
        return values.reshape(B * params.shape[1], *values.shape[2:]).take(at, 0)

    axis = (np.arange(S, dtype=np.float32) + 0.5) / S
    y, x, cos, sin, freq = axis[:, None], axis[None, :], of(np.cos(angle)), of(np.sin(angle)), of(freq)
    along, across = x * cos + y * sin, y * cos - x * sin
    u, v = (np.sin(freq * way + of(2 * np.pi * phase))
            for way, phase in ((along, params[..., 8]), (across, params[..., 9])))
    # plain, gradient, stripes, checks, dots
    mix = np.choose(of((params[..., 10] * 5).astype(int)),
                    [0.5, along * 0.5 + 0.25, u * 0.5 + 0.5, u * v > 0, u * v * 0.5 + 0.5])
    colour = of(0.08 + 0.84 * params[..., :3]) + of(contrast) * (mix[..., None] - 0.5)
    colour += noise * of(0.08 * params[..., 11:12])
    return (colour.clip(0, 1) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Mixtures: several sets at once, and compositions: segments and textures of their images, pasted over each
# other.


@dataclass
class Mixture:
    """An endless data set: sample i comes from one of the sets, in proportion to their weights, or is a
    composition."""

    sets: list  # Packed or Shapes, all of one size
    weights: list
    seed: int = 0
    compose: float = 0.0  # share of compositions

    def __post_init__(self):
        self.name = "+".join(part.name for part in self.sets)
        self.labels_below = max(part.labels_below for part in self.sets) + 10  # at most, in one label map
        self.shares = np.array(self.weights) / sum(self.weights)
        self.photos = self.shares * [isinstance(part, Packed) for part in self.sets]
        if self.compose and not self.photos.any():
            raise ValueError("compositions need real images: add a data set of files, or leave out --compose")

    def __len__(self):
        return 2**31

    def get(self, positions, draws=None):
        images, labels, sizes = zip(*map(self.sample, positions))
        labels = np.stack(labels).astype(np.int64)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(labels), torch.tensor(np.array(sizes))

    def sample(self, i):
        """Sample number i: image (S, S, 3) uint8, labels (S, S), (h, w). The same on every machine."""
        rng = np.random.Generator(np.random.Philox(key=[2**33 + self.seed, int(i)]))
        chosen = self.sets[rng.choice(len(self.sets), p=self.shares)]
        if rng.random() < self.compose:
            chance = self.photos / self.photos.sum()
            return compose(rng, lambda: self.photo(rng, self.sets[rng.choice(len(self.sets), p=chance)]))
        if isinstance(chosen, Shapes):
            return [part[0].numpy() for part in chosen.get([i])]
        return self.photo(rng, chosen)

    @staticmethod
    def photo(rng, packed):
        return [part[0].numpy() for part in packed.get([int(rng.integers(len(packed)))], rng.random(1))]


def compose(rng, photo, most=8):
    """A scene of real textures: image (S, S, 3) uint8, labels (S, S), (S, S). photo() draws an image, labels
    and (h, w).

    The background is a photo or one of its textures; over it come 1 to `most` pieces: segments cut out of
    photos, or polygons and ellipses filled with a texture. Every piece hides what is below it.
    """
    image, labels, (h, w) = photo()
    S = len(image)
    if rng.random() < 0.5 and h > S // 2 < w:  # a part of a photo, with its own labels
        image, labels = (cut_out(v, 0, 0, h, w, S, S) for v in (image, labels))
    else:
        image, labels = np.ascontiguousarray(texture(rng, image, labels, S)), np.zeros((S, S), np.int64)
    outlines, first = draw_shapes(rng, S, most), labels.max() + 1
    for j in range(1, int(rng.integers(1, most + 1)) + 1):
        source, ids, _ = photo()
        if rng.random() < 0.5:
            mask, fill = outlines == j, texture(rng, source, ids, S)
        else:
            mask, fill = piece(rng, source, ids, S)
        light = (np.arange(256) * rng.uniform(0.75, 1.25)).clip(0, 255).astype(np.uint8)
        at = np.flatnonzero(mask)  # quicker than the mask itself, three times
        image.reshape(-1, 3)[at], labels.reshape(-1)[at] = light[fill.reshape(-1, 3)[at]], first + j
    place = (np.bincount(labels.ravel() + 1) > 0).cumsum() - 1  # of each id, -1 at first, among those there
    return image, np.where(labels < 0, -1, place[labels + 1]), np.array([S, S])


def one_of(rng, labels, min_share=0.01):
    """The mask of one segment, larger ones more likely; of the whole map if it has none of that share."""
    counts = np.bincount(labels.ravel() + 1)[1:]  # quicker than np.unique
    ids = np.flatnonzero(counts >= max(1, min_share * labels.size))
    chance = counts[ids] ** 0.5
    return labels == rng.choice(ids, p=chance / chance.sum()) if len(ids) else labels >= 0


def texture(rng, image, labels, S):
    """A canvas (S, S, 3) filled with the largest square inside one segment, mirrored and repeated."""
    depth = scipy.ndimage.distance_transform_cdt(np.pad(one_of(rng, labels), 1), "chessboard")[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    r = max(1, int(depth[y, x]) - 1)
    square = image[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
    zoom = rng.uniform(0.7, 1.5)
    side = max(4, int(2 * r * zoom))
    there = (np.arange(S) + rng.integers(0, side + 1, 2)[:, None]) % (2 * side)
    there = np.minimum(there, 2 * side - 1 - there)  # mirrored: rows and columns of the square, resized
    return np.rot90(pixels(square, *((there + 0.5) * np.array([square.shape[:2]]).T / side)),
                    int(rng.integers(4)))


def piece(rng, image, labels, S):
    """A segment of the photo, resized, turned over and moved: mask (S, S), fill (S, S, 3)."""
    mask = one_of(rng, labels)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return mask, image
    top, left, h, w = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    zoom = rng.uniform(0.15, 0.7) * S / max(h, w)
    H, W = max(2, round(h * zoom)), max(2, round(w * zoom))
    fill, part = (cut_out(v, top, left, h, w, H, W) for v in (image, mask))
    if rng.random() < 0.5:
        fill, part = fill[:, ::-1], part[:, ::-1]
    full, out = np.zeros((S, S), bool), np.zeros((S, S, 3), np.uint8)
    y, x = int(rng.integers(-H // 3, S - 2 * H // 3)), int(rng.integers(-W // 3, S - 2 * W // 3))
    to = slice(max(0, y), min(S, y + H)), slice(max(0, x), min(S, x + W))
    of = slice(to[0].start - y, to[0].stop - y), slice(to[1].start - x, to[1].stop - x)
    full[to], out[to] = part[of], fill[of]
    return full, out


def cut_out(array, top, left, h, w, H, W):
    """The part (h, w) of an array, resized to (H, W): nearest pixels (maps and photos must move alike)."""
    return pixels(array, top + (np.arange(H) + 0.5) * h / H, left + (np.arange(W) + 0.5) * w / W)


def pixels(array, rows, columns):
    """Those at rows and columns, each an array of numbers, which are rounded down: (rows, columns, ...)."""
    return array.take(rows.astype(int), 0).take(columns.astype(int), 1)  # quicker than both at once
