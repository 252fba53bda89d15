"""The diffusion process on analog bits: noise schedules, training loss, samplers. Continuous time, 0 = data, 1 = noise.

What it is: plain functions around any network `model(x, t)` that takes cat(xt, image[, previous x_hat]) of shape
(B, C + 3 [+ C], H, W) and t (B,), and returns (B, C, H, W). What it is not: it knows neither labels nor files.

Use it alone:
    from diffusion import Diffusion, training_loss, sample
    loss = training_loss(model, x0, image, valid, Diffusion(), torch.tanh)                     # a scalar; x0 in [-1, 1]
    x = sample(model, image, valid, channels=6, seeds=[0, 1], diffusion=Diffusion(), activate=torch.tanh)

Source: "Towards Agnostic and Holistic Universal Image Segmentation with Bit Diffusion" (NLDL 2026), Eq. 1-7; variational
form and samplers: Kingma et al. 2021 (VDM), Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM); guidance: Ho & Salimans
2022; input scale: Chen 2023 (arXiv 2301.10972); sigmoid weighting: Kingma & Gao 2023, Hoogeboom et al. 2024.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:
    import kernels                               # fused, for CUDA; this file works without the folder
except ImportError:
    kernels = None

SCHEDULES = ("cosine", "linear", "linear_simple", "parabola")
WEIGHTINGS = ("sigmoid", "snr", "snr+1", "snr_trunc", "uniform")
PREDICTIONS = ("x", "eps", "v")
LOSSES = ("mse", "bce")


@dataclass(frozen=True)
class Diffusion:
    """The process and its loss. The defaults are the paper's. Raises ValueError for unknown names."""

    schedule: str = "cosine"
    input_scale: float = 0.1                     # b: the log-SNR is shifted by 2 ln b, a harder task at every t
    logsnr_max: float = 20.0                     # at t = 0
    logsnr_min: float = -20.0                    # at t = 1
    prediction: str = "x"                        # what the network's output means
    loss: str = "mse"                            # squared error, or bce: the bits' cross entropy; the optimum is the same
    weighting: str = "sigmoid"
    bias: float = -4.0                           # of the sigmoid weighting
    logsnr_space: bool = True                    # the factor -dlambda/dt of the loss
    image_drop: float = 0.05                     # share of training samples without an image, for guidance
    self_condition: float = 0.0                  # share of training steps with a first pass' x_hat as input; 0 = off

    def __post_init__(self):
        for value, known, name in ((self.schedule, SCHEDULES, "schedule"), (self.weighting, WEIGHTINGS, "weighting"),
                                   (self.prediction, PREDICTIONS, "prediction"), (self.loss, LOSSES, "loss")):
            if value not in known:
                raise ValueError(f"{name} '{value}' is not one of {', '.join(known)}")
        if not 0 < self.input_scale:
            raise ValueError(f"input_scale must be positive, not {self.input_scale}")
        if self.loss == "bce" and self.prediction != "x":
            raise ValueError(f"loss bce compares bits with the network's own output: it needs prediction x, not {self.prediction}")


# ---------------------------------------------------------------------------------------------------------------------
# Schedule. Everything in float64: 1 - gamma at t = 0 is 2e-9.


def gamma_and_slope(t, d):
    """gamma(t) in (0, 1) and -dgamma/dt of the scaled and clipped schedule, both float64, in the shape of t."""
    t = torch.as_tensor(t, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)

    def raw(u):                                                                    # before scaling: gamma, -dgamma/dt
        if d.schedule == "cosine":
            return torch.cos(u * math.pi / 2) ** 2, torch.sin(u * math.pi) * math.pi / 2
        if d.schedule == "linear":                                                 # sigmoid(-log(expm1(m))) = exp(-m)
            return torch.exp(-1e-4 - 10 * u**2), 20 * u * torch.exp(-1e-4 - 10 * u**2)
        if d.schedule == "linear_simple":
            return 1 - u, torch.ones_like(u)
        return (1 - u**2) ** 2, 4 * u * (1 - u**2)                                 # parabola

    def scaled(u):                                                                 # Eq. 7
        g, slope = raw(u)
        denominator = (d.input_scale**2 - 1) * g + 1
        return d.input_scale**2 * g / denominator, slope * d.input_scale**2 / denominator**2

    g, slope = scaled(t)
    g0, g1 = scaled(ends)[0]
    top, bottom = torch.sigmoid(torch.tensor([d.logsnr_max, d.logsnr_min], dtype=torch.float64)).tolist()
    stretch = (top - bottom) / (g0 - g1)                                           # affine: exactly the two limits
    return bottom + (g - g1) * stretch, slope * stretch


