"""Images with label maps: synthetic scenes, folders, COCO panoptic; resizing, packing, augmentation.

What it is: `load(name, split, size, ...)` returns a data set with len() and get(positions); `augment` and `normalise` work on
batches on any device. What it is not: it knows nothing of bits, noise or networks.

    data = load("shapes", "train", 64)
    images, labels, sizes = data.get([0, 1, 2, 3])           # (4, 64, 64, 3) uint8, (4, 64, 64) int64, (4, 2) h and w
    image, inside = normalise(images, sizes)                 # (4, 3, 64, 64), (4, 64, 64) bool: where there is image

Label maps hold any ids, -1 = ignore. Images keep their shape: the longer side becomes `size`, placed top-left, the rest
is padding (zero after normalisation, ignored in the labels).
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)               # ImageNet
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
IGNORE = 65535                                                         # in packed uint16 label maps; -1 everywhere else


def load(name, split, size, root="data", cache="cache", seed=0, unlabelled="segment"):
    """The data set `name`: "shapes", "coco", or a folder with images/ and labels/. split: train, val or test.

    root: where COCO lies (root/coco); cache: where packed copies go; unlabelled: whether id 0 is a segment or ignored.
    Raises ValueError or FileNotFoundError with what to do.
    """
    if unlabelled not in ("segment", "ignore"):
        raise ValueError(f"unlabelled is 'segment' or 'ignore', not '{unlabelled}'")
    if name == "shapes":
        return Shapes(split, size, seed)
    if name == "coco":
        items = list_coco(Path(root) / "coco", split)
    elif Path(name).is_dir():
        items = list_folder(Path(name), split)
    else:
        raise ValueError(f"data set '{name}' is neither shapes, nor coco, nor a folder with images/ and labels/")
    return pack(items, size, Path(cache), unlabelled, f"{Path(name).name}-{split}-{size}")


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic scenes: 1 to 8 textured ellipses and polygons over each other, on a textured background.


@dataclass
class Shapes:
    """An endless data set; scene i of a split and seed is always the same. Train and val share no seed."""

    split: str
    size: int
    seed: int = 0
    name = "shapes"

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
# Files. An item is (image path, [label paths], how to read a label: None or the ids that count).


def list_folder(root, split):
    """Items of root/images[/split] and root/labels[/split]; labels are <stem>.png or <stem>_a0.png, <stem>_a1.png, ..."""
    for part in ("images", "labels"):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"{root} has no folder {part}/: put images into images/ and label PNGs of the same "
                                    f"stem into labels/ (or images/train, images/val, labels/train, labels/val)")
    splits = {d.name for d in (root / "images").iterdir() if d.is_dir()}
    if splits and split not in splits:
        raise FileNotFoundError(f"{root}/images has {', '.join(sorted(splits))}, but no {split}/")
    folder = split if splits else "."
    images = sorted(p for p in (root / "images" / folder).iterdir() if p.suffix.lower() in IMAGE_TYPES)
    labels, stems = {}, {p.stem for p in images}
    for p in sorted((root / "labels" / folder).glob("*.png")):
        stem, _, annotator = p.stem.rpartition("_a")
        one_of_several = annotator.isdigit() and stem and p.stem not in stems      # else an image is itself named x_a1
        labels.setdefault(stem if one_of_several else p.stem, []).append(p)
    for p in images:
        if p.stem not in labels:
            raise ValueError(f"{p} has no label: expected {root / 'labels' / folder / p.stem}.png or {p.stem}_a0.png")
    missing = sorted(set(labels) - {p.stem for p in images})
    if missing:
        raise ValueError(f"{labels[missing[0]][0]} has no image of the same stem in {root / 'images' / folder}")
    if not splits:                                                                 # no split given: every 10th is val
        images = [p for i, p in enumerate(images) if (i % 10 == 9) == (split != "train")]
    if not images:
        raise ValueError(f"{root / 'images' / folder} holds no images for split {split}")
    return [(p, labels[p.stem], None) for p in images]


def list_coco(root, split):
    """Items of COCO panoptic in COCO's own layout."""
    year = f"{split}2017"
    folder, file = root / year, root / "annotations" / f"panoptic_{year}.json"
    maps = next((d for d in (root / "annotations" / f"panoptic_{year}", root / f"panoptic_{year}") if d.is_dir()), None)
    if not folder.is_dir() or not file.is_file() or maps is None:
        raise FileNotFoundError(f"COCO is not complete: {folder}/*.jpg, {file} and {file.with_suffix('')}/*.png are needed "
                                f"({year}.zip and panoptic_annotations_trainval2017.zip of cocodataset.org, unpacked)")
    with open(file) as f:
        content = json.load(f)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    items = []
    for a in content["annotations"]:
        ids = [s["id"] for s in a["segments_info"]]
        items.append((folder / names[a["image_id"]], [maps / a["file_name"]], ids))
    return items


