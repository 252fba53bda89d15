"""The noise: Philox against its published answers, the numbers' statistics, and the Triton kernel against
plain Python."""

import numpy as np
import pytest
import torch
from scipy import stats

import bits
import diffusion
import frame
import kernels

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton():
    kernels.use("triton")
    yield
    kernels.use("auto")


def seeds(*values):
    return torch.tensor(values, device=DEVICE)


def philox(counter, key):
    """Philox4x32-10 from the paper (Salmon et al. 2011, section 3.3), of Python's integers, or of uint64
    arrays."""
    (a, b, c, d), (k0, k1), M = counter, key, 2**32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q // M ^ b ^ k0, q % M, p // M ^ d ^ k1, p % M
        k0, k1 = (k0 + 0x9E3779B9) % M, (k1 + 0xBB67AE85) % M
    return a, b, c, d


def test_philox_known_answers():
    """The answers that the authors' library (Random123) publishes; they hold our plain Python to the
    standard."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def normals(seed, stream, channels, height, width):
    """What the documentation says of `kernels.normal` for one seed, in float64: (C, H, W), and the uniform
    numbers."""
    f = np.arange(height * width * channels)
    zero, M = np.zeros(len(f), np.uint64), 2**32
    words = np.stack(philox((f.astype(np.uint64) // 4, zero + np.uint64(stream), zero, zero),
                            (seed % M, (seed >> 32) % M))).astype(float)  # (4, n)
    u, angle = (words[f % 4 // 2 * 2, f] + 1) / M, 2 * np.pi * words[f % 4 // 2 * 2 + 1, f] / M
    x = np.sqrt(-2 * np.log(u)) * np.where(f % 2, np.sin(angle), np.cos(angle))
    place = lambda v: torch.from_numpy(v.reshape(height, width, channels)).permute(2, 0, 1)
    return place(x), place(u)


@pytest.mark.parametrize("seed, stream", [(0, 0), (-1, 2**31 - 1), (0x299F31D0A4093822, 7), (12345, 3)])
def test_every_number_is_where_the_documentation_says(seed, stream):
    x = kernels.normal(seeds(seed), 3, 5, 7, stream)[0].double().cpu()
    true, u = normals(seed, stream, 3, 5, 7)
    assert ((x - true).abs() < 2e-6 * true.abs().clamp(min=1) + 3e-4 * (u > 0.99999)).all()


def test_same_seed_same_noise_in_every_batch():
    s = seeds(5, 2**40, -3, 5)
    together = kernels.normal(s, 6, 7, 13, stream=2)
    apart = torch.cat([kernels.normal(s[i : i + 1], 6, 7, 13, stream=2) for i in range(4)])
    assert torch.equal(together, apart) and torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, kernels.normal(s, 6, 7, 13, stream=3))


def test_statistics():
    """3.1 million numbers on a GPU, 31,000 in the interpreter; bounds at 5 standard errors."""
    B, size = (32, 128) if DEVICE == "cuda" else (5, 32)
    x = kernels.normal(torch.arange(B, device=DEVICE), 6, size, size).double().cpu()
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(x.flatten()[:200_000].numpy(), "norm").pvalue > 1e-4
    # tails are there; 2^-32 ends them at 6.66
    assert (4.6 if DEVICE == "cuda" else 3.6) < x.abs().max() < 6.7

    def uncorrelated(a, b):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 / a.numel() ** 0.5

    for c in range(1, 6):
        uncorrelated(x[:, 0], x[:, c])  # channels
    uncorrelated(x[..., :-1], x[..., 1:])  # pixels
    uncorrelated(x[..., :-1, :], x[..., 1:, :])
    uncorrelated(x[:-1], x[1:])  # samples, of neighbouring seeds
    # streams
    uncorrelated(x, kernels.normal(torch.arange(B, device=DEVICE), 6, size, size, stream=1).double().cpu())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bits_, dtype",
                         [(6, torch.float32), (6, torch.bfloat16), (2, torch.float16), (10, torch.float32)])
def test_noise_is_alpha_x0_plus_sigma_eps(channels_last, bits_, dtype):
    cells = torch.randint(-1, 2**bits_, (2, 7, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alpha, sigma, s = torch.tensor([0.8, 0.1], device=DEVICE), torch.tensor([0.6, 0.99],
                                                                            device=DEVICE), seeds(3, 4)
    xt = kernels.noise(cells, alpha, sigma, s, bits_, 1, dtype=dtype, channels_last=channels_last)
    eps = torch.stack([normals(seed, 1, bits_, 7, 13)[0] for seed in (3, 4)]).to(DEVICE)
    true = alpha.view(-1, 1, 1, 1) * bits.Codec(bits=bits_).encode(cells) + sigma.view(-1, 1, 1, 1) * eps
    assert xt.dtype == dtype and xt.is_contiguous(memory_format=torch.channels_last if channels_last
                                                  else torch.contiguous_format)
    torch.testing.assert_close(xt.double(), true,
                               **{torch.float32: dict(rtol=1e-5, atol=2e-6),
                                  torch.float16: dict(rtol=1e-3, atol=1e-3),
                                                     torch.bfloat16: dict(rtol=8e-3, atol=1e-3)}[dtype])


@pytest.mark.parametrize("channels_last, dtype, x_self, detail", [
    (True, torch.bfloat16, "", 1), (True, torch.bfloat16, "given", 1), (True, torch.float32, "zeros", 1),
    (False, torch.float32, "given", 1), (False, torch.float32, "", 1), (True, torch.bfloat16, "", 2),
    (False, torch.float32, "given", 2)])
def test_network_input(channels_last, dtype, x_self, detail):
    """Against frame.normalise and diffusion.network_input; one image is dropped, one is padded, some are
    folded."""
    g = torch.Generator().manual_seed(0)
    cells = torch.randint(-1, 64, (2, 9, 9), generator=g).to(DEVICE)
    image, sizes = torch.randint(0, 256, (2, 9 * detail, 9 * detail, 3),
                                 generator=g).byte().to(DEVICE), torch.tensor([[9, 6], [4, 9]], device=DEVICE)
    alpha, sigma, keep, s = (torch.tensor(v, device=DEVICE) for v in ([0.8, 0.1], [0.6, 0.99], [True, False],
                                                                      [3, 4]))
    previous = torch.rand(2, 6, 9, 9, generator=g).to(DEVICE)
    normalised, _ = frame.normalise(image, sizes, detail)
    xt = kernels.noise(cells, alpha, sigma, s, 6)
    last = {"": None, "zeros": 0 * previous, "given": previous}[x_self]
    true = diffusion.network_input(xt, normalised * keep.view(-1, 1, 1, 1), last)
    out = kernels.network_input(cells, alpha, sigma, s, 6, normalised, keep,
                                last if x_self == "given" else None, bool(x_self), dtype=dtype,
                                channels_last=channels_last)
    other = normalised.contiguous(memory_format=torch.channels_last)  # as it comes it is NCHW
    assert out.dtype == dtype and other.stride() != normalised.stride()
    assert torch.equal(out, kernels.network_input(cells, alpha, sigma, s, 6, other, keep,
                                                  last if x_self == "given" else None, bool(x_self),
                                                  dtype=dtype, channels_last=channels_last))
    torch.testing.assert_close(out.float(), true, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=2e-6)
