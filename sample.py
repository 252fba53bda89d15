"""Segment images: several plausible answers for each, where they agree, and a hand on the wheel.

    python sample.py --n 8 photo.jpg                                           # newest checkpoint under out/, or weights/photo.pt
    python sample.py --n 4 --out masks --resume photos/ a.png                  # a folder and a file; go on where it stopped
    python sample.py --points "120,80 160,90; 30,200" photo.jpg                # the first two belong together, the third apart
    python sample.py --init samples/photo/medoid.png --strength 0.4 photo.jpg  # correct a map by hand, sample again
    torchrun --nproc_per_node 8 -- sample.py --n 4 photos/                     # the images are shared among 8 GPUs

For each image a folder --out/<stem>/ (<name>_<suffix> where two stems are the same), everything at its own size:
    labels_00.png ...  one id a pixel, coloured when looked at (16-bit grey from 255 ids); 0 is never used
    overlay_00.png ... the same over the image; the same place has the same colour in every sample
    medoid.png         the sample that agrees most with the others
    consensus.png      the mean of their soft bits, tidied as they are, decoded
    grouping.png       one map of all: pixels are together that enough samples put together
    uncertainty.png    the share of samples that see a boundary, and the entropy of the mean bits (paper, Eq. 3)
    panel.png          all of it in one picture
    segments.json      the medoid's segments in COCO's format (pycocotools reads it): RLE, area, box, confidence = the mean
                       over the other samples of the best IoU there
--format coco_panoptic adds --out/panoptic.json and --out/panoptic/<name>.png. As a function, from Python:

    from sample import load_checkpoint, segment
    result = segment(Image.open("photo.jpg"), load_checkpoint("out/shapes-tiny/ckpt.pt"), n=8)
    result.labels, result.grouping, result.boundary                            # (8, H, W), (H, W), (H, W)
"""

import argparse
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, PngImagePlugin
from pycocotools import mask as coco_mask
from tqdm import tqdm

from bits import Codec, entropy
from checkpoint import newest
from data import normalise
from diffusion import Diffusion, fused, sample
from formats import IMAGE_TYPES, fitted, read_image, read_label, resize_image
from metrics import contingency, grouping, iou_matrix, medoid, pairwise
from model import UNet
from pictures import colours, grid, outline, overlay, panel, shade, side_of, subsample, uncertainty
from tidy import tidy

MARK = "bitseg sample.py"                        # in every file written: others are never overwritten
SHIPPED = Path(__file__).parent / "weights" / "photo.pt"


@dataclass
class Model:
    """A network with all that is needed to sample from it."""

    net: torch.nn.Module
    codec: Codec
    diffusion: Diffusion
    image_size: int
    sampling: dict                               # steps, guidance, sampler, variance, smooth: this network's defaults
    dataset: str
    step: int
    tidy: dict = field(default_factory=lambda: dict(least=0, merge=0.0))           # its answers' (tidy.tidy)

    @property
    def detail(self):
        """The image's resolution as the network sees it, as a multiple of image_size."""
        return getattr(self.net, "detail", 1)


