"""train.py as a user runs it: good and bad command lines, resuming, what lies in the output folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import train
from answers.checkpoints import load_checkpoint
from engine import NoGraph, lock, read, save_checkpoint

pytestmark = pytest.mark.usefixtures("small")
ROOT = Path(train.__file__).parent
QUICK = ("--device cpu --max_steps 4 --batch_size 2 --image_size 16 --eval_images 1 --steps 1 "
         "--log_every 2 --save_every 2 --eval_every 4").split()


def make_folder(root, n=12, size=(24, 20)):
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3),
                                     np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 4, (size[1], size[0]), np.uint8)).save(root / "labels" / f"{i}.png")
    return root


def run(tmp_path, *more, out="run"):
    return train.main([*QUICK, "--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"), *more])


def weights(tmp_path, out):
    c = torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return {**{f"net.{k}": v for k, v in c["net"].items()}, **{f"ema.{k}": v for k, v in c["ema"].items()}}


def log(tmp_path, out="run"):
    return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_checkpoint_log_and_picture(tmp_path, capsys):
    assert run(tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert -1 <= lines[-1]["ari"] <= 1 and 0 <= lines[-1]["iou"] <= 1
    assert Image.open(tmp_path / "run" / "samples_000004.png").size[0] > 100
    moved = [v for k, v in weights(tmp_path, "run").items() if k == "net.head.weight"][0]
    assert moved.abs().max() > 0  # it starts at zero
    out = capsys.readouterr().out
    assert "4/4" in out and "min" in out and "images/s" in out


@pytest.mark.parametrize("more", [[], ["--self_condition", "0.5", "--accumulate", "2", "--dropout", "0.1"]])
def test_resuming_equals_not_stopping(tmp_path, monkeypatch, more):
    assert run(tmp_path, *more, out="whole") == 0
    update_ema, calls = train.update_ema, []

    def interrupted(*args):  # Ctrl-C in the middle of the third step
        update_ema(*args)
        calls.append(1)
        if len(calls) == 3:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "update_ema", interrupted)
    assert run(tmp_path, *more, out="halves") == 130
    monkeypatch.undo()
    assert torch.load(tmp_path / "halves" / "ckpt.pt", weights_only=True)["step"] == 3
    assert run(tmp_path, *more, out="halves") == 0
    whole, halves = weights(tmp_path, "whole"), weights(tmp_path, "halves")
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    run(tmp_path)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    assert run(tmp_path) == 0
    assert "complete at step 4" in capsys.readouterr().out
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_a_folder_trains(tmp_path):
    folder = make_folder(tmp_path / "mine")
    assert run(tmp_path, "--dataset", str(folder), "--preset", "tiny") == 0


@pytest.mark.parametrize("encoding, palette, prediction",
                         [("bits", "none", "v"), ("onehot", "random", "eps"), ("rgb", "random", "x")])
def test_the_baselines_train_and_sample(tmp_path, encoding, palette, prediction):
    assert run(tmp_path, "--encoding", encoding, "--palette", palette, "--prediction", prediction,
               "--guidance", "1") == 0


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "cocoo"], "neither shapes, nor coco, nor a folder"),
    (["--preset", "huge"], "preset 'huge' is not one of tiny, photo, finetune, crowded, small, paper"),
    (["--learning_rate", "1"], "unknown option '--learning_rate'"),
    (["--batchsize", "1"], "did you mean --batch_size?"),
    (["--lr", "fast"], "--lr needs a number"),
    (["--lr"], "--lr needs a value"),
    (["--augment", "maybe"], "--augment is true or false"),
    (["--bits", "5"], "bits must be 2, 4, 6, 8 or 10"),
    (["--image_size", "17"], "needs a multiple of 2"),
    (["--least", "-1"], "--least must be at least 0"),
    (["--merge", "1", "--encoding", "rgb"], "0 with --encoding rgb"),
    (["--turns", "true"], "with shapes, or with --augment false, add --turns false"),
    (["--preset", "crowded"], "add --crop 1 --turns false --negative 0"),
    (["--jitter", "-1"], "--jitter must be at least 0"), (["--batch_size", "0"], "--batch_size must be at "
                                                                                 "least 1"),
    (["--batch_size", "3", "--accumulate", "2"], "cannot be split"),
    (["--keep_every", "-1"], "--keep_every must be at least 0"),
    (["--lr", "nan"], "--lr must be at least 0, not nan"),
    (["--weight_decay", "-1"], "--weight_decay must be at least 0"),
    (["--guidance", "inf"], "--guidance must be at least 0, not inf"),
    (["--ema", "2"], "--ema must be from 0 to 0.999999"),
    (["--seed", "-1"], "--seed must be from 0 to 4194303"), (["--image_drop", "2"], "--image_drop must be "
                                                                                    "from 0 to 1"),
    (["--sampler", "dpm"], "--sampler is ddpm or ddim, not 'dpm'"),
    (["--variance", "big"], "--variance is large or small"),
    (["--device", "meta"], "none of cpu, cuda and mps"),
    (["--layout", "nwhc"], "--layout is auto or nchw or nhwc, not 'nwhc'"),
    (["--network", "large"], "network 'large' is not one of"),
    (["--compile", "yes"], "compile is auto, on or off"),
    (["--graph", "1"], "graph is auto, on or off"), (["--graph", "on"], "--graph on needs CUDA"),
    (["--weighting", "snr2"], "weighting 'snr2' is not one of"),
    (["--palette", "rainbow"], "palette 'rainbow' is not one of"),
    (["--activation", "relu"], "activation 'relu' is not one of"),
    (["--loss", "huber"], "loss 'huber' is not one of mse, bce"),
    (["--loss", "bce", "--prediction", "v"], "needs prediction x, not v"),
    (["--loss", "bce", "--encoding", "rgb", "--palette", "random"], "not of rgb out of tanh"),
    (["--loss", "bce", "--activation", "none"], "not of bits out of none"),
    (["--device", "cuda:99"], "try --device cpu"),
    (["--dataset", "coco", "--preset", "tiny"], "panoptic_train2017.json"),
])
def test_wrong_use_gets_one_sentence(tmp_path, capsys, arguments, words):
    assert run(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize("name, content", [("log.jsonl", b"my notes"), ("best.pt", b"mine")])
def test_files_of_others_stay(tmp_path, capsys, name, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(content)
    assert run(tmp_path) == 2 and f"{name} was not written by train.py" in capsys.readouterr().err
    assert (tmp_path / "run" / name).read_bytes() == content


def test_wrong_folders_get_one_sentence(tmp_path, capsys):
    def complaint(folder):
        assert run(tmp_path, "--dataset", str(folder), "--preset", "tiny") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    (tmp_path / "empty").mkdir()
    assert "has no folder images/" in complaint(tmp_path / "empty")
    folder = make_folder(tmp_path / "a")
    (folder / "labels" / "3.png").unlink()
    assert "3.png has no label" in complaint(folder)
    folder = make_folder(tmp_path / "b")
    (folder / "images" / "4.png").unlink()
    assert "4.png has no image" in complaint(folder)
    folder = make_folder(tmp_path / "c")
    Image.new("L", (7, 9)).save(folder / "labels" / "2.png")
    assert "is 7 x 9 pixels, its image" in complaint(folder)


def test_a_checkpoint_of_other_options_is_refused(tmp_path, capsys):
    run(tmp_path)
    assert run(tmp_path, "--bits", "6", "--lr", "1e-5") == 2
    err = capsys.readouterr().err
    assert "bits 4 -> 6" in err and "lr 0.002 -> 1e-05" in err and err.count("\n") == 1
    content = read(tmp_path / "run" / "ckpt.pt")
    content["config"]["colour"] = "red"
    save_checkpoint(tmp_path / "run" / "ckpt.pt", content)
    assert run(tmp_path) == 2
    assert "colour red -> (none)" in capsys.readouterr().err


def test_a_checkpoint_of_before_an_option_resumes_without_it(tmp_path, capsys):
    run(tmp_path)
    content = read(tmp_path / "run" / "ckpt.pt")
    for name in ("void", "hints", "balance", "turns", "negative", "compose", "crop", "jitter", "loss",
                 "least", "merge", "components"):
        del content["config"][name]
    save_checkpoint(tmp_path / "run" / "ckpt.pt", content)
    assert run(tmp_path) == 0
    assert run(tmp_path, "--balance", "0.5") == 2
    assert "balance 0.0 -> 0.5" in capsys.readouterr().err


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    run(tmp_path)
    before, folder = weights(tmp_path, "run"), tmp_path / "run"
    save_checkpoint(folder / "ckpt.prev.pt", {**read(folder / "ckpt.prev.pt")})
    damaged = folder / "ckpt.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    sampling = load_checkpoint(damaged)
    assert sampling.step == 4 and "using the one before" in capsys.readouterr().err
    assert run(tmp_path) == 0
    err = capsys.readouterr().err
    assert "ckpt.pt: not a readable checkpoint" in err and "going on from the one before" in err
    assert err.count("\n") == 1
    assert all(torch.equal(v, before[k]) for k, v in weights(tmp_path, "run").items())
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        (folder / name).write_bytes(b"nonsense")
    assert run(tmp_path) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_best_and_kept_checkpoints(tmp_path):
    assert run(tmp_path, "--keep_every", "3", "--eval_every", "2") == 0
    aris = {line["step"]: line["ari"] for line in log(tmp_path) if "ari" in line}
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert set(aris) == {2, 4} and best.step == max(aris, key=aris.get)
    assert read(tmp_path / "run" / "ckpt_000003.pt")["step"] == 3


def test_export_sampling_and_fine_tuning(tmp_path, capsys):
    assert run(tmp_path) == 0
    exported = tmp_path / "model.pt"
    assert train.main(["--out", str(tmp_path / "run"), "--export", str(exported)]) == 0
    ema = read(tmp_path / "run" / "ckpt.pt")["ema"]
    assert exported.stat().st_size < 0.35 * (tmp_path / "run" / "ckpt.pt").stat().st_size
    model = load_checkpoint(exported)
    assert all(torch.equal(v, ema[k].to(v.dtype)) for k, v in model.net.state_dict().items())

    folder = make_folder(tmp_path / "mine")  # other data, learning rate and length
    tuned = ["--dataset", str(folder), "--preset", "tiny", "--init", str(exported)]
    assert run(tmp_path, *tuned, "--lr", "0", "--max_steps", "1", out="tuned") == 0
    assert "from the weights of" in capsys.readouterr().out
    tuned_weights = weights(tmp_path, "tuned")
    assert all(torch.equal(v, tuned_weights[f"net.{k}"]) for k, v in ema.items())

    capsys.readouterr()
    for more, words in ((["--bits", "2"], "in_channels 7 -> 5; out_channels 4 -> 2"),
                        (["--network", "small"], "width 32 -> 64")):
        assert run(tmp_path, *tuned, *more, out="other") == 2
        err = capsys.readouterr().err
        assert words in err and "is another network" in err and err.count("\n") == 1
    assert run(tmp_path, "--init", str(tmp_path / "none.pt"), out="other") == 2
    assert "none.pt: no such file" in capsys.readouterr().err
    # where the run goes on, that file may be gone
    assert run(tmp_path, *tuned[:-1], "gone.pt", "--lr", "0", "--max_steps", "1", out="tuned") == 0
    assert "complete at step 1" in capsys.readouterr().out
    assert train.main(["--out", str(tmp_path / "nothing"), "--export", str(exported)]) == 2
    (tmp_path / "other").mkdir(exist_ok=True)
    save_checkpoint(tmp_path / "other" / "ckpt.pt", read(exported))
    assert run(tmp_path, out="other") == 2
    assert "lacks net, optimizer, scaler" in capsys.readouterr().err


def test_an_export_overwrites_nothing_but_an_export(tmp_path, capsys):
    folder, content = tmp_path / "run", dict(step=3, net={}, ema={}, optimizer={}, scaler={})
    folder.mkdir()
    for name in ("ckpt.pt", "ckpt_000003.pt"):
        save_checkpoint(folder / name, content)
    save_checkpoint(folder / "best.pt", train.portable(content))
    (folder / "photo.png").write_bytes(b"of somebody")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in (*before, "ckpt.prev.pt", "."):
        assert train.main(["--out", str(folder), "--export", str(folder / name)]) == 2
        err = capsys.readouterr().err
        assert "--export has not written: choose another name" in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):  # an export gives way to a newer one
        assert train.main(["--out", str(folder), "--export", str(folder / "model.pt")]) == 0
    assert read(folder / "model.pt").keys() == {"format", "step", "ema", "exported"}
    for other in (train.SHIPPED, tmp_path / "none" / "model.pt"):  # nor what --export has not written here
        assert train.main(["--out", str(folder), "--export", str(other)]) == 2
        assert str(other.parent) in capsys.readouterr().err


def test_accumulation_and_the_whole_batch_are_the_same(tmp_path):
    for parts in "1", "2":
        assert run(tmp_path, "--lr", "1e-4", "--precision", "fp32", "--accumulate", parts, out=parts) == 0
    torch.testing.assert_close(weights(tmp_path, "1"), weights(tmp_path, "2"), rtol=1e-4, atol=2e-5)


def broken(monkeypatch, when):
    """The training loss is nan in the steps for which when(number) is true."""
    real, calls = train.training_loss, []

    def loss(*args, **more):
        calls.append(1)
        return real(*args, **more) * (float("nan") if when(len(calls)) else 1)

    monkeypatch.setattr(train, "training_loss", loss)


def test_a_nan_step_is_skipped_and_counted(tmp_path, monkeypatch):
    broken(monkeypatch, lambda i: i == 3)
    assert run(tmp_path) == 0
    first, second = (line for line in log(tmp_path) if "loss" in line)
    assert "skipped" not in first and second["skipped"] == 1 and second["loss"] > 0
    assert all(v.isfinite().all() for v in weights(tmp_path, "run").values())


def test_twenty_nan_steps_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    broken(monkeypatch, lambda i: i > 2)
    more = ["--max_steps", "60", "--log_every", "11", "--save_every", "2"]
    assert run(tmp_path, *more) == 1
    out = capsys.readouterr().out
    assert "stopped at step 22: 20 steps in a row" in out and "Try a lower --lr" in out
    assert all(v.isfinite().all() for v in weights(tmp_path, "run").values())


def test_a_loss_spike_is_logged(tmp_path, monkeypatch, capsys):
    real, calls = train.training_loss, []

    def loss(*args, **more):
        calls.append(1)
        return real(*args, **more) * (100 if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "training_loss", loss)
    assert run(tmp_path) == 0
    (step, value), = [line for line in log(tmp_path) if "loss" in line][1]["spikes"]
    assert step == 2 and value > 50 and "spikes" in capsys.readouterr().out


@pytest.mark.parametrize("path, function", [
    ("torch", "training_loss"),
    pytest.param("triton", "fused_training_loss", marks=pytest.mark.interpreter)])
def test_out_of_memory_says_what_fits_and_that_works(tmp_path, monkeypatch, capsys, path, function):
    real = getattr(train, function)

    def loss(net, first, *args, **more):
        if len(first) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(net, first, *args, **more)

    monkeypatch.setattr(train, function, loss)
    monkeypatch.setattr(train.kernels, "mode", train.kernels.mode)  # --kernels sets it
    assert run(tmp_path, "--batch_size", "4", "--kernels", path) == 2
    err = capsys.readouterr().err
    assert "out of memory on cpu with 4 images at once; 1 would fit: add --accumulate 4" in err
    assert "Traceback" not in err
    if path == "torch":  # the interpreter is slow
        assert run(tmp_path, "--batch_size", "4", "--accumulate", "4", "--kernels", path) == 0


def test_what_ends_a_run_loses_no_step(tmp_path, monkeypatch, capsys):
    """A full device while a batch is made, or in validation: said, and saved."""
    real, calls = train.make_batch, []

    def make_batch(*a):
        calls.append(0)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*a)

    monkeypatch.setattr(train, "make_batch", make_batch)
    assert run(tmp_path, "--save_every", "100", "--eval_every", "100") == 2
    assert "train.py: CUDA out of memory" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 2

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_batch", real)
    monkeypatch.setattr("answers.segment.sample", no_memory)
    assert run(tmp_path, "--save_every", "100", "--eval_every", "2", out="other") == 2
    assert "memory does not hold one sample" in capsys.readouterr().err
    assert torch.load(tmp_path / "other" / "ckpt.pt", weights_only=True)["step"] == 2


def test_seeds_differ_in_all_that_is_drawn(tmp_path):
    """A CPU's generator takes the low 32 bits of a seed alone."""
    rows = []
    for seed in ("0", "1"):
        c = train.parse([*QUICK, "--preset", "tiny", "--seed", seed])
        of_seed = train.build(c)
        of_seed.train_data = train.datasets.load("shapes", "train", 16)
        source = train.batches(c, of_seed, 0, None)
        rows.append(next(source))
        source.close()
    assert not any(torch.equal(rows[0][k], rows[1][k]) for k in ("t", "eps"))
    assert diffusion.host_seed(2**32 - 1) == 2**32 - 1  # of small ones, what it was