def read_image(path):
    """Any image that Pillow reads, as an upright 8-bit RGB image. Raises ValueError with the file's name."""
    try:
        with Image.open(path) as f:
            image = ImageOps.exif_transpose(f)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):          # 16-bit and float grey
                value = np.asarray(image).astype(np.float64)
                top = 65535 if image.mode != "F" else max(float(value.max()), 1e-9)
                image = Image.fromarray((value / top * 255).clip(0, 255).round().astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:            # on white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path}: not a readable image ({e or type(e).__name__})") from None


def read_label(path, ids=None):
    """A label PNG as (H, W) int64: 8-bit, 16-bit or palette, as it is; with ids, COCO's R + 256 G + 65536 B.

    With ids, pixels of no id become 0 and the others 1, 2, ... in the order of ids.
    """
    try:
        with Image.open(path) as f:
            value, mode = np.array(f).astype(np.int64), f.mode
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path}: not a readable label map ({e or type(e).__name__})") from None
    if ids is not None:
        if value.ndim != 3:
            raise ValueError(f"{path}: a COCO panoptic map is an RGB PNG, this one is {mode}")
        value = value[..., 0] + 256 * value[..., 1] + 65536 * value[..., 2]
        return np.where(np.isin(value, ids), np.searchsorted(np.sort(ids), value) + 1, 0)
    if value.ndim != 2:
        raise ValueError(f"{path}: a label map has one id a pixel (8-bit, 16-bit or palette PNG), this one is {mode}")
    return value


def fitted(width, height, size):
    """(w, h) with the longer side equal to size, at least 1 pixel each."""
    scale = size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize_image(image, size):
    """A PIL image as (S, S, 3) uint8, area-averaged to `size` on the longer side, placed top-left; and (h, w)."""
    w, h = fitted(*image.size, size)
    out = np.zeros((size, size, 3), np.uint8)
    out[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BOX))
    return out, (h, w)


def resize_label(label, size):
    """(H, W) ids as (S, S) uint16, by nearest; ids renumbered in their order, -1 and padding become IGNORE."""
    (H, W), (w, h) = label.shape, fitted(*label.shape[::-1], size)
    rows, cols = ((np.arange(h) + 0.5) * H / h).astype(int), ((np.arange(w) + 0.5) * W / w).astype(int)
    small = label[rows][:, cols]
    ids, small_rank = np.unique(small, return_inverse=True)
    if len(ids) >= IGNORE:
        raise ValueError(f"{len(ids)} segments in one label map: at most {IGNORE - 1} are possible")
    out = np.full((size, size), IGNORE, np.uint16)
    out[:h, :w] = np.where(small == -1, IGNORE, small_rank.reshape(h, w))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Packing: every item decoded and resized once, into arrays that are mapped, not read, afterwards.


