"""The kernels compile for GPUs that are not here, without spills, and read and write their main arrays 16
bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PIXELS, THREADS = 1024, 128  # pixels and threads of a program, as kernels/*.py have them
# The scripts use 6 bits, 128 x 128 and channels_last. `python tests/kernels_aot.py` compiles everything else.
# norm: channels and groups of the first level of `paper`, one that is no power of two, and the most.
TASKS = [["90:all:6:128", "90:norm-half:64:32", "80:norm-half:192:32", "100:norm-half:512:32"],
         ["80:half:6:128", "100:half:6:128", "90:half:10:96", "80:half:2:37"]]
KERNELS = {"noise_kernel", "loss_forward_kernel", "loss_sum_kernel", "loss_backward_kernel", "step_kernel",
           "average_kernel",
           "moments_kernel", "assign_kernel", "remap_kernel"}
NORM_KERNELS = {f"norm_{name}_kernel" for name in ("moments", "statistics", "forward", "backward")}


def bytes_a_thread(channels, item, pixels=PIXELS):
    return channels * item * pixels // THREADS


def expected(case, kernel, K):
    """Bytes (load, store) that a thread must move in accesses of at least 16, of the main arrays; None: not
    looked at."""
    item = 2 if case.startswith("bfloat16") else 4
    rows = 128 * 16 // item  # pixels of a program that holds whole pixels in registers
    wide = 16 if K > 6 and item == 2 else 0  # cells in int16
    if kernel == "noise_kernel":
        image = 12 if "detail 2" in case else 3 if "input" in case else 0
        channels = K + image + ("self" in case) * K
        if channels > 20:  # of so many channels a thread has 4 pixels
            return None, bytes_a_thread(channels, item, 512) if item == 4 else None
        load = bytes_a_thread(image, 4, rows) + wide if case.endswith(("input", "of nchw")) else None
        return load, bytes_a_thread(channels, item, rows)
    if kernel in NORM_KERNELS:  # 32 elements a thread; of up to 64 channels, weight and bias are as wide
        if kernel == "norm_statistics_kernel":
            return None, None
        weights = 64 if K <= 64 and kernel != "norm_moments_kernel" else 0
        load = (2 if kernel == "norm_backward_kernel" else 1) * 32 * item + weights
        return load, 0 if kernel == "norm_moments_kernel" or "sums" in case else 32 * item
    if kernel == "average_kernel":  # 2,048 elements a program; what is kept along rows has no even length
        return (128 if "rows" in case else 256), 64
    if kernel not in ("step_kernel", "loss_forward_kernel", "loss_backward_kernel") or K > 8:
        return None, None
    if kernel == "step_kernel":
        x_hat = ("ddpm" in case) * bytes_a_thread(K, 4)
        return bytes_a_thread(2 * K, item) + bytes_a_thread(K, 4), bytes_a_thread(K, 4) + x_hat
    if "eps" in case:  # of two arrays, one in float32, a thread has 4 pixels
        return bytes_a_thread(K, 4, 512), None
    load = bytes_a_thread(K, item, rows) + wide
    return load, bytes_a_thread(K, item, rows) if kernel == "loss_backward_kernel" else None


@pytest.fixture(scope="module")
def compiled():
    """[what kernels_aot.py says of a kernel, ...], compiled by two processes side by side."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("kernels_aot.py"))
    running = [subprocess.Popen([sys.executable, script, *tasks], env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
               for tasks in TASKS]
    results = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        results += map(json.loads, out.splitlines())
    return results


def test_every_kernel_compiles_without_spills(compiled):
    for task in sum(TASKS, []):
        arch, kind, bits, side = (int(v) if v.isdigit() else v for v in task.split(":"))
        mine = [r for r in compiled if (r["arch"], r["bits"], r["side"]) == (arch, bits, side)]
        assert {r["kernel"] for r in mine} == (NORM_KERNELS if "norm" in kind else KERNELS)
    assert not [r for r in compiled if r["stack"] or r["local"]]


def test_main_arrays_move_16_bytes_at_a_time(compiled):
    seen = set()
    for r in compiled:
        if r["side"] == 37:  # rows of odd length begin anywhere
            continue
        load, store = expected(r["case"], r["kernel"], r["bits"])
        assert load is None or r["load"] == load, r
        assert store is None or r["store"] == store, r
        seen |= {(r["arch"], r["kernel"])} if load is not None or store is not None else set()
    main = {"noise_kernel", "loss_forward_kernel", "loss_backward_kernel", "step_kernel", "average_kernel"}
    norm = NORM_KERNELS - {"norm_statistics_kernel"}
    assert seen == {(arch, kernel) for arch in (80, 90, 100) for kernel in main | norm}
