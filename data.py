"""Images with label maps: shapes, files of all formats.FORMATS, and mixtures; augmentation, batches.

What it is: `load(name, split, size, ...)` returns a data set with len() and get(positions); `augment` and
`normalise` work on batches on any device. What it is not: it knows nothing of bits, noise or networks. Files
are read by formats.py and packed by packing.py; scenes and mixtures are drawn by scenes.py.

    data = load("shapes", "train", 64)
    # (4, 64, 64, 3) uint8, (4, 64, 64) int64, (4, 2): height and width of the label maps
    images, labels, sizes = data.get([0, 1, 2, 3])
    image, inside = normalise(images, sizes)  # (4, 3, 64, 64), (4, 64, 64) bool: where there is image

Label maps hold any ids, -1 = ignore. Images keep their shape: the longer side becomes `size`, placed
top-left, the rest is padding (zero after normalisation, ignored in the labels).

    python data.py coco --download --root data  # fetch COCO into data/coco
    python data.py coco --root data --size 128  # decode and resize it once, into cache/; train.py does so too
    python data.py path/to/folder               # the same for a folder of any format in formats.FORMATS
"""

import argparse
import functools
import hashlib
import itertools
import os
import sys
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def options(argv=None):
    parser = argparse.ArgumentParser(description="Fetch COCO, or decode and resize a data set, for training "
                                                 "to read it fast.")
    parser.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    option = parser.add_argument
    option("name", help="coco, entity, ade20k, bsds500, or a folder: images/ and labels/, or another format")
    option("--root", default="data", help="the data set lies in ROOT/NAME or in ROOT itself (%(default)s)")
    option("--split", nargs="+", default=["train", "val"], choices=["train", "val", "test"],
           help="(train val)")
    option("--size", type=int, default=128, help="longer side of the label maps, in pixels (%(default)s)")
    option("--crop", type=float, default=1.0, help="as in train.py: crops need larger training images "
                                                   "(%(default)s; preset photo: 0.5)")
    option("--detail", type=int, default=1, help="of the network, see model.SIZES (%(default)s; photo: 2)")
    option("--cache", default="cache", help="where packed copies go (%(default)s)")
    option("--unlabelled", default="segment", help="id 0: one segment, or ignore (%(default)s)")
    option("--void", default="", help="ids that are ignored, e.g. 255 (VOC, Cityscapes); several: 254,255")
    option("--components", action="store_true", help="labels are classes: their connected parts become the "
                                                     "segments")
    option("--workers", type=int, default=CORES, help="processes (%(default)s)")
    option("--max_bad", "--max-bad", type=float, default=0.01,
           help="share of unusable items that is too much (%(default)s)")
    option("--download", action="store_true", help="only fetch COCO, into ROOT/coco; goes on where it "
                                                   "stopped")
    option("--server", default="http://images.cocodataset.org", help="where from (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # before torch, whose import takes seconds: --help and mistakes end here

import numpy as np
import torch
import torch.nn.functional as F

from engine import ahead, program
from frame import MEAN, STD, coarser, normalise
from sources.download import download
from sources.formats import FORMATS, format_of, others
from sources.hints import NUMBERS, draw_hints  # noqa: F401 (train.py enters sources/ by this door)
from sources.packing import pack
from sources.readers import Unread, ring  # noqa: F401 (Unread for train.py)
from sources.scenes import Mixture, Shapes


def load(name, split, size, root="data", cache="cache", seed=0, unlabelled="segment", components=False,
         workers=CORES, max_bad=0.01, compose=0.0, detail=1, void=""):
    """The data set `name`: shapes, coco, entity, ade20k, bsds500, or a folder. split: train, val or test.

    Several, with commas between them, are a mixture:
    "photos:3,streets:components:ignore:void=255,shapes:0.5". After the name may stand its weight (1),
    `components`, `ignore` (unlabelled pixels) and `void=ID` (repeated for more), for this set alone. Of a
    mixture, only the training split is one: val and test are the first set's.

    root: where the set lies, as root/name or itself; cache: where packed copies go; seed: of shapes;
    unlabelled: whether id 0 is a segment or ignored; components: label maps hold classes, whose connected
    parts are the segments; workers: processes that pack; max_bad: share of unusable items from which on
    packing fails; compose: share of training samples that are scenes composed of pieces of the images
    (`compose`). void: ids with commas between them, of which pixels are ignored. size: longer side of the
    label maps; detail: that of the images, as a multiple of size; above 1 for a single set only. Raises
    ValueError or OSError with what to do.
    """
    if unlabelled not in ("segment", "ignore"):
        raise ValueError(f"unlabelled is 'segment' or 'ignore', not '{unlabelled}'")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is train, val or test, not '{split}'")

    def load_one(name, settings):
        if name == "shapes":
            return Shapes(split, size, seed, detail)
        options = dict(size=size, detail=detail, unlabelled=settings["unlabelled"] or unlabelled,
                       components=settings["components"] or components, split_seed=0,  # names packed copies
                       void=settings["void"] or parse_void(void))
        files, listing = find(name, split, root, options["void"])
        if name not in NAMED and split == "train" and os.environ.get("RANK", "0") == "0":
            print(f"{name}: {FORMATS[format_of(Path(name))].title}")
        return pack(files, listing, Path(cache), f"{Path(name).resolve().name}-{split}", options, workers,
                    max_bad)

    parts = parse_parts(name)
    sets = [load_one(part, settings) for part, _, settings in (parts if split == "train" else parts[:1])]
    mixed = split == "train" and (len(parts) > 1 or compose)
    return Mixture(sets, [weight for _, weight, _ in parts], seed, compose) if mixed else sets[0]


def parse_parts(name):
    """The parts of a mixture, or of one data set, each as of parse_part; a folder of just this name is one
    set."""
    whole = [(name, 1.0, dict(components=False, unlabelled=None, void=()))]
    return whole if Path(name).is_dir() else [parse_part(part) for part in name.split(",")]


def parse_void(text):
    """"0,255" -> (0, 255), ids whose pixels are ignored; "" -> (). Raises ValueError."""
    try:
        return tuple(sorted({int(word) for word in str(text).split(",")})) if str(text).strip() else ()
    except ValueError:
        raise ValueError(f"--void '{text}' is no id, "
                         f"nor several with commas between them, e.g. 255") from None


def contents(data):
    """What a training set holds, whatever its path: a digest of names, sizes and numbers of label maps."""
    if hasattr(data, "sets"):
        return [contents(part) for part in data.sets]
    if not hasattr(data, "items"):
        return data.name
    text = repr((data.names, data.sizes.tolist(), data.first.tolist()))
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def same(old, new, old_contents, data):
    """Whether two texts of --dataset mean one training set: the same paths, spelt otherwise, or moved files.

    old_contents: what `contents` gave for the old one; data: the new one's.
    """
    (old_names, *old_rest), (new_names, *new_rest) = (zip(*parse_parts(text)) for text in (old, new))
    moved = contents(data) == old_contents
    return old_rest == new_rest and (moved or list(map(place, old_names)) == list(map(place, new_names)))


def place(name):
    """Of a data set: its name, or its whole path."""
    return name if name in NAMED else Path(name).resolve()


def as_trained(config, name, given):
    """dict(components, unlabelled, void) of a data set, None where it is not said -> the same, all said: as a
    run of train.py with the options `config` read it, which is printed, or else as train.py does by
    default."""
    usual = dict(components=False, unlabelled="segment", void=())
    whole = {**usual, **config, "void": parse_void(config.get("void", ""))}
    parts = parse_parts(str(config.get("dataset") or "shapes"))
    own = next((own for other, _, own in parts if place(other) == place(name)), None)
    trained = usual if own is None else {key: own[key] or whole[key] for key in usual}
    taken = {key: value for key, value in trained.items() if given[key] is None}
    if told := [f"{key} {value}" for key, value in taken.items() if value != usual[key]]:
        print(f"{name} is read as in training: {', '.join(told)}")
    return {**given, **taken}


def names(text):
    """The names alone of the parts."""
    return [name for name, _, _ in parse_parts(text)]


def parse_part(text):
    """name[:weight][:components][:ignore][:void=ID] -> name, weight, dict(components, unlabelled, void).
    Raises ValueError."""
    words, settings, weight = text.split(":"), dict(components=False, unlabelled=None, void=()), 1.0
    while len(words) > 1:
        if words[-1] == "components":
            settings["components"] = True
        elif words[-1] == "ignore":
            settings["unlabelled"] = "ignore"
        elif words[-1].startswith("void="):
            settings["void"] = parse_void(",".join([words[-1][5:], *map(str, settings["void"])]))
        elif words[-1].replace(".", "", 1).isdigit() and float(words[-1]) > 0:
            weight = float(words[-1])
        else:
            break  # a part of the name: C:\\photos
        words.pop()
    if not words[0]:
        raise ValueError(f"'{text}' is not a data set: of several, each is "
                         "name[:weight][:components][:ignore][:void=ID]")
    return ":".join(words), weight, settings


# found under root; all else is the path of a folder
NAMED = ("shapes", "coco", "entity", "ade20k", "bsds500")


def find(name, split, root="data", void=()):
    """(files, listing) of a data set of files; listing() gives its items, which ignore the ids `void`, too.
    Raises ValueError or OSError with what to do."""
    if name not in NAMED and not Path(name).is_dir():
        raise ValueError(f"data set '{name}' is neither shapes, nor coco, nor a folder with images/ and "
                         f"labels/, nor entity, ade20k, bsds500, nor a folder of: {others()}")
    find_files = FORMATS[name if name in NAMED else format_of(Path(name))].find
    try:
        files, listing = find_files(Path(root) / name if name in NAMED else Path(name), split)
    except FileNotFoundError as missing:
        if name not in NAMED:
            raise
        try:
            files, listing = find_files(Path(root), split)
        except FileNotFoundError:
            raise missing from None
    return files, lambda: [item._replace(void=item.void + tuple(void)) for item in listing()]


def selection(data, limit):
    """Positions of at most `limit` items of a data set, ascending, the same at every call: drawn at random,
    as files in the order of their names are city after city, or a video frame by frame; of endless shapes the
    first."""
    if len(data) >= 2**31:
        return list(range(limit))
    return np.sort(np.random.default_rng(0).permutation(len(data))[:limit]).tolist()


def originals(name, split, root="data", void=()):
    """The listing of a data set of files, which Packed.items are numbers in; [] of shapes, which have no
    files."""
    return [] if name == "shapes" else find(name, split, root, void)[1]()


# ------------------------------------------------------------------------------------------------------------
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
    """n uniform numbers for each of the samples `start` to `start + count`, from a seed each: (count, n)
    float32."""
    return np.stack([np.random.Generator(np.random.Philox(key=[2**32 + seed, i])).random(n, np.float32)
                     for i in range(start + rank, start + count, ranks)])


def samples(data, start, count, seed, rank, ranks, batch, first, last):
    """Rows first to last - 1 of a rank's share of batch number `batch` of `batches`, as that yields them."""
    begin, n = start + batch * count + first * ranks, (last - first) * ranks
    u = uniforms(begin, n, seed, 21, rank, ranks)
    return *data.get(order(begin, n, len(data), seed, rank, ranks),
                     u[:, 19]), torch.from_numpy(np.delete(u, 19, axis=1))


def batches(data, start, count, seed, workers=0, rank=0, ranks=1, pin=False):
    """Endless batches of `count` samples (over all ranks), from sample number `start` on: images, labels,
    sizes, u.

    u (B, 20): the samples' uniform numbers, for `augment`. Batches depend on start, count, seed and rank
    alone, not on the number of workers: processes that make them ahead; 0: a thread of this one. pin: in
    page-locked memory, for CUDA; copy a batch before asking for the next (`ring`). Raises Unread where a
    process fails.
    """
    if count % ranks:
        raise ValueError(f"a batch of {count} samples cannot be shared by {ranks} processes equally")
    make, rows = functools.partial(samples, data, start, count, seed, rank, ranks), count // ranks

    def whole(batch):
        return tuple(part.pin_memory() if pin else part for part in make(batch, 0, rows))

    yield from ring(make, rows, workers, pin) if workers else ahead(whole, itertools.count())


def packed_side(size, crop, detail=1):
    """Side of packed images, for random crops that keep at least the share `crop` of it: midway between both
    scales.

    With a detail above 1 at least the side that the network sees, and no more than that needs: crops are
    blurred then.
    """
    return max(size * detail, round(size / crop**0.5))


def unchanged(images, labels, sizes, detail=1):
    """What `augment` returns, without a change of the images: x, inside and labels, -1 outside."""
    labels, sizes = coarser(labels, sizes, detail)
    x, inside = normalise(images, sizes, detail)
    return x, inside, labels.masked_fill(~inside, -1)


def augment(images, labels, sizes, u, size=None, crop=1.0, jitter=1.0, detail=1, turns=False, negative=0.0):
    """The paper's augmentation, each sample by its own uniform numbers u (B, 16), on the images' device.

    Horizontal flip (p 0.5); gamma, brightness and contrast, hue/saturation/value (p 0.3 each, times
    `jitter`); RGB shift (p 0.1, times `jitter`); rotation within +-20 degrees (p 0.3). Beyond the paper, with
    crop < 1 and u (B, 20): a random part of at least the share `crop` of the sides, stretched by up to
    2^(1/4) one way and squeezed as much the other. turns: besides, by 0 to 3 quarter turns, in the same
    frame, so that the ends of a photo that is not square fall outside. negative: the share of samples that
    see the photo's negative.
    size: side of the result, the images' own by default. Returns what `normalise` does, and the labels; new
    pixels are outside and -1. With detail d, the labels have the side `size`, the images d times as many
    pixels, folded.
    """
    B, T = images.shape[:2]
    S, device = size or T // detail, images.device
    if B > 8 and device.type == "cpu":  # pieces that fit the processor's cache
        pieces = zip(*(v.split(8) for v in (images, labels, sizes, u)))
        return tuple(torch.cat(v) for v in zip(*(augment(*piece, size, crop, jitter, detail,
                                                         turns, negative) for piece in pieces)))
    u = u.to(device, non_blocking=device.type != "mps").T  # (16 or 20, B)
    x = recoloured(images, u, jitter, negative)
    old = sizes.to(device, non_blocking=device.type != "mps").T.float()  # (2, B): h, w
    row, col = source_pixels(old, u, T, S, crop, detail, turns)
    last_row, last_col = old.view(2, B, 1, 1) - 1
    # (B, S, S), the label's
    label_row, label_col = (v[:, 0].round() if detail == 1 else v.mean(1).round() for v in (row, col))
    row_in = torch.minimum(label_row.clamp(min=0), last_row)
    col_in = torch.minimum(label_col.clamp(min=0), last_col)
    inside = (label_row == row_in) & (label_col == col_in)
    nearest = row_in.mul_(T).add_(col_in).long()  # (B, S, S)
    labels = torch.where(inside, labels.view(B, -1).gather(1, nearest.view(B, -1)).view(B, S, S), -1)
    # clamped to the valid part, so that the padding's black does not bleed in at its border
    row = torch.minimum(row.clamp_(min=0), last_row[:, None])
    col = torch.minimum(col.clamp_(min=0), last_col[:, None])
    # (B, d^2, S, S, 2), x before y, in [-1, 1]; 5 times faster than stack
    grid = torch.view_as_real(torch.complex(col, row)).mul_(2 / T).add_(1 / T - 1).flatten(1, 2)
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False).view(B, -1, S, S)
    return x.mul_(inside[:, None].float()), inside, labels


