"""The kernels' path through diffusion.py and the scripts: the same as the plain path, for the same noise."""

import pytest
import torch

import diffusion
import kernels
import train
from bits import Codec
from diffusion import Diffusion, draw, fused_training_loss, sample, training_loss
from model import UNet
from sources.scenes import Shapes

SIZE = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=2, patch=2)


@pytest.fixture
def scene(kernel_device):
    torch.manual_seed(0)
    labels = torch.randint(-1, 5, (2, 4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return [v.to(kernel_device) for v in (labels, torch.randn(2, 3, 8, 8), torch.tensor([5, 2**40]))]


@pytest.fixture
def smoothed_once(monkeypatch):
    """Instead of 12 times, for the interpreter's sake."""
    for smoothing in kernels, diffusion:
        monkeypatch.setattr(smoothing.average, "__defaults__", (1,))


def network(d, channels, device):
    net = UNet(channels * (2 if d.self_condition else 1) + 3, channels, **SIZE)
    torch.nn.init.normal_(net.head.weight, std=0.05)  # it starts at zero
    return net.to(device)


@pytest.mark.parametrize("prediction, again, palette, activation, loss", [
    ("x", 0.0, "similar", "tanh", "mse"), ("x", 1.0, "random", "none", "mse"),
    ("x", 0.5, "range", "tanh", "bce"),
    ("eps", 0.0, "none", "", "mse"), ("v", 0.5, "different", "", "mse")])
def test_fused_training_loss_is_training_loss(scene, prediction, again, palette, activation, loss):
    labels, image, seeds = scene
    codec = Codec(bits=4, palette=palette, activation=activation)
    # eps / alpha(1) is noise
    d = Diffusion(prediction=prediction, loss=loss, self_condition=again, image_drop=0.3, logsnr_min=-8)
    net, cells = network(d, 4, labels.device), codec.cells(labels)
    drawn = draw((2, 4, 8, 8), d, torch.Generator().manual_seed(1), labels.device)
    drawn["eps"] = kernels.normal(seeds, 4, 8, 8)
    expected = training_loss(net, codec.encode(cells), image, cells >= 0, d, codec.activate, drawn=drawn)
    codes = None if palette == "similar" else codec.cell_of_code.argsort().to(labels.device)
    loss = fused_training_loss(net, cells, image, 4, seeds, d, drawn, codec.activate, codec.activation, codes)
    assert torch.allclose(loss, expected, rtol=1e-5)
    want = torch.autograd.grad(expected, net.parameters())
    for a, b in zip(torch.autograd.grad(loss, net.parameters()), want):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * want[-1].abs().max())


@pytest.mark.parametrize("sampler, variance, guidance, smooth",
                         [("ddpm", "large", 1.0, 0.0), ("ddpm", "small", 0.0, 0.2),
                          ("ddim", "large", 8.0, 0.2)])
def test_fused_steps_are_plain_steps(scene, smoothed_once, monkeypatch, sampler, variance, guidance, smooth):
    """The plain loop with the kernels' noise in place of torch.randn."""
    _, image, seeds = scene
    codec, d = Codec(bits=4), Diffusion()
    net, valid = network(d, 4, image.device), torch.rand(2, 8, 8, device=image.device) < 0.8
    options = dict(steps=3, sampler=sampler, variance=variance, guidance=guidance, smooth=smooth)
    given = dict(activation="tanh", codes=None)
    result = sample(net, image, valid, 4, seeds.tolist(), d, codec.activate, kernel_options=given, **options)
    numbers = iter([one for j in range(3) for one in kernels.normal(seeds, 4, 8, 8, stream=j)])
    monkeypatch.setattr(torch, "randn", lambda *shape, **where: next(numbers))
    plain = sample(net, image, valid, 4, seeds.tolist(), d, codec.activate, **options)
    assert torch.allclose(result, plain, atol=1e-5)


def test_training_and_sampling_through_triton(kernel_device, smoothed_once, tmp_path, monkeypatch, capsys):
    """train.py, which samples to validate, with the kernels forced; without a GPU in Triton's interpreter."""
    monkeypatch.setitem(train.SIZES, "tiny", SIZE)
    options = ("--max_steps 2 --batch_size 2 --image_size 8 --eval_images 1 --steps 2 --log_every 1 "
               "--compile off --kernels triton").split()
    assert train.main([*options, "--device", kernel_device, "--out", str(tmp_path / "run")]) == 0
    assert "kernels: triton (asked for); GroupNorm: torch" in capsys.readouterr().out


def test_balanced_samples_get_their_cells_from_the_kernel(kernel_device, monkeypatch):
    """Though the loss that weighs their pixels is plain PyTorch's."""
    c = train.parse(["--device", kernel_device, *"--batch_size 2 --image_size 8 --balance 0.5".split()])
    run = train.build(c)
    run.train_data = Shapes("train", 8)

    def batch(options):
        coming = train.batches(c, run, 0, options)
        made = next(coming)
        coming.close()
        return made

    plain, given = batch(None), train.kernel_options(run.codec, run.device)
    monkeypatch.setattr(train.Codec, "cells", None)
    fast = batch(given)
    assert fast.keys() == plain.keys() and all(torch.equal(v, fast[k]) for k, v in plain.items())
    assert train.loss_of(run.diffusion, run.codec, None, given)(run.net, fast).isfinite()


def test_forced_triton_without_a_gpu_says_why(kernel_device, tmp_path, monkeypatch, capsys):
    if kernel_device == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    assert train.main(["--kernels", "triton", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "Triton kernels were asked for, but" in capsys.readouterr().err
