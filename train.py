"""Train a bit-diffusion segmenter.

    python train.py                           # tiny, on synthetic shapes: 4 minutes on 2 CPU cores
    python train.py --dataset path/to/folder  # small, on your images/ and labels/
    python train.py --dataset coco            # the paper's model, on COCO panoptic

    torchrun --nproc_per_node=8 train.py --preset paper-fast --dataset coco  # the same run, shared by 8 GPUs
    python train.py --export model.pt --out out/coco-paper  # averaged weights and configuration only

Stop with Ctrl-C at any time. To resume, run the same command again. Everything goes to --out: ckpt.pt, the
one before it (ckpt.prev.pt), best.pt (highest validation ARI), log.jsonl and samples_<step>.png (image,
truth, samples).
"""

import contextlib
import copy
import dataclasses
import getpass
import math
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data as datasets
import kernels
from answers.pictures import grid, overlay, side_of
from answers.segment import Model, denoise, packed_job, placed, sample_map
from bits import Codec, hint_bits, paint
from diffusion import (
    SAMPLERS,
    VARIANCES,
    Diffusion,
    draw,
    fused,
    fused_training_loss,
    to_device,
    training_loss,
)
from engine import (
    HANGUP,
    NO_FLOAT64,
    Beside,
    Damaged,
    NoGraph,
    Step,
    Watch,
    any_stopped,
    append,
    fit_state,
    foreign,
    forget,
    join_processes,
    layout,
    lock,
    newest,
    on_host,
    options_given,
    out_of_memory,
    pick_device,
    pick_precision,
    program,
    read,
    save,
    try_to_write,
    update_ema,
)
from metrics import scores
from model import SIZES, UNet


@dataclass
class Config:
    # The defaults are the paper's. A preset (below) changes some; --lr 3e-4 has the last word

    # shapes, coco, entity, ade20k, bsds500, or a folder: images/ and labels/, LabelMe, VOC, Cityscapes,
    # exports of Roboflow, CVAT ...; several, each with a weight and options of its own:
    # photos:3,streets:components:ignore,shapes
    dataset: str = "shapes"
    compose: float = 0.0  # share of training scenes pasted together from pieces of the images
    preset: str = ""  # a row of PRESETS; "": tiny for shapes, paper for coco and entity, else small
    network: str = ""  # tiny, photo, small or paper (model.SIZES); "": the preset's
    out: str = ""  # "": out/<dataset>-<preset>
    root: str = "data"  # coco is expected in <root>/coco, and so on
    cache: str = "cache"  # resized copies of the data set; safe to delete
    seed: int = 0  # of everything random; below 2^22
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"  # auto, fp32, bf16, fp16
    kernels: str = ""  # auto (Triton with CUDA), triton, torch; "": BITSEG_KERNELS, or auto
    compile: str = "auto"  # on, off; auto: on with CUDA. A minute at the start, then faster steps
    graph: str = "auto"  # on, off; auto: on with CUDA. A step is one CUDA graph then
    init: str = ""  # a checkpoint whose weights to start from (fine-tuning)
    export: str = ""  # write the averaged weights of --out there, and do nothing else
    # data
    image_size: int = 128  # longer side, in pixels; cost grows with its square
    augment: bool = True  # of real images; off only to see a model overfit
    unlabelled: str = "segment"  # id 0: one segment (as in the paper), or ignore
    void: str = ""  # ids that are ignored, e.g. 255 (VOC, Cityscapes); several: 254,255
    components: bool = False  # labels are classes: their connected parts become the segments
    max_bad: float = 0.01  # share of unusable images or label maps that is too much
    crop: float = 1.0  # smallest share of the sides that random crops keep; 1: none
    jitter: float = 1.0  # how often colours are changed, as a multiple of the paper's probabilities
    workers: int = 1  # threads that read ahead; 0: none
    # encoding
    encoding: str = "bits"  # bits, onehot, rgb (the last two are the paper's baselines)
    bits: int = 6  # 2^bits segments at most; 8 or 10 for very crowded images
    palette: str = "similar"  # similar, random, different, range, none (ablations)
    activation: str = ""  # "": tanh for bits; none, sigmoid, softmax, tanh
    # diffusion
    schedule: str = "cosine"  # cosine, linear, linear_simple, parabola
    input_scale: float = 0.1  # b; smaller = harder. Lower it for larger images
    prediction: str = "x"  # x, eps, v
    loss: str = "mse"  # mse, bce (cross entropy of the bits; for prediction x)
    weighting: str = "sigmoid"  # sigmoid, snr, snr+1, snr_trunc, uniform. uniform learns fastest
    bias: float = -4.0  # of the sigmoid weighting
    logsnr_space: bool = True  # the factor -dlambda/dt in the loss
    image_drop: float = 0.05  # share of samples trained without the image, for guidance
    self_condition: float = 0.0  # share of samples that see a first guess; doubles the forward cost
    hints: float = 0.0  # share of samples that see hints, bits of a few pixels; for encoding bits
    # optimisation
    batch_size: int = 8
    accumulate: int = 1  # micro-batches a step: raise it when batch_size does not fit
    max_steps: int = 300_000
    lr: float = 1e-4
    warmup_steps: int = 1000
    decay_steps: int = 50_000  # cosine decay to 0 over the last so many steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradients; 0: any
    ema: float = 0.9999  # decay a step of the averaged weights; lower for short runs
    dropout: float = 0.0
    # validation, by real sampling with the averaged weights
    eval_every: int = 10_000  # steps
    eval_images: int = 256
    steps: int = 8  # denoising steps
    guidance: float = 1.0  # 0: half the cost
    sampler: str = "ddpm"  # ddpm, ddim
    variance: str = "large"  # large, small (ddpm)
    smooth: float = 0.0  # share of the side over which answers are averaged between the image's edges
    least: int = 0  # regions of fewer pixels join a neighbour first (tree.py); 0: none
    # answers are cut where the odds that people part two regions reach this; 0: as sampled
    merge: float = 0.0
    # logging
    log_every: int = 100
    save_every: int = 1000
    keep_every: int = 0  # besides, keep ckpt_<step>.pt every so many steps; 0: none


