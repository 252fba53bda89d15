"""Fused kernels for everything between a label map and the network's input, and between its output and the
gradient; and for the network's normalisations.

    import kernels
    cells = kernels.locate(labels, side=8, dtype=torch.int8)                      # location-aware palette
    x = kernels.network_input(cells, alpha, sigma, seeds, 6, image)               # noisy bits and image
    loss = kernels.loss(net(x, t), cells, weight).mean()                          # differentiable
    xt = kernels.step(out, xt, alpha_t, sigma_t, a, b, c, guidance=1.0, seeds=seeds)  # of the sampler
    xt = kernels.average(xt, rows, columns)                                       # within an image's edges
    h = kernels.norm(h, gain, bias, groups=3)                                     # GroupNorm and SiLU

This file is the only door. The functions need Triton and run on CUDA; where Triton cannot run they raise a
RuntimeError that says why, and a failed launch is never hidden. `live` tells a program beforehand which of
the two it has to take, the kernels or plain PyTorch; use("triton" or "torch"), or the environment variable
BITSEG_KERNELS, forces one. `norms` tells whether networks take `norm`: only with BITSEG_NORM=on, until a
compiled step has been measured.

The folder needs torch, and triton on CUDA, and nothing else: copy it. The operators are registered as
bitseg::*, so they work inside torch.compile, and none of them waits for the device, so they work inside CUDA
graphs (locate where labels_below is given).

Words: k bits, B samples, "main arrays" (B, k, H, W) in float32, float16 or bfloat16; NCHW and channels_last
are used as they are, other strides are copied first. cells (B, H, W), any signed integer type, below 2^k;
-1, and whatever else is no cell, is ignored.
"""

import functools
import math
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

try:
    import triton
    if not hasattr(triton, "knobs"):
        raise ImportError(f"version {triton.__version__} is older than 3.4")
except ImportError as e:  # macOS, Windows, a CPU build
    triton, why_not = None, f"triton cannot be imported ({e})"
else:
    from . import average as _average
    from . import common as _common
    from . import locate as _locate
    from . import loss as _loss
    from . import noise as _noise
    from . import norm as _norm
    from . import step as _step
    why_not = ""