def logsnr(t, d):
    """lambda(t) = log(gamma / (1 - gamma)), float64."""
    return torch.logit(gamma_and_slope(t, d)[0])


def alpha_sigma(t, d):
    """alpha = sqrt(gamma) and sigma = sqrt(1 - gamma) (Eq. 4), float64, in the shape of t."""
    g = gamma_and_slope(t, d)[0]
    return g.sqrt(), (1 - g).sqrt()


def loss_weight(t, d):
    """w(lambda) * -dlambda/dt (Eq. 2; the second factor if d.logsnr_space), float64, in the shape of t."""
    g, slope = gamma_and_slope(t, d)
    lam = torch.logit(g)
    if d.weighting == "sigmoid":
        w = torch.sigmoid(lam - d.bias)
    elif d.weighting == "snr":
        w = lam.exp()
    elif d.weighting == "snr+1":
        w = lam.exp() + 1
    elif d.weighting == "snr_trunc":
        w = lam.exp().clamp(min=1)
    else:
        w = torch.ones_like(lam)
    return w * slope / (g * (1 - g)) if d.logsnr_space else w


# ---------------------------------------------------------------------------------------------------------------------
# Training


def stratified_t(batch, generator=None, device=None):
    """One t a sample, each in a bin of its own: (perm(i) + u_i) / B, float64 (B,)."""
    perm = torch.randperm(batch, generator=generator, device=device)
    return (perm + torch.rand(batch, generator=generator, device=device, dtype=torch.float64)) / batch


def to_x0(out, xt, alpha, sigma, prediction, activate):
    """x_hat from the network's output; float32. alpha, sigma: numbers, or (B, 1, 1, 1). Only x is activated."""
    out = out.float()
    if prediction == "x":
        return activate(out)
    if prediction == "eps":
        return (xt - sigma * out) / alpha
    return alpha * xt - sigma * out                                                # v


def per_sample_error(x_hat, x0, valid):
    """Squared error summed over channels, averaged over the valid pixels: (B,). valid (B, H, W)."""
    error = ((x_hat - x0) ** 2).sum(1) * valid                                     # (B, H, W)
    return error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def per_sample_entropy(out, x0, valid):
    """-log p(x0) in nats, summed over bits, averaged over the valid pixels: (B,). out: x_hat = tanh(out), valid (B, H, W).

    A bit that is +1 with probability p has the mean 2 p - 1 = tanh(out), so p = sigmoid(2 out): the optimum is that of the
    squared error, E[x0 | xt]. The gradient is tanh(out) - x0, without the factor 1 - tanh(out)^2 that makes a network which
    is sure and wrong slow to learn better.
    """
    error = F.softplus(-2 * x0 * out).sum(1) * valid                               # (B, H, W)
    return error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def fused(codec, device):
    """What the kernels have to know of a codec, dict(activation, codes), if they are live on this device; else None.

    They do analog bits with tanh or no activation; codes: of each cell, None for the 2D Gray palette. Raises RuntimeError if
    Triton was forced and cannot run there.
    """
    if kernels is None or kernels.live(device)[0] == "torch" or codec.encoding != "bits" or codec.activation not in ("tanh", "none"):
        return None
    return dict(activation=codec.activation, codes=None if codec.palette == "similar" else codec.cell_of_code.argsort().to(device))