def test_a_failed_compilation_gets_one_sentence(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda net: broken)
    assert run(tmp_path, "--compile", "on") == 2
    err = capsys.readouterr().err
    assert "torch.compile failed (no C++ compiler): use --compile off" in err and err.count("\n") == 1


def test_a_failed_capture_ends_with_one_sentence_and_what_was_saved(tmp_path, monkeypatch, capsys):
    def no(*args):
        raise NoGraph("no CUDA graph of a step (operation not permitted)")

    monkeypatch.setattr(train, "switches", lambda *args: (False, True))
    monkeypatch.setattr("engine.as_cuda_graph", no)
    assert run(tmp_path) == 2
    err = capsys.readouterr().err
    assert err == ("train.py: no CUDA graph of a step (operation not permitted): use --graph off and run "
                   "the same "
                   "command again\n")
    assert read(tmp_path / "run" / "ckpt.pt")["step"] == 3
    monkeypatch.undo()
    assert run(tmp_path, "--graph", "off") == 0 and run(tmp_path, out="whole") == 0
    halves = weights(tmp_path, "run")
    assert all(torch.equal(v, halves[k]) for k, v in weights(tmp_path, "whole").items())


def test_the_rate_is_that_of_the_steps_since_the_last_line(monkeypatch):
    """11 steps, of which the first took 90 seconds, the others 5."""
    said, t = {}, object.__new__(train.Training)
    t.c, t.run = train.Config(batch_size=4, max_steps=31), types.SimpleNamespace(world=1)
    t.watch, t.first, t.step, t.started, t.seen = train.Watch(), 0, 11, 1000.0, [torch.ones(2)] * 11
    monkeypatch.setattr(train.time, "time", lambda: 1095.0)
    monkeypatch.setattr(train.time, "perf_counter", lambda: 7.0)
    t.mark, t.say = (1, 2.0), lambda words, **given: said.update(given, words=words)
    t.report()
    assert said["images_per_second"] == 8 and "8 images/s  1.6 min, 0.2 left" in said["words"]
    t.step, t.seen = 12, [torch.ones(2)]  # in no time, by this clock
    t.report()
    assert said["images_per_second"] > 1000


