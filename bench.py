"""How fast is it here? A table, and one JSON line last.

    python bench.py kernels               # every fused kernel against PyTorch, eager and compiled
    python bench.py data                  # from the files to the network's input, stage by stage
    python bench.py train --preset tiny   # images a second, and where a step's time goes
    python bench.py train --preset paper --batch 2
    python bench.py sample --preset tiny  # images x samples a second, latency of one image
    python bench.py photos                # what sample.py does with photos and the weights in the box
    python bench.py gpu --out DIR         # all of it, and the CUDA tests, in nine minutes, into files

kernels: without CUDA it says so and measures plain PyTorch alone, on a small batch: a check that everything
runs, no figure of merit. train, sample: weights are random, for speed does not depend on them; all
variants are timed in turn, round after round, so that whatever else the machine does meets all of them;
figures are medians over the rounds. On a busy machine: --clock cpu counts this process' own processor time
(OMP_NUM_THREADS=1 makes that comparable).
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import bits
import data
import diffusion
import kernels
import train
from answers.checkpoints import SHIPPED, load_checkpoint
from answers.jobs import prepare
from answers.segment import denoise, summarise
from diffusion import kernel_options, sample
from engine import LAYOUTS, Step, complaint, host_threads, pick_device, program, update_ema

BITS, SIZE = 6, 128
MIN_SECONDS = 0.2  # of measuring, for each figure on a CPU
ONE_BY_ONE = 8  # photos at most whose label maps are timed


# ------------------------------------------------------------------------------------------------------------
# Measuring


def machine(device):
    """What the figures belong to."""
    gpu = torch.cuda.get_device_name(device) if device == "cuda" else None
    return dict(gpu=gpu, cpu=platform.processor() or platform.machine(), cores=os.cpu_count(),
                torch=torch.__version__,
                triton=getattr(kernels.triton, "__version__", None), cuda=torch.version.cuda,
                python=platform.python_version(),
                threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d %H:%M"))


def usable(name):
    """The device of that name. Raises ValueError where it, or what the kernels need on it, is not there."""
    device = pick_device(name)
    try:
        kernels.live(device)
    except RuntimeError as e:
        raise ValueError(e) from None
    return device


def clock(device, kind):
    """Seconds by the clock ("wall"), of this process' CPU time ("cpu"), which others disturb less, or "both":
    (2,)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    both = time.perf_counter(), time.process_time()
    return np.array(both) if kind == "both" else both[kind == "cpu"]


def elapsed(work, device, kind="wall"):
    start = clock(device, kind)
    work()
    return clock(device, kind) - start


def timings(work, device, seconds):
    """(N, 2) seconds a call, by both clocks, after 3 calls to warm up; N is 5 at least."""
    for _ in range(3):
        work()
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        times.append(elapsed(work, device, "both"))
    return np.array(times)


