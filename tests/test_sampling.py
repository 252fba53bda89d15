"""The samplers of diffusion.py, with an oracle for a network, and against the textbook posterior."""

import math
import types

import pytest
import torch

import eval as evaluation
import sample as sample_py
import train
from answers import segment
from answers.checkpoints import Model
from bits import Codec
from diffusion import SAMPLERS, Diffusion, alpha_sigma, average, edge_aware, sample
from engine import NoGraph


def identity(out):
    return out


def scene(B=2, S=12, k=6, seed=0):
    """Random cells with an ignored border, their x0, an image, and what is valid."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 2**k, (B, S, S), generator=generator)
    cells[0, :, S - 3 :] = -1
    return cells, Codec(bits=k).encode(cells), torch.randn(B, 3, S, S, generator=generator), cells >= 0


def oracle(x0, d):
    """A network that knows x0, whatever it is asked to predict."""
    def model(x, t):
        xt, true = x[:, :6], x0.repeat(len(x) // len(x0), 1, 1, 1)
        alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in alpha_sigma(t, d))
        eps = (xt - alpha * true) / sigma
        return {"x": true, "eps": eps, "v": alpha * eps - sigma * true}[d.prediction]
    return model


@pytest.mark.parametrize("sampler,variance", [("ddpm", "large"), ("ddpm", "small"), ("ddim", "large")])
@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("self_condition,steps,schedule",
                         [(0.0, 1, "cosine"), (0.0, 8, "linear"), (0.5, 3, "cosine")])
def test_an_oracle_recovers_the_labels(sampler, variance, prediction, guidance, self_condition, steps,
                                       schedule):
    cells, x0, image, valid = scene()
    d = Diffusion(schedule, prediction=prediction, self_condition=self_condition)
    x = sample(oracle(x0, d), image, valid, 6, [0, 1], d, identity, steps, guidance, sampler, variance)
    assert torch.equal(Codec(bits=6).decode(x)[valid], cells[valid])
    assert (x[~valid[:, None].expand_as(x)] == 0).all()


@pytest.mark.parametrize("encoding,k", [("bits", 2), ("bits", 10), ("onehot", 4), ("rgb", 6)])
def test_an_oracle_in_other_encodings(encoding, k):
    codec = Codec(encoding, k)
    # 36 pixels a segment
    cells = torch.arange(4).view(2, 2).repeat_interleave(6, 0).repeat_interleave(6, 1)[None]
    x0, valid = codec.encode(cells), torch.ones(1, 12, 12, dtype=torch.bool)
    x = sample(lambda x, t: x0, torch.zeros(1, 3, 12, 12), valid, codec.channels, [3], Diffusion(), identity,
               4, 0.0)
    pairs = set(zip(codec.decode(x).flatten().tolist(), cells.flatten().tolist()))
    assert len(pairs) == 4 if encoding == "rgb" else pairs == {(i, i) for i in range(4)}  # rgb: up to names


def trace(model, image, valid, channels=6, seeds=(0,), d=Diffusion(), **options):
    """Every step: [(t, xt, x_hat)], and the result."""
    steps = []
    x = sample(model, image, valid, channels, list(seeds), d, identity,
               callback=lambda i, t, xt, x_hat: steps.append((t, xt.clone(), x_hat.clone())), **options)
    return steps, x


def posterior(xt, x0, t, s):
    """q(xs | xt, x0) from q(xs | x0) and q(xt | xs) by Bayes' rule (Ho et al. 2020, Eq. 7): mean, variance;
    and beta."""
    (a_t, s_t), (a_s, s_s) = ([v.item() for v in alpha_sigma(u, Diffusion())] for u in (t, s))
    beta = 1 - a_t**2 / a_s**2  # the variance of one noising step
    mean = a_s * beta / s_t**2 * x0 + math.sqrt(1 - beta) * s_s**2 / s_t**2 * xt
    return mean, s_s**2 / s_t**2 * beta, beta


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ddpm_steps_are_the_textbook_posterior(variance):
    image, valid = torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    model = lambda x, t: torch.tanh(3 * x[:, :6])
    steps, last = trace(model, image, valid, guidance=0.0, variance=variance)
    assert [t for t, _, _ in steps] == pytest.approx([1 - i / 8 for i in range(8)])
    # unit Gaussian, 24,576 values
    assert abs(steps[0][1].mean()) < 0.02 and abs(steps[0][1].std() - 1) < 0.02
    assert torch.equal(last, steps[-1][2])
    for (t, xt, x_hat), (s, xs, _) in zip(steps, steps[1:]):
        mean, small, beta = posterior(xt, x_hat, t, s)
        z = (xs - mean) / math.sqrt(beta if variance == "large" else small)
        assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.02  # the standard error is 0.006
        assert abs((z * xt).mean()) < 0.04 and abs((z * x_hat).mean()) < 0.04  # fresh noise


def test_ddim_steps_keep_the_noise():
    cells, x0, image, valid = scene(B=1)
    model = lambda x, t: 0.8 * torch.tanh(x[:, :6])
    steps, _ = trace(model, image, valid, guidance=0.0, sampler="ddim")
    for (t, xt, x_hat), (s, xs, _) in zip(steps, steps[1:]):
        (a_t, s_t), (a_s, s_s) = ([v.item() for v in alpha_sigma(u, Diffusion())] for u in (t, s))
        assert torch.allclose(xs, a_s * x_hat + s_s * (xt - a_t * x_hat) / s_t, atol=1e-5)


# 2.3 is clamped to 1
@pytest.mark.parametrize("guidance,expected", [(0.0, 0.3), (1.0, 0.5), (2.5, 0.8), (10.0, 1.0)])
def test_guidance(guidance, expected):
    image, valid = torch.full((1, 3, 4, 4), 5.0), torch.ones(1, 4, 4, dtype=torch.bool)
    sizes = []

    def model(x, t):
        sizes.append(len(x))
        return (0.1 + 0.04 * x[:, 6:7]).expand(-1, 6, -1, -1)  # 0.3 with the image, 0.1 with zeros

    x = sample(model, image, valid, 6, [0], Diffusion(), identity, 3, guidance)
    assert torch.allclose(x, torch.full_like(x, expected)) and set(sizes) == {2 if guidance else 1}


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_self_conditioning_sees_the_last_x_hat(guidance):
    cells, x0, image, valid = scene()
    inputs = []

    def model(x, t):
        inputs.append(x[:, 9:])
        return torch.tanh(x[:, :6] + x[:, 6:7])

    steps, _ = trace(model, image, valid, seeds=(0, 1), d=Diffusion(self_condition=0.5), steps=4,
                     guidance=guidance)
    assert (inputs[0] == 0).all()
    for x_self, (_, _, x_hat) in zip(inputs[1:], steps):
        assert all(torch.equal(half, x_hat) for half in x_self.split(2))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_seed_gives_the_same_sample_in_every_batch(sampler):
    cells, x0, image, valid = scene(B=8)
    model = lambda x, t: torch.tanh(2 * x[:, :6] + x[:, 6:7]) * t.view(-1, 1, 1, 1)  # no sum over anything
    seeds = list(range(10, 18))
    together = sample(model, image, valid, 6, seeds, Diffusion(), identity, 5, 1.0, sampler)
    for i in range(8):
        one = slice(i, i + 1)
        alone = sample(model, image[one], valid[one], 6, seeds[one], Diffusion(), identity, 5, 1.0, sampler)
        assert torch.equal(together[one], alone)


def test_another_seed_gives_another_sample():
    cells, x0, image, valid = scene()
    model = lambda x, t: torch.tanh(2 * x[:, :6])
    for other in (2, 1 + 2**32, 1 + 2**52):
        a, b = sample(model, image[[1, 1]], valid[[1, 1]], 6, [1, other], Diffusion(), identity)
        assert not torch.equal(a, b)


def test_the_border_is_zero_at_every_step():
    cells, x0, image, valid = scene()
    steps, _ = trace(lambda x, t: torch.ones_like(x[:, :6]), image, valid, seeds=(0, 1))
    for _, _, x_hat in steps:
        assert torch.equal(x_hat, valid[:, None].expand_as(x_hat).float())


def test_only_an_x_prediction_is_activated():
    image, valid = torch.zeros(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    half = lambda x, t: torch.full_like(x[:, :6], 0.5)
    x = sample(half, image, valid, 6, [0], Diffusion(), torch.tanh, 1, 0.0)
    assert torch.allclose(x, torch.full_like(x, math.tanh(0.5)))
    # None would raise if it were called
    sample(half, image, valid, 6, [0], Diffusion(prediction="v"), None, 2, 0.0)


@pytest.mark.parametrize("wrong,name", [(dict(sampler="euler"), "euler"), (dict(variance="tiny"), "tiny"),
                                        (dict(steps=0), "0"), (dict(seeds=(1, 2)), "2")])
def test_wrong_use(wrong, name):
    with pytest.raises(ValueError, match=name):
        trace(lambda x, t: x[:, :6], torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), **wrong)


def slow_filter(image, valid, reach, colour):
    """One row of pixels (3, W) at a time, in plain Python: (W, W) weights."""
    W = image.shape[1]
    weights = torch.zeros(W, W, dtype=torch.float64)
    for i in range(W):
        for j in range(W):
            low, high = min(i, j), max(i, j)
            steps = [float((image[:, k + 1] - image[:, k]).norm()) / colour + 1 / reach for k in range(low,
                                                                                                       high)]
            weights[i, j] = math.exp(-sum(steps)) * bool(valid[j])
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("H, W", [(6, 8), (7, 1), (1, 12), (9, 5)])
def test_edge_aware_filters_by_brute_force(H, W):
    """Two rounds of multiplying by each row's and each column's own matrix; of any sides, primes too."""
    g = torch.Generator().manual_seed(0)
    image, valid = torch.randn(2, 3, H, W, generator=g), torch.ones(2, H, W, dtype=torch.bool)
    valid[1, 4:], valid[1, :, 7:] = False, False
    x = torch.randn(2, 4, H, W, generator=g) * valid[:, None]
    reach = 0.5 * max(H, W)
    want = x.double()
    for _ in range(2):
        for b in range(2):
            for h in range(H):
                want[b, :, h] = want[b, :, h] @ slow_filter(image[b, :, h], valid[b, h], reach, 0.6).T
            for w in range(W):
                columns = slow_filter(image[b, :, :, w], valid[b, :, w], reach, 0.6)
                want[b, :, :, w] = want[b, :, :, w] @ columns.T
    mine = average(edge_aware(image, valid, reach=0.5, colour=0.6), x, times=2)
    torch.testing.assert_close(mine.double(), want * valid[:, None], rtol=1e-5, atol=1e-6)
    alone = average(edge_aware(image[1:], valid[1:], reach=0.5, colour=0.6), x[1:], times=2)
    assert torch.equal(alone, mine[1:])  # to the last bit, whatever is beside it


def test_averages_stay_within_edges():
    """Two flat halves: noise on both averages out, and nothing of one half gets into the other."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 10.0
    truth = torch.where(image[:, :1] > 0, 1.0, -1.0)
    noisy = truth + torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    smooth = average(edge_aware(image, torch.ones(1, 32, 32, dtype=torch.bool), 0.3), noisy)
    assert (smooth - truth).abs().max() < 0.4 and (noisy - truth).abs().max() > 2
    constant = torch.full((1, 2, 32, 32), 0.7)
    torch.testing.assert_close(average(edge_aware(image, torch.ones(1, 32, 32, dtype=torch.bool), 0.3),
                                       constant), constant)