def read_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint file, or in the one before it where it is damaged. Raises ValueError naming the file."""
    content, used, problem = newest(path, device)
    if content is None:
        raise ValueError(f"{path}: no such file; train one with: python train.py")
    if problem:
        print(f"{problem}; using the one before, {used}", file=sys.stderr)
    return content


def load_checkpoint(path, device="cpu"):
    """The EMA network of a checkpoint, ready to sample from."""
    c = read_checkpoint(path, device)
    net = UNet(**c["network"])
    try:
        net.load_state_dict(c["ema"])
    except RuntimeError as e:
        raise ValueError(f"{path}: its weights do not fit its network ({str(e).splitlines()[-1].strip()})") from None
    net = net.to(device).eval().requires_grad_(False)
    return Model(net, Codec(**c["codec"]), Diffusion(**c["diffusion"]), c["image_size"], {"smooth": 0.0, **c["sampling"]},
                 c["dataset"], c["step"], {"least": 0, "merge": 0.0, **c.get("tidy", {})})


def set_tidy(model, least, merge):
    """The command line's least and merge instead of the checkpoint's, where given (not None). Raises ValueError."""
    model.tidy.update({k: v for k, v in dict(least=least, merge=merge).items() if v is not None})
    if min(model.tidy.values()) < 0 or any(model.tidy.values()) and model.codec.encoding == "rgb":
        raise ValueError(f"--least and --merge must be 0 (off) or more, and 0 with the encoding rgb, not {model.tidy['least']} and "
                         f"{model.tidy['merge']:g}")


def newest_checkpoint(root="out", shipped=SHIPPED):
    """The checkpoint under root that was written last; else the weights that come with the repository. Raises ValueError."""
    found = sorted(Path(root).glob("**/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found and not shipped.exists():
        raise ValueError(f"no checkpoint under {root}/, and no {shipped}: train one first (python train.py, about 5 minutes "
                         f"on a laptop), or name one with --ckpt")
    return found[-1] if found else shipped


# ---------------------------------------------------------------------------------------------------------------------
# Prompts. Hints and initial maps are label maps of the image's own size; 0 and below = not given.


def shrink(ids, height, width):
    """(H, W) ids -> (height, width): the most frequent id above 0 of the pixels that fall there, 0 where there is none."""
    (rows, cols), K = (np.arange(max(a, b)) for a, b in zip(ids.shape, (height, width))), height * width
    ids = ids[rows * ids.shape[0] // len(rows)][:, cols * ids.shape[1] // len(cols)]           # at least height x width
    place = (rows * height // len(rows))[:, None] * width + cols * width // len(cols)
    names, rank = np.unique(ids[ids > 0], return_inverse=True)
    votes, count = np.unique(rank * K + place[ids > 0], return_counts=True)
    votes = votes[np.argsort(count, kind="stable")]
    out = np.zeros(K, np.int64)
    out[votes % K] = names[votes // K]                                             # the last one stays
    return out.reshape(height, width)


def hint_map(width, height, points="", boxes=(), drawn=None):
    """Points, boxes and drawn hints as one hint map (height, width) int64. Raises ValueError.

    points: "x,y x,y;x,y", groups of clicks: each is a disc of 2 % of the longer side, smaller if another group is near.
    boxes: (x0, y0, x1, y1), each about one segment: an ellipse of half its size is known; small boxes lie over large ones,
    points and drawn (height, width) over all.
    """
    out, y, x = np.zeros((height, width), np.int64), np.arange(height)[:, None], np.arange(width)
    drawn = out if drawn is None else drawn
    if drawn.shape != out.shape:
        raise ValueError(f"the hint has {drawn.shape[1]} x {drawn.shape[0]} pixels, but the image {width} x {height}")
    first = max(0, int(drawn.max())) + 1                                           # the first id not taken
    for i, (x0, y0, x1, y1) in enumerate(sorted(boxes, key=lambda b: (b[0] - b[2]) * (b[3] - b[1]))):
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"box {x0:g},{y0:g},{x1:g},{y1:g} does not lie in the image of {width} x {height} pixels")
        core = ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 + ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 <= 0.25
        core[int((y0 + y1) / 2), int((x0 + x1) / 2)] = True                        # at least one pixel
        out = np.where(core, first + i, out)
    try:
        clicks = [(g, *map(float, p.split(","))) for g, group in enumerate(points.split(";")) for p in group.split()]
        clicks = [(first + len(boxes) + g, int(px), int(py)) for g, px, py in clicks]
    except (ValueError, OverflowError):
        raise ValueError(f"points '{points}' are not of the form \"x,y x,y;x,y\"") from None
    for g, px, py in clicks:
        if not (0 <= px < width and 0 <= py < height):
            raise ValueError(f"point {px},{py} lies outside the image of {width} x {height} pixels")
        apart = min([np.hypot(px - qx, py - qy) for other, qx, qy in clicks if other != g], default=np.inf)
        if apart == 0 or drawn[py, px] > 0:
            raise ValueError(f"contradictory hints: point {px},{py} belongs to something else already")
        out = np.where(np.hypot(y - py, x - px) <= min(0.02 * max(width, height), apart / 2.1), g, out)
    return np.where(drawn > 0, drawn, out)


@dataclass
class Job:
    """An image in the network's frame of S x S pixels, what is known about it, and its samples so far."""

    image: np.ndarray                            # (S, S, 3) uint8
    size: tuple                                  # (h, w) of the valid part
    x_hat: list                                  # of (C, h, w)
    consensus: torch.Tensor | None = None        # (C, h, w): their mean, tidied, once all are there
    x0: torch.Tensor | None = None               # (C, S, S) of hints and initial map, 0 where there is neither
    hint: torch.Tensor | None = None             # (S, S): numbers of the hints, 0 = none
    held: torch.Tensor | None = None             # (H, W), at the image's own size: cells of the hints, -1 = none
    sharp: np.ndarray | None = None              # (d S, d S, 3) uint8: the image as a network of detail d sees it


