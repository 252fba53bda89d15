"""The kernels compile for GPUs that are not here, without spills, and read and write their main arrays 16 bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
K, PIXELS, THREADS = 6, 1024, 128                # pixels and threads of a program, as kernels/*.py have them
LAYOUTS = {80: "last", 90: "all", 100: "last"}             # the scripts use channels_last; the other one on one GPU only


def bytes_a_thread(channels, item, pixels=PIXELS):
    return channels * item * pixels // THREADS


def expected(case, kernel):
    """Bytes (load, store) that a thread must move in accesses of at least 16, of the main arrays; None: not looked at."""
    item = 2 if case.startswith("bfloat16") else 4
    rows = 128 * 16 // item                      # pixels of a program that holds whole pixels in registers
    if kernel == "noise_kernel":
        image = 12 if "detail 2" in case else 3 if "input" in case else 0
        return (bytes_a_thread(image, 4, rows) if "float image" in case else None), bytes_a_thread(K + image, item, rows)
    if kernel == "decode_kernel":
        return bytes_a_thread(K, item, rows), bytes_a_thread(1, 8, rows) + ("soft" in case) * bytes_a_thread(K + 2, 4, rows)
    return {"loss_forward_kernel": (bytes_a_thread(K, item), None),
            "loss_backward_kernel": (bytes_a_thread(K, item), bytes_a_thread(K, item)),
            "step_kernel": (bytes_a_thread(2 * K, item) + bytes_a_thread(K, 4), bytes_a_thread(K, 4))}.get(kernel, (None, None))


@pytest.fixture(scope="module")
def compiled():
    """Every kernel for every architecture, compiled by two processes side by side: {arch: [result, ...]}."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("kernels_aot.py"))
    running = [subprocess.Popen([sys.executable, script, *(f"{a}:{LAYOUTS[a]}" for a in archs)], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for archs in ((90,), (80, 100))]
    results = {arch: [] for arch in LAYOUTS}
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        for line in out.splitlines():
            results[json.loads(line)["arch"]].append(json.loads(line))
    return results


@pytest.mark.parametrize("arch", LAYOUTS)
def test_every_kernel_compiles_without_spills(compiled, arch):
    assert len({(r["case"], r["kernel"]) for r in compiled[arch]}) == (49 if LAYOUTS[arch] == "all" else 27)
    assert not [r for r in compiled[arch] if r["stack"] or r["local"]]


@pytest.mark.parametrize("arch", LAYOUTS)
def test_main_arrays_move_16_bytes_at_a_time(compiled, arch):
    seen = 0
    for r in compiled[arch]:
        load, store = expected(r["case"], r["kernel"])
        assert load is None or r["load"] == load, r
        assert store is None or r["store"] == store, r
        seen += load is not None or store is not None
    assert seen == (39 if LAYOUTS[arch] == "all" else 20)