MODES, PREDICTIONS, ACTIVATIONS = ("auto", "triton", "torch"), ("x", "eps", "v"), ("tanh", "none")
LIMIT = 2**30  # elements of a sample: 32-bit offsets inside it
LARGEST = 2**31.5  # pixels of a map times the side of the palette: squared, in 64 bits
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
REALS = (*FLOATS, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
mode = os.environ.get("BITSEG_KERNELS", "auto")
norm_mode = os.environ.get("BITSEG_NORM", "off")  # or on


# ------------------------------------------------------------------------------------------------------------
# Which one runs


def use(name):
    """Force "triton" or "torch", or let the device decide ("auto"). Overrides BITSEG_KERNELS."""
    global mode
    if name not in MODES:
        raise ValueError(f"kernels '{name}' is not one of {', '.join(MODES)}")
    mode = name


def live(device):
    """("triton" or "torch", why) for tensors on a device.

    RuntimeError when Triton was forced and cannot run there, and on a GPU where only a compiler is missing.
    """
    device = torch.device(device)
    if mode not in MODES:
        raise ValueError(f"BITSEG_KERNELS '{mode}' is not one of {', '.join(MODES)}")
    if norm_mode not in ("on", "off"):
        raise ValueError(f"BITSEG_NORM is on or off, not '{norm_mode}'")
    if mode == "torch":
        return "torch", "asked for"
    reason = why_not
    if not reason and device.type != "cuda" and not triton.knobs.runtime.interpret:
        reason = f"the tensors are on {device.type}"
    if not reason and device.type == "cuda" and torch.version.hip:
        reason = "they are in part PTX, for NVIDIA"
    if (not reason and device.type == "cuda" and mode == "auto"
            and torch.cuda.get_device_capability(device) < (8, 0)):
        reason = f"{torch.cuda.get_device_name(device)} is older than Ampere, for which they were written"
    if not reason and device.type == "cuda" and not triton.knobs.runtime.interpret:
        _can_launch()
    if mode == "triton":
        if reason:
            raise RuntimeError(f"Triton kernels were asked for, but {reason}: use 'auto' or 'torch'")
        return "triton", "asked for"
    if reason or device.type != "cuda":  # the interpreter is for tests: only on demand
        return "torch", reason or f"the tensors are on {device.type}"
    return "triton", f"on {torch.cuda.get_device_name(device)}"


@functools.lru_cache(1)
def _can_launch():
    """RuntimeError with the remedy where Triton cannot compile its launcher, a piece of C with Python.h."""
    asked = os.environ.get("CC")
    compiler = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    if compiler and header.exists():
        return
    code = """#include <Python.h>
        static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, "probe"};
        PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }"""
    try:  # Triton's cache or CPATH may have it all the same
        triton.runtime.build.compile_module_from_src(code, "probe")
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        missing = f"no C compiler {asked}, which CC names" if asked else "no C compiler"
        lacks = f"{header} is missing" if compiler else f"there is {missing}"
        raise RuntimeError(
            f"Triton cannot launch kernels here, as {lacks}: install it (Debian and Ubuntu: apt install gcc "
            f"python3-dev; Fedora: dnf install gcc python3-devel; conda: conda install c-compiler), or go "
            f"without, with --kernels torch or BITSEG_KERNELS=torch") from None


def _need_triton(device):
    """RuntimeError where Triton does not run on this device."""
    name, why = live(device)
    if name != "triton":
        raise RuntimeError(f"the kernels need Triton, but PyTorch is live here ({why})")


def _is_live(device):
    return live(device)[0] == "triton"


# torch.compile asks once and does not look inside. As torch.compiler.assume_constant_result, which imports
# the compiler: 1 s
_need_triton._dynamo_marked_constant = _is_live._dynamo_marked_constant = True


def norms(device):
    """Whether networks normalise by `norm` on a device: BITSEG_NORM is on, and Triton is live there.

    Raises as `live`.
    """
    return norm_mode == "on" and _is_live(device)


# ------------------------------------------------------------------------------------------------------------
# Checks. Every one names both sides.


def _same(shape, device, kinds, **tensors):
    """Tensors, if they are given, must have this shape, live on this device and have one of these dtypes."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device}, not on {x.device}")
        if x.dtype not in kinds:
            raise ValueError(f"{name} must be {' or '.join(str(k)[6:] for k in kinds)}, "
                             f"not {str(x.dtype)[6:]}")


def _main(name, x):
    """x must be a main array, of 2 to 10 bits."""
    if x.dim() != 4 or x.dtype not in FLOATS or x.numel() == 0 or not 2 <= x.shape[-3] <= 10:
        raise ValueError(f"{name} must be (B, k, H, W), not empty, k from 2 to 10, in "
                         f"float32, float16 or bfloat16; not {tuple(x.shape)} in {str(x.dtype)[6:]}")
    if x.shape[-3] * x.shape[-2] * x.shape[-1] >= LIMIT:
        raise ValueError(f"{name} must have fewer than 2^30 elements a sample, not {tuple(x.shape[-3:])}")


def _table(name, table, bits, device):
    _same((2**bits,), device, INTEGERS, **{name: table})
    if table is None and bits % 2:
        raise ValueError(f"{bits} bits have no square grid and so no 2D Gray code: pass {name}, ({2**bits},)")


def _maps(name, x):
    if x.dim() != 3 or x.numel() == 0 or x.dtype not in INTEGERS + (torch.uint8,):
        raise ValueError(f"{name} must be integers of shape (B, H, W), not empty; not {tuple(x.shape)} in "
                         f"{str(x.dtype)[6:]}")


def _stream(number):
    if not 0 <= number < 2**31:
        raise ValueError(f"stream must be from 0 to 2^31 - 1, not {number}")


def _constant(**tensors):
    """Tensors, if they are given, of which there is no gradient."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} has no gradient here: pass {name}.detach()")


def _known(**names):
    for name, (value, choices) in names.items():
        if value not in choices:
            raise ValueError(f"{name} '{value}' is not one of {', '.join(choices)}")


def _float(x):
    return x if x is None else x.float().contiguous()


def _flat(x):
    return x if x is None else x.contiguous()


# ------------------------------------------------------------------------------------------------------------
# Label maps


