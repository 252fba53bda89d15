"""Segment images, from Python: checkpoints, samples, label maps at the images' own size.

What it is: `load_checkpoint(path)` -> Model; `segment(image, model, n)` -> Segmentation, which `cut` cuts
anew, coarser, finer or by clicks, without sampling again; `denoise` samples many images without waiting
between them. What it is not: it writes no files (sample.py) and compares with no truth (scoring.py).

    from sources.formats import read_image                # upright, RGB
    from answers.prompts import hint_map
    from answers.segment import load_checkpoint, segment
    result = segment(read_image("photo.jpg"), load_checkpoint("weights/photo.pt"), n=8)
    result.answer.labels, result.labels, result.boundary  # (H, W), (8, H, W), (H, W)
    clicks = hint_map(640, 480, "120,80 160,90; 30,200")
    result.cut("fine").labels, result.cut(hints=clicks, closed=True).labels
"""

import functools
import sys
from collections import deque
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask

from answers import tree
from answers.claims import claims
from answers.prompts import checked, network_hints
from bits import Codec, entropy, hint_bits, locate
from diffusion import SAMPLERS, VARIANCES, Diffusion, kernel_options, sample
from engine import NoGraph, as_cuda_graph, newest, out_of_memory, pick_precision
from frame import blurred, enlarge, normalise, outline, resize_image, shrink, subsample
from metrics import ari, contingency
from model import UNet

SHOWN = 512  # pixels on the longer side are enough to show uncertainty
TILES = 16  # at most so many a side
LOOKS = 2  # samples of each tile, in turn one of each sample of the whole: more of them bring nothing
NEAR = 100  # network pixels that the median segment should have
TOGETHER = 16  # samples whose trees grow at once, at most
HINTED = 3.0  # guidance, at most, of samples that see hints, which say much of what it would say
LARGE = 3e7  # pixels of a photo that is not kept twice
SHIPPED = Path(__file__).parent.parent / "weights" / "photo.pt"


@dataclass
class Model:
    """A network with all that is needed to sample from it."""

    net: torch.nn.Module
    codec: Codec
    diffusion: Diffusion
    image_size: int
    sampling: dict  # steps, guidance, sampler, variance, smooth: this network's defaults
    dataset: str
    step: int
    # how its samples become answers. merge 0: samples stay as they are, and the tree joins what they join;
    # above 0: every sample and all together are trees by the learnt odds, cut where the odds that people part
    # two regions reach `merge` (1: the usual); least: regions of fewer pixels are joined first
    tidy: dict = field(default_factory=lambda: dict(least=0, merge=0.0))
    odds: Path = tree.LEARNT  # the file of learnt odds
    graphs: dict = field(default_factory=dict)  # of `sampled`, on CUDA

    @property
    def detail(self):
        """The image's resolution as the network sees it, as a multiple of image_size."""
        return getattr(self.net, "detail", 1)