def draw(shape, d, generator=None, device=None, eps=True):
    """The random part of training samples of shape (B, C, H, W) and what follows from it, as a dictionary of rows of samples.

    t, alpha, sigma and weight (of the loss), (B, 1, 1, 1) float32; eps (B, C, H, W), if asked for; keep, the image, and
    chosen, for self-conditioning, (B, 1, 1, 1) bool; all on the device. Draw for a whole batch, then share the
    rows out: t is stratified over the batch. generator: the host's, which computes all but eps, in float64, which
    not every device has.
    """
    B, device = shape[0], torch.device(device or "cpu")
    t, drawn, noise = stratified_t(B, generator), {}, generator
    if eps and device.type != "cpu":
        seed = torch.randint(2**62, (), generator=generator)
        noise = torch.Generator(device).manual_seed(int(seed))
    if eps:
        drawn["eps"] = torch.randn(shape, generator=noise, device=device)
    rows = dict(keep=torch.rand(B, generator=generator) >= d.image_drop)
    if d.self_condition > 0:
        rows["chosen"] = torch.rand(B, generator=generator) < d.self_condition
    rows.update(zip(("t", "alpha", "sigma", "weight"), (t, *alpha_sigma(t, d), loss_weight(t, d))))
    values = to_device(torch.stack([v.float() for v in rows.values()]), device)  # one copy
    for name, row, value in zip(rows, rows.values(), values.view(-1, B, 1, 1, 1)):
        drawn[name] = value > 0 if row.dtype == torch.bool else value
    return drawn


def to_device(x, device):
    """A tensor of the host on a device, without a wait: from page-locked memory, where that is CUDA."""
    return (x.pin_memory() if torch.device(device).type == "cuda" else x).to(device, non_blocking=True)


def training_loss(model, x0, image, valid, d, activate, generator=None, drawn=None):
    """The loss of one batch (Eq. 2), a scalar.

    x0 (B, C, H, W) in [-1, 1], 0 where not valid; image (B, 3, H, W), normalised, or (B, 3 d^2, H, W), one of d times the
    resolution, folded; valid (B, H, W) bool. drawn: what `draw` returns, for these B samples; drawn here, with
    generator as `draw` takes it, if not given. With d.loss "bce", activate must be torch.tanh, x0 bits, -1 or 1.
    """
    r = draw(x0.shape, d, generator, x0.device) if drawn is None else drawn
    alpha, sigma, t = r["alpha"], r["sigma"], r["t"].flatten()
    xt = alpha * x0 + sigma * r["eps"]                                             # Eq. 1
    image, x_self = image * r["keep"], None
    if d.self_condition > 0:
        x_self = torch.zeros_like(xt)
        with torch.no_grad():
            first = to_x0(model(network_input(xt, image, x_self), t), xt, alpha, sigma, d.prediction, activate)
        x_self = first.clamp(-1, 1) * r["chosen"]
    out = model(network_input(xt, image, x_self), t)
    if d.loss == "bce":
        error = per_sample_entropy(out.float(), x0, valid)
    else:
        error = per_sample_error(to_x0(out, xt, alpha, sigma, d.prediction, activate), x0, valid)
    return (r["weight"].flatten() * error).mean()


def fused_training_loss(model, cells, image, bits, seeds, d, drawn, activate, activation, codes=None, dtype=torch.float32):
    """training_loss, by the kernels: neither x0 nor eps nor x_hat is ever in memory.

    cells (B, H, W) integers, -1 = ignored; seeds (B,) int64, of each sample's noise; drawn as of `draw`, without eps;
    activation and codes as of `fused`; dtype: of the network's input.
    """
    alpha, sigma, weight, keep, t = (drawn[name].flatten() for name in ("alpha", "sigma", "weight", "keep", "t"))
    again = d.self_condition > 0

    def run(x_self=None):
        return model(kernels.network_input(cells, alpha, sigma, seeds, bits, image, keep=keep, x_self=x_self,
                                           self_condition=again, codes=codes, dtype=dtype), t)

    x_self = xt = None
    if d.prediction != "x":                                                        # float32: eps divides by alpha
        xt = kernels.noise(cells, alpha, sigma, seeds, bits, codes=codes)
    if again:
        with torch.no_grad():
            first = to_x0(run(), xt, drawn["alpha"], drawn["sigma"], d.prediction, activate)
        x_self = first.clamp(-1, 1) * drawn["chosen"]
    return kernels.loss(run(x_self), cells, weight, d.prediction, activation, xt, alpha, sigma, codes, d.loss == "bce").mean()


