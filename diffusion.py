"""The diffusion process on analog bits: noise schedules, training loss, samplers. Continuous time, 0 = data,
1 = noise.

What it is: plain functions around any network `model(x, t)` that takes cat(xt, image[, hints][, previous
x_hat]) of shape (B, C + 3 [+ C] [+ C], H, W) and t (B,), and returns (B, C, H, W). What it is not: it knows
neither labels nor files.

Use it alone:
    from diffusion import Diffusion, training_loss, sample
    loss = training_loss(model, x0, image, valid, Diffusion(), torch.tanh)  # a scalar; x0 in [-1, 1]
    x = sample(model, image, valid, channels=6, seeds=[0, 1], diffusion=Diffusion(), activate=torch.tanh)

Source: "Towards Agnostic and Holistic Universal Image Segmentation with Bit Diffusion" (NLDL 2026), Eq. 1-7;
variational form and samplers: Kingma et al. 2021 (VDM), Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM);
guidance: Ho & Salimans 2022; input scale: Chen 2023 (arXiv 2301.10972); sigmoid weighting: Kingma & Gao 2023,
Hoogeboom et al. 2024.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:
    import kernels  # fused, for CUDA; this file works without the folder
    kernels = kernels if hasattr(kernels, "live") else None  # not another package of that name
except ImportError:
    kernels = None

# name: gamma and -dgamma/dt at time t, before scaling
SCHEDULES = {
    "cosine": lambda t: (torch.cos(t * math.pi / 2) ** 2, torch.sin(t * math.pi) * math.pi / 2),
    # sigmoid(-log(expm1(m))) = exp(-m)
    "linear": lambda t: (torch.exp(-1e-4 - 10 * t**2), 20 * t * torch.exp(-1e-4 - 10 * t**2)),
    "linear_simple": lambda t: (1 - t, torch.ones_like(t)),
    "parabola": lambda t: ((1 - t**2) ** 2, 4 * t * (1 - t**2)),
}
# name: w of the log-SNR lambda; only the first has a bias
WEIGHTINGS = {
    "sigmoid": lambda lam, bias: torch.sigmoid(lam - bias),
    "snr": lambda lam, _: lam.exp(),
    "snr+1": lambda lam, _: lam.exp() + 1,
    "snr_trunc": lambda lam, _: lam.exp().clamp(min=1),
    "uniform": lambda lam, _: torch.ones_like(lam),
}
PREDICTIONS = ("x", "eps", "v")
LOSSES = ("mse", "bce")


@dataclass(frozen=True)
class Diffusion:
    """The process and its loss. The defaults are the paper's. Raises ValueError for unknown names."""

    schedule: str = "cosine"
    input_scale: float = 0.1  # b: the log-SNR is shifted by 2 ln b, a harder task at every t
    logsnr_max: float = 20.0  # at t = 0
    logsnr_min: float = -20.0  # at t = 1
    prediction: str = "x"  # what the network's output means
    loss: str = "mse"  # squared error, or bce: the bits' cross entropy; the optimum is the same
    weighting: str = "sigmoid"
    bias: float = -4.0  # of the sigmoid weighting
    logsnr_space: bool = True  # the factor -dlambda/dt of the loss
    image_drop: float = 0.05  # share of training samples without an image, for guidance
    self_condition: float = 0.0  # share of training steps with a first pass' x_hat as input; 0 = off
    hints: float = 0.0  # share of training samples that see hints (hints.py); 0 = no channels for them

    def __post_init__(self):
        for value, choices, name in ((self.schedule, SCHEDULES, "schedule"),
                                     (self.weighting, WEIGHTINGS, "weighting"),
                                     (self.prediction, PREDICTIONS, "prediction"),
                                     (self.loss, LOSSES, "loss")):
            if value not in choices:
                raise ValueError(f"{name} '{value}' is not one of {', '.join(choices)}")
        if not 0 < self.input_scale:
            raise ValueError(f"input_scale must be positive, not {self.input_scale}")
        if self.loss == "bce" and self.prediction != "x":
            raise ValueError(f"loss bce compares bits with the network's own output: it needs prediction x, "
                             f"not {self.prediction}")


# ------------------------------------------------------------------------------------------------------------
# Schedule. Everything in float64: 1 - gamma at t = 0 is 2e-9.


