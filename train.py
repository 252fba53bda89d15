"""Train a bit-diffusion segmenter.

    python train.py                           # tiny, on synthetic shapes: 3.5 minutes on 2 CPU cores
    python train.py --dataset path/to/folder  # small, on your images/ and labels/
    python train.py --dataset path/to/folder --preset finetune  # from the weights in the box, on a laptop
    python train.py --dataset coco            # the paper's model, on COCO panoptic

    torchrun --nproc_per_node=8 train.py --preset paper-fast --dataset coco  # as many images, on 8 GPUs
    python train.py --export model.pt --out out/coco-paper  # averaged weights and configuration only

Stop with Ctrl-C at any time. To resume, run the same command again. Everything goes to --out: ckpt.pt, the
one before it (ckpt.prev.pt), best.pt (highest validation ARI), log.jsonl and samples_<step>.png (image,
truth, samples).
"""

import contextlib
import copy
import dataclasses
import getpass
import itertools
import math
import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


def show_help(argv):
    """Print the docstring, Config and PRESETS, as they stand here, and end, where that is asked for."""
    if "-h" in argv or "--help" in argv:
        options = Path(__file__).read_text().split("class Config:\n")[1].split("\n}\n")[0]  # PRESETS' end
        try:
            print(f"{__doc__}\noptions (--key value), with their defaults:\n\n{options}\n", flush=True)
        except BrokenPipeError:  # whoever reads it has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit()


if __name__ == "__main__":
    show_help(sys.argv)  # before torch, whose import takes seconds

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, whose products are small here

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data as datasets
import kernels
from answers.checkpoints import SHIPPED, Model
from answers.jobs import packed_job
from answers.pictures import grid, overlay
from answers.segment import denoise, placed, sample_maps
from bits import Codec, finer_bits, hint_bits, random_cells
from diffusion import (
    SAMPLERS,
    VARIANCES,
    Diffusion,
    draw,
    fused_training_loss,
    host_seed,
    kernel_options,
    to_device,
    training_loss,
)
from engine import (
    HANGUP,
    LAYOUTS,
    NO_FLOAT64,
    PRECISIONS,
    Damaged,
    NoGraph,
    Step,
    Threads,
    Watch,
    any_stopped,
    append,
    fastest_form,
    fit_state,
    foreign,
    forget,
    host_threads,
    join_processes,
    layout,
    lock,
    make_folder,
    newest,
    on_host,
    options_given,
    out_of_memory,
    pick_device,
    pick_precision,
    program,
    read,
    save_checkpoint,
    stored,
    try_to_write,
    update_ema,
)
from metrics import scores
from model import SIZES, UNet, widened


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
    precision: str = "auto"  # auto, fp32, bf16, fp16; auto: on a CPU, a run of 100 steps or more measures it
    layout: str = "auto"  # auto, nchw, nhwc; auto: as precision
    kernels: str = ""  # auto (Triton with CUDA), triton, torch; "": BITSEG_KERNELS, or auto
    compile: str = "auto"  # on, off; auto: on with CUDA for 10,000 steps or more, as it takes 2 minutes first
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
    turns: bool = False  # quarter turns: for images without up and down, of microscopes or from above
    negative: float = 0.0  # share of samples that see the photo's negative
    jitter: float = 1.0  # how often colours are changed, as a multiple of the paper's probabilities
    # processes that make samples ahead; 0: a thread does; auto: cores - 1 of them with CUDA, else 0
    workers: str = "auto"
    threads: int = 0  # of the CPU; 0: as many as is fastest just now, so that rounding may vary; with CUDA 4
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
    balance: float = 0.0  # a pixel counts as its segment's area to this power less; 1: all segments alike
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
    eval_images: int = 256  # at most, drawn at random
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


PRESETS = {  # a network of model.SIZES, and what its recipe changes of the defaults
    "tiny":  dict(image_size=40, batch_size=16, max_steps=2500, lr=2e-3, warmup_steps=50, decay_steps=2300,
                  ema=0.99, weighting="uniform", logsnr_space=False, bits=4, log_every=50, save_every=250,
                  eval_every=1250, smooth=0.2),
    "photo": dict(image_size=96, batch_size=16, max_steps=100_000, lr=1e-3, warmup_steps=200, ema=0.999,
                  weighting="uniform", logsnr_space=False, loss="bce", guidance=16.0, save_every=500,
                  eval_every=5000, crop=0.5, jitter=2.0, dropout=0.1, weight_decay=0.03, smooth=0.2, least=2,
                  merge=1.0),
    # from the weights in the box: your own images, on a laptop
    "finetune": dict(network="photo", init=str(SHIPPED), image_size=96, batch_size=16, max_steps=1000,
                     lr=5e-4, warmup_steps=50, decay_steps=900, ema=0.98, weighting="uniform",
                     logsnr_space=False, loss="bce", steps=4, guidance=8.0, log_every=20, save_every=100,
                     eval_every=250, eval_images=64, crop=0.5, jitter=2.0, dropout=0.1, weight_decay=0.03,
                     hints=0.4, smooth=0.2, least=2, merge=1.0),
    # many small segments: finer maps and codes, closer crops; a cell of 100 pixels counts a tenth of a
    # background of 10,000, not a hundredth
    "crowded": dict(network="photo", batch_size=16, max_steps=5000, lr=1e-3, warmup_steps=50,
                    decay_steps=4850, ema=0.998, weighting="uniform", logsnr_space=False, loss="bce",
                    guidance=5.0, bits=8, log_every=20, save_every=100, eval_every=1000, crop=0.25,
                    jitter=2.0, turns=True, negative=0.3, dropout=0.1, weight_decay=0.03, hints=0.3,
                    balance=0.5, least=2, merge=1.0),
    "small": dict(image_size=64, batch_size=16, max_steps=50_000, lr=5e-4, warmup_steps=500,
                  decay_steps=25_000, ema=0.999, weighting="uniform", logsnr_space=False, log_every=50,
                  save_every=500, eval_every=2500),
    "paper": dict(),  # the defaults
    # the same number of images in batches of 128: lr by the square root of the batch, EMA over as many images
    "paper-fast": dict(network="paper", batch_size=128, max_steps=18_750, lr=4e-4, warmup_steps=500,
                       decay_steps=3125, ema=0.9984, log_every=20, save_every=250, eval_every=625),
}

