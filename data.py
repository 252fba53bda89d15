"""Images with label maps: synthetic scenes, folders, COCO, EntitySeg, ADE20K, BSDS500; packing, augmentation, batches.

What it is: `load(name, split, size, ...)` returns a data set with len() and get(positions); `augment` and `normalise`
work on batches on any device. What it is not: it knows nothing of bits, noise or networks.

    data = load("shapes", "train", 64)
    images, labels, sizes = data.get([0, 1, 2, 3])           # (4, 64, 64, 3) uint8, (4, 64, 64) int64, (4, 2) h and w
    image, inside = normalise(images, sizes)                 # (4, 3, 64, 64), (4, 64, 64) bool: where there is image

Label maps hold any ids, -1 = ignore. Images keep their shape: the longer side becomes `size`, placed top-left, the rest
is padding (zero after normalisation, ignored in the labels).

    python data.py coco --download --root data               # fetch COCO into data/coco
    python data.py coco --root data --size 128               # decode and resize it once, into cache/; train.py does so too
    python data.py path/to/folder                            # the same for a folder with images/ and labels/
"""

import argparse
import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from formats import (IGNORE, find_ade20k, find_bsds500, find_coco, find_entity, find_folder, fitted, open_image, read_instances,
                     resize_image, resize_label)

try:
    import fcntl
except ImportError:                                                    # Windows: no lock between processes that pack
    fcntl = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)               # ImageNet
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
VERSION = 2                                                            # of packed data sets
SAVE_EVERY = 5.0                                                       # seconds of packing that a kill can cost


def load(name, split, size, root="data", cache="cache", seed=0, unlabelled="segment", components=False, workers=CORES,
         max_bad=0.01, split_seed=0, compose=0.0, detail=1):
    """The data set `name`: shapes, coco, entity, ade20k, bsds500, or a folder. split: train, val or test.

    Several, with commas between them, are a mixture: "photos:3,streets:components:ignore,shapes:0.5". After the name may
    stand its weight (1), `components` and `ignore` (unlabelled pixels), for this set alone. Of a mixture, only the training
    split is one: val and test are the first set's.

    root: where the set lies, as root/name or itself; cache: where packed copies go; seed: of shapes; unlabelled: whether
    id 0 is a segment or ignored; components: label maps hold classes, whose connected parts are the segments; workers:
    processes that pack; max_bad: share of unusable items from which on packing fails; split_seed: of entity's split;
    compose: share of training samples that are scenes composed of pieces of the images (`compose`). detail: images are for
    label maps of size / detail, and miss no part of these (`fitted`).
    Raises ValueError or OSError with what to do.
    """
    if unlabelled not in ("segment", "ignore"):
        raise ValueError(f"unlabelled is 'segment' or 'ignore', not '{unlabelled}'")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is train, val or test, not '{split}'")
    parts = parse_parts(name)
    sets = [load_one(part, split, size, root, cache, seed, own["unlabelled"] or unlabelled, own["components"] or components,
                     workers, max_bad, split_seed, detail) for part, _, own in (parts if split == "train" else parts[:1])]
    mixed = split == "train" and (len(parts) > 1 or compose)
    return Mixture(sets, [weight for _, weight, _ in parts], seed, compose) if mixed else sets[0]


def load_one(name, split, size, root, cache, seed, unlabelled, components, workers, max_bad, split_seed, detail):
    if name == "shapes":
        return Shapes(split, size, seed)
    files, listing = find(name, split, root, split_seed)
    options = dict(size=size, unlabelled=unlabelled, components=components, split_seed=split_seed, **(dict(detail=detail) if detail > 1 else {}))
    return pack(files, listing, Path(cache), f"{Path(name).resolve().name}-{split}", options, workers, max_bad)


def parse_parts(name):
    """The parts of a mixture, or of one data set, each as of parse_part; a folder of just this name is one set."""
    return [(name, 1.0, dict(components=False, unlabelled=None))] if Path(name).is_dir() else [parse_part(part) for part in name.split(",")]


def parse_part(text):
    """name[:weight][:components][:ignore] -> name, weight, dict(components, unlabelled). Raises ValueError."""
    words, own, weight = text.split(":"), dict(components=False, unlabelled=None), 1.0
    while len(words) > 1:
        if words[-1] == "components":
            own["components"] = True
        elif words[-1] == "ignore":
            own["unlabelled"] = "ignore"
        elif words[-1].replace(".", "", 1).isdigit() and float(words[-1]) > 0:
            weight = float(words[-1])
        else:
            break                                                              # a part of the name: C:\\photos
        words.pop()
    if not words[0]:
        raise ValueError(f"'{text}' is not a data set: of several, each is name[:weight][:components][:ignore]")
    return ":".join(words), weight, own