PRESETS = {  # a network of model.SIZES, and the recipe that suits it
    "tiny":  dict(image_size=40,  batch_size=16, max_steps=2500,    lr=2e-3, warmup_steps=50,
                  decay_steps=2300,   ema=0.99,   weighting="uniform", logsnr_space=False, guidance=1.0,
                  bits=4, log_every=50,  save_every=250,  eval_every=1250, smooth=0.2),
    "photo": dict(image_size=96,  batch_size=16, max_steps=100_000, lr=1e-3, warmup_steps=200,
                  decay_steps=50_000, ema=0.999,  weighting="uniform", logsnr_space=False, loss="bce",
                  guidance=16.0, bits=6, log_every=100, save_every=500,  eval_every=5000, crop=0.5,
                  jitter=2.0, dropout=0.1, weight_decay=0.03, smooth=0.2, least=2, merge=1.0),
    "small": dict(image_size=64,  batch_size=16, max_steps=50_000,  lr=5e-4, warmup_steps=500,
                  decay_steps=25_000, ema=0.999,  weighting="uniform", logsnr_space=False, guidance=1.0,
                  bits=6, log_every=50,  save_every=500,  eval_every=2500),
    "paper": dict(image_size=128, batch_size=8,  max_steps=300_000, lr=1e-4, warmup_steps=1000,
                  decay_steps=50_000, ema=0.9999, weighting="sigmoid", logsnr_space=True,  guidance=1.0,
                  bits=6, log_every=100, save_every=1000, eval_every=10_000),
    # the same number of images in batches of 128: lr by the square root of the batch, EMA over as many images
    "paper-fast": dict(network="paper", image_size=128, batch_size=128, max_steps=18_750, lr=4e-4,
                       warmup_steps=500, decay_steps=3125, ema=0.9984, weighting="sigmoid", logsnr_space=True,
                       guidance=1.0, bits=6, log_every=20, save_every=250, eval_every=625),
}

# May change on resume.
FREE = {"out", "root", "cache", "device", "kernels", "compile", "graph", "workers", "init", "export",
        "accumulate", "max_steps", "eval_every", "eval_images", "log_every", "save_every", "keep_every",
        "max_bad"}

RANGES = dict.fromkeys(("batch_size", "accumulate", "max_steps", "image_size", "eval_every", "eval_images",
                        "steps", "log_every", "save_every"), (1, math.inf))
RANGES |= dict.fromkeys(("keep_every", "workers", "warmup_steps", "decay_steps", "lr", "weight_decay",
                         "grad_clip", "jitter", "guidance", "smooth", "least", "merge"), (0, math.inf))
RANGES |= dict.fromkeys(("compose", "dropout", "image_drop", "self_condition", "hints", "max_bad"), (0, 1))
RANGES |= {"seed": (0, 2**22 - 1), "crop": (0.01, 1), "ema": (0, 0.999999), "input_scale": (1e-6, math.inf),
           "bias": (-100, 100)}
