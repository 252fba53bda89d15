"""Segment images, from Python: checkpoints, prompts, samples, label maps at the images' own size. sample.py is its command line.

What it is: `load_checkpoint(path)` -> Model; `segment(image, model, n)` -> Segmentation; `denoise` does the same for many images
without waiting between them. What it is not: it writes no files (sample.py) and compares with no truth (scoring.py).

    from formats import read_image                                             # upright, RGB
    from segment import load_checkpoint, segment
    result = segment(read_image("photo.jpg"), load_checkpoint("weights/photo.pt"), n=8)
    result.labels, result.grouping, result.boundary                            # (8, H, W), (H, W), (H, W)
"""

import sys
from collections import deque
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask

from bits import Codec, entropy
from checkpoint import newest
from data import normalise
from diffusion import Diffusion, fused, sample
from engine import out_of_memory
from formats import fitted, resize_image
from metrics import contingency, grouping, iou_matrix, medoid, pairwise
from model import UNet
from pictures import outline, subsample
from tidy import tidy

STRIP = 16_000_000                               # numbers at once, when maps are made at an image's size
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
    if lacks := {"network", "ema", "codec", "diffusion", "image_size", "sampling", "dataset", "step"} - c.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it is no checkpoint of train.py")
    try:
        whole, real = ("image_size", "step", "steps", "least", "seed"), ("guidance", "smooth", "merge")
        numbers = {f.name: f.type for f in fields(Diffusion) if f.type is float}
        numbers |= dict.fromkeys(whole, int) | dict.fromkeys(real, float)
        for part in (c, c["codec"], c["diffusion"], c["sampling"], c.get("tidy", {})):
            for key in numbers.keys() & part.keys():
                value, kind = part[key], (int, numbers[key])
                if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < 2**63:   # nor nan
                    raise ValueError(f"{key} is {value!r}")
        if c["image_size"] < 1 or c["sampling"]["steps"] < 1:
            raise ValueError(f"image_size is {c['image_size']}, steps {c['sampling']['steps']}")
        net, codec = UNet(**c["network"]), Codec(**c["codec"])
        diffusion = Diffusion(**c["diffusion"])
        copies = 1 + (diffusion.hints > 0) + (diffusion.self_condition > 0)  # of the bits, as in train.py
        want = (copies * codec.channels + 3 * getattr(net, "detail", 1) ** 2, codec.channels)
        if want != (c["network"]["in_channels"], c["network"]["out_channels"]):
            raise ValueError(f"its network is not of {want[0]} channels in and {want[1]} out, as its settings say")
        net.load_state_dict(c["ema"])
        net = net.to(device).eval().requires_grad_(False)
        return Model(net, codec, diffusion, c["image_size"],
                     {"smooth": 0.0, **c["sampling"]}, c["dataset"], c["step"],
                     {"least": 0, "merge": 0.0, **c.get("tidy", {})})
    except Exception as e:  # of whatever kind, for whatever lies in it
        known = {ValueError: str(e), RuntimeError: "its weights do not fit its network"}
        why = known.get(type(e), "entries of a wrong kind")
        raise ValueError(f"{path}: no checkpoint that this version can use: {why}") from None


def set_tidy(model, least, merge):
    """The command line's least and merge instead of the checkpoint's, where given (not None). Raises ValueError."""
    new = {**model.tidy, **{k: v for k, v in dict(least=least, merge=merge).items() if v is not None}}
    if not all(0 <= v < np.inf for v in new.values()) or any(new.values()) and model.codec.encoding == "rgb":
        raise ValueError(f"--least and --merge must be 0 (off) or more, and 0 with the encoding rgb, not {new['least']} and {new['merge']:g}")
    model.tidy = new


