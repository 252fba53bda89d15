"""Where data sets keep their images and labels (FORMATS has them all); reading one of each.

What it is: find_*(home, split) for every format, the readers of their label files and of images. What it is
not: it resizes nothing (frame.py); sets, batches and augmentation are data.py.

    files, listing = find_folder(Path("photos"), "train")          # files: what a packed copy depends on
    for item in listing():
        image, labels = read_image(item.image), read_labels(item)  # labels: (H, W) integers each
"""

import base64
import functools
import hashlib
import io
import json
import math
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from frame import fitted, run_ends

try:
    import pillow_heif  # not required: photos of iPhones
    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

HEIC = {".heic", ".heif", ".hif"}
Image.init()
# whatever Pillow reads, but for films, and drawings that other programs would have to draw
IMAGE_TYPES = HEIC | {suffix for suffix, kind in Image.registered_extensions().items()
                      if (kind in Image.OPEN or kind == "MPO")
                      and kind not in ("EPS", "WMF", "GRIB", "BUFR", "HDF5", "MPEG")}
READING = 10  # raised where files are read in another way than before
LOOK = 192  # pixels of the longer side, at which a photo's contrast is judged
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF"}  # no type for ids
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what makes it upright


class Notice(UserWarning):
    """Something about a file that its user should know, "path: what"; packing.py counts and prints them."""


def notice(path, what):
    warnings.warn(f"{path}: {what}", Notice, stacklevel=2)  # of the line that calls: one for each kind


# Formats. Each is one function find_*(home, split) -> (files, listing): the files that images and labels come
# from, which tell whether a packed copy is still good, and a function that lists the items if they have to be
# packed.


class Item(NamedTuple):
    """An image and its label maps: read(item) gives (H, W) integers for each label; 0 = unlabelled, -1 =
    ignore."""

    image: str
    labels: list  # file names, one a label map
    read: Callable | None  # None: bad or, with an image, left out; arg says why
    arg: object = None
    void: tuple = ()  # ids that become -1


def bad(reason):
    return Item("", [], None, reason)


def junk(name):
    """Whether a file or folder is hidden, or what macOS, Windows, Jupyter, a NAS or editors leave behind."""
    return name.startswith((".", "~", "$", "@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini"))


def scan(*paths, keep=lambda name: not junk(name)):
    """The files of folders and their subfolders, and files themselves, sorted: [(path, size, mtime)]."""
    found = []
    for path in paths:
        for e in sorted(os.scandir(path), key=lambda e: e.name) if os.path.isdir(path) else [Path(path)]:
            if not keep(e.name):
                continue
            try:
                info = e.stat()
            except OSError:  # a link into nothing, or to itself
                info = None
            if info and stat.S_ISDIR(info.st_mode):
                found += scan(e, keep=keep)
            else:
                found.append((os.fspath(e), info.st_size, info.st_mtime_ns) if info
                             else (os.fspath(e), -1, 0))
    return found


def first_of(paths):
    return next((p for p in paths if p.exists()), None)


def split_of(name):
    """The split that a folder or file is named after, else None: train, training, valid, val2017, test ..."""
    match = re.fullmatch(r"(train|val|test)(ing|id|idation|\d{4})?", name, re.IGNORECASE)
    return match and match[1].lower()


def stem_of(path, folder):
    """A file's path within a folder, without its ending: what an image and its label have in common, in
    whichever way accents are written (macOS has its own)."""
    stem = os.path.splitext(path.removeprefix(os.path.join(folder, "")))[0]
    return unicodedata.normalize("NFC", stem.replace(os.sep, "/"))


def inside(files, folder, types):
    """The paths of these files that lie in a folder, or in those within, and are of these types."""
    start = os.path.join(folder, "")
    return [f[0] for f in files if f[0].startswith(start) and os.path.splitext(f[0])[1].lower() in types]


def by_stem(files, folder, types=IMAGE_TYPES):
    """{stem: path} of the files of these types in a folder and those within. Raises ValueError where two have
    one stem."""
    found = {}
    for path in inside(files, folder, types):
        if other := found.get(stem := stem_of(path, folder)):
            raise ValueError(f"{other} and {path} have the same stem, so that one label would be both's: "
                             "remove or rename one")
        found[stem] = path
    return found


