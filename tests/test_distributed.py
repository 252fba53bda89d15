"""Several processes share one run: same losses, same weights, one writer; when one dies, none hangs."""

import json
import os
import signal
import socket
import sys
import time
import traceback

import pytest
import torch
from PIL import Image

import sample
import train
from engine import read

pytestmark = [pytest.mark.forked,
              pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")]
OPTIONS = ("--device cpu --image_size 16 --batch_size 4 --max_steps 6 --save_every 2 --eval_every 6 "
           "--eval_images 5 --steps 1 --log_every 1 "
           "--lr 1e-3 --precision fp32").split()
SMALL = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2)


def processes(world, out, *more, before=lambda rank: None, main=None):
    """A run of train.py (or another main, with just these options) by `world` processes, with the environment
    that torchrun gives them: their numbers."""
    sys.stdout.flush()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stdout = sys.stderr = open(f"{out}.{rank}.txt", "w")
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                                  MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux"
                                  else "lo0")
                train.SIZES["tiny"] = SMALL
                before(rank)
                status = main(more) if main else train.main([*OPTIONS, "--out", str(out), *more])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return children


def ends(children, seconds=300):
    """Exit statuses (negative: killed), in order. Fails when one is still there after so many seconds."""
    left, statuses, until = dict(enumerate(children)), {}, time.time() + seconds
    while left:
        for i, child in list(left.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[i] = os.waitstatus_to_exitcode(status)
                del left[i]
        if time.time() > until:
            for child in left.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            pytest.fail(f"processes {list(left)} still ran after {seconds} s")
        time.sleep(0.01)
    return [statuses[i] for i in range(len(children))]


def losses(out):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def assert_same_run(a, b, untold=()):
    """untold: steps of b whose loss nobody could report."""
    one, two = ({line["step"]: line["loss"] for line in losses(out)} for out in (a, b))
    assert list(one) == [1, 2, 3, 4, 5, 6] and list(two) == [step for step in one if step not in untold]
    assert all(two[step] == pytest.approx(one[step], rel=1e-4) for step in two)
    one, two = read(a / "ckpt.pt"), read(b / "ckpt.pt")
    for part in ("net", "ema"):
        for k, v in one[part].items():
            torch.testing.assert_close(v, two[part][k], rtol=1e-4, atol=2e-5,
                                       msg=lambda m: f"{part} {k}: {m}")
    assert one["best"] == pytest.approx(two["best"], abs=0.02)  # validation: every image once


# Adam divides by the root of tiny second moments: rounding grows to a share of lr = 1e-3 where a gradient is
# all rounding.
@pytest.mark.parametrize("more",
                         [["--palette", "none", "--self_condition", "0.5"], ["--accumulate", "2"],
                          ["--hints", "0.8", "--workers", "2"]])
def test_two_processes_are_one(tmp_path, more):
    alone = [] if more[0] == "--accumulate" else more  # in one go, all four images at once
    assert ends(processes(1, tmp_path / "one", *alone)) == [0]
    assert ends(processes(2, tmp_path / "two", *more)) == [0, 0], (tmp_path / "two.1.txt").read_text()
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert "images/s" in (tmp_path / "two.0.txt").read_text()
    assert "images/s" not in (tmp_path / "two.1.txt").read_text()


def test_a_dead_process_ends_the_others_and_the_run_goes_on(tmp_path):
    def die(rank):
        real = train.update_ema

        def dies(*args):
            real(*args)
            if rank == 1 and args[2] == 3:  # the fourth step
                os.kill(os.getpid(), signal.SIGKILL)

        train.update_ema = dies

    first, second = ends(processes(2, tmp_path / "two", before=die))
    assert second == -signal.SIGKILL and first not in (0, None)
    assert "Traceback" in (tmp_path / "two.0.txt").read_text()  # the error is shown
    assert ends(processes(2, tmp_path / "two")) == [0, 0]
    assert "going on from step 4" in (tmp_path / "two.0.txt").read_text()
    assert ends(processes(1, tmp_path / "one")) == [0]
    assert_same_run(tmp_path / "one", tmp_path / "two", untold=(4,))


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    def interrupt(rank):
        real = train.update_ema

        def interrupts(*args):
            real(*args)
            if rank == 1 and args[2] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        train.update_ema = interrupts

    assert ends(processes(2, tmp_path / "two", before=interrupt)) == [143, 143]
    assert read(tmp_path / "two" / "ckpt.pt")["step"] in (3, 4)
    assert ends(processes(2, tmp_path / "two")) == [0, 0]


def test_all_compute_in_the_form_that_the_first_one_measured(tmp_path):
    def before(rank):
        def fastest_form(net, loss, batch, forms):
            assert rank == 0 and len(forms) == 4 and len(batch["image"]) == 2
            return ("bf16", "nhwc"), "measured"

        def settle_form(c, run):
            words = real(c, run)
            nhwc = run.net.stem.weight.is_contiguous(memory_format=torch.channels_last)
            print(rank, run.form, run.dtype, nhwc, words, flush=True)
            torch.distributed.barrier()
            os._exit(0)

        real, train.fastest_form, train.settle_form = train.settle_form, fastest_form, settle_form

    more = ["--max_steps", "100", "--precision", "auto"]
    assert ends(processes(2, tmp_path / "two", *more, before=before)) == [0, 0]
    for rank, words in enumerate(("measured", "")):
        said = (tmp_path / f"two.{rank}.txt").read_text()
        assert said == f"{rank} ('bf16', 'nhwc') torch.bfloat16 True {words}\n"


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    assert ends(processes(2, tmp_path / "two", "--batch_size", "3")) == [2, 2]
    assert "--batch_size 3 cannot be split among 2 processes" in (tmp_path / "two.0.txt").read_text()


def test_a_photo_that_fails_is_not_the_end_of_the_other_processes(tmp_path, model, monkeypatch):
    """Which torchrun ends as soon as one exits with an error: they exit together, with one list."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in (0, 2, 4):
        Image.new("RGB", (20, 20), (40 * k, 90, 0)).save(photos / f"{k}.png")
    (photos / "1.png").write_text("no picture"), (photos / "3.png").write_text("no picture")
    (tmp_path / "x.pt").write_text("weights")
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: model)
    ready, waits, write, wait = tmp_path / "ready", tmp_path / "waits", sample.write, sample.wait_for_all

    def until(file):
        end = time.time() + 60
        while not file.exists():
            assert time.time() < end
            time.sleep(0.01)

    def wait_and_say_so():
        waits.touch()
        return wait()

    monkeypatch.setattr(sample, "write", lambda *all, **more: until(ready) or write(*all, **more))
    monkeypatch.setattr(sample, "wait_for_all", wait_and_say_so)
    words = f"{photos} --n 1 --ckpt {tmp_path / 'x.pt'} --device cpu --format coco_panoptic"
    words = [*words.split(), "--out", str(tmp_path / "o")]
    first, second = processes(2, tmp_path / "log", *words, main=sample.main)
    until(waits)  # the second has nothing left to do
    time.sleep(0.2)
    assert os.waitpid(second, os.WNOHANG) == (0, 0)
    ready.touch()
    assert ends([first, second]) == [0, 2]
    listed = json.loads((tmp_path / "o/panoptic.json").read_text())
    assert [image["file_name"] for image in listed["images"]] == ["0.png", "2.png", "4.png"]