def test_without_triton_nothing_is_compiled_and_the_run_says_so(monkeypatch):
    """As on Windows, where torch.compile would fail at the first step."""
    monkeypatch.setattr(train.kernels, "triton", None)
    monkeypatch.setattr(train.kernels, "why_not", "triton cannot be imported (no module)")
    c, cuda, said = train.Config(), torch.device("cuda"), []
    assert train.switches(c, cuda, torch.bfloat16, 1) == (False, True)
    t = object.__new__(train.Training)
    t.c, t.out, t.measured, t.say = c, "o", "", said.append
    t.run = train.build(train.parse(["--device", "cpu"]))
    t.run.device, t.run.train_data = cuda, train.datasets.load("shapes", "train", 16)
    t.update = types.SimpleNamespace(fast=t.run.net, model=t.run.net)
    t.introduce()
    assert not any("NOTE" in line for line in said)
    assert said[-1] == "not compiled, so that steps take longer: triton cannot be imported (no module)"
    t.c = train.Config(compile="off")
    t.introduce()
    assert "into o/" in said[-1]


def test_what_is_compiled_and_captured(monkeypatch):
    monkeypatch.setattr(train.kernels, "triton", "here")

    def switches(device="cuda", dtype=torch.bfloat16, world=1, **options):
        return train.switches(train.Config(**options), torch.device(device), dtype, world)

    assert switches() == (True, True) and switches("cpu") == (False, False)
    assert switches(max_steps=9_999) == (False, True) and switches(max_steps=5, compile="on") == (True, True)
    assert switches("cpu", compile="on") == (True, False)
    assert switches(compile="off") == (False, True) and switches(graph="off") == (True, False)
    assert switches(world=2) == switches(dtype=torch.float16) == (True, False)
    with pytest.raises(ValueError, match="a single process"):
        switches(world=2, graph="on")


