"""What only a CUDA device can show: train.py with its graph, without waits, on a device that is not the
first.

Skipped without one. With test_kernels*.py and test_fused.py, which run on the GPU where there is one, this is
the first part of `python bench.py gpu`.
"""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffusion
import engine
import eval as evaluation
import sample
import train
from answers import segment
from answers.checkpoints import SHIPPED, load_checkpoint
from answers.jobs import prepare
from answers.segment import denoise
from data import batches
from diffusion import sample as sample_
from engine import NoGraph, Step, as_cuda_graph, read
from sources.scenes import Shapes

ROOT = Path(train.__file__).parent
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(),
                                                   reason="needs a CUDA device")]
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SMALL = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2)
QUICK = ("--image_size 16 --batch_size 4 --max_steps 6 --eval_images 2 --steps 2 --log_every 2 --save_every "
         "2 "
         "--eval_every 6").split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", SMALL)
    stream = torch.cuda.current_stream()
    yield
    torch.cuda.set_device(0)
    torch.cuda.set_stream(stream)


def run(out, *more):
    return train.main([*QUICK, "--compile", "off", "--out", str(out), *more])


def weights(out):
    return {k: v.cpu() for k, v in read(out / "ckpt.pt")["net"].items()}


def close(a, b, atol=2e-4):
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=atol, msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("more", [[], ["--dropout", "0.1"], ["--accumulate", "2", "--self_condition", "0.5"],
                                  ["--palette", "none"],
                                  ["--kernels", "torch"], ["--encoding", "rgb"]])
def test_a_graph_changes_nothing(tmp_path, monkeypatch, more):
    made, real = [], engine.as_cuda_graph
    monkeypatch.setattr(engine, "as_cuda_graph", lambda *a: made.append(1) or real(*a))
    for graph in "on", "off":
        assert run(tmp_path / graph, "--graph", graph, "--precision", "fp32", *more) == 0
    assert made == [1]
    close(weights(tmp_path / "on"), weights(tmp_path / "off"))