def gamma_and_slope(t, d):
    """gamma(t) in (0, 1) and -dgamma/dt of the scaled and clipped schedule, both float64, in the shape of
    t."""
    t = torch.as_tensor(t, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)

    def scaled(t):  # Eq. 7
        g, slope = SCHEDULES[d.schedule](t)
        denominator = (d.input_scale**2 - 1) * g + 1
        return d.input_scale**2 * g / denominator, slope * d.input_scale**2 / denominator**2

    g, slope = scaled(t)
    g0, g1 = scaled(ends)[0]
    top, bottom = torch.sigmoid(torch.tensor([d.logsnr_max, d.logsnr_min], dtype=torch.float64)).tolist()
    stretch = (top - bottom) / (g0 - g1)  # affine: exactly the two limits
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
    w = WEIGHTINGS[d.weighting](torch.logit(g), d.bias)
    return w * slope / (g * (1 - g)) if d.logsnr_space else w


# ------------------------------------------------------------------------------------------------------------
# Training


def stratified_t(batch, generator=None, device=None):
    """One t a sample, each in a bin of its own: (perm(i) + u_i) / B, float64 (B,)."""
    perm = torch.randperm(batch, generator=generator, device=device)
    return (perm + torch.rand(batch, generator=generator, device=device, dtype=torch.float64)) / batch


def to_x0(out, xt, alpha, sigma, prediction, activate):
    """x_hat from the network's output; float32. alpha, sigma: numbers, or (B, 1, 1, 1). Only x is
    activated."""
    out = out.float()
    if prediction == "x":
        return activate(out)
    if prediction == "eps":
        return (xt - sigma * out) / alpha
    return alpha * xt - sigma * out  # v


def per_sample_error(x_hat, x0, valid):
    """Squared error summed over channels, averaged over the pixels by what they count: (B,). valid (B, H, W):
    bool, or weights."""
    error = ((x_hat - x0) ** 2).sum(1) * valid  # (B, H, W)
    return error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def per_sample_entropy(out, x0, valid):
    """-log p(x0) in nats, summed over bits, averaged over the pixels by what they count: (B,). out: x_hat =
    tanh(out), valid (B, H, W): bool, or weights.

    A bit that is +1 with probability p has the mean 2 p - 1 = tanh(out), so p = sigmoid(2 out): the optimum
    is that of the squared error, E[x0 | xt]. The gradient is tanh(out) - x0, without the factor 1 -
    tanh(out)^2 that makes a network which is sure and wrong slow to learn better.
    """
    error = F.softplus(-2 * x0 * out).sum(1) * valid  # (B, H, W)
    return error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def kernel_options(codec, device):
    """What the kernels have to know of a codec, dict(activation, codes), if they are live on this device;
    else None.

    They do analog bits with tanh or no activation; codes: of each cell, None for the 2D Gray palette. Raises
    RuntimeError if Triton was forced and cannot run there.
    """
    if kernels is None or kernels.live(device)[0] == "torch" or not codec.has_bits:
        return None
    if codec.activation not in ("tanh", "none"):
        return None
    return dict(activation=codec.activation, codes=None if codec.palette == "similar"
                else codec.cell_of_code.argsort().to(device))


def host_seed(seed):
    """A 64-bit seed for the CPU's generator, which takes no more than the low 32 bits of one."""
    return (seed ^ (seed >> 32) * 0x9E3779B9) & 0xFFFFFFFF


