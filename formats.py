"""Where data sets keep their images and labels: folders, COCO, EntitySeg, ADE20K, BSDS500; reading and resizing one of each.

What it is: find_*(home, split) for every format, the readers of their label files, of images, and the resizing of both. What
it is not: sets, batches and augmentation are data.py.

    files, listing = find_folder(Path("photos"), "train")    # files: what a packed copy depends on
    for item in listing():
        image, labels = read_image(item.image), item.read(item)                    # labels: (H, W) integers each
"""

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
IGNORE = 65535                                                         # in packed uint16 label maps; -1 everywhere else


# Formats. Each is one function find_*(home, split) -> (files, listing): the files that images and labels come from, which
# tell whether a packed copy is still good, and a function that lists the items if they have to be packed.


class Item(NamedTuple):
    """An image and its label maps: read(item) gives (H, W) integers for each label; 0 = unlabelled, -1 = ignore."""

    image: str
    labels: list                                 # file names, one a label map
    read: Callable | None                        # None: the item is bad, and arg says why
    arg: object = None


def bad(reason):
    return Item("", [], None, reason)


def scan(*paths, keep=lambda name: True):
    """The files of folders and their subfolders, and files themselves, sorted: [(path, size, mtime)]."""
    found = []
    for path in paths:
        for e in sorted(os.scandir(path), key=lambda e: e.name) if os.path.isdir(path) else [Path(path)]:
            if not keep(e.name):
                continue
            try:
                info = e.stat()
            except FileNotFoundError:                                              # a link into nothing
                info = None
            if info and stat.S_ISDIR(info.st_mode):
                found += scan(e, keep=keep)
            else:
                found.append((os.fspath(e), info.st_size, info.st_mtime_ns) if info else (os.fspath(e), -1, 0))
    return found


def first_of(paths):
    return next((p for p in paths if p.exists()), None)


def find_folder(home, split):
    """home/images[/split] and home/labels[/split]; labels are <stem>.png or <stem>_a0.png, <stem>_a1.png, ..."""
    for part in ("images", "labels"):
        if not (home / part).is_dir():
            raise FileNotFoundError(f"{home} has no folder {part}/: put images into images/ and label PNGs of the same "
                                    f"stem into labels/ (or images/train, images/val, labels/train, labels/val)")
    splits = {d.name for d in (home / "images").iterdir() if d.is_dir()}
    if splits and split not in splits:
        raise FileNotFoundError(f"{home}/images has {', '.join(sorted(splits))}, but no {split}/")
    folders = [home / part / split if splits else home / part for part in ("images", "labels")]
    images, labels = ([f for f in (scan(part) if part.is_dir() else [])
                       if Path(f[0]).parent == part and Path(f[0]).suffix.lower() in types]
                      for part, types in zip(folders, (IMAGE_TYPES, {".png"})))

    def listing():
        stems, maps = {Path(path).stem for path, _, _ in images}, {}
        for path, _, _ in labels:
            whole, (stem, _, annotator) = Path(path).stem, Path(path).stem.rpartition("_a")
            one_of_several = annotator.isdigit() and stem and whole not in stems   # else an image is itself named x_a1
            maps.setdefault(stem if one_of_several else whole, []).append(path)
        lonely = [bad(f"{maps[stem][0]} has no image of the same stem in {folders[0]}")
                  for stem in sorted(set(maps) - stems)]
        items = [Item(path, maps[stem], read_pngs) if (stem := Path(path).stem) in maps else
                 bad(f"{path} has no label: expected {folders[1] / stem}.png or {stem}_a0.png") for path, _, _ in images]
        if not splits:                                                             # no split given: every 10th is val,
            held = set(range(9, len(items), 10)) or set(range(1, len(items))[-1:])             # of fewer the last
            items = [item for i, item in enumerate(items) if (i in held) == (split != "train")]
        return items + lonely

    return images + labels, listing


def find_coco(home, split):
    """COCO in its own layout: panoptic JSON and PNGs or, where these are missing, instances JSON."""
    if split == "test":
        raise ValueError("COCO publishes no labels of its test images: use split val")
    year, notes = f"{split}2017", home / "annotations"
    panoptic, instances = notes / f"panoptic_{year}.json", notes / f"instances_{year}.json"
    images = first_of([home / year, home / "images" / year])
    maps = first_of([notes / panoptic.stem, home / panoptic.stem])
    if images and maps and panoptic.is_file():
        return scan(images, maps, panoptic), lambda: list_panoptic(panoptic, images, maps)
    if images and instances.is_file():
        return scan(images, instances), lambda: list_instances(instances, images)
    raise FileNotFoundError(f"COCO is not complete: {home / year}/*.jpg, {panoptic} and {notes / panoptic.stem}/*.png are "
                            f"needed; fetch them from cocodataset.org: python data.py coco --download --root {home.parent}")