CHOICES = {"sampler": SAMPLERS, "variance": VARIANCES}


def parse(argv):
    """Command line -> Config: the dataclass' defaults, then the preset, then --key value. Raises
    ValueError."""
    given = options_given(argv, Config)
    dataset = given.get("dataset", Config.dataset)
    sets = datasets.names(dataset)
    preset = given.get("preset") or {("shapes",): "tiny", ("coco",): "paper",
                                     ("entity",): "paper"}.get(tuple(sets), "small")
    if preset not in PRESETS:
        raise ValueError(f"preset '{preset}' is not one of {', '.join(PRESETS)}")
    c = Config(**{**PRESETS[preset], **given, "preset": preset})
    datasets.parse_void(c.void)
    c.out = c.out or f"out/{Path(sets[0]).resolve().name}{'-and-more' if len(sets) > 1 else ''}-{preset}"
    c.network = c.network or preset
    if c.network not in SIZES:
        raise ValueError(f"network '{c.network}' is not one of {', '.join(SIZES)}")
    for key, (low, high) in RANGES.items():
        # nan is in no range
        if not (low <= getattr(c, key) <= high and (math.isfinite(getattr(c, key)) or key == "grad_clip")):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"--{key} must be {span}, not {getattr(c, key)}")
    for key, known in CHOICES.items():
        if getattr(c, key) not in known:
            raise ValueError(f"--{key} is {' or '.join(known)}, not '{getattr(c, key)}'")
    codec = codec_of(c)
    if codec.clusters and (c.least or c.merge):
        raise ValueError(f"--least and --merge must be 0 with --encoding {c.encoding}, not {c.least} and "
                         f"{c.merge}")
    if c.hints and not codec.has_bits:
        raise ValueError(f"--hints are bits: use --encoding bits, not {c.encoding}, or --hints 0")
    if c.crop < 1 and (not c.augment or sets == ["shapes"]):
        raise ValueError("--crop belongs to the augmentation of real images: not with shapes, nor with "
                         "--augment false")
    if c.batch_size % c.accumulate:
        raise ValueError(f"--batch_size {c.batch_size} cannot be split into --accumulate {c.accumulate} "
                         f"equal parts")
    return c


def codec_of(c):
    return Codec(c.encoding, c.bits, c.palette, c.seed, c.activation)


def help_text(doc):
    """A docstring, then Config as it stands in this file."""
    source = Path(__file__).read_text()
    body = source.split("class Config:\n")[1].split("\n\n\n")[0]
    return f"{doc}\noptions (--key value), with their defaults:\n\n{body}\n"