def prepare(image, model, hints=None, init=None):
    """PIL image -> Job. Raises ValueError for an image without pixels and for prompts that do not fit."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels has nothing to segment")
    small, (h, w) = resize_image(image, model.image_size)
    side = model.image_size * model.detail
    sharp, _ = resize_image(image, side, fitted(*image.size, side, model.detail))
    job, codec, none = Job(small, (h, w), [], sharp=sharp), model.codec, np.zeros(image.size[::-1], np.int64)
    if hints is None and init is None:
        return job
    hints, init = (none if v is None else np.asarray(v, np.int64).clip(min=0) for v in (hints, init))
    for name, ids in (("hint", hints), ("initial map", init)):
        if ids.shape != none.shape:
            raise ValueError(f"the {name} has {' x '.join(map(str, ids.shape[::-1]))} pixels, but the image "
                             f"{image.width} x {image.height}")
    if codec.encoding != "bits":
        raise ValueError(f"hints and initial maps need a checkpoint with the encoding bits, not {codec.encoding}")
    names, hints = np.unique(np.append(hints, 0), return_inverse=True)             # hints 1, 2, ... in the order of ids
    hints = hints[:-1].reshape(none.shape)
    hint, start = shrink(hints, h, w), shrink(init, h, w)
    if not (hint.any() or start.any()):
        raise ValueError("hints and initial map are empty: no pixel has an id above 0")
    if len(names) - 1 > codec.classes:
        raise ValueError(f"{len(names) - 1} ids in the hints are more than the {codec.classes} of this network")
    if lost := set(range(1, len(names))) - set(hint.flat):
        raise ValueError(f"contradictory hints: id {names[min(lost)]} shares all its pixels with others at the network's "
                         f"{model.image_size} pixels; make it larger or move it away")
    ids, area = np.unique(start[(hint == 0) & (start > 0)], return_counts=True)    # what has no cell left is not given
    ids = ids[np.argsort(-area, kind="stable")][: codec.classes + 1 - len(names)]
    labels = np.full((model.image_size,) * 2, -1)
    labels[:h, :w] = np.where(hint > 0, hint, np.where(np.isin(start, ids), start + len(names), -1))
    cells = codec.cells(torch.from_numpy(labels)[None], torch.Generator().manual_seed(0))      # (1, S, S)
    job.x0, job.hint = codec.encode(cells)[0], torch.zeros_like(cells[0])
    job.hint[:h, :w] = torch.from_numpy(hint)
    cell_of = torch.tensor([-1] + [int(cells[0][job.hint == i][0]) for i in range(1, len(names))])
    job.held = cell_of[torch.from_numpy(hints)]
    return job


# ---------------------------------------------------------------------------------------------------------------------
# From images to soft bits to label maps


@dataclass
class Segmentation:
    """n answers for one image of H x W pixels. Labels are the palette's cells, from 0 (rgb: numbers of clusters)."""

    labels: torch.Tensor                         # (n, H, W) uint8, int16 from 255 cells
    consensus: torch.Tensor                      # (H, W): the mean of the samples' soft bits, tidied, decoded
    grouping: torch.Tensor                       # (H, W): pixels are together that enough samples put together
    medoid: int                                  # the sample with the highest mean ARI to the others
    agreement: torch.Tensor                      # (n,): mean ARI of each sample to the others; nan if n = 1
    boundary: torch.Tensor                       # (H, W) in [0, 1]: share of samples with a boundary here (a network pixel wide)
    entropy: torch.Tensor | None                 # (H, W) in [0, k] bits: of the mean (Eq. 3); None without bits
    segments: list                               # of the medoid: id = label + 1, area, bbox, segmentation (RLE), confidence
    x_hat: torch.Tensor                          # (n, C, h, w) soft bits, at the network's resolution