def find_entity(home, split, seed=0):
    """EntitySeg: its two JSON files and images. 80-10-10 by seed, the official validation images all in test."""
    train, val = (first_of(home / sub / name.format(part) for sub in (".", "annotations", "annotations/entity_segmentation")
                           for name in ("entityseg_{}_lr.json", "entityseg_{}.json", "entityv2_010203_entity_{}_lr.json",
                                        "entityv2_010203_entity_{}.json")) for part in ("train", "val"))
    if not train or not val:
        raise FileNotFoundError(f"EntitySeg is not complete: {home}/entityseg_train_lr.json, entityseg_val_lr.json and the "
                                f"image folders that they name are needed (github.com/adobe-research/EntitySeg-Dataset)")
    images = first_of([home / ("images_lr" if "_lr" in train.name else "images"), home])

    def listing():
        pool, official = (list_instances(file, images) for file in (train, val))
        twice = {item.image for item in official if item.read}
        pool = sorted((item for item in pool if item.image not in twice), key=lambda item: item.image)
        pool = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]
        tenth = round(0.1 * (len(pool) + len(official)))
        more = max(0, tenth - len(official))                                       # test images besides the official ones
        return dict(test=official + pool[:more], val=pool[more : more + tenth], train=pool[more + tenth :])[split]

    return scan(images, train, val), listing


def find_ade20k(home, split):
    """ADE20K in any subfolders: full (<image>_seg.png beside it) or scene parsing (annotations/ beside images/)."""
    if split == "test":
        raise ValueError("ADE20K publishes no labels of its test images: use split val")
    files = []
    if home.is_dir():
        files = scan(home, keep=lambda name: name[:4] != "ADE_" or "." in name)    # not the folders of instance masks
    images = [f[0] for f in files if Path(f[0]).name.startswith(f"ADE_{split}_") and f[0].endswith(".jpg")]
    there = {f[0] for f in files}
    if not images:
        raise FileNotFoundError(f"{home} holds no ADE_{split}_*.jpg: ADE20K is needed there, full (with *_seg.png) or scene "
                                f"parsing (images/ and annotations/), from ade20k.csail.mit.edu")

    def listing():
        items = []
        for image in images:
            above, _, below = image.rpartition("images" + os.sep)
            full, parsing = f"{image[:-4]}_seg.png", f"{above}annotations{os.sep}{below[:-4]}.png"
            items.append(Item(image, [full], read_ade) if full in there else
                         Item(image, [parsing], read_pngs) if parsing in there else
                         bad(f"{image} has no label: expected {full} or {parsing}"))
        return items

    return files, listing


def find_bsds500(home, split):
    """BSDS500 as published: images/<split>/*.jpg, groundTruth/<split>/*.mat with 4 to 9 people's segmentations each."""
    truth = first_of(home / sub / "groundTruth" / split for sub in (".", "data", "BSDS500/data", "BSR/BSDS500/data"))
    if not truth or not (images := truth.parent.parent / "images" / split).is_dir():
        raise FileNotFoundError(f"BSDS500 is not complete in {home}: images/{split}/*.jpg and groundTruth/{split}/*.mat are needed "
                                f"(www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html)")

    def listing():
        items = []
        for image in sorted(images.glob("*.jpg")):
            mat = truth / f"{image.stem}.mat"
            try:
                people = scipy.io.whosmat(mat)[0][1][1]                            # ("groundTruth", (1, people), "cell")
                items.append(Item(str(image), [str(mat)] * people, read_mat))
            except Exception as e:                                                 # whatever scipy says of a bad file
                items.append(bad(f"{mat}: not a readable .mat file ({e or type(e).__name__})"))
        return items

    return scan(images, truth), listing


