"""Jobs: an image in the network's frame, what is known about it, its samples, and closer looks at its parts.

What it is: `prepare` (photo and prompts -> Job) and what a Job lacks or has. Its tiles are not chosen yet
(None, where `auto` may choose among `closer`), none ([]), or Jobs of their own. What it is not: it runs no
network (segment.py).

    from answers.jobs import prepare
    job = prepare(image, model)  # a PIL image in RGB, a Model; segment.denoise adds the samples
"""

import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch

from answers.prompts import checked, network_hints
from bits import hint_bits
from frame import resize_image, shrink

TILES = 16  # at most so many a side
NARROW = 1.75  # a tile's sides are at most about so unlike
LOOKS = 2  # samples of each tile, in turn one of each sample of the whole: more of them bring nothing


@dataclass
class Job:
    """An image in the network's frame of S x S pixels, what is known about it, and its samples so far.

    tiles: the same of overlapping parts of it. Where `closer` has several lists of them, one is chosen once
    its own samples are there.
    """

    image: np.ndarray  # (d S, d S, 3) uint8: as a network of detail d sees it
    photo: np.ndarray  # (h, w, 3) uint8: its valid part, at the label map's resolution
    x_hat: list  # of (C, h, w)
    hints: np.ndarray | None = None  # (H, W), at the image's own size: ids, 0 = none
    boxes: dict | None = None  # {id of hints: (x0, y0, x1, y1)}, in which its segment lies
    # (C, S, S): bits of the hints, 0 elsewhere, for a network that sees hints
    known: torch.Tensor | None = None
    init: torch.Tensor | None = None  # (C, S, S): bits to start from, 0 where there are none
    seed: int = 0  # sample j has the seed `seed` + j
    closer: list = field(default_factory=list)  # of lists of tiles, ever more of them
    tiles: list | None = None  # Jobs; None: not chosen yet
    top: int = 0  # of a tile: where it lies in the photo
    left: int = 0

    @property
    def scene(self):
        """(h, w, 3) uint8: the photo; where there are tiles at their resolution, put together from them."""
        parts = self.tiles or [self]
        h, w = max(job.top + job.size[0] for job in parts), max(job.left + job.size[1] for job in parts)
        out = np.empty((h, w, 3), np.uint8)
        for job in parts:
            out[job.place] = job.photo
        return out

    @property
    def place(self):
        """Of a tile, in the photo: slices."""
        return slice(self.top, self.top + self.size[0]), slice(self.left, self.left + self.size[1])

    def lacks(self, n):
        """Of n samples and of those of the tiles, as far as they are chosen, which are not there yet: [(Job,
        seed)]."""
        wanted = [(self, n), *((tile, min(n, LOOKS)) for tile in self.tiles or [])]
        return [(job, job.seed + j) for job, most in wanted for j in range(len(job.x_hat), most)]

    def first(self, n):
        """The same with its first n samples; without tiles where one has none."""
        each = min((len(tile.x_hat) for tile in self.tiles or []), default=0)
        tiles = [replace(tile, x_hat=tile.x_hat[: min(n, each)]) for tile in self.tiles] if each else []
        return replace(self, x_hat=self.x_hat[:n], tiles=tiles)

    def clear(self):
        """Take all samples away."""
        for job in (self, *(self.tiles or [])):
            job.x_hat.clear()
        self.tiles = None if self.closer else self.tiles

    @property
    def size(self):
        """(h, w) of the label map's valid part."""
        return self.photo.shape[:2]


def tiles_of(given, model=None):
    """Tiles a side: a number from 1 (none) to TILES, or auto; where none is given, 2 if this model's regions
    are joined by learnt odds, else 1. Raises ValueError."""
    if given is None:
        return 2 if model and model.tidy["merge"] else 1
    if given != "auto" and not (str(given).isdecimal() and 1 <= int(given) <= TILES):
        raise ValueError(f"tiles are a number from 1 to {TILES} a side, or auto, not {given!r}")
    return given if given == "auto" else int(given)