def segment(image, model, n=8, seed=0, **options):
    """n answers for one PIL image: a Segmentation. Sample j has the seed `seed` + j. options: those of `denoise`.

    The same seed gives the same map, whatever else is sampled beside it: on the CPU to the last bit at batch 1.
    """
    return summarise(next(denoise([image], model, n, seed, **options)), image, model.codec)


def denoise(images, model, n=8, seed=0, batch=None, hints=None, init=None, strength=0.4, **sampling):
    """A Job with n samples for each PIL image of an iterable, in order; a batch holds samples of several images.

    batch: samples at once (default 1 on the CPU, else 64); halved when the device's memory is not enough. hints: (H, W)
    ids, pixels of one id belong together, of different ids apart; init: (H, W) ids to start from, forgotten the more the
    larger strength is, in (0, 1]; both 0 where not given. sampling: steps, guidance, sampler, variance, smooth (default:
    the checkpoint's) and resample (default: 1, with hints 2); least and merge, of `tidy.tidy` (default: the checkpoint's).
    Raises ValueError.
    """
    device = next(model.net.parameters()).device
    batch = batch or (1 if device.type == "cpu" else 64)
    sampling = {**model.sampling, **({"resample": 2} if hints is not None else {}), **sampling}
    neat = {k: sampling.pop(k, v) for k, v in model.tidy.items()}

    def tidied(x, job):                                                            # (C, h, w)
        h, w = job.size
        keep = None if job.hint is None else job.hint[:h, :w] > 0
        return tidy(x[None], model.codec, job.image[:h, :w], **neat, keep=keep)[0] if any(neat.values()) else x

    def run(part):
        nonlocal batch
        jobs, seeds = zip(*part)
        given = {}
        if hints is not None:
            given["known"] = tuple(torch.stack([getattr(job, k) for job in jobs]).to(device) for k in ("x0", "hint"))
        if init is not None:
            given.update(init=torch.stack([job.x0 for job in jobs]).to(device), strength=strength)
        x, inside = normalise(torch.from_numpy(np.stack([job.sharp for job in jobs])).to(device),
                              torch.tensor([job.size for job in jobs], device=device), model.detail)
        try:
            x_hat = sample(model.net, x, inside, model.codec.channels, seeds, model.diffusion, model.codec.activate,
                           fused=fused(model.codec, device), **sampling, **given).cpu()
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise ValueError("the device's memory does not hold one sample: try --device cpu") from None
            batch = half = len(part) // 2
            run(part[:half])
            return run(part[half:])
        for job, one in zip(jobs, x_hat):
            job.x_hat.append(tidied(one[:, : job.size[0], : job.size[1]], job))
            if len(job.x_hat) == n > 1:
                job.consensus = tidied(torch.stack(job.x_hat).mean(0), job)

    queue, jobs = [], deque()
    for image in images:
        jobs.append(prepare(image, model, hints, init))
        queue += [(jobs[-1], seed + j) for j in range(n)]
        while len(queue) >= batch:
            part, queue = queue[:batch], queue[batch:]
            run(part)
        while jobs and len(jobs[0].x_hat) == n:
            yield jobs.popleft()
    if queue:
        run(queue)
    yield from jobs