# ------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate(step, c):
    """Linear warm-up, constant, cosine decay to 0 over the last decay_steps."""
    left = (c.max_steps - step) / max(1, min(c.decay_steps, c.max_steps))
    return c.lr * min(1.0,
                      (step + 1) / max(1, c.warmup_steps)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def batches(data, step, c, codec, diffusion, device, rank, world, fast):
    """What the steps from number `step` on need: files are read ahead in threads; on CUDA, the rest on a
    stream of its own.

    Yields dictionaries of what `training_loss` takes and `draw` draws, on the device, one row a sample: every
    world-th sample of the global batch. All of it depends on the seed and on the step alone, whoever computes
    it.
    fast: what `fused` returned, for the kernels' loss. Nothing waits for a CUDA device, up to 1,024 segments
    an image.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    source = datasets.batches(data, step * c.batch_size, c.batch_size, c.seed, c.workers, rank, world,
                              pin=bool(stream))
    mine, detail = slice(rank, None, world), SIZES[c.network].get("detail", 1)
    photos = c.augment and datasets.names(c.dataset) != ["shapes"]
    codec = copy.copy(codec)
    codec.table = codec.table.to(device)  # once, not at every step
    kind = torch.int8 if codec.classes <= 128 else torch.int16  # of the kernels' cells

    def make(step):
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            images, labels, sizes, u = (v.to(device, non_blocking=True) for v in next(source))
            if photos:
                x, _, labels = datasets.augment(images, labels, sizes, u, c.image_size, c.crop, c.jitter,
                                                detail)
            else:
                x, _, labels = datasets.unchanged(images, labels, sizes, detail)
            generator = torch.Generator().manual_seed(c.seed * 2**32 + step)
            drawn = draw((c.batch_size, codec.channels, *labels.shape[1:]), diffusion, generator, device,
                         eps=not fast)
            if diffusion.hints > 0:
                drawn["u"] = to_device(torch.rand(c.batch_size, datasets.NUMBERS, generator=generator),
                                       device)
            drawn = {k: v[mine] for k, v in drawn.items()}
            hints = datasets.draw_hints(labels, drawn.pop("u"),
                                        diffusion.hints) if diffusion.hints > 0 else None
            numbers = range(step * c.batch_size, (step + 1) * c.batch_size)[mine]  # of the run's samples
            if codec.palette == "none":  # random codes, from each sample's number
                own = [torch.Generator().manual_seed(c.seed * 2**40 + i) for i in numbers]
                order = torch.cat([torch.rand(1, codec.classes, generator=g).argsort(1) for g in own])
                cells = random_cells(labels, to_device(order, device), data.labels_below)
            elif fast and hints is None:
                # a promise, so that nothing waits
                below = data.labels_below if data.labels_below <= 1024 else None
                cells = kernels.locate(labels, codec.side, dtype=kind, labels_below=below)
            else:
                on = "cpu" if device.type in NO_FLOAT64 else device  # exact centroids need it
                cells = codec.cells(labels.to(on), hints=None if hints is None else hints.to(on)).to(device)
            if hints is not None:
                drawn["hints"] = hint_bits(codec.encode(cells), hints)
            if fast:
                seeds = torch.arange(numbers.start, numbers.stop, numbers.step,
                                     device=device) + c.seed * 2**40
                batch = dict(cells=cells.to(kind), image=x, seeds=seeds, **drawn)
            else:
                batch = dict(x0=codec.encode(cells), image=x, valid=cells >= 0, **drawn)
            return batch, stream and stream.record_event()

    try:
        coming = make(step)
        while True:
            (batch, ready), step = coming, step + 1
            if stream:
                torch.cuda.current_stream().wait_event(ready)
                for v in batch.values():
                    v.record_stream(torch.cuda.current_stream())  # not reused before this stream is done
                coming = make(step)  # while the network works on this one
            yield batch
            if not stream:  # a CPU's cores are busy with the network
                coming = make(step)
    finally:
        source.close()


def random_cells(labels, order, below):
    """The `none` palette as bits.random_cells has it, without a wait: segments get cells by their size.

    labels (B, H, W) in [-1, below); order (B, classes) int64: what the largest segment of each map gets, the
    second largest, ... -> (B, H, W).
    """
    flat = labels.flatten(1)
    index = torch.where(flat >= 0, flat, below)
    counts = torch.zeros(len(flat), below + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add_(1, index, torch.ones_like(index))[:, :below]
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 = the largest segment
    rank = torch.where(rank < order.shape[1], rank, 0)  # too many: into the largest
    return paint(order.gather(1, rank), index, labels.shape)


# ------------------------------------------------------------------------------------------------------------
# Validation, by real sampling with the averaged weights


class Stopped(Exception):
    pass


def validate(net, run, c, stop):
    """Mean ARI and IoU over images and annotators, one sample an image, and a picture of the first 8; None if
    stopped."""
    data, codec, rank, world = run.val_data, run.codec, run.rank, run.world
    n, totals, tiles, side = min(c.eval_images, len(data)), [], [], side_of(codec)
    device = next(net.parameters()).device
    sampling = dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance,
                    smooth=c.smooth)
    model = Model(net, codec, run.diffusion, c.image_size, sampling, c.dataset, 0,
                  dict(least=c.least, merge=c.merge))
    size = min(32, c.batch_size) if device.type == "cpu" else 32  # small: a signal is looked at in between

    def look(*_):
        if stop:
            raise Stopped

    def maps_of(at, seeds):
        """One sample's map (h, w) of each image."""
        jobs = [packed_job(data, i, seed) for i, seed in zip(at, seeds)]
        return [sample_map(job.x_hat[0], job.photo, model)
                for job in denoise(jobs, model, 1, size, callback=look)]

    try:
        for start in range(size * rank, n, size * world):
            at = list(range(start, min(start + size, n)))
            found = maps_of(at, at)
            for i, one in zip(at, found):
                maps = data.maps(i)[:, : one.shape[0], : one.shape[1]]
                s = scores(torch.from_numpy(one).long().expand(len(maps), -1, -1), maps)
                totals.append([float(s["ari"].nanmean()), float(s["iou"].nanmean())])
            m = min(8 - len(tiles), len(at)) if rank == 0 else 0
            if m > 0:
                labels = data.get(at[:m])[1]
                truth = (Codec(bits=codec.bits) if codec.palette == "none" else codec).cells(labels)
                more = [maps_of(at[:m], [1000 * j + i for i in at[:m]]) for j in (1, 2)]
                for i, true, *three in zip(at, truth, found, *more):
                    if c.merge:
                        three = [placed(one[None], side)[0][0] for one in three]
                    image, (h, w) = np.zeros((*true.shape, 3), np.uint8), three[0].shape
                    image[:h, :w] = packed_job(data, i).photo
                    padded = [np.pad(one, [(0, c.image_size - n) for n in one.shape],
                                     constant_values=-1) for one in three]
                    tiles.append([image, *(overlay(image, v, side, 0.8) for v in (true, *padded))])
    except Stopped:
        pass
    scored = torch.tensor(totals, dtype=torch.float64).reshape(-1, 2)
    sums = torch.cat([scored.nansum(0), (~scored.isnan()).sum(0), torch.tensor([len(stop)])]).double()
    if world > 1:
        dist.all_reduce(sums)
    if sums[4]:
        return None
    ari, iou = (sums[:2] / sums[2:4]).tolist()
    if rank > 0:
        return ari, iou, None
    scale = max(1, 128 // c.image_size)
    sheet = grid([tile.repeat(scale, 0).repeat(scale, 1) for row in tiles for tile in row],
                 columns=2 * len(tiles[0]))
    return ari, iou, Image.fromarray(sheet)


def save_picture(picture, path):
    """Write it, or raise OSError and leave no half of it."""
    try:
        picture.save(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------
# The run


@program("train.py", "run the same command again to go on")
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(help_text(__doc__))
        return 0
    try:
        c = parse(argv)
        if c.export:
            return export(c)
        run = prepare_run(c)
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    status = train(c, run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def portable(content):
    """What sampling needs of a checkpoint: the averaged weights and the configuration."""
    return {k: v for k, v in content.items() if k not in ("net", "optimizer", "scaler")}


def export(c):
    content, path, problem = newest(Path(c.out) / "ckpt.pt")
    if content is None:
        raise ValueError(f"{c.out}/ckpt.pt: no such file: train first, or name the folder of a run with "
                         f"--out")
    if problem:
        print(f"{problem}; using the one before, {path}", file=sys.stderr)
    save(c.export, portable(content))
    print(f"{c.export}: averaged weights and configuration of {path}, step {content['step']}")
    return 0


def build(c, local=None):
    """What the configuration stands for: device, dtype, why, codec, diffusion, the network's arguments, the
    network."""
    device = pick_device(c.device)
    if device.type == "cuda":
        device = device if local is None else torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # graphs cannot be made on the default one
        torch.backends.cudnn.benchmark = True
    dtype, why = pick_precision(c.precision, device)
    try:
        kernels.use(c.kernels or kernels.mode)
        kernels.live(device)
    except RuntimeError as e:
        raise ValueError(e) from None
    for name in ("compile", "graph"):
        if getattr(c, name) not in ("auto", "on", "off"):
            raise ValueError(f"{name} is auto, on or off, not '{getattr(c, name)}'")
    codec = codec_of(c)
    names = [f.name for f in dataclasses.fields(Diffusion) if f.name in Config.__dataclass_fields__]
    diffusion = Diffusion(**{name: getattr(c, name) for name in names})
    if c.loss == "bce" and not (codec.has_bits and codec.activation == "tanh"):
        raise ValueError(f"--loss bce is of bits that come out of a tanh, not of {codec.encoding} out of "
                         f"{codec.activation}: use --loss mse")
    copies = 1 + (c.hints > 0) + (c.self_condition > 0)  # of the bits: xt, hints, x_self
    seen = 3 * SIZES[c.network].get("detail", 1) ** 2  # channels of the image
    network = dict(in_channels=copies * codec.channels + seen, out_channels=codec.channels, dropout=c.dropout,
                   **SIZES[c.network])
    torch.manual_seed(c.seed)
    net = UNet(**network)
    if c.image_size % net.multiple:
        near = max(1, round(c.image_size / net.multiple)) * net.multiple
        raise ValueError(f"--image_size {c.image_size}: network {c.network} needs a multiple of "
                         f"{net.multiple}, e.g. {near}")
    return device, dtype, why, codec, diffusion, network, net.to(device, memory_format=layout(device))


def switches(c, device, dtype, world):
    """Whether to compile, and whether to make a CUDA graph. Raises ValueError for a graph that cannot be."""
    able = device.type == "cuda" and world == 1 and dtype != torch.float16
    if c.graph == "on" and not able:
        raise ValueError("--graph on needs CUDA, a single process and no fp16: use --graph auto")
    return c.compile == "on" or c.compile == "auto" and device.type == "cuda", able and c.graph != "off"


def loss_of(diffusion, codec, dtype, fast):
    """loss(net, batch) of a dictionary that `batches` yields; fast: what `fused` returned, for both."""
    def loss(net, batch):
        if fast:
            return fused_training_loss(net, batch["cells"], batch["image"], codec.channels, batch["seeds"],
                                       diffusion, batch,
                                       codec.activate, **fast, dtype=dtype or torch.float32,
                                       hints=batch.get("hints"))
        return training_loss(net, batch["x0"], batch["image"], batch["valid"], diffusion, codec.activate,
                             drawn=batch,
                             hints=batch.get("hints"))

    return loss


def differences(old, new, free):
    """["key old -> new", ...] of two dictionaries, but for the keys in free."""
    return [f"{k} {old.get(k, '(none)')} -> {new.get(k, '(none)')}" for k in {**new, **old}
            if k not in free and old.get(k) != new.get(k)]


def extras(d):
    """What a network trained with these options sees beside xt and the image, in the order of its input
    channels."""
    return [name for name in ("hints", "self_condition") if d.get(name, 0) > 0]


def widened(weights, wide):
    """weights, with zeros for the input channels at the end that only wide has; both are a UNet's
    state_dict."""
    out = dict(weights)
    for name in {"stem.weight", "finer.bits.weight"} & wide.keys():  # they fold each channel on its own
        out[name] = torch.zeros_like(wide[name])
        out[name][:, : weights[name].shape[1]] = weights[name]
    return out


@dataclass
class Run:
    """What a run is made of: built once by `prepare_run`."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32
    why: str  # this dtype
    codec: Codec
    diffusion: Diffusion
    network: dict  # the arguments of UNet
    net: UNet
    resumed: dict | None  # the checkpoint to go on from
    origin: str  # of the weights, in words
    train_data: object  # data.load's
    val_data: object
    rank: int
    world: int  # processes
    held: object  # the lock of --out


def prepare_run(c):
    """Config -> Run. All that can be wrong with the user's input goes wrong here. Raises ValueError or
    OSError."""
    rank, world, local = (int(os.environ.get(k, d))
                          for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if c.batch_size % (c.accumulate * world):
        raise ValueError(f"--batch_size {c.batch_size} cannot be split among {world} processes x "
                         f"--accumulate {c.accumulate}")
    device, dtype, why, codec, diffusion, network, net = build(c, local if world > 1 else None)
    switches(c, device, dtype, world)
    origin = "from scratch"
    if c.init:
        source = read(c.init, device)
        if lacks := {"network", "ema"} - source.keys():
            raise ValueError(f"--init {c.init} lacks {', '.join(sorted(lacks))}: it is no checkpoint of "
                             f"train.py")
        old, new = (extras(d) for d in (source.get("diffusion", {}), vars(c)))
        differ = differences(source["network"], network, {"dropout"})
        if new[: len(old)] != old or differences(source["network"], network, {"dropout", "in_channels"}):
            # as many channels, of another meaning
            differ = differ or [f"inputs {', '.join(old)} -> {', '.join(new)}"]
            raise ValueError(f"--init {c.init} is another network ({'; '.join(differ)}): "
                             f"choose --network, --bits and --encoding as it has them")
        net.load_state_dict(widened(source["ema"], net.state_dict()))
        added = network["in_channels"] - source["network"]["in_channels"]
        origin = f"from the weights of {c.init}" + f", {added} more input channels at zero" * (added > 0)
    common = dict(root=c.root, cache=c.cache, seed=c.seed, unlabelled=c.unlabelled, components=c.components,
                  max_bad=c.max_bad, void=c.void)
    train_data = datasets.load(c.dataset, "train", datasets.packed_side(c.image_size, c.crop, net.detail),
                               compose=c.compose, **common)
    val_data = datasets.load(c.dataset, "val", c.image_size, detail=net.detail, **common)
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out) if rank == 0 else None  # one writer
    resumed, path, problem = newest(out / "ckpt.pt", device)
    if resumed:
        lacks = {"net", "ema", "optimizer", "scaler", "config", "step", "best", "validated"} - resumed.keys()
        if lacks:
            raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it was made by --export or another "
                             f"version; start from "
                             f"its weights with --init, into another --out")
        old = {"void": "", "hints": 0.0, **resumed["config"]}  # versions before had none
        if datasets.same(old["dataset"], c.dataset, resumed.get("contents"), train_data):
            old["dataset"] = c.dataset
        if differ := differences(old, vars(c), FREE) + differences(resumed["network"], network, {"dropout"}):
            raise ValueError(f"{path} was made with other options ({'; '.join(differ)}): use the same, or "
                             f"another --out")
    else:
        check_out(out)
    if world > 1:
        join_processes(rank, world, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        step = torch.tensor([resumed["step"] if resumed else 0])
        steps = [torch.zeros_like(step) for _ in range(world)]
        dist.all_gather(steps, step)  # all have read: now files may change
        if len({int(v) for v in steps}) > 1:
            raise ValueError(f"{out} holds different checkpoints on different machines: --out must be a "
                             f"shared folder")
    if problem and rank == 0:
        print(f"WARNING: {problem}; going on from the one before, {path}", file=sys.stderr)
        if (out / "ckpt.pt").exists():  # it must not become the one before
            os.replace(out / "ckpt.pt", out / "ckpt.damaged")
    return Run(device, dtype, why, codec, diffusion, network, net, resumed, origin, train_data, val_data,
               rank, world, held)


def check_out(out):
    """Raises ValueError where a run that starts anew would change a file of somebody else's."""
    log, best = out / "log.jsonl", out / "best.pt"
    kept = [log] if foreign(log, b'{"step": ') else []
    if best.exists():
        try:
            read(best)
        except Damaged:
            kept.append(best)
    if kept:
        raise ValueError(f"{kept[-1]} was not written by train.py: move it, or choose another --out")


def train(c, run):
    device, net, rank, world = run.device, run.net, run.rank, run.world
    out, step, best, validated = Path(c.out), 0, -math.inf, 0
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    kind = dict(fused=device.type in ("cuda", "cpu"), capturable=device.type == "cuda")
    optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, betas=(0.9, 0.999), weight_decay=c.weight_decay,
                                  **kind)
    fast, (compiled, graph) = fused(run.codec, device), switches(c, device, run.dtype, world)
    update = Step(net, loss_of(run.diffusion, run.codec, run.dtype, fast), optimizer, run.dtype, c.accumulate,
                  c.grad_clip,
                  compiled, graph, world)
    if run.resumed:
        step, best, validated = run.resumed["step"], run.resumed["best"], run.resumed["validated"]
        net.load_state_dict(run.resumed["net"])
        ema.load_state_dict(run.resumed["ema"])
        optimizer.load_state_dict(run.resumed["optimizer"])
        optimizer.param_groups[0].update(kind)  # the run may have changed devices
        fit_state(optimizer)
        update.scaler.load_state_dict(run.resumed["scaler"])

    def content():
        return dict(
            step=step, best=best, validated=validated, config=vars(c), dataset=c.dataset,
            image_size=c.image_size,
            network=run.network, contents=datasets.contents(run.train_data),
            codec=dict(encoding=c.encoding, bits=c.bits, palette=c.palette, seed=c.seed,
                       activation=c.activation),
            diffusion=dataclasses.asdict(run.diffusion),
            sampling=dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance,
                          smooth=c.smooth),
            tidy=dict(least=c.least, merge=c.merge),
            net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            scaler=update.scaler.state_dict())

    def put(name, action):  # rank 0 writes; a full disk only warns
        return rank > 0 or try_to_write(out / name, lambda: action(out / name))

    def store(name, choose=dict, **more):
        """Write a checkpoint beside the training, which waits for the one before and for a copy to the
        host."""
        if rank == 0:
            beside.wait()
            held = on_host(choose(content()))
            beside(lambda: put(name, lambda path: save(path, held, **more)))

    def checkpoint():
        store("ckpt.pt", keep_previous=True)

    def saved():
        return rank > 0 or beside.wait()

    def say(text, **line):
        if rank == 0:
            print(text, flush=True)
        if line:
            put("log.jsonl", lambda path: append(path, line))

    say(textwrap.fill("  ".join(f"{k}={v}" for k, v in vars(c).items()), 120, break_on_hyphens=False))
    size = "endless" if len(run.train_data) >= 2**31 else len(run.train_data)
    origin = f"going on from step {step}" if run.resumed else run.origin
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters on "
        f"{f'{world} x ' if world > 1 else ''}{device}, "
        f"{str(run.dtype or torch.float32)[6:]} ({run.why}); kernels: {' ('.join(kernels.live(device))}); "
        f"{size} training images; {origin}; into {out}/")
    if step >= c.max_steps and validated == step:
        say(f"{out}/ckpt.pt is complete at step {step}: raise --max_steps to go on, or start anew with "
            f"another --out")
        return 0
    known = lambda line: line["step"] <= (validated if "ari" in line else step)
    put("log.jsonl", lambda path: forget(path, known))

    stop, first, started, beside = [], step, time.time(), Beside()  # stop: signals; looked at between steps

    def on_signal(number, frame):
        if step == first:  # still compiling, say: nothing to save
            raise SystemExit(128 + number)
        stop.append(number)
        if number == HANGUP:  # the shell repeats the kernel's
            signal.signal(number, signal.SIG_IGN)
        elif world == 1:  # torchrun repeats it
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    kinds = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # which nohup does
        kinds.append(HANGUP)
    handlers = {n: signal.signal(n, on_signal) for n in kinds}
    coming = batches(run.train_data, step, c, run.codec, run.diffusion, device, rank, world, fast)
    stopped, watch, seen = any_stopped(stop, world), Watch(), []  # seen: losses and norms since the last line
    try:
        while not next(stopped):
            if step > validated and (step % c.eval_every == 0 or step == c.max_steps):
                result = validate(ema, run, c, stop)
                if not result:  # stopped: it is made up for after a resume
                    continue
                ari, iou, picture = result
                validated = step
                drawn = put(f"samples_{step:06d}.png", lambda path: save_picture(picture, path))
                say(f"step {step:>6}  validation ARI {ari:.3f}  IoU {iou:.3f}"
                    + f"  -> {out}/samples_{step:06d}.png" * drawn,
                    step=step, ari=ari, iou=iou, seconds=time.time() - started)
                if ari > best:
                    best = ari
                    store("best.pt", portable)
            if step >= c.max_steps:
                checkpoint()
                say(f"done: {out}/ckpt.pt; now try: python sample.py --n 8 photo.jpg" if saved() else
                    f"done, but not saved in {out}/ckpt.pt: make room, and run the same command again")
                return 0 if saved() else 1

            batch, full = next(coming), False
            if c.dropout:  # a step's randomness: seed and step alone
                torch.manual_seed(c.seed * 2**32 + (rank + 1) * 2**24 + step)
            try:
                seen.append(update(batch, learning_rate(step, c)))
            except NoGraph as e:
                print(f"train.py: {e}: use --graph off and run the same command again", file=sys.stderr)
                return 2
            except RuntimeError as e:
                full = out_of_memory(e)
                if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    print(f"train.py: torch.compile failed ({str(e).strip().splitlines()[0]}): use "
                          f"--compile off; or, if it worked "
                          f"before, delete its cache, the folder torchinductor_{getpass.getuser()} among "
                          f"the temporary files", file=sys.stderr)
                    return 2
                if not full:
                    raise
            if full:  # here the failed step's memory is free again
                fits, tried = update.fits(batch), len(batch["image"]) // c.accumulate
                remedy = "choose a smaller --network"
                if fits:
                    remedy = f"add --accumulate {c.batch_size // world // fits}"
                print(f"train.py: out of memory on {device} with {tried} images at once; "
                      f"{fits or 'not even one'} would fit: "
                      f"{remedy} and run the same command again", file=sys.stderr)
                return 2
            update_ema(ema, net, step, c.ema)
            step += 1

            if step % c.log_every == 0 or step == c.max_steps:
                values = torch.stack(seen) / world  # (steps, 2)
                if world > 1:
                    dist.all_reduce(values)
                report = watch(*values.T.tolist(), first=step - len(seen))  # the only wait for the device
                more = {k: v for k, v in report.items() if k != "loss" and v}
                seen, spent = [], time.time() - started
                rate, mean = (step - first) / spent, math.nan if report["loss"] is None else report["loss"]
                say(f"step {step:>6}/{c.max_steps}  loss {mean:.4f}  lr {learning_rate(step - 1, c):.1e}  "
                    f"{rate * c.batch_size:.0f} images/s  {spent / 60:.1f} min, "
                    f"{(c.max_steps - step) / rate / 60:.1f} left"
                    + "".join(f"  {k}: {v}" for k, v in more.items()),
                    step=step, loss=report["loss"], lr=learning_rate(step - 1, c),
                    images_per_second=rate * c.batch_size,
                    seconds=spent, **more)
                if watch.worst >= 20:
                    say(f"stopped at step {step}: {watch.worst} steps in a row had no finite gradient, and "
                        f"changed nothing. "
                        f"Try a lower --lr, --precision fp32 or more --warmup_steps, into another --out")
                    return 1
            if c.keep_every and step % c.keep_every == 0:  # before ckpt.pt: a run goes on behind that
                store(f"ckpt_{step:06d}.pt")
            if step % c.save_every == 0:
                checkpoint()
        checkpoint()
        say(f"\nstopped{' and saved' if saved() else ''} at step {step}: run the same command again to go on")
        return 128 + (stop[0] if stop else signal.SIGTERM)
    finally:
        coming.close()
        beside.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
