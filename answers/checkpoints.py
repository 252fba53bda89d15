"""Checkpoints: from a file of train.py to a Model that is ready to sample from, and which file that is.

What it is: `load_checkpoint`, which finds whatever is wrong in a file, and `newest_checkpoint`. What it is
not: it samples nothing (segment.py), and writes no checkpoints (engine.py).

    from answers.checkpoints import load_checkpoint, newest_checkpoint
    model = load_checkpoint(newest_checkpoint())  # the last under out/, or else weights/photo.pt
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from answers import tree
from bits import Codec
from diffusion import SAMPLERS, VARIANCES, Diffusion, kernel_options
from engine import PRECISIONS, newest, pick_device, pick_precision
from model import UNet

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
    graphs: dict = field(default_factory=dict)  # of segment.sampled, on CUDA
    config: dict = field(default_factory=dict)  # the options of train.py

    @property
    def detail(self):
        """The image's resolution as the network sees it, as a multiple of image_size."""
        return getattr(self.net, "detail", 1)


def read_checkpoint(path):
    """The dictionary in a checkpoint file, or in the one before it where it is damaged. Raises ValueError
    naming the file."""
    content, used, problem = newest(path)
    if content is None:
        raise ValueError(f"{path}: no such file; train one with: python train.py")
    if problem:
        print(f"{problem}; using the one before, {used}", file=sys.stderr)
    return content


def check_settings(c):
    """Raises ValueError where numbers in a checkpoint's dictionary are none, and for unknown samplers."""
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


def load_checkpoint(path, device="cpu", raw=False):
    """The EMA network of a checkpoint, or the network itself (raw), ready to sample from; its samples are
    joined by the odds in the tree.npz beside it, if there is one. Raises ValueError naming the file
    or the device, RuntimeError as `diffusion.kernel_options`."""
    c, device = read_checkpoint(path), pick_device(str(device))
    if lacks := {"network", "ema", "codec", "diffusion", "image_size", "sampling", "dataset",
                 "step"} - c.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}: it is no checkpoint of train.py")
    if raw and "net" not in c:
        raise ValueError(f"{path} holds averaged weights only (it was made by --export): leave out --raw")
    try:
        check_settings(c)
        net, codec = UNet(**c["network"]), Codec(**c["codec"])
        diffusion = Diffusion(**c["diffusion"])
        copies = 1 + (diffusion.hints > 0) + (diffusion.self_condition > 0)  # of the bits, as in train.py
        want = (copies * codec.channels + 3 * getattr(net, "detail", 1) ** 2, codec.channels)
        if want != (c["network"]["in_channels"], c["network"]["out_channels"]):
            raise ValueError(f"its network is not of {want[0]} channels in and {want[1]} out, as its "
                             f"settings say")
        net.load_state_dict(c["net" if raw else "ema"])
        # half of the time, where the CPU has bf16; what the samplers do with its output stays float32
        dtype = PRECISIONS[pick_precision("auto", device)[0]] if device.type == "cpu" else None
        net = net.to(dtype=dtype).eval().requires_grad_(False)
        model = Model(net, codec, diffusion, c["image_size"],
                      {"smooth": 0.0, **c["sampling"]}, c["dataset"], c["step"],
                      {"least": 0, "merge": 0.0, **c.get("tidy", {})},
                      beside if (beside := Path(path).with_name("tree.npz")).exists() else tree.LEARNT,
                      config=dict(c.get("config", {})))
    except Exception as e:  # of whatever kind, for whatever lies in it
        known = {ValueError: str(e), RuntimeError: "its weights do not fit its network"}
        why = known.get(type(e), "entries of a wrong kind")
        raise ValueError(f"{path}: no checkpoint that this version can use: {why}") from None
    # now, not in the midst of sampling: raises where kernels were forced that cannot run
    kernel_options(model.codec, device)
    model.net.to(device)
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
    """The checkpoint under root that was written last, but for those of experiments.py; else the weights that
    come with the repository. Raises ValueError."""
    found = [p for p in Path(root).glob("**/ckpt.pt") if p.relative_to(root).parts[0] != "experiments"]
    found.sort(key=lambda p: p.stat().st_mtime)
    if not found and not shipped.exists():
        raise ValueError(f"no checkpoint under {root}/, and no {shipped}: train one first (python train.py, "
                         f"3.5 minutes on 2 cores), or name one with --ckpt")
    return found[-1] if found else shipped


def odds_of(model):
    """By what the regions of this model's samples join: the learnt network (None: by the samples alone), and
    the offset of its cuts in log odds, which lets the samples alone join what most of them do."""
    merge = model.tidy["merge"]
    return (tree.learnt(model.odds), -np.log(merge)) if merge else (None, -tree.GRAINS["normal"])