def test_the_weights_in_the_box_start_a_run_of_more_bits_and_hints(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", train.SIZES["photo"])
    assert run(tmp_path / "run", "--init", str(SHIPPED), *"--image_size 32 --bits 8 --hints 0.5".split(),
               *"--loss bce --balance 0.5".split()) == 0


def test_compiled_with_a_graph_learns_as_eager_without(tmp_path):
    assert run(tmp_path / "eager", "--graph", "off", "--precision", "fp32") == 0
    assert train.main([*QUICK, "--precision", "fp32", "--compile", "on", "--graph", "on", "--out",
                       str(tmp_path / "fast")]) == 0
    close(weights(tmp_path / "eager"), weights(tmp_path / "fast"), atol=2e-3)


@pytest.mark.parametrize("more", [["--compile", "off"], ["--compile", "on", "--graph", "on"]])
def test_groupnorm_by_the_kernel_learns_the_same(tmp_path, monkeypatch, capsys, more):
    for mode in "off", "on":
        monkeypatch.setattr(train.kernels, "norm_mode", mode)
        assert train.main([*QUICK, *more, "--precision", "fp32", "--out", str(tmp_path / mode)]) == 0
        assert f"GroupNorm: {'triton' if mode == 'on' else 'torch'}" in capsys.readouterr().out
    close(weights(tmp_path / "on"), weights(tmp_path / "off"), atol=2e-3)


def test_groupnorm_by_the_kernel_samples_the_same(monkeypatch):
    """The weights in the box in float16, replayed as a graph."""
    turned = {}
    for mode in "off", "on":
        monkeypatch.setattr(train.kernels, "norm_mode", mode)
        model, jobs = load_checkpoint(SHIPPED, "cuda"), []
        for _ in range(2):
            jobs = list(denoise(photos(model, 4), model, 4))
        turned[mode] = torch.cat([torch.stack(job.x_hat) for job in jobs]) > 0
    assert (turned["on"] != turned["off"]).float().mean() < 2e-3  # another rounding in float16


def test_a_step_that_cannot_be_captured_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    real_loss = train.kernels.loss

    def waiting(out, *rest, **more):
        float(out.detach().sum())
        return real_loss(out, *rest, **more)

    monkeypatch.setattr(train.kernels, "loss", waiting)
    assert run(tmp_path / "run", "--graph", "on") == 2
    err = capsys.readouterr().err
    assert "no CUDA graph of a step" in err and "use --graph off" in err and "Traceback" not in err
    assert run(tmp_path / "run", "--graph", "off") == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_through_the_kernels(tmp_path, precision):
    assert run(tmp_path / "run", "--precision", precision, "--kernels", "triton") == 0
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_the_same_noise_gives_the_same_answer_on_both_devices(tmp_path, monkeypatch):
    """sample() on CUDA through the kernels against plain steps on the CPU, in float32."""
    assert run(tmp_path / "run", "--device", "cpu") == 0
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    numbers = [diffusion.kernels.normal(torch.tensor([3, 4], device="cuda"), 4, 16, 16, stream).cpu()
               for stream in range(4)]
    numbers = iter([one for step in numbers for one in step])
    given, answers = dict(activation="tanh", codes=None), []
    for device in "cuda", "cpu":
        if device == "cpu":  # the plain loop with the kernels' noise
            monkeypatch.setattr(torch, "randn", lambda *shape, **where: next(numbers))
        model = load_checkpoint(tmp_path / "run" / "ckpt.pt", device)
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inside = torch.ones(2, 16, 16, dtype=torch.bool)
        answers.append(diffusion.sample(
            model.net, image.to(device), inside.to(device), 4, [3, 4], model.diffusion, model.codec.activate,
            steps=4, smooth=0.2, kernel_options=given if device == "cuda" else None).cpu())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def photos(model, count):
    scenes = (Shapes("test", 96).get([i])[0][0].numpy() for i in range(count))
    return [prepare(Image.fromarray(scene), model, tiles=1) for scene in scenes]


def test_one_graph_of_all_steps_is_what_its_launches_are():
    """The weights in the box: batches of another shape get graphs of their own; new photos and seeds, new
    answers."""
    model = load_checkpoint(SHIPPED, "cuda")
    few, many, graphed = photos(model, 5), photos(model, 5), photos(model, 5)
    for _ in denoise(few, model, 2, batch=4, callback=lambda *_: None):  # no graph, for the callback's sake
        assert not model.graphs
    for again in range(2):
        for jobs in many, graphed:
            for job in jobs:
                job.x_hat.clear()
            list(denoise(jobs, model, 2, batch=4))
    assert len(model.graphs) == 2 and all(model.graphs.values())  # of 4 samples, and of the 2 that are left
    for one, other, third in zip(few, many, graphed):
        torch.testing.assert_close(torch.stack(other.x_hat), torch.stack(one.x_hat), rtol=0, atol=2e-2)
        assert torch.equal(torch.stack(other.x_hat), torch.stack(third.x_hat))
    assert not torch.equal(*many[0].x_hat) and not torch.equal(many[0].x_hat[0], many[1].x_hat[0])


def test_float16_changes_as_little_as_tf32(monkeypatch):
    """On the CPU, against float32: TF32 turns 1 bit in 9,000, float16 1 in 4,000, bfloat16 1 in 600."""
    turned = {}
    kinds = ("float32", None, False), ("tf32", None, True), ("float16", torch.float16, True)
    for name, dtype, tf32 in kinds:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        monkeypatch.setattr(segment, "sample",
                            lambda *a, dtype=None, kind=dtype, **m: sample_(*a, dtype=kind, **m))
        model = load_checkpoint(SHIPPED, "cuda")
        turned[name] = torch.cat([torch.stack(job.x_hat) for job in denoise(photos(model, 4), model, 4)]) > 0
    off = {name: (bits != turned["float32"]).float().mean().item() for name, bits in turned.items()}
    assert off["float16"] < max(1e-3, 4 * off["tf32"]), off


def test_capture_while_another_thread_pins_memory():
    weight, stop = torch.ones(64, 64, device="cuda", requires_grad=True), threading.Event()

    def pin():
        size = 1
        while not stop.is_set():  # other sizes each time: no cached block fits
            torch.empty(size := size % 2**22 + 4097, dtype=torch.uint8).pin_memory()

    def work(batch):
        return torch.autograd.grad((batch["x"] @ weight).square().sum(), weight)[0]

    batch, thread = dict(x=torch.rand(8, 64, device="cuda")), threading.Thread(target=pin)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            true = work(batch)
        thread.start()
        try:
            for _ in range(20):
                replay = as_cuda_graph(work, batch)
                assert torch.equal(replay(batch), true)
        finally:
            stop.set()
            thread.join()


def test_a_failed_capture_leaves_stream_and_gradients():
    net = torch.nn.Linear(4, 4).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, capturable=True)

    def loss(net, batch):
        value = net(batch["x"]).square().mean()
        return value * float(value.detach() > -1)  # waits, which no capture bears

    step, batch = Step(net, loss, optimizer, graph=True), dict(x=torch.rand(2, 4, device="cuda"))
    with torch.cuda.stream(torch.cuda.Stream()):
        stream = torch.cuda.current_stream()
        for _ in range(3):
            step(batch, 1e-3)
        with pytest.raises(NoGraph, match="no CUDA graph of a step"):
            step(batch, 1e-3)
        assert torch.cuda.current_stream() == stream and all(p.grad is None for p in net.parameters())
    assert torch.rand(4, device="cuda").isfinite().all()