def tenth(items, split, home):
    """A split of what has none: about a tenth (at least a twentieth, and one image) is for validation, drawn
    by the images' names alone, so that hardly any changes sides when others come. Raises ValueError where
    there is but one, which is for training."""
    draw = {item.image: hashlib.sha256(stem_of(item.image, home).encode()).digest()
            for item in items if item.image}
    if len(draw) == 1 and split != "train":
        raise ValueError(f"{home} holds one image: two are needed, as one is kept for validation")
    number = max(sum(digest[0] < 26 for digest in draw.values()), len(draw) // 20, 1)  # 26 of 256
    held = set(sorted(draw, key=draw.get)[: min(number, len(draw) - 1)])
    return [item for item in items if (item.image in held) == (split != "train")]


def split_folders(folder, split):
    """{name of a folder of a split: Path} for those with images, and this split's: a Path or None."""
    there = {d.name: d for d in sorted(folder.iterdir()) if d.is_dir() and split_of(d.name)
             and any(Path(f[0]).suffix.lower() in IMAGE_TYPES for f in scan(d))}
    of_split = [d for name, d in there.items() if split_of(name) == split]
    if len(of_split) > 1:
        raise ValueError(f"{of_split[0]} and {of_split[1]} are both named after the split {split}: remove or "
                         f"rename one")
    return there, of_split[0] if of_split else None


# x_mask_0.png, x_0.png: one of several files of one image
MASK = re.compile(r"(.+?)[_-](?:(?:mask|instance|object)s?[_-]?)?\d+")


def find_folder(home, split):
    """home/images[/split] and home/labels[/split]: label maps <stem>.png, of several people <stem>_a0.png,
    <stem>_a1.png, or a mask for each segment, <stem>_mask_0.png or <stem>/any.png; with folders within."""
    for part in ("images", "labels"):
        if not (home / part).is_dir():
            raise FileNotFoundError(f"{home} has no folder {part}/: put images into images/ and label PNGs "
                                    f"of the same stem into labels/ (or images/train, images/val, "
                                    f"labels/train, labels/val); known by their files, too: {others()}")
    splits, folder = split_folders(home / "images", split)
    if splits and not folder:
        raise FileNotFoundError(f"{home}/images has {', '.join(splits)}, but no {split}/")
    folder = folder or home / "images"
    labelled = home / "labels"
    if splits:
        labelled = split_folders(labelled, split)[1] or labelled / folder.name
    everything = scan(home / "images")
    files = [f for f in everything if f[0].startswith(os.path.join(folder, ""))]
    files += scan(labelled) if labelled.is_dir() else []

    def listing():
        images = by_stem(files, folder)
        maps, masks = labels_of(images, files, labelled)

        @functools.cache
        def near():
            return {(part, stem_of(f[0], part)): f[0] for f in files for part in (folder, labelled)
                    if f[0].startswith(os.path.join(part, ""))}

        def other(part, stem):  # a file whose type does not do
            path = near().get((part, stem))
            return f"; there is {path}, of no type that Pillow reads" if path else ""

        def item(stem, path):
            drawn = [paths for _, paths in sorted(maps.get(stem, {}).items())]
            if twice := next((paths for paths in drawn if len(paths) > 1), None):
                return bad(f"{twice[0]} and {twice[-1]} are both a label map of {path}: keep one")
            if drawn:
                return Item(path, [label for label, in drawn], read_pngs)
            if stem in masks:
                return Item(path, sorted(masks[stem])[:1], read_masks, sorted(masks[stem]))
            return bad(f"{path} has no label: expected {labelled / stem}.png or "
                       f"{Path(stem).name}_a0.png{other(labelled, stem)}")

        items = [item(stem, path) for stem, path in images.items()]
        lonely = [bad(f"{next(iter(maps[stem].values()))[0]} has no image of the same stem in "
                      f"{folder}{other(folder, stem)}") for stem in sorted(set(maps) - set(images))]
        beside = [Item(f[0], [], None,
                       f"{f[0]}: left out, as it lies beside the folders {', '.join(splits)}")
                  for f in everything
                  if splits and split == "train" and Path(f[0]).suffix.lower() in IMAGE_TYPES
                  and not f[0].startswith(tuple(os.path.join(d, "") for d in splits.values()))]
        return (items if splits else tenth(items, split, home / "images")) + lonely + beside

    return files, listing


def labels_of(images, files, labelled):
    """The label files in the folder `labelled`, by their image's stem: {stem: {the file's own stem: [paths]}}
    of label maps, [one] each, or more where it is there twice; {stem: [paths]} of masks. images: by stem."""
    def lossy(path):  # beside a PNG: a picture of the label
        return os.path.splitext(path)[1].lower() in (".jpg", ".jpeg", ".jfif", ".webp")

    maps, masks = {}, {}
    for path in sorted(inside(files, labelled, IMAGE_TYPES), key=lossy):
        whole = stem_of(path, labelled)
        stem, _, annotator = whole.rpartition("_a")
        if whole in images or not (annotator.isdigit() and stem):  # an image may itself be named x_a1
            stem = whole
        segment, owner = MASK.fullmatch(whole), os.path.dirname(whole)
        if segment and segment[1] in images:
            owner = segment[1]
        if whole not in images and owner in images:
            masks.setdefault(owner, []).append(path)
        else:
            paths = maps.setdefault(stem, {}).setdefault(whole, [])
            if not (paths and lossy(path)):
                paths.append(path)
    return maps, masks


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
    raise FileNotFoundError(f"COCO is not complete: {home / year}/*.jpg, {panoptic} and "
                            f"{notes / panoptic.stem}/*.png are "
                            f"needed; fetch them from cocodataset.org: python data.py coco --download "
                            f"--root {home.parent}")


def find_entity(home, split):
    """EntitySeg: its two JSON files and images. 80-10-10 at random, the official validation images all in
    test."""
    train, val = (first_of(home / sub / name.format(part) for sub in (".", "annotations",
                                                                      "annotations/entity_segmentation")
                           for name in ("entityseg_{}_lr.json", "entityseg_{}.json",
                                        "entityv2_010203_entity_{}_lr.json",
                                        "entityv2_010203_entity_{}.json")) for part in ("train", "val"))
    if not train or not val:
        raise FileNotFoundError(f"EntitySeg is not complete: {home}/entityseg_train_lr.json, "
                                f"entityseg_val_lr.json and the image folders that they name are needed "
                                f"(github.com/adobe-research/EntitySeg-Dataset)")
    images = first_of([home / ("images_lr" if "_lr" in train.name else "images"), home])

    def listing():
        pool, official = (list_instances(file, images) for file in (train, val))
        twice = {item.image for item in official if item.read}
        pool = sorted((item for item in pool if item.image not in twice), key=lambda item: item.image)
        pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
        tenth = round(0.1 * (len(pool) + len(official)))
        more = max(0, tenth - len(official))  # test images besides the official ones
        return dict(test=official + pool[:more], val=pool[more : more + tenth],
                    train=pool[more + tenth :])[split]

    return scan(images, train, val), listing


def find_ade20k(home, split):
    """ADE20K in any subfolders: full (<image>_seg.png beside it) or scene parsing (annotations/ beside
    images/)."""
    if split == "test":
        raise ValueError("ADE20K publishes no labels of its test images: use split val")
    files = []
    if home.is_dir():
        # not the folders of instance masks
        files = scan(home, keep=lambda name: not junk(name) and (name[:4] != "ADE_" or "." in name))
    images = [f[0] for f in files if Path(f[0]).name.startswith(f"ADE_{split}_") and f[0].endswith(".jpg")]
    there = {f[0] for f in files}
    if not images:
        raise FileNotFoundError(f"{home} holds no ADE_{split}_*.jpg: ADE20K is needed there, full (with "
                                f"*_seg.png) or scene "
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
    """BSDS500 as published: images/<split>/*.jpg, groundTruth/<split>/*.mat with 4 to 9 people's
    segmentations each."""
    truth = first_of(home / sub / "groundTruth" / split for sub in (".", "data", "BSDS500/data",
                                                                    "BSR/BSDS500/data"))
    if not truth or not (images := truth.parent.parent / "images" / split).is_dir():
        raise FileNotFoundError(f"BSDS500 is not complete in {home}: images/{split}/*.jpg and "
                                f"groundTruth/{split}/*.mat are needed (www2.eecs.berkeley.edu/Research/"
                                f"Projects/CS/vision/grouping/resources.html)")

    def listing():
        items = []
        for image in sorted(images.glob("*.jpg")):
            mat = truth / f"{image.stem}.mat"
            try:
                people = scipy.io.whosmat(mat)[0][1][1]  # ("groundTruth", (1, people), "cell")
                items.append(Item(str(image), [str(mat)] * people, read_mat))
            except Exception as e:  # whatever scipy says of a bad file
                items.append(bad(f"{mat}: not a readable .mat file ({e or type(e).__name__})"))
        return items

    return scan(images, truth), listing


def find_export(home, split):
    """COCO's JSON as other tools write it: Roboflow (train/_annotations.coco.json, valid/), CVAT
    (annotations/instances_default.json, images/), Label Studio (result.json, images/)."""
    notes = [file for mark in FORMATS["export"].marks for file in sorted(home.glob(mark))]
    kinds = {file: split_of(file.parent.name if file.name.startswith("_")
                            else file.stem.removeprefix("instances_")) for file in notes}
    of_split = [file for file in notes if kinds[file] == split] if any(kinds.values()) else notes
    if not of_split:
        there = ", ".join(str(file.relative_to(home)) for file in notes)
        raise FileNotFoundError(f"{home} has {there}, but none of the split {split}")

    def listing():
        items = [item for file in of_split for item in list_instances(
            file, file.parent, home, home / "images", home / "images" / file.stem.removeprefix("instances_"))]
        return items if any(kinds.values()) else tenth(items, split, home)

    return scan(home), listing


def find_voc(home, split):
    """Pascal VOC, and CVAT's 'Segmentation mask': SegmentationObject/*.png, JPEGImages/ and
    ImageSets/Segmentation/<split>.txt."""
    objects = next(path for mark in FORMATS["voc"].marks for path in sorted(home.glob(mark)))
    base, images = objects.parent, objects.parent / "JPEGImages"
    if not images.is_dir():
        raise FileNotFoundError(f"{base} has SegmentationObject/, but no JPEGImages/: put the images there "
                                "(CVAT: export with images)")
    lists = {split_of(file.stem): file for file in (base / "ImageSets" / "Segmentation").glob("*.txt")}
    lists.pop(None, None)
    if lists and split not in lists:
        raise FileNotFoundError(f"{base}/ImageSets/Segmentation has {', '.join(sorted(lists))}, but no "
                                f"{split}.txt")
    files = scan(images, objects, *lists.values())

    def listing():
        photos, maps = by_stem(files, images), by_stem(files, objects)
        lines = lists[split].read_text("utf-8").splitlines() if lists else sorted(maps)
        stems = [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]
        # 255 is the border that nobody decided on; in CVAT's colours it is (224, 224, 192)
        items = [Item(photos[stem], [maps[stem]], read_pngs, None, (255, 224 + 256 * 224 + 65536 * 192))
                 if stem in photos and stem in maps
                 else bad(f"{(objects if stem in photos else images) / stem}: no such file")
                 for stem in stems]
        return items if lists else tenth(items, split, home)

    return files, listing


def find_cityscapes(home, split):
    """Cityscapes: leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_instanceIds.png."""
    images, maps = home / "leftImg8bit" / split, home / "gtFine" / split
    if split == "test" or not images.is_dir() or not maps.is_dir():
        raise FileNotFoundError(f"Cityscapes is not complete: {images} and {maps} are needed (its test "
                                "images have no labels)")

    def listing():
        photos, end = [f[0] for f in files if f[0].endswith("_leftImg8bit.png")], "_gtFine_instanceIds.png"
        labels = [str(maps / os.path.relpath(path, images)).replace("_leftImg8bit.png", end)
                  for path in photos]
        return [Item(path, [label], read_cityscapes) if label in there
                else bad(f"{path} has no label: expected {label}") for path, label in zip(photos, labels)]

    files = scan(images, maps)
    there = {f[0] for f in files}
    return files, listing


def read_cityscapes(item):
    """Ids below 7 are no part of the scene, or nothing in particular; 24 to 33 are groups, not taken
    apart."""
    value = read_label(item.labels[0])
    return [np.where((value < 7) | (value >= 24) & (value < 34), -1, value)]


def find_labelme(home, split):
    """LabelMe: a JSON file of polygons beside each image, in one folder or in folders of splits."""
    splits, folder = split_folders(home, split)
    if splits and not folder:
        raise FileNotFoundError(f"{home} has {', '.join(splits)}, but no {split}/")
    folder = folder or home
    files = [f for f in scan(folder) if Path(f[0]).suffix.lower() in IMAGE_TYPES | {".json"}]

    def listing():
        images, notes = by_stem(files, folder), by_stem(files, folder, {".json"})
        lone = [bad(f"{notes[stem]} has no image of the same stem beside it")
                for stem in sorted(set(notes) - set(images))]
        without = [Item(images[stem], [], None, f"{images[stem]}: left out, for want of a LabelMe file")
                   for stem in sorted(set(images) - set(notes))]
        items = [Item(path, [notes[stem]], read_labelme) for stem, path in images.items() if stem in notes]
        return (items if splits else tenth(items, split, home)) + lone + without

    return files, listing


def read_labelme(item):
    """LabelMe's polygons, rectangles, circles and masks; those of one group are one object. Lines and points
    have no area, and are passed over."""
    content, objects = load_json(item.labels[0]), {}
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{item.labels[0]}: no LabelMe file: it has no list 'shapes'")
    stored, upright, _ = sizes_of(item.image)
    W, H = (number(content.get(key) or side, key, item.labels[0])
            for key, side in zip(("imageWidth", "imageHeight"), upright))
    if (W, H) not in (stored, upright):
        raise ValueError(f"{item.image} is {upright[0]} x {upright[1]} pixels, but {W} x {H} in "
                         f"{item.labels[0]}")
    for k, shape in enumerate(content["shapes"]):
        try:
            if not isinstance(shape, dict):
                raise ValueError("it is no object in braces")
            kind = shape.get("shape_type") or "polygon"
            points = np.array(shape["points"], float).reshape(-1, 2)
            if kind in ("line", "linestrip", "point", "points"):
                continue
            if kind == "polygon":
                part = points.ravel().tolist()
            elif kind == "rectangle":
                (x0, y0), (x1, y1) = points[[0, -1]] if len(points) == 2 else (points.min(0), points.max(0))
                part = [x0, y0, x1, y0, x1, y1, x0, y1]
            elif kind == "circle":
                turn, radius = np.arange(64) * math.pi / 32, np.hypot(*(points[1] - points[0]))
                part = (points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], 1)).ravel().tolist()
            elif kind == "mask":  # a PNG of the box about it
                with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as png:
                    mask, (x0, y0) = np.zeros((H, W), np.uint8, order="F"), points[0].astype(int)
                    part = np.asarray(png.convert("L"))[: H - y0, : W - x0] > 0
                mask[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
                part = coco_mask.encode(mask)
            else:
                raise ValueError(f"the shape_type {kind!r} is not known")
            group = shape.get("group_id")
            objects.setdefault(k if group is None else f"group {group}", (k, False, []))[2].append(part)
        except Exception as e:
            raise ValueError(f"{item.labels[0]}: shape {k} cannot be drawn ({in_words(e)})") from None
    return [paint(list(objects.values()), H, W, item)]


class Format(NamedTuple):
    title: str  # as it is said
    marks: tuple  # a folder where one of these is found has this format
    find: Callable


# To add one: a find_* and, where need be, a read_* above, and a row here. The first row that fits counts.
FORMATS = {
    "folder": Format("images/ and labels/", ("labels",), find_folder),
    "coco": Format("COCO", ("annotations/panoptic_*2017.json", "annotations/instances_*2017.json"),
                   find_coco),
    "export": Format("COCO as Roboflow, CVAT and Label Studio export it", (
        "*/_annotations.coco.json", "_annotations.coco.json", "annotations/instances_*.json", "result.json"),
        find_export),
    "voc": Format("Pascal VOC (SegmentationObject)",
                  tuple(f"{base}SegmentationObject" for base in ("", "VOC*/", "VOCdevkit/VOC*/")), find_voc),
    "cityscapes": Format("Cityscapes", ("gtFine",), find_cityscapes),
    "bsds500": Format("BSDS500",
                      tuple(f"{base}groundTruth"
                            for base in ("", "data/", "BSDS500/data/", "BSR/BSDS500/data/")), find_bsds500),
    "entity": Format("EntitySeg", ("entity*_*.json", "annotations/entity*", "annotations/*/entity*"),
                     find_entity),
    "ade20k": Format("ADE20K",
                     ("ADE_*.jpg", "images/ADE*", "images/*/ADE_*.jpg", "*/images/ADE*",
                      "*/images/*/ADE_*.jpg"), find_ade20k),
    "labelme": Format("LabelMe (a JSON file beside each image)", ("*.json", "*/*.json", "*/*/*.json"),
                      find_labelme),
}


def others():
    return "; ".join(f.title for name, f in FORMATS.items() if name != "folder")


def format_of(home):
    """The row of FORMATS that a folder's files tell; "folder" where none does: find_folder says what
    lacks."""
    return next((name for name, f in FORMATS.items() for mark in f.marks
                 if any(not junk(path.name) for path in home.glob(mark))), "folder")


def in_words(e):
    """What an exception says, in one line; a library's with its type, as its words alone may say nothing."""
    words = " ".join(str(e).split())[:200]
    return words if type(e) is ValueError and words else f"{type(e).__name__}{': ' * bool(words)}{words}"


def load_json(path):
    """The content of a JSON file in UTF-8 or UTF-16, with or without a byte order mark. Raises ValueError."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: cut off, or no JSON ({in_words(e)})") from None


def read_json(path):
    """The lists images and annotations of a COCO-like JSON file."""
    content = load_json(path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: it has no list '{key}'")
    return content["images"], content["annotations"]


def number(value, name, where=None):
    """An integer out of a JSON file, where it may be a text or 5.0. Raises ValueError."""
    try:
        if not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    where = f"{where}: " if where else ""
    raise ValueError(f"{where}'{name}' is {json.dumps(value)[:40]}, a whole number is needed")


def same_id(value):
    """An id as a text: 5, 5.0 and "5" are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def each(file, entries, make):
    """make(k, entry) for every entry of a JSON list; what is wrong with an entry becomes a bad item."""
    for k, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise ValueError("it is no object in braces")
            yield make(k, entry)
        except KeyError as e:
            yield bad(f"{file}: entry {k} has no key {e}")
        except Exception as e:
            yield bad(f"{file}: entry {k}: {in_words(e)}")


def within(folder, name):
    """folder/name, for a name out of a JSON file, which must not lead elsewhere."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"'file_name' is {json.dumps(name)[:40]}, a text is needed")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ValueError(f"file_name '{name}' is absolute or has '..' in it: refused")
    return str(Path(folder, *parts))


def list_panoptic(file, folder, maps):
    images, annotations = read_json(file)
    paths = {}

    def image(k, entry):
        paths[same_id(entry["id"])] = within(folder, entry["file_name"])

    def annotation(k, entry):
        if same_id(entry["image_id"]) not in paths:
            raise ValueError(f"unknown image id {entry['image_id']}")
        segments = entry["segments_info"] or []
        if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
            raise ValueError("'segments_info' is no list of objects in braces")
        crowds = {number(s["id"], "id"): crowd_of(s) for s in segments}
        return Item(paths[same_id(entry["image_id"])], [within(maps, entry["file_name"])], read_panoptic,
                    crowds)

    return [item for item in (*each(file, images, image), *each(file, annotations, annotation)) if item]


def crowd_of(entry):
    return bool(number(entry.get("iscrowd") or 0, "iscrowd"))


def list_instances(file, *folders):
    """The items of a COCO instances JSON, whose images lie in the first of these folders that has them."""
    images, annotations = read_json(file)
    ids = {same_id(entry["id"]) for entry in images if isinstance(entry, dict) and "id" in entry}
    outlines, objects = [a.get("segmentation") for a in annotations if isinstance(a, dict)], {}
    if outlines and not any(outlines) and any("bbox" in a for a in annotations if isinstance(a, dict)):
        raise ValueError(f"{file}: its {len(outlines)} annotations are boxes only: export polygons or masks")

    def annotation(k, entry):
        if same_id(entry["image_id"]) not in ids:
            raise ValueError(f"unknown image id {json.dumps(entry['image_id'])[:40]}")
        of_image = objects.setdefault(same_id(entry["image_id"]), [])
        of_image.append((k, crowd_of(entry), entry.get("segmentation")))

    def image(k, entry):
        paths = [within(folder, entry["file_name"]) for folder in folders]
        return Item(next((path for path in paths if os.path.exists(path)), paths[0]), [str(file)],
                    read_instances, (number(entry["height"], "height"), number(entry["width"], "width"),
                     objects.get(same_id(entry["id"]), [])))

    return [item for item in (*each(file, annotations, annotation), *each(file, images, image)) if item]


def numbers_in(value):
    """The numbers of nested lists; an RLE, which is no polygon, counts as one of 2."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif value is not None:
            yield value if isinstance(value, (int, float)) else 2


def read_pngs(item):
    """Label PNGs as they are: 8-bit, 16-bit or palette."""
    return [read_label(path) for path in item.labels]


def read_label(path, rgb=False):
    """A label map as (H, W) int32: 8-bit, 16-bit, palette, or in colours, each of which is the id R + 256 G +
    65536 B (black, and what is transparent, 0). rgb: only that. Raises ValueError."""
    with pillow(path, "label map") as f:
        if f.format in LOSSY or "jpeg" in str(f.info.get("compression")):
            raise ValueError(f"a {f.format}, whose compression changes the ids: export it as PNG")
        if getattr(f, "n_frames", 1) > 1:
            raise ValueError(f"{f.n_frames} pages in one file: one file for each label map is needed")
        if f.mode in ("RGB", "RGBA", "LA") and ";16" in str([tile[3] for tile in f.tile]):
            raise ValueError("16 bits a colour, of which 8 are lost: save it in 16-bit grey, an id a pixel")
        mode = f.mode
        colours = mode in ("RGB", "RGBA", "RGBX", "CMYK")
        value = np.asarray(f.convert("RGBA") if colours else f.getchannel(0) if mode in ("LA", "PA") else f)
    if rgb and mode != "RGB":
        raise ValueError(f"{path}: an RGB PNG with ids in its colours is needed, this one is {mode}")
    if colours:
        seen = value[..., 3] > 0
        value = value.view("<u4")[..., 0] & 0xFFFFFF
        value = value if rgb else value * seen
    if value.ndim != 2:
        raise ValueError(f"{path}: a label map has one id or colour a pixel, this one is {mode}")
    # comparisons with nan are false
    if value.dtype.kind == "f" and not ((value == np.round(value)) & (np.abs(value) < 2**31)).all():
        raise ValueError(f"{path}: a label map has whole numbers, this one has others")
    if not rgb and (colours or mode == "L") and value.size:
        ids, pixels, scattered = scattering(value)
        if scattered.mean() > 0.5:  # thin upright things are not
            scattered &= scattering(value.T)[2]
        # people leave a few single pixels of ids; a photo's or a smoothed edge's are a good part of the image
        if len(ids) > 16 and scattered.mean() > 0.5 and pixels[scattered].sum() > 0.01 * value.size:
            raise ValueError(f"{path}: {len(ids)} {'colours' if colours else 'ids'}, most of them in single "
                             f"pixels: no label map, which has one id a pixel, but a photo or smoothed "
                             f"edges: export it without smoothing")
    return value.astype(np.int32)


def scattering(value):
    """The ids of a label map (H, W), their numbers of pixels, and whether most of these are alone in their
    row."""
    flat = value.ravel()
    ends = run_ends(flat)
    ids, which = np.unique(flat[ends], return_inverse=True)
    runs, pixels = np.bincount(which), np.bincount(which, np.diff(ends, prepend=-1))
    return ids, pixels, runs / pixels > 0.6


def ids_of(label):
    """The ids of a label map, sorted; sorting only one pixel of each run is 20 times as fast."""
    flat = label.ravel("K")  # in whichever order they lie
    return np.unique(flat[run_ends(flat)])


def read_masks(item):
    """One file a segment, each with 0 and one more value. Smaller segments over larger ones."""
    masks = []
    for path in item.arg:
        mask = read_label(path)
        if len(ids := ids_of(mask)) > 2 or len(ids) == 2 and ids[0] != 0:
            raise ValueError(f"{path}: one of {len(item.arg)} files of {item.image}, each of which is 0 but "
                             f"for one segment; it has {len(ids)} values")
        if masks and mask.shape != masks[0].shape:
            raise ValueError(f"{path} and {item.arg[0]} differ in size")
        masks.append(mask != 0)
    label = np.zeros(masks[0].shape, np.int32)
    for j, mask in enumerate(sorted(masks, key=lambda mask: -int(mask.sum())), 1):
        label[mask] = j
    return [label]


def sizes_of(path):
    """(W, H) as stored, (W, H) upright, EXIF orientation of an image file."""
    with pillow(path) as image:
        turn, size = orientation(image), image.size
        if image.format == "TIFF" and turn >= 5:  # Pillow gives the upright one
            size = size[::-1]
        return size, size[::-1] if turn >= 5 else size, turn


def orientation(image):
    """EXIF orientation from 1, which is upright, to 8; 1 where the tag is unreadable, or no such number."""
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # of many kinds; viewers show the image
        return 1
    return turn if isinstance(turn, int) and turn in TURNS else 1


def read_labels(item):
    """An item's label maps, as its upright image lies: (H, W) integers each, 0 = unlabelled, -1 = ignore.
    Raises ValueError."""
    stored, upright, turn = sizes_of(item.image)
    # before masks of a wrong size are drawn
    if item.read is read_instances and item.arg[1::-1] not in (upright, stored):
        raise ValueError(f"{item.image} is {upright[0]} x {upright[1]} pixels, but {item.arg[1]} x "
                         f"{item.arg[0]} in {item.labels[0]}")
    labels = []
    for path, label in zip(item.labels, item.read(item), strict=True):
        if label.shape[::-1] == stored != upright:  # drawn on the pixels as they are stored
            label = np.asarray(Image.fromarray(label.astype(np.int32)).transpose(TURNS[turn]))
        elif label.shape[::-1] != upright:
            raise ValueError(f"{path} is {label.shape[1]} x {label.shape[0]} pixels, its image {item.image} "
                             f"{upright[0]} x {upright[1]}: they must agree")
        elif turn > 1 and stored == upright:
            notice(path, "its image is mirrored or turned by an EXIF tag, the label is taken as drawn on the "
                         "upright image")
        top = int(label.max(initial=0))
        suspect = top in (255, 65535) and top not in item.void and item.read is read_pngs
        if suspect and len(ids := ids_of(label)) > 2 and ids[-2] < top - 1:
            notice(path, f"id {top} is a segment like any other; where it is void, as 255 in VOC and "
                         f"Cityscapes, add --void {top}")
        labels.append(np.where(np.isin(label, item.void), -1, label) if item.void else label)
    return labels


def read_panoptic(item):
    """COCO panoptic: the ids of segments_info; crowds are ignored."""
    label = read_label(item.labels[0], rgb=True)
    unknown = sorted(set(ids_of(label).tolist()) - set(item.arg) - {0})
    if unknown:
        raise ValueError(f"{item.labels[0]}: no id encoding of its segments_info: {unknown[0]} (R + 256 G + "
                         f"65536 B) is not there")
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
    except Exception as e:  # whatever scipy says of a bad file
        raise ValueError(f"{item.labels[0]}: not a readable .mat file ({e or type(e).__name__})") from None


def read_instances(item):
    """COCO instances: polygons, uncompressed and compressed RLE. Crowds are ignored."""
    H, W, objects = item.arg
    outlines = [outline for *_, outline in objects]
    if any(outlines) and all(0 <= v <= 1 for v in numbers_in(outlines)):
        raise ValueError(f"{item.labels[0]}: the polygons of {item.image} are shares of its size, from 0 to "
                         f"1: pixels are needed, multiply x by its width and y by its height")
    return [paint(objects, H, W, item)]


def paint(objects, H, W, item):
    """(H, W) int32 of objects (number, is a crowd, segmentation): smaller over larger ones, crowds -1."""
    masks = []
    for k, crowd, segmentation in objects:
        try:
            rle = run_lengths(segmentation, H, W)
        except Exception as e:
            raise ValueError(f"{item.labels[0]}: annotation {k}, of {item.image}: {in_words(e)}") from None
        masks.append((not crowd, -int(coco_mask.area(rle)), k, rle))
    if sum(m[1] == 0 for m in masks) > len(masks) / 2:
        notice(item.image, "most of its objects have no pixel")
    label = np.zeros((W, H), np.int32)  # transposed, as pycocotools keeps masks
    # crowds first, then the largest
    for j, (real, _, _, rle) in enumerate(sorted(masks, key=lambda m: m[:3]), 1):
        np.putmask(label, coco_mask.decode(rle).T, j if real else -1)
    return label.T


def run_lengths(segmentation, H, W):
    """A COCO segmentation as pycocotools' compressed RLE: polygons [[x0, y0, x1, y1, ...], ...], also as
    pairs [x, y] or without the outer brackets, an RLE, or a list of RLE. Raises ValueError for nonsense."""
    if segmentation is None or segmentation == {}:
        raise ValueError("no segmentation in it (null or empty)")
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if not parts:
        raise ValueError("no polygon in it")
    flat = all(isinstance(v, (int, float)) for v in parts)
    if flat or all(isinstance(v, list) and len(v) == 2 and not isinstance(v[0], list) for v in parts):
        parts = [parts]  # one polygon
    polygons, rles = [], []
    for part in parts:
        if isinstance(part, dict):
            rles.append(checked_rle(part, H, W))
            continue
        if not isinstance(part, list):
            raise ValueError(f"a segmentation is a list of polygons [[x0, y0, x1, y1, ...], ...] or an RLE, "
                             f"not {json.dumps(part, default=str)[:40]}")
        try:
            xy = np.array(part, float).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            xy = np.array([np.nan])
        if not np.isfinite(xy).all():
            raise ValueError("a polygon is a list of numbers [x0, y0, x1, y1, ...], this one holds something "
                             "else")
        if len(xy) < 6 or len(xy) % 2:
            raise ValueError(f"a polygon of {len(xy) / 2:g} points [x, y]: 3 are needed")
        x, y = xy[::2], xy[1::2]
        if not (x.max() > 0 and x.min() < W and y.max() > 0 and y.min() < H
                and np.abs(xy).max() < 2 * max(H, W)):
            raise ValueError(f"a polygon outside the image of {W} x {H} pixels")
        polygons.append(xy.tolist())
    rles += coco_mask.frPyObjects(polygons, H, W) if polygons else []
    return coco_mask.merge(rles) if len(rles) > 1 else rles[0]


def checked_rle(rle, H, W):
    """An RLE of COCO as a compressed one. Raises ValueError where it is not one of H x W pixels."""
    if lacks := [key for key in ("size", "counts") if key not in rle]:
        raise ValueError(f"an RLE without '{lacks[0]}'")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list) or [number(v, "size") for v in size] != [H, W]:
        raise ValueError(f"an RLE of {json.dumps(size)[:40]} for an image of {[H, W]} (height, width)")
    if isinstance(counts, list):
        counts = [number(v, "counts") for v in counts]
    elif not isinstance(counts, (str, bytes)):
        raise ValueError(f"an RLE whose counts are neither a list nor a text, but {json.dumps(counts)[:40]}")
    runs = counts if isinstance(counts, list) else rle_runs(counts)
    if sum(runs) != H * W or min(runs) < 0:
        raise ValueError(f"an RLE whose counts add up to {sum(runs)}, not to {H} * {W} = {H * W} pixels")
    if isinstance(counts, list):
        return coco_mask.frPyObjects(dict(size=[H, W], counts=counts), H, W)
    return dict(size=[H, W], counts=counts.encode() if isinstance(counts, str) else counts)


