"""loss, step and average in Triton (on the GPU, or in the interpreter) against bits.py, diffusion.py and
float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import bits
import diffusion
import kernels

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too slow in the interpreter")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# B, k, H, W and layout: one pixel; two primes, in every layout; around a power of two; the largest code; big
# ones
CASES = [((1, 6, 1, 1), "nchw"), *[((2, 6, 7, 13), name) for name in ("nchw", "channels_last", "strided")],
         ((1, 2, 127, 129), "channels_last"), ((1, 10, 8, 8), "channels_last"), ((1, 4, 5, 3), "nchw"),
         *[pytest.param(shape, layout, marks=gpu) for shape in ((257, 8, 16, 16), (8, 6, 128, 128),
                                                                (2, 6, 512, 512))
           for layout in LAYOUTS]]


@pytest.fixture(autouse=True)
def triton():
    kernels.use("triton")
    yield
    kernels.use("auto")


def rand(*shape, seed=0, low=None):
    g = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=g) if low is None else torch.randint(low[0], low[1], shape, generator=g)
    return x.to(DEVICE)


def in_layout(x, layout):
    """layout "strided": a view with gaps, contiguous in neither layout."""
    if layout == "strided":
        wide = torch.stack([x, x * 0 + 7], dim=-1)
        return wide[..., 0]
    return x.contiguous(memory_format=LAYOUTS[layout])


def cells_for(B, k, H, W, seed=0):
    return rand(B, H, W, seed=seed, low=(-1, 2**k))


def float64_loss(out, cells, weight, k, prediction, activation, xt, alpha, sigma, bce=False):
    """Eq. 2 of one batch, written out in float64."""
    out, x0 = out.double(), bits.Codec(bits=k).encode(cells).double()
    alpha, sigma = (v.double().view(-1, 1, 1, 1) for v in (alpha, sigma))
    x_hat = {"x": out.tanh() if activation == "tanh" else out, "eps": (xt.double() - sigma * out) / alpha,
             "v": alpha * xt.double() - sigma * out}[prediction]
    valid = (cells >= 0)[:, None]
    pixels = valid.sum((1, 2, 3)).clamp(min=1)
    error = F.binary_cross_entropy_with_logits(2 * out, (x0 > 0).double(),
                                               reduction="none") if bce else (x_hat - x0) ** 2
    return weight.double() * (error * valid).sum((1, 2, 3)) / pixels


@pytest.mark.parametrize("shape, layout", CASES)
def test_loss_and_gradient(shape, layout):
    check_loss(shape, layout, torch.float32, "x", "tanh")


@pytest.mark.parametrize("dtype, layout", [(torch.float16, "nchw"), (torch.bfloat16, "channels_last")])
@pytest.mark.parametrize("prediction, activation",
                         [("x", "tanh"), ("x", "none"), ("eps", "none"), ("v", "none")])
def test_loss_in_every_form(dtype, layout, prediction, activation):
    check_loss((2, 6, 7, 13), layout, dtype, prediction, activation)


@pytest.mark.parametrize("dtype, layout",
                         [(torch.float32, "nchw"), (torch.float16, "strided"),
                          (torch.bfloat16, "channels_last")])
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("scale", [1, 100])  # e^100 overflows float32
def test_loss_as_cross_entropy(dtype, layout, scale):
    check_loss((2, 6, 7, 13), layout, dtype, "x", "tanh", scale, bce=True)


def check_loss(shape, layout, dtype, prediction, activation, scale=1, bce=False):
    B, k, H, W = shape
    out = in_layout((rand(*shape) * scale).to(dtype), layout).detach().requires_grad_()
    cells, weight = cells_for(*shape), rand(B, seed=1).abs() + 0.1
    xt, alpha, sigma = rand(*shape, seed=2), rand(B, seed=3).abs() + 0.3, rand(B, seed=4).abs() + 0.3
    true = float64_loss(out, cells, weight, k, prediction, activation, xt, alpha, sigma, bce)
    loss = kernels.loss(out, cells, weight, prediction, activation, xt, alpha, sigma, bce=bce)
    torch.testing.assert_close(loss.double(), true, rtol=2e-5, atol=1e-6)
    g = rand(B, seed=5)  # not all ones: every sample its own
    grad_true, = torch.autograd.grad((true * g.double()).sum(), out, retain_graph=True)
    grad, = torch.autograd.grad((loss * g).sum(), out)
    assert grad.dtype == dtype and grad.shape == out.shape
    eps = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(grad.double(), grad_true.double(), rtol=eps,
                               atol=eps * float(grad_true.abs().max()))


@gpu
def test_loss_of_a_batch_of_257():
    out, cells, weight = rand(257, 2, 1, 2), cells_for(257, 2, 1, 2), rand(257, seed=1)
    loss = kernels.loss(out, cells, weight)
    true = float64_loss(out, cells, weight, 2, "x", "tanh", out, weight, weight)
    torch.testing.assert_close(loss.double(), true, rtol=2e-5, atol=1e-6)


def test_loss_where_everything_is_ignored_is_zero():
    out = rand(2, 6, 7, 13).requires_grad_()
    cells = torch.stack([torch.full((7, 13), -1), torch.full((7, 13), 5)]).to(DEVICE)
    loss = kernels.loss(out, cells, torch.ones(2, device=DEVICE))
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0 and (out.grad[0] == 0).all() and (out.grad[1] != 0).all()


@pytest.mark.parametrize("codes", [None, torch.arange(4)])
@pytest.mark.parametrize("bad", [4, 255, 2**32 + 3, -2, -(2**40)])
def test_what_is_no_cell_is_ignored(bad, codes):
    out, one = rand(1, 2, 2, 3).requires_grad_(), torch.ones(1, device=DEVICE)
    seeds = torch.arange(1, device=DEVICE)
    codes = codes if codes is None else codes.to(DEVICE)
    cells = torch.tensor([[[0, 1, 2], [3, bad, 1]]], device=DEVICE)
    ignored = cells.where(cells != bad, -1)
    losses = [kernels.loss(out, v, one, codes=codes) for v in (cells, ignored)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), out)[0] for loss in losses))
    assert torch.equal(*(kernels.noise(v, one, one, seeds, 2, codes=codes) for v in (cells, ignored)))


def test_it_is_differentiable_once():
    out = rand(1, 6, 7, 13).requires_grad_()
    loss = kernels.loss(out, cells_for(1, 6, 7, 13), torch.ones(1, device=DEVICE))
    with pytest.raises(RuntimeError, match="differentiable once: without create_graph"):
        torch.autograd.grad(loss.sum(), out, create_graph=True)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_loss_takes_every_integer(kind):
    out, cells = rand(1, 6, 7, 13), cells_for(1, 6, 7, 13)
    one = torch.ones(1, device=DEVICE)
    assert torch.equal(kernels.loss(out, cells.to(kind), one), kernels.loss(out, cells, one))


def test_loss_gives_the_same_bits_twice():
    out, cells, weight = rand(2, 6, 40, 40), cells_for(2, 6, 40, 40), torch.ones(2, device=DEVICE)
    assert torch.equal(kernels.loss(out, cells, weight), kernels.loss(out, cells, weight))


@pytest.mark.parametrize("palette", ["similar", "random", "different", "range"])
def test_other_palettes_go_through_a_table(palette):
    codec = bits.Codec(palette=palette, seed=3)
    codes = codec.cell_of_code.argsort().to(DEVICE)
    out, cells, one = rand(2, 6, 7, 13), cells_for(2, 6, 7, 13), torch.ones(2, device=DEVICE)
    true = diffusion.per_sample_error(out.tanh(), codec.encode(cells), cells >= 0)
    torch.testing.assert_close(kernels.loss(out, cells, one, codes=codes), true)
    noisy = kernels.noise(cells, one, 0 * one, torch.arange(2, device=DEVICE), 6, codes=codes)
    assert torch.equal(noisy, codec.encode(cells))


@pytest.mark.parametrize("k", [3, 9])
def test_odd_numbers_of_bits_need_a_table(k):
    codes = torch.randperm(2**k).to(DEVICE)
    cells, one = cells_for(2, k, 5, 3), torch.ones(2, device=DEVICE)
    x0 = kernels.noise(cells, one, 0 * one, torch.arange(2, device=DEVICE), k, codes=codes)
    assert (x0.abs() == (cells >= 0)[:, None]).all()
    code = ((x0 > 0).long() << torch.arange(k, device=DEVICE).view(-1, 1, 1)).sum(1)
    assert torch.equal(torch.where(cells >= 0, codes.argsort()[code], -1), cells)
    assert (kernels.loss(x0, cells, one, activation="none", codes=codes) == 0).all()
    with pytest.raises(ValueError, match="no square grid"):
        kernels.noise(cells, one, one, torch.arange(2, device=DEVICE), k)


@pytest.mark.parametrize("t, s, sampler, variance, prediction, guidance", [
    (8 / 8, 7 / 8, "ddpm", "large", "x", 1.0),
    (2 / 8, 1 / 8, "ddpm", "small", "x", 0.0),
    (5 / 8, 4 / 8, "ddim", "", "v", 2.5),
    (4 / 8, 3 / 8, "ddpm", "large", "eps", 0.0),
    (8 / 8, 7 / 8, "ddim", "", "x", 0.0), (3 / 8, 2 / 8, "ddpm", "large", "v", 1.0)])
def test_step_is_the_samplers(t, s, sampler, variance, prediction, guidance):
    """SPEC section 8, written out in float64, with the noise that kernels.normal gives for the same seeds."""
    d, shape = diffusion.Diffusion(), (2, 6, 7, 13)
    out, xt, valid = rand(4 if guidance else 2, *shape[1:]), rand(*shape, seed=1), rand(2, 7, 13, seed=2) > -1
    seeds = torch.tensor([5, 2**40 + 1], device=DEVICE)
    lt, ls = (float(diffusion.logsnr(v, d)) for v in (t, s))
    (at, st), (as_, ss) = ([float(v) for v in diffusion.alpha_sigma(u, d)] for u in (t, s))
    r = math.exp(lt - ls)

    halves = [diffusion.to_x0(o, xt.double(), at, st, prediction,
                              torch.tanh).double() for o in out.double().split(2)]
    x_hat = (1 + guidance) * halves[0] - guidance * halves[1] if guidance else halves[0]
    x_hat = x_hat.clamp(-1, 1) * valid[:, None]
    if sampler == "ddim":
        true, noise = as_ * x_hat + ss * (xt - at * x_hat) / st, 0
        a, b, c = ss / st, as_ - ss * at / st, 0.0
    else:
        noise = math.sqrt((1 - r) * (st if variance == "large" else ss) ** 2)
        true = r * math.sqrt((1 + math.exp(-lt)) / (1 + math.exp(-ls))) * xt + (1 - r) * as_ * x_hat
        true = true + noise * kernels.normal(seeds, 6, 7, 13, stream=4)
        a, b, c = r * as_ / at, (1 - r) * as_, noise
    atol = 1e-4 if prediction == "eps" else 1e-5
    for layout in LAYOUTS:
        after, seen = kernels.step(in_layout(out, layout), in_layout(xt, layout), at, st, a, b, c, valid,
                                   guidance, seeds, 4, prediction, with_x_hat=True)
        torch.testing.assert_close(seen.double(), x_hat, rtol=1e-4, atol=atol)
        torch.testing.assert_close(after.double(), true.double(), rtol=1e-4, atol=atol)


def test_step_with_two_dtypes_two_layouts_and_one_pixel():
    out, xt = in_layout(rand(2, 6, 7, 13).bfloat16(), "channels_last"), rand(2, 6, 7, 13, seed=1)
    after = kernels.step(out, xt, 0.6, 0.8, 0.5, 0.25)
    torch.testing.assert_close(after, 0.5 * xt + 0.25 * out.float().tanh())
    assert after.dtype == torch.float32
    out, xt = rand(1, 2, 1, 1), rand(1, 2, 1, 1, seed=1).half()
    torch.testing.assert_close(kernels.step(out, xt, 0.6, 0.8, 0.5, 0.25),
                               (0.5 * xt.float() + 0.25 * out.tanh()).half())


@pytest.mark.parametrize("shape", [(2, 3, 7, 13), (1, 2, 1, 1), (1, 2, 40, 3), (2, 2, 1, 33),
                                   pytest.param((2, 6, 96, 128), marks=gpu)])
def test_average_is_the_edge_aware_one(shape):
    B, K, H, W = shape
    image, valid = rand(B, 12, H, W, seed=1), rand(B, H, W, seed=2) > -1
    x = 17 * rand(*shape) * valid[:, None]
    filters = diffusion.edge_aware(image, valid, 0.2)
    for layout in LAYOUTS:
        average = kernels.average(in_layout(x, layout), *diffusion.as_lines(filters), times=2)
        torch.testing.assert_close(average, diffusion.average(filters, x, times=2), rtol=1e-4, atol=1e-4)


def test_a_step_without_a_limit():
    """As smoothing needs it: guided numbers as they are."""
    out, xt = 3 * rand(4, 6, 7, 13), rand(2, 6, 7, 13, seed=1)
    valid = rand(2, 7, 13, seed=2) > -1
    seen = kernels.step(out, xt, 0.6, 0.8, 0.0, 1.0, 0.0, valid, 8.0, clamp=False)
    one, other = out.tanh().split(2)
    torch.testing.assert_close(seen, (9 * one - 8 * other) * valid[:, None], rtol=1e-4, atol=1e-4)
    assert seen.abs().max() > 2


@gpu
def test_offsets_beyond_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    B = 2**31 // (6 * 512 * 512) + 2  # the last sample lies beyond 2^31
    x = torch.randn(B, 6, 512, 512, dtype=torch.bfloat16, device=DEVICE)
    cells = torch.randint(-1, 64, (B, 512, 512), dtype=torch.int8, device=DEVICE)
    one, seeds = torch.ones(B, device=DEVICE), torch.arange(B, device=DEVICE)
    x.requires_grad_()
    loss = kernels.loss(x, cells, one)
    grad, = torch.autograd.grad(loss.sum(), x)
    last = x[-1:].detach().requires_grad_()
    alone = kernels.loss(last, cells[-1:], one[-1:])
    assert torch.equal(loss[-1:], alone) and torch.equal(grad[-1:], torch.autograd.grad(alone.sum(), last)[0])
    del grad
    x = x.detach()
    xt = kernels.noise(cells, one, one, seeds, 6, dtype=torch.bfloat16)
    assert torch.equal(xt[-1:],
                       kernels.noise(cells[-1:], one[-1:], one[-1:], seeds[-1:], 6, dtype=torch.bfloat16))
