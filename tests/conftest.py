"""The modules under test lie one folder up. Without a GPU, Triton's interpreter runs the kernels on the
CPU."""

import contextlib
import dataclasses
import gc
import os
import signal
import sys
from pathlib import Path

# before torch: threads waiting for a busy core cost 13 times the time
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
import torch

for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
    if signal.getsignal(number) == signal.SIG_IGN:  # in the background; the programs under test inherit it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


gc.set_threshold(7000, 10, 30)  # a look through all that is imported takes 0.3 s


def pytest_sessionfinish():
    gc.collect()
    gc.freeze()  # else pytest's own five looks at the end take as long each


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device, and is skipped without one")
    config.addinivalue_line("markers", "interpreter: needs Triton's interpreter, which is off with CUDA")
    config.addinivalue_line("markers", "forked: trains in a forked process, which PyTorch refuses with CUDA")
    from kernels import triton
    old = triton and version(triton) < (3, 7) and version(np) >= (2, 4)
    if old and os.environ.get("TRITON_INTERPRET"):
        raise pytest.UsageError(f"the interpreter of Triton {triton.__version__} does not run with NumPy "
                                f"{np.__version__}: pip install 'numpy<2.4'")
    if triton and os.environ.get("TRITON_INTERPRET"):
        with contextlib.suppress(AttributeError):  # of another version: slower
            hasten(triton.runtime.interpreter)


def hasten(interpreter):
    """Triton's interpreter patches the language for a kernel, again at each call of a function in it, makes a
    table of types at each operation, and looks whether integers overflow, to drop what it finds. Without all
    that it computes the same in half the time."""
    def call(self, *args, **options):
        if self.fn not in patched:
            patched.add(self.fn)
            return real_call(self, *args, **options)
        return self.rewrite()(*args, **options)

    def numpy_type(dtype):
        if dtype.scalar.name not in types:
            types[dtype.scalar.name] = real_type(dtype)
        return types[dtype.scalar.name]

    patched, types, builder = set(), {}, interpreter.interpreter_builder
    real_call, real_type = interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype = call, numpy_type


def pytest_runtest_setup(item):
    from kernels import triton
    cuda = torch.cuda.is_available()
    if item.get_closest_marker("interpreter") and (cuda or triton is None):
        pytest.skip("with a GPU, Triton's interpreter is off" if cuda else "Triton is not installed")
    if item.get_closest_marker("forked") and (cuda or not hasattr(os, "fork")):
        pytest.skip("needs fork" if not cuda else "PyTorch trains in no forked process where there is a GPU")


def version(package):
    return tuple(map(int, package.__version__.split(".")[:2]))


@pytest.fixture
def kernel_device():
    """Where the kernels run, which are forced: a GPU, or the CPU, in Triton's interpreter."""
    import kernels
    if kernels.triton is None:
        pytest.skip("needs Triton")
    kernels.use("triton")
    yield "cuda" if torch.cuda.is_available() else "cpu"
    kernels.use("auto")


@pytest.fixture(autouse=True)
def nothing_is_left_of_a_run(monkeypatch):
    """What train.py sets for its whole process, no other test sees; float32 is no TF32."""
    import kernels
    for name in "mode", "norm_mode":
        monkeypatch.setattr(kernels, name, getattr(kernels, name))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session", autouse=True)
def small_panels():
    """sample.py's panels show a photo at 80 pixels a side, not 320: else they take most of a test's time."""
    from answers import pictures
    with pytest.MonkeyPatch.context() as patch:
        fitted = pictures.fitted
        patch.setattr(pictures, "fitted", lambda width, height, side: fitted(width, height, side // 4))
        yield


SMALL = dict(width=32, mult=(1,), blocks=1, attn=1, heads=4, patch=2)


@pytest.fixture(scope="module")
def small():
    """`--preset tiny` trains a network that takes half the time."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.SIZES, "tiny", SMALL)
        yield


@pytest.fixture(scope="module")
def model():
    """An untrained network whose head is not zero, ready to sample from: maps of 16 x 16, 16 codes."""
    from answers.checkpoints import Model
    from bits import Codec
    from diffusion import Diffusion
    from model import UNet
    torch.manual_seed(0)
    net = UNet(7, 4, **SMALL).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.05 * torch.randn_like(p))
    sampling = dict(steps=2, guidance=1.0, sampler="ddpm", variance="large")
    return Model(net, Codec(bits=4), Diffusion(), 16, sampling, "mine", 0)