def recoloured(images, u, jitter, negative=0.0):
    """(B, T, T, 3) uint8 -> (B, 3, T, T) float32, normalised, of other colours. u (16 or 20, B): uniform."""
    B, T = images.shape[:2]
    r = 2 * u[6:16] - 1  # (10, B) in [-1, 1]

    def when(i, amount, neutral=0.0, p=0.3):  # (B,)
        return torch.where(u[i] < jitter * p, amount, neutral)

    # a power, then brightness, contrast, hue, saturation, value and shift as one affine map. A turn of the
    # hue is a rotation about the grey axis, whose matrix is circulant: rows (a, b, c), (c, a, b), (b, c, a)
    gamma, contrast = when(1, 2 ** (0.5 * r[0]), 1.0), when(2, 1 + 0.2 * r[1], 1.0)
    brightness = when(2, 0.2 * r[2])
    turn, chroma, value = when(3, 0.35 * r[3]), when(3, 1 + 0.3 * r[4], 1.0), when(3, 1 + 0.15 * r[5], 1.0)
    near, across = chroma * turn.cos() / 3, chroma * turn.sin() / 3**0.5
    a, b, c = (contrast * value * v for v in (1 / 3 + 2 * near, 1 / 3 - near - across, 1 / 3 - near + across))
    offset = value * (0.5 - 0.5 * contrast + brightness) + when(4, 0.08 * r[6:9], p=0.1)  # (3, B)
    # the same map takes mean and deviation off
    rows = zip(((a, b, c), (c, a, b), (b, c, a)), STD)
    matrix = torch.stack([v / std for row, std in rows for v in row])  # (9, B)
    offset = torch.stack([(v - mean) / std for v, mean, std in zip(offset, MEAN, STD)], dim=1)  # (B, 3)
    # (B, 256): a table spares a power a pixel
    powers = (torch.arange(256, device=images.device) / 255) ** gamma[:, None]
    powers = torch.where(u[4, :, None] > 1 - negative, powers.flip(1), powers)  # shifts: its lower end
    x = powers.gather(1, images.permute(0, 3, 1, 2).reshape(B, -1).long())
    x = torch.baddbmm(offset[..., None], matrix.T.reshape(B, 3, 3), x.view(B, 3, -1)).view(B, 3, T, T)
    for channel, mean, std in zip(x.unbind(1), MEAN, STD):
        channel.clamp_(-mean / std, (1 - mean) / std)
    return x


