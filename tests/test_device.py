"""A training step on a device that the host must not wait for, and on one without float64: on device.py's."""

import itertools
import sys

import pytest
import torch
from device import Device

import kernels
import train
from diffusion import Diffusion, kernel_options, sample
from engine import Step
from model import UNet
from sources.scenes import Shapes

HERE, THERE = torch.device("cpu"), torch.device("meta")
SMALL = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=4, patch=2)


class AnyGenerator(torch.Generator):
    """The host's, whatever device it is for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def steps(monkeypatch):
    """steps(device, *options): losses and norms of three training steps, the weights then, the last batch."""
    monkeypatch.setitem(train.SIZES, "tiny", SMALL)
    monkeypatch.setattr(kernels, "mode", "auto")
    for name in ("pick_device", "layout"):  # `meta` is no device for training
        monkeypatch.setattr(train, name,
                            dict(pick_device=torch.device,
                                 layout=lambda device: "nchw")[name])
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *args,
                        **more: None)
    monkeypatch.setattr(torch, "Generator", AnyGenerator)

    def run(device, *options, waits):
        c = train.parse([*"--batch_size 2 --image_size 8 --warmup_steps 1 --precision fp32 --device".split(),
                         str(device), *options])
        run = train.build(c)
        run.train_data, net, fast = Shapes("train", 8), run.net, kernel_options(run.codec, run.device)
        update = Step(net, train.loss_of(run.diffusion, run.codec, run.dtype, fast),
                      torch.optim.AdamW(net.parameters(), fused=True), run.dtype)
        coming, values = train.batches(c, run, 5, fast), []
        for batch in itertools.islice(coming, 3):
            values.append(update(batch, 1e-3))
            if len(values) == 1:
                del waits[:]  # what is copied once, at the start
        coming.close()
        return torch.stack(values), torch.cat([p.detach().flatten() for p in net.parameters()]), batch

    return run


def assert_same(here, there):
    """The last batch; losses and weights, too, where the noise is the kernels'. Plain noise is each device's
    own, and on the CPU of the same generator as what is drawn after it."""
    (values, weights, batch), (others, others_weights, other) = here, there
    for name in batch.keys() - ({"eps", "keep", "chosen"} if "eps" in batch else set()):
        torch.testing.assert_close(other[name].here, batch[name], msg=lambda m: f"{name}: {m}")
    if "eps" not in batch:
        torch.testing.assert_close(others.here, values)
        torch.testing.assert_close(others_weights.here, weights)
    assert others.here.isfinite().all()


@pytest.mark.parametrize("options", ["--palette none",
                                     "--palette none --encoding onehot --bits 4 --prediction v",
                                     "--palette none --loss bce --self_condition 0.5"])
def test_a_plain_step_waits_for_nothing_and_needs_no_float64(steps, options):
    options = ["--kernels", "torch", *options.split()]
    with Device(float64=False) as device:
        there = steps(THERE, *options, waits=device.waits)
    assert not device.waits
    assert_same(steps(HERE, *options, waits=[]), there)


@pytest.mark.interpreter
@pytest.mark.parametrize("options",
                         [["--hints", "0.8"], ["--palette", "none"], ["--balance", "0.5"],
                          ["--palette", "random", "--self_condition", "0.5"]])
def test_a_step_through_the_kernels_waits_for_nothing(steps, options):
    with Device() as device:
        there = steps(THERE, "--kernels", "triton", *options, waits=device.waits)
    assert not device.waits
    assert_same(steps(HERE, "--kernels", "triton", *options, waits=[]), there)


@pytest.mark.interpreter
def test_sampling_through_the_kernels_waits_for_nothing(monkeypatch):
    """So that all of its steps can be one CUDA graph."""
    monkeypatch.setattr(kernels, "mode", "triton")
    monkeypatch.setattr(kernels.average, "__defaults__", (1,))  # the interpreter is slow
    net = UNet(9, 6, **SMALL).eval().requires_grad_(False)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    given = dict(image=torch.randn(2, 3, 8, 8), valid=torch.rand(2, 8, 8) < 0.9,
                 seeds=torch.tensor([3, 2**40]))
    options = dict(channels=6, diffusion=Diffusion(), activate=torch.tanh, steps=2, guidance=8.0, smooth=0.2,
                   kernel_options=dict(activation="tanh", codes=None))
    here = sample(net, **given, **options)
    with Device() as device:
        there = sample(net.to(THERE), **{k: v.to(THERE) for k, v in given.items()}, **options)
    assert not [wait for wait in device.waits if "test_device.py" not in wait]  # the copies just made
    torch.testing.assert_close(there.here, here)


def test_without_float64_the_palette_is_made_on_the_host(steps, monkeypatch):
    with Device(float64=False) as device, pytest.raises(TypeError, match="no float64"):
        steps(THERE, "--kernels", "torch", waits=device.waits)
    monkeypatch.setattr(train, "NO_FLOAT64", ("meta",))
    with Device(float64=False) as device:
        there = steps(THERE, "--kernels", "torch", waits=device.waits)
    assert device.waits  # for the labels, which go to the host and back
    assert_same(steps(HERE, "--kernels", "torch", waits=[]), there)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac with MPS")
def test_a_mac_trains_and_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", SMALL)
    options = ("--device mps --image_size 16 --batch_size 2 --max_steps 4 --eval_images 2 --eval_every 4 "
               "--steps 2 "
               "--smooth 0.2")
    assert train.main([*options.split(), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("waits", [
    lambda x: x.sum().item(), lambda x: int(x.max()), lambda x: bool((x > 0).all()), lambda x: x.tolist(),
    lambda x: x.cpu(), lambda x: torch.ones(3).to(x.device),
    lambda x: x + torch.tensor(range(3), device=x.device),
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.copy_(torch.ones(3))])
def test_what_waits_is_seen(waits):
    """The device itself: each of these stops a CUDA program until the GPU is done."""
    with Device() as device:
        x = torch.arange(3.0, device=THERE)
        assert not device.waits
        try:
            waits(x)
        except (RuntimeError, NotImplementedError):  # as of tensors without numbers
            return
        assert device.waits