@pytest.mark.parametrize("before, after", [("nchw", "nhwc"), ("nhwc", "nchw")])
def test_a_run_goes_on_in_the_layout_of_another_device(tmp_path, before, after):
    """As from a GPU to a CPU and back: the layout differs, and AdamW's moments come with the file."""
    more = ["--precision", "fp32", "--decay_steps", "1", "--layout"]
    assert run(tmp_path, *more, before, out="stays") == 0
    assert run(tmp_path, *more, before, "--max_steps", "2", out="moves") == 0
    assert run(tmp_path, *more, after, out="moves") == 0
    assert read(tmp_path / "moves" / "ckpt.pt")["form"] == ("fp32", after)
    stays, moves = weights(tmp_path, "stays"), weights(tmp_path, "moves")
    for k in stays:  # paired wrongly, they are 0.002 apart and more
        torch.testing.assert_close(moves[k], stays[k], rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_where_the_loss_is_scaled_and_back(tmp_path, monkeypatch):
    """As from a GPU with bf16 to one without: --precision auto is another there."""
    now = []
    monkeypatch.setattr(train, "pick_precision", lambda name, device: (now[-1], "this GPU's"))
    monkeypatch.setattr(train, "settle_form", lambda c, run: "")
    for steps, precision in (1, "fp32"), (2, "fp16"), (3, "bf16"):
        now.append(precision)
        assert run(tmp_path, "--max_steps", str(steps), "--eval_images", "1", "--steps", "1") == 0
        content = read(tmp_path / "run" / "ckpt.pt")
        assert content["step"] == steps and bool(content["scaler"]) == (precision == "fp16")


def test_the_checkpoint_that_a_run_goes_on_from_is_let_go(tmp_path, monkeypatch):
    """It would be another copy of all weights, as long as the run takes."""
    assert run(tmp_path, "--max_steps", "1", "--eval_images", "1", "--steps", "1") == 0
    real, seen = train.newest, []

    def newest(path):
        content, *rest = real(path)
        seen.extend(weakref.ref(content[part]["stem.weight"]) for part in ("net", "ema"))
        return content, *rest

    def take_step(t, batch):
        assert len(seen) == 2 and not any(kept() is not None for kept in seen)
        assert t.step == 1 and t.run.origin == "going on from step 1"
        return "enough"

    monkeypatch.setattr(train, "newest", newest)
    monkeypatch.setattr(train.Training, "take_step", take_step)
    assert run(tmp_path, "--max_steps", "2", "--eval_images", "1", "--steps", "1") == 2


def three_steps(tmp_path, monkeypatch, *more, out):
    """A run of 100 steps that Ctrl-C stops after three more: its weights."""
    with monkeypatch.context() as patch:
        real, calls = train.update_ema, []

        def update_ema(*args):
            real(*args)
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(train, "update_ema", update_ema)
        assert run(tmp_path, "--max_steps", "100", "--eval_every", "100", "--dropout", "0.1", *more,
                   out=out) == 130
    return weights(tmp_path, out)


def unmeasured(*args, **more):
    raise AssertionError("this run has nothing to measure")


@pytest.mark.parametrize("precision, layout", [("bf16", "nhwc"), ("fp32", "nhwc"), ("fp32", "nchw")])
def test_a_measured_form_is_kept_and_gives_the_same_bits(tmp_path, monkeypatch, capsys, precision, layout):
    real, halves = train.fastest_form, ("--accumulate", "2")

    def fastest_form(net, loss, batch, forms):
        assert forms[0] == ("bf16", "nchw") and len(forms) == 4 and len(batch["image"]) == 1
        return (precision, layout), real(net, loss, batch, forms, seconds=0.0)[1]

    monkeypatch.setattr("engine.cpu_has", lambda name: True)
    monkeypatch.setattr(train, "fastest_form", fastest_form)
    three_steps(tmp_path, monkeypatch, *halves, out="measured")
    out = capsys.readouterr().out
    name = "bfloat16" if precision == "bf16" else "float32"
    assert "precision and layout: " in out and f"{name} in {layout} (measured)" in out
    monkeypatch.setattr(train, "fastest_form", unmeasured)
    monkeypatch.setattr("engine.cpu_has", lambda name: False)  # on another machine
    measured = three_steps(tmp_path, monkeypatch, *halves, out="measured")
    out = capsys.readouterr().out
    assert "precision and layout" not in out and f"{name} in {layout} (" in out
    assert read(tmp_path / "measured" / "ckpt.pt")["form"] == (precision, layout)
    asked = [*halves, "--precision", precision, "--layout", layout]
    three_steps(tmp_path, monkeypatch, *asked, out="asked")
    plain = three_steps(tmp_path, monkeypatch, *asked, out="asked")
    assert all(torch.equal(v, plain[k]) for k, v in measured.items())
    losses = [[line["loss"] for line in log(tmp_path, out)] for out in ("measured", "asked")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_checkpoint_that_names_no_form_goes_on_as_before(tmp_path, monkeypatch, capsys):
    """As versions wrote it that asked the processor's flags alone."""
    monkeypatch.setattr("engine.cpu_has", lambda name: False)
    three_steps(tmp_path, monkeypatch, "--precision", "fp32", "--layout", "nchw", out="asked")
    plain = three_steps(tmp_path, monkeypatch, "--precision", "fp32", "--layout", "nchw", out="asked")
    monkeypatch.setattr(train, "fastest_form", lambda *args: (("fp32", "nchw"), "measured"))
    three_steps(tmp_path, monkeypatch, out="old")
    content = read(tmp_path / "old" / "ckpt.pt")
    del content["form"], content["config"]["layout"]
    save_checkpoint(tmp_path / "old" / "ckpt.pt", content)
    monkeypatch.setattr(train, "fastest_form", unmeasured)
    old = three_steps(tmp_path, monkeypatch, out="old")
    assert all(torch.equal(v, plain[k]) for k, v in old.items())
    for form in (("fp4", "nchw"), ("fp32", "nc16hw"), ("fp32",)):  # of a later version
        save_checkpoint(tmp_path / "old" / "ckpt.pt", {**content, "form": form})
        assert run(tmp_path, "--max_steps", "100", "--eval_every", "100", "--dropout", "0.1", out="old") == 2
        assert "this version has no precision and layout" in capsys.readouterr().err


def test_what_is_asked_for_is_not_measured(monkeypatch):
    def measured(*options):
        c, asked = train.parse(["--device", "cpu", "--image_size", "16", *options]), []
        run = train.build(c)
        run.train_data = train.datasets.load("shapes", "train", 16)

        def fastest_form(net, loss, batch, forms):
            asked.extend(forms)
            return forms[-1], "words"

        monkeypatch.setattr(train, "fastest_form", fastest_form)
        words = train.settle_form(c, run)
        assert words == "words" * bool(asked) and run.form == (asked[-1] if asked else train.build(c).form)
        nhwc = run.net.stem.weight.is_contiguous(memory_format=torch.channels_last)
        assert run.form[1] == ("nhwc" if nhwc else "nchw") and run.dtype == train.PRECISIONS[run.form[0]]
        return asked

    assert len(measured()) == 4 and measured("--max_steps", "99") == measured("--compile", "on") == []
    assert measured("--precision", "fp32", "--layout", "nhwc") == []
    assert measured("--precision", "bf16") == [("bf16", "nchw"), ("bf16", "nhwc")]
    assert {precision for precision, _ in measured("--layout", "nhwc")} == {"fp32", "bf16"}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The first write waits for two more steps, the second for the first. Each holds its own step."""
    real, real_ema, done, writing, late = train.save_checkpoint, train.update_ema, [], [], threading.Event()

    def save_checkpoint(path, content, **more):
        writing.append(path)
        assert len(writing) == 1  # one at a time
        if content["step"] == 2 and not late.wait(60):
            raise AssertionError("training waited for the file")
        real(path, content, **more)
        writing.remove(path)

    def update_ema(*args):
        real_ema(*args)
        done.append(1)
        if len(done) == 4:
            late.set()

    assert run(tmp_path, "--keep_every", "2", "--eval_every", "6", "--max_steps", "6", "--save_every", "3",
               out="plain") == 0
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train, "update_ema", update_ema)
    assert run(tmp_path, "--keep_every", "2", "--eval_every", "6", "--max_steps", "6", "--save_every",
               "5") == 0
    plain, beside = (read(tmp_path / out / "ckpt_000002.pt") for out in ("plain", "run"))
    assert beside["step"] == 2 and all(torch.equal(v, plain["net"][k]) for k, v in beside["net"].items())
    last = weights(tmp_path, "run")
    assert all(torch.equal(v, last[k]) for k, v in weights(tmp_path, "plain").items())


def test_a_full_disk_warns_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def full(fd):
        calls.append(1)
        if len(calls) > 2:  # the first checkpoint: file and folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path) == 1  # it is not saved, and says so
    assert "ckpt.pt is not written (No space left on device)" in capsys.readouterr().err
    assert read(tmp_path / "run" / "ckpt.pt")["step"] == 2
    monkeypatch.undo()
    assert run(tmp_path) == 0 and read(tmp_path / "run" / "ckpt.pt")["step"] == 4


def test_a_full_disk_is_tried_again_for_the_best_weights(tmp_path, monkeypatch):
    values, real, full = iter([0.5, 0.2]), os.fsync, [False]
    monkeypatch.setattr(train, "validate", lambda *args: (next(values), 0.0, Image.new("RGB", (8, 8))))

    def fsync(fd):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd)

    store = train.Training.store

    def stored(t, name, *more, **options):
        full[0] = name == "best.pt" and t.step == 2
        store(t, name, *more, **options)
        t.is_stored()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(train.Training, "store", stored)
    assert run(tmp_path, "--eval_every", "2") == 0
    best, last = (read(tmp_path / "run" / name) for name in ("best.pt", "ckpt.pt"))
    assert best["step"] == 4 and last["best"] == 0.2


def test_the_best_of_other_images_does_not_count(tmp_path, monkeypatch):
    values = iter([0.5, 0.2])
    monkeypatch.setattr(train, "validate", lambda *args: (next(values), 0.0, Image.new("RGB", (8, 8))))
    assert run(tmp_path) == 0 and run(tmp_path, "--max_steps", "8", "--eval_images", "2") == 0
    assert read(tmp_path / "run" / "best.pt")["step"] == 8


def test_what_a_run_without_a_checkpoint_left_gets_another_name(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(tmp_path) == 0
    for k in (1, 2):
        old = [(folder / name).read_bytes() for name in ("best.pt", "log.jsonl")]
        for path in folder.glob("ckpt*"):
            path.unlink()
        assert not (folder / f"best.{k}.pt").exists()
        assert run(tmp_path) == 0 and "best.pt of an earlier run is now" in capsys.readouterr().out
        assert old == [(folder / name).read_bytes() for name in (f"best.{k}.pt", f"log.{k}.jsonl")]


def test_weights_of_another_meaning_are_no_start(tmp_path, capsys):
    assert run(tmp_path, out="a") == 0
    for k, more in enumerate((("--prediction", "v"), ("--palette", "different"), ("--palette", "random"))):
        assert run(tmp_path, "--init", str(tmp_path / "a/ckpt.pt"), *more, out=str(k)) == 2
        assert f"({more[0][2:]} " in capsys.readouterr().err
    assert run(tmp_path, "--palette", "random", out="b") == 0
    more = ("--palette", "random", "--seed", "1", "--init", str(tmp_path / "b/ckpt.pt"))
    assert run(tmp_path, *more, out="c") == 2
    assert "means something else by its outputs (seed 0 -> 1)" in capsys.readouterr().err


def test_more_segments_than_codes_are_said(tmp_path, capsys):
    folder = make_folder(tmp_path / "d")
    for path in (folder / "labels").iterdir():
        Image.fromarray(np.arange(20 * 24, dtype=np.uint8).reshape(20, 24) // 9 % 5).save(path)
    for bits, told in ((2, True), (4, False)):
        more = ("--preset", "tiny", "--dataset", str(folder), "--bits", str(bits))
        assert run(tmp_path, *more, out=str(bits)) == 0
        assert ("up to 5 segments, but there are 4 codes" in capsys.readouterr().out) == told


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_whatever_ends_a_run_what_was_learnt_is_saved(tmp_path, monkeypatch, capsys, error):
    real, calls = train.make_batch, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args)

    monkeypatch.setattr(train, "make_batch", broken)
    if isinstance(error, MemoryError):
        assert run(tmp_path, "--save_every", "100") == 2
        assert "add --accumulate" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match="Too many open files"):
            run(tmp_path, "--save_every", "100")
    assert read(tmp_path / "run" / "ckpt.pt")["step"] == 2


def test_a_signal_during_validation_stops_it_and_it_is_made_up_for(tmp_path, monkeypatch):
    real, calls = train.scores, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    assert run(tmp_path, out="whole") == 0
    monkeypatch.setattr(train, "scores", interrupted)
    assert run(tmp_path, "--eval_images", "3") == 143
    assert len(calls) == 2 and not any("ari" in line for line in log(tmp_path))
    assert run(tmp_path) == 0
    assert [line["step"] for line in log(tmp_path) if "ari" in line] == [4]
    whole, made_up = weights(tmp_path, "whole"), weights(tmp_path, "run")
    assert all(torch.equal(whole[k], made_up[k]) for k in whole)


def test_validation_sees_images_of_all_names(tmp_path, monkeypatch):
    folder, real, seen = make_folder(tmp_path / "mine", n=60), train.packed_job, []
    monkeypatch.setattr(train, "packed_job", lambda data, i, *more: seen.append(i) or real(data, i, *more))
    c = train.parse([*QUICK, "--dataset", str(folder), "--preset", "tiny", "--eval_images", "2"])
    run = train.build(c)
    run.val_data = train.datasets.load(c.dataset, "val", 16, cache=tmp_path / "cache")
    train.validate(run.net.eval(), run, c, [])
    n = len(run.val_data)
    assert n > 2 and sorted(set(seen)) == sorted(np.random.default_rng(0).permutation(n)[:2]) != [0, 1]


def test_validation_scores_answers_as_sample_and_eval_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr("answers.tree.log_odds", lambda features, net: np.zeros(len(features)))
    assert run(tmp_path, "--least", "3", "--merge", "99") == 0  # everything joins: one segment, ARI 0
    assert log(tmp_path)[-1]["ari"] == 0
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt").tidy == dict(least=3, merge=99.0)
    assert run(tmp_path, out="rough") == 0 and log(tmp_path, "rough")[-1]["ari"] != 0
    assert load_checkpoint(tmp_path / "rough" / "ckpt.pt").tidy == dict(least=0, merge=0.0)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    held = lock(tmp_path / "run")
    assert run(tmp_path) == 2
    err = capsys.readouterr().err
    assert f"in use by process {os.getpid()}" in err and err.count("\n") == 1
    held.close()
    assert run(tmp_path) == 0


def test_presets_name_real_options_and_networks():
    for name, row in train.PRESETS.items():
        c = train.parse(["--preset", name, "--dataset", "coco"])
        assert all(getattr(c, key) == value for key, value in row.items()) and c.network in train.SIZES
        assert not [key for key, value in row.items() if value == getattr(train.Config, key)]
    slow, fast = (train.parse(["--preset", name]) for name in ("paper", "paper-fast"))
    assert slow.batch_size * slow.max_steps == fast.batch_size * fast.max_steps
    assert fast.ema == pytest.approx(slow.ema ** (fast.batch_size / slow.batch_size), abs=1e-4)


def test_help_shows_every_option_and_the_shell_sees_the_status():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    helped, unread, wrong = (subprocess.Popen([sys.executable, ROOT / "train.py", *words], **pipes)
                             for words in (["--help"], ["--help"], ["--nonsense", "1"]))  # side by side
    unread.stdout.close()  # as head does, once it has its lines
    shown, said = helped.communicate()[0], wrong.communicate()[1]
    assert helped.returncode == unread.wait(60) == 0 and unread.stderr.read() == ""
    assert all(f'    "{name}": ' in shown for name in train.PRESETS)
    assert not any(line.startswith(("def ", "import ", "RIM")) for line in shown.splitlines())  # nothing else
    assert all(f"    {name}: " in shown for name in train.Config.__dataclass_fields__)
    assert wrong.returncode == 2 and "unknown option '--nonsense'" in said and "Traceback" not in said