def find(name, split, root="data", split_seed=0):
    """(files, listing) of a data set of files; listing() gives its items. Raises ValueError or OSError with what to do."""
    formats = dict(coco=find_coco, entity=functools.partial(find_entity, seed=split_seed), ade20k=find_ade20k,
                   bsds500=find_bsds500)
    if name not in formats:
        if not Path(name).is_dir():
            raise ValueError(f"data set '{name}' is neither shapes, nor coco, nor a folder with images/ and labels/, nor "
                             f"{', '.join(formats)}")
        return find_folder(Path(name), split)
    try:
        return formats[name](Path(root) / name, split)
    except FileNotFoundError as missing:
        try:
            return formats[name](Path(root), split)
        except FileNotFoundError:
            raise missing from None


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic scenes: 1 to 8 textured ellipses and polygons over each other, on a textured background.


@dataclass
class Shapes:
    """An endless data set; scene i of a split and seed is always the same. Train and val share no seed."""

    split: str
    size: int
    seed: int = 0
    name = "shapes"
    segments = 9                                 # at most, in one label map

    def __len__(self):
        return 2**31

    def get(self, positions, draws=None):
        """Scenes number `positions`: images (B, S, S, 3) uint8, labels (B, S, S) int64, sizes (B, 2)."""
        stream = ("train", "val", "test").index(self.split)
        scenes = [draw_scene(np.random.Generator(np.random.Philox(key=[3 * self.seed + stream, int(i)])), self.size)
                  for i in positions]
        labels, params, noise = (np.stack(part) for part in zip(*scenes))
        images = torch.from_numpy(paint(labels, params, noise))
        return images, torch.from_numpy(labels.astype(np.int64)), torch.full((len(labels), 2), self.size)

    def maps(self, position):
        """All label maps of one scene: (1, S, S)."""
        return self.get([position])[1]


def draw_scene(rng, size, shapes=8):
    """One scene's label map (S, S) uint8, texture parameters (9, 13) and pixel noise (S, S, 3); 2 to 9 segments."""
    canvas = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(canvas)
    for j in range(1, rng.integers(1, shapes + 1) + 1):
        sides = 48 if rng.random() < 0.5 else int(rng.integers(3, 8))          # 48 corners: an ellipse
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)
        radius = np.ones(sides)
        if sides < 48:                                                         # a star-shaped polygon
            angle, radius = angle + rng.uniform(-0.3, 0.3, sides) * 2 * np.pi / sides, rng.uniform(0.6, 1.2, sides)
        stretch, turn = rng.uniform(0.5, 1.0), rng.uniform(0, np.pi)
        extent = size * 0.09 * (0.40 / 0.09) ** rng.random()                   # log-uniform
        x, y = extent * radius * np.cos(angle), extent * stretch * radius * np.sin(angle)
        cx, cy = rng.uniform(0.05, 0.95, 2) * size
        points = np.stack([cx + x * np.cos(turn) - y * np.sin(turn), cy + x * np.sin(turn) + y * np.cos(turn)], 1)
        pen.polygon([tuple(p) for p in points], fill=j)
    labels = np.array(canvas)
    return labels, rng.random((shapes + 1, 13), np.float32), rng.standard_normal((size, size, 3), np.float32)


def paint(labels, params, noise):
    """Textures: each segment has two colours and a pattern between them. (B, S, S) ids -> (B, S, S, 3) uint8."""
    S = labels.shape[1]
    p = np.take_along_axis(params, labels.reshape(len(labels), -1, 1).astype(int), 1).reshape(*labels.shape, -1)
    axis = (np.arange(S, dtype=np.float32) + 0.5) / S
    y, x = axis[:, None], axis[None, :]
    angle, freq = p[..., 6] * np.pi, (3 + p[..., 7] * S / 8) * 2 * np.pi           # 3 and more cycles over the image
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = x * cos + y * sin, y * cos - x * sin
    u, v = np.sin(freq * along + 2 * np.pi * p[..., 8]), np.sin(freq * across + 2 * np.pi * p[..., 9])
    kind = (p[..., 10] * 5).astype(int)
    mix = np.choose(kind, [0.5, along * 0.5 + 0.25, u * 0.5 + 0.5, u * v > 0, u * v * 0.5 + 0.5])    # plain, gradient,
    contrast = (p[..., 3:6] - 0.5) * 0.6                                           # stripes, checks, dots
    colour = 0.08 + 0.84 * p[..., :3] + contrast * (mix[..., None] - 0.5) + noise * (0.08 * p[..., 11:12])
    return (colour.clip(0, 1) * 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures: several sets at once, and compositions: segments and textures of their images, pasted over each other.


@dataclass
class Mixture:
    """An endless data set: sample i comes from one of the sets, in proportion to their weights, or is a composition."""

    sets: list                                   # Packed or Shapes, all of one size
    weights: list
    seed: int = 0
    compose: float = 0.0                         # share of compositions

    def __post_init__(self):
        self.name = "+".join(one.name for one in self.sets)
        self.segments = max(one.segments for one in self.sets) + 10                # at most, in one label map
        self.shares = np.array(self.weights) / sum(self.weights)
        self.photos = self.shares * [isinstance(one, Packed) for one in self.sets]
        if self.compose and not self.photos.any():
            raise ValueError("compositions need real images: add a data set of files, or leave out --compose")

    def __len__(self):
        return 2**31

    def get(self, positions, draws=None):
        images, labels, sizes = zip(*map(self.one, positions))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).astype(np.int64)), torch.tensor(np.array(sizes))

    def one(self, i):
        """Sample number i: image (S, S, 3) uint8, labels (S, S), (h, w). The same on every machine."""
        rng = np.random.Generator(np.random.Philox(key=[2**33 + self.seed, int(i)]))
        chosen = self.sets[rng.choice(len(self.sets), p=self.shares)]
        if rng.random() < self.compose:
            return compose(rng, lambda: self.photo(rng, self.sets[rng.choice(len(self.sets), p=self.photos / self.photos.sum())]))
        if isinstance(chosen, Shapes):
            return [part[0].numpy() for part in chosen.get([i])]
        return self.photo(rng, chosen)

    @staticmethod
    def photo(rng, packed):
        return [part[0].numpy() for part in packed.get([int(rng.integers(len(packed)))], rng.random(1))]