def locate(labels, side, dtype=torch.int64, labels_below=None, hints=None):
    """Location-aware palette: every segment gets the cell nearest to its centroid, no two the same one.

    labels (B, H, W) integers, any ids, -1 = ignore -> cells (B, H, W) in [0, side^2), -1 where ignored; side
    from 1 to 32.
    labels_below: a promise that every id lies in [-1, labels_below), at most 1,024; then nothing waits for
    the device, and an id that breaks the promise counts as ignored. hints (B, H, W) bool, which need this
    promise: segments with hinted pixels choose first, by the centroid of these. In plain PyTorch:
    bits.locate.
    """
    _maps("labels", labels)
    if not 1 <= side <= 32:
        raise ValueError(f"side must be from 1 to 32, not {side}")
    if labels[0].numel() * side >= LARGEST:
        raise ValueError(f"labels must have below 3.0e9 / {side} pixels a map, not {tuple(labels.shape)}")
    if dtype not in INTEGERS or torch.iinfo(dtype).max < side * side - 1:
        raise ValueError(f"cells up to {side * side - 1} do not fit into {str(dtype)[6:]}")
    if labels_below is not None and not 1 <= labels_below <= 1024:
        raise ValueError(f"labels_below must be from 1 to 1024, not {labels_below}")
    _same(labels.shape, labels.device, (torch.bool,), hints=hints)
    if hints is not None and labels_below is None:
        raise ValueError("hints need labels_below")
    _need_triton(labels.device)
    if labels_below is None:
        low, high = (int(v) for v in labels.aminmax())
        if low < -1 or high >= _locate.MAX_LABELS:
            labels, high = _locate.renumbered(labels, side * side)
        labels_below = max(1, high + 1)
    if hints is not None and labels.dtype == torch.uint8:  # which has no -1
        labels = labels.short()
    return _locate.locate(labels.contiguous(), side, dtype, labels_below, hints)


# ------------------------------------------------------------------------------------------------------------
# Into the network


def normal(seeds, channels, height, width, stream=0, dtype=torch.float32):
    """Standard normal numbers (B, channels, height, width), channels_last, a function of seed, stream and
    place alone.

    seeds (B,) int64; stream: which of a seed's noises, a 32-bit number. Philox4x32-10 and Box-Muller: number
    p * channels + c of a sample (p: raster index) is number f % 4 of Philox call f // 4. Equal on every
    device and for every batch split, up to the rounding of log, sin and cos.
    """
    _same((seeds.numel(),), seeds.device, (torch.int64,), seeds=seeds)
    if dtype not in FLOATS or min(channels, height, width) < 1 or channels * height * width >= LIMIT:
        raise ValueError(f"normal numbers are float32, float16 or bfloat16, from 1 to 2^30 - 1 a sample; not "
                         f"{channels} x {height} x {width} in {str(dtype)[6:]}")
    _stream(stream)
    _need_triton(seeds.device)
    return _noise.noise(seeds.contiguous(), stream, height, width, channels, dtype, True)


def noise(cells, alpha, sigma, seeds, bits, stream=0, codes=None, dtype=torch.float32, channels_last=True):
    """xt = alpha x0 + sigma eps (B, bits, H, W) of cells (B, H, W); x0 = 0 where a cell is -1; eps =
    normal(seeds, ...).

    alpha, sigma (B,) floats; seeds (B,) int64. codes (2^bits,) integers: the code of each cell; None: 2D
    Gray.
    In plain PyTorch: alpha * codec.encode(cells) + sigma * eps.
    """
    return network_input(cells, alpha, sigma, seeds, bits, None, stream=stream, codes=codes, dtype=dtype,
                         channels_last=channels_last)


