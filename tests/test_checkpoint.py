"""checkpoint.py: whole or not there, checked, no code run, one process a folder."""

import errno
import io
import os
import random
import signal
import zipfile

import pytest
import torch

import engine
from engine import Damaged, lock, newest, on_host, previous, read, save_checkpoint


def some(step):
    return dict(step=step, net={"w": torch.arange(100.0) + step})


def step_of(path):
    return read(path)["step"]


def test_a_file_is_an_ordinary_torch_file_and_keeps_the_one_before(tmp_path):
    path = tmp_path / "ckpt.pt"
    for step in (1, 2, 3):
        save_checkpoint(path, some(step), keep_previous=True)
    assert (step_of(path), step_of(previous(path))) == (3, 2)
    assert torch.equal(torch.load(path, weights_only=True)["net"]["w"], torch.arange(100.0) + 3)
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.prev.pt", "ckpt.pt"]


def test_a_copy_on_the_host_keeps_values_and_strides():
    x = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    content = dict(net=dict(w=x), optimizer=dict(groups=[dict(lr=x.detach().sum(), betas=(0.9, 0.5))]),
                   step=3)
    held, before = on_host(content), x.detach().clone()
    with torch.no_grad():
        x.zero_()
    w = held["net"]["w"]
    assert torch.equal(w, before) and w.stride() == x.stride() and not w.requires_grad
    assert held["step"] == 3 and held["optimizer"]["groups"][0]["betas"] == (0.9, 0.5)
    assert torch.equal(held["optimizer"]["groups"][0]["lr"], before.sum())


def test_any_altered_byte_and_any_cut_is_found(tmp_path):
    path, rng = tmp_path / "ckpt.pt", random.Random(0)
    save_checkpoint(path, some(1), keep_previous=True)
    save_checkpoint(path, some(2), keep_previous=True)
    whole = path.read_bytes()
    cases = [whole[: rng.randrange(len(whole))] for _ in range(20)] + [b"", whole[:-1], whole + b"x"]
    for at in [*range(len(whole) - 73, len(whole)), *(rng.randrange(len(whole)) for _ in range(60))]:
        cases.append(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
    for case in cases:
        path.write_bytes(case)
        # the comment's length: outside the checksum
        if case[-71:] == whole[-71:] and case[:-73] == whole[:-73]:
            continue
        with pytest.raises(Damaged, match="ckpt.pt: not a readable checkpoint"):
            read(path)
        content, used, problem = newest(path)
        assert content["step"] == 1 and used == previous(path) and "ckpt.pt: not a readable" in problem


def test_without_a_usable_one_the_reasons_are_given(tmp_path):
    path = tmp_path / "ckpt.pt"
    assert newest(path) == (None, None, "")
    with pytest.raises(ValueError, match="no such file; train one with"):
        read(path)
    save_checkpoint(path, some(1), keep_previous=True)
    save_checkpoint(path, some(2), keep_previous=True)
    path.unlink()
    content, _, problem = newest(path)
    assert content["step"] == 1 and "missing" in problem
    previous(path).write_bytes(b"short")
    with pytest.raises(ValueError, match="missing; .*ckpt.prev.pt: not a readable"):
        newest(path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    path, sign = tmp_path / "ckpt.pt", tmp_path / "it-ran"
    save_checkpoint(path, dict(step=1, net=Evil(sign)))
    with pytest.raises(ValueError, match=r"ckpt.pt: refused: it holds (posix|nt).system"):
        read(path)
    torch.save(dict(net=Evil(sign)), path)  # and without our checksum
    with pytest.raises(ValueError, match="no checksum"):
        read(path)
    assert not sign.exists()


def test_another_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "FORMAT", 1)
    save_checkpoint(tmp_path / "a.pt", some(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a.pt: its format is 1, this version reads format 2"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_anywhere_leaves_a_whole_one(tmp_path, monkeypatch, name, call):
    path, real, calls = tmp_path / "ckpt.pt", getattr(os, name), []
    save_checkpoint(path, some(1), keep_previous=True)

    def crash(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, name, crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, some(2), keep_previous=True)
    assert newest(path)[0]["step"] in (1, 2)


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, some(1), keep_previous=True)

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, some(2), keep_previous=True)
    assert step_of(path) == 1 and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_one_process_holds_a_folder_until_it_dies(tmp_path):
    first = lock(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        lock(tmp_path)
    first.close()
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock(tmp_path)
        os.write(tell, b"1")
        signal.pause()
        held.close()
    os.read(told, 1)
    with pytest.raises(ValueError, match=f"in use by process {child} on "):
        lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock(tmp_path).close()
