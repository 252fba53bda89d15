"""Compiles the kernels, as their launchers launch them, for GPUs that need not be there.

    python kernels_aot.py 90:all 80:last         # sm_90 in both layouts, sm_80 in channels_last only

Prints one JSON line a kernel: registers, local memory (where spills go) and the bytes a thread moves in accesses of at
least 16. Works by letting Triton compile for a given target instead of launching.
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

arch, case = 0, ""


class NoDriver:
    """What the compiler asks a driver for."""

    def get_current_target(self):
        return GPUTarget("cuda", arch, 32)

    def get_current_device(self):
        return arch                              # Triton keeps what it compiled for each device

    def get_current_stream(self, device):
        return 0


def resources(cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return dict(registers=int(registers), stack=int(stack), local=int(local))


def wide(ptx, kind):
    """Bytes that the instructions of a thread move in accesses of at least 16 bytes; kind: ld or st."""
    found = re.findall(kind + r"\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", ptx)
    return sum(int(n) * int(bits) // 8 for n, bits in found if int(n) * int(bits) >= 128)


compile_and_launch = JITFunction.run


def run(self, *args, grid, warmup, **options):
    kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
    print(json.dumps(dict(arch=arch, case=case, kernel=self.__name__, load=wide(kernel.asm["ptx"], "ld"),
                          store=wide(kernel.asm["ptx"], "st"), **resources(kernel.asm["cubin"]))), flush=True)


JITFunction.run = run
driver.set_active(NoDriver())

from kernels import _contingency, _decode, _locate, _loss, _noise, _step       # they take CPU tensors: nothing is launched

B, K, H, W = 2, 6, 128, 128
ones, seeds, cells = torch.ones(B), torch.ones(B, dtype=torch.int64), torch.zeros(B, H, W, dtype=torch.int8)
inside, photo, sizes = cells == 0, torch.zeros(B, H, W, 3, dtype=torch.uint8), torch.zeros(B, 2, dtype=torch.int64)
for arch, layouts in (v.split(":") for v in sys.argv[1:]):
    arch = int(arch)
    for dtype in (torch.bfloat16, torch.float32):
        for last in (True, False) if layouts == "all" else (True,):
            case = f"{str(dtype)[6:]} {'channels_last' if last else 'nchw'}"
            memory = torch.channels_last if last else torch.contiguous_format
            x, two = (torch.zeros(n * B, K, H, W, dtype=dtype).contiguous(memory_format=memory) for n in (1, 2))
            picture = torch.zeros(B, 3, H, W).contiguous(memory_format=memory)
            _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones)
            case += ", input"
            _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, photo, sizes, ones)
            if dtype == torch.bfloat16:
                case += ", float image"
                _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, picture, None, ones)
                case += " of detail 2"
                _noise.noise(seeds, 0, H, W, K, dtype, last, cells, ones, ones, None, picture.repeat(1, 4, 1, 1).contiguous(
                    memory_format=memory), None, ones)
            case = case.split(",")[0]
            _loss.loss_forward(x, cells, ones, "x", True, False, last, None, None, None, None)
            _loss.loss_backward(ones, ones, ones, x, cells, "x", True, False, last, None, None, None, None)
            if dtype == torch.bfloat16:
                case += ", cross entropy"
                _loss.loss_forward(x, cells, ones, "x", True, True, last, None, None, None, None)
                _loss.loss_backward(ones, ones, ones, x, cells, "x", True, True, last, None, None, None, None)
                case = case.split(",")[0]
            _step.step(two, x.float(), last, 0.5, 0.5, 0.1, 0.2, 0.0, inside, 1.0, None, 0, "x", True, False)
            case += ", ddpm"
            _step.step(two, x.float(), last, 0.5, 0.5, 0.1, 0.2, 0.3, inside, 1.0, seeds, 3, "x", True, False)
            case = case.split(",")[0]
            _decode.decode(x[:, None], last, inside, None, torch.int64, False, False)
            if dtype == torch.float32:
                case += ", soft"
                _decode.decode(x[:, None], last, inside, None, torch.int64, True, True)
    case = "float32 channels_last, normal"
    _noise.noise(seeds, 0, H, W, K, torch.float32, True)
    case = "int64"
    _locate.locate(cells.long(), 8, False, torch.int8, 256)
    _contingency.contingency(cells.long(), cells.long(), 64, 64)
