"""What a training run can be told: the options with their defaults and meanings, the presets, the command line.

What it is: `parse(argv)` -> Config. What it is not: it opens no file and asks for no device; train.py checks what needs them.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from data import names, parse_void
from model import SIZES


@dataclass
class Config:
    # The defaults are the paper's. A preset (below) changes some, the command line has the last word: --lr 3e-4

    # what and where
    dataset: str = "shapes"                      # shapes, coco, entity, ade20k, bsds500, or a folder: images/ and
                                                 # labels/, LabelMe, VOC, Cityscapes, exports of Roboflow, CVAT ...;
                                                 # several: photos:3,streets:components:ignore,shapes (a number: its weight)
    compose: float = 0.0                         # share of training scenes pasted together from pieces of the images
    preset: str = ""                             # a row of PRESETS; "": tiny for shapes, paper for coco and entity, else small
    network: str = ""                            # tiny, photo, small or paper (model.SIZES); "": the preset's
    out: str = ""                                # "": out/<dataset>-<preset>
    root: str = "data"                           # coco is expected in <root>/coco, and so on
    cache: str = "cache"                         # resized copies of the data set; safe to delete
    seed: int = 0                                # of everything random; below 2^22
    device: str = "auto"                         # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"                      # auto, fp32, bf16, fp16
    kernels: str = ""                            # auto (Triton with CUDA), triton, torch; "": BITSEG_KERNELS, or auto
    compile: str = "auto"                        # on, off; auto: on with CUDA. A minute at the start, then faster steps
    graph: str = "auto"                          # on, off; auto: on with CUDA. A step is one CUDA graph then
    init: str = ""                               # a checkpoint whose weights to start from (fine-tuning)
    export: str = ""                             # write the averaged weights of --out there, and do nothing else
    # data
    image_size: int = 128                        # longer side, in pixels; cost grows with its square
    augment: bool = True                         # of real images; off only to see a model overfit
    unlabelled: str = "segment"                  # id 0: one segment (as in the paper), or ignore
    void: str = ""                               # ids that are ignored, e.g. 255 (VOC, Cityscapes); several: 254,255
    components: bool = False                     # labels are classes: their connected parts become the segments
    max_bad: float = 0.01                        # share of unusable images or label maps that is too much
    crop: float = 1.0                            # smallest share of the sides that random crops keep; 1: none
    jitter: float = 1.0                          # how often colours are changed, as a multiple of the paper's probabilities
    workers: int = 1                             # threads that read ahead; 0: none
    # encoding
    encoding: str = "bits"                       # bits, onehot, rgb (the last two are the paper's baselines)
    bits: int = 6                                # 2^bits segments at most; 8 or 10 for very crowded images
    palette: str = "similar"                     # similar, random, different, range, none (ablations)
    activation: str = ""                         # "": tanh for bits; none, sigmoid, softmax, tanh
    # diffusion
    schedule: str = "cosine"                     # cosine, linear, linear_simple, parabola
    input_scale: float = 0.1                     # b; smaller = harder. Lower it for larger images
    prediction: str = "x"                        # x, eps, v
    loss: str = "mse"                            # mse, bce (cross entropy of the bits; for prediction x)
    weighting: str = "sigmoid"                   # sigmoid, snr, snr+1, snr_trunc, uniform. uniform learns fastest
    bias: float = -4.0                           # of the sigmoid weighting
    logsnr_space: bool = True                    # the factor -dlambda/dt in the loss
    image_drop: float = 0.05                     # share of samples trained without the image, for guidance
    self_condition: float = 0.0                  # share of samples that see a first guess; doubles the forward cost
    hints: float = 0.0                           # share of samples that see hints, bits of a few pixels; for encoding bits
    # optimisation
    batch_size: int = 8
    accumulate: int = 1                          # micro-batches a step: raise it when batch_size does not fit
    max_steps: int = 300_000
    lr: float = 1e-4
    warmup_steps: int = 1000
    decay_steps: int = 50_000                    # cosine decay to 0 over the last so many steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0                       # largest norm of the gradients; 0: any
    ema: float = 0.9999                          # decay a step of the averaged weights; lower for short runs
    dropout: float = 0.0
    # validation, by real sampling with the averaged weights
    eval_every: int = 10_000                     # steps
    eval_images: int = 256
    steps: int = 8                               # denoising steps
    guidance: float = 1.0                        # 0: half the cost
    sampler: str = "ddpm"                        # ddpm, ddim
    variance: str = "large"                      # large, small (ddpm)
    smooth: float = 0.0                          # share of the side over which answers are averaged between the image's edges
    least: int = 0                               # regions of fewer pixels join a neighbour first (tree.py); 0: none
    merge: float = 0.0                           # answers are cut where the odds that people part two regions reach this; 0: as sampled
    # logging
    log_every: int = 100
    save_every: int = 1000
    keep_every: int = 0                          # besides, keep ckpt_<step>.pt every so many steps; 0: none


PRESETS = {  # a network of model.SIZES, and the recipe that suits it
    "tiny":  dict(image_size=40,  batch_size=16, max_steps=2500,    lr=2e-3, warmup_steps=50,   decay_steps=2300,   ema=0.99,   weighting="uniform", logsnr_space=False, guidance=1.0, bits=4, log_every=50,  save_every=250,  eval_every=1250, smooth=0.2),
    "photo": dict(image_size=96,  batch_size=16, max_steps=100_000, lr=1e-3, warmup_steps=200,  decay_steps=50_000, ema=0.999,  weighting="uniform", logsnr_space=False, loss="bce", guidance=16.0, bits=6, log_every=100, save_every=500,  eval_every=5000, crop=0.5, jitter=2.0, dropout=0.1, weight_decay=0.03, smooth=0.2, least=2, merge=1.0),
    "small": dict(image_size=64,  batch_size=16, max_steps=50_000,  lr=5e-4, warmup_steps=500,  decay_steps=25_000, ema=0.999,  weighting="uniform", logsnr_space=False, guidance=1.0, bits=6, log_every=50,  save_every=500,  eval_every=2500),
    "paper": dict(image_size=128, batch_size=8,  max_steps=300_000, lr=1e-4, warmup_steps=1000, decay_steps=50_000, ema=0.9999, weighting="sigmoid", logsnr_space=True,  guidance=1.0, bits=6, log_every=100, save_every=1000, eval_every=10_000),
    # the same number of images in batches of 128: lr by the square root of the batch, EMA over as many images
    "paper-fast": dict(network="paper", image_size=128, batch_size=128, max_steps=18_750, lr=4e-4, warmup_steps=500, decay_steps=3125, ema=0.9984, weighting="sigmoid", logsnr_space=True, guidance=1.0, bits=6, log_every=20, save_every=250, eval_every=625),
}

# May change on resume.
FREE = {"out", "root", "cache", "device", "kernels", "compile", "graph", "workers", "init", "export",
        "accumulate", "max_steps", "eval_every", "eval_images", "log_every", "save_every", "keep_every",
        "max_bad"}

RANGES = dict.fromkeys(("batch_size", "accumulate", "max_steps", "image_size", "eval_every", "eval_images", "steps", "log_every",
                        "save_every"), (1, math.inf))
RANGES |= dict.fromkeys(("keep_every", "workers", "warmup_steps", "decay_steps", "lr", "weight_decay", "grad_clip", "jitter", "guidance",
                         "smooth", "least", "merge"), (0, math.inf))
RANGES |= dict.fromkeys(("compose", "dropout", "image_drop", "self_condition", "hints", "max_bad"), (0, 1))
RANGES |= {"seed": (0, 2**22 - 1), "crop": (0.01, 1), "ema": (0, 0.999999), "input_scale": (1e-6, math.inf), "bias": (-100, 100)}
CHOICES = {"sampler": ("ddpm", "ddim"), "variance": ("large", "small")}


def parse(argv):
    """Command line -> Config: the dataclass' defaults, then the preset, then --key value. Raises ValueError."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    given, i = {}, 0
    while i < len(argv):
        key, eq, value = argv[i].removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not argv[i].startswith("--") or key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.4)
            raise ValueError(f"unknown option '{argv[i]}'" + (f": did you mean --{near[0]}?" if near else ": see --help"))
        if not eq:
            i += 1
            if i == len(argv):
                raise ValueError(f"--{key} needs a value")
            value = argv[i]
        given[key] = convert(key, value, fields[key].type)
        i += 1
    dataset = given.get("dataset", Config.dataset)
    sets = names(dataset)
    preset = given.get("preset") or {("shapes",): "tiny", ("coco",): "paper", ("entity",): "paper"}.get(tuple(sets), "small")
    if preset not in PRESETS:
        raise ValueError(f"preset '{preset}' is not one of {', '.join(PRESETS)}")
    c = Config(**{**PRESETS[preset], **given, "preset": preset})
    parse_void(c.void)
    c.out = c.out or f"out/{Path(sets[0]).resolve().name}{'-and-more' if len(sets) > 1 else ''}-{preset}"
    c.network = c.network or preset
    if c.network not in SIZES:
        raise ValueError(f"network '{c.network}' is not one of {', '.join(SIZES)}")
    for key, (least, most) in RANGES.items():
        if not (least <= getattr(c, key) <= most and (math.isfinite(getattr(c, key)) or key == "grad_clip")):   # nan is in no range
            span = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"--{key} must be {span}, not {getattr(c, key)}")
    for key, known in CHOICES.items():
        if getattr(c, key) not in known:
            raise ValueError(f"--{key} is {' or '.join(known)}, not '{getattr(c, key)}'")
    if c.encoding == "rgb" and (c.least or c.merge):
        raise ValueError(f"--least and --merge must be 0 with --encoding rgb, not {c.least} and {c.merge}")
    if c.hints and c.encoding != "bits":
        raise ValueError(f"--hints are bits: use --encoding bits, not {c.encoding}, or --hints 0")
    if c.crop < 1 and (not c.augment or sets == ["shapes"]):
        raise ValueError("--crop belongs to the augmentation of real images: not with shapes, nor with --augment false")
    if c.batch_size % c.accumulate:
        raise ValueError(f"--batch_size {c.batch_size} cannot be split into --accumulate {c.accumulate} equal parts")
    return c


def convert(key, value, kind):
    if kind is bool:
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--{key} is true or false, not '{value}'")
        return value.lower() in ("true", "1")
    try:
        return int(float(value)) if kind is int and float(value).is_integer() else kind(value)
    except ValueError:
        raise ValueError(f"--{key} needs a number, not '{value}'") from None


def help_text(doc):
    """A docstring, then Config as it stands in this file."""
    source = Path(__file__).read_text()
    body = source.split("class Config:\n")[1].split("\n\n\n")[0]
    return f"{doc}\noptions (--key value), with their defaults:\n\n{body}\n"