def read_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint file, or in the one before it where it is damaged. Raises ValueError
    naming the file."""
    content, used, problem = newest(path, device)
    if content is None:
        raise ValueError(f"{path}: no such file; train one with: python train.py")
    if problem:
        print(f"{problem}; using the one before, {used}", file=sys.stderr)
    return content


def load_checkpoint(path, device="cpu", raw=False):
    """The EMA network of a checkpoint, or the network itself (raw), ready to sample from; its samples are
    joined by the odds in the tree.npz beside it, if there is one. Raises ValueError naming the file,
    RuntimeError as `diffusion.kernel_options`."""
    c = read_checkpoint(path, device)
    if lacks := {"network", "ema", "codec", "diffusion", "image_size", "sampling", "dataset",
                 "step"} - c.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it is no checkpoint of train.py")
    if raw and "net" not in c:
        raise ValueError(f"{path} holds averaged weights only (it was made by --export): leave out --raw")
    try:
        whole, real = ("image_size", "step", "steps", "least", "seed"), ("guidance", "smooth", "merge")
        numbers = {f.name: f.type for f in fields(Diffusion) if f.type is float}
        numbers |= dict.fromkeys(whole, int) | dict.fromkeys(real, float)
        for part in (c, c["codec"], c["diffusion"], c["sampling"], c.get("tidy", {})):
            for key in numbers.keys() & part.keys():
                value, kind = part[key], (int, numbers[key])
                # nor nan
                if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < 2**63:
                    raise ValueError(f"{key} is {value!r}")
        if c["image_size"] < 1 or c["sampling"]["steps"] < 1:
            raise ValueError(f"image_size is {c['image_size']}, steps {c['sampling']['steps']}")
        if c["sampling"]["sampler"] not in SAMPLERS or c["sampling"]["variance"] not in VARIANCES:
            raise ValueError(f"its sampler is {c['sampling']['sampler']!r}, its variance "
                             f"{c['sampling']['variance']!r}")
        net, codec = UNet(**c["network"]), Codec(**c["codec"])
        diffusion = Diffusion(**c["diffusion"])
        copies = 1 + (diffusion.hints > 0) + (diffusion.self_condition > 0)  # of the bits, as in train.py
        want = (copies * codec.channels + 3 * getattr(net, "detail", 1) ** 2, codec.channels)
        if want != (c["network"]["in_channels"], c["network"]["out_channels"]):
            raise ValueError(f"its network is not of {want[0]} channels in and {want[1]} out, as its "
                             f"settings say")
        net.load_state_dict(c["net" if raw else "ema"])
        # half of the time, where the CPU has bf16; what the samplers do with its output stays float32
        device = torch.device(device)
        dtype = pick_precision("auto", device)[0] if device.type == "cpu" else None
        net = net.to(device, dtype).eval().requires_grad_(False)
        model = Model(net, codec, diffusion, c["image_size"],
                      {"smooth": 0.0, **c["sampling"]}, c["dataset"], c["step"],
                      {"least": 0, "merge": 0.0, **c.get("tidy", {})},
                      beside if (beside := Path(path).with_name("tree.npz")).exists() else tree.LEARNT)
    except Exception as e:  # of whatever kind, for whatever lies in it
        known = {ValueError: str(e), RuntimeError: "its weights do not fit its network"}
        why = known.get(type(e), "entries of a wrong kind")
        raise ValueError(f"{path}: no checkpoint that this version can use: {why}") from None
    # now, not in the midst of sampling: raises where kernels were forced that cannot run
    kernel_options(model.codec, device)
    return model


def set_tidy(model, least, merge):
    """The command line's least and merge instead of the checkpoint's, where given (not None). Raises
    ValueError."""
    new = {**model.tidy, **{k: v for k, v in dict(least=least, merge=merge).items() if v is not None}}
    if not all(0 <= v <= 10**6 for v in new.values()) or any(new.values()) and model.codec.clusters:
        raise ValueError(f"--least and --merge must be 0 (off) to 1000000, and 0 with the encoding rgb, "
                         f"not {new['least']} and {new['merge']:g}")
    model.tidy = new
    odds_of(model)  # now, not after sampling: raises where the odds' file is damaged


def newest_checkpoint(root="out", shipped=SHIPPED):
    """The checkpoint under root that was written last; else the weights that come with the repository. Raises
    ValueError."""
    found = sorted(Path(root).glob("**/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found and not shipped.exists():
        raise ValueError(f"no checkpoint under {root}/, and no {shipped}: train one first (python train.py, "
                         f"about 3 minutes "
                         f"on a laptop), or name one with --ckpt")
    return found[-1] if found else shipped


# ------------------------------------------------------------------------------------------------------------
# Jobs: an image, and closer looks at parts of it



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


def prepare(image, model, hints=None, init=None, seed=0, tiles=None):
    """PIL image -> Job. hints (H, W): ids, pixels of one id belong together, of different ids apart; init (H,
    W): ids to start from; both 0 where not given. tiles: t looks closer at t x t overlapping tiles, besides;
    "auto": at as many as the size of what is found asks for, up to 4 x 4; None: as `tiles_of` has it. Raises
    ValueError for an image without pixels and for prompts that do not fit."""
    if image.mode != "RGB" or 0 in image.size:
        raise ValueError(f"a PIL image in RGB with at least one pixel is needed, not {image.width} x "
                         f"{image.height} of mode {image.mode}: formats.read_image gives one, upright, of "
                         f"any file")
    tiles, hints = tiles_of(tiles, model), checked("hint", hints, image)
    init = checked("initial map", init, image)
    if (hints is not None or init is not None) and not any(v is not None and v.any() for v in (hints, init)):
        raise ValueError("hints and initial map are empty: no pixel has an id above 0")
    (job,) = jobs_of(image, model, hints, init, seed, 1)
    job.hints = hints
    if tiles == "auto":
        job.closer = [jobs_of(image, model, hints, init, seed, t) for t in (2, 3, 4)]
    else:
        job.tiles = jobs_of(image, model, hints, init, seed, tiles) if tiles > 1 else []
    return job


def jobs_of(image, model, hints, init, seed, t):
    """t x t tiles, each overlapping the next by a quarter, as Jobs; their samples have seeds of their own."""
    S, d = model.image_size, model.detail
    side = S * (3 * t + 1) // 4  # of the photo, in a tile's pixels
    small, (h, w) = resize_image(image, side)
    seen, _ = resize_image(image, side * d, (w * d, h * d))
    hint = network_hints(hints, h, w) if hints is not None and hints.any() else None
    start = None if init is None else shrink(init, h, w)
    tall, wide = (min(n, 2 * -(-2 * n // (3 * t + 1))) for n in (h, w))
    corners = [sorted({round(k) for k in np.linspace(0, n - m, t)}) for n, m in ((h, tall), (w, wide))]
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
    hint = np.where(hint > 0, np.searchsorted(np.unique(hint[hint > 0]), hint) + 1, 0)  # those in a tile
    if hint.max() > codec.classes:
        raise ValueError(f"{hint.max()} ids in the hints are more than the {codec.classes} of this network: "
                         f"leave some out")
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


# ------------------------------------------------------------------------------------------------------------
# From images to soft bits to label maps


@dataclass
class Answer:
    """One label map of an image of H x W pixels: all samples together, or one."""

    # (H, W) integers from 0: the number of a place in a square palette of side x side places
    labels: torch.Tensor
    side: int
    # COCO: id = label + 1, area, bbox, segmentation (RLE), confidence: the chance that a person drew it
    segments: list
    borders: list  # (id, id, confidence) of segments that touch: the chance that a person parts them


@dataclass
class Segmentation:
    """n samples of one image of H x W pixels and what they say together."""

    answer: Answer  # of all samples
    cells: torch.Tensor  # (n, h, w) integers: each sample's map, at the network's resolution
    side: int  # of their palette: the same place has the same number in all of them
    agreement: torch.Tensor  # (n,): mean ARI of each sample to the others; nan if n = 1
    # the image's shape at SHOWN pixels on the longer side, or its own where that is less
    boundary: torch.Tensor  # in [0, 1]: share of samples with a boundary here (a network pixel wide)
    entropy: torch.Tensor | None  # in [0, k] bits: of the mean of x_hat (Eq. 3); None without bits
    x_hat: torch.Tensor  # (n, C, h, w) soft bits, at the network's resolution
    image: Image.Image
    evidence: tree.Evidence  # what `cut` works with
    model: Model

    @functools.cached_property
    def calm(self):
        """The photo as `enlarge` looks at it; None where a second copy is too large to keep."""
        return blurred(self.image, *self.cells.shape[1:]) if np.prod(self.image.size) <= LARGE else None

    @functools.cached_property
    def labels(self):
        """(n, H, W): all samples at the image's size. n H W bytes; `enlarged` gives one after the other."""
        return enlarge(self.cells, self.image, self.calm)

    def enlarged(self, copy=None):
        """Each sample in turn, (H, W), at the size of the image or of a smaller copy of it."""
        image, calm = (copy, blurred(copy, *self.cells.shape[1:])) if copy else (self.image, self.calm)
        together = max(1, 2**22 // (image.width * image.height))  # of a small photo, they share the weights
        return (one for some in self.cells.split(together) for one in enlarge(some, image, calm))

    def cut(self, grain="normal", hints=None, closed=False):
        """Another Answer from the same samples, in milliseconds.

        grain: coarse, normal, fine, or a number of segments. hints (H, W): ids, 0 = free (`hint_map`): pixels
        of one id are together, those of two apart. closed: every pixel belongs to a hint. Raises ValueError
        for hints that do not fit.
        """
        hints = checked("hint", hints, self.image)
        grown, labels = joined(self.evidence, self.model, grain, hints, closed)
        return answer(grown, labels, self, hints)


def segment(image, model, n=8, seed=0, grain="normal", closed=False, hints=None, init=None, tiles=None,
            **options):
    """n samples for one PIL image and their joint answer: a Segmentation. Sample j has the seed `seed` + j.

    grain, closed: as `Segmentation.cut` has them; hints, init, tiles: as `prepare`; options: as `denoise`.
    Every tile is sampled LOOKS times, for the samples in turn. The same seed gives the same map, whatever
    else is sampled beside it: on the CPU to the last bit at batch 1.
    """
    job = prepare(image, model, hints, init, seed, tiles)
    return summarise(next(denoise([job], model, n, **options)), image, model, grain, closed)


def sampled(model, given, callback=None, **options):
    """diffusion.sample for a batch, a dictionary of tensors on the network's device: image, valid, seeds[,
    hints][, init] -> x_hat (B, C, H, W) on the host.

    On CUDA through the kernels, and without a callback, all steps are one CUDA graph from the second batch of
    a shape on. The network computes in float16 there: its 10 bits of mantissa are those of TF32, in which
    CUDA convolves float32, so that it changes as little. Raises ValueError where no graph can be made.
    """
    device = given["image"].device
    how, cuda = kernel_options(model.codec, device), device.type == "cuda"

    def run(given, dtype=torch.float16 if cuda else None):
        return sample(model.net, channels=model.codec.channels, diffusion=model.diffusion, kernel_options=how,
                      activate=model.codec.activate, callback=callback, dtype=dtype, **given, **options)

    key = repr([(name, v.shape) for name, v in given.items()] + sorted(options.items()))
    if not (cuda and how and callback is None):
        x_hat = run(given)
    elif key not in model.graphs:  # the first one compiles, chooses and allocates
        model.graphs, x_hat = {**dict([*model.graphs.items()][-3:]), key: None}, run(given)
    else:
        try:
            model.graphs[key] = model.graphs[key] or as_cuda_graph(run, given)
        except NoGraph as e:
            if out_of_memory(e):
                raise
            raise ValueError(f"{e}: set BITSEG_KERNELS=torch") from None
        x_hat = model.graphs[key](given)
    x_hat = x_hat.cpu()
    # weights that float16 does not hold
    return run(given, None).cpu() if cuda and not x_hat.isfinite().all() else x_hat


def sampling_of(model, hinted):
    """steps, guidance, sampler, variance and smooth, unless others are asked for. hinted: whether there are
    hints, which the network may see."""
    if not (hinted and model.diffusion.hints):
        return model.sampling
    return {**model.sampling, "guidance": min(model.sampling["guidance"], HINTED)}


def denoise(jobs, model, n=8, batch=None, strength=0.4, callback=None, **asked):
    """The jobs of an iterable, each with n samples, in order; a batch holds samples of several images. A job
    keeps the samples that it has already.

    batch: samples at once (default 64; on a CPU 4 in bfloat16, else 1: its float32 rounds otherwise in every
    batch, its bfloat16 does not); halved when the device's memory is not enough.
    strength, in (0, 1]: how much of an initial map is forgotten. asked: steps, guidance, sampler,
    variance, smooth (default: the checkpoint's, but guidance of at most HINTED where the network sees hints).
    callback: as `diffusion.sample` has it. Either all jobs have hints (an initial map), or none. Raises
    ValueError.
    """
    weight = next(model.net.parameters())
    device, alike = weight.device, weight.dtype == torch.bfloat16
    batch = batch or (64 if device.type != "cpu" else 4 if alike else 1)

    def run(part):
        nonlocal batch
        some, seeds = zip(*part)
        given = dict(seeds=torch.tensor(seeds).to(device))
        if some[0].known is not None:
            given["hints"] = torch.stack([job.known for job in some]).to(device)
        if some[0].init is not None:
            given["init"] = torch.stack([job.init for job in some]).to(device)
        photos = torch.from_numpy(np.stack([job.image for job in some]))
        given["image"], given["valid"] = normalise(photos.to(device), torch.tensor(
            [job.size for job in some], device=device), model.detail)
        try:
            x_hat = sampled(model, given, callback, strength=strength,
                            **{**sampling_of(model, "hints" in given), **asked})
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            model.graphs.clear()
            if len(part) == 1:
                raise ValueError("the device's memory does not hold one sample: try --device cpu") from None
            batch = half = len(part) // 2
            run(part[:half])
            return run(part[half:])
        for job, one in zip(some, x_hat):
            job.x_hat.append(one[:, : job.size[0], : job.size[1]])
            if len(job.x_hat) == n and job.tiles is None:
                ask(job)

    def ask(job):
        """For the samples that it lacks; for those of tiles that are still to be chosen, once its own are
        there."""
        if len(job.x_hat) >= n and job.tiles is None:
            job.tiles = chosen(job, model)
        queue.extend(job.lacks(n))

    queue, waiting, jobs = deque(), deque(), iter(jobs)
    while True:
        while len(queue) < batch and (job := next(jobs, None)):
            waiting.append(job)
            ask(job)
        if not waiting:
            return
        if queue:
            run([queue.popleft() for _ in range(min(batch, len(queue)))])
        while waiting and waiting[0].tiles is not None and not waiting[0].lacks(n):
            yield waiting.popleft()


def chosen(job, model):
    """The tiles that a job is to have, now that its own samples are there: of its choices, the fewest in
    which the median segment of the joint answer has NEAR pixels, or else the most."""
    if not job.closer:
        return []
    _, labels = joined(evidence_of(replace(job, tiles=[]), model.codec), model)
    median = np.median(np.bincount(labels.ravel()))
    t = next((t for t in (1, 2, 3) if median * ((3 * t + 1) / 4) ** 2 >= NEAR), 4)
    return ([], *job.closer)[t - 1]


def evidence_of(job, codec, samples=slice(None)):
    """What a job's samples say, or some of them, with those of its tiles: tree.Evidence."""
    photo, tiles, views, turns = job.scene, job.tiles or [], [], range(len(job.x_hat))[samples]
    for one in (job, *tiles):
        x_hat = [one.x_hat[k % len(one.x_hat)] for k in turns[: len(one.x_hat)]]
        x_hat = torch.stack(x_hat).float().clamp(-1, 1)  # (n, C, h, w)
        cells = codec.decode(x_hat)
        if one is job and tiles:  # at the tiles' resolution
            x_hat = F.interpolate(x_hat, photo.shape[:2], mode="bilinear")
            cells = subsample(cells, *photo.shape[:2])
        views.append((x_hat.permute(0, 2, 3, 1).numpy(), cells.numpy()))
    codes = 1 + max(int(cells.max()) for _, cells in views)
    closer = [tree.View(*view, rise(tile, photo.shape), tile.top, tile.left)
              for tile, view in zip(tiles, views[1:])]
    return tree.gather(photo, *views[0], codes, closer)


def rise(tile, shape):
    """How well a tile sees its pixels (h, w) of a photo of a shape: less towards the border, where the next
    tile sees them better; all tiles together see each as well."""
    out = []
    for n, at, whole in zip(tile.size, (tile.top, tile.left), shape):
        low, high = np.arange(n) + 0.5 + n * (at == 0), n - 0.5 - np.arange(n) + n * (at + n == whole)
        out.append(np.minimum(low, high).clip(max=n / 4) / (n / 4))
    return out[0][:, None] * out[1]


def odds_of(model):
    """By what the regions of this model's samples join: the learnt network (None: by the samples alone), and
    the offset of its cuts in log odds, which lets the samples alone join what most of them do."""
    merge = model.tidy["merge"]
    return (tree.learnt(model.odds), -np.log(merge)) if merge else (None, -tree.GRAINS["normal"])


def joined(evidence, model, grain="normal", hints=None, closed=False):
    """Evidence -> its tree, and the map (h, w) that is cut from it. hints: (H, W) ids at any size, 0 =
    none."""
    hint = None if hints is None or not hints.any() else network_hints(hints, *evidence.low.shape)
    net, offset = odds_of(model)
    grown = tree.grow(evidence, net, hint, model.tidy["least"])
    claimed = None if hint is None else claims(evidence, grown, hint, net, closed, offset)
    return grown, grown.cut(grain, offset, claimed)


def sample_maps(job, model, grain="normal"):
    """A job's n samples -> a map of each, (n, h, w) from 0: as sampled, or (with tiles, always) cut from its own
    tree. TOGETHER trees grow at once."""
    if not model.tidy["merge"] and not job.tiles:
        return model.codec.decode(torch.stack(job.x_hat).float()).numpy()
    (net, offset), maps, n = odds_of(model), [], len(job.x_hat)
    for k in range(0, n, TOGETHER):
        seen = [evidence_of(job, model.codec, slice(j, j + 1)) for j in range(k, min(k + TOGETHER, n))]
        maps += [grown.cut(grain, offset) for grown in tree.grow_each(seen, net, model.tidy["least"])]
    return np.stack(maps)


def placed(maps, side):
    """Label maps (n, h, w) -> the same with the palette's places as numbers, and the palette's side: `side`
    or, for more segments than it has places, the next power of two that suffices."""
    while side * side < max(len(np.unique(one)) for one in maps):
        side *= 2
    return locate(torch.from_numpy(np.asarray(maps)).long(), side), side


def answer(grown, labels, result, hints=None):
    """A tree and a map (h, w) cut from it -> Answer at the size of result.image; hints may have another
    size."""
    net, _ = odds_of(result.model)
    sure, borders = tree.confidence(grown, labels, net)
    cells, side = placed(labels[None], result.side)
    place = cells[0].numpy()
    place_of = np.zeros(int(labels.max()) + 1, int)
    place_of[labels] = place
    full = enlarge(cells, result.image, result.calm)[0]
    if hints is not None and hints.any():  # exactly, to the pixel: each hint is what its segment is
        small = shrink(hints, *labels.shape)
        hints = subsample(torch.from_numpy(hints), *full.shape).numpy()
        here = hints > 0
        ids, at = np.unique(hints[here], return_inverse=True)
        numbers = np.array([place[small == i].flat[0] for i in ids], int)
        full[torch.from_numpy(here)] = torch.from_numpy(numbers[at]).to(full.dtype)
    confidence = {int(place_of[k]): float(sure[k]) for k in range(len(place_of))}
    segments = coco_segments(full.numpy(), confidence)
    left = {s["id"] for s in segments}  # in a photo smaller than the map, segments may lose all their pixels
    pairs = [(int(place_of[i]) + 1, int(place_of[j]) + 1, float(p)) for i, j, p in borders]
    return Answer(full, side, segments, [pair for pair in pairs if left.issuperset(pair[:2])])


def summarise(job, image, model, grain="normal", closed=False):
    """Job and its PIL image -> Segmentation."""
    job = job.first(len(job.x_hat))
    x_hat, codec, (width, height) = torch.stack(job.x_hat), model.codec, image.size
    n, side = len(x_hat), int(np.ceil(codec.classes**0.5))
    maps = sample_maps(job, model, grain)
    h, w = maps.shape[1:]
    if model.tidy["merge"] or job.tiles:
        cells, side = placed(maps, side)
    else:
        cells = torch.from_numpy(maps)
        side = max(side, int(np.ceil((maps.max() + 1) ** 0.5)))
    wide, tall = (max(1, min(v, round(v * SHOWN / max(width, height)))) for v in (width, height))
    small = image if max(width, height) <= SHOWN else image.resize((wide, tall), Image.Resampling.BOX)
    reach = max(1, round(max(tall, wide) / max(h, w)))  # a pixel of the network
    boundary = torch.zeros(1, tall, wide)
    for one in enlarge(cells, small):
        edge = F.pad(outline(one).float()[None], ((reach - 1) // 2, reach // 2) * 2)
        boundary += F.max_pool2d(edge, reach, 1) / n
    bits = None
    if codec.has_bits:
        bits = entropy(x_hat.mean(0, keepdim=True))[None]
        bits = F.interpolate(bits, (tall, wide), mode="bilinear")[0, 0]
    result = Segmentation(None, cells, side, agreement(cells), boundary[0], bits, x_hat, image,
                          evidence_of(job, codec), model)
    result.answer = result.cut(grain, job.hints, closed)
    return result


def agreement(cells):
    """(n, h, w) -> (n,): the mean ARI of each map to the others; nan if n = 1."""
    every = torch.zeros(len(cells), len(cells), dtype=torch.float64)
    for k in range(1, len(cells)):  # one after the other, so that hundreds fit into memory
        every[k, :k] = every[:k, k] = ari(contingency(cells[k].expand(k, -1, -1), cells[:k]))
    return every.sum(1) / (len(cells) - 1)


def coco_segments(labels, confidence):
    """The segments of labels (H, W) as COCO annotations; confidence: {label: number}."""
    flat, out = np.ascontiguousarray(labels.T).ravel(), []  # COCO counts pixels column by column
    last = np.flatnonzero(np.append(flat[1:] != flat[:-1], True))
    first, owner = np.concatenate([[0], last[:-1] + 1]), flat[last]
    for label in np.unique(owner).tolist():
        starts, ends = first[owner == label], last[owner == label] + 1
        bounds = np.stack([starts, ends], 1).ravel()  # of the pixels that are not it and are it, in turn
        counts = np.diff(bounds, prepend=0, append=len(flat)).tolist()
        counts = counts if counts[-1] else counts[:-1]
        rle = coco_mask.frPyObjects(dict(size=list(labels.shape), counts=counts), *labels.shape)
        out.append(dict(id=label + 1, image_id=1, category_id=1, iscrowd=0, area=int(coco_mask.area(rle)),
                        bbox=[int(v) for v in coco_mask.toBbox(rle)], confidence=round(confidence[label], 4),
                        segmentation=dict(size=rle["size"], counts=rle["counts"].decode())))
    return out
