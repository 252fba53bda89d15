"""The plain PyTorch twins of the kernels: same arguments, same results, any device. They are what runs
without Triton.

They repeat in flat form what bits.py, diffusion.py and metrics.py say (the tests hold them to it), so that
this folder needs nothing but torch. Arguments are documented in __init__.py, which checks them.
"""

import math

import torch
import torch.nn.functional as F

WORD = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------------
# Codes


def gray_codes(bits):
    """Code of each cell of the 2D Gray palette, in raster order: (2^bits,) int64."""
    g = torch.arange(2 ** (bits // 2))
    g = g ^ (g >> 1)
    return (g[:, None] << bits // 2 | g).reshape(-1)


def encode(cells, bits, codes=None):
    """cells (B, H, W) -> x0 (B, K, H, W) float32: -1 or 1, least significant bit first; 0 where the cell is
    -1."""
    code = (gray_codes(bits) if codes is None else codes.long()).to(cells.device)[cells.long().clamp(min=0)]
    bit = code[:, None] >> torch.arange(bits, device=cells.device).view(1, bits, 1, 1) & 1
    return (2.0 * bit - 1) * (cells >= 0)[:, None]


def decode(x, valid=None, cell_of_code=None, soft=False, dtype=torch.int64):
    K = x.shape[1]
    table = gray_codes(K).argsort() if cell_of_code is None else cell_of_code
    weight = 2 ** torch.arange(K, device=x.device).view(1, K, 1, 1)
    cells = table.to(x.device)[((x > 0) * weight).sum(1)].to(dtype)
    cells = cells if valid is None else cells.masked_fill(~valid, -1)
    if not soft:
        return cells
    x = x.float().clamp(-1, 1)
    return cells, ((1 + x.abs()) / 2).prod(1), entropy(x)


def entropy(x):
    p = (1 + x) / 2
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(1) / math.log(2)


# ------------------------------------------------------------------------------------------------------------
# Noise


def philox(seeds, stream, calls):
    """Philox4x32-10 with key = seed, counter = (0 .. calls - 1, stream, 0, 0): four int64 (B, calls) of
    32-bit words."""
    c0 = torch.arange(calls, device=seeds.device).expand(len(seeds), calls)
    c1, c2, c3 = torch.full_like(c0, stream & WORD), torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = (seeds & WORD)[:, None], (seeds >> 32 & WORD)[:, None]
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps, but the 64 bits are those of the product
        c0 = (b >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (a >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = b, a  # their upper halves go with the next &
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def normal(seeds, channels, height, width, stream=0, dtype=torch.float32):
    n = channels * height * width
    words = philox(seeds, stream, -(-n // 4))
    out = torch.empty(len(seeds), -(-n // 4), 4, device=seeds.device)
    for i in (0, 2):  # Box-Muller
        r = (words[i].float() + 1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[i + 1].float() * (2 * math.pi / 2**32)
        out[..., i], out[..., i + 1] = r * angle.cos(), r * angle.sin()
    return out.flatten(1)[:, :n].view(-1, height, width, channels).permute(0, 3, 1, 2).to(dtype)


def noise(cells, alpha, sigma, seeds, bits, stream=0, codes=None, dtype=torch.float32, channels_last=True):
    alpha, sigma = alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1)
    xt = alpha * encode(cells, bits, codes) + sigma * normal(seeds, bits, *cells.shape[1:], stream)
    return in_layout(xt.to(dtype), channels_last)


def network_input(cells, alpha, sigma, seeds, bits, image, keep=None, x_self=None, self_condition=False,
                  stream=0, codes=None, dtype=torch.float32, channels_last=True):
    parts = [noise(cells, alpha, sigma, seeds, bits, stream, codes), image.float()]
    if keep is not None:
        parts[1] = parts[1] * keep.view(-1, 1, 1, 1)
    if self_condition:
        parts.append(torch.zeros_like(parts[0]) if x_self is None else x_self.float())
    return in_layout(torch.cat(parts, 1).to(dtype), channels_last)


def in_layout(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------
# Loss and sampler


def to_x0(out, xt, alpha, sigma, prediction, activation):
    out = out.float()
    if prediction == "x":
        return out.tanh() if activation == "tanh" else out
    return (xt.float() - sigma * out) / alpha if prediction == "eps" else alpha * xt.float() - sigma * out


def loss(out, cells, weight, prediction="x", activation="tanh", xt=None, alpha=None, sigma=None, codes=None,
         bce=False):
    if prediction != "x":
        alpha, sigma = alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1)
    x0, valid = encode(cells, out.shape[1], codes), cells >= 0
    error = F.softplus(-2 * x0 * out.float()) if bce else (to_x0(out, xt, alpha, sigma, prediction,
                                                                 activation) - x0) ** 2
    error = error.sum(1) * valid
    return weight.float() * error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def step(out, xt, alpha, sigma, a, b, c=0.0, valid=None, guidance=0.0, seeds=None, stream=0, prediction="x",
         activation="tanh", with_x_hat=False):
    B, K, H, W = xt.shape
    x_hat = to_x0(out[:B], xt, alpha, sigma, prediction, activation)
    if guidance:
        x_hat = (1 + guidance) * x_hat - guidance * to_x0(out[B:], xt, alpha, sigma, prediction, activation)
    x_hat = x_hat.clamp(-1, 1)
    if valid is not None:
        x_hat = x_hat * valid[:, None]
    after = a * xt.float() + b * x_hat
    if c:
        after = after + c * normal(seeds, K, H, W, stream)
    after = after.to(xt.dtype)
    return (after, x_hat) if with_x_hat else after


# ------------------------------------------------------------------------------------------------------------
# Label maps


def locate(labels, side, largest_first=False, dtype=torch.int64, labels_below=None):
    (B, H, W), K, device = labels.shape, side * side, labels.device
    index, n = merged(*compact(labels.reshape(B, -1)), K)  # (B, H*W), -1 = ignored
    pixel = torch.arange(H * W, device=device).expand(B, -1)
    counts, rows, cols = (table_of(index, n, w).long() for w in (None, pixel // W, pixel % W))  # (B, n)
    some = counts.clamp(min=1)  # the centroid p, in grid units, is
    a_row, a_col = (2 * rows + some) * side - some * H, (2 * cols + some) * side - some * W  # a / (2 some H)
    wanted = round_half_even(a_row, 2 * some * H) * side + round_half_even(a_col, 2 * some * W)

    order = torch.where(counts > 0, -counts if largest_first else -1, 1)
    turn = order.argsort(dim=1, stable=True)[:, : max(1, int((counts > 0).sum(1).max()))]
    grid, cell_of = torch.arange(K, device=device), torch.full_like(wanted, -1)
    r, c = grid // side, grid % side
    free = torch.ones(B, K + 1, dtype=torch.bool, device=device)  # column K: absent segments
    for who in turn.split(1, dim=1):  # (B, 1): all images at once
        # squared distance to every cell, less |p|^2, times some H W: (B, K)
        distance = (some.gather(1, who) * H * W * (r**2 + c**2)
                    - W * a_row.gather(1, who) * r
                    - H * a_col.gather(1, who) * c)
        nearest = distance.masked_fill(~free[:, :K], 2**63 - 1).argmin(1, keepdim=True)
        want, present = wanted.gather(1, who), counts.gather(1, who) > 0
        cell = torch.where(free.gather(1, want), want, nearest)
        cell_of.scatter_(1, who, torch.where(present, cell, -1))
        free.scatter_(1, torch.where(present, cell, K), False)
    return torch.where(index < 0, -1, cell_of.gather(1, index.clamp(min=0))).view(B, H, W).to(dtype)


def round_half_even(a, b):
    """a / b for integers, b positive and even, rounded to the nearest integer, halves to the even one."""
    up = (a + b // 2) // b
    return up - ((a + b // 2) % b == 0) * (up % 2)


def compact(flat):
    """Renumbers every row on its own, in ascending order: (B, N) ids -> (B, N) int64 in [0, n), -1 = ignored;
    and n."""
    value, order = flat.long().sort(1)
    fresh = torch.ones_like(value)
    fresh[:, 1:] = value[:, 1:] != value[:, :-1]
    fresh *= value != -1
    rank = torch.empty_like(value).scatter_(1, order, fresh.cumsum(1) - 1).masked_fill_(flat == -1, -1)
    return rank, max(1, int(rank.max()) + 1)


def merged(index, n, K):
    """In rows with more than K segments, the smallest ones become part of the largest: (B, N) in [-1, n), and
    n."""
    if n <= K:
        return index, n
    # (B, n); ties: the lowest first
    by_size = table_of(index, n).argsort(dim=1, descending=True, stable=True)
    same = torch.arange(n, device=index.device).expand(len(index), n)
    new = same.scatter(1, by_size[:, K:], by_size[:, :1].expand(-1, n - K))
    return compact(torch.where(index < 0, -1, new.gather(1, index.clamp(min=0))))


def table_of(index, n, weight=None):
    """Sum of the weights (1) at each index of each row: (B, N) in [-1, n) -> (B, n) float64."""
    key = torch.where(index < 0, n, index) + (n + 1) * torch.arange(len(index), device=index.device)[:, None]
    weight = None if weight is None else weight.reshape(-1).double()
    total = torch.bincount(key.view(-1), weight, minlength=len(index) * (n + 1))
    return total.view(len(index), n + 1)[:, :n].double()
