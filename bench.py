"""How fast is it here? A table, and one JSON line last.

    python bench.py train --preset tiny                      # images a second, and where a step's time goes
    python bench.py train --preset paper --batch 2
    python bench.py sample --preset tiny                     # images x samples a second, latency of one image

Weights are random: speed does not depend on them. All variants are timed in turn, round after round, so that whatever else the
machine does meets all of them; figures are medians over the rounds. On a busy machine: --clock cpu counts this process' own
processor time (OMP_NUM_THREADS=1 makes that comparable).
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from diffusion import sample
from engine import Step, pick_precision, update_ema

PARTS = ("data", "forward", "backward", "optimizer")


def setting(args):
    """What train.py would use: configuration, device, dtype and reason, codec, diffusion, network."""
    argv = ["--preset", args.preset, "--device", args.device, "--precision", args.precision, "--compile", args.compile]
    c = train.parse(argv + (["--batch_size", str(args.batch)] if args.batch else []))
    c.accumulate = 1
    return c, *train.build(c)


def clock(device, kind):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if kind == "cpu" else time.perf_counter()


def matrix_rate(device, dtype, kind):
    """FLOP/s of a square matrix product, the best of 7."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(7):
        start = clock(device, kind)
        a @ a
        best = max(best, 2 * n**3 / (clock(device, kind) - start))
    return best