def compose(rng, photo, most=8):
    """A scene of real textures: image (S, S, 3) uint8, labels (S, S), (S, S). photo() draws an image, labels and (h, w).

    The background is a photo or one of its textures; over it come 1 to `most` pieces: segments cut out of photos, or
    polygons and ellipses filled with a texture. Every piece hides what is below it.
    """
    image, labels, (h, w) = photo()
    S = len(image)
    if rng.random() < 0.5 and h > S // 2 < w:                                      # a part of a photo, with its own labels
        image, labels = (cut_out(v, 0, 0, h, w, S, S) for v in (image, labels))
    else:
        image, labels = texture(rng, image, labels, S), np.zeros((S, S), np.int64)
    outlines = draw_scene(rng, S, most)[0]
    for j in range(1, int(rng.integers(1, most + 1)) + 1):
        source, ids, _ = photo()
        if rng.random() < 0.5:
            mask, fill = outlines == j, texture(rng, source, ids, S)
        else:
            mask, fill = piece(rng, source, ids, S)
        light = rng.uniform(0.75, 1.25)
        image = np.where(mask[..., None], (fill * light).clip(0, 255).astype(np.uint8), image)
        labels = np.where(mask, 100_000 + j, labels)
    return image, np.where(labels < 0, -1, np.unique(labels, return_inverse=True)[1].reshape(S, S)), np.array([S, S])


def one_of(rng, labels, least=0.01):
    """The mask of one segment, larger ones more likely; of the whole map if it has none of that share."""
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    ids, counts = ids[counts >= least * labels.size], counts[counts >= least * labels.size]
    return labels == rng.choice(ids, p=counts**0.5 / (counts**0.5).sum()) if len(ids) else labels >= 0