def network_input(cells, alpha, sigma, seeds, bits, image, keep=None, x_self=None, self_condition=False,
                  stream=0, codes=None, dtype=torch.float32, channels_last=True):
    """The network's whole input, cat(xt, image[, x_self]): (B, bits + 3 [+ bits], H, W). xt as of `noise`.

    image (B, 3, H, W) floats, taken as they are, or (B, 3 d^2, H, W) of an image folded d x d (then the input
    has more channels). keep (B,): factor on the image, 0 where it is dropped. self_condition: `bits` more
    channels, x_self (B, bits, H, W), or zeros without it. In plain PyTorch: diffusion.network_input.
    """
    _maps("cells", cells)
    (B, H, W), device = cells.shape, cells.device
    _same(cells.shape, device, INTEGERS, cells=cells)
    fold = math.isqrt(image.shape[1] // 3) if image is not None and image.dim() == 4 else 1
    if not 2 <= bits <= 10 or dtype not in FLOATS or H * W * (2 * bits + 3 * fold**2) >= LIMIT:
        raise ValueError(f"bits from 2 to 10, a float dtype and below 2^30 elements a sample are possible, "
                         f"not {bits}, {str(dtype)[6:]} and {H} x {W}")
    _same((B,), device, REALS, alpha=alpha, sigma=sigma)
    _same((B,), device, (torch.int64,), seeds=seeds)
    _stream(stream)
    _table("codes", codes, bits, device)
    _same((B, 3 * max(1, fold) ** 2, H, W), device, FLOATS, image=image)
    _same((B,), device, (*FLOATS, torch.bool), keep=keep)
    _same((B, bits, H, W), device, FLOATS, x_self=x_self)
    _need_triton(device)
    if image is not None:
        image = _common.dense(image)
        keep = torch.ones_like(alpha) if keep is None else keep
    x_self = None if x_self is None else _common.like(x_self, channels_last)
    return _noise.noise(seeds.contiguous(), stream, H, W, bits, dtype, channels_last, cells.contiguous(),
                        _float(alpha), _float(sigma), _flat(codes), image, _float(keep), x_self,
                        self_condition)


# ------------------------------------------------------------------------------------------------------------
# Out of the network


def loss(out, cells, weight, prediction="x", activation="tanh", xt=None, alpha=None, sigma=None, codes=None,
         bce=False):
    """weight * sum over bits of the mean over valid pixels of (x_hat - x0)^2: (B,) float32, differentiable in
    out, once.

    out (B, k, H, W); cells (B, H, W), x0 is their bits; weight (B,). prediction: x (then activation is tanh
    or none), eps or v; the last two need xt, like out but best in float32, and alpha and sigma (B,). codes:
    as of `noise`.
    bce: the cross entropy -log sigmoid(2 x0 out) instead of the square, for prediction x and tanh. Two runs
    give the same bits. An ignored pixel counts nothing, but with tanh, a nan there is one in the gradient. In
    plain PyTorch: weight * diffusion.per_sample_error(to_x0(...), codec.encode(cells), valid), or
    per_sample_entropy.
    """
    _main("out", out)
    B, K, H, W = out.shape
    _same((B, H, W), out.device, INTEGERS, cells=cells)
    _same((B,), out.device, REALS, weight=weight)
    _constant(weight=weight, xt=xt, alpha=alpha, sigma=sigma)
    _known(prediction=(prediction, PREDICTIONS), activation=(activation, ACTIVATIONS))
    _table("codes", codes, K, out.device)
    if bce and (prediction, activation) != ("x", "tanh"):
        raise ValueError(f"bce needs prediction 'x' and activation 'tanh', not '{prediction}' and "
                         f"'{activation}'")
    if prediction != "x":
        if xt is None or alpha is None or sigma is None:
            raise ValueError(f"prediction '{prediction}' needs xt {tuple(out.shape)}, alpha ({B},) and "
                             f"sigma ({B},)")
        _same(out.shape, out.device, FLOATS, xt=xt)
        _same((B,), out.device, REALS, alpha=alpha, sigma=sigma)
    _need_triton(out.device)
    out = _common.dense(out)
    last = _common.is_last(out)
    xt = None if prediction == "x" else _common.like(xt, last)
    return _loss.Loss.apply(out, cells.contiguous(), _float(weight), prediction, activation == "tanh", bce,
                            last, xt, _float(alpha), _float(sigma), _flat(codes))


def average(x, rows, columns, times=12):
    """x (B, k, H, W) float32, 0 where not valid, averaged along rows, then along columns, several times.

    rows: what is kept of a number on the way from each pixel to the next, (B, H, W + 1), 0 at both ends, and
    1 / the sum of the weights, (B, H, W), 0 where not valid; columns: the same, (B, H + 1, W) and (B, H, W);
    float32. In plain PyTorch: diffusion.average, with what diffusion.edge_aware makes of an image.
    """
    if x.dim() != 4 or x.dtype != torch.float32 or x.numel() == 0 or x[0].numel() >= LIMIT:
        raise ValueError(f"x must be (B, k, H, W) float32, not empty, below 2^30 elements a sample; not "
                         f"{tuple(x.shape)} in {str(x.dtype)[6:]}")
    B, _, H, W = x.shape
    for name, (keep, share), shape in (("rows", rows, (B, H, W + 1)), ("columns", columns, (B, H + 1, W))):
        _same(shape, x.device, (torch.float32,), **{f"{name}[0]": keep})
        _same((B, H, W), x.device, (torch.float32,), **{f"{name}[1]": share})
    _need_triton(x.device)
    lines = [(*map(_flat, rows), True), (*map(_flat, columns), False)]
    x = x.contiguous()
    for _ in range(times):
        for keep, share, along in lines:
            x = _average.average(x, keep, share, along)
    return x


def step(out, xt, alpha, sigma, a, b, c=0.0, valid=None, guidance=0.0, seeds=None, stream=0, prediction="x",
         activation="tanh", with_x_hat=False, clamp=True):
    """One update of the sampler: a xt + b x_hat + c eps (B, k, H, W), in xt's dtype; with_x_hat: and x_hat,
    float32.

    out (B, k, H, W); with guidance w (2B, k, H, W), both halves: x_hat = (1 + w) x_hat(image) - w x_hat(no
    image). Then x_hat is clamped to [-1, 1], if clamp, and 0 outside valid (B, H, W) bool. alpha, sigma, a,
    b, c: numbers, the first two of xt's time; eps = normal(seeds, ..., stream), needed unless c is 0. In
    plain PyTorch: the body of diffusion.sample; a, b, c:
      ddpm: r alpha_s / alpha, (1 - r) alpha_s, std      ddim: sigma_s / sigma, alpha_s - sigma_s alpha /
      sigma, 0
    """
    _main("xt", xt)
    B, K, H, W = xt.shape
    _same((2 * B if guidance else B, K, H, W), xt.device, FLOATS, out=out)
    _known(prediction=(prediction, PREDICTIONS), activation=(activation, ACTIVATIONS))
    _same((B, H, W), xt.device, (torch.bool,), valid=valid)
    if c and seeds is None:
        raise ValueError(f"c = {c} needs seeds ({B},)")
    seeds = seeds if c else None
    _same((B,), xt.device, (torch.int64,), seeds=seeds)
    _stream(stream)
    _need_triton(xt.device)
    out = _common.dense(out)
    last = _common.is_last(out)
    after, x_hat = _step.step(out, _common.like(xt, last), last, alpha, sigma, a, b, c, _flat(valid),
                              guidance, _flat(seeds), stream, prediction, activation == "tanh", with_x_hat,
                              clamp)
    return (after, x_hat) if with_x_hat else after


# ------------------------------------------------------------------------------------------------------------
# Inside the network


def norm(x, weight, bias, groups, eps=1e-5, silu=True):
    """GroupNorm, then SiLU if silu: (B, C, H, W) channels_last in x's dtype, differentiable once.

    x (B, C, H, W) in float32, float16 or bfloat16, channels_last or copied to it; weight, bias (C,) floats;
    groups: a divisor of C. Arithmetic is float32, rounded once; two runs give the same bits. In plain
    PyTorch: F.silu(F.group_norm(x, groups, weight, bias, eps)).
    """
    if x.dim() != 4 or x.dtype not in FLOATS or x.numel() == 0 or x[0].numel() >= LIMIT:
        raise ValueError(f"x must be (B, C, H, W), not empty, below 2^30 elements a sample, in float32, "
                         f"float16 or bfloat16; not {tuple(x.shape)} in {str(x.dtype)[6:]}")
    C = x.shape[1]
    if groups < 1 or C % groups:
        raise ValueError(f"groups must divide the {C} channels, not be {groups}")
    if weight is None or bias is None:
        raise ValueError(f"weight and bias must be ({C},): torch.ones and torch.zeros for none")
    _same((C,), x.device, FLOATS, weight=weight, bias=bias)
    _need_triton(x.device)
    return _norm.Norm.apply(_common.like(x, True), _flat(weight), _flat(bias), groups, eps, silu)