def source_pixels(old, u, T, S, crop, detail, turns=False):
    """Where each new pixel comes from, by flip, rotation and crop: its row and its column in the old image.

    old (2, B): height and width of the valid part of the T x T old pixels; u (16 or 20, B): uniform. Each
    result is (B, d^2, S, S): pixels of the new image, folded as a network of detail d sees it; beyond the
    valid part they come from nowhere.
    """
    new = old if S == T else (old * S / (2 * T)).ceil().mul(2).clamp(max=S)  # as `frame.fitted`
    turn = torch.where(u[5] < 0.3, (2 * u[15] - 1) * torch.pi / 9, 0.0)
    if turns:
        turn = turn + (8 * u[0]).floor() * (torch.pi / 2)  # u[0] flips as well: one of eight ways
    cos, sin = turn.cos(), turn.sin()
    fine, side = new * detail, S * detail  # the image's
    middle, scale = (old - 1) / 2, old / fine
    if crop < 1:
        stretch = 2 ** (0.5 * u[19] - 0.25)  # (B,); as shares of both sides: (2, B)
        zoom = ((1 - (1 - crop) * u[16]) * torch.stack([stretch, 1 / stretch])).clamp(crop, 1)
        middle, scale = middle + (1 - zoom) * old * (u[17:19] - 0.5), scale * zoom
    axis = torch.arange(side, device=old.device)
    dy, dx = (axis - (n[:, None] - 1) / 2 for n in fine)  # (B, d S)
    scale_y, scale_x = scale[0], scale[1] * torch.where(u[0] < 0.5, -1.0, 1.0)
    beyond = [torch.where(axis < n[:, None], 0.0, 1e6) for n in fine]  # the valid part
    # the old row and column, each as what the new y says of it and what the new x says
    row_y = (scale_y * cos)[:, None] * dy + middle[0][:, None] + beyond[0]
    row_x = (scale_y * sin)[:, None] * dx
    col_x = (scale_x * cos)[:, None] * dx + middle[1][:, None] + beyond[1]
    col_y = (scale_x * sin)[:, None] * dy
    # folded at once, (B, d^2, S, S): cheaper than pixel_unshuffle after sampling
    row_y, col_y, row_x, col_x = (v.view(-1, S, detail).mT.contiguous() for v in (row_y, col_y, row_x, col_x))
    return ((row_y[:, :, None, :, None] + row_x[:, None, :, None]).flatten(1, 2),
            (col_x[:, None, :, None] - col_y[:, :, None, :, None]).flatten(1, 2))