def texture(rng, image, labels, S):
    """A canvas (S, S, 3) filled with the largest square inside one segment, mirrored and repeated."""
    depth = scipy.ndimage.distance_transform_cdt(np.pad(one_of(rng, labels), 1), "chessboard")[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    r = max(1, int(depth[y, x]) - 1)
    square = image[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1]
    zoom = rng.uniform(0.7, 1.5)
    side = max(4, int(2 * r * zoom))
    square = cut_out(square, 0, 0, *square.shape[:2], side, side)
    canvas = np.pad(square, [(0, S), (0, S), (0, 0)], mode="symmetric")
    y, x = rng.integers(0, side + 1, 2)
    return np.rot90(canvas[y : y + S, x : x + S], int(rng.integers(4)))


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
    rows = (top + (np.arange(H) + 0.5) * h / H).astype(int)
    columns = (left + (np.arange(W) + 0.5) * w / W).astype(int)
    return array[rows[:, None], columns]


# ---------------------------------------------------------------------------------------------------------------------
# Packing: every item decoded and resized once, and appended to two files that are mapped, not read, afterwards.


@dataclass
class Packed:
    """A data set in memory-mapped arrays. get(positions, draws) picks label map floor(draw * count) of several."""

    name: str
    images: np.ndarray                           # (N, S, S, 3) uint8
    labels: np.ndarray                           # (M, S, S) uint16, IGNORE = 65535
    first: np.ndarray                            # (N + 1,): the label maps of image i are first[i] to first[i + 1]
    sizes: np.ndarray                            # (N, 2): h, w of the valid part
    names: list                                  # N file stems
    folder: Path                                 # where the arrays lie
    segments: int                                # most in one label map: all ids are below it
    mapped = 0                                   # bytes touched since the pages were last let go

    def __len__(self):
        return len(self.images)

    def get(self, positions, draws=None):
        """positions (B,) modulo len; draws (B,) in [0, 1): images (B, S, S, 3) uint8, labels (B, S, S) int64, sizes."""
        i = np.asarray(positions) % len(self)
        pick = self.first[i] + ((draws if draws is not None else 0) * (self.first[i + 1] - self.first[i])).astype(int)
        images, labels = torch.from_numpy(self.images[i]), unpack(self.labels[pick])
        self.let_go(images.numel() + 2 * labels.numel())
        return images, labels, torch.from_numpy(self.sizes[i]).long()

    def maps(self, i):
        """All label maps of image i: (annotators, S, S) int64."""
        i %= len(self)
        return unpack(self.labels[self.first[i] : self.first[i + 1]])

    def let_go(self, size, limit=2**28):
        """Unmap the pages now and then (they stay in the system's cache), so that resident memory does not grow."""
        self.mapped += size
        if self.mapped > limit and hasattr(mmap, "MADV_DONTNEED"):
            for array in (self.images, self.labels):
                if getattr(array, "_mmap", None) is not None:
                    array._mmap.madvise(mmap.MADV_DONTNEED)
            self.mapped = 0


def unpack(labels):
    return torch.from_numpy(np.where(labels == IGNORE, -1, labels.astype(np.int64)))   # numpy: no second team of threads


def connected(label):
    """Classes -> segments: the 4-connected parts of each class, numbered from 1. 0 (unlabelled) and -1 stay."""
    H, W = label.shape
    links = np.zeros((2 * H - 1, 2 * W - 1), bool)                                 # pixels, and links between equal ones
    links[::2, ::2] = True
    links[::2, 1::2] = label[:, 1:] == label[:, :-1]
    links[1::2, ::2] = label[1:] == label[:-1]
    return np.where(label > 0, scipy.ndimage.label(links)[0][::2, ::2], label)


DONE, EMPTY, BAD = range(3)


def convert(item, size, unlabelled, components, detail=1):
    """One item -> (DONE, image (S, S, 3) uint8, (h, w), label maps (n, S, S) uint16), or (EMPTY or BAD, reason)."""
    if item.read is None:
        return BAD, item.arg
    try:
        image, (W, H) = open_image(item.image, size)
        if item.read is read_instances and item.arg[:2] != (H, W):                 # before masks of a wrong size are drawn
            raise ValueError(f"{item.image} is {W} x {H} pixels, but {item.arg[1]} x {item.arg[0]} in {item.labels[0]}")
        labels = []
        for path, label in zip(item.labels, item.read(item), strict=True):
            if label.shape != (H, W):
                raise ValueError(f"{path} is {label.shape[1]} x {label.shape[0]} pixels, its image {item.image} {W} x {H}: "
                                 f"they must agree")
            label = connected(label) if components else label
            labels.append(resize_label(np.where(label == 0, -1, label) if unlabelled == "ignore" else label, size))
        labels = np.stack(labels)
    except (ValueError, OSError, MemoryError) as e:
        return BAD, str(e) or f"{item.image}: {type(e).__name__}"
    if (labels == IGNORE).all():
        return EMPTY, f"{item.labels[0]}: nothing labelled in {item.image}"
    return DONE, *resize_image(image, size, fitted(W, H, size, detail)), labels


def pack(files, listing, cache, name, options, workers, max_bad):
    """The packed copy of these files with these options: made if it is not there, mapped if it is."""
    home = os.path.commonpath([path for path, _, _ in files]) if files else ""
    print_of = json.dumps([(os.path.relpath(path, home), *rest) for path, *rest in files])
    fingerprint = hashlib.sha256(print_of.encode()).hexdigest()[:16]
    key = hashlib.sha256(json.dumps([VERSION, fingerprint, options]).encode()).hexdigest()[:8]
    target = cache / f"{name}-{options['size']}-{key}"
    if not whole(target):
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{target}.lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)                                   # another process may be packing the same
            if not whole(target):
                shutil.rmtree(target, ignore_errors=True)                          # cut off from outside
                prepare(target, listing(), name, options, fingerprint, workers, max_bad)
        Path(f"{target}.lock").unlink(missing_ok=True)
    index = json.loads((target / "index.json").read_text())
    if index["bad"] > max_bad * (index["bad"] + index["images"]):
        raise too_bad(target, index["bad"], index["bad"] + index["images"], max_bad, index["example"])
    rows, S = np.load(target / "rows.npy"), options["size"]                        # (N, 5), see prepare
    images = np.memmap(target / "images.u8", np.uint8, "r", shape=(len(rows), S, S, 3))
    labels = np.memmap(target / "labels.u16", np.uint16, "r", shape=(index["label_maps"], S, S))
    return Packed(name, images, labels, np.concatenate([[0], rows[:, 3].cumsum()]), rows[:, 1:3],
                  (target / "names.txt").read_text().splitlines(), target, index["segments"])


