"""train.py as a user runs it: good and bad command lines, resuming, what lies in the output folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train

ROOT = Path(train.__file__).parent
QUICK = "--device cpu --max_steps 4 --batch_size 2 --image_size 16 --eval_images 3 --steps 2 --log_every 2 --save_every 2 --eval_every 4".split()


def make_folder(root, n=12, size=(24, 20)):
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 4, (size[1], size[0]), np.uint8)).save(root / "labels" / f"{i}.png")
    return root


def run(tmp_path, *more, out="run"):
    return train.main([*QUICK, "--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"), *more])


def weights(tmp_path, out):
    c = torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    return {**{f"net.{k}": v for k, v in c["net"].items()}, **{f"ema.{k}": v for k, v in c["ema"].items()}}


def test_a_run_leaves_checkpoint_log_and_picture(tmp_path, capsys):
    assert run(tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert -1 <= lines[-1]["ari"] <= 1 and 0 <= lines[-1]["iou"] <= 1
    assert Image.open(tmp_path / "run" / "samples_000004.png").size[0] > 100
    moved = [v for k, v in weights(tmp_path, "run").items() if k == "net.head.weight"][0]
    assert moved.abs().max() > 0                                                   # it starts at zero
    out = capsys.readouterr().out
    assert "4/4" in out and "min" in out and "images/s" in out


@pytest.mark.parametrize("more", [[], ["--self_condition", "0.5", "--accumulate", "2", "--dropout", "0.1"]])
def test_resuming_equals_not_stopping(tmp_path, monkeypatch, more):
    assert run(tmp_path, *more, out="whole") == 0
    update_ema, calls = train.update_ema, []

    def interrupted(*args):                                                        # Ctrl-C in the middle of the third step
        update_ema(*args)
        calls.append(1)
        if len(calls) == 3:
            import os, signal
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


@pytest.mark.parametrize("encoding, palette, prediction", [("bits", "none", "v"), ("onehot", "random", "eps"), ("rgb", "random", "x")])
def test_the_baselines_train_and_sample(tmp_path, encoding, palette, prediction):
    assert run(tmp_path, "--encoding", encoding, "--palette", palette, "--prediction", prediction, "--guidance", "1") == 0


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "cocoo"], "neither shapes, nor coco, nor a folder"),
    (["--preset", "huge"], "preset 'huge' is not one of tiny, small, paper"),
    (["--learning_rate", "1"], "unknown option '--learning_rate'"),
    (["--batchsize", "1"], "did you mean --batch_size?"),
    (["--lr", "fast"], "--lr needs a number"),
    (["--lr"], "--lr needs a value"),
    (["--augment", "maybe"], "--augment is true or false"),
    (["--bits", "5"], "bits must be 2, 4, 6, 8 or 10"),
    (["--image_size", "20"], "needs a multiple of 8"),
    (["--batch_size", "0"], "--batch_size must be at least 1"),
    (["--batch_size", "3", "--accumulate", "2"], "cannot be split"),
    (["--weighting", "snr2"], "weighting 'snr2' is not one of"),
    (["--palette", "rainbow"], "palette 'rainbow' is not one of"),
    (["--activation", "relu"], "activation 'relu' is not one of"),
    (["--device", "cuda:99"], "try --device cpu"),
    (["--dataset", "coco", "--preset", "tiny"], "panoptic_train2017.json"),
])
def test_wrong_use_gets_one_sentence(tmp_path, capsys, arguments, words):
    assert run(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


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
    assert run(tmp_path, "--bits", "6") == 2
    assert "bits 4 -> 6" in capsys.readouterr().err
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"nonsense")
    assert run(tmp_path) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_help_shows_every_option_and_the_shell_sees_the_status():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(f"    {name}: " in done.stdout for name in train.Config.__dataclass_fields__)
    done = subprocess.run([sys.executable, ROOT / "train.py", "--nonsense", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