# ------------------------------------------------------------------------------------------------------------
# Command line: fetch COCO, pack a data set


@program("data.py", "run the same command again to go on")
def main(argv=None):
    a = options(argv)
    try:
        if not 0 <= a.max_bad <= 1:
            raise ValueError(f"--max_bad is a share, from 0 to 1, not {a.max_bad}")
        if a.download:
            if a.name != "coco":
                raise ValueError(f"--download fetches coco only; get {a.name} from its authors")
            download(Path(a.root) / "coco", a.split, a.server)
            print(f"COCO is in {Path(a.root) / 'coco'}; now try: python train.py --dataset coco --root "
                  f"{a.root}")
            return 0
        if not 0.01 <= a.crop <= 1 or min(a.size, a.detail, a.workers) < 1:
            raise ValueError(f"--crop is from 0.01 to 1, --size, --detail and --workers at least 1, not "
                             f"{a.crop}, {a.size}, {a.detail} and {a.workers}")
        if names(a.name) == ["shapes"]:
            raise ValueError("shapes are drawn while training: there is nothing to prepare")
        for split in a.split:
            side, detail = a.size, a.detail
            if split == "train":
                side, detail = packed_side(a.size, a.crop, a.detail), 1
            parts = [a.name] if Path(a.name).is_dir() else a.name.split(",")
            for part in parts if split == "train" else parts[:1]:
                if names(part) == ["shapes"]:
                    continue
                data = load(part, split, side, a.root, a.cache, unlabelled=a.unlabelled, detail=detail,
                            components=a.components, workers=a.workers, max_bad=a.max_bad, void=a.void)
                print(f"{names(part)[0]} {split}: {len(data):,} images, {len(data.labels):,} label maps of "
                      f"{side} x {side} pixels, in {data.folder}")
    except (ValueError, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