def whole(folder):
    """Whether a packed copy is complete: the index is written last, and says how long the files are."""
    try:
        index = json.loads((folder / "index.json").read_text())
        return all((folder / file).stat().st_size == size for file, size in index["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def too_bad(folder, bad, total, max_bad, example):
    return ValueError(f"{example} ({bad} of {total} items cannot be used, more than --max_bad {max_bad:g} allows; "
                      f"{folder / 'skipped.txt'} lists them)")


def prepare(target, items, name, options, fingerprint, workers, max_bad):
    """Pack items into target.part, going on from what an earlier call left there, and rename it when it is complete."""
    part, S = target.with_name(target.name + ".part"), options["size"]
    part.mkdir(exist_ok=True)
    rows = np.load(part / "rows.npy").tolist() if (part / "rows.npy").exists() else []     # item, h, w, maps, segments
    if any(not (part / file).exists() or (part / file).stat().st_size < length
           for file, length in zip(("images.u8", "labels.u16"), lengths(rows, S))):
        rows = []                                                                  # cut off from outside
    todo = sorted(set(range(len(items))) - {row[0] for row in rows})
    need, there = 3 * S * S * len(items) + 2 * S * S * sum(len(item.labels) for item in items), lengths(rows, S)
    full = OSError(f"{name} needs {need / 1e9:.2f} GB in {target.parent} when packed, and the disk is full; what was "
                   f"written is kept: free some space, or give another --cache, and run the same command again")
    if shutil.disk_usage(part).free < need - sum(there):
        raise full
    reasons, started, saved, already = {EMPTY: [], BAD: []}, time.monotonic(), time.monotonic(), len(rows)
    task = functools.partial(convert, size=S, unlabelled=options["unlabelled"], components=options["components"],
                             detail=options.get("detail", 1))
    workers = max(1, min(workers, len(todo) // 16))
    pool = None
    with open(part / "images.u8", "ab", 0) as images, open(part / "labels.u16", "ab", 0) as labels:
        def truncate():
            """Cut off what no row tells of."""
            for file, length in zip((images, labels), lengths(rows, S)):
                file.truncate(length)

        def commit():
            """Only rows whose pixels are surely on the disk count as done."""
            os.fsync(images.fileno())
            os.fsync(labels.fileno())
            with open(part / "rows.tmp", "wb") as f:
                np.save(f, np.array(rows, np.int64).reshape(-1, 5))
                f.flush()
                os.fsync(f.fileno())
            os.replace(part / "rows.tmp", part / "rows.npy")

        truncate()
        try:
            if workers > 1:                                                        # not threads: no lock limits them
                context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
                pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
                results = pool.map(task, [items[i] for i in todo], chunksize=8)
            else:
                results = map(task, (items[i] for i in todo))
            bar = tqdm(results, f"packing {name}", len(items), initial=len(rows), unit="image", leave=False)
            for i, (outcome, *result) in zip(todo, bar):
                if outcome != DONE:
                    reasons[outcome].append(result[0])
                    continue
                image, (h, w), segmentations = result
                append(images, image)
                append(labels, segmentations)
                rows.append([i, h, w, len(segmentations), 1 + int(segmentations[segmentations != IGNORE].max())])
                if time.monotonic() - saved > SAVE_EVERY:
                    commit()
                    saved = time.monotonic()
            commit()
        except BrokenProcessPool:
            raise OSError(f"a process that packed {name} was killed, perhaps for lack of memory: run again with fewer "
                          f"--workers; what was written is kept") from None
        except OSError as e:
            raise full if e.errno == errno.ENOSPC else e from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
            while True:
                try:
                    commit()
                    break
                except OSError as e:
                    if e.errno != errno.ENOSPC or not rows:
                        break
                    del rows[-1 - len(rows) // 20 :]                               # makes room for the list of the others
                    truncate()
    skipped = reasons[BAD] + reasons[EMPTY]
    (part / "skipped.txt").write_text("".join(reason.replace("\n", " ") + "\n" for reason in skipped))
    if len(reasons[BAD]) > max_bad * len(items):
        raise too_bad(part, len(reasons[BAD]), len(items), max_bad, reasons[BAD][0])
    if not rows:
        raise ValueError(f"{name} holds no image that can be used" + (f": {skipped[0]}" if skipped else ""))
    (part / "names.txt").write_text("".join(Path(items[row[0]].image).stem + "\n" for row in rows))
    sizes = {file: (part / file).stat().st_size for file in ("images.u8", "labels.u16", "rows.npy", "names.txt")}
    index = dict(version=VERSION, name=name, options=options, fingerprint=fingerprint, images=len(rows), bytes=sizes,
                 label_maps=sum(row[3] for row in rows), segments=max(row[4] for row in rows), bad=len(reasons[BAD]),
                 empty=len(reasons[EMPTY]), example=reasons[BAD][0] if reasons[BAD] else "")
    (part / "index.json").write_text(json.dumps(index, indent=1))
    os.replace(part, target)
    spent = time.monotonic() - started
    new = len(rows) - already
    print(f"packed {name}: {len(rows):,} images into {target} ({sum(sizes.values()) / 1e9:.2f} GB), {new:,} of them now in "
          f"{spent:.1f} s = {new / spent:.0f} a second with {workers} process{'es' * (workers > 1)}; {len(reasons[BAD])} skipped "
          f"as bad, {len(reasons[EMPTY])} without labels" + f" ({target / 'skipped.txt'})" * bool(skipped))


def lengths(rows, S):
    """Bytes of the images and of the label maps of these rows."""
    return 3 * S * S * len(rows), 2 * S * S * sum(row[3] for row in rows)


def append(file, array):
    """Write all of an array, or raise: an unbuffered write may stop halfway."""
    rest = memoryview(np.ascontiguousarray(array)).cast("B")
    while rest:
        rest = rest[file.write(rest):]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def order(start, count, n, seed, rank=0, ranks=1):
    """Sample numbers `start` to `start + count` of an endless run over n items, shuffled anew in every epoch.

    Of several ranks, each gets every ranks-th sample: no two the same one.
    """
    at = np.arange(start + rank, start + count, ranks)
    if n >= 2**31:
        return at
    return np.concatenate([shuffled(n, seed, int(e))[at[at // n == e] % n] for e in np.unique(at // n)])


@functools.lru_cache(4)
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def uniforms(start, count, seed, n=16, rank=0, ranks=1):
    """n uniform numbers for each of the samples `start` to `start + count`, from a seed each: (count, n) float32."""
    return np.stack([np.random.Generator(np.random.Philox(key=[2**32 + seed, i])).random(n, np.float32)
                     for i in range(start + rank, start + count, ranks)])


def batches(data, start, count, seed, workers=1, rank=0, ranks=1, pin=False):
    """Endless batches of `count` samples (over all ranks), from sample number `start` on: images, labels, sizes, u.

    u (B, 20): the samples' uniform numbers, for `augment`. Batches depend on start, count, seed and rank alone, not on
    the number of workers: threads that read ahead (0: none). pin: in page-locked memory, for CUDA.
    """
    if count % ranks:
        raise ValueError(f"a batch of {count} samples cannot be shared by {ranks} processes equally")

    def make(start):
        u = uniforms(start, count, seed, 21, rank, ranks)
        batch = *data.get(order(start, count, len(data), seed, rank, ranks), u[:, 19]), torch.from_numpy(np.delete(u, 19, axis=1))
        return tuple(part.pin_memory() for part in batch) if pin else batch

    pool = ThreadPoolExecutor(max(1, workers))
    ahead = deque()
    try:
        while True:
            while len(ahead) < workers + 1 and workers:
                ahead.append(pool.submit(make, start + len(ahead) * count))
            yield ahead.popleft().result() if workers else make(start)
            start += count
    finally:
        pool.shutdown(cancel_futures=True)


def inside_mask(sizes, size):
    """(B, 2) h, w -> (B, S, S) bool."""
    axis = torch.arange(size, device=sizes.device)
    return (axis[:, None] < sizes[:, 0, None, None]) & (axis < sizes[:, 1, None, None])


def normalise(images, sizes, detail=1):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, ImageNet mean and deviation, 0 outside; and inside (B, S, S).

    With detail d: images (B, d S, d S, 3) beside label maps of S x S, whose sizes (B, 2) are -> (B, 3 d^2, S, S).
    """
    x = images.permute(0, 3, 1, 2).contiguous().float() / 255
    return standardise(x, inside_mask(sizes, images.shape[1] // detail), detail)


def standardise(x, inside, detail=1):
    x = F.pixel_unshuffle(x, detail)                                               # (B, 3 d^2, S, S)
    for channel, mean, std in zip(x.unflatten(1, (3, -1)).unbind(1), MEAN, STD):   # in place; no tensor made on the host
        channel.sub_(mean).div_(std)
    return x.mul_(inside[:, None].float()), inside


def coarser(labels, sizes, detail):
    """Label maps (..., d S, d S) and sizes (..., 2) at the side S: every d-th pixel of both axes."""
    return labels[..., detail // 2 :: detail, detail // 2 :: detail], (sizes + detail // 2) // detail


def packed_side(size, crop, detail=1):
    """Side of packed images, for random crops that keep at least the share `crop` of it: midway between both scales.

    With a detail above 1 at least the side that the network sees, and no more than that needs: crops are blurred then.
    """
    return max(size * detail, round(size / crop**0.5))


def augment(images, labels, sizes, u, size=None, crop=1.0, jitter=1.0, detail=1):
    """The paper's augmentation, each sample by its own uniform numbers u (B, 16), on the images' device.

    Horizontal flip (p 0.5); gamma, brightness and contrast, hue/saturation/value (p 0.3 each, times `jitter`); RGB shift
    (p 0.1, times `jitter`); rotation within +-20 degrees (p 0.3). Beyond the paper, with crop < 1 and u (B, 20): a random
    part of at least the share `crop` of the sides, stretched by up to 2^(1/4) one way and squeezed as much the other.
    size: side of the result, the images' own by default. Returns what `normalise` does, and the labels; new pixels are
    outside and -1. With detail d, the labels have the side `size`, the images d times as many pixels, folded.
    """
    B, T = images.shape[:2]
    S, device = size or T // detail, images.device
    if B > 8 and device.type == "cpu":                                             # pieces that fit the processor's cache
        pieces = zip(*(v.split(8) for v in (images, labels, sizes, u)))
        return tuple(torch.cat(v) for v in zip(*(augment(*piece, size, crop, jitter, detail) for piece in pieces)))
    u = u.to(device, non_blocking=True).T                                          # (16 or 20, B)
    on = [u[i] < p for i, p in enumerate((0.5, *(jitter * p for p in (0.3, 0.3, 0.3, 0.1)), 0.3))]
    r = 2 * u[6:16] - 1                                                            # (10, B) in [-1, 1]

    def when(i, amount, neutral=0.0):                                              # (B,)
        return torch.where(on[i], amount, neutral)

    # colours: a power, then brightness, contrast, hue, saturation, value and shift as one affine map. A turn of the hue is
    # a rotation about the grey axis, whose matrix is circulant: rows (a, b, c), (c, a, b), (b, c, a)
    gamma, contrast, brightness = when(1, 2 ** (0.5 * r[0]), 1.0), when(2, 1 + 0.2 * r[1], 1.0), when(2, 0.2 * r[2])
    turn, chroma, value = when(3, 0.35 * r[3]), when(3, 1 + 0.3 * r[4], 1.0), when(3, 1 + 0.15 * r[5], 1.0)
    near, across = chroma * turn.cos() / 3, chroma * turn.sin() / 3**0.5
    a, b, c = (value * v for v in (1 / 3 + 2 * near, 1 / 3 - near - across, 1 / 3 - near + across))
    matrix = contrast * torch.stack([a, b, c, c, a, b, b, c, a])                   # (9, B)
    offset = value * (0.5 - 0.5 * contrast + brightness) + when(4, 0.08 * r[6:9])  # (3, B)
    powers = (torch.arange(256, device=device) / 255) ** gamma[:, None]            # (B, 256): a table spares a power a pixel
    x = powers.gather(1, images.permute(0, 3, 1, 2).reshape(B, -1).long())
    x = torch.baddbmm(offset.T[..., None], matrix.T.reshape(B, 3, 3), x.view(B, 3, -1)).clamp_(0, 1).view(B, 3, T, T)

    # flip, rotation and crop about the middle of the valid part, as one map from new to old pixels
    old = sizes.to(device, non_blocking=True).T.float()                                               # (2, B): h, w
    new = old if S == T else (old * (S / T)).round().clamp(1, S)
    cos, sin = (f(when(5, r[9] * torch.pi / 9)) for f in (torch.cos, torch.sin))
    fine, side = new * detail, S * detail                                          # the image's
    middle, scale = (old - 1) / 2, old / fine
    if crop < 1:
        stretch = 2 ** (0.5 * u[19] - 0.25)                                        # (B,); as shares of both sides: (2, B)
        zoom = ((1 - (1 - crop) * u[16]) * torch.stack([stretch, 1 / stretch])).clamp(crop, 1)
        middle, scale = middle + (1 - zoom) * old * (u[17:19] - 0.5), scale * zoom
    axis = torch.arange(side, device=device)
    dy, dx = (axis - (n[:, None] - 1) / 2 for n in fine)                           # (B, d S)
    sy, sx = scale[0], scale[1] * when(0, -1.0, 1.0)
    far = [torch.where(axis < n[:, None], 0.0, 1e6) for n in fine]                 # beyond the valid part: from nowhere
    row_y, row_x = (sy * cos)[:, None] * dy + middle[0][:, None] + far[0], (sy * sin)[:, None] * dx
    col_x, col_y = (sx * cos)[:, None] * dx + middle[1][:, None] + far[1], (sx * sin)[:, None] * dy
    row, col = row_y[:, :, None] + row_x[:, None], col_x[:, None] - col_y[:, :, None]  # (B, d S, d S)
    height, width = old.view(2, B, 1, 1)
    r_, c_ = (v.round() if detail == 1 else F.avg_pool2d(v, detail).round() for v in (row, col))   # (B, S, S), the label's
    inside = (r_ >= 0) & (r_ < height) & (c_ >= 0) & (c_ < width)
    nearest = (r_.clamp_(0, T - 1) * T).add_(c_.clamp_(0, T - 1)).long()           # (B, S, S)
    labels = torch.where(inside, labels.view(B, -1).gather(1, nearest.view(B, -1)).view(B, S, S), -1)
    # clamped to the valid part, so that the padding's black does not bleed in at its border
    row, col = torch.minimum(row.clamp_(min=0), height - 1), torch.minimum(col.clamp_(min=0), width - 1)
    # (B, d S, d S, 2), x before y, in [-1, 1]; 5 times faster than stack
    grid = torch.view_as_real(torch.complex(col, row)).mul_(2 / T).add_(1 / T - 1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return *standardise(x, inside, detail), labels


# ---------------------------------------------------------------------------------------------------------------------
# Command line: fetch COCO, pack a data set


def download(home, splits, server):
    """COCO's images and panoptic annotations into home: what is there stays, what broke off goes on."""
    for name in [f"zips/{split}2017.zip" for split in splits] + ["annotations/panoptic_annotations_trainval2017.zip"]:
        file, done = home / Path(name).name, home / f".{Path(name).name}.done"
        if not done.exists():
            home.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                fetch(f"{server}/{name}", file)
            unpack_zip(file, home)
            for inner in sorted((home / "annotations").glob("panoptic_*2017.zip")):
                unpack_zip(inner, home / "annotations")
                inner.unlink()
            done.touch()
            file.unlink()


def fetch(url, file, tries=5):
    """Download url to file, going on where an earlier call or a broken connection stopped. Raises OSError."""
    part, why, total = Path(f"{file}.part"), "", -1
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0                         # else the server sends all of it
                total = have + int(answer.headers.get("Content-Length", -1))
                free, need = shutil.disk_usage(file.parent).free, 2 * total - have
                if free < need:
                    raise OSError(errno.ENOSPC, f"{need / 1e9:.1f} GB are needed to fetch and unpack it, {free / 1e9:.1f} GB are "
                                                f"free in {file.parent}")
                with (open(part, "ab" if have else "wb") as f,
                      tqdm(total=total, initial=have, desc=file.name, unit="B", unit_scale=True, leave=False) as bar):
                    while chunk := answer.read(2**20):
                        f.write(chunk)
                        bar.update(len(chunk))
            why = f"{part.stat().st_size} of {total} bytes came"
        except urllib.error.HTTPError as e:
            if e.code == 416:                                                      # nothing more: complete, or another file
                total = int(e.headers.get("Content-Range", "*/0").rpartition("/")[2])
                if total != have:
                    part.unlink()
            elif e.code < 500:
                raise OSError(f"{url}: {e}") from None
            why = e
        except (OSError, HTTPException) as e:
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise OSError(f"{url}: {e.strerror}; what came is kept, run the same command again to go on") from None
            why = e
        if part.exists() and part.stat().st_size == total:
            os.replace(part, file)
            return
        time.sleep(2**attempt / 8)
    raise OSError(f"{url} could not be fetched ({why}); what came is kept, run the same command again to go on")


def unpack_zip(file, folder):
    """Unpack a zip file, but for what is there in full; its checksums are checked. Raises OSError."""
    try:
        with zipfile.ZipFile(file) as z:
            for member in tqdm(z.infolist(), f"unpacking {file.name}", unit="file", leave=False):
                there, junk = folder / member.filename, member.filename.startswith("__MACOSX")
                if not junk and not (there.is_file() and there.stat().st_size == member.file_size):
                    z.extract(member, folder)
    except (zipfile.BadZipFile, zlib.error) as e:
        file.unlink()
        raise OSError(f"{file} was damaged and is deleted ({e}): run the same command again to fetch it anew") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fetch COCO, or decode and resize a data set, for training to read it fast.")
    option = parser.add_argument
    option("name", help="coco, entity, ade20k, bsds500, or a folder with images/ and labels/")
    option("--root", default="data", help="the data set lies in ROOT/NAME or in ROOT itself (%(default)s)")
    option("--split", nargs="+", default=["train", "val"], choices=["train", "val", "test"], help="(train val)")
    option("--size", type=int, default=128, help="longer side, in pixels (%(default)s)")
    option("--crop", type=float, default=1.0, help="as in train.py: crops need larger training images (%(default)s)")
    option("--cache", default="cache", help="where packed copies go (%(default)s)")
    option("--unlabelled", default="segment", help="id 0: one segment, or ignore (%(default)s)")
    option("--components", action="store_true", help="labels are classes: their connected parts become the segments")
    option("--workers", type=int, default=CORES, help="processes (%(default)s)")
    option("--max_bad", "--max-bad", type=float, default=0.01, help="share of unusable items that is too much (%(default)s)")
    option("--download", action="store_true", help="only fetch COCO, into ROOT/coco; goes on where it stopped")
    option("--server", default="http://images.cocodataset.org", help="where from (%(default)s)")
    a = parser.parse_args(argv)
    try:
        if a.download:
            if a.name != "coco":
                raise ValueError(f"--download fetches coco only; get {a.name} from its authors")
            download(Path(a.root) / "coco", a.split, a.server)
            print(f"COCO is in {Path(a.root) / 'coco'}; now try: python train.py --dataset coco --root {a.root}")
            return 0
        if a.name == "shapes":
            raise ValueError("shapes are drawn while training: there is nothing to prepare")
        for split in a.split:
            side = packed_side(a.size, a.crop) if split == "train" else a.size
            data = load(a.name, split, side, a.root, a.cache, 0, a.unlabelled, a.components, a.workers, a.max_bad)
            print(f"{a.name} {split}: {len(data):,} images, {len(data.labels):,} label maps of {side} x {side} pixels, in "
                  f"{data.folder}")
    except (ValueError, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
