"""Work outlives its terminal: outputs that fail, a hang-up, signals."""

import argparse
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import experiments
import page
import sample
import train
from engine import HANGUP, Output, one_line, program
from sources.formats import notice

pytestmark = pytest.mark.usefixtures("small")
ROOT = Path(__file__).parent.parent
OPTIONS = ("--device cpu --max_steps 6 --batch_size 2 --image_size 16 --eval_images 1 --steps 1 "
           "--log_every 1 --eval_every 6").split()


class Broken:
    """A stream that raises from the given write on."""

    encoding = "utf-8"

    def __init__(self, error, after=0):
        self.error, self.left = error, after

    def write(self, text):
        self.left -= 1
        self.flush()
        return len(text)

    def flush(self):
        if self.left < 0:
            # a new one: it holds on to frames, and these to the run's lock
            raise type(self.error)(*self.error.args)


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "Broken pipe"),
          OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file.")]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("run")
    assert train.main([*OPTIONS, "--out", str(out)]) == 0
    return out / "ckpt.pt"


@pytest.mark.parametrize("error", ERRORS)
def test_an_output_takes_what_it_can(error):
    print("words", file=Output(Broken(error)), flush=True)
    whole = io.StringIO()
    print("words", 1, file=Output(whole))
    assert whole.getvalue() == "words 1\n"


def test_letters_that_an_output_lacks_are_written_otherwise():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("Übung \udcff.png", file=Output(narrow), flush=True)
    assert narrow.buffer.getvalue() == b"\\xdcbung \\udcff.png\n"


@pytest.mark.parametrize("error", ERRORS[:2])
@pytest.mark.parametrize("after", [0, 7])
def test_training_goes_on_without_its_outputs(tmp_path, monkeypatch, error, after):
    monkeypatch.setattr(sys, "stdout", Broken(error, after))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    assert train.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 6
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 7