def newest_checkpoint(root="out", shipped=SHIPPED):
    """The checkpoint under root that was written last; else the weights that come with the repository. Raises ValueError."""
    found = sorted(Path(root).glob("**/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found and not shipped.exists():
        raise ValueError(f"no checkpoint under {root}/, and no {shipped}: train one first (python train.py, about 4 minutes "
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
    if image.mode != "RGB" or 0 in image.size:
        raise ValueError(f"a PIL image in RGB with at least one pixel is needed, not {image.width} x {image.height} of mode {image.mode}: "
                         f"formats.read_image gives one, upright, of any file")
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

    labels: torch.Tensor                         # (n, H, W) uint8; int16 from 255 cells on and for rgb
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

    def tidied(x, job):                                                            # (N, C, h, w)
        h, w = job.size
        keep = None if job.hint is None else job.hint[:h, :w] > 0
        return tidy(x, model.codec, job.image[:h, :w], **neat, keep=keep) if any(neat.values()) else x

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
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            if len(part) == 1:
                raise ValueError("the device's memory does not hold one sample: try --device cpu") from None
            batch = half = len(part) // 2
            run(part[:half])
            return run(part[half:])
        for job, one in zip(jobs, x_hat):
            job.x_hat.append(one[:, : job.size[0], : job.size[1]])
            if len(job.x_hat) == n:
                job.x_hat = list(tidied(torch.stack(job.x_hat), job))
                job.consensus = tidied(torch.stack(job.x_hat).mean(0, keepdim=True), job)[0] if n > 1 else None

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
    """Label maps (..., height, width) of an image: x_hat (..., C, S, S) cut to (h, w), upsampled and decoded.

    uint8, int16 from 255 cells on; rgb: int64. Each pixel gets the code nearest to its soft bits of those
    in `among`, a list of cells for each map (default: those of the map at the network's size, so that no
    third code appears between two). Soft bits are interpolated bilinearly or, with the PIL image, by joint
    bilateral upsampling (Kopf et al. 2007): of the 3 x 3 nearest network pixels, those of like colour count
    more; the image is blurred a little, for calm boundaries in texture. Where all 3 x 3 have one code, that
    is the answer. In strips: a 10,000 x 10,000 image needs no 10,000 x 10,000 x C tensor. (rgb: nearest.)
    """
    h, w = size
    x = x_hat[..., :h, :w].reshape(-1, *x_hat.shape[-3:-2], h, w)                  # (N, C, h, w)
    cells = codec.decode(x)
    if codec.encoding == "rgb":
        return subsample(cells, height, width).view(*x_hat.shape[:-3], height, width)
    among = [c.unique() for c in cells] if among is None else among                # N of (M,)
    allowed = torch.zeros(len(x), codec.classes, dtype=torch.bool)
    for k, choice in enumerate(among):
        allowed[k, choice] = True

    row, first_row, rows = nearest(height, h)
    col, first_col, columns = nearest(width, w)
    step = torch.arange(-1, 2)
    near_i, near_j = ((torch.arange(n)[:, None] + step).clamp(0, n - 1) for n in (h, w))  # (h, 3), (w, 3)
    # the columns in w blocks of one width, each around a network column; what fills them up is not kept
    axis = torch.arange(int(columns.max()))
    place = (first_col[:, None] + axis).clamp(max=width - 1)  # (w, wide)
    kept = (axis < columns[:, None]).view(-1).nonzero()[:, 0]  # (width,)
    far_j = col[place][:, None] - (torch.arange(w)[:, None] + step)[..., None]  # (w, 3, wide)
    if image is not None:
        colour = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BOX))).permute(2, 0, 1) / 255
        # (h, 3 colours, w, 3, 3, 1, 1)
        colour = colour[:, near_i][..., near_j].permute(1, 0, 3, 2, 4)[..., None, None]
        image = image.filter(ImageFilter.GaussianBlur(0.2 * max(width, height) / max(w, h)))

    def weights(i, s, e):  # of the 3 x 3 network pixels at the rows s to e around network row i
        far_i = row[s:e] - (i + step)[:, None]  # (3, rows)
        if image is None:  # bilinear
            return tent(far_i)[:, None, :, None] * tent(far_j)[:, None, :, None]  # (w, 3, 3, rows, wide)
        # Gaussians: 0.5 pixels, 0.1 of the range
        far = (far_i**2)[:, None, :, None] / 0.5 + (far_j**2)[:, None, :, None] / 0.5
        own = torch.from_numpy(np.array(image.crop((0, s, width, e)))).permute(2, 0, 1) / 255
        for mine, theirs in zip(own[..., place].transpose(1, 2)[:, :, None, None], colour[i]):
            difference = mine - theirs
            far.addcmul_(difference, difference, value=1 / 0.02)
        return far.neg_().exp_().clamp_(min=1e-12)

    out = torch.empty(len(x), height, width, dtype=torch.uint8 if codec.classes < 255 else torch.int16)
    strip = max(1, STRIP // (width * (x.shape[1] + 24)))
    for i in range(h):
        soft = x[:, :, near_i[i]][..., near_j].permute(0, 3, 1, 2, 4).flatten(3)  # (N, w, C, 9)
        here, around = cells[:, i], cells[:, near_i[i]][..., near_j]  # (N, w), (N, 3, w, 3)
        border = (around != here[:, None, :, None]).any(3).any(1) | ~allowed.gather(1, here)
        top, bottom = int(first_row[i]), int(first_row[i] + rows[i])
        for s in range(top, bottom, strip):
            e = min(s + strip, bottom)
            weight = weights(i, s, e).flatten(3).flatten(1, 2)  # (w, 9, rows * wide)
            for k, choice in enumerate(among):
                j = border[k].nonzero()[:, 0]
                y = soft[k, j] @ weight[j]  # (j, C, rows * wide)
                cell = codec.decode(y[..., None])[..., 0]
                # the code itself is the nearest of all, if this map has it
                other = (~allowed[k])[cell].nonzero(as_tuple=True)
                like = y.mT[other] @ codec.table[choice].T  # (..., M): 1 for each bit alike
                cell[other] = choice[like.argmax(1)]
                answer = here[k].to(out.dtype)[:, None, None].repeat(1, e - s, len(axis))  # (w, rows, wide)
                answer[j] = cell.view(-1, *answer.shape[1:]).to(out.dtype)
                out[k, s:e] = answer.transpose(0, 1).flatten(1)[:, kept]
    return out.view(*x_hat.shape[:-3], height, width)


def nearest(fine, coarse):
    """Where `fine` pixels lie among `coarse` ones, as interpolate sees it: (fine,) float32.

    And for each coarse pixel the first of those that it is nearest to, and how many they are: (coarse,) each.
    """
    place = (torch.arange(fine) + 0.5) * coarse / fine - 0.5
    count = place.round().long().bincount(minlength=coarse)
    return place, count.cumsum(0) - count, count


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
    labels = labels.to(torch.uint8 if codec.encoding != "rgb" and codec.classes < 255 else torch.int16)    # rgb: any number of clusters
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