def test_neither_batches_nor_a_step_wait_for_the_device():
    for more in ([], ["--workers", "0"], ["--hints", "0.8"], ["--palette", "none"],
                 ["--self_condition", "0.5"],
                 ["--kernels", "torch", "--encoding", "onehot", "--palette", "none"]):
        c = train.parse([*QUICK, *more])
        r = train.build(c)
        r.train_data, fast = Shapes("train", c.image_size), diffusion.kernel_options(r.codec, r.device)
        optimizer = torch.optim.AdamW(r.net.parameters(), fused=True, capturable=True)
        step = Step(r.net, train.loss_of(r.diffusion, r.codec, r.dtype, fast), optimizer, r.dtype)
        coming = train.batches(c, r, 0, fast)
        for _ in range(3):
            step(next(coming), 1e-3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step(next(coming), 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        coming.close()
        train.kernels.use("auto")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_page_locked_memory_and_are_the_same(workers):
    """Also while copies are still on their way: the device is kept busy, and the ring is short."""
    data, busy = Shapes("train", 64), torch.rand(4096, 4096, device="cuda")
    plain, locked = (batches(data, 0, 24, 3, n, pin=pin) for n, pin in ((0, False), (workers, True)))
    with torch.cuda.stream(torch.cuda.Stream()):
        copies = []
        for _ in range(12):
            batch = next(locked)
            assert all(part.is_pinned() for part in batch)
            busy = busy @ busy * 1e-3
            copies.append([part.to("cuda", non_blocking=True) for part in batch])
        torch.cuda.synchronize()
        for copy in copies:
            assert all(torch.equal(a.cpu(), b) for a, b in zip(copy, next(plain), strict=True))
        locked.close()
        plain.close()


def test_a_run_goes_from_cpu_to_cuda_and_back(tmp_path):
    options = ["--precision", "fp32", "--kernels", "torch", "--lr", "1e-4", "--decay_steps", "1"]
    for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
        assert run(tmp_path / "moves", "--device", device, "--max_steps", str(steps), *options) == 0
    assert run(tmp_path / "stays", "--device", "cpu", *options) == 0
    close(weights(tmp_path / "moves"), weights(tmp_path / "stays"))


@two
def test_everything_on_the_second_device(tmp_path):
    assert run(tmp_path / "run", "--device", "cuda:1") == 0
    ckpt = str(tmp_path / "run" / "ckpt.pt")
    torch.cuda.set_device(0)
    assert evaluation.main(["--ckpt", ckpt, "--dataset", "shapes", "--limit", "2", "--device", "cuda:1",
                            "--out", str(tmp_path / "eval")]) == 0
    Image.fromarray(Shapes("test", 64).get([0])[0][0].numpy()).save(tmp_path / "photo.png")
    torch.cuda.set_device(0)
    assert sample.main(["--n", "2", "--ckpt", ckpt, "--device", "cuda:1", "--out", str(tmp_path / "samples"),
                        str(tmp_path / "photo.png")]) == 0


@two
def test_two_nccl_ranks_are_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, ROOT / "train.py", *QUICK, "--compile", "off", "--precision", "fp32",
               "--graph", "off", "--kernels", "torch"]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen([*command, "--out", tmp_path / "two"],
                              env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert subprocess.run([*command, "--out", tmp_path / "one"]).returncode == 0
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