def rle_runs(counts):
    """The run lengths of a compressed COCO RLE: 5 bits a character, 32 = more follow, 16 in the last =
    negative; from the fourth on, numbers are differences to the last but one."""
    c = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((c & 32) == 0)
    if len(c) == 0 or ends[-1:] != len(c) - 1 or (c < 0).any() or (c > 63).any():
        raise ValueError("an RLE that is cut off or has characters that do not belong there")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(c)) - np.repeat(starts, ends - starts + 1)
    if digit.max() > 7:
        raise ValueError("an RLE with a number of more than 40 bits")
    x = np.add.reduceat((c & 31) << (5 * digit), starts) - np.where(c[ends] & 16, 32 << (5 * digit[ends]), 0)
    x[1::2], x[2::2] = np.cumsum(x[1::2]), np.cumsum(x[2::2])
    return x.tolist()


@contextmanager
def pillow(path, what="image"):
    """Image.open(path); whatever Pillow has to say of a bad file becomes a ValueError with the file's
    name."""
    try:
        with Image.open(path) as f:
            yield f
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS} pixels; "
                         f"scale it down first") from None
    except UnidentifiedImageError:
        why = "the file is empty" if os.path.getsize(path) == 0 else "no image format that Pillow knows"
        if Path(path).suffix.lower() in HEIC:
            why = "HEIC, which Pillow reads after: pip install pillow-heif; or save it as JPEG"
        raise ValueError(f"{path}: not a readable {what} ({why})") from None
    except Exception as e:  # Pillow's decoders raise any kind
        raise ValueError(f"{path}: not a readable {what} ({in_words(e)})") from None