def test_smooth_sampling_is_the_same_in_every_batch_and_keeps_the_border():
    image, valid = torch.randn(2, 3, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, 10:] = False

    def model(x, t):
        return x[:, :4] * 3 + x[:, 4:5]

    def run(some, seeds):
        return sample(model, image[some], valid[some], 4, seeds, Diffusion(), torch.tanh, steps=3, smooth=0.2)

    both = run([0, 1], [5, 6])
    assert both.isfinite().all() and both.abs().max() <= 1 and (both[1, :, 10:] == 0).all()
    assert torch.equal(both[1:], run([1], [6]))
    plain = sample(model, image, valid, 4, [5, 6], Diffusion(), torch.tanh, steps=3)
    assert (both - plain).abs().max() > 0.1
    with pytest.raises(ValueError, match="smooth must be 0"):
        sample(model, image, valid, 4, [5, 6], Diffusion(), torch.tanh, smooth=-1)


def test_a_sampler_is_one_row_of_a_table(monkeypatch, capsys):
    """A row added to SAMPLERS is a choice of train.py, sample.py and eval.py, and takes the steps; the last
    gives x_hat."""
    asked = []

    def jump(alpha, sigma, lam, i, variance):
        asked.append((i, variance, len(alpha), alpha[i + 1] > alpha[i], sigma[i + 1] < sigma[i],
                      lam[i + 1] > lam[i]))
        return 0.5, 0.25, 0.0

    monkeypatch.setitem(SAMPLERS, "jump", jump)
    _, x0, image, valid = scene()
    steps, x = trace(lambda x, t: x0, image, valid, seeds=(0, 1), steps=3, guidance=0.0, sampler="jump",
                     variance="small")
    assert asked == [(0, "small", 4, True, True, True), (1, "small", 4, True, True, True)]
    assert torch.allclose(steps[1][1], 0.5 * steps[0][1] + 0.25 * steps[0][2]) and torch.equal(x, x0)
    assert evaluation.arguments(["--sampler", "jump"]).sampler == ["jump"]
    assert train.parse(["--sampler", "jump"]).sampler == "jump"
    for command, name in ((sample_py.main, "sample.py"), (evaluation.main, "eval.py")):
        try:
            status = command(["--sampler", "leap", "photo.jpg"][: 3 if name == "sample.py" else 2])
        except SystemExit as e:
            status = e.code
        text = capsys.readouterr().err
        assert status == 2 and "ddim" in text and "jump" in text and "leap" in text


