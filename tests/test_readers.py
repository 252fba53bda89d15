"""Processes that make samples: the same batches, one sentence where one fails, and none that outlives its
parent."""

import contextlib
import glob
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

import train
from data import batches
from engine import read
from sources import readers
from sources.packing import Packed
from sources.readers import Unread
from sources.scenes import Mixture, Shapes

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OPTIONS = ("--device cpu --image_size 16 --batch_size 2 --eval_images 2 --steps 1 --log_every 1 "
           "--workers 2").split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", dict(width=32, mult=(1,), blocks=1, attn=1, heads=4, patch=2))


def packed(folder, n=5, size=16):
    """Photos and label maps of noise in mapped files, two maps an image."""
    rng = np.random.default_rng(0)
    rng.integers(0, 255, (n, size, size, 3), np.uint8).tofile(folder / "images.u8")
    rng.integers(0, 9, (2 * n, size, size)).astype(np.uint16).tofile(folder / "labels.u16")
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=(n, size, size, 3))
    labels = np.memmap(folder / "labels.u16", np.uint16, "r", shape=(2 * n, size, size))
    first, sizes = np.arange(0, 2 * n + 1, 2), np.full((n, 2), size)
    return Packed("noise", images, images, labels, first, sizes, [], np.arange(n), folder, 9)


def taken(data, workers, start=0, n=4, **options):
    source = batches(data, start, 20, 3, workers, **options)
    found = [next(source) for _ in range(n)]
    source.close()
    return found


def equal(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(p, q) for one, other in pairs for p, q in zip(one, other, strict=True))


def test_a_mixture_is_the_same_for_any_number_of_processes_and_after_a_resume(tmp_path):
    data = Mixture([packed(tmp_path), Shapes("train", 16)], [1, 1], compose=0.5)
    alone = taken(data, 0)
    assert [part.dtype for part in alone[0]] == [torch.uint8, torch.int64, torch.int64, torch.float32]
    for workers in (1, 2, 5):
        assert equal(taken(data, workers), alone)
    assert equal(taken(data, 2, start=40, n=2), alone[2:])
    assert not multiprocessing.active_children()


def test_spawned_processes_make_the_same(tmp_path, monkeypatch):
    """As on macOS and Windows: all that they know was pickled."""
    monkeypatch.setattr(readers, "START", "spawn")
    data = packed(tmp_path)
    assert equal(taken(data, 1), taken(data, 0))
    assert not multiprocessing.active_children()


def test_mapped_arrays_travel_as_the_place_of_their_file(tmp_path):
    image = packed(tmp_path, n=50).images
    for array in (image, image[7:30:2, ::-1, 3:], np.array(image[0]).view(np.memmap),
                  np.memmap(tmp_path / "images.u8", np.uint16, "r", 5000, (3, 100))[1:]):
        sent = bytes(ForkingPickler.dumps(array))
        assert len(sent) < 1500 and (pickle.loads(sent) == array).all()
        assert (pickle.loads(sent)._mmap is None) == (array._mmap is None)  # `Packed.let_go` finds it


@forks
def test_a_failing_process_is_one_sentence(tmp_path, monkeypatch, capsys):
    here, real = os.getpid(), Shapes.get

    def get(self, positions, draws=None):
        if os.getpid() != here:
            raise OSError("the disk\nis gone")
        return real(self, positions, draws)

    monkeypatch.setattr(Shapes, "get", get)
    assert train.main([*OPTIONS, "--max_steps", "2", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == ("train.py: a process that makes samples failed (OSError: the disk is gone): --workers 0 "
                    "shows where; mend that, and run the same command again")
    assert not multiprocessing.active_children()
    with pytest.raises(Unread, match="failed"):
        taken(Shapes("train", 16), 3)


@forks
def test_a_killed_process_is_one_sentence():
    with contextlib.closing(batches(Shapes("train", 16), 0, 20, 3, 3)) as source:
        next(source)
        os.kill(multiprocessing.active_children()[1].pid, signal.SIGKILL)
        until = time.time() + 30  # on a busy machine, a killed process ends late
        with pytest.raises(Unread, match="was killed, perhaps for lack of memory: use fewer --workers"):
            while time.time() < until:
                next(source)
    assert not multiprocessing.active_children()


def test_how_many_processes(monkeypatch, capsys):
    monkeypatch.setattr(train.datasets, "CORES", 16)
    auto, three = train.parse([]), train.parse(["--workers", "3"])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [train.readers(auto, cpu), train.readers(auto, cuda), train.readers(three, cpu)] == [0, 15, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.readers(auto, cuda) == 3  # four trainings, with three each
    assert train.main(["--workers", "many"]) == 2
    assert "--workers is auto or a number of processes, not 'many'" in capsys.readouterr().err


def alive(number):
    """Whether a process runs; one that has ended and that nobody asked after does not."""
    try:
        return open(f"/proc/{number}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_until_the_end(folder, how):
    """A run that tells its processes' numbers at its third step; with `exit`, batches that nobody closes."""
    def tell():
        pids = [str(process.pid) for process in multiprocessing.active_children()]
        (folder / "part").write_text(" ".join(pids))
        os.rename(folder / "part", folder / "pids")

    def update(*args):
        real(*args)
        if args[2] == 2:
            tell()

    real, train.update_ema = train.update_ema, update
    if how != "exit":
        return train.main([*OPTIONS, "--max_steps", "100000", "--out", str(folder / "run")])
    source = batches(Shapes("train", 16), 0, 20, 3, 2)
    next(source)
    tell()
    multiprocessing.util._exit_function()  # what the interpreter calls
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how, expected", [("KILL", -9), ("INT", 130), ("TERM", 143), ("exit", 0)])
def test_no_end_of_a_run_leaves_processes_or_memory(tmp_path, how, expected):
    """SIGKILL for the parent alone; Ctrl-C and SIGTERM for the whole group, as a terminal and torchrun send
    them."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            sys.stdout = sys.stderr = open(tmp_path / "said.txt", "w", buffering=1)
            status = run_until_the_end(tmp_path, how)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    until = time.time() + 120
    while not (tmp_path / "pids").exists():
        assert time.time() < until, (tmp_path / "said.txt").read_text()
        time.sleep(0.01)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    if how == "KILL":
        os.kill(child, signal.SIGKILL)
    elif how != "exit":
        os.killpg(child, getattr(signal, f"SIG{how}"))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == expected, (tmp_path / "said.txt").read_text()
    if how in ("INT", "TERM"):
        assert read(tmp_path / "run" / "ckpt.pt")["step"] >= 3  # the step in progress was brought to its end
    assert how == "KILL" or not any(map(alive, pids))
    while any(map(alive, pids)):
        assert time.time() < until
        time.sleep(0.01)
    assert "Traceback" not in (tmp_path / "said.txt").read_text()
    assert not glob.glob(f"/dev/shm/*{child}*")