RIM = 3  # pixels beside a small segment that count as much as it does, with --balance
COMPILED = 10_000  # steps of a run that is worth the minute that torch.compile takes

# May change on resume.
FREE = {"out", "root", "cache", "device", "layout", "kernels", "compile", "graph", "workers", "threads",
        "init", "export", "accumulate", "max_steps", "eval_every", "eval_images", "log_every", "save_every",
        "keep_every", "max_bad"}

RANGES = dict.fromkeys(("batch_size", "accumulate", "max_steps", "image_size", "eval_every", "eval_images",
                        "steps", "log_every", "save_every"), (1, math.inf))
RANGES |= dict.fromkeys(("keep_every", "warmup_steps", "decay_steps", "lr", "weight_decay",
                         "grad_clip", "jitter", "guidance", "smooth", "least", "merge"), (0, math.inf))
RANGES |= dict.fromkeys(("compose", "dropout", "image_drop", "self_condition", "hints", "balance", "negative",
                         "max_bad"), (0, 1))
RANGES |= {"seed": (0, 2**22 - 1), "crop": (0.01, 1), "ema": (0, 0.999999), "input_scale": (1e-6, math.inf),
           "bias": (-100, 100), "threads": (0, 1024)}
CHOICES = {"sampler": SAMPLERS, "variance": VARIANCES, "layout": ("auto", *LAYOUTS)}


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
    for key, allowed in CHOICES.items():
        if getattr(c, key) not in allowed:
            raise ValueError(f"--{key} is {' or '.join(allowed)}, not '{getattr(c, key)}'")
    if c.workers != "auto" and not c.workers.isdecimal():
        raise ValueError(f"--workers is auto or a number of processes, not '{c.workers}'")
    codec = codec_of(c)
    if codec.clusters and (c.least or c.merge):
        raise ValueError(f"--least and --merge must be 0 with --encoding {c.encoding}, not {c.least} and "
                         f"{c.merge}")
    if c.hints and not codec.has_bits:
        raise ValueError(f"--hints are bits: use --encoding bits, not {c.encoding}, or --hints 0")
    without = [off for off, on in (("--crop 1", c.crop < 1), ("--turns false", c.turns),
                                   ("--negative 0", c.negative)) if on]
    if without and (not c.augment or sets == ["shapes"]):
        raise ValueError(f"random crops, turns and negatives belong to the augmentation of real images: with "
                         f"shapes, or with --augment false, add {' '.join(without)}")
    if c.batch_size % c.accumulate:
        raise ValueError(f"--batch_size {c.batch_size} cannot be split into --accumulate {c.accumulate} "
                         f"equal parts")
    return c


# what a checkpoint holds besides the configuration, for those who sample from it
CODEC = ("encoding", "bits", "palette", "seed", "activation")
SAMPLING = ("steps", "guidance", "sampler", "variance", "smooth")
TIDY = ("least", "merge")


def subset(c, names):
    """These options of a Config, as a dictionary."""
    return {name: getattr(c, name) for name in names}


def codec_of(c):
    return Codec(**subset(c, CODEC))