def prepare(image, model, hints=None, init=None, seed=0, tiles=None, boxes=None):
    """PIL image -> Job. hints (H, W): ids, pixels of one id belong together, of different ids apart; init (H,
    W): ids to start from; both 0 where not given. tiles: t looks closer at t x t overlapping tiles, besides,
    or as many as `jobs_of` says; "auto": at as many as the size of what is found asks for, up to 4 x 4; None:
    as `tiles_of` has it. boxes: {id of the hints: (x0, y0, x1, y1)}, in which its segment lies
    (prompts.boxes_by_id). Raises ValueError for an image without pixels and for prompts that do not fit."""
    if getattr(image, "mode", "") != "RGB" or 0 in image.size:
        found = (f"{image.width} x {image.height} of mode {image.mode}" if hasattr(image, "mode")
                 else type(image).__name__)
        raise ValueError(f"a PIL image in RGB with at least one pixel is needed, not {found}: "
                         f"formats.read_image gives one, upright, of any file, PIL.Image.fromarray of "
                         f"uint8 (H, W, 3)")
    tiles, hints = tiles_of(tiles, model), checked("hint", hints, image)
    init = checked("initial map", init, image)
    if (hints is not None or init is not None) and not any(v is not None and v.any() for v in (hints, init)):
        raise ValueError("hints and initial map are empty: no pixel has an id above 0")
    (job,) = jobs_of(image, model, hints, init, seed, 1)
    job.hints, job.boxes = hints, boxes
    if tiles == "auto":
        job.closer = [jobs_of(image, model, hints, init, seed, t) for t in (2, 3, 4)]
    else:
        job.tiles = jobs_of(image, model, hints, init, seed, tiles) if tiles > 1 else []
    return job


def jobs_of(image, model, hints, init, seed, t):
    """The parts of a closer look, each overlapping the next by a quarter, as Jobs; their samples have seeds
    of their own. t x t parts; of a panorama more along its length, up to TILES, so that none is narrow, and
    as few as hold it along the other side. t = 1: the whole."""
    S, d = model.image_size, model.detail
    long = t if t == 1 else min(max(t, round(t * max(image.size) / min(image.size) / NARROW)), TILES)
    side = S * (3 * long + 1) // 4  # of the photo, in a tile's pixels
    small, (h, w) = resize_image(image, side)
    seen, _ = resize_image(image, side * d, (w * d, h * d))
    hint = network_hints(hints, h, w) if hints is not None and hints.any() else None
    start = None if init is None else shrink(init, h, w)
    counts = [t if long == t else max(1, math.ceil((4 * n / S - 1) / 3)) for n in (h, w)]
    tall, wide = (min(n, 2 * -(-2 * n // (3 * c + 1))) for n, c in zip((h, w), counts))
    corners = [sorted({round(k) for k in np.linspace(0, n - m, c)})
               for n, m, c in zip((h, w), (tall, wide), counts)]
    out = []
    for k, (y, x) in enumerate(product(*corners), t > 1):

        def part(v, times=1):
            return None if v is None else v[y * times : (y + tall) * times, x * times : (x + wide) * times]

        framed = np.zeros((S * d, S * d, 3), np.uint8)
        framed[: tall * d, : wide * d] = part(seen, d)
        job = Job(framed, part(small), [], seed=seed + k * 2**52, top=y, left=x)
        out.append(prompted(job, model, part(hint), part(start)))
    return out


def prompted(job, model, hint, start):
    """A job with what is known of its (h, w) pixels: hint and start, ids from 1, 0 = none; None: none is
    given. Raises ValueError."""
    codec, (h, w), S = model.codec, job.size, model.image_size
    if start is None and (hint is None or not model.diffusion.hints):
        return job
    if not codec.has_bits:
        raise ValueError(f"initial maps need a checkpoint with the encoding bits, not {codec.encoding}")
    hinting, starting = hint is not None and model.diffusion.hints, start is not None
    hint, start = (np.zeros((h, w), int) if v is None else v for v in (hint, start))
    ids, area = np.unique(hint[hint > 0], return_counts=True)
    # the network sees the largest; the tree (claims.py) sees all
    ids = np.sort(ids[np.argsort(-area, kind="stable")][: codec.classes])
    hint = np.where(np.isin(hint, ids), np.searchsorted(ids, hint) + 1, 0)
    ids, area = np.unique(start[(hint == 0) & (start > 0)], return_counts=True)
    # what has no cell left is not given
    ids = ids[np.argsort(-area, kind="stable")][: codec.classes - hint.max()]
    labels = np.full((S, S), -1)
    labels[:h, :w] = np.where(hint > 0, hint, np.where(np.isin(start, ids), start + hint.max() + 1, -1))
    hinted = torch.zeros(1, S, S, dtype=torch.bool)
    hinted[0, :h, :w] = torch.from_numpy(hint > 0)
    labels = torch.from_numpy(labels)[None]
    x0 = codec.encode(codec.cells(labels, torch.Generator().manual_seed(0), hints=hinted))  # (1, C, S, S)
    job.known = hint_bits(x0, hinted)[0] if hinting else None
    job.init = x0[0] if starting else None
    return job


def packed_job(data, i, seed=0):
    """Image number i of a data set as data.load returns it -> Job."""
    image, _, ((h, w),) = data.get([i])
    return Job(image[0].numpy(), data.photo(i)[:h, :w], [], seed=seed)