def machine(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """GB: of the device; on the CPU of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                                            # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def bench_train(args):
    c, device, dtype, why, codec, diffusion, network, net = setting(args)
    data = train.datasets.load("shapes", "train", c.image_size, seed=c.seed)
    compiled = c.compile == "on" or c.compile == "auto" and device.type == "cuda"
    loss = train.loss_of(diffusion, codec)

    def variant(net, dtype, compiled, fused):
        net = copy.deepcopy(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=c.lr, weight_decay=c.weight_decay, fused=fused,
                                      capturable=fused and device.type == "cuda")
        return Step(net, loss, optimizer, dtype, 1, c.grad_clip, compiled, graph=compiled), copy.deepcopy(net)

    low = dtype or torch.bfloat16
    nchw, nhwc = (copy.deepcopy(net).to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    variants = {"plain fp32 NCHW": variant(nchw, None, False, False),
                f"eager {str(low)[6:]} NHWC": variant(nhwc, low, False, True),
                "train.py": variant(net, dtype, compiled, True)}
    coming = train.batches(data, 0, c, codec, diffusion, device, 0, 1)
    times, parts, warm = {k: [] for k in variants}, {k: [] for k in variants}, {}
    for name, (step, ema) in variants.items():                                     # compile, choose kernels, make the graph
        start = time.perf_counter()
        for _ in range(5 if compiled and device.type == "cuda" else 2):
            step(next(coming), c.lr)
        warm[name] = time.perf_counter() - start
    for i in range(args.rounds):
        for name, (step, ema) in variants.items():
            marks = [clock(device, args.clock)]
            batch = next(coming)
            marks.append(clock(device, args.clock))
            with step.autocast():
                value = step.loss(step.fast, batch)
            marks.append(clock(device, args.clock))
            step.scaler.scale(value).backward()
            marks.append(clock(device, args.clock))
            step.finish()
            update_ema(ema, step.net, i, c.ema)
            marks.append(clock(device, args.clock))
            parts[name].append([b - a for a, b in zip(marks, marks[1:])])
            batch, start = next(coming), clock(device, args.clock)                     # as in training: no wait within
            step(batch, c.lr)
            update_ema(ema, step.net, i, c.ema)
            times[name].append(clock(device, args.clock) - start)
    coming.close()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss(net, batch)
    flop, rate = 3 * counter.get_total_flops(), matrix_rate(device, torch.bfloat16, args.clock)
    print(f"{args.preset}: batch {c.batch_size} of {c.image_size} x {c.image_size}, {flop / c.batch_size / 1e9:.1f} GFLOP an image "
          f"and step, on {machine(device)};\nbf16 matrix rate {rate / 1e12:.2f} TFLOP/s; train.py: {str(dtype or torch.float32)[6:]} "
          f"({why}), {'compiled' if compiled else 'not compiled'}; medians of {args.rounds} rounds, {args.clock} clock\n")
    print(f"{'':20}{'images/s':>9}{'speed':>7}{'step ms':>9}" + "".join(f"{p:>11}" for p in PARTS)
          + f"{'GFLOP/s':>10}{'of rate':>9}{'warm-up s':>11}")
    rows, slow = {}, statistics.median(times["plain fp32 NCHW"])
    for name in variants:
        t, each = statistics.median(times[name]), [1e3 * statistics.median(p) for p in zip(*parts[name])]
        rows[name] = dict(images_per_second=c.batch_size / t, speed=slow / t, step_ms=1e3 * t, **dict(zip(PARTS, each)),
                          flops=flop / t, share_of_rate=flop / t / rate, warm_up_s=warm[name])
        print(f"{name:20}{c.batch_size / t:9.1f}{slow / t:6.2f}x{1e3 * t:9.1f}" + "".join(f"{v:11.1f}" for v in each)
              + f"{flop / t / 1e9:10.1f}{flop / t / rate:9.1%}{warm[name]:11.1f}")
    memory = peak_memory(device)
    print(f"\npeak memory {memory:.2f} GB" if memory else "")
    print(json.dumps(dict(bench="train", preset=args.preset, batch=c.batch_size, device=machine(device),
                          torch=torch.__version__, clock=args.clock, gflop_per_image=flop / c.batch_size / 1e9,
                          matrix_rate=rate, peak_memory_gb=memory, variants=rows,
                          images_per_second=rows["train.py"]["images_per_second"])))


def bench_sample(args):
    c, device, dtype, why, codec, diffusion, network, net = setting(args)
    net, n = net.to(memory_format=torch.channels_last).eval().requires_grad_(False), args.n      # as sample.py has it
    data = train.datasets.load("shapes", "val", c.image_size, seed=c.seed)
    images, _, sizes = data.get(list(range(args.images)))
    x, inside = train.datasets.normalise(images.to(device), sizes.to(device))
    which = [i for i in range(args.images) for _ in range(n)]
    jobs = {"one image, one sample": [0], f"one image, {n} samples": which[:n], f"{args.images} images x {n} samples": which}
    context = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    times = {k: [] for k in jobs}
    for i in range(args.rounds + 1):
        for name, job in jobs.items():
            start = clock(device, args.clock)
            with context:
                sample(net, x[job], inside[job], codec.channels, range(len(job)), diffusion, codec.activate, args.steps,
                       c.guidance)
            if i > 0:                                                              # the first round warms up
                times[name].append(clock(device, args.clock) - start)
    print(f"{args.preset}: {c.image_size} x {c.image_size}, {args.steps} steps, guidance {c.guidance:g}, "
          f"{str(dtype or torch.float32)[6:]} ({why}), on {machine(device)}; medians of {args.rounds} rounds, {args.clock} clock\n")
    rows = {}
    for name, job in jobs.items():
        t = statistics.median(times[name])
        rows[name] = dict(seconds=t, samples_per_second=len(job) / t)
        print(f"{name:24}{1e3 * t:10.0f} ms{len(job) / t:10.2f} samples/s")
    print(json.dumps(dict(bench="sample", preset=args.preset, device=machine(device), torch=torch.__version__, clock=args.clock,
                          steps=args.steps, guidance=c.guidance, variants=rows, peak_memory_gb=peak_memory(device),
                          samples_per_second=rows[f"{args.images} images x {n} samples"]["samples_per_second"],
                          latency_s=rows["one image, one sample"]["seconds"])))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    q = commands.add_parser("train", help="a training step")
    q.set_defaults(run=bench_train)
    q.add_argument("--batch", type=int, help="(default: the preset's)")
    q.add_argument("--rounds", type=int, default=9)
    r = commands.add_parser("sample", help="sampling")
    r.set_defaults(run=bench_sample, batch=None)
    r.add_argument("--n", type=int, default=8, help="samples of an image")
    r.add_argument("--images", type=int, default=4)
    r.add_argument("--steps", type=int, default=8)
    r.add_argument("--rounds", type=int, default=3)
    for q in (q, r):
        q.add_argument("--preset", default="tiny", choices=train.PRESETS)
        q.add_argument("--device", default="auto")
        q.add_argument("--precision", default="auto" if q is not r else "fp32")
        q.add_argument("--compile", default="auto")
        q.add_argument("--clock", default="wall", choices=["wall", "cpu"])

    args = p.parse_args(argv)
    try:
        args.run(args)
    except ValueError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