def test_which_batches_become_a_cuda_graph(monkeypatch):
    """From the second of a shape on, the last four shapes; here without a device that makes one."""
    seen = []

    def image(n):
        return types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), shape=(n, 3, 8, 8))

    def capture(run, given):
        seen.append(("capture", given["image"].shape[0]))
        return lambda given: (seen.append(("replay", given["image"].shape[0])), run(given))[1]

    def fake_sample(net, dtype, image, **more):
        seen.append((dtype, image.shape[0]))
        return torch.full((1,), math.nan if nan and dtype else 0.0)

    monkeypatch.setattr(segment, "kernel_options", lambda codec, device: dict(activation="tanh"))
    monkeypatch.setattr(segment, "as_cuda_graph", capture)
    monkeypatch.setattr(segment, "sample", fake_sample)
    model, nan, half = Model(None, Codec(), Diffusion(), 8, {}, "", 0), False, torch.float16
    for n in (4, 4, 4, 2):
        segment.sampled(model, dict(image=image(n)), steps=2)
    assert seen == [(half, 4), ("capture", 4), ("replay", 4), (half, 4), ("replay", 4), (half, 4), (half, 2)]
    seen.clear()
    segment.sampled(model, dict(image=image(4)), steps=3)  # other steps are another graph
    segment.sampled(model, dict(image=image(4)), callback=print, steps=2)  # which a graph cannot call
    assert seen == [(half, 4)] * 2
    for n in (5, 6, 7):
        segment.sampled(model, dict(image=image(n)), steps=2)
    assert len(model.graphs) == 4
    seen.clear()
    nan = True  # float32 has the range
    assert segment.sampled(model, dict(image=image(9)), steps=2).isfinite().all()
    assert seen == [(half, 9), (None, 9)]

    def fails(run, given):
        raise NoGraph("no CUDA graph of a step (operation not permitted)")

    monkeypatch.setattr(segment, "as_cuda_graph", fails)
    with pytest.raises(ValueError, match="operation not permitted.: set BITSEG_KERNELS=torch"):
        segment.sampled(model, dict(image=image(9)), steps=2)
