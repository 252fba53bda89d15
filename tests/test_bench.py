"""bench.py: every table, in little, on the CPU: that all of it is there, not what it says."""

import argparse
import contextlib
import json
import sys
import timeit

import pytest
import torch
import torch.nn.functional as F

import bench
import kernels
import train


@pytest.fixture
def quick(monkeypatch):
    """A bench.main with the smallest of everything: its printed lines, the last one parsed."""
    monkeypatch.setattr(bench, "MIN_SECONDS", 0)
    monkeypatch.setattr(bench, "SIZE", 16)
    monkeypatch.setattr(kernels, "mode", "auto")
    monkeypatch.setattr(kernels, "norm_mode", "off")
    monkeypatch.setitem(train.SIZES, "tiny", dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2))
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype, kind: 1e12)
    monkeypatch.setattr(bench, "copy_gb_s", lambda device: 10.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(capsys, *arguments):
        assert bench.main(list(arguments)) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("|")], json.loads(last)

    return run


def check_kernels(table, rows, fused):
    assert len(table) == 2 + len(rows) and all(row["eager"][0] > 0 for row in rows)
    assert {"locate", "noise", "average, once of 12 times", "network input", "norm + SiLU, forward",
            "norm + SiLU, both ways"} <= {row["kernel"] for row in rows}
    assert [row["fused"][0] > 0 for row in rows if "fused" in row] == [True] * len(rows) * fused


@pytest.mark.interpreter
def test_kernels(quick, capsys, monkeypatch):
    """In Triton's interpreter; without Triton plain PyTorch alone, below."""
    monkeypatch.setattr(kernels, "mode", "triton")
    monkeypatch.setattr(bench, "SIZE", 8)  # the interpreter is slow
    monkeypatch.setattr(bench, "timed", lambda f, device: [1000 * timeit.timeit(f, number=1)] * 3)
    table, result = quick(capsys, "kernels")
    check_kernels(table, result["rows"], True)


def test_data(quick, capsys):
    table, result = quick(capsys, *"data --batch 2 --seconds 0 --device cpu --workers 0 2".split())
    assert len(table) == 2 + len(result["stages"]) + 2 + 2 and result["images_per_second"] > 0
    assert list(result["reading"]) == ["0", "2"]


def test_sample(quick, capsys):
    table, result = quick(capsys, *"sample --n 2 --images 2 --steps 1 --rounds 1 --device cpu".split())
    assert len(table) == 5 and result["samples_per_second"] > 0


PLAIN = ["plain float32 NCHW", "plain bfloat16 NHWC"]


def check_train(table, result):
    assert list(result["variants"]) == [*PLAIN, "train.py"] and len(table) == 2 + 3
    assert all(row["images_per_second"] > 0 and row["backward"] > 0 for row in result["variants"].values())
    assert result["gflop_per_image"] > 0


def test_train(quick, capsys):
    check_train(*quick(capsys, *"train --batch 2 --rounds 1 --device cpu --precision fp32".split()))