def network_input(xt, image=None, x_self=None):
    """cat(xt[, image][, x_self]): (B, C [+ 3 d^2] [+ C], H, W)."""
    return torch.cat([v for v in (xt, image, x_self) if v is not None], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def sample(model, image, valid, channels, seeds, diffusion, activate, steps=8, guidance=1.0, sampler="ddpm",
           variance="large", smooth=0.0, known=None, resample=1, init=None, strength=1.0, callback=None, fused=None):
    """Denoise Gaussian noise into x_hat (B, C, H, W) in [-1, 1] at N equidistant times from 1 to 0.

    image (B, 3 d^2, H, W); valid (B, H, W) bool, x_hat is 0 elsewhere; seeds: B integers, one random generator a sample, so
    the result for a seed is the same in every batch. guidance w: x_hat = (1 + w) x_hat(image) - w x_hat(no image).
    variance (ddpm): large or small. callback(i, t, xt, x_hat) sees every step. smooth: x_hat is averaged over about this
    share of the longer side at every step, but not across edges of the image (`edge_aware`); 0: not at all, as in the paper.

    known: x0 (B, C, H, W) and hint (B, H, W) integers, the number of the hint that gives x0 there, 0 where unknown. There
    x_hat is x0 and xt is x0 noised for its time (RePaint, Lugmayr et al. 2022); what resembles a hint follows it (`carry`).
    resample: each step is noised again and repeated until it was done so often. init (B, C, H, W): start from it, noised
    for t = strength in (0, 1], not from t = 1 (SDEdit, Meng et al. 2022); N steps all the same. A model with a method
    image_part sees the image once, not at every step.
    fused: what `fused` returned: kernels draw the noise and take the steps (other numbers for a seed than without them).
    """
    if sampler not in ("ddpm", "ddim") or variance not in ("large", "small"):
        raise ValueError(f"sampler is ddpm or ddim, variance large or small, not '{sampler}' and '{variance}'")
    if steps < 1 or resample < 1 or len(seeds) != len(image):
        raise ValueError(f"at least 1 step, 1 resample and one seed an image are needed, not {steps}, {resample} and "
                         f"{len(seeds)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1 (1: ignore init), not {strength}")
    if smooth < 0:
        raise ValueError(f"smooth must be 0 (off) or a share of the image's side, not {smooth}")
    d, (B, _, H, W), device = diffusion, image.shape, image.device
    generators = [torch.Generator(device).manual_seed(int(s)) for s in seeds]
    keys, stream = torch.tensor([int(s) for s in seeds], device=device), itertools.count()

    def noise():
        if fused:
            return kernels.normal(keys, channels, H, W, next(stream))
        return torch.stack([torch.randn(channels, H, W, generator=g, device=device) for g in generators])

    times = torch.linspace(strength if init is not None else 1, 0, steps + 1, dtype=torch.float64)
    lam, (alpha, sigma) = logsnr(times, d).tolist(), (v.tolist() for v in alpha_sigma(times, d))
    mask = valid[:, None]                                                          # (B, 1, H, W)
    filters = edge_aware(image, valid, smooth) if smooth else None

    def update(i):                                                                 # xs = a xt + b x_hat + c eps
        if i == steps - 1:
            return 0.0, 1.0, 0.0
        if sampler == "ddim":
            a = sigma[i + 1] / sigma[i]
            return a, alpha[i + 1] - a * alpha[i], 0.0
        r, one_minus_r = math.exp(lam[i] - lam[i + 1]), -math.expm1(lam[i] - lam[i + 1])       # r = e^(lambda_t - lambda_s)
        return (r * alpha[i + 1] / alpha[i], one_minus_r * alpha[i + 1],
                math.sqrt(one_minus_r) * sigma[i if variance == "large" else i + 1])

    xt, x_hat = noise(), torch.zeros(B, channels, H, W, device=device)
    if init is not None:
        xt = alpha[0] * init + sigma[0] * xt
    fixed, hint = known if known is not None else (None, None)
    images = torch.cat([image, torch.zeros_like(image)]) if guidance else image    # both halves in one batch
    halves, once = len(images) // B, getattr(model, "image_part", None)
    images, extra = (images, ()) if once is None else (None, (once(images),))

    for i, again in [(i, again) for i in range(steps) for again in range(resample if i < steps - 1 else 1)]:
        if again:                                                                  # one step of noising: q(xt | xs)
            xt = alpha[i] / alpha[i + 1] * xt + math.sqrt(-math.expm1(lam[i] - lam[i + 1])) * sigma[i] * noise()
        if known is not None:
            xt = torch.where(hint[:, None] > 0, alpha[i] * fixed + sigma[i] * noise(), xt)
        x_self = x_hat.repeat(halves, 1, 1, 1) if d.self_condition > 0 else None
        xs = xt.repeat(halves, 1, 1, 1)
        t = torch.full((len(xs),), times[i].item(), device=device)
        out = model(network_input(xs, images, x_self), t, *extra)
        a, b, c = update(i)
        if fused and known is None and not smooth:
            after, x_hat = kernels.step(out, xt, alpha[i], sigma[i], a, b, c, valid, guidance, keys, next(stream),
                                        d.prediction, fused["activation"], with_x_hat=True)
        else:
            x_hat = to_x0(out, xs, alpha[i], sigma[i], d.prediction, activate)
            if guidance:
                x_hat = (1 + guidance) * x_hat[:B] - guidance * x_hat[B:]
            x_hat = (average(filters, x_hat * mask) if smooth else x_hat).clamp(-1, 1) * mask
            if known is not None:
                x_hat = carry(x_hat, fixed, hint) * mask
            after = a * xt + b * x_hat + (c * noise() if c else 0)
        if callback:
            callback(i, times[i].item(), xt, x_hat)
        xt = after
    return x_hat


def edge_aware(image, valid, reach, colour=0.35):
    """Filters that average along rows and columns of an image (B, 3 d^2, H, W), normalised: (B, H, W, W) and (B, W, H, H).

    The weight of another pixel of the row is exp(-d): d grows by 1 for every `reach` of the longer side on the way there, and
    by 1 for every `colour` that the image changes by. Weights sum to 1 over the valid pixels. This is normalised
    convolution in the domain transform (Gastal & Oliveira 2011).
    """
    def along(x, valid):                                                           # (B, rows, columns, 3): its rows
        change = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=-1) / colour + 1 / (reach * max(image.shape[-2:]))
        way = torch.cat([torch.zeros_like(change[:, :, :1]), change], dim=2).cumsum(2)
        far = (way[..., None] - way[..., None, :]).abs()                           # (B, rows, columns, columns)
        return torch.softmax(-far - 1e4 * ~valid[:, :, None], dim=-1)

    x = image.float().unflatten(1, (3, -1)).mean(2).permute(0, 2, 3, 1)            # (B, H, W, 3)
    return along(x, valid), along(x.transpose(1, 2), valid.transpose(1, 2))


