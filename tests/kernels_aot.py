"""Compiles the kernels, as their launchers launch them, for GPUs that need not be there.

    # sm_90, both layouts, 6 bits, 128 x 128; and sm_80
    python tests/kernels_aot.py 90:all:6:128 80:last:10:37
    python tests/kernels_aot.py 90:norm:64:32  # GroupNorm + SiLU of 64 channels in 32 groups
    python tests/kernels_aot.py  # everything: an hour; the spills once more last

Prints one JSON line a kernel: registers, stack and local memory (where spills go), the bytes a thread moves
in accesses of at least 16; with the word count also its instructions, and those of them on the
quarter-rate unit (MUFU), which takes longer. Works by letting Triton compile for a given target instead of
launching.
Layouts: all, last (channels_last) or half (channels_last and bfloat16 only); norm and norm-half.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

arch, bits, side, case, spills = 0, 0, 0, "", []
count = "count" in sys.argv


class NoDriver:
    """What the compiler asks a driver for."""

    def get_current_target(self):
        return GPUTarget("cuda", arch, 32)

    def get_current_device(self):
        return arch  # Triton keeps what it compiled for each device

    def get_current_stream(self, device):
        return 0


def resources(cubin):
    def ask(tool, option):
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        return subprocess.run([program, option, f.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        used, code = ask("cuobjdump", "-res-usage"), ask("nvdisasm", "-c") if count else ""
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used).groups()
    found = dict(registers=int(registers), stack=int(stack), local=int(local))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", code, re.M)
    counted = dict(instructions=sum(name != "NOP" for name in names),
                   quarter_rate=sum(name.startswith("MUFU") for name in names))
    return found | counted if count else found


def wide(ptx, kind):
    """Bytes that the instructions of a thread move in accesses of at least 16 bytes; kind: ld or st."""
    found = re.findall(kind + r"\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", ptx)
    return sum(int(n) * int(bits) // 8 for n, bits in found if int(n) * int(bits) >= 128)


compile_and_launch = JITFunction.run


def run(self, *args, grid, warmup, **options):
    kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
    found = dict(arch=arch, bits=bits, side=side, case=case + ", sums" * options.get("SUMS", False),
                 kernel=self.__name__,
                 load=wide(kernel.asm["ptx"], "ld"),
                 store=wide(kernel.asm["ptx"], "st"), **resources(kernel.asm["cubin"]))
    print(json.dumps(found), flush=True)
    if found["stack"] or found["local"]:
        spills.append(found)


JITFunction.run = run
driver.set_active(NoDriver())

from kernels import (  # they take CPU tensors: nothing is launched
    _average,
    _locate,
    _loss,
    _noise,
    _norm,
    _step,
)
from model import SIZES, UNet


def every_kernel(layouts, K, side):
    """Compile all that the launchers launch for K bits and maps of side x side."""
    global case
    B, H, W = 2, side, side
    ones, seeds = torch.ones(B), torch.ones(B, dtype=torch.int64)
    cells = torch.zeros(B, H, W, dtype=torch.int8 if K < 8 else torch.int16)
    inside = cells == 0
    codes = torch.zeros(2**K, dtype=torch.int64)
    for dtype in (torch.bfloat16,) if layouts == "half" else (torch.bfloat16, torch.float32):
        for last in (True, False) if layouts == "all" else (True,):
            case = f"{str(dtype)[6:]} {'channels_last' if last else 'nchw'}"
            memory = torch.channels_last if last else torch.contiguous_format
            x, two = (torch.zeros(n * B, K, H, W, dtype=dtype).contiguous(memory_format=memory) for n in (1,
                                                                                                          2))
            picture = torch.zeros(B, 3, H, W).contiguous(memory_format=memory)
            _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones)
            case += ", input"
            _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, picture, ones)
            case += " of nchw"  # as augmented images come
            _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, picture.contiguous(), ones)
            case = case.removesuffix(" of nchw")
            if dtype == torch.bfloat16:
                case += ", self"
                _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, codes, picture, ones, x,
                             True)
                case = case.removesuffix(", self") + " of detail 2"
                fine = picture.repeat(1, 4, 1, 1).contiguous(memory_format=memory)
                _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, fine, ones)
            case = case.split(",")[0]
            _loss.loss_forward(x, cells, ones, "x", True, False, last, None, None, None, None)
            _loss.loss_backward(ones, ones, ones, x, cells, "x", True, False, last, None, None, None, None)
            if dtype == torch.bfloat16:
                case += ", cross entropy"
                _loss.loss_forward(x, cells, ones, "x", True, True, last, None, None, None, None)
                _loss.loss_backward(ones, ones, ones, x, cells, "x", True, True, last, None, None, None, None)
                case = case.split(",")[0] + ", eps"
                _loss.loss_forward(x, cells, ones, "eps", True, False, last, x.float(), ones, ones, codes)
                _loss.loss_backward(ones, ones, ones, x, cells, "eps", True, False, last, x.float(), ones,
                                    ones, codes)
                case = case.split(",")[0]
            _step.step(two, x.float(), last, 0.5, 0.5, 0.1, 0.2, 0.0, inside, 1.0, None, 0, "x", True, False)
            case += ", ddpm"
            _step.step(two, x.float(), last, 0.5, 0.5, 0.1, 0.2, 0.3, inside, 1.0, seeds, 3, "x", True, True)
            case = case.split(",")[0]
    x = torch.zeros(B, K, H, W)
    case = "float32 nchw, along rows"
    _average.average(x, torch.zeros(B, H, W + 1), x[:, 0], True)
    case = "float32 nchw, along columns"
    _average.average(x, torch.zeros(B, H + 1, W), x[:, 0], False)
    case = "float32 channels_last, normal"
    _noise.noise(seeds, 0, H, W, K, torch.float32, True)
    for below in (256, 1024):
        for hints in None, inside:
            case = f"int64 below {below}" + ", hints" * (hints is not None)
            _locate.locate(cells.long(), 2 ** (K // 2), torch.int16, below, hints)


def norm_kernels(layouts, channels, groups):
    """Compile GroupNorm and SiLU, and unless "norm-half" GroupNorm alone and float32, of maps of 16 x 16."""
    global case
    weight, stats = torch.ones(channels), torch.ones(2, 2, groups)
    for dtype, silu in [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True),
                        (torch.float32, False)][: 1 if layouts == "norm-half" else 4]:
        x = torch.zeros(2, channels, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
        case = f"{str(dtype)[6:]} channels_last" + ", silu" * silu
        _norm.norm_forward(x, weight, weight, groups, 1e-5, silu)
        _norm.norm_backward(x, x, stats, weight, weight, silu)


with torch.device("meta"):  # what two of the networks have
    NORMS = sorted({(m.num_channels, m.num_groups) for name in ("photo", "paper")
                    for m in UNet(64, 6, **SIZES[name]).modules() if isinstance(m, torch.nn.GroupNorm)})
every = [f"{a}:all:{k}:{n}" for k in (2, 4, 6, 8, 10) for n in (37, 96, 128) for a in (80, 90, 100)]
every += [f"{a}:norm:{c}:{g}" for c, g in NORMS for a in (80, 90, 100)]
for task in [word for word in sys.argv[1:] if word != "count"] or every:
    arch, layouts, bits, side = task.split(":")
    arch, bits, side = int(arch), int(bits), int(side)
    (norm_kernels if "norm" in layouts else every_kernel)(layouts, bits, side)
if len(sys.argv) == 1 + count:
    print(f"{len(spills)} spills", *map(json.dumps, spills), sep="\n")