def timed(f, device):
    """Milliseconds a call: median, 20th and 80th percentile. On CUDA with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench
        return do_bench(f, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
    return np.quantile(1000 * timings(f, device, MIN_SECONDS)[:, 0], [0.5, 0.2, 0.8]).tolist()


def in_graph(f):
    """Milliseconds a call inside a CUDA graph, as training and sampling make it: without what a launch from
    Python costs, and with a warm L2 cache; nan where it cannot be captured."""
    from triton.testing import do_bench_cudagraph
    try:
        return do_bench_cudagraph(f, rep=50, return_mode="median")
    except RuntimeError as e:
        print(f"no CUDA graph: {str(e).strip().splitlines()[0]}", file=sys.stderr)
        return math.nan


def peak_mib(f, device):
    """Memory that a call needs on top of its inputs, results included; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gb_s(device):
    """Bandwidth of a plain copy of 1 GiB (64 MiB on a CPU), read and written: the ceiling of a pass that only
    moves memory."""
    x = torch.empty((1024 if device.type == "cuda" else 64) * 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / timed(lambda: y.copy_(x), device)[0] / 1e6


def table(columns):
    """Print the head of a table, {title: width}. -> a function that prints a row of cells."""
    def print_row(cells):
        print("".join(f"| {cell:<{width}}" for cell, width in zip(cells, columns.values())) + "|", flush=True)

    print_row(columns)
    print("".join("|" + "-" * (width + 1) for width in columns.values()) + "|")
    return print_row


def finish(bench, **figures):
    """The last line, for programs."""
    print(f"\n{json.dumps(dict(bench=bench, **figures))}")


# ------------------------------------------------------------------------------------------------------------
# kernels


def kernel_cases(B, dtype, device):
    """name -> (fused, plain PyTorch, whether to compile it, bytes that the fused pass must move)."""
    torch.manual_seed(0)
    codec = bits.Codec(bits=BITS)
    codec.table, codec.cell_of_code = codec.table.to(device), codec.cell_of_code.to(device)
    patches = torch.randint(0, 20, (B, SIZE // 8, SIZE // 8), device=device)
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)  # (B, S, S), about 20 segments
    cells = codec.cells(labels)
    locate = (lambda: kernels.locate(labels, 8, dtype=torch.int8, labels_below=64),
              lambda: bits.locate(labels, 8), False, labels.numel() * (8 + 8 + 1))
    return {"locate": locate, **input_cases(codec, cells, dtype), **loss_cases(codec, cells, dtype),
            **sampler_cases(cells >= 0, dtype), **norm_cases(B, dtype, device)}


def normal(shape, dtype, device):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def input_cases(codec, cells, dtype):
    B, n, item, device = len(cells), cells.numel(), dtype.itemsize, cells.device
    drawn = diffusion.draw((B, BITS), diffusion.Diffusion(), device=device, eps=False)
    alpha, sigma = drawn["alpha"], drawn["sigma"]
    # NCHW, as augmented images come
    image, keep = torch.randn(B, 3, SIZE, SIZE, device=device), torch.ones(B, device=device)
    small, seeds = cells.to(torch.int8), torch.arange(B, device=device)
    given = small, alpha.flatten(), sigma.flatten(), seeds, BITS

    def noised():
        x0 = codec.encode(cells)
        return alpha * x0 + sigma * torch.randn_like(x0)

    def plain_input():
        x = diffusion.network_input(noised(), image * keep.view(-1, 1, 1, 1))
        return x.to(dtype, memory_format=torch.channels_last)

    return {
        "noise": (lambda: kernels.noise(*given, dtype=dtype), lambda: noised().to(dtype), True,
                  n * (1 + BITS * item)),
        "noise alone (plain: randn)": (lambda: kernels.normal(seeds, BITS, SIZE, SIZE, dtype=dtype),
                                       lambda: torch.randn(B, BITS, SIZE, SIZE, dtype=dtype, device=device),
                                       False, n * BITS * item),
        "network input": (lambda: kernels.network_input(*given, image, keep, dtype=dtype), plain_input, True,
                          n * (1 + 3 * 4 + (BITS + 3) * item)),
    }


def loss_cases(codec, cells, dtype):
    B, n, item, small = len(cells), cells.numel(), dtype.itemsize, cells.to(torch.int8)
    weight, valid = torch.rand(B, device=cells.device), cells >= 0
    out = normal((B, BITS, SIZE, SIZE), dtype, cells.device)
    leaf = out.clone().requires_grad_()

    def fused(out):
        return kernels.loss(out, small, weight)

    def plain(out):
        return weight * diffusion.per_sample_error(out.float().tanh(), codec.encode(cells), valid)

    def both_ways(loss):
        return lambda: torch.autograd.grad(loss(leaf).sum(), leaf)

    return {"loss, forward": (lambda: fused(out), lambda: plain(out), True, n * (1 + BITS * item)),
            "loss, forward and backward": (both_ways(fused), both_ways(plain), True,
                                           n * (2 + 3 * BITS * item))}


def sampler_cases(valid, dtype):
    B, n, device = len(valid), valid.numel(), valid.device
    xt = normal((B, BITS, SIZE, SIZE), torch.float32, device)
    out, seeds = normal((2 * B, BITS, SIZE, SIZE), dtype, device), torch.arange(B, device=device)
    filters = diffusion.edge_aware(normal((B, 3, SIZE, SIZE), torch.float32, device), valid, 0.2)
    lines = diffusion.as_lines(filters)

    def plain(c):
        x = 2 * out[:B].float().tanh() - out[B:].float().tanh()
        after = 0.3 * xt + 0.6 * (x.clamp(-1, 1) * valid[:, None])
        return after + c * torch.randn_like(after) if c else after

    def step(c):
        return (lambda: kernels.step(out, xt, 0.5, 0.8, 0.3, 0.6, c, valid, 1.0, seeds, 1), lambda: plain(c),
                True, n * (2 * BITS * dtype.itemsize + 2 * BITS * 4 + 1))

    return {"average, once of 12 times": (lambda: kernels.average(xt, *lines, times=1),
                                          lambda: diffusion.average(filters, xt, 1), True,
                                          2 * n * (2 * BITS + 2) * 4),
            "step, guided, no noise": step(0.0), "step, guided, noise": step(0.2)}


def norm_cases(B, dtype, device):
    """Of the network's first level, with 64 channels."""
    given = (normal((B, 64, SIZE, SIZE), dtype, device), torch.ones(64, device=device),
             torch.zeros(64, device=device))
    leaves = [v.clone().requires_grad_() for v in given]

    def fused(x, weight, bias):
        return kernels.norm(x, weight, bias, 32)

    def plain(x, weight, bias):  # float32 inside, as under autocast
        return F.silu(F.group_norm(x.float(), 32, weight, bias)).to(dtype)

    def both_ways(norm):
        return lambda: torch.autograd.grad(norm(*leaves), leaves, given[0])

    moved = dtype.itemsize * given[0].numel()
    return {"norm + SiLU, forward": (lambda: fused(*given), lambda: plain(*given), True, 3 * moved),
            "norm + SiLU, both ways": (both_ways(fused), both_ways(plain), True, 8 * moved)}


def bench_kernels(args):
    device = usable("cuda" if torch.cuda.is_available() else "cpu")
    live, why = kernels.live(device)
    if live != "triton":
        print(f"the kernels need Triton: plain PyTorch alone ({why})")
    batches, dtypes = [2], [torch.float32]
    if device.type == "cuda":
        batches, dtypes = args.batch, [getattr(torch, d) for d in args.dtype]
    about, ceiling, rows = machine(device.type), copy_gb_s(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"a plain copy moves {ceiling:.0f} GB/s; {SIZE} x {SIZE}, {BITS} bits; ms: median (p20 to p80); "
          f"MiB: peak beyond the inputs\n")
    print_row = table({"kernel": 27, "dtype": 9, "batch": 6, "fused ms": 29, "eager ms": 9, "compile ms": 11,
                       "in a graph": 18, "GB/s": 5, "of copy": 8, "MiB fused / eager": 18})
    for dtype, B in itertools.product(dtypes, batches):
        for name, (kernel, plain, compiles, moved) in kernel_cases(B, dtype, device).items():
            row = dict(kernel=name, dtype=str(dtype)[6:], batch=B, bytes=moved,
                       eager=timed(plain, device), eager_mib=peak_mib(plain, device))
            fast = gb_s = of_copy = mib = compiled = graph = "-"
            if live == "triton":
                row |= dict(fused=timed(kernel, device), fused_mib=peak_mib(kernel, device))
                mid, low, high = row["fused"]
                row["gb_s"] = moved / mid / 1e6
                fast, gb_s = f"{mid:.4f} ({low:.4f}-{high:.4f})", f"{row['gb_s']:.0f}"
                if device.type == "cuda":  # a CPU's caches hold all of this
                    row["of_copy"] = row["gb_s"] / ceiling
                    of_copy = f"{row['of_copy']:.0%}"
                    mib = f"{row['fused_mib']:.0f} / {row['eager_mib']:.0f}"
                    row["fused_graph"] = in_graph(kernel)
                    graph = f"{row['fused_graph']:.4f}"
            if compiles and device.type == "cuda":
                torch._dynamo.reset()
                fastest = torch.compile(plain)
                row |= dict(compile=timed(fastest, device), compile_graph=in_graph(fastest))
                compiled = f"{row['compile'][0]:.4f}"
                graph += f" / {row['compile_graph']:.4f}"
            rows.append(row)
            print_row([name, row["dtype"], B, fast, f"{row['eager'][0]:.4f}", compiled, graph, gb_s, of_copy,
                       mib])
    finish("kernels", machine=about, copy_gb_s=ceiling, rows=rows)


# ------------------------------------------------------------------------------------------------------------
# Data


def write_scenes(root, n=16, width=640, height=480):
    """A folder of synthetic scenes as JPEG and PNG, of the size of COCO's images."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    for i in range(n):
        image, label, _ = data.Shapes("train", width).get([i])
        Image.fromarray(image[0, :height].numpy()).save(root / f"images/train/{i:03}.jpg", quality=90)
        Image.fromarray(label[0, :height].numpy().astype(np.uint8)).save(root / f"labels/train/{i:03}.png")
    return root


def reading(dataset, B, workers, seconds, pin):
    """Seconds an image of data.batches, by so many workers: by the clock, and of the processor in all
    processes."""
    spent, source, n = os.times(), data.batches(dataset, 0, B, 0, workers, pin=pin), 0
    next(source)
    start = time.perf_counter()
    while n == 0 or time.perf_counter() - start < seconds:
        next(source)
        n += B
    wall = (time.perf_counter() - start) / n
    source.close()
    return wall, (sum(os.times()[:4]) - sum(spent[:4])) / (n + B)  # the processes have ended


def stages_of(packed, B, device, seconds):
    """{stage: seconds an image, by both clocks} from the packed files to x0, of each and of all together."""
    codec, pin = bits.Codec(bits=BITS), device.type == "cuda"

    def palette(labels):
        if kernels.live(device)[0] == "torch":
            return codec.cells(labels)
        return kernels.locate(labels, codec.side, labels_below=packed.labels_below)

    def everything():
        images, labels, sizes, u = (part.to(device, non_blocking=torch.device(device).type != "mps")
                                    for part in next(source))
        x, inside, labels = data.augment(images, labels, sizes, u)
        return x, codec.encode(palette(labels))

    batch, source = next(data.batches(packed, 0, B, 0)), data.batches(packed, 0, B, 0, pin=pin)
    there = [part.to(device) for part in batch]
    labels = data.augment(*there)[2]
    cells = palette(labels)
    stages = {
        "order, random numbers": lambda: (data.order(0, B, len(packed), 0), data.uniforms(0, B, 0, 20)),
        "read": lambda: packed.get(np.arange(B)),
        "copy to the device": lambda: [part.to(device) for part in batch],
        "augment": lambda: data.augment(*there),
        "palette": lambda: palette(labels),
        "encode": lambda: codec.encode(cells),
        "all but prepare": everything,
    }
    times = {stage: (np.median(timings(work, device, seconds), 0) / B).tolist()
             for stage, work in stages.items()}
    source.close()
    return times


def bench_data(args):
    """Each stage between the files and x0, all that a training step needs together, and reading alone by
    processes; the last line is JSON."""
    torch.set_num_threads(args.threads)
    device, B = usable(args.device), args.batch
    with tempfile.TemporaryDirectory() as scratch:
        name = args.dataset or str(write_scenes(Path(scratch) / "scenes"))
        start = clock(device, "both")
        packed = data.load(name, "train", args.size, args.root, args.cache or Path(scratch) / "cache",
                           workers=1, compose=args.compose)
        prepare = ((clock(device, "both") - start) / len(packed)).tolist()
        stages = {"prepare, once (1 process)": prepare, **stages_of(packed, B, device, args.seconds)}
        rates = {n: reading(packed, B, n, 5 * args.seconds, device.type == "cuda") for n in args.workers}
    about = machine(device.type)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    count = "endless" if len(packed) >= 2**31 else len(packed)
    print(f"{args.dataset or 'scenes of 640 x 480'}: {count} images at {args.size} x {args.size}, batch {B}, "
          f"on {device}\n")
    print_row = table({"stage": 26, "us an image": 12, "images/s": 9, "CPU us an image": 16,
                       "images a CPU second": 20})
    for stage, (wall, cpu) in stages.items():
        print_row([stage, f"{wall * 1e6:.1f}", f"{1 / max(wall, 1e-9):.0f}", f"{cpu * 1e6:.1f}",
                   f"{1 / max(cpu, 1e-9):.0f}"])
    print()
    print_row = table({"processes that read": 20, "images/s": 9, "CPU us an image, all processes": 31})
    for n, (wall, cpu) in rates.items():
        print_row([n or "0 (a thread)", f"{1 / wall:.0f}", f"{cpu * 1e6:.1f}"])
    wall, cpu = stages["all but prepare"]
    finish("data", machine=about, device=str(device), dataset=args.dataset or "scenes", size=args.size,
           batch=B, reading=rates, images_per_second=1 / wall, images_per_cpu_second=1 / cpu,
           prepared_per_second=1 / prepare[0], prepared_per_cpu_second=1 / prepare[1],
           stages={stage: wall for stage, (wall, _) in stages.items()})


# ------------------------------------------------------------------------------------------------------------
# train, sample

PARTS = ("data", "forward", "backward", "optimizer")


def setting(args, *more):
    """What train.py would use, given more options: its Config and Run."""
    argv = ["--preset", args.preset, "--device", args.device, "--precision", args.precision, "--compile",
            args.compile, *more]
    argv += ["--crop", "1", "--turns", "false", "--negative", "0"]  # scenes are not changed
    c = train.parse(argv + (["--batch_size", str(args.batch)] if args.batch else []))
    c.accumulate = 1
    return c, train.build(c)


def matrix_rate(device, dtype, kind):
    """FLOP/s of a square matrix product, the best of 7."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(elapsed(lambda: a @ a, device, kind) for _ in range(7))


def where(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """GB: of the device; on the CPU of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


@dataclass
class Variant:
    """A way to train, and what was measured of it."""

    dtype: torch.dtype | None  # of autocast
    memory: torch.memory_format
    kernel_options: dict | None = None  # None: plain PyTorch
    fused_optimizer: bool = True
    compiled: bool = False
    graph: bool = False
    norm: str = "off"  # or on: GroupNorm + SiLU by the kernel
    times: list = field(default_factory=list)  # of whole steps
    parts: list = field(default_factory=list)  # of PARTS, waiting after each
    warm_up: float = 0.0
    memory_gb: float | None = None  # peak
    failed: str = ""  # why
    step: Step | None = None
    ema: torch.nn.Module | None = None
    coming: Iterator | None = None  # batches

    def start(self, c, run):
        """Make what it needs, warm up, compile, make the graph."""
        device, began, kernels.norm_mode = run.device, time.perf_counter(), self.norm
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        net = copy.deepcopy(run.net).to(memory_format=self.memory)
        optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, weight_decay=c.weight_decay,
                                      fused=self.fused_optimizer,
                                      capturable=self.fused_optimizer and device.type == "cuda")
        loss = train.loss_of(run.diffusion, run.codec, self.dtype, self.kernel_options)
        self.step = Step(net, loss, optimizer, self.dtype, 1, c.grad_clip, self.compiled, self.graph)
        self.ema = copy.deepcopy(net)
        self.coming = train.batches(c, run, 0, self.kernel_options)
        for _ in range(5 if device.type == "cuda" else 2):
            self.step(next(self.coming), c.lr)
        self.warm_up = time.perf_counter() - began

    def measure(self, c, device, kind):
        """A step with a wait after each part, and a step as training makes it."""
        step, kernels.norm_mode, marks = self.step, self.norm, [clock(device, kind)]
        batch = next(self.coming)
        marks.append(clock(device, kind))
        with step.autocast():
            value = step.loss(step.fast, batch)
        marks.append(clock(device, kind))
        step.scaler.scale(value).backward()
        marks.append(clock(device, kind))
        step.finish()
        update_ema(self.ema, step.net, len(self.times), c.ema)
        marks.append(clock(device, kind))
        self.parts.append([b - a for a, b in zip(marks, marks[1:])])

        def whole_step():
            step(batch, c.lr)
            update_ema(self.ema, step.net, len(self.times), c.ema)

        batch = next(self.coming)
        self.times.append(elapsed(whole_step, device, kind))
        self.memory_gb = peak_memory(device)

    def stop(self):
        """Give the memory back."""
        if self.coming:
            self.coming.close()
        self.step = self.ema = self.coming = None


def training_variants(dtype, memory, fast, compiled, graph, norm):
    """name -> Variant, from plain PyTorch to what train.py does; each adds something to the one before.

    norm: what it does with GroupNorm + SiLU by the kernel, too, and that before anything is compiled.
    """
    low, last = dtype or torch.bfloat16, torch.channels_last
    name = f"{str(low)[6:]} NHWC"
    found = {"plain float32 NCHW": Variant(None, torch.contiguous_format, fused_optimizer=False),
             f"plain {name}": Variant(low, last)}
    if fast:
        found[f"kernels {name}"] = Variant(low, last, fast)
    if norm:
        found["and GroupNorm"] = Variant(low, last, fast, norm="on")
    if compiled and graph:
        found["compiled, no graph"] = Variant(dtype, memory, fast, True, True)
    found["train.py"] = Variant(dtype, memory, fast, True, compiled, graph)
    if norm:
        found["train.py, GroupNorm"] = Variant(dtype, memory, fast, True, compiled, graph, norm="on")
    return found


def run_variants(variants, rounds, start, measure):
    """Time Variants side by side: what the machine does besides meets all of them. One may fail."""
    for i in range(rounds + 1):
        for v in variants:
            try:
                if not v.failed:
                    measure(v) if i else start(v)
            except RuntimeError as e:  # out of memory, or no CUDA graph
                v.failed = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
                v.stop()


def bench_train(args):
    c, run = setting(args, "--graph", args.graph)
    device = run.device
    run.train_data = data.load("shapes", "train", c.image_size * run.net.detail, seed=c.seed)
    if device.type == "cpu" and args.precision == "auto":
        print(train.settle_form(c, run))
    dtype, memory = run.dtype, LAYOUTS[run.form[1]]
    compiled, graph = train.switches(c, device, dtype, 1)
    live, why = kernels.live(device)
    if args.norm and live != "triton":
        raise ValueError(f"--norm needs Triton, but PyTorch is live here ({why}): leave it out")
    variants = training_variants(dtype, memory, kernel_options(run.codec, device), compiled, graph, args.norm)

    batch = next(train.batches(c, run, 0, None))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        train.loss_of(run.diffusion, run.codec, None, None)(run.net, {k: v[:1] for k, v in batch.items()})
    gflop, rate = 3 * counter.get_total_flops() / 1e9, matrix_rate(device, torch.bfloat16, args.clock)
    del batch
    speed = f"{gflop:.1f} GFLOP an image and step, bf16 matrix rate {rate / 1e12:.2f} TFLOP/s"
    how = f"{'compiled' if compiled else 'not compiled'}, {'one CUDA graph' if graph else 'no CUDA graph'}"
    print(f"{args.preset}: batch {c.batch_size}, {c.image_size} x {c.image_size}, on "
          f"{where(device)};\n{speed};\n"
          f"train.py: {str(dtype or torch.float32)[6:]} in {run.form[1]} ({run.why}), {how}; medians of "
          f"{args.rounds} rounds, {args.clock} clock\n")
    print_row = table({"": 24, "images/s": 9, "speed": 6, "step ms": 8, **{f"{p:>9}": 10 for p in PARTS},
                       "GFLOP/s": 8, "of rate": 8, "warm-up s": 10, "GB": 6})
    rows, slow, names = {}, None, list(variants)
    # On CUDA one after the other: each has the memory to itself, and a row is out as soon as it is known.
    for group in [[name] for name in names] if device.type == "cuda" else [names]:
        run_variants([variants[name] for name in group], args.rounds, lambda v: v.start(c, run),
                     lambda v: v.measure(c, device, args.clock))
        for name in group:
            v = variants[name]
            v.stop()
            if v.failed:
                rows[name] = dict(failed=v.failed)
                print(f"| {name:24}| {v.failed} |" + " |" * (len(PARTS) + 6), flush=True)
                continue
            t, each = statistics.median(v.times), [1e3 * statistics.median(p) for p in zip(*v.parts)]
            slow, speed = slow or t, c.batch_size / t
            rows[name] = dict(images_per_second=speed, speed=slow / t, step_ms=1e3 * t,
                              **dict(zip(PARTS, each)),
                              flops=1e9 * gflop * speed, share_of_rate=1e9 * gflop * speed / rate,
                              warm_up_s=v.warm_up, memory_gb=v.memory_gb)
            print_row([name, f"{speed:8.1f}", f"{slow / t:4.2f}x", f"{1e3 * t:7.1f}",
                       *(f"{p:9.1f}" for p in each), f"{gflop * speed:7.0f}",
                       f"{1e9 * gflop * speed / rate:7.1%}", f"{v.warm_up:9.1f}",
                       f"{v.memory_gb or math.nan:5.1f}"])
    finish("train", preset=args.preset, batch=c.batch_size, device=where(device), torch=torch.__version__,
           clock=args.clock, gflop_per_image=gflop, matrix_rate=rate, peak_memory_gb=peak_memory(device),
           variants=rows, images_per_second=rows["train.py"].get("images_per_second"))
    return 2 if all(v.failed for v in variants.values()) else 0


def bench_sample(args):
    c, run = setting(args)
    device, dtype, codec = run.device, run.dtype, run.codec
    # as sample.py has it
    net, n = run.net.to(memory_format=torch.channels_last).eval().requires_grad_(False), args.n
    shapes = data.load("shapes", "val", c.image_size, seed=c.seed, detail=net.detail)
    images, _, sizes = shapes.get(list(range(args.images)))
    x, inside = data.normalise(images.to(device), sizes.to(device), net.detail)
    which = [i for i in range(args.images) for _ in range(n)]
    jobs = {"one image, one sample": [0], f"one image, {n} samples": which[:n],
            f"{args.images} images x {n} samples": which}

    def run_job(job):
        sample(net, x[job], inside[job], codec.channels, range(len(job)), run.diffusion, codec.activate,
               args.steps, c.guidance, smooth=c.smooth, kernel_options=kernel_options(codec, device),
               dtype=dtype)

    times = [{name: elapsed(lambda: run_job(job), device, args.clock) for name, job in jobs.items()}
             for _ in range(args.rounds + 1)]
    print(f"{args.preset}: {c.image_size} x {c.image_size}, {args.steps} steps, guidance {c.guidance:g}, "
          f"smooth {c.smooth:g}, {str(dtype or torch.float32)[6:]} ({run.why}), on {where(device)}; "
          f"medians of {args.rounds} rounds, {args.clock} clock\n")
    print_row, rows = table({"": 25, "ms": 8, "samples/s": 10}), {}
    for name, job in jobs.items():
        t = statistics.median(round_[name] for round_ in times[1:])  # the first warms up
        rows[name] = dict(seconds=t, samples_per_second=len(job) / t)
        print_row([name, f"{1e3 * t:.0f}", f"{len(job) / t:.2f}"])
    finish("sample", preset=args.preset, device=where(device), torch=torch.__version__, clock=args.clock,
           steps=args.steps, guidance=c.guidance, variants=rows, peak_memory_gb=peak_memory(device),
           samples_per_second=rows[f"{args.images} images x {n} samples"]["samples_per_second"],
           latency_s=rows["one image, one sample"]["seconds"])


def bench_photos(args):
    """What sample.py does with photos of 640 x 480, files apart: to soft bits, and (of few, as they are made
    one by one) to label maps. Samples of tiles count as those of the whole."""
    device = usable(args.device)
    torch.set_num_threads(host_threads(device) or torch.get_num_threads())
    model = load_checkpoint(args.ckpt, device)
    photos = [Image.fromarray(data.Shapes("val", 640).get([i])[0][0, :480].numpy())
              for i in range(min(max(args.images), 8))]
    options = dict(steps=args.steps) if args.steps else {}
    stages = {"soft bits": None, "label maps": lambda job, photo: summarise(job, photo, model)}
    steps = args.steps or model.sampling["steps"]
    print(f"{Path(args.ckpt).name}: {model.image_size} pixels, {args.n} samples a photo, {steps} steps, on "
          f"{where(device)}; medians of {args.rounds} rounds after one, {args.clock} clock\n")
    rows, drawn = [], {}
    print_row = table({"photos": 7, "up to": 11, "seconds": 8, "photos/s": 9, "samples/s": 10})
    for count, (stage, finish_photo) in itertools.product(args.images, stages.items()):
        if finish_photo and count > ONE_BY_ONE:
            continue
        given = [photos[i % len(photos)] for i in range(count)]

        def run_photos():
            jobs = denoise((prepare(photo, model) for photo in given), model, args.n, **options)
            for job, photo in zip(jobs, given):
                if finish_photo:
                    finish_photo(job, photo)
            drawn[count] = count * sum(len(part.x_hat) for part in (job, *job.tiles))

        t = statistics.median([elapsed(run_photos, device, args.clock) for _ in range(args.rounds + 1)][1:])
        rows.append(dict(photos=count, stage=stage, seconds=t, photos_per_second=count / t,
                         samples_per_second=drawn[count] / t))
        print_row([count, stage, f"{t:.3f}", f"{count / t:.2f}", f"{drawn[count] / t:.2f}"])
    finish("photos", checkpoint=Path(args.ckpt).name, device=where(device), torch=torch.__version__,
           clock=args.clock, n=args.n, rows=rows, peak_memory_gb=peak_memory(device))


# ------------------------------------------------------------------------------------------------------------
# gpu: the first hour with a GPU, in one command


def gpu_parts(small):
    """[(name, share of the time, command)] in order; small: the same on a CPU, in little."""
    python, bench = [sys.executable], [sys.executable, Path(__file__).name]
    if small:
        files, kernel = ["cuda"], []
        training = {"train": "--preset tiny --device cpu --precision bf16 --batch 2 --rounds 1"}
        photos = "--device cpu --n 1 --images 1 --steps 1 --rounds 1"
        reading = "--device cpu --batch 2 --seconds 0.05"
    else:
        files = ["cuda", "kernels", "kernels_door", "kernels_maps", "kernels_noise", "kernels_norm", "fused"]
        kernel = "--batch 8 256 --dtype bfloat16".split()
        training = {f"train-{n}": f"--preset paper --batch {n} --rounds 5{' --norm' * (n == 64)}"
                    for n in (8, 64)}
        photos, reading = "--images 1 64 --rounds 1", "--batch 64 --seconds 1"
    tests = [*python, *"-m pytest -v --tb short -p no:cacheprovider".split()]
    tests += [f"tests/test_{name}.py" for name in files]
    tests += [] if small else ["tests/test_data_cache.py::test_augmentation_never_waits_for_the_host"]
    return [("tests", 85, tests), ("kernels", 90, [*bench, "kernels", *kernel]),
            *((name, 215 if "--norm" in options else 85, [*bench, "train", *options.split()])
              for name, options in training.items()),
            ("photos", 40, [*bench, "photos", *photos.split()]),
            ("data", 25, [*bench, "data", *reading.split()])]


def bench_gpu(args):
    """Each part is a process with a limit of its own; whatever it comes to, the next one starts."""
    out = Path(args.out)
    if not (args.small or torch.cuda.is_available()):
        raise ValueError("gpu measures a CUDA device, and there is none: --small tries every part on the CPU")
    if out.exists() and any(out.iterdir()) and not (out / "gpu.json").exists():
        raise ValueError(f"{out} holds other files: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    every, results = gpu_parts(args.small), {}
    names = [name for name, _, _ in every]
    if wrong := [name for name in args.parts or () if name not in names]:
        raise ValueError(f"--parts: '{wrong[0]}' is not one of {', '.join(names)}")
    if args.parts and (out / "gpu.json").exists():  # the others stay
        results = json.loads((out / "gpu.json").read_text())["parts"]
    parts = [part for part in every if not args.parts or part[0] in args.parts]
    whole = sum(share for _, share, _ in parts)
    for name, share, command in parts:
        start, limit = time.perf_counter(), 60 * args.minutes * share / whole
        print(f"{name}: at most {limit:.0f} s ...", end=" ", flush=True)
        ended = run_part(command, out / f"{name}.txt", limit)
        results[name] = dict(command=" ".join(["python", *command[1:]]), ended=ended,
                             seconds=round(time.perf_counter() - start, 1))
        text = (out / f"{name}.txt").read_text(errors="replace")
        try:
            results[name]["result"] = json.loads(text.strip().splitlines()[-1])
        except (ValueError, IndexError):  # it came to no last line, or has none
            pass
        print(f"{ended} after {results[name]['seconds']} s", flush=True)
        report = dict(bench="gpu", machine=machine("cpu" if args.small else "cuda"), small=args.small,
                      parts=results)
        for path, content in ((out / "gpu.json", json.dumps(report)),
                              (out / "gpu.md", as_markdown(out, report))):
            path.with_suffix(".part").write_text(content + "\n")
            os.replace(path.with_suffix(".part"), path)
    print(f"{out}/gpu.md has the tables, {out}/gpu.json all figures")
    return 0 if all(part["ended"] == "done" for part in results.values()) else 1


def run_part(command, path, limit):
    """Run a command here for at most `limit` seconds, output to path, errors beside it. -> how it ended."""
    with open(path, "w") as out, open(path.with_suffix(".err"), "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=Path(__file__).parent,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1"},
                                   start_new_session=os.name == "posix")
        try:
            status = process.wait(limit)
            return "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            return "stopped at its limit"
        finally:
            if process.poll() is None:  # its compiler's processes, too
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
                process.wait()


def as_markdown(out, report):
    """Every part's own words: its tables, or the end of what it output where it failed."""
    lines = ["# bench.py gpu", "", ", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    for name, part in report["parts"].items():
        output, errors = ((out / f"{name}.{end}").read_text(errors="replace").strip().splitlines()
                     for end in ("txt", "err"))
        output = output[:-1] if "result" in part else output
        if name == "tests" or part["ended"] != "done":
            output = [*(line for line in output if line.startswith("|")), "", "```", *output[-40:],
                      *errors[-20:], "```"]
        lines += ["", f"## {name}", "", f"`{part['command']}`: {part['ended']}, {part['seconds']} s", "",
                  *output]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_subparsers(dest="what", required=True)
    k = what.add_parser("kernels", help="every fused kernel against PyTorch")
    k.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256],
                   help="batch sizes, on CUDA (%(default)s)")
    k.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"],
                   choices=["bfloat16", "float16", "float32"], help="on CUDA (%(default)s)")
    k.set_defaults(run=bench_kernels)
    d = what.add_parser("data", help="reading, augmentation, palette")
    d.add_argument("--dataset", default="", help="as in train.py (default: synthetic scenes, made for this)")
    d.add_argument("--root", default="data", help="as in train.py")
    d.add_argument("--batch", type=int, default=8)
    d.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    d.add_argument("--threads", type=int, default=1, help="that compute on the CPU (%(default)s)")
    d.add_argument("--size", type=int, default=SIZE)
    d.add_argument("--cache", default="", help="of packed data sets (default: a temporary one)")
    d.add_argument("--compose", type=float, default=0.0, help="as in train.py")
    d.add_argument("--workers", type=int, nargs="+", default=sorted({0, 1, 2, max(1, data.CORES - 1)}),
                   help="numbers of processes that read, each tried (%(default)s)")
    d.add_argument("--seconds", type=float, default=2.0, help="for each stage; five times that for reading "
                                                                 "(%(default)s)")
    d.set_defaults(run=bench_data)
    t = what.add_parser("train", help="a training step")
    t.add_argument("--batch", type=int, help="(default: the preset's)")
    t.add_argument("--rounds", type=int, default=9)
    t.add_argument("--graph", default="auto")
    t.add_argument("--norm", action="store_true", help="two more rows: GroupNorm + SiLU by the kernel")
    t.set_defaults(run=bench_train)
    s = what.add_parser("sample", help="sampling")
    s.add_argument("--n", type=int, default=8, help="samples of an image (%(default)s)")
    s.add_argument("--images", type=int, default=4)
    s.add_argument("--steps", type=int, default=8)
    s.add_argument("--rounds", type=int, default=3)
    s.set_defaults(run=bench_sample, batch=None)
    ph = what.add_parser("photos", help="what sample.py does with photos, files apart")
    ph.add_argument("--ckpt", default=SHIPPED, help="(default: weights/photo.pt)")
    ph.add_argument("--n", type=int, default=8, help="samples of a photo (%(default)s)")
    ph.add_argument("--images", type=int, nargs="+", default=[1, 4], help="photos at once (%(default)s)")
    ph.add_argument("--steps", type=int, help="(default: the checkpoint's)")
    ph.add_argument("--rounds", type=int, default=3)
    ph.add_argument("--device", default="auto")
    ph.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    ph.set_defaults(run=bench_photos)
    g = what.add_parser("gpu", help="all that a GPU has to tell, from tests to reading, into files")
    g.add_argument("--out", required=True, help="folder for gpu.md, gpu.json and what each part printed")
    g.add_argument("--small", action="store_true",
                   help="every part in little, on the CPU: to see that all of them run")
    g.add_argument("--parts", nargs="+", help="only these of " + ", ".join(n for n, *_ in gpu_parts(False)))
    g.add_argument("--minutes", type=float, default=9,
                   help="for all of it; each part is stopped at its share (%(default)s)")
    g.set_defaults(run=bench_gpu)
    for q in (t, s):
        q.add_argument("--preset", default="tiny", choices=train.PRESETS, help="of train.py (%(default)s)")
        q.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
        q.add_argument("--precision", default="auto" if q is t else "fp32")
        q.add_argument("--compile", default="auto")
        q.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    for q in (p, *what.choices.values()):
        q.error = complaint("bench.py")
    return p.parse_args(argv)


@program("bench.py", "start it again")
def main(argv=None):
    args = arguments(argv)
    try:
        for name in ("batch", "rounds", "n", "images", "steps", "threads", "workers", "minutes"):
            value, least = getattr(args, name, None), 0 if name == "workers" else 1
            if value is not None and min(value if isinstance(value, list) else [value]) < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")
        return args.run(args) or 0
    except (ValueError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
