"""Train a bit-diffusion segmenter.

    python train.py                                           # tiny, on synthetic shapes: 5 minutes on 2 CPU cores
    python train.py --dataset path/to/folder                  # small, on your images/ and labels/
    python train.py --dataset coco                            # the paper's model, on COCO panoptic

Stop with Ctrl-C at any time. To resume, run the same command again. Everything goes to --out: ckpt.pt, log.jsonl and
samples_<step>.png (image, truth, samples).
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import data as datasets
from bits import Codec
from diffusion import Diffusion, sample, training_loss
from metrics import scores
from model import SIZES, UNet
from sample import grid, overlay, pick_device, read_checkpoint, side_of


@dataclass
class Config:
    # The defaults are the paper's. A preset (below) changes some, the command line has the last word: --lr 3e-4

    # what and where
    dataset: str = "shapes"                      # shapes, coco, or a folder with images/ and labels/
    preset: str = ""                             # tiny, small or paper; "": tiny for shapes, paper for coco, else small
    out: str = ""                                # "": out/<dataset>-<preset>
    root: str = "data"                           # coco is expected in <root>/coco
    cache: str = "cache"                         # resized copies of the data set; safe to delete
    seed: int = 0                                # of everything random
    device: str = "auto"                         # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"                      # auto, fp32, bf16, fp16
    compile: str = "auto"                        # on, off; auto: on with CUDA. A minute at the start, then faster steps
    # data
    image_size: int = 128                        # longer side, in pixels; cost grows with its square
    augment: bool = True                         # of real images; off only to see a model overfit
    unlabelled: str = "segment"                  # id 0: one segment (as in the paper), or ignore
    # encoding
    encoding: str = "bits"                       # bits, onehot, rgb (the last two are the paper's baselines)
    bits: int = 6                                # 2^bits segments at most; 8 or 10 for very crowded images
    palette: str = "similar"                     # similar, random, different, range, none (ablations)
    activation: str = ""                         # "": tanh for bits; none, sigmoid, softmax, tanh
    # diffusion
    schedule: str = "cosine"                     # cosine, linear, linear_simple, parabola
    input_scale: float = 0.1                     # b; smaller = harder. Lower it for larger images
    prediction: str = "x"                        # x, eps, v
    weighting: str = "sigmoid"                   # sigmoid, snr, snr+1, snr_trunc, uniform. uniform learns fastest
    bias: float = -4.0                           # of the sigmoid weighting
    logsnr_space: bool = True                    # the factor -dlambda/dt in the loss
    image_drop: float = 0.05                     # share of samples trained without the image, for guidance
    self_condition: float = 0.0                  # share of samples that see a first guess; doubles the forward cost
    # optimisation
    batch_size: int = 8
    accumulate: int = 1                          # micro-batches a step: raise it when batch_size does not fit
    max_steps: int = 300_000
    lr: float = 1e-4
    warmup_steps: int = 1000
    decay_steps: int = 50_000                    # cosine decay to 0 over the last so many steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.9999                          # decay a step of the averaged weights; lower for short runs
    dropout: float = 0.0
    # validation, by real sampling with the averaged weights
    eval_every: int = 10_000                     # steps
    eval_images: int = 256
    steps: int = 8                               # denoising steps
    guidance: float = 1.0                        # 0: half the cost
    sampler: str = "ddpm"                        # ddpm, ddim
    variance: str = "large"                      # large, small (ddpm)
    # logging
    log_every: int = 100
    save_every: int = 1000


PRESETS = {  # a network of model.SIZES, and the recipe that suits it
    "tiny":  dict(image_size=40,  batch_size=16, max_steps=2500,    lr=2e-3, warmup_steps=50,   decay_steps=2300,   ema=0.99,   weighting="uniform", logsnr_space=False, guidance=1.0, bits=4, log_every=50,  save_every=250,  eval_every=1250),
    "small": dict(image_size=64,  batch_size=16, max_steps=50_000,  lr=5e-4, warmup_steps=500,  decay_steps=25_000, ema=0.999,  weighting="uniform", logsnr_space=False, guidance=1.0, bits=6, log_every=50,  save_every=500,  eval_every=2500),
    "paper": dict(image_size=128, batch_size=8,  max_steps=300_000, lr=1e-4, warmup_steps=1000, decay_steps=50_000, ema=0.9999, weighting="sigmoid", logsnr_space=True,  guidance=1.0, bits=6, log_every=100, save_every=1000, eval_every=10_000),
}

FREE = {"out", "root", "cache", "device", "compile", "max_steps", "eval_every", "eval_images", "log_every", "save_every"}   # may change on resume


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
    preset = given.get("preset") or {"shapes": "tiny", "coco": "paper"}.get(dataset, "small")
    if preset not in PRESETS:
        raise ValueError(f"preset '{preset}' is not one of {', '.join(PRESETS)}")
    c = Config(**{**PRESETS[preset], **given, "preset": preset})
    c.out = c.out or f"out/{Path(dataset).name}-{preset}"
    for key in ("batch_size", "accumulate", "max_steps", "image_size", "eval_every", "eval_images", "steps", "log_every",
                "save_every"):
        if getattr(c, key) < 1:
            raise ValueError(f"--{key} must be at least 1, not {getattr(c, key)}")
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


def help_text():
    """The docstring, then Config as it stands in this file."""
    source = Path(__file__).read_text()
    body = source.split("class Config:\n")[1].split("\n\n\n")[0]
    return f"{__doc__}\noptions (--key value), with their defaults:\n\n{body}\n"


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate(step, c):
    """Linear warm-up, constant, cosine decay to 0 over the last decay_steps."""
    left = (c.max_steps - step) / max(1, min(c.decay_steps, c.max_steps))
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup_steps)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


@torch.no_grad()
def update_ema(ema, net, step, decay):
    """ema <- decay * ema + (1 - decay) * net, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def pick_precision(name, device):
    """(autocast dtype or None, why)."""
    if name != "auto":
        known = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        if name not in known:
            raise ValueError(f"precision '{name}' is not one of auto, {', '.join(known)}")
        return known[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16"
        return torch.float16, "this GPU has no bf16; the loss is scaled"
    return None, f"on {device.type}"


def make_batch(data, start, count, c):
    """Samples `start` to `start + count` of the run: images, labels, sizes, and uniform numbers for the augmentation."""
    u = datasets.uniforms(start, count, c.seed, 17)
    positions = datasets.order(start, count, len(data), c.seed)
    return *data.get(positions, u[:, 16]), torch.from_numpy(u[:, :16])


def save(path, content):
    """Write a checkpoint so that a crash at any moment leaves either the old or the new one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


@torch.no_grad()
def validate(net, data, codec, diffusion, c, device, autocast, stop):
    """Mean ARI and IoU over images and annotators, one sample an image, and a picture of the first 8; None if stopped."""
    n, totals, tiles = min(c.eval_images, len(data)), [], []
    sampling = dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance)
    for start in range(0, n, 32):
        if stop:
            return None
        at = range(start, min(start + 32, n))
        images, labels, sizes = data.get(list(at))
        x, inside = datasets.normalise(images.to(device), sizes.to(device))
        pictures = 3 if start == 0 else 1                                          # samples an image
        for j in range(pictures):
            m = len(at) if j == 0 else min(8, len(at))
            with autocast():
                x_hat = sample(net, x[:m], inside[:m], codec.channels, [1000 * j + i for i in at][:m], diffusion,
                               codec.activate, **sampling)
            cells = codec.decode(x_hat, inside[:m]).cpu()
            if j == 0:
                for i, one in zip(at, cells):
                    maps = data.maps(i)
                    s = scores(one.expand(len(maps), -1, -1), maps)
                    totals.append([float(s["ari"].nanmean()), float(s["iou"].nanmean())])
                side = side_of(codec)
                truth = Codec(bits=codec.bits).cells(labels[:8]) if codec.palette == "none" else codec.cells(labels[:8])
                tiles = tiles or [[row.numpy(), overlay(row, t, side, 0.8)] for row, t in zip(images[:8], truth)]
            if pictures > 1:
                for row, image, one in zip(tiles, images, cells):
                    row.append(overlay(image, one, side, 0.8))
    ari, iou = torch.tensor(totals, dtype=torch.float64).nanmean(0).tolist()
    scale = max(1, 128 // c.image_size)
    sheet = grid([tile.repeat(scale, 0).repeat(scale, 1) for row in tiles for tile in row], columns=2 * len(tiles[0]))
    return ari, iou, Image.fromarray(sheet)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    try:
        c = parse(argv)
        run = prepare(c)
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    return train(c, *run)


def prepare(c):
    """All that can be wrong with the user's input goes wrong here. Raises ValueError or OSError."""
    device = pick_device(c.device)
    dtype, why = pick_precision(c.precision, device)
    if c.compile not in ("auto", "on", "off"):
        raise ValueError(f"compile is auto, on or off, not '{c.compile}'")
    codec = Codec(c.encoding, c.bits, c.palette, c.seed, c.activation)
    names = [f.name for f in dataclasses.fields(Diffusion) if f.name in Config.__dataclass_fields__]
    diffusion = Diffusion(**{name: getattr(c, name) for name in names})
    copies = 2 if c.self_condition > 0 else 1
    network = dict(in_channels=copies * codec.channels + 3, out_channels=codec.channels, dropout=c.dropout, **SIZES[c.preset])
    torch.manual_seed(c.seed)
    net = UNet(**network)
    if c.image_size % net.multiple:
        near = max(1, round(c.image_size / net.multiple)) * net.multiple
        raise ValueError(f"--image_size {c.image_size}: preset {c.preset} needs a multiple of {net.multiple}, e.g. {near}")
    net = net.to(device)
    resumed = None
    if (Path(c.out) / "ckpt.pt").exists():
        resumed = read_checkpoint(Path(c.out) / "ckpt.pt", device)
        old = resumed["config"]
        differ = [f"{k} {old.get(k)} -> {v}" for k, v in vars(c).items() if k not in FREE and old.get(k) != v]
        if differ:
            raise ValueError(f"{c.out}/ckpt.pt was made with other options ({'; '.join(differ)}): use the same, or another --out")
    common = dict(root=c.root, cache=c.cache, seed=c.seed, unlabelled=c.unlabelled)
    train_data = datasets.load(c.dataset, "train", c.image_size, **common)
    val_data = datasets.load(c.dataset, "val", c.image_size, **common)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    return device, dtype, why, codec, diffusion, network, net, resumed, train_data, val_data


def train(c, device, dtype, why, codec, diffusion, network, net, resumed, train_data, val_data):
    out, step = Path(c.out), 0
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, betas=(0.9, 0.999), weight_decay=c.weight_decay,
                                  fused=device.type in ("cuda", "cpu"))
    fast = torch.compile(net) if c.compile == "on" or c.compile == "auto" and device.type == "cuda" else net
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if resumed:
        step = resumed["step"]
        net.load_state_dict(resumed["net"])
        ema.load_state_dict(resumed["ema"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        torch.set_rng_state(resumed["rng"].cpu())

    def autocast():
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    def checkpoint():
        save(out / "ckpt.pt", dict(
            format=1, step=step, dataset=c.dataset, image_size=c.image_size, config=vars(c), network=network,
            codec=dict(encoding=c.encoding, bits=c.bits, palette=c.palette, seed=c.seed, activation=c.activation),
            diffusion=dataclasses.asdict(diffusion),
            sampling=dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance),
            net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            rng=torch.get_rng_state()))

    def log(**line):
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    print(textwrap.fill("  ".join(f"{k}={v}" for k, v in vars(c).items()), 120, break_on_hyphens=False))
    size = "endless" if len(train_data) >= 2**31 else len(train_data)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters on {device}, {str(dtype or torch.float32)[6:]} ({why}); "
          f"{size} training images; " + (f"going on from step {step}" if resumed else "from scratch") + f"; into {out}/")
    if step >= c.max_steps:
        print(f"{out}/ckpt.pt is complete at step {step}: raise --max_steps to go on, or start anew with another --out")
        return 0

    stop = []                                                                      # signals; looked at between steps

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)                                      # a second one ends it at once

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    micro, losses, started, first = c.batch_size // c.accumulate, [], time.time(), step
    loader = ThreadPoolExecutor(1)                                                 # prepares the next batch meanwhile
    coming = loader.submit(make_batch, train_data, step * c.batch_size, c.batch_size, c)
    try:
        while step < c.max_steps and not stop:
            images, labels, sizes, u = (v.to(device, non_blocking=True) for v in coming.result())
            coming = loader.submit(make_batch, train_data, (step + 1) * c.batch_size, c.batch_size, c)
            generator = torch.Generator(device).manual_seed(c.seed * 2**32 + step)     # a step's noise depends on nothing else
            if c.augment and c.dataset != "shapes":
                x, inside, labels = datasets.augment(images, labels, sizes, u)
            else:
                x, inside = datasets.normalise(images, sizes)
            cells = codec.cells(labels.masked_fill(~inside, -1), generator)
            x0, valid = codec.encode(cells), cells >= 0

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c)
            for part in (slice(i, i + micro) for i in range(0, c.batch_size, micro)):
                with autocast():
                    loss = training_loss(fast, x0[part], x[part], valid[part], diffusion, codec.activate, generator)
                scaler.scale(loss / c.accumulate).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), c.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update_ema(ema, net, step, c.ema)
            step += 1

            if step % c.log_every == 0 or step == c.max_steps:
                mean, spent = float(torch.stack(losses).mean()), time.time() - started
                rate = (step - first) / spent
                losses = []
                print(f"step {step:>6}/{c.max_steps}  loss {mean:.4f}  lr {learning_rate(step - 1, c):.1e}  "
                      f"{rate * c.batch_size:.0f} images/s  {spent / 60:.1f} min, {(c.max_steps - step) / rate / 60:.1f} left", flush=True)
                log(step=step, loss=mean, lr=learning_rate(step - 1, c), images_per_second=rate * c.batch_size, seconds=spent)
            if step % c.eval_every == 0 or step == c.max_steps:
                result = validate(ema, val_data, codec, diffusion, c, device, autocast, stop)
                if result:
                    ari, iou, picture = result
                    picture.save(out / f"samples_{step:06d}.png")
                    print(f"step {step:>6}  validation ARI {ari:.3f}  IoU {iou:.3f}  -> {out}/samples_{step:06d}.png", flush=True)
                    log(step=step, ari=ari, iou=iou, seconds=time.time() - started)
            if step % c.save_every == 0 or step == c.max_steps:
                checkpoint()
    finally:
        loader.shutdown(cancel_futures=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop and step < c.max_steps:
        checkpoint()
        print(f"\nstopped and saved at step {step}: run the same command again to go on")
        return 128 + stop[0]
    print(f"done: {out}/ckpt.pt; now try: python sample.py --n 8 photo.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