@dataclass
class Packed:
    """A data set in four arrays. get(positions, draws) picks label map floor(draw * count) where there are several."""

    name: str
    images: np.ndarray                           # (N, S, S, 3) uint8
    labels: np.ndarray                           # (M, S, S) uint16, IGNORE = 65535
    first: np.ndarray                            # (N + 1,): the label maps of image i are first[i] to first[i + 1]
    sizes: np.ndarray                            # (N, 2): h, w of the valid part
    names: list                                  # N file stems

    def __len__(self):
        return len(self.images)

    def get(self, positions, draws=None):
        """positions (B,) modulo len; draws (B,) in [0, 1): images (B, S, S, 3) uint8, labels (B, S, S) int64, sizes."""
        i = np.asarray(positions) % len(self)
        pick = self.first[i] + ((draws if draws is not None else 0) * (self.first[i + 1] - self.first[i])).astype(int)
        return torch.from_numpy(self.images[i]), unpack(self.labels[pick]), torch.from_numpy(self.sizes[i]).long()

    def maps(self, i):
        """All label maps of image i: (annotators, S, S) int64."""
        return unpack(self.labels[self.first[i] : self.first[i + 1]])


def unpack(labels):
    return torch.from_numpy(np.where(labels == IGNORE, -1, labels.astype(np.int64)))   # numpy: no second team of threads