def test_the_others_go_on_without_their_outputs(tmp_path, monkeypatch, ckpt):
    for part in ("images", "labels"):
        (tmp_path / "mine" / part / "train").mkdir(parents=True)
    for k in range(3):
        photo = np.random.default_rng(k).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(photo).save(tmp_path / f"mine/images/train/{k}.png")
        label = Image.fromarray((photo[..., 0] > 128).astype(np.uint8) + 1)
        label.save(tmp_path / f"mine/labels/train/{k}.png")
    (tmp_path / "mine/images/train/bad.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Broken(ERRORS[1]))
    monkeypatch.setattr(sys, "stderr", Broken(ERRORS[0]))
    words = ["--ckpt", str(ckpt), "--device", "cpu"]
    assert sample.main(["mine/images/train", "--n", "1", *words]) == 2  # bad.png
    assert data.main(["mine", "--split", "train", "--size", "16", "--max_bad", "0.5"]) == 0
    assert evaluation.main([*words, "--limit", "2", "--out", "e"]) == 0
    assert {p.name for p in Path("samples").iterdir()} == {"0", "1", "2"} and Path("e/report.json").exists()
    monkeypatch.undo()


PROGRAM = """
import contextlib, os, sys
sys.path.insert(0, {root!r})
from engine import program

@program("p.py", "go on")
def main(argv=None):
    with open("out.txt", "w") as f:
        for k in range(3000):
            print("line", k)
            print("more", file=sys.stderr)
        for number in (1, 2):  # a library's own words
            with contextlib.suppress(OSError):
                os.write(number, b"raw")
        f.write("mine")
    return 0

sys.exit(main())
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_program_ends_as_if_it_had_been_heard(tmp_path):
    """Also at the end, where Python flushes; and nothing that is printed gets into a file that is opened."""
    running = {}
    for k, command in enumerate(("PROGRAM <&- >&- 2>&-", "PROGRAM >&-", "PROGRAM > /dev/full 2> /dev/full",
                                 "set -o pipefail; PROGRAM 2> /dev/null | true")):
        (home := tmp_path / str(k)).mkdir()
        (home / "p.py").write_text(PROGRAM.format(root=str(ROOT)))
        words = ["bash", "-c", command.replace("PROGRAM", f"{sys.executable} p.py")]
        running[command] = subprocess.Popen(words, cwd=home), home
    for command, (process, home) in running.items():
        assert (process.wait(120), (home / "out.txt").read_text()) == (0, "mine"), command


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (HANGUP, 129)])
def test_a_signal_ends_a_program_with_a_sentence(capsys, number, status):
    before = signal.getsignal(number)

    @program("p.py", "run it again")
    def main(argv=None):
        os.kill(os.getpid(), number)
        threading.Event().wait(60)

    assert main() == status and capsys.readouterr().err == "\np.py: stopped: run it again\n"
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    update_ema = train.update_ema

    def hung_up(*args):
        update_ema(*args)
        os.kill(os.getpid(), HANGUP)

    monkeypatch.setattr(train, "update_ema", hung_up)
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        assert train.main([*OPTIONS, "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(HANGUP, before)


def test_a_closed_terminal_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    """The shell repeats the kernel's signal, and there is nothing left to print to."""
    update_ema, calls = train.update_ema, []

    def hung_up(*args):
        update_ema(*args)
        calls.append(1)
        if len(calls) == 3:
            monkeypatch.setattr(sys, "stdout", Output(Broken(ERRORS[2])))
            os.kill(os.getpid(), HANGUP)
            os.kill(os.getpid(), HANGUP)

    monkeypatch.setattr(train, "update_ema", hung_up)
    assert train.main([*OPTIONS, "--out", str(tmp_path)]) == 129
    monkeypatch.undo()
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 3
    assert train.main([*OPTIONS, "--out", str(tmp_path)]) == 0


def test_processes_that_were_forked_meanwhile_end_at_once():
    @program("p.py", "run it again")
    def main(argv=None):
        ready, here = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(here, b".")
                threading.Event().wait(60)
            finally:  # not reached: a pool's process catches what a task raises, and goes on
                os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert main() == 128 + signal.SIGTERM


@pytest.mark.parametrize("script, arguments", [
    (evaluation, ["--limit", "x"]), (data, ["mine", "--size", "x"]), (evaluation, ["--max_bad", "nan"]),
    (evaluation, ["--size", "99999999"]), (data, ["mine", "--max_bad", "-1"]),
    (evaluation, ["--n", "9" * 9])])
def test_wrong_options_end_in_one_sentence(capsys, script, arguments):
    try:
        status = script.main(arguments)
    except SystemExit as e:
        status = e.code
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and arguments[-2].lstrip("-").split("=")[0] in err


def test_of_many_notices_of_one_kind_three_are_said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(5):
            notice(f"{k}.tif", "is strange")
        notice("5.jpg", "is odd")
    line = one_line()
    told = [line(w.message, w.category, w.filename, w.lineno) for w in caught]
    assert "".join(told).splitlines() == [
        "NOTE: 0.tif: is strange", "NOTE: 1.tif: is strange",
        "NOTE: 2.tif: is strange (further ones of this kind are not named)", "NOTE: 5.jpg: is odd"]


def test_dashes_do_for_underscores_in_every_program(monkeypatch):
    add, added = argparse._ActionsContainer.add_argument, []
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument",
                        lambda parser, *names, **more: added.append(names) or add(parser, *names, **more))
    for parse, words in ((evaluation.arguments, []), (data.options, ["mine"]), (sample.options, []),
                         (page.options, []), (experiments.arguments, ["palette"])):
        parse(words)
    assert len(added) > 60
    for names in added:
        assert {name[:2] + name[2:].replace("_", "-") for name in names if name[0] == "-"} <= {*names}, names
    assert evaluation.arguments(["--clicks-to", "0.8"]).clicks_to == 0.8
    assert page.options(["--no-browser"]).no_browser


@pytest.mark.parametrize("name", ["sample", "eval", "page", "data", "train"])
def test_help_comes_before_torch(name):
    command = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "options" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pathlib" in imported
    assert not imported & {"torch", "numpy", "scipy", "PIL", "pycocotools"}
