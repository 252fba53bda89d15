"""Schedules and training loss of diffusion.py against the formulas, written out here once more."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion import (
    PREDICTIONS,
    SCHEDULES,
    WEIGHTINGS,
    Diffusion,
    alpha_sigma,
    gamma_and_slope,
    logsnr,
    loss_weight,
    per_sample_error,
    stratified_t,
    to_x0,
    training_loss,
)

T = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
RAW = {"cosine": lambda t: torch.cos(t * math.pi / 2) ** 2,
       "linear": lambda t: torch.sigmoid(-torch.log(torch.expm1(1e-4 + 10 * t**2))),
       "linear_simple": lambda t: 1 - t,
       "parabola": lambda t: (1 - t**2) ** 2}


def gamma_ref(t, schedule="cosine", b=0.1, top=20.0, bottom=-20.0):
    def scaled(u):
        g = RAW[schedule](u)
        return b**2 * g / ((b**2 - 1) * g + 1)

    first, last = scaled(torch.zeros((), dtype=t.dtype)), scaled(torch.ones((), dtype=t.dtype))
    high, low = 1 / (1 + math.exp(-top)), 1 / (1 + math.exp(-bottom))
    return low + (scaled(t) - last) / (first - last) * (high - low)


def logsnr_ref(t, **options):
    g = gamma_ref(t, **options)
    return torch.log(g / (1 - g))


def slope_ref(t, **options):
    """-dlambda/dt by autograd."""
    t = t.clone().requires_grad_()
    return -torch.autograd.grad(logsnr_ref(t, **options).sum(), t)[0]


# ------------------------------------------------------------------------------------------------------------


def test_golden():
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert logsnr(t, Diffusion()).tolist() == pytest.approx([-0.92, -2.84, -4.605, -6.37, -8.29], abs=0.005)
    expected = [19.44, 6.761, 2.219, 0.761, 0.275]
    assert [round(w, 3) for w in loss_weight(t, Diffusion()).tolist()] == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("b,top,bottom",
                         [(1.0, 20.0, -20.0), (0.1, 20.0, -20.0), (0.3, 9.0, -13.0), (2.0, 15.0, -15.0)])
def test_schedule_and_its_closed_form_derivative(schedule, b, top, bottom):
    d, options = Diffusion(schedule, b, top, bottom), dict(schedule=schedule, b=b, top=top, bottom=bottom)
    g, slope = gamma_and_slope(T, d)
    assert g.dtype == slope.dtype == torch.float64
    assert torch.allclose(g, gamma_ref(T, **options), atol=1e-13, rtol=1e-9)
    assert torch.allclose(logsnr(T, d), logsnr_ref(T, **options), atol=1e-7)
    assert torch.allclose(slope / (g * (1 - g)), slope_ref(T, **options), rtol=1e-6)
    ends = logsnr(torch.tensor([0.0, 1.0]), d)
    assert ends.tolist() == pytest.approx([top, bottom], abs=1e-6)
    assert (logsnr(T, d).diff() < 0).all()


def test_derivative_by_finite_differences():
    h = 1e-6
    numeric = (logsnr(T - h, Diffusion()) - logsnr(T + h, Diffusion())) / (2 * h)
    assert torch.allclose(loss_weight(T, Diffusion(weighting="uniform")), numeric, rtol=1e-4)


def test_input_scale_shifts_the_logsnr():
    middle = T[10:-10]  # away from the clipped ends
    shift = logsnr(middle, Diffusion(input_scale=0.1)) - logsnr(middle, Diffusion(input_scale=1.0))
    assert torch.allclose(shift, torch.full_like(shift, 2 * math.log(0.1)), atol=1e-3)


def test_alpha_sigma_keep_the_variance():
    alpha, sigma = alpha_sigma(torch.linspace(0, 1, 11), Diffusion())
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(11).double(), atol=1e-15)
    assert torch.allclose((alpha / sigma) ** 2, logsnr(torch.linspace(0, 1, 11), Diffusion()).exp(),
                          rtol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("logsnr_space", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_weights(weighting, logsnr_space, schedule):
    for bias in (-4.0, 1.5):
        lam = logsnr_ref(T, schedule=schedule)
        w = {"sigmoid": 1 / (1 + torch.exp(bias - lam)), "snr": lam.exp(), "snr+1": lam.exp() + 1,
             "snr_trunc": lam.exp().clamp(min=1), "uniform": torch.ones_like(lam)}[weighting]
        expected = w * slope_ref(T, schedule=schedule) if logsnr_space else w
        d = Diffusion(schedule, weighting=weighting, bias=bias, logsnr_space=logsnr_space)
        assert torch.allclose(loss_weight(T, d), expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", [dict(schedule="cos"), dict(weighting="snr2"), dict(prediction="x0"),
                                   dict(input_scale=0)])
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[0]}.*{list(wrong.values())[0]}"):
        Diffusion(**wrong)


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7, 64])  # 7: bins that no float hits exactly
def test_t_is_stratified(batch):
    t = stratified_t(batch, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64 and sorted((t * batch).floor().tolist()) == list(range(batch))


def test_t_is_shuffled_and_uniform_within_its_bin():
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_t(4, generator) for _ in range(2000)])
    assert torch.allclose(t.mean(0), torch.full((4,), 0.5).double(), atol=0.03)  # every place gets every bin
    assert abs(((t * 4) % 1).mean() - 0.5) < 0.01 and abs(((t * 4) % 1).var() - 1 / 12) < 0.005


@pytest.mark.parametrize("t", [0.02, 0.5, 0.9])
def test_x_hat_from_the_true_eps_and_v(t):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 6, 4, 4, generator=generator) for _ in range(2))
    alpha, sigma = (v.item() for v in alpha_sigma(t, Diffusion()))
    xt = alpha * x0 + sigma * eps
    never = None  # only x is activated
    assert torch.allclose(to_x0(eps, xt, alpha, sigma, "eps", never), x0, atol=1e-3)
    assert torch.allclose(to_x0(alpha * eps - sigma * x0, xt, alpha, sigma, "v", never), x0, atol=1e-5)
    assert torch.allclose(to_x0(x0, xt, alpha, sigma, "x", torch.tanh), x0.tanh())


def test_error_is_a_sum_over_bits_of_means_over_valid_pixels():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 6, 5, 4, generator=generator) for _ in range(2))
    valid = torch.rand(3, 5, 4, generator=generator) < 0.5
    valid[2] = False  # nothing valid: 0, not nan
    expected = [sum(float(((a[i, c] - b[i, c])[valid[i]] ** 2).mean()) for c in range(6))
                for i in range(2)] + [0.0]
    assert per_sample_error(a, b, valid).tolist() == pytest.approx(expected, rel=1e-5)


class Recorder:
    """A network that is a fixed formula of its inputs, and keeps them."""

    def __init__(self, channels=6):
        self.calls, self.channels = [], channels

    def __call__(self, x, t):
        self.calls.append((x, t))
        return 0.7 * x[:, : self.channels] + 0.1 * x[:, self.channels : self.channels + 1] + t.view(-1, 1, 1,
                                                                                                    1)


def batch(B=4, S=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, S, S, dtype=torch.bool)
    valid[0, :, S // 2 :] = False  # an upright image, padded right
    x0 = torch.randint(0, 2, (B, 6, S, S), generator=generator) * 2.0 - 1
    return x0 * valid[:, None], torch.randn(B, 3, S, S, generator=generator) * valid[:, None], valid


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", [{}, dict(weighting="uniform", logsnr_space=False),
                                     dict(schedule="linear", input_scale=0.5)])
def test_training_loss_by_hand(prediction, options):
    check_training_loss(prediction, options)


def test_cross_entropy_by_hand():
    check_training_loss("x", dict(loss="bce"))
    with pytest.raises(ValueError, match="needs prediction x, not v"):
        Diffusion(prediction="v", loss="bce")


def check_training_loss(prediction, options):
    d, model, (x0, image, valid) = Diffusion(prediction=prediction, image_drop=0.0,
                                             **options), Recorder(), batch()
    loss = training_loss(model, x0, image, valid, d, torch.tanh, torch.Generator().manual_seed(5))
    (x, t), = model.calls
    assert torch.equal(x[:, 6:], image) and sorted((t * 4).floor().tolist()) == [0, 1, 2, 3]
    total = 0.0
    for i in range(4):
        g = gamma_ref(t[i].double(), d.schedule, d.input_scale)
        alpha, sigma, xt = g.sqrt(), (1 - g).sqrt(), x[i, :6].double()
        eps = (xt - alpha * x0[i]) / sigma
        assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1  # 1,536 draws
        out = Recorder()(x[i : i + 1], t[i : i + 1])[0].double()
        x_hat = {"x": out.tanh(), "eps": (xt - sigma * out) / alpha,
                 "v": alpha * xt - sigma * out}[prediction]
        w = slope_ref(t[i].double(), schedule=d.schedule, b=d.input_scale) if d.logsnr_space else 1.0
        if d.weighting == "sigmoid":
            w = w * torch.sigmoid(torch.log(g / (1 - g)) + 4)
        error = (x_hat - x0[i]) ** 2
        if d.loss == "bce":  # x_hat = 2 p - 1
            error = F.binary_cross_entropy((1 + x_hat) / 2, (x0[i].double() + 1) / 2, reduction="none")
        total += w * error[:, valid[i]].mean(1).sum() / 4
    assert loss.item() == pytest.approx(float(total), rel=2e-4)


def test_padding_does_not_count():
    x0, image, valid = batch()
    losses = []
    for junk in (0.0, 1e3):
        model = lambda x, t: 0.5 * x[:, :6] + junk * ~valid[:, None]
        losses.append(training_loss(model, x0, image, valid, Diffusion(), torch.tanh,
                                    torch.Generator().manual_seed(0)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_dropped_images_are_zero(drop):
    model, (x0, image, valid) = Recorder(), batch(B=1000, S=2)
    training_loss(model, x0, image, valid, Diffusion(image_drop=drop), torch.tanh,
                  torch.Generator().manual_seed(0))
    seen = model.calls[0][0][:, 6:]
    dropped = (seen.flatten(1) == 0).all(1)
    assert torch.equal(seen[~dropped], image[~dropped]) and abs(dropped.float().mean() - drop) < 0.05


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_self_conditioning_sees_the_first_x_hat_or_zeros(p):
    model, (x0, image, valid) = Recorder(), batch(B=500, S=2)
    d = Diffusion(self_condition=p, image_drop=0.0, prediction="v")
    training_loss(model, x0, image, valid, d, torch.tanh, torch.Generator().manual_seed(0))
    (first, t), (second, t2) = model.calls
    assert (first[:, 9:] == 0).all() and torch.equal(first[:, :9], second[:, :9]) and torch.equal(t, t2)
    g = gamma_ref(t.double()).view(-1, 1, 1, 1)
    guess = (g.sqrt() * first[:, :6] - (1 - g).sqrt() * Recorder()(first, t)).clamp(-1, 1).float()
    chosen = (second[:, 9:] != 0).flatten(1).any(1)
    assert torch.allclose(second[chosen, 9:], guess[chosen],
                          atol=1e-5) and abs(chosen.float().mean() - p) < 0.07


def test_no_gradient_flows_through_the_first_pass():
    w = torch.tensor(0.5, requires_grad=True)
    x0, image, valid = batch(B=2)
    seen = []

    def model(x, t):
        seen.append(torch.is_grad_enabled())
        return w * x[:, :6]

    training_loss(model, x0, image, valid, Diffusion(self_condition=1.0), torch.tanh).backward()
    assert seen == [False, True] and w.grad.abs() > 0