def pack(items, size, cache, unlabelled, name):
    """Decode and resize all items once, into the cache; the same items again are mapped from there."""
    stamp = [([(str(q), q.stat().st_mtime_ns if q.exists() else 0) for q in (p, *maps)], ids) for p, maps, ids in items]
    key = hashlib.sha256(json.dumps([2, stamp, size, unlabelled]).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{key}"
    first = np.cumsum([0] + [len(maps) for _, maps, _ in items])
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part{os.getpid()}")
        part.mkdir(parents=True)
        try:
            shape = (size, size)
            images = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8, (len(items), *shape, 3))
            labels = np.lib.format.open_memmap(part / "labels.npy", "w+", np.uint16, (int(first[-1]), *shape))
            sizes = np.lib.format.open_memmap(part / "sizes.npy", "w+", np.int32, (len(items), 2))

            def convert(i):
                image_path, label_paths, ids = items[i]
                image = read_image(image_path)
                images[i], sizes[i] = resize_image(image, size)
                for j, path in enumerate(label_paths):
                    label = read_label(path, ids)
                    if label.shape != image.size[::-1]:
                        raise ValueError(f"{path} is {label.shape[1]} x {label.shape[0]} pixels, its image {image_path} "
                                         f"{image.size[0]} x {image.size[1]}: they must agree")
                    if unlabelled == "ignore":
                        label = np.where(label == 0, -1, label)
                    labels[first[i] + j] = resize_label(label, size)

            with ThreadPoolExecutor(os.cpu_count()) as pool:                       # Pillow decodes without the GIL
                for _ in tqdm(pool.map(convert, range(len(items))), f"packing {name}", len(items), leave=False):
                    pass
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    mapped = [np.load(folder / f"{array}.npy", mmap_mode="r") for array in ("images", "labels", "sizes")]
    return Packed(name, mapped[0], mapped[1], first, mapped[2], [p.stem for p, _, _ in items])


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def order(start, count, n, seed):
    """Sample numbers `start` to `start + count` of an endless run over n items, shuffled anew in every epoch."""
    at = np.arange(start, start + count)
    if n >= 2**31:
        return at
    return np.concatenate([np.random.default_rng([seed, e]).permutation(n)[at[at // n == e] % n] for e in np.unique(at // n)])


def uniforms(start, count, seed, n=16):
    """n uniform numbers for each of the samples `start` to `start + count`, from a seed each: (count, n) float32."""
    return np.stack([np.random.Generator(np.random.Philox(key=[2**32 + seed, i])).random(n, np.float32)
                     for i in range(start, start + count)])


def inside_mask(sizes, size):
    """(B, 2) h, w -> (B, S, S) bool."""
    axis = torch.arange(size, device=sizes.device)
    return (axis[:, None] < sizes[:, 0, None, None]) & (axis < sizes[:, 1, None, None])


def normalise(images, sizes):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, ImageNet mean and deviation, 0 outside; and inside (B, S, S)."""
    return standardise(images.permute(0, 3, 1, 2).float() / 255, inside_mask(sizes, images.shape[1]))


def standardise(x, inside):
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std * inside[:, None], inside


def augment(images, labels, sizes, u):
    """The paper's augmentation, each sample by its own 16 uniform numbers u (B, 16), on the tensors' device.

    Horizontal flip (p 0.5); gamma, brightness and contrast, hue/saturation/value (p 0.3 each); RGB shift (p 0.1); rotation
    within +-20 degrees (p 0.3). Returns what `normalise` does, and the labels; new pixels are outside and -1.
    """
    B, S = images.shape[:2]
    x = images.permute(0, 3, 1, 2).float() / 255
    u = u.to(x.device)
    on = u[:, :6] < torch.tensor([0.5, 0.3, 0.3, 0.3, 0.1, 0.3], device=x.device)
    r = 2 * u[:, 6:] - 1                                                           # (B, 10) in [-1, 1]

    def when(i, amount, neutral=0.0):                                              # (B, 1, 1, 1)
        return torch.where(on[:, i], amount, neutral).view(B, 1, 1, 1)

    x = x.clamp(min=1e-6) ** when(1, 2 ** (0.5 * r[:, 0]), 1.0)                    # gamma 0.7 to 1.4
    x = (x - 0.5) * when(2, 1 + 0.2 * r[:, 1], 1.0) + 0.5 + when(2, 0.2 * r[:, 2])
    turn, chroma, value = when(3, 0.35 * r[:, 3]), when(3, 1 + 0.3 * r[:, 4], 1.0), when(3, 1 + 0.15 * r[:, 5], 1.0)
    grey = x.mean(1, keepdim=True)                                                 # hue: a rotation about the grey axis
    c = x - grey
    c = c * turn.cos() + torch.stack([c[:, 2] - c[:, 1], c[:, 0] - c[:, 2], c[:, 1] - c[:, 0]], 1) * turn.sin() / 3**0.5
    x = (grey + c * chroma) * value
    x = x + torch.where(on[:, 4, None], 0.08 * r[:, 6:9], 0.0)[:, :, None, None]   # RGB shift
    x = x.clamp(0, 1)

    # flip and rotation about the middle of the valid part, as one map from new to old pixels
    flip, angle = torch.where(on[:, 0], -1.0, 1.0), torch.where(on[:, 5], r[:, 9] * torch.pi / 9, 0.0)
    middle = (sizes.to(x.device).float() - 1) / 2                                  # (B, 2): row, column
    axis = torch.arange(S, device=x.device, dtype=torch.float32)
    dy, dx = axis.view(1, S, 1) - middle[:, 0].view(B, 1, 1), axis.view(1, 1, S) - middle[:, 1].view(B, 1, 1)
    cos, sin, flip = angle.cos().view(B, 1, 1), angle.sin().view(B, 1, 1), flip.view(B, 1, 1)
    row = middle[:, 0].view(B, 1, 1) + cos * dy + sin * dx
    col = middle[:, 1].view(B, 1, 1) + flip * (cos * dx - sin * dy)
    # clamped to the valid part, so that the padding's black does not bleed in at its border
    near_row, near_col = row.round().long(), col.round().long()
    height, width = (sizes[:, i].to(x.device).view(B, 1, 1) for i in (0, 1))
    inside = (near_row >= 0) & (near_row < height) & (near_col >= 0) & (near_col < width)
    inside = inside & inside_mask(sizes.to(x.device), S)
    row, col = torch.minimum(row.clamp(min=0), height - 1.0), torch.minimum(col.clamp(min=0), width - 1.0)
    grid = torch.stack([col, row], dim=-1) * (2 / (S - 1)) - 1                     # (B, S, S, 2), x before y
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    flat = near_row.clamp(0, S - 1) * S + near_col.clamp(0, S - 1)                 # (B, S, S)
    labels = labels.view(B, -1).gather(1, flat.view(B, -1)).view(B, S, S).masked_fill(~inside, -1)
    return *standardise(x, inside), labels