def own_size(x_hat, size, width, height, codec, image=None, among=None):
    """Label maps (..., height, width) int64 of one image: x_hat (..., C, S, S) cut to size (h, w), upsampled and decoded.

    Each pixel gets the code nearest to its soft bits of those in `among`, a list of cells for each map (default: those of
    the map at the network's size, so that no third code appears between two). Soft bits are interpolated bilinearly or,
    with the PIL image, by joint bilateral upsampling (Kopf et al. 2007): of the 3 x 3 nearest network pixels, those of
    like colour count more; the image is blurred a little, for calm boundaries in texture. In strips: a 10,000 x 10,000
    image needs no 10,000 x 10,000 x C tensor. (rgb: nearest.)
    """
    h, w = size
    x = x_hat[..., :h, :w].reshape(-1, *x_hat.shape[-3:-2], h, w)                  # (N, C, h, w)
    cells = codec.decode(x)
    if codec.encoding == "rgb":
        return subsample(cells, height, width).view(*x_hat.shape[:-3], height, width)
    among = [c.unique() for c in cells] if among is None else among                # N of (M,)
    soft, out = x.flatten(0, 1), torch.empty(len(x), height, width, dtype=torch.int64)         # soft (N*C, h, w)
    row, col = ((torch.arange(a) + 0.5) * b / a - 0.5 for a, b in ((height, h), (width, w)))   # as interpolate does
    if image is not None:
        colour = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BOX))).permute(2, 0, 1) / 255
        image = image.filter(ImageFilter.GaussianBlur(0.2 * max(width, height) / max(w, h)))
    strip = max(1, 16_000_000 // (width * (len(soft) + max(len(c) for c in among))))
    for s in range(0, height, strip):
        r, y = row[s : s + strip, None], 0
        if image is not None:
            own = torch.from_numpy(np.array(image.crop((0, s, width, s + len(r))))).permute(2, 0, 1) / 255
        for dy, dx in product((-1, 0, 1), (-1, 0, 1)):
            near_r, near_c = r.round() + dy, col.round() + dx
            i, j = near_r.long().clamp(0, h - 1), near_c.long().clamp(0, w - 1)    # (rows, 1), (width,)
            if image is None:                                                      # bilinear
                weight = tent(r.clamp(0, h - 1) - near_r) * tent(col.clamp(0, w - 1) - near_c)
            else:                                                                  # Gaussians: 0.5 pixels, 0.1 of the range
                far = ((r - near_r) ** 2 + (col - near_c) ** 2) / 0.5 + ((own - colour[:, i, j]) ** 2).sum(0) / 0.02
                weight = (-far).exp().clamp(min=1e-12)
            wide = soft[:, i[0, 0] : i[-1, 0] + 1][:, :, j]                        # columns first: then rows are copied whole
            y = y + wide[:, i[:, 0] - i[0, 0]] * weight                            # (N*C, rows, width)
        for k, choice in enumerate(among):
            like = y.view(len(x), -1, y[0].numel())[k].T @ codec.table[choice].T   # (rows * width, M): 1 for each bit alike
            out[k, s : s + strip] = choice[like.argmax(1)].view(-1, width)
    return out.view(*x_hat.shape[:-3], height, width)


def tent(x):
    return (1 - x.abs()).clamp(min=0)


def summarise(job, image, codec):
    """Job and its PIL image -> Segmentation. Agreement and confidence are measured at the network's resolution."""
    x_hat, (width, height), (h, w) = torch.stack(job.x_hat), image.size, job.size
    n, mean, cells = len(x_hat), x_hat.mean(0, keepdim=True), codec.decode(x_hat)
    consensus = mean if job.consensus is None else job.consensus[None]             # (1, C, h, w)
    groups = codec.cells(grouping(cells)[None], torch.Generator().manual_seed(0))  # (1, h, w): placed as segments are
    among = None if codec.encoding == "rgb" else [c.unique() for c in (*cells, cells, groups)]
    labels = own_size(torch.cat([x_hat, consensus, codec.encode(groups)]), job.size, width, height, codec, image, among)
    labels = labels.to(torch.uint8 if codec.classes < 255 else torch.int16)
    if job.held is not None:
        labels = torch.where(job.held >= 0, job.held.to(labels.dtype), labels)

    every = pairwise(cells)[0]                                                     # (n, n) ARI, 1 on the diagonal
    middle, agreement = medoid(every), (every.sum(1) - 1) / (n - 1)                # 0 / 0 = nan if n = 1
    tall, wide = (max(1, min(v, round(v * 512 / max(width, height)))) for v in (height, width))      # 512 pixels are enough
    reach = max(1, round(max(tall, wide) / max(h, w)))                             # a pixel of the network
    edge = outline(subsample(labels[:n], tall, wide)).float()[:, None]             # (n, 1, tall, wide)
    edge = F.max_pool2d(F.pad(edge, ((reach - 1) // 2, reach // 2) * 2), reach, 1).mean(0, keepdim=True)
    own = dict(size=(height, width), mode="bilinear", align_corners=False)
    bits = F.interpolate(entropy(mean)[None], **own)[0, 0] if codec.encoding == "bits" else None
    return Segmentation(labels[:n], labels[n], labels[n + 1], middle, agreement, F.interpolate(edge, **own)[0, 0], bits,
                        coco_segments(labels[middle].numpy(), cells, middle), x_hat)


def coco_segments(labels, cells, middle):
    """The segments of labels (H, W) as COCO annotations; cells (n, h, w): all samples at the network's size, `middle` ours."""
    best, others = {}, [j for j in range(len(cells)) if j != middle]
    if others:
        iou = iou_matrix(contingency(cells[[middle] * len(others)], cells[others])).amax(2).mean(0)      # (P,)
        best = dict(zip(cells[middle].unique().tolist(), iou.tolist()))
    out = []
    for cell in np.unique(labels).tolist():
        rle = coco_mask.encode(np.asfortranarray(labels == cell).view(np.uint8))
        out.append(dict(id=cell + 1, image_id=1, category_id=1, iscrowd=0, area=int(coco_mask.area(rle)),
                        bbox=[int(v) for v in coco_mask.toBbox(rle)], confidence=best.get(cell),        # None: nothing to compare
                        segmentation=dict(size=rle["size"], counts=rle["counts"].decode())))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Files. All or nothing: each is written under another name, then renamed; segments.json comes last.


def save(array, path, palette=None):
    """An array as PNG with our mark: (H, W, 3) uint8, or (H, W) ids, 8 bit and coloured by the palette, or 16 bit."""
    picture, text, part = Image.fromarray(array), PngImagePlugin.PngInfo(), path.with_suffix(".part")
    text.add_text("Software", MARK)
    if palette is not None and array.dtype == np.uint8:
        picture.putpalette(palette.tobytes())
    picture.save(part, "PNG", pnginfo=text, compress_level=1)
    part.replace(path)


def save_json(path, info, images, annotations, category):
    content = dict(info=info, images=images, annotations=annotations,
                   categories=[dict(id=1, name="segment", supercategory="segment", **category)])
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").replace(path)


def info_of(path):
    """The info in a file of ours, {} where there is none. Raises ValueError for a file of others."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                info = {"software": picture.info.get("Software")}
        else:
            info = json.loads(path.read_text())["info"]
        if info["software"] == MARK:
            return info
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} was not written by sample.py and is not overwritten: move it, or choose another --out")


def done(folder, info):
    """Whether this image is done with these settings. Raises ValueError if the folder holds anything else than its results."""
    found = info_of(folder / "segments.json")
    if found and found["image"] != info["image"]:
        raise ValueError(f"{folder} holds the results of {found['image']}: choose another --out")
    for path in (folder.parent / "panoptic" / f"{folder.name}.png", *folder.glob("*.png")):
        info_of(path)
    return found == info


def write(folder, image, result, model, info, held=None, panoptic=False):
    """All files of one image. Returns a few words about it."""
    n, codec, side = len(result.labels), model.codec, side_of(model.codec)
    kind, digits = np.uint8 if codec.classes < 255 else np.uint16, max(2, len(str(n - 1)))
    palette = np.concatenate([np.zeros((1, 3), np.uint8), colours(side)])
    maps = {f"labels_{j:0{digits}}": labels for j, labels in enumerate(result.labels)}
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "segments.json", *folder.glob("*.png")):                  # ours, see `done`; perhaps of more samples
        old.unlink(missing_ok=True)
    save(panel(image, result, codec, held), folder / "panel.png")
    for name, labels in {**maps, "medoid": result.labels[result.medoid], "consensus": result.consensus,
                         "grouping": result.grouping}.items():
        save(labels.numpy().astype(kind) + kind(1), folder / f"{name}.png", palette)
    for name, labels in maps.items():
        save(overlay(image, labels, side), folder / f"{name.replace('labels', 'overlay')}.png")
    if rows := uncertainty(result, codec):
        tiles, captions = [shade(value / top) for _, value, top, _ in rows], [(name, *ends) for name, _, _, ends in rows]
        save(grid(tiles, len(rows), 6, captions), folder / "uncertainty.png")
    if panoptic:                                                                   # id = R + 256 G + 65536 B
        (folder.parent / "panoptic").mkdir(exist_ok=True)
        ids = result.labels[result.medoid].numpy().astype(np.uint32) + 1
        save(np.stack([ids & 255, ids >> 8, ids >> 16], -1).astype(np.uint8), folder.parent / "panoptic" / f"{folder.name}.png")
    about = dict(id=1, file_name=Path(info["image"]).name, width=image.width, height=image.height)
    save_json(folder / "segments.json", info, [about], result.segments, {})
    mean = sum(len(labels.unique()) for labels in result.labels) / n
    return f"{n} samples, {mean:.1f} segments on average" + (f", ARI {result.agreement.mean():.2f} to each other" if n > 1 else "")


def write_panoptic(out):
    """out/panoptic.json: every PNG in out/panoptic/ with its segments.json. Several processes may end with it."""
    written, found = None, []
    while written != found or written is None:                                     # again if others came meanwhile
        written, images, annotations = found, [], []
        for i, name in enumerate(found, 1):
            content = json.loads((out / name / "segments.json").read_text())
            keys = ("id", "category_id", "area", "bbox", "iscrowd")
            images.append({**content["images"][0], "id": i})
            annotations.append(dict(image_id=i, file_name=f"{name}.png",
                                    segments_info=[{k: s[k] for k in keys} for s in content["annotations"]]))
        save_json(out / "panoptic.json", dict(software=MARK), images, annotations, dict(isthing=1, color=[0, 114, 178]))
        found = sorted(p.stem for p in (out / "panoptic").glob("*.png") if (out / p.stem / "segments.json").is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def folder_names(files):
    """A folder for each file, all different: the stem; else the name, with as many of its parents as it takes."""
    names, depth = {}, 0
    while left := [p for p in files if p not in names]:
        parts = {p: p.resolve().parts[-depth:] for p in left}
        name = {p: "_".join(parts[p]).replace(".", "_") if depth else p.stem for p in left}
        name = {p: f"{name[p]}_{files.index(p)}" if depth > len(parts[p]) else name[p] for p in left}
        taken = [n.casefold() for n in ("panoptic", *names.values(), *name.values())]          # a is A on some systems
        names.update({p: n for p, n in name.items() if taken.count(n.casefold()) == 1})
        depth += 1
    return names


def find_images(names):
    """Files and folders as a list of image files. Raises ValueError for what is not there."""
    files = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(p for p in name.iterdir() if p.suffix.lower() in IMAGE_TYPES)
            if not inside:
                raise ValueError(f"{name}: no images in this folder")
            files += inside
        else:
            files.append(name)
    return files


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device '{name}' is not usable here ({str(e).splitlines()[0][:80]}): try --device cpu") from None


def ahead(function, items, count=4):
    """Results of function(item), computed in a thread up to `count` items ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_prompts(a, path):
    """The options hints, init and strength of `denoise` from the command line's, for the image at path."""
    given, (width, height) = {}, read_image(path).size
    if a.hint or a.points or a.box:
        try:
            boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in (map(float, box.split(",")) for box in a.box)]
        except ValueError:
            raise ValueError(f"--box {' '.join(a.box)} is not of the form x0,y0,x1,y1") from None
        given["hints"] = hint_map(width, height, a.points, boxes, read_label(a.hint) if a.hint else None)
    if a.init:
        given.update(init=read_label(a.init), strength=a.strength)
    return given


def fail(message):
    """Ends the program with a sentence and exit status 2."""
    print(f"sample.py: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="+", help="image files or folders")
    p.add_argument("--n", type=int, default=8, help="samples for each image")
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/, else weights/photo.pt)")
    p.add_argument("--out", default="samples", help="where the folders go")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--guidance", type=float, help="guidance weight, 0 = none: half the time (default: the checkpoint's)")
    p.add_argument("--sampler", choices=["ddpm", "ddim"], help="(default: the checkpoint's)")
    p.add_argument("--smooth", type=float, help="share of the side that answers are averaged over, between the image's edges; 0 = none")
    p.add_argument("--least", type=int, help="fewest pixels, of the network's, of a segment, which is in one piece then; 0 = as sampled")
    p.add_argument("--merge", type=float, help="how much alike neighbours must look to become one, e.g. 1; 0 = none do")
    p.add_argument("--seed", type=int, default=0, help="sample j of every image has the seed SEED + j")
    p.add_argument("--batch", type=int, help="samples at once (default: 1 on the CPU, else 64, or as many as memory holds)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--resume", action="store_true", help="skip images that are done with the same settings")
    p.add_argument("--format", choices=["coco", "coco_panoptic"], default="coco", help="coco: segments.json alone")
    p.add_argument("--hint", help="label map: pixels of one id belong together, of different ids apart; 0 is free")
    p.add_argument("--points", default="", help='groups of clicks "x,y x,y;x,y", in pixels from the top left corner')
    p.add_argument("--box", action="append", default=[], help="x0,y0,x1,y1 about one segment; may be repeated")
    p.add_argument("--init", help="label map to start from; 0 is free")
    p.add_argument("--strength", type=float, default=0.4, help="how much of --init is forgotten: above 0, at most 1")
    p.add_argument("--resample", type=int, help="repeats of each step: slower, follows hints better (default: 1, with hints 2)")
    p.error = fail
    a = p.parse_intermixed_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        for name in ("n", "steps", "batch", "resample"):
            if getattr(a, name) is not None and getattr(a, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(a, name)}")
        if not 0 < a.strength <= 1:
            raise ValueError(f"--strength must be above 0 and at most 1, not {a.strength}")
        files = list({path.resolve(): path for path in find_images(a.images)}.values())
        prompts = {k: getattr(a, k) for k in ("hint", "points", "box", "init") if getattr(a, k)}
        if prompts and len(files) > 1:
            raise ValueError(f"--{next(iter(prompts))} is for one image, not for {len(files)}")
        own_gpu = a.device == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else a.device)
        ckpt = Path(a.ckpt) if a.ckpt else newest_checkpoint()
        model, out, names = load_checkpoint(ckpt, device), Path(a.out), folder_names(files)
        set_tidy(model, a.least, a.merge)
        if a.format == "coco_panoptic":
            info_of(out / "panoptic.json")
        out.mkdir(parents=True, exist_ok=True)
        given = read_prompts(a, files[0]) if prompts else {}
    except (ValueError, OSError) as e:
        fail(e)

    files = files[rank::world]
    chosen = {k: v for k in ("steps", "guidance", "sampler", "smooth", "resample") if (v := getattr(a, k)) is not None}
    settings = {**model.sampling, **model.tidy, **chosen, **prompts, **({"strength": a.strength} if a.init else {})}
    info = dict(software=MARK, checkpoint=str(ckpt), step=model.step, n=a.n, seed=a.seed, **settings)
    if rank == 0:
        print(f"{ckpt}: trained on {model.dataset}, step {model.step}, {model.image_size} pixels; "
              f"{' '.join(f'{k} {v}' for k, v in settings.items())}; on {device}")
        if model.dataset == "shapes":
            print(f"This checkpoint has only seen synthetic shapes: in a photo it finds shapes. For photos: --ckpt {SHIPPED.parent.name}/{SHIPPED.name}")
        if ckpt == SHIPPED and not a.ckpt:
            print("These are the weights that come with this repository, as there is no checkpoint of your own under out/.")

    bar = tqdm(total=len(files), unit="image", disable=rank > 0 or len(files) == 1)
    failed, read, writing = [], deque(), deque()

    def say(text):
        error = isinstance(text, Exception)
        failed.extend([text] if error else [])
        tqdm.write(f"sample.py: {text}" if error else text, file=sys.stderr if error else sys.stdout)
        bar.update()

    def load(path):                                                                # -> an image, or what to say instead
        try:
            skip = done(out / names[path], {**info, "image": str(path)}) and a.resume
            return f"{path}: done already" if skip else read_image(path)
        except (ValueError, OSError) as e:
            return e

    def images():
        for path, image in zip(files, ahead(load, files)):
            if isinstance(image, Image.Image):
                read.append((path, image))
                yield image
            else:
                say(image)

    def finish(job, path, image):
        try:
            folder, result = out / names[path], summarise(job, image, model.codec)
            words = write(folder, image, result, model, {**info, "image": str(path)}, job.held, a.format == "coco_panoptic")
            return f"{path} -> {folder / 'panel.png'} ({words})"
        except (ValueError, OSError) as e:
            return e

    with ThreadPoolExecutor(2) as writers:                                         # reading, sampling, writing overlap
        try:
            for job in denoise(images(), model, a.n, a.seed, a.batch, **given, **chosen):
                writing.append(writers.submit(finish, job, *read.popleft()))
                while len(writing) > 4:
                    say(writing.popleft().result())
        except ValueError as e:                                                    # prompts that do not fit, too little memory
            say(e)
        for one in writing:
            say(one.result())
    bar.close()
    if a.format == "coco_panoptic":
        write_panoptic(out)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