def test_train_measures_precision_and_layout_as_train_py_does(quick, capsys, monkeypatch):
    monkeypatch.setattr(train, "fastest_form", lambda *args: (("fp32", "nhwc"), "fp32 nhwc is fastest"))
    monkeypatch.setattr(train, "pick_precision", lambda *args: ("bf16", "this CPU has bf16"))
    assert bench.main("train --batch 2 --rounds 1 --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("fp32 nhwc is fastest\n") and "train.py: float32 in nhwc (measured), " in out


@pytest.mark.interpreter
def test_only_the_plain_variants_are_plain(quick, capsys, monkeypatch):
    """In Triton's interpreter: a bf16 run through the kernels beside plain float32."""
    monkeypatch.setattr(kernels, "mode", "triton")
    monkeypatch.setattr(bench, "setting", small_images(bench.setting))
    seen = []
    real = {name: getattr(train, name) for name in ("training_loss", "fused_training_loss")}
    for name in real:
        monkeypatch.setattr(train, name, lambda *a, name=name, **k: seen.append((name, k.get("dtype")))
                            or real[name](*a, **k))
    result = quick(capsys, *"train --batch 2 --rounds 1 --device cpu --precision bf16".split())[1]
    assert list(result["variants"]) == [*PLAIN, "kernels bfloat16 NHWC", "train.py"]
    assert not [row for row in result["variants"].values() if "failed" in row]
    steps = 2 + 2  # to warm up, and measured
    assert seen.count(("training_loss", None)) == 1 + 2 * steps  # and once to count
    assert seen.count(("fused_training_loss", torch.bfloat16)) == 2 * steps and len(seen) == 1 + 4 * steps


@pytest.mark.interpreter
def test_rows_with_groupnorm_by_the_kernel(quick, capsys, monkeypatch):
    """Triton is live, but its kernels are left out: in the place of norm, what it computes."""
    normed, command = [], "train --batch 2 --rounds 1 --device cpu --precision fp32 --norm".split()
    assert bench.main(command) == 2
    assert "--norm needs Triton, but PyTorch is live here (the tensors are on cpu)" in capsys.readouterr().err

    def norm(x, weight, bias, groups, eps, silu):
        normed.append(id(weight))
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if silu else y

    monkeypatch.setattr(kernels, "mode", "triton")
    monkeypatch.setattr(kernels, "norm", norm)
    monkeypatch.setattr(bench, "kernel_options", lambda *_: None)
    variants = quick(capsys, *command)[1]["variants"]
    assert list(variants) == [*PLAIN, "and GroupNorm", "train.py", "train.py, GroupNorm"]
    assert not [row for row in variants.values() if "failed" in row]
    weights = set(normed)  # of two networks, in 2 steps to warm up and 2 measured
    assert len(normed) == 4 * len(weights) and len(weights) % 2 == 0


def small_images(setting):
    """`setting` at 8 pixels, which the interpreter bears."""
    def small(args, *more):
        return setting(args, *more, "--image_size", "8")

    return small


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_can_be_measured(preset, monkeypatch):
    monkeypatch.setattr(train, "build", lambda c: c)
    args = argparse.Namespace(preset=preset, device="cpu", precision="fp32", compile="off", batch=0)
    c, same = bench.setting(args)
    assert c is same and c.preset == preset
    assert (c.crop, c.turns, c.negative, c.accumulate) == (1, False, 0, 1)


def test_a_variant_that_fails_leaves_the_others(quick, capsys, monkeypatch):
    real = bench.Variant.start

    def start(v, *rest):
        if v.dtype is None and not v.fused_optimizer:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")
        real(v, *rest)

    monkeypatch.setattr(bench.Variant, "start", start)
    table, result = quick(capsys, *"train --batch 2 --rounds 1 --device cpu --precision bf16".split())
    assert result["variants"][PLAIN[0]] == dict(failed="OutOfMemoryError: CUDA out of memory.")
    assert len(table) == 5 and result["variants"]["train.py"]["speed"] > 0


def gpu(out, minutes=9.0, small=True, parts=None):
    return bench.bench_gpu(argparse.Namespace(out=str(out), minutes=minutes, small=small, parts=parts))


def test_gpu_keeps_what_it_has_whatever_a_part_does(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    look = ("import json, pathlib, sys; "
            "print(json.dumps(list(json.loads(pathlib.Path(sys.argv[1]).read_text())['parts'])))")
    code = dict(first="print('| a table |'); print('{\"x\": 1}')",
                breaks="print('| half a table |'); raise SystemExit(3)",
                hangs="import time; print('| a row |', flush=True); time.sleep(600)", last=look)
    monkeypatch.setattr(bench, "gpu_parts",
                        lambda small: [(name, 1 if name == "hangs" else 60,
                                        [sys.executable, "-c", c, str(out / "gpu.json")])
                                                           for name, c in code.items()])
    with pytest.raises(ValueError, match="--parts: 'none' is not one of first, breaks, hangs, last"):
        gpu(out, minutes=5.0, parts=["none"])
    assert gpu(out, minutes=5.0, parts=["first"]) == 0 and gpu(out, minutes=5.0, parts=["breaks"]) == 1
    text = (out / "gpu.md").read_text()
    assert "## first" in text and "## breaks" in text and "## hangs" not in text
    assert gpu(out, minutes=5.0) == 1
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == dict(
        first="done", breaks="failed with status 3", hangs="stopped at its limit", last="done")
    assert parts["first"]["result"] == {"x": 1} and "result" not in parts["breaks"]
    assert parts["last"]["result"] == ["first", "breaks", "hangs"]  # on disk before the next one starts
    text = (out / "gpu.md").read_text()
    assert all(f"\n{row}\n" in text for row in ("| a table |", "| half a table |",
                                                "| a row |")) and '\n{"x": 1}\n' not in text


def test_gpu_measures_a_gpu_and_overwrites_no_other_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu", "--out", str(tmp_path / "a")]) == 2
    assert "there is none: --small tries every part on the CPU" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (tmp_path / "notes.txt").write_text("mine")
    assert bench.main(["gpu", "--small", "--out", str(tmp_path)]) == 2
    assert "holds other files: choose another --out" in capsys.readouterr().err


def test_gpu_small_runs_every_part(quick, tmp_path, monkeypatch):
    """Names and order as on a GPU, where training has two batch sizes. The tests are a process, as all
    parts are; the others run here."""
    names = [name for name, _, _ in bench.gpu_parts(False)]
    assert names == ["tests", "kernels", "train-8", "train-64", "photos", "data"]
    assert sum(share for _, share, _ in bench.gpu_parts(False)) <= 540
    real = bench.run_part

    def run_part(command, path, limit):
        if command[1] != "bench.py":
            return real(command, path, limit)
        with open(path, "w") as out, contextlib.redirect_stdout(out):
            status = bench.main(command[2:])
        path.with_suffix(".err").touch()
        return "done" if status == 0 else status

    monkeypatch.setattr(bench, "run_part", run_part)
    assert bench.main(["gpu", "--small", "--out", str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert list(parts) == ["tests", "kernels", "train", "photos", "data"]
    results = {name: part["result"] for name, part in parts.items() if name != "tests"}
    assert [result["bench"] for result in results.values()] == list(results)
    tables = {name: [line for line in (tmp_path / "out" / f"{name}.txt").read_text().splitlines()
                     if line.startswith("|")] for name in results}
    check_kernels(tables["kernels"], results["kernels"]["rows"], False)
    check_train(tables["train"], results["train"])
    assert len(tables["photos"]) == 4
    assert [row["stage"] for row in results["photos"]["rows"]] == ["soft bits", "label maps"]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.count("|--") > 4 and ("passed" in text or "skipped" in text)