def draw(shape, d, generator=None, device=None, eps=True):
    """The random part of training samples of shape (B, C, H, W) and what follows from it, as a dictionary of
    rows of samples.

    t, alpha, sigma and weight (of the loss), (B, 1, 1, 1) float32; eps (B, C, H, W), if asked for; keep, the
    image, and chosen, for self-conditioning, (B, 1, 1, 1) bool; all on the device. Draw for a whole batch,
    then share the rows out: t is stratified over the batch. generator: the host's, which computes all but
    eps, in float64, which not every device has.
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
    kind = torch.device(device).type  # on a Mac, x might be gone before it is copied
    return (x.pin_memory() if kind == "cuda" else x).to(device, non_blocking=kind != "mps")


def training_loss(model, x0, image, valid, d, activate, generator=None, drawn=None, hints=None):
    """The loss of one batch (Eq. 2), a scalar.

    x0 (B, C, H, W) in [-1, 1], 0 where not valid; image (B, 3, H, W), normalised, or (B, 3 d^2, H, W), one of
    d times the resolution, folded; valid (B, H, W): bool, or what each pixel counts. drawn: what `draw`
    returns, for these B samples; drawn here, with generator as `draw` takes it, if not given. With d.loss
    "bce", activate must be torch.tanh, x0 bits, -1 or 1.
    hints: what is known of x0, (B, C, H, W), 0 where unknown.
    """
    hints = hint_channels(hints, d, x0.shape, x0.device)
    r = draw(x0.shape, d, generator, x0.device) if drawn is None else drawn
    alpha, sigma, t = r["alpha"], r["sigma"], r["t"].flatten()
    xt = alpha * x0 + sigma * r["eps"]  # Eq. 1
    image, x_self = image * r["keep"], None
    if d.self_condition > 0:
        x_self = torch.zeros_like(xt)
        with torch.no_grad():
            first = to_x0(model(network_input(xt, image, x_self, hints), t), xt, alpha, sigma, d.prediction,
                          activate)
        x_self = first.clamp(-1, 1) * r["chosen"]
    out = model(network_input(xt, image, x_self, hints), t)
    if d.loss == "bce":
        error = per_sample_entropy(out.float(), x0, valid)
    else:
        error = per_sample_error(to_x0(out, xt, alpha, sigma, d.prediction, activate), x0, valid)
    return (r["weight"].flatten() * error).mean()


def fused_training_loss(model, cells, image, bits, seeds, d, drawn, activate, activation, codes=None,
                        dtype=torch.float32, hints=None):
    """training_loss, by the kernels: neither x0 nor eps nor x_hat is ever in memory.

    cells (B, H, W) integers, -1 = ignored; seeds (B,) int64, of each sample's noise; drawn as of `draw`,
    without eps; activation and codes as of `kernel_options`; dtype: of the network's input.
    """
    alpha, sigma, weight, keep, t = (drawn[name].flatten() for name in ("alpha", "sigma", "weight", "keep",
                                                                        "t"))
    again = d.self_condition > 0
    hints = hint_channels(hints, d, (len(cells), bits, *cells.shape[1:]), cells.device)

    def run(x_self=None):
        x = kernels.network_input(cells, alpha, sigma, seeds, bits, image, keep=keep, x_self=x_self,
                                  self_condition=again, codes=codes, dtype=dtype)
        if hints is not None:  # before x_self
            seen = bits + image.shape[1]
            x = torch.cat([x[:, :seen], hints.to(dtype), x[:, seen:]], dim=1)
        return model(x, t)

    x_self = xt = None
    if d.prediction != "x":  # float32: eps divides by alpha
        xt = kernels.noise(cells, alpha, sigma, seeds, bits, codes=codes)
    if again:
        with torch.no_grad():
            first = to_x0(run(), xt, drawn["alpha"], drawn["sigma"], d.prediction, activate)
        x_self = first.clamp(-1, 1) * drawn["chosen"]
    return kernels.loss(run(x_self), cells, weight, d.prediction, activation, xt, alpha, sigma, codes,
                        d.loss == "bce").mean()


def network_input(xt, image=None, x_self=None, hints=None):
    """cat(xt[, image][, hints][, x_self]): (B, C [+ 3 d^2] [+ C] [+ C], H, W)."""
    return torch.cat([v for v in (xt, image, hints, x_self) if v is not None], dim=1)


def hint_channels(hints, d, shape, device):
    """The hints that a network of d takes: these, zeros if there are none, None if it takes none. Raises
    ValueError."""
    if hints is None:
        return torch.zeros(shape, device=device) if d.hints > 0 else None
    if d.hints == 0:
        raise ValueError("this network has no input for hints: train one with --hints 0.5, or give none")
    if hints.shape != torch.Size(shape):
        raise ValueError(f"hints must be bits of shape {tuple(shape)}, not {tuple(hints.shape)}")
    return hints


# ------------------------------------------------------------------------------------------------------------
# Sampling


def ddpm(alpha, sigma, lam, i, variance):
    """A step back along the posterior of Ho et al. 2020; its noise has the larger or the smaller of two
    variances."""
    # r = e^(lambda_t - lambda_s)
    r, one_minus_r = math.exp(lam[i] - lam[i + 1]), -math.expm1(lam[i] - lam[i + 1])
    noise = math.sqrt(one_minus_r) * sigma[i if variance == "large" else i + 1]
    return r * alpha[i + 1] / alpha[i], one_minus_r * alpha[i + 1], noise


def ddim(alpha, sigma, lam, i, variance):
    """A step back without noise (Song et al. 2021)."""
    a = sigma[i + 1] / sigma[i]
    return a, alpha[i + 1] - a * alpha[i], 0.0


# name: a function of the lists alpha, sigma and lambda (one number a time), the step i from time i to time i
# + 1, and variance. It returns a, b, c of the step: a xt + b x_hat + c eps. The last step always gives x_hat
SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
VARIANCES = ("large", "small")
WITHOUT_VARIANCE = ("ddim",)  # samplers that it makes no difference to


@torch.no_grad()
def sample(model, image, valid, channels, seeds, diffusion, activate, steps=8, guidance=1.0, sampler="ddpm",
           variance="large", smooth=0.0, init=None, strength=1.0, callback=None, kernel_options=None,
           hints=None, dtype=None):
    """Denoise Gaussian noise into x_hat (B, C, H, W) in [-1, 1] at N equidistant times from 1 to 0.

    image (B, 3 d^2, H, W); valid (B, H, W) bool, x_hat is 0 elsewhere; seeds: B integers, one random
    generator a sample, so the result for a seed is the same in every batch. guidance w: x_hat = (1 + w)
    x_hat(image) - w x_hat(no image).
    variance (ddpm): large or small. callback(i, t, xt, x_hat) sees every step. smooth: x_hat is averaged over
    about this share of the longer side at every step, but not across edges of the image (`edge_aware`); 0:
    not at all, as in the paper.

    init (B, C, H, W): start from it, noised for t = strength in (0, 1], not from t = 1 (SDEdit, Meng et al.
    2022); N steps all the same. A model with a method image_part sees the image once, not at every step.
    hints: bits (B, C, H, W), 0 where unknown (hints.py), seen at every step by a network that was trained
    with hints. dtype: of the network's autocast (None: none); all else is float32.
    kernel_options: what the function of this name returned: kernels draw the noise and take the steps (other
    numbers for a seed than without them).
    """
    if sampler not in SAMPLERS or variance not in VARIANCES:
        raise ValueError(f"sampler is {' or '.join(SAMPLERS)}, variance {' or '.join(VARIANCES)}, not "
                         f"'{sampler}' and '{variance}'")
    if steps < 1 or len(seeds) != len(image):
        raise ValueError(f"at least 1 step and one seed an image are needed, not {steps} and {len(seeds)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1 (1: ignore init), not {strength}")
    if smooth < 0:
        raise ValueError(f"smooth must be 0 (off) or a share of the image's side, not {smooth}")
    d, (B, _, H, W), device = diffusion, image.shape, image.device
    if kernel_options:
        keys, stream = torch.as_tensor(seeds, device=device), itertools.count()
    else:
        own = host_seed if device.type == "cpu" else int
        generators = [torch.Generator(device).manual_seed(own(int(s))) for s in seeds]

    def autocast():  # no cache of cast weights: a CUDA graph must not find what lay there before
        return torch.autocast(device.type, dtype, cache_enabled=False) if dtype else contextlib.nullcontext()

    def noise():
        if kernel_options:
            return kernels.normal(keys, channels, H, W, next(stream))
        return torch.stack([torch.randn(channels, H, W, generator=g, device=device) for g in generators])

    times = torch.linspace(strength if init is not None else 1, 0, steps + 1, dtype=torch.float64)
    lam, (alpha, sigma) = logsnr(times, d).tolist(), (v.tolist() for v in alpha_sigma(times, d))
    mask = valid[:, None]  # (B, 1, H, W)
    filters = edge_aware(image, valid, smooth) if smooth else None
    lines = as_lines(filters) if kernel_options and smooth else None

    xt, x_hat = noise(), torch.zeros(B, channels, H, W, device=device)
    if init is not None:
        xt = alpha[0] * init + sigma[0] * xt
    images = torch.cat([image, torch.zeros_like(image)]) if guidance else image  # both halves in one batch
    halves, once = len(images) // B, getattr(model, "image_part", None)
    hints = hint_channels(hints, d, (B, channels, H, W), device)
    hints = hints.repeat(halves, 1, 1, 1) if hints is not None else None
    with autocast():
        images, extra = (images, ()) if once is None else (None, (once(images),))

    for i in range(steps):
        x_self = x_hat.repeat(halves, 1, 1, 1) if d.self_condition > 0 else None
        xs = xt.repeat(halves, 1, 1, 1)
        t = torch.full((len(xs),), times[i].item(), device=device)
        with autocast():
            out = model(network_input(xs, images, x_self, hints), t, *extra)
        a, b, c = (0.0, 1.0, 0.0) if i == steps - 1 else SAMPLERS[sampler](alpha, sigma, lam, i, variance)
        if kernel_options:
            kind, w = (d.prediction, kernel_options["activation"]), guidance
            if smooth:
                out = kernels.step(out, xt, alpha[i], sigma[i], 0.0, 1.0, 0.0, valid, w, None, 0, *kind,
                                   clamp=False)
                out, kind, w = kernels.average(out, *lines), ("x", "none"), 0.0
            after, x_hat = kernels.step(out, xt, alpha[i], sigma[i], a, b, c, valid, w, keys, next(stream),
                                        *kind, with_x_hat=True)
        else:
            x_hat = to_x0(out, xs, alpha[i], sigma[i], d.prediction, activate)
            if guidance:
                x_hat = (1 + guidance) * x_hat[:B] - guidance * x_hat[B:]
            x_hat = (average(filters, x_hat * mask) if smooth else x_hat).clamp(-1, 1) * mask
            after = a * xt + b * x_hat + (c * noise() if c else 0)
        if callback:
            callback(i, times[i].item(), xt, x_hat)
        xt = after
    return x_hat


def edge_aware(image, valid, reach, colour=0.35):
    """Filters for `average`, along rows and columns. image (B, 3 d^2, H, W), normalised; valid (B, H, W).

    The weight of another pixel of the row is exp(-d): d grows by 1 for every `reach` of the longer side on
    the way, and by 1 for every `colour` that the image changes by. Weights sum to 1 over the valid pixels.
    This is normalised convolution in the domain transform (Gastal & Oliveira 2011).
    """
    def along(x, valid):  # the columns of x (B, 3, n, m): two scans, 1 / the sum of the weights, and `keep`
        n = x.shape[2]
        block = max(b for b in range(1, n + 1) if n % b == 0 and b * b <= n)
        change = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=1, keepdim=True) / colour
        keep = (-change - 1 / (reach * max(image.shape[-2:]))).exp()
        keep = F.pad(keep, (0, 0, 1, 1))  # (B, 1, n + 1, m): from pixel to pixel, 0 at the ends
        scans = []
        for order, factors in ((1, keep[:, :, :-1]), (-1, keep[:, :, 1:])):
            steps = factors.unflatten(2, (-1, block)).unbind(3)[::order]
            products = torch.stack([*itertools.accumulate(steps, torch.mul)][::order], dim=3)
            scans.append((order, steps, products))
        valid = valid[:, None].float()
        return scans, valid / weighted_sum(scans, valid).clamp(min=1), keep

    x = image.float().unflatten(1, (3, -1)).mean(2)  # (B, 3, H, W)
    return along(x.mT, valid.mT), along(x, valid)


def as_lines(filters):
    """Filters as kernels.average takes them: what is kept, and 1 / the sum, along rows and along columns."""
    (_, across, keep_across), (_, down, keep_down) = filters
    return (keep_across[:, 0].mT, across[:, 0].mT), (keep_down[:, 0], down[:, 0])


def weighted_sum(scans, x):
    """Sum over each column of x (B, C, n, m) with the weights exp(-d) of `edge_aware`, at each of its pixels.

    exp(-d) is a product over the steps of the way: two scans do it, y[i] = x[i] + keep[i] y[i - 1] and the
    same upwards. A scan takes all blocks of the column at once, then hands on from block to block.
    """
    out = -x  # each pixel counts in both scans
    for order, steps, products in scans:
        y = x.unflatten(2, products.shape[2:4]).clone()  # (B, C, n / block, block, m)
        rows, handed = y.unbind(3)[::order], torch.zeros_like(y[:, :, :, 0])
        for before, row, keep in zip(rows, rows[1:], steps[1:]):
            row.addcmul_(keep, before)
        whole = products.unbind(3)[::order][-1]  # through a block, (B, 1, n / block, m)
        ends, through, into = (v.unbind(2)[::order] for v in (rows[-1], whole, handed))
        for i in range(len(ends) - 1):
            torch.addcmul(ends[i], through[i], into[i], out=into[i + 1])
        out += y.addcmul_(products, handed[:, :, :, None]).flatten(2, 3)
    return out


def average(filters, x, times=12):
    """x (B, C, H, W), 0 where not valid, averaged along rows, then along columns, several times."""
    for _ in range(times):
        for scans, share, _ in filters:
            x = weighted_sum(scans, x.mT.contiguous()) * share
    return x