def average(filters, x, times=12):
    """x (B, C, H, W), averaged along rows, then along columns, several times."""
    rows, columns = filters
    for _ in range(times):
        x = torch.einsum("bhvw,bchw->bchv", rows, x)
        x = torch.einsum("bwuh,bchw->bcuw", columns, x)
    return x


def carry(x_hat, x0, hint, alike=0.5):
    """x_hat with the hints in it: x0 where hint > 0, and also where x_hat is like what it is, on average, at a hint's pixels.

    Alike: the mean over the channels of the product is above 0.5 (of 6 sure bits, 5 are the same); the hint most alike
    wins. Holding the pixels alone changes nothing around them: at the noise of most steps a few pixels are not seen.
    """
    best, out = torch.full_like(x_hat[:, :1], alike), x_hat
    for g in range(1, int(hint.max()) + 1):
        here = (hint == g)[:, None]                                                # (B, 1, H, W)
        size = here.sum((2, 3), keepdim=True).clamp(min=1)
        middle, code = ((v * here).sum((2, 3), keepdim=True) / size for v in (x_hat, x0))      # (B, C, 1, 1)
        like = (x_hat * middle).mean(1, keepdim=True)
        best, out = torch.maximum(like, best), torch.where(like > best, code, out)
    return torch.where(hint[:, None] > 0, x0, out)