def read_json(path):
    """The lists images and annotations of a COCO-like JSON file."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: cut off, or no JSON ({e})") from None
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: it has no list '{key}'")
    return content["images"], content["annotations"]


def each(file, entries, make):
    """make(k, entry) for every entry of a JSON list; what is wrong with an entry becomes a bad item."""
    for k, entry in enumerate(entries):
        try:
            yield make(k, entry)
        except (KeyError, TypeError, ValueError) as e:
            yield bad(f"{file}: entry {k} has no key {e}" if isinstance(e, KeyError) else f"{file}: entry {k}: {e}")


def within(folder, name):
    """folder/name, for a name out of a JSON file, which must not lead elsewhere."""
    parts = str(name).replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ValueError(f"file_name '{name}' is absolute or has '..' in it: refused")
    return str(Path(folder, *parts))


def list_panoptic(file, folder, maps):
    images, annotations = read_json(file)
    paths = {}

    def image(k, entry):
        paths[entry["id"]] = within(folder, entry["file_name"])

    def annotation(k, entry):
        if entry["image_id"] not in paths:
            raise ValueError(f"unknown image id {entry['image_id']}")
        crowds = {s["id"]: bool(s.get("iscrowd")) for s in entry["segments_info"]}
        return Item(paths[entry["image_id"]], [within(maps, entry["file_name"])], read_panoptic, crowds)

    return [item for item in (*each(file, images, image), *each(file, annotations, annotation)) if item]


def list_instances(file, folder):
    images, annotations = read_json(file)
    ids, objects = {entry["id"] for entry in images if isinstance(entry, dict) and "id" in entry}, {}

    def annotation(k, entry):
        if entry["image_id"] not in ids:
            raise ValueError(f"unknown image id {entry['image_id']}")
        objects.setdefault(entry["image_id"], []).append((k, bool(entry.get("iscrowd")), entry["segmentation"]))

    def image(k, entry):
        return Item(within(folder, entry["file_name"]), [str(file)], read_instances,
                    (entry["height"], entry["width"], objects.get(entry["id"], [])))

    return [item for item in (*each(file, annotations, annotation), *each(file, images, image)) if item]


def read_pngs(item):
    """Label PNGs as they are: 8-bit, 16-bit or palette."""
    return [read_label(path) for path in item.labels]


def read_label(path, rgb=False):
    """A label PNG as (H, W) int32; rgb: as R + 256 G + 65536 B."""
    with pillow(path, "label map") as f:
        value, mode = np.asarray(f.convert("RGBA") if rgb and f.mode == "RGB" else f), f.mode
    if rgb and mode != "RGB":
        raise ValueError(f"{path}: an RGB PNG with ids in its colours is needed, this one is {mode}")
    if not rgb and value.ndim != 2:
        raise ValueError(f"{path}: a label map has one id a pixel (8-bit, 16-bit or palette PNG), this one is {mode}")
    return (value.view("<u4")[..., 0] & 0xFFFFFF).astype(np.int32) if rgb else value.astype(np.int32)


def read_panoptic(item):
    """COCO panoptic: the ids of segments_info; crowds are ignored."""
    label = read_label(item.labels[0], rgb=True)
    flat = label.ravel()
    there = np.unique(flat[np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))])    # of the pixels that differ from the last
    unknown = sorted(set(there.tolist()) - set(item.arg) - {0})
    if unknown:
        raise ValueError(f"{item.labels[0]}: no id encoding of its segments_info: {unknown[0]} (R + 256 G + 65536 B) is not "
                         f"there")
    crowds = [i for i, crowd in item.arg.items() if crowd]
    return [np.where(np.isin(label, crowds), -1, label) if crowds else label]


def read_ade(item):
    """ADE20K full: class (R // 10 * 256 + G) and instance (B); class 0 is unlabelled."""
    value = read_label(item.labels[0], rgb=True)
    r, g, b = value & 255, value >> 8 & 255, value >> 16
    name = r // 10 * 256 + g
    return [np.where(name == 0, 0, name << 8 | b)]


def read_mat(item):
    """BSDS500: every annotator's segmentation."""
    try:
        cells = scipy.io.loadmat(item.labels[0])["groundTruth"][0]
        return [cell["Segmentation"][0, 0].astype(np.int32) for cell in cells]
    except Exception as e:                                                         # whatever scipy says of a bad file
        raise ValueError(f"{item.labels[0]}: not a readable .mat file ({e or type(e).__name__})") from None


def read_instances(item):
    """COCO instances: polygons, uncompressed and compressed RLE. Smaller objects over larger ones, crowds ignored."""
    H, W, objects = item.arg
    masks = []
    for k, crowd, segmentation in objects:
        try:
            rle = run_lengths(segmentation, H, W)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{item.labels[0]}: annotation {k}, of {item.image}: {e or type(e).__name__}") from None
        masks.append((not crowd, -int(coco_mask.area(rle)), k, rle))
    label = np.zeros((W, H), np.int32)                                             # transposed, as pycocotools keeps masks
    for j, (real, _, _, rle) in enumerate(sorted(masks, key=lambda m: m[:3]), 1):  # crowds first, then the largest
        np.putmask(label, coco_mask.decode(rle).T, j if real else -1)
    return [label.T]


def run_lengths(segmentation, H, W):
    """A COCO segmentation as pycocotools' compressed RLE. Raises ValueError where that would draw nonsense."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            xy = np.array(polygon, float).reshape(-1)
            if len(xy) < 6 or len(xy) % 2:
                raise ValueError(f"a polygon of {len(xy) / 2:g} points: 3 are needed")
            x, y = xy[::2], xy[1::2]
            if not (x.max() > 0 and x.min() < W and y.max() > 0 and y.min() < H and np.abs(xy).max() < 2 * max(H, W)):
                raise ValueError(f"a polygon outside the image of {W} x {H} pixels")
        if not segmentation:
            raise ValueError("no polygon in it")
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, H, W))
    if list(segmentation["size"]) != [H, W]:
        raise ValueError(f"an RLE of {segmentation['size']} for an image of {[H, W]} (height, width)")
    counts = segmentation["counts"]
    total = int(np.sum(counts)) if isinstance(counts, list) else rle_total(counts)
    if total != H * W or isinstance(counts, list) and min(counts) < 0:
        raise ValueError(f"an RLE whose counts add up to {total}, not to {H} * {W} = {H * W} pixels")
    return coco_mask.frPyObjects(segmentation, H, W) if isinstance(counts, list) else segmentation


def rle_total(counts):
    """Number of pixels of a compressed COCO RLE: 5 bits a character, 32 = more follow, 16 in the last = negative; from the
    fourth on, numbers are differences to the last but one."""
    c = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((c & 32) == 0)
    if len(c) == 0 or ends[-1:] != len(c) - 1 or (c < 0).any() or (c > 63).any():
        raise ValueError("an RLE that is cut off or has characters that do not belong there")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(c)) - np.repeat(starts, ends - starts + 1)
    x = np.add.reduceat((c & 31) << (5 * digit), starts) - np.where(c[ends] & 16, 32 << (5 * digit[ends]), 0)
    return int(x[0] + np.cumsum(x[1::2]).sum() + np.cumsum(x[2::2]).sum())


@contextmanager
def pillow(path, what="image"):
    """Image.open(path); whatever Pillow has to say of a bad file becomes a ValueError with the file's name."""
    try:
        with Image.open(path) as f:
            yield f
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except UnidentifiedImageError:
        why = "the file is empty" if os.path.getsize(path) == 0 else "no image format that Pillow knows"
        raise ValueError(f"{path}: not a readable {what} ({why})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as e:
        raise ValueError(f"{path}: not a readable {what} ({e or type(e).__name__})") from None


def read_image(path):
    """Any image that Pillow reads, as an upright 8-bit RGB image. Raises ValueError with the file's name."""
    return open_image(path)[0]


def open_image(path, size=None):
    """Upright 8-bit RGB image, and its (W, H). With size, a JPEG may come out smaller, its longer side at least 3 `size`."""
    with pillow(path) as image:
        full, turned = image.size, image.getexif().get(0x0112, 1) >= 5             # orientations 5 to 8 swap the sides
        if size:
            # decoded at 1/2, 1/4 or 1/8; at 2 `size`, the area filter after it would err twice as much
            image.draft(None, tuple(3 * side for side in fitted(*full, size)))
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):              # 16-bit and float grey
            value = np.asarray(image).astype(np.float64)
            if not np.isfinite(value).all():
                raise ValueError("it has pixels that are infinite or no numbers")
            top = max(float(value.max()), 65535 if image.mode != "F" else 1e-9)    # 32-bit integers: above 65535
            image = Image.fromarray((value / top * 255).clip(0, 255).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:                # on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image if image.mode == "RGB" else image.convert("RGB"), full[::-1] if turned else full


def fitted(width, height, size, detail=1):
    """(w, h) with the longer side equal to size, the other rounded up to an even number (a network's last stage may see 2 x 2
    pixels at once, and half a block confuses it), but not beyond size; with a detail, detail times what size / detail gives."""
    side = size // detail
    return tuple(detail * min(side, 2 * -(-n * side // (2 * max(width, height)))) for n in (width, height))


def resize_image(image, size, fit=None):
    """A PIL image as (S, S, 3) uint8, area-averaged (bilinear, where it grows) to `size` on the longer side (or to
    fit: w, h), top-left; and (h, w)."""
    w, h = fit or fitted(*image.size, size)
    out = np.zeros((size, size, 3), np.uint8)
    out[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BOX if w <= image.width else Image.Resampling.BILINEAR))
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
