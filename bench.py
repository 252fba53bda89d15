"""Measure how fast parts of this project are on this machine.

    python bench.py data                                      # from a packed data set to the network's input
    python bench.py data --dataset path/to/folder --device cuda --batch_size 64

A table for people, and one JSON object as the last line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data as datasets
from bits import Codec


def write_scenes(root, n=16, width=640, height=480):
    """A folder of synthetic scenes as JPEG and PNG, of the size of COCO's images."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    for i in range(n):
        image, label, _ = datasets.Shapes("train", width).get([i])
        Image.fromarray(image[0, :height].numpy()).save(root / f"images/train/{i:03}.jpg", quality=90)
        Image.fromarray(label[0, :height].numpy().astype(np.uint8)).save(root / f"labels/train/{i:03}.png")
    return root


def bench_data(a):
    """Time of each stage between the files and x0, and of all that a training step needs together."""
    torch.set_num_threads(a.threads)
    device, codec, S = torch.device(a.device), Codec(), a.image_size

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(work):
        """Median seconds an image: by the clock, and of this process' CPU time, which other processes disturb less."""
        for _ in range(3):
            work()
        times, until = [], time.perf_counter() + a.seconds
        while len(times) < 5 or time.perf_counter() < until:
            wait()
            started = time.perf_counter(), time.process_time()
            work()
            wait()
            times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        return tuple(statistics.median(column) / a.batch_size for column in zip(*times))

    with tempfile.TemporaryDirectory() as scratch:
        name = a.dataset or str(write_scenes(Path(scratch) / "scenes"))
        started = time.perf_counter(), time.process_time()
        data = datasets.load(name, "train", S, a.root, Path(scratch) / "cache", workers=1)
        spent = tuple(later - earlier for later, earlier in zip((time.perf_counter(), time.process_time()), started))
        batch = next(datasets.batches(data, 0, a.batch_size, 0, workers=0))
        there = [v.to(device) for v in batch]
        labels = datasets.augment(*there)[2]
        cells = codec.cells(labels)

        def step(source=datasets.batches(data, 0, a.batch_size, 0, a.workers, pin=device.type == "cuda")):
            images, labels, sizes, u = (v.to(device, non_blocking=True) for v in next(source))
            x, inside, labels = datasets.augment(images, labels, sizes, u)
            return x, codec.encode(codec.cells(labels))

        stages = {
            "prepare, once (1 process)": tuple(s / len(data) for s in spent),
            "order, random numbers": seconds(lambda: (datasets.order(0, a.batch_size, len(data), 0), datasets.uniforms(0, a.batch_size, 0, 20))),
            "read": seconds(lambda: data.get(np.arange(a.batch_size))),
            "copy to the device": seconds(lambda: [v.to(device) for v in batch]),
            "augment": seconds(lambda: datasets.augment(*there)),
            "palette": seconds(lambda: codec.cells(labels)),
            "encode": seconds(lambda: codec.encode(cells)),
            "all but prepare": seconds(step),
        }
    print(f"{len(data)} images of {S} x {S}, batch {a.batch_size}, on {device}; {a.threads} CPU thread(s) compute, {a.workers} read ahead\n")
    print(f"{'stage':<28}{'us / image':>12}{'images / s':>14}{'CPU us / image':>18}{'images / CPU s':>16}")
    for stage, (wall, cpu) in stages.items():
        print(f"{stage:<28}{wall * 1e6:>12.1f}{1 / max(wall, 1e-9):>14,.0f}{cpu * 1e6:>18.1f}{1 / max(cpu, 1e-9):>16,.0f}")
    (wall, cpu), prepare = stages["all but prepare"], stages["prepare, once (1 process)"]
    print(json.dumps(dict(
        bench="data", device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=torch.__version__,
        dataset=a.dataset or "scenes", image_size=S, batch_size=a.batch_size, threads=a.threads, workers=a.workers,
        images_per_second=round(1 / wall, 1), images_per_cpu_second=round(1 / cpu, 1), prepare_images_per_second=round(1 / prepare[0], 1),
        prepare_images_per_cpu_second=round(1 / prepare[1], 1), stage_us={stage: round(t[0] * 1e6, 2) for stage, t in stages.items()})))
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("data", help="reading, augmentation, palette")
    command.set_defaults(run=bench_data)
    command.add_argument("--dataset", default="", help="as in train.py; default: synthetic scenes of 640 x 480, made for this")
    command.add_argument("--root", default="data")
    command.add_argument("--image_size", type=int, default=128)
    command.add_argument("--batch_size", type=int, default=8, help="the paper's, %(default)s")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--threads", type=int, default=1, help="CPU threads that compute (%(default)s)")
    command.add_argument("--workers", type=int, default=0, help="threads that read ahead (%(default)s)")
    command.add_argument("--seconds", type=float, default=3.0, help="for each stage (%(default)s)")
    a = parser.parse_args(argv)
    try:
        return a.run(a)
    except (ValueError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