def read_image(path):
    """Any image that Pillow reads, as an upright 8-bit RGB image. Raises ValueError with the file's name."""
    return open_image(path)[0]


def open_image(path, size=None):
    """Upright 8-bit RGB image, and its (W, H). With size, a JPEG may come out smaller, its longer side at
    least 3 `size`."""
    with pillow(path) as image:
        deep = ";16" in str([tile[3] for tile in image.tile])  # Pillow keeps the higher 8 bits of colours
        full = image.size
        if (pages := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            notice(path, f"of its {pages} pages, the first is taken: save the others as files")
        if size:
            # decoded at 1/2, 1/4 or 1/8; at 2 `size`, the area filter after it would err twice as much
            image.draft(None, tuple(3 * side for side in fitted(*full, max(size, LOOK // 3))))
        try:
            image.load()
        except OSError as e:
            if "truncated" not in str(e):
                raise
            image = completed(path, image.format)
        turn = orientation(image)  # now: Pillow turns a TIFF while it loads it
        image = image.transpose(TURNS[turn]) if turn > 1 else image
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # 16-bit and float grey
            image = Image.fromarray(eight_bits(path, np.asarray(image).astype(np.float64), image.mode != "F"))
        elif deep and np.percentile(np.asarray(image)[..., :-1 if "A" in image.mode else None], 99.9) < 64:
            raise ValueError("16 bits a colour, of which only the lower ones are used: save it with 8 bits")
        if "A" in image.getbands() or "transparency" in image.info:  # on white; if white itself, on black
            image = image.convert("RGBA")
            seen = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).reshape(-1, 4).astype(float)
            white = (seen[:, :3] * seen[:, 3:]).sum() > 3 * 225 * seen[:, 3].sum()
            ground = (0, 0, 0, 255) if white else (255, 255, 255, 255)
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
        image = stretched(path, image if image.mode == "RGB" else image.convert("RGB"))
        return image, full[::-1] if turn >= 5 else full


def stretched(path, image):
    """An RGB image; if nearly all of its values (from the 0.1st to the 99.9th percentile) lie in less than
    two thirds of the range, as in a fluorescence microscope's, spread over all of it, but at most 8 times as
    far apart: networks and people see little in such an image, and in one of less contrast it may be
    noise."""
    small = image  # as a network sees it; of a JPEG that is decoded smaller, the same
    if max(image.size) > LOOK:
        small = image.resize(fitted(*image.size, LOOK), Image.Resampling.BOX)
    count = np.reshape(small.histogram(), (3, 256)).sum(0).cumsum()
    low, high = (int(v) for v in np.searchsorted(count, (0.001 * count[-1], 0.999 * count[-1])))
    if high == low or high - low >= 170:
        return image
    notice(path, "its contrast was raised, as its values fill less than two thirds of the range")
    gain, middle = min(255 / (high - low), 8), (low + high) / 2
    return image.point([min(255, max(0, round((v - middle) * gain + 127.5))) for v in range(256)] * 3)


def eight_bits(path, value, whole):
    """Numbers of any range (H, W) as uint8: by the type's range (of floats, the largest) or, where nearly all
    lie in less than half of it, as of 12 bits in 16, or some below 0, from the 0.1st to the 99.9th
    percentile."""
    if not np.isfinite(value).all():
        raise ValueError("it has pixels that are infinite or no numbers")
    low, high = np.percentile(value, (0.1, 99.9))
    bottom, top = 0.0, max(float(value.max()), 65535 if whole else 1e-9)  # 32-bit integers: above 65535
    if high > low and (value.min() < 0 or high - low < top / 2):
        bottom, top = low, high
        notice(path, "its values were stretched, as they fill little of the range of their type")
    return ((value - bottom) / (top - bottom) * 255).clip(0, 255).round().astype(np.uint8)


def completed(path, kind):
    """The image in a file that lacks its last bytes only. Raises OSError where more is missing."""
    data, end = Path(path).read_bytes(), b"\xff\xd9" if kind in ("JPEG", "MPO") else bytes(64)

    def decoded(data):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image

    cut = OSError("cut off: get it anew or, if a viewer shows all of it, save it again from there")
    try:
        image = decoded(data + end)
        if kind in ("JPEG", "MPO"):
            # It decodes however much is missing. The last bytes that are there must belong to the lowest
            # blocks, and hardly anything there be grey for want of data.
            pixels, less = np.asarray(image), np.asarray(decoded(data[:-64] + end))
            rows = np.flatnonzero((pixels != less).reshape(image.height, -1).any(1))
            grey = (pixels[-16:] == 128).sum() > 0.01 * pixels.size
            if grey or not len(rows) or rows[-1] < image.height - 16:
                raise cut
    except Exception:
        raise cut from None
    notice(path, "the file lacks its last bytes, but is whole otherwise")
    return image