# ------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate(step, c):
    """Linear warm-up, constant, cosine decay to 0 over the last decay_steps."""
    left = (c.max_steps - step) / max(1, min(c.decay_steps, c.max_steps))
    return c.lr * min(1.0,
                      (step + 1) / max(1, c.warmup_steps)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def readers(c, device):
    """How many processes make samples ahead; 0: a thread of this one does."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
    auto = max(1, datasets.CORES // here - 1) if device.type == "cuda" else 0
    return auto if c.workers == "auto" else int(c.workers)


def batches(c, run, step, kernel_options):
    """What the steps from number `step` on need: samples are made ahead by `readers`; on CUDA, the rest on a
    stream of its own.

    Yields dictionaries of what `training_loss` takes and `draw` draws, on the device, one row a sample: every
    world-th sample of the global batch. All of it depends on the seed and on the step alone, whoever computes
    it. kernel_options: what diffusion.kernel_options returned; None: plain PyTorch. Nothing waits for a CUDA
    device, up to 1,024 segments an image.
    """
    stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
    source = datasets.batches(run.train_data, step * c.batch_size, c.batch_size, c.seed,
                              readers(c, run.device), run.rank, run.world, pin=bool(stream))
    run = dataclasses.replace(run, codec=copy.copy(run.codec))
    run.codec.table = run.codec.table.to(run.device)  # once, not at every step

    def make(step):
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            parts = [v.to(run.device, non_blocking=run.device.type != "mps") for v in next(source)]
            return make_batch(c, run, step, parts, kernel_options), stream and stream.record_event()

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


def make_batch(c, run, step, parts, kernel_options):
    """images, labels, sizes and uniform numbers, of data.batches -> the dictionary of a step's batch."""
    images, labels, sizes, u = parts
    detail, share = run.net.detail, slice(run.rank, None, run.world)
    fused = kernel_options and not c.balance  # the loss; the kernels weigh no pixels
    if c.augment and datasets.names(c.dataset) != ["shapes"]:
        x, _, labels = datasets.augment(images, labels, sizes, u, c.image_size, c.crop, c.jitter, detail,
                                        c.turns, c.negative)
    else:
        x, _, labels = datasets.unchanged(images, labels, sizes, detail)
    generator = torch.Generator().manual_seed(host_seed(c.seed * 2**32 + step))
    drawn = draw((c.batch_size, run.codec.channels, *labels.shape[1:]), run.diffusion, generator, run.device,
                 eps=not fused)
    if run.diffusion.hints > 0:
        u = torch.rand(c.batch_size, datasets.NUMBERS, generator=generator)
        drawn["u"] = to_device(u, run.device)
    drawn, hints = {k: v[share] for k, v in drawn.items()}, None
    if run.diffusion.hints > 0:
        hints = datasets.draw_hints(labels, drawn.pop("u"), run.diffusion.hints, promised(run.train_data))
    numbers = range(step * c.batch_size, (step + 1) * c.batch_size)[share]  # of the run's samples
    cells = cells_of(labels, numbers, hints, c, run, kernel_options)
    if hints is not None:
        drawn["hints"] = hint_bits(run.codec.encode(cells.int()), hints)
    if not fused:
        cells = cells.long()
        counts = pixel_weights(cells, run.codec.classes, c.balance) if c.balance else cells >= 0
        return dict(x0=run.codec.encode(cells), image=x, valid=counts, **drawn)
    seeds = torch.arange(numbers.start, numbers.stop, numbers.step, device=run.device) + c.seed * 2**40
    return dict(cells=cells.to(kernel_dtype(run.codec)), image=x, seeds=seeds, **drawn)


def kernel_dtype(codec):
    """The smallest integers that hold the codec's cells."""
    return torch.int8 if codec.classes <= 128 else torch.int16


def promised(data):
    """A bound of the labels, so that nothing waits to find one; None where they are too many."""
    return data.labels_below if data.labels_below <= 1024 else None


def cells_of(labels, numbers, hints, c, run, kernel_options):
    """Label maps (B, H, W) -> cells; numbers: of the samples, which random codes depend on."""
    codec, device, below = run.codec, run.device, promised(run.train_data)
    if codec.palette == "none":
        generators = [torch.Generator().manual_seed(host_seed(c.seed * 2**40 + i)) for i in numbers]
        order = torch.cat([torch.rand(1, codec.classes, generator=g).argsort(1) for g in generators])
        return random_cells(labels, to_device(order, device), run.train_data.labels_below)
    if kernel_options and (hints is None or below):
        return kernels.locate(labels, codec.side, dtype=kernel_dtype(codec), labels_below=below, hints=hints)
    on = "cpu" if device.type in NO_FLOAT64 else device  # exact centroids need it
    return codec.cells(labels.to(on), hints=None if hints is None else hints.to(on)).to(device)


def pixel_weights(cells, classes, balance):
    """What each pixel of cells (B, H, W) below classes, -1 = ignored, counts in the loss: (B, H, W), 0 where
    ignored, 1 on average elsewhere; balance: the power of its segment's area by which it counts less. Pixels
    up to RIM about a segment count as much as its own: both sides of a border alike, or it is learnt
    where the small segment is too large (by a quarter, of nuclei)."""
    flat = torch.where(cells < 0, classes, cells).flatten(1)
    area = torch.zeros(len(flat), classes + 1, device=cells.device)
    share = area.scatter_add_(1, flat, torch.ones_like(flat, dtype=area.dtype)).clamp(min=1).pow(-balance)
    share[:, classes] = 0
    weight = F.max_pool2d(share.gather(1, flat).view(cells.shape), 2 * RIM + 1, 1, RIM) * (cells >= 0)
    valid = (cells >= 0).sum((1, 2), keepdim=True)
    return weight * valid / weight.sum((1, 2), keepdim=True).clamp(min=1e-9)


# ------------------------------------------------------------------------------------------------------------
# Validation, by real sampling with the averaged weights


class Stopped(Exception):
    pass


def validate(net, run, c, stop):
    """Mean ARI and IoU over images and annotators, one sample an image, and a picture of the first 8; None if
    stopped."""
    data, codec, rank, world = run.val_data, run.codec, run.rank, run.world
    positions, totals, tiles, side = datasets.selection(data, c.eval_images), [], [], codec.side
    device = next(net.parameters()).device
    model = Model(net, codec, run.diffusion, c.image_size, subset(c, SAMPLING), c.dataset, 0, subset(c, TIDY))
    size = min(32, c.batch_size) if device.type == "cpu" else 32  # small: a signal is looked at in between

    def leave_if_stopped(*_):
        if stop:
            raise Stopped

    def maps_of(at, seeds):
        """One sample's map (h, w) of each image."""
        jobs = [packed_job(data, i, seed) for i, seed in zip(at, seeds)]
        return [sample_maps(job, model)[0]
                for job in denoise(jobs, model, 1, size, callback=leave_if_stopped)]

    try:
        for start in range(size * rank, len(positions), size * world):
            at = positions[start : start + size]
            found = maps_of(at, at)
            for i, segments in zip(at, found):
                maps = data.maps(i)[:, : segments.shape[0], : segments.shape[1]]
                s = scores(torch.from_numpy(segments).long().expand(len(maps), -1, -1), maps)
                totals.append([float(s["ari"].nanmean()), float(s["iou"].nanmean())])
            m = min(8 - len(tiles), len(at)) if rank == 0 else 0
            if m > 0:
                labels = data.get(at[:m])[1]
                truth = (Codec(bits=codec.bits) if codec.palette == "none" else codec).cells(labels)
                more = [maps_of(at[:m], [1000 * j + i for i in at[:m]]) for j in (1, 2)]
                for i, true, *three in zip(at, truth, found, *more):
                    if c.merge:
                        three = [placed(segments[None], side)[0][0] for segments in three]
                    image, (h, w) = np.zeros((*true.shape, 3), np.uint8), three[0].shape
                    image[:h, :w] = packed_job(data, i).photo
                    padded = [np.pad(segments, [(0, c.image_size - n) for n in segments.shape],
                                     constant_values=-1) for segments in three]
                    tiles.append([image, *(overlay(image, v, side, 0.8) for v in (true, *padded))])
    except Stopped:
        pass
    scored = torch.tensor(totals, dtype=torch.float64).reshape(-1, 2)
    sums = torch.cat([scored.nansum(0), (~scored.isnan()).sum(0), torch.tensor([len(stop)])]).double()
    if world > 1:
        dist.all_reduce(sums)
    if sums[4]:  # in any process
        stop or stop.append(signal.SIGTERM)
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
    show_help(argv)
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
    return {k: v for k, v in content.items() if k not in ("net", "optimizer", "scaler", "form")}


def export(c):
    check_export(c)
    content, path, problem = newest(Path(c.out) / "ckpt.pt")
    if content is None:
        raise ValueError(f"{c.out}/ckpt.pt: no such file: train first, or name the folder of a run with "
                         f"--out")
    if problem:
        print(f"{problem}; using the one before, {path}", file=sys.stderr)
    save_checkpoint(c.export, {**portable(content), "exported": True})
    print(f"{c.export}: averaged weights and configuration of {path}, step {content['step']}")
    return 0


def check_export(c):
    """Raises ValueError where --export would overwrite anything but what it wrote itself."""
    target = Path(c.export)
    if not target.parent.is_dir():
        raise ValueError(f"--export {target}: there is no folder {target.parent}")
    of_run = [Path(c.out, name).resolve() for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt")]
    try:
        taken = target.resolve() in of_run or target.exists() and not read(target).get("exported")
    except ValueError:  # no checkpoint at all
        taken = True
    if taken:
        raise ValueError(f"--export {target} would take the place of a file that --export has not written: "
                         f"choose another name")


@dataclass
class Run:
    """What a run is made of: built once, by `build` and `prepare_run`."""

    device: torch.device
    form: tuple  # precision and layout: keys of PRECISIONS and LAYOUTS
    why: str  # this precision
    codec: Codec
    diffusion: Diffusion
    network: dict  # the arguments of UNet
    net: UNet
    train_data: object = None  # data.load's
    val_data: object = None
    origin: str = "from scratch"  # of the weights, in words
    resumed: dict | None = None  # the checkpoint to go on from, on the host, until Training has taken it over
    rank: int = 0
    world: int = 1  # processes
    lock: object = None  # of --out

    @property
    def dtype(self):
        """Of autocast; None: float32."""
        return PRECISIONS[self.form[0]]


def build(c):
    """Config -> Run, without data and checkpoints. Raises ValueError."""
    device = pick_device(c.device)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # graphs cannot be made on the default one
        torch.backends.cudnn.benchmark = True
    precision, why = pick_precision(c.precision, device)
    form = precision, layout(device) if c.layout == "auto" else c.layout
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
    net.to(device, memory_format=LAYOUTS[form[1]])
    return Run(device, form, why, codec, diffusion, network, net)


def settle_form(c, run):
    """On a CPU, replace precision and layout as `build` chose them, where they are auto: by a checkpoint's,
    or in a new run by what is fastest here. -> a sentence that says what was measured, or "".

    Unmeasured stay runs of fewer than 100 steps, which it does not pay for, and those with --compile on.
    Checkpoints of versions before and of GPUs name neither: `build` has the last word then, too.
    """
    usual, words = run.form, ""
    if run.resumed:
        run.form = run.resumed.get("form") or usual
        if c.layout != "auto":
            run.form = run.form[0], c.layout
    elif c.max_steps >= 100 and c.compile != "on":
        options = (c.precision, ("fp32", "bf16")), (c.layout, LAYOUTS)
        forms = list(itertools.product(*(names if asked == "auto" else [asked] for asked, names in options)))
        forms.sort(key=lambda form: form != usual)  # the usual one first
        if run.rank == 0 and len(forms) > 1:
            source = datasets.batches(run.train_data, 0, c.batch_size, c.seed, ranks=run.world)
            batch = make_batch(c, run, 0, next(source), None)
            source.close()
            part = {k: v.chunk(c.accumulate)[0] for k, v in batch.items()}
            loss = loss_of(run.diffusion, run.codec, None, None)
            run.form, words = fastest_form(run.net, loss, part, forms)
        chosen = torch.tensor(forms.index(run.form))
        if run.world > 1:
            dist.broadcast(chosen, 0)
        run.form = forms[chosen]
    if words:
        run.why = "measured"
    elif run.form != usual:
        run.why = "as the run began"
    run.net.to(memory_format=LAYOUTS[run.form[1]])
    return words


def switches(c, device, dtype, world):
    """Whether to compile, and whether to make a CUDA graph. Raises ValueError for a graph that cannot be."""
    able = device.type == "cuda" and world == 1 and dtype != torch.float16
    if c.graph == "on" and not able:
        raise ValueError("--graph on needs CUDA, a single process and no fp16: use --graph auto")
    # torch.compile writes kernels for Triton
    compiled = c.compile == "on" or worth_compiling(c, device) and kernels.triton is not None
    return compiled, able and c.graph != "off"


def worth_compiling(c, device):
    """Whether --compile auto compiles, where there is Triton."""
    return c.compile == "auto" and device.type == "cuda" and c.max_steps >= COMPILED


def loss_of(diffusion, codec, dtype, kernel_options):
    """loss(net, batch) of a dictionary that `batches` yields, which had the same kernel_options."""
    def loss(net, batch):
        if "cells" in batch:
            return fused_training_loss(net, batch["cells"], batch["image"], codec.channels, batch["seeds"],
                                       diffusion, batch, codec.activate, **kernel_options,
                                       dtype=dtype or torch.float32, hints=batch.get("hints"))
        return training_loss(net, batch["x0"], batch["image"], batch["valid"], diffusion, codec.activate,
                             drawn=batch, hints=batch.get("hints"))

    return loss


def differences(old, new, free):
    """["key old -> new", ...] of two dictionaries, but for the keys in free."""
    return [f"{k} {old.get(k, '(none)')} -> {new.get(k, '(none)')}" for k in {**new, **old}
            if k not in free and old.get(k) != new.get(k)]


def extras(d):
    """What a network trained with these options sees beside xt and the image, in the order of its input
    channels."""
    return [name for name in ("hints", "self_condition") if d.get(name, 0) > 0]


def prepare_run(c):
    """Config -> Run. All that can be wrong with the user's input goes wrong here. Raises ValueError or
    OSError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if c.batch_size % (c.accumulate * world):
        raise ValueError(f"--batch_size {c.batch_size} cannot be split among {world} processes x "
                         f"--accumulate {c.accumulate}")
    run = build(c)
    run.rank, run.world = rank, world
    switches(c, run.device, run.dtype, world)
    out = Path(c.out)
    if c.init and not stored(out / "ckpt.pt"):  # a run that goes on needs that file no more
        load_init(c, run)
    common = dict(root=c.root, cache=c.cache, seed=c.seed, unlabelled=c.unlabelled, components=c.components,
                  max_bad=c.max_bad, void=c.void)
    run.train_data = datasets.load(c.dataset, "train",
                                   datasets.packed_side(c.image_size, c.crop, run.net.detail),
                                   compose=c.compose, **common)
    run.val_data = datasets.load(c.dataset, "val", c.image_size, detail=run.net.detail, **common)
    make_folder(out)
    run.lock = lock(out) if rank == 0 else None  # one writer
    try:
        run.resumed, path, problem = newest(out / "ckpt.pt")
    except ValueError as e:
        raise ValueError(f"{e}; remove it to start anew") from None
    if run.resumed:
        check_resumed(c, run, path)
    else:
        check_out(out)
    if rank == 0 and not run.resumed:
        set_aside(out)
    if world > 1:
        join_processes(rank, world, "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
        step = torch.tensor([run.resumed["step"] if run.resumed else 0])
        steps = [torch.zeros_like(step) for _ in range(world)]
        dist.all_gather(steps, step)  # all have read: now files may change
        if len({int(v) for v in steps}) > 1:
            raise ValueError(f"{out} holds different checkpoints on different machines: --out must be a "
                             f"shared folder")
    if problem and rank == 0:
        print(f"WARNING: {problem}; going on from the one before, {path}", file=sys.stderr)
        if (out / "ckpt.pt").exists():  # it must not become the one before
            os.replace(out / "ckpt.pt", out / "ckpt.damaged")
    return run


def load_init(c, run):
    """Start from the weights of --init. Raises ValueError where they are another network's."""
    source = read(c.init)
    if lacks := {"network", "ema", "codec"} - source.keys():
        raise ValueError(f"--init {c.init} lacks {', '.join(sorted(lacks))}: it is no checkpoint of train.py")
    old, new = (extras(d) for d in (source.get("diffusion", {}), vars(c)))
    differ, free = differences(source["network"], run.network, {"dropout"}), {"dropout", "in_channels"}
    few, most = source["network"]["out_channels"], run.codec.channels
    finer = few < most and all((d["encoding"], d["palette"]) == ("bits", "similar")
                               for d in (source["codec"], vars(c)))
    if finer:
        free.add("out_channels")
    if new[: len(old)] != old or differences(source["network"], run.network, free):
        # as many channels, of another meaning
        differ = differ or [f"inputs {', '.join(old)} -> {', '.join(new)}"]
        raise ValueError(f"--init {c.init} is another network ({'; '.join(differ)}): "
                         f"choose --network, --bits, --encoding and --hints as it has them")
    old, new = ({"prediction": d.get("prediction", c.prediction), "encoding": codec["encoding"],
                 "palette": codec["palette"], "seed": codec["palette"] == "random" and codec["seed"]}
                for d, codec in ((source.get("diffusion", {}), source["codec"]), (vars(c), vars(c))))
    if meaning := differences(old, new, ()):
        raise ValueError(f"--init {c.init} means something else by its outputs ({'; '.join(meaning)}): give "
                         f"these options as it has them")
    places = list(finer_bits(few, most) if finer else range(few))
    run.net.load_state_dict(widened(source["ema"], run.net.state_dict(), places))
    added = run.network["in_channels"] - source["network"]["in_channels"]
    run.origin = (f"from the weights of {c.init}" + f", {added} more input channels at zero" * (added > 0)
                  + f", its {few} bits the high ones of {most}" * finer)


def check_resumed(c, run, path):
    """Raises ValueError where the checkpoint at path is of another run than c."""
    lacks = {"net", "ema", "optimizer", "scaler", "config", "step", "best", "validated"} - run.resumed.keys()
    if lacks:
        raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it was made by --export or another "
                         f"version; start from its weights with --init, into another --out")
    form = run.resumed.get("form") or run.form
    if len(form) != 2 or form[0] not in PRECISIONS or form[1] not in LAYOUTS:
        raise ValueError(f"{path}: this version has no precision and layout {form}: use the one that made it")
    # versions before an option did what its default does: a new one's has to be its off value
    old = {**vars(Config()), **run.resumed["config"]}
    if datasets.same(old["dataset"], c.dataset, run.resumed.get("contents"), run.train_data):
        old["dataset"] = c.dataset
    differ = differences(old, vars(c), FREE) + differences(run.resumed["network"], run.network, {"dropout"})
    if differ:
        raise ValueError(f"{path} was made with other options ({'; '.join(differ)}): use the same, or "
                         f"another --out")


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


def set_aside(out):
    """Give what an earlier run without a checkpoint has left another name, as this one starts anew."""
    for path in (out / "best.pt", out / "log.jsonl"):
        if path.exists() and path.stat().st_size:
            numbered = (path.with_suffix(f".{k}{path.suffix}") for k in itertools.count(1))
            aside = next(other for other in numbered if not other.exists())
            os.replace(path, aside)
            print(f"{path} of an earlier run is now {aside}, as there is no ckpt.pt to go on from")


class Training:
    """A run on its way: its averaged weights and optimizer, how far it is, and what it writes to --out."""

    def __init__(self, c, run):
        self.c, self.run, self.out = c, run, Path(c.out)
        self.step, self.best, self.validated = 0, -math.inf, 0
        alone = run.device.type == "cpu" and run.world == 1
        self.threads = Threads(c.threads if alone else
                               c.threads or host_threads(run.device) or torch.get_num_threads())
        self.measured = settle_form(c, run) if run.device.type == "cpu" else ""  # with those threads
        self.ema = copy.deepcopy(run.net).eval().requires_grad_(False)
        kind = dict(fused=run.device.type in ("cuda", "cpu"), capturable=run.device.type == "cuda")
        self.optimizer = torch.optim.AdamW(run.net.parameters(), lr=c.lr, betas=(0.9, 0.999),
                                           weight_decay=c.weight_decay, **kind)
        self.kernel_options = kernel_options(run.codec, run.device)
        compiled, graph = switches(c, run.device, run.dtype, run.world)
        loss = loss_of(run.diffusion, run.codec, run.dtype, self.kernel_options)
        self.update = Step(run.net, loss, self.optimizer, run.dtype, c.accumulate, c.grad_clip, compiled,
                           graph, run.world)
        if run.resumed:
            self.resume(run.resumed, kind)
        self.first, self.started = self.step, time.time()
        self.mark = self.step, time.perf_counter()  # of the last line, or the first step, which may compile
        self.watch, self.writer, self.written = Watch(), ThreadPoolExecutor(1), None  # the last checkpoint's
        self.stop = []  # signals; looked at between steps
        self.seen = []  # losses and norms since the last line

    def resume(self, content, kind):
        """Go on from a checkpoint; kind: the optimizer's, as the run may have changed devices."""
        self.step, self.best, self.validated = content["step"], content["best"], content["validated"]
        if content["config"].get("eval_images") != self.c.eval_images:
            self.best = -math.inf  # that of other images does not compare
        self.run.net.load_state_dict(content["net"])
        self.ema.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.optimizer.param_groups[0].update(kind)
        fit_state(self.optimizer)
        self.run.origin, self.run.resumed = f"going on from step {self.step}", None
        if content["scaler"]:  # else the run was in fp32 or bf16 so far
            self.update.scaler.load_state_dict(content["scaler"])

    def content(self):
        """The checkpoint."""
        c, run = self.c, self.run
        return dict(
            step=self.step, best=self.best, validated=self.validated, config=vars(c), dataset=c.dataset,
            image_size=c.image_size, network=run.network, contents=datasets.contents(run.train_data),
            codec=subset(c, CODEC), diffusion=dataclasses.asdict(run.diffusion), sampling=subset(c, SAMPLING),
            tidy=subset(c, TIDY), net=run.net.state_dict(), ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(), scaler=self.update.scaler.state_dict(),
            form=run.form if run.device.type == "cpu" else None)

    def put(self, name, action):  # rank 0 writes; a full disk only warns
        return self.run.rank > 0 or try_to_write(self.out / name, lambda: action(self.out / name))

    def store(self, name, choose=dict, **more):
        """Write a checkpoint beside the training, which waits for the one before and for a copy to the
        host."""
        if self.run.rank == 0:
            self.is_stored()
            content = on_host(choose(self.content()))
            self.written = self.writer.submit(self.put, name,
                                              lambda path: save_checkpoint(path, content, **more))

    def checkpoint(self):
        self.store("ckpt.pt", keep_previous=True)

    def is_stored(self):
        """Whether the last checkpoint has been written; waits for its end. Raises what writing it raised."""
        return self.run.rank > 0 or self.written and self.written.result()

    def say(self, text, **line):
        if self.run.rank == 0:
            print(text, flush=True)
        if line:
            self.put("log.jsonl", lambda path: append(path, line))

    def introduce(self):
        c, run = self.c, self.run
        options = "  ".join(f"{k}={v}" for k, v in vars(c).items())
        self.say(textwrap.fill(options, 120, break_on_hyphens=False))
        size = "endless" if len(run.train_data) >= 2**31 else len(run.train_data)
        self.say(f"{sum(p.numel() for p in run.net.parameters()):,} parameters on "
                 f"{f'{run.world} x ' if run.world > 1 else ''}{run.device}, "
                 f"{str(run.dtype or torch.float32)[6:]} in {run.form[1]} ({run.why}); "
                 f"kernels: {' ('.join(kernels.live(run.device))})"
                 f"{'; loss: torch (for --balance)' * (c.balance > 0)}; "
                 f"GroupNorm: {'triton' if kernels.norms(run.device) else 'torch'}; "
                 f"{size} training images; {run.origin}; into {self.out}/")
        if (most := run.train_data.labels_below) > run.codec.classes:
            self.say(f"NOTE: an image has up to {most} segments, but there are {run.codec.classes} codes: "
                     f"beyond them, the smallest count as part of the largest (--bits, or --preset crowded)")
        if self.measured:
            self.say(self.measured)
        if self.update.fast is not self.update.model:
            self.say("compiling: the first step takes a minute or two (--compile off: no time, slower steps)")
        elif worth_compiling(c, run.device) and kernels.triton is None:
            self.say(f"not compiled, so that steps take longer: {kernels.why_not}")

    def validate(self):
        """Score the averaged weights and keep the best; nothing if the run is stopped meanwhile, as a resumed
        one makes up for it."""
        (before, then), began = self.mark, time.perf_counter()
        result = validate(self.ema, self.run, self.c, self.stop)
        self.mark = before, then + time.perf_counter() - began  # steps alone count
        if not result:
            return
        (ari, iou, picture), self.validated = result, self.step
        name = f"samples_{self.step:06d}.png"
        drawn = self.put(name, lambda path: save_picture(picture, path))
        self.say(f"step {self.step:>6}  validation ARI {ari:.3f}  IoU {iou:.3f}"
                 + f"  -> {self.out}/{name}" * drawn,
                 step=self.step, ari=ari, iou=iou, seconds=time.time() - self.started)
        if ari > self.best:
            before, self.best = self.best, ari
            self.store("best.pt", portable)
            if not self.is_stored():
                self.best = before  # the next one is written where this one's disk was full

    def take_step(self, batch):
        """One step. Returns "", or where it cannot be taken a sentence that says why and what to do."""
        c, run, full = self.c, self.run, False
        if c.dropout:  # a step's randomness: seed and step alone
            seed = c.seed * 2**32 + (run.rank + 1) * 2**24 + self.step
            torch.manual_seed(host_seed(seed) if run.device.type == "cpu" else seed)
        try:
            self.seen.append(self.update(batch, learning_rate(self.step, c)))
        except NoGraph as e:
            return f"{e}: use --graph off and run the same command again"
        except RuntimeError as e:
            full = out_of_memory(e)
            if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                return (f"torch.compile failed ({str(e).strip().splitlines()[0]}): use --compile off; or, if "
                        f"it worked before, delete its cache, the folder torchinductor_{getpass.getuser()} "
                        f"among the temporary files")
            if not full:
                raise
        if full:  # here the failed step's memory is free again
            fits, tried = self.update.fits(batch), len(batch["image"]) // c.accumulate
            remedy = "choose a smaller --network"
            if fits:
                rows = c.batch_size // run.world
                parts = next(k for k in range(1, rows + 1) if rows % k == 0 and rows // k <= fits)
                remedy = f"add --accumulate {parts}"
            return (f"out of memory on {run.device} with {tried} images at once; "
                    f"{fits or 'not even one'} would fit: {remedy} and run the same command again")
        update_ema(self.ema, run.net, self.step, c.ema)
        self.step += 1
        if self.step == self.first + 1 and c.log_every > 1:
            self.seen[0].tolist()  # waits for the device
            self.mark = self.step, time.perf_counter()
        if words := self.threads():
            self.say(words)
        return ""

    def give_up(self, problem):
        """Save what was learnt since the last checkpoint, and say why the run ends. -> the exit status."""
        if self.step > self.first:
            self.checkpoint()
        print(f"train.py: {problem}", file=sys.stderr)
        return 2

    def report(self):
        """Say and log how the steps since the last line went."""
        c, step = self.c, self.step
        values = torch.stack(self.seen) / self.run.world  # (steps, 2)
        if self.run.world > 1:
            dist.all_reduce(values)
        report = self.watch(*values.T.tolist(), first=step - len(self.seen))  # the only wait for the device
        more = {k: v for k, v in report.items() if k != "loss" and v}
        mean, spent = math.nan if report["loss"] is None else report["loss"], time.time() - self.started
        (before, then), now = self.mark, time.perf_counter()
        rate = (step - before) / max(now - then, 1e-6) if step > before else 1 / max(spent, 1e-6)
        self.seen, self.mark = [], (step, now)
        self.say(f"step {step:>6}/{c.max_steps}  loss {mean:.4f}  lr {learning_rate(step - 1, c):.1e}  "
                 f"{rate * c.batch_size:.0f} images/s  {spent / 60:.1f} min, "
                 f"{(c.max_steps - step) / rate / 60:.1f} left"
                 + "".join(f"  {k}: {v}" for k, v in more.items()),
                 step=step, loss=report["loss"], lr=learning_rate(step - 1, c),
                 images_per_second=rate * c.batch_size, seconds=spent, **more)

    def on_signal(self, number, frame):
        if self.step == self.first:  # still compiling, say: nothing to save
            raise SystemExit(128 + number)
        self.stop.append(number)
        if number == HANGUP:  # the shell repeats the kernel's
            signal.signal(number, signal.SIG_IGN)
        elif self.run.world == 1:  # torchrun repeats it
            signal.signal(number, signal.SIG_DFL)  # a second one ends it at once


def train(c, run):
    """The run, from its first step or a checkpoint's to the last. Returns the exit status."""
    t, out = Training(c, run), c.out
    t.introduce()
    if t.step >= c.max_steps and t.validated == t.step:
        t.say(f"{out}/ckpt.pt is complete at step {t.step}: raise --max_steps to go on, or start anew with "
              f"another --out")
        return 0
    holds = lambda line: line["step"] <= (t.validated if "ari" in line else t.step)
    t.put("log.jsonl", lambda path: forget(path, holds))
    kinds = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # which nohup does
        kinds.append(HANGUP)
    handlers = {n: signal.signal(n, t.on_signal) for n in kinds}
    coming, stopped = batches(c, run, t.step, t.kernel_options), any_stopped(t.stop, run.world)
    try:
        while not next(stopped):
            if t.step > t.validated and (t.step % c.eval_every == 0 or t.step == c.max_steps):
                t.validate()
                if t.validated < t.step:
                    continue
            if t.step >= c.max_steps:
                t.checkpoint()
                then = "eval.py" if c.dataset == "shapes" else "sample.py --n 8 photo.jpg"
                t.say(f"done: {out}/ckpt.pt; now try: python {then}" if t.is_stored() else
                      f"done, but not saved in {out}/ckpt.pt: make room, and run the same command again")
                return 0 if t.is_stored() else 1
            if problem := t.take_step(next(coming)):
                return t.give_up(problem)
            if t.step % c.log_every == 0 or t.step == c.max_steps:
                t.report()
                if t.watch.worst >= 20:
                    t.say(f"stopped at step {t.step}: {t.watch.worst} steps in a row had no finite gradient, "
                          f"and changed nothing. Try a lower --lr, --precision fp32 or more --warmup_steps, "
                          f"into another --out")
                    return 1
            if c.keep_every and t.step % c.keep_every == 0:  # before ckpt.pt: a run goes on behind that
                t.store(f"ckpt_{t.step:06d}.pt")
            if t.step % c.save_every == 0:
                t.checkpoint()
        t.checkpoint()
        t.say(f"\nstopped{' and saved' if t.is_stored() else ''} at step {t.step}: run the same command "
              f"again to go on")
        return 128 + (t.stop[0] if t.stop else signal.SIGTERM)
    except Exception as e:
        words, full = (str(e).strip() or type(e).__name__).splitlines()[0], out_of_memory(e)
        status = t.give_up(f"{words}; add --accumulate, and run the same command again" if full else words)
        if full or isinstance(e, datasets.Unread):
            return status
        raise
    finally:
        coming.close()
        t.writer.shutdown()  # what has begun is brought to its end
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
