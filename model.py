"""The denoising network: an attention U-Net on (noisy bits, image), for any number of channels and any level
count.

What it is: one nn.Module, `UNet`, the table of its sizes, and `widened`, which fits weights to a network of
more bits. It maps (B, in_channels, H, W) and t in [0, 1] to (B, out_channels, H, W). What it is not: it knows
nothing of noise or losses (diffusion.py), nor what bits mean (bits.py).

Use it alone:
    from model import UNet, SIZES
    net = UNet(in_channels=9, out_channels=6, **SIZES["paper"])  # 6 noisy bits + RGB -> 6 bits
    out = net(torch.randn(2, 9, 128, 128), torch.rand(2))        # (2, 6, 128, 128)

Source: the network of "Towards Agnostic and Holistic Universal Image Segmentation with Bit Diffusion" (NLDL
2026), a descendant of the U-Nets of Ho et al. 2020 (DDPM) and Dhariwal & Nichol 2021. `paper` has exactly
38,496,262 parameters with 9 channels in and 6 out.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

try:
    import kernels  # GroupNorm and SiLU as one, on CUDA; this file works without the folder
    kernels = kernels if hasattr(kernels, "live") else None  # not another package of that name
except ImportError:
    kernels = None

# patch: pixels are folded p x p into channels before the first layer and unfolded after the last (1 = the
# paper).
# mult: one entry a level; blocks: residual blocks a level (the decoder has one more); attn: how many of the
# deepest levels have attention; heads: attention heads; groups: of the normalisation (32 = the paper);
# position: octaves of row and column that are added to the first layer's output (0 = the paper). detail: the
# network sees the image at this many times the label map's resolution, by convolutions of its own (1 = the
# paper: at the label map's).
# finer: channels of a last stage at half the patch, which sees the bits and the image once more (0 = the
# paper: no such stage).
SIZES = {  # at k = 6, RGB:  parameters
    "tiny":  dict(width=32, mult=(1, 2, 4),       blocks=1, attn=2, heads=4, patch=2),
    "photo": dict(width=64, mult=(1, 2, 2),       blocks=1, attn=2, heads=4, patch=4, groups=8, position=3,
                  detail=2, finer=48),
    "small": dict(width=64, mult=(1, 2, 3, 4),    blocks=2, attn=2, heads=4, patch=1),
    "paper": dict(width=64, mult=(1, 2, 2, 4, 4), blocks=3, attn=2, heads=4, patch=1),  # 38,496,262
}


def time_features(t, dim=64, max_period=10.0):
    """Cosines, then sines, of t * max_period^(-i / (dim/2)): (B,) in [0, 1] -> (B, dim), float32. t is not
    scaled."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_features(height, width, octaves, device=None):
    """Cosines and sines of pi, 2 pi, 4 pi, ... times row and column, each in (0, 1): (1, 4 * octaves, height,
    width).

    A cosine of octave j changes its sign where bit k/2 - 1 - j of a Gray code does.
    """
    freqs = math.pi * 2.0 ** torch.arange(octaves, device=device)[:, None]
    y, x = (freqs * (torch.arange(n, device=device) + 0.5) / n for n in (height, width))  # (octaves, n)
    y, x = torch.cat([y.cos(), y.sin()])[:, :, None], torch.cat([x.cos(), x.sin()])[:, None]
    return torch.cat([y.expand(-1, -1, width), x.expand(-1, height, -1)])[None]


def normed(norm, x, act=True):
    """A GroupNorm of x (B, C, H, W), then SiLU if act; by the kernel where kernels.norms says so."""
    if kernels is not None and kernels.norms(x.device):
        return kernels.norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, act)
    return F.silu(norm(x)) if act else norm(x)


class ResBlock(nn.Module):
    """GroupNorm -> SiLU -> conv -> + time -> GroupNorm -> SiLU -> dropout -> conv, plus a skip.

    With as many groups as channels there is no time and no bias before the second normalisation: it would
    take away what is added to a whole channel, and AdamW would turn the rounding errors that are left as
    gradients into full steps.
    """

    def __init__(self, c_in, c_out, c_emb, groups=32, dropout=0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=groups < c_out)
        self.emb = nn.Linear(c_emb, c_out) if groups < c_out else None
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))  # each block starts as the identity
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):  # emb: SiLU already applied
        h = self.conv1(normed(self.norm1, x))
        if self.emb is not None:
            h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(normed(self.norm2, h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, plus the input."""

    def __init__(self, channels, heads, groups=32):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        h, w = x.shape[-2:]
        qkv = self.qkv(normed(self.norm, x, act=False))
        q, k, v = rearrange(qkv, "b (n m c) h w -> n b m (h w) c", n=3, m=self.heads)
        y = attend(q, k, v)  # (B, heads, H*W, C/heads)
        return x + self.out(rearrange(y, "b m (h w) c -> b (m c) h w", h=h, w=w))


def attend(q, k, v):
    """softmax(q k^T / sqrt(C)) v of (B, heads, N, C). On a CPU by two matrix products, in half of the time
    that torch's function takes in bfloat16; not beyond 1024 places, whose N x N weights take memory."""
    if q.device.type != "cpu" or q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)
    weight = (q * q.shape[3] ** -0.5) @ k.mT
    return weight.float().softmax(-1).to(v.dtype) @ v


class UNet(nn.Module):
    """Attention U-Net. forward(x, t): (B, in_channels, H, W), (B,) in [0, 1] -> (B, out_channels, H, W).

    x is cat(xt, image[, hints][, x_self]). detail d: the image is one of (3, d H, d W) folded into 3 d^2
    channels (pixel_unshuffle); the first layer sees its mean over d x d, and `look` all of it. Raises
    ValueError for an H or W that the levels cannot halve (a multiple of patch * 2^(levels - 1) is needed),
    for a detail that is not a power of 2, and for finer without patch or detail.
    """

    def __init__(self, in_channels, out_channels, width, mult, blocks, attn, heads, patch=1, dropout=0.0,
                 groups=32, position=0, detail=1, finer=0):
        super().__init__()
        if width % groups or finer % groups:
            raise ValueError(f"width {width} and finer {finer} must be multiples of {groups}, the number of "
                             f"normalisation groups")
        if finer and (patch == 1 or detail == 1):
            raise ValueError(f"finer needs a patch and a detail of at least 2, not {patch} and {detail}")
        self.patch, self.detail, self.multiple = patch, detail, patch * 2 ** (len(mult) - 1)
        # xt, image, rest
        self.channels = [out_channels, 3 * detail**2, in_channels - out_channels - 3 * detail**2]
        self.parts = [n * patch**2 for n in (out_channels, 3, self.channels[2])]  # of the stem's input
        c_emb = 4 * width
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.stem = nn.Conv2d(sum(self.parts), width, 3, padding=1)
        self.look = looking(detail * patch, width, groups) if detail > 1 else None
        self.position = position
        self.place = nn.Conv2d(4 * position, width, 1) if position else None

        c, skips = width, [width]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):  # fine to coarse
            deep = level >= len(mult) - attn
            for _ in range(blocks):
                self.down.append(Stage(c, m * width, c_emb, heads if deep else 0, groups, dropout))
                c = m * width
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([Stage(c, c, c_emb, heads, groups, dropout),
                                     Stage(c, c, c_emb, 0, groups, dropout)])
        for level, m in reversed(list(enumerate(mult))):  # coarse to fine
            deep = level >= len(mult) - attn
            for i in range(blocks + 1):
                up = level > 0 and i == blocks
                self.up.append(Stage(c + skips.pop(), m * width, c_emb, heads if deep else 0, groups, dropout,
                                     up))
                c = m * width

        self.norm = nn.GroupNorm(groups, c)
        self.head = zero_init(nn.Conv2d(c, out_channels * patch**2, 3, padding=1))
        self.finer = Finer(c, in_channels - 3 * detail**2, width // 2, finer, out_channels, c_emb, patch // 2,
                           groups, dropout) if finer else None
        self.to(memory_format=torch.channels_last)  # convolutions are faster in NHWC

    def cast(self, x):
        """An input in the precision of a network that was converted, net.bfloat16(); under autocast, weights
        are float32 and the input stays as it is."""
        return x if self.stem.weight.dtype == torch.float32 else x.to(self.stem.weight.dtype)

    def image_part(self, image):
        """What is the same at every step of sampling: the stem's output for the image alone, (B, width, H/p,
        W/p), and what `finer` sees of it, (B, width/2, 2 H/p, 2 W/p) or None."""
        image = self.cast(image)
        mean = image.unflatten(1, (3, -1)).mean(2)  # (B, 3, H, W)
        h = F.conv2d(F.pixel_unshuffle(mean, self.patch), self.stem.weight.split(self.parts, 1)[1], padding=1)
        if self.look is None:
            return h, None
        fine = self.look[:-4](F.pixel_shuffle(image, self.detail))  # all but the last halving
        halve, norm, _, last = self.look[-4:]
        return h + last(normed(norm, halve(fine))), fine if self.finer else None

    def forward(self, x, t, image_part=None):  # given: x is without the image
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(f"image size {x.shape[-2]} x {x.shape[-1]}: this network halves "
                             f"{self.multiple} pixels "
                             f"down to 1, so both sides must be multiples of {self.multiple}")
        x = self.cast(x)
        emb = F.silu(self.time(time_features(t).to(self.stem.weight.dtype)))  # (B, 4 * width)
        # NHWC or NCHW, as the weights are: net.to(memory_format=torch.contiguous_format) is faster for bf16
        # on a CPU
        nhwc = self.stem.weight.is_contiguous(memory_format=torch.channels_last)
        if image_part is None and self.look is not None:
            xt, image, x_self = x.split(self.channels, 1)
            x, image_part = torch.cat([xt, x_self], dim=1), self.image_part(image)
        folded = F.pixel_unshuffle(x, self.patch).contiguous(  # (B, C p^2, H/p, W/p)
            memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        if image_part is None:
            h = self.stem(folded)
        else:
            rest = torch.cat(self.stem.weight.split(self.parts, 1)[::2], dim=1)
            h = F.conv2d(folded, rest, self.stem.bias, padding=1) + image_part[0]
        if self.place is not None:
            h = h + self.place(position_features(*h.shape[-2:], self.position, h.device).to(h.dtype))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb)
        out = F.pixel_shuffle(self.head(normed(self.norm, h)), self.patch)  # (B, out_channels, H, W)
        return out if self.finer is None else out + self.finer(h, x, image_part[1], emb)


class Stage(nn.Module):
    """A residual block, then attention (heads > 0), then nearest x2 upsampling with a convolution (up)."""

    def __init__(self, c_in, c_out, c_emb, heads, groups, dropout, up=False):
        super().__init__()
        self.res = ResBlock(c_in, c_out, c_emb, groups, dropout)
        self.attn = Attention(c_out, heads, groups) if heads else nn.Identity()
        self.up = nn.Conv2d(c_out, c_out, 3, padding=1) if up else None

    def forward(self, x, emb):
        x = self.attn(self.res(x, emb))
        return x if self.up is None else self.up(F.interpolate(x, scale_factor=2, mode="nearest"))


class Finer(nn.Module):
    """A stage at twice the resolution of the U-Net's last features h (B, c_in, h, w), zero at first.

    It sees them, the bits (B, c_bits, H, W), folded `fold` x `fold`, and the image (B, c_image, 2 h, 2 w); ->
    (B, c_out, H, W).
    """

    def __init__(self, c_in, c_bits, c_image, width, c_out, c_emb, fold, groups, dropout):
        super().__init__()
        self.fold = fold
        self.below, self.image = nn.Conv2d(c_in, width, 1), nn.Conv2d(c_image, width, 1)
        self.bits = nn.Conv2d(c_bits * fold**2, width, 3, padding=1)
        self.res = ResBlock(width, width, c_emb, groups, dropout)
        self.norm = nn.GroupNorm(groups, width)
        self.head = zero_init(nn.Conv2d(width, c_out * fold**2, 3, padding=1))

    def forward(self, h, bits, image, emb):
        x = self.bits(F.pixel_unshuffle(bits, self.fold)) + self.image(image)  # (B, width, H/fold, W/fold)
        x = self.res(x + F.interpolate(self.below(h), scale_factor=2, mode="nearest"), emb)
        return F.pixel_shuffle(self.head(normed(self.norm, x)), self.fold)


def looking(fold, width, groups):
    """Convolutions that halve an image (B, 3, fold h, fold w) down to (B, width, h, w), wider each time.
    Raises ValueError."""
    halvings = fold.bit_length() - 1
    if fold != 2**halvings:
        raise ValueError(f"detail x patch must be a power of 2, not {fold}")
    layers, c = [], 3
    for i in reversed(range(halvings)):
        layers += [nn.Conv2d(c, width >> i, 3, stride=2, padding=1), nn.SiLU()]
        c = width >> i
    return nn.Sequential(*layers[:-1], nn.GroupNorm(groups, width), nn.SiLU(),
                         zero_init(nn.Conv2d(width, width, 3, padding=1)))


def zero_init(module):
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def widened(weights, wide, bits):
    """weights in the shapes of wide, both a UNet's state_dict; channels that only wide has are zero. bits:
    where the narrow network's bits are in wide's."""
    out, narrow = dict(weights), len(bits)
    patch = len(weights["head.bias"]) // narrow  # layers at both ends fold each channel on its own
    most = len(wide["head.bias"]) // patch
    for name in [name for name in wide if weights[name].shape != wide[name].shape]:
        fold = patch // 4 if name.startswith("finer") else patch
        places, axis = bits, 0
        if name in ("stem.weight", "finer.bits.weight"):  # which see xt, the image, and more copies of bits
            image, axis = 3 * (name == "stem.weight"), 1
            copies = (weights[name].shape[1] // fold - image) // narrow
            starts = [0, *(image + k * most for k in range(1, copies))]
            places = [start + b for start in starts for b in bits]
            places[narrow:narrow] = range(most, most + image)
        at = torch.tensor([p * fold + q for p in places for q in range(fold)], device=wide[name].device)
        out[name] = torch.zeros_like(wide[name]).index_copy(axis, at, weights[name].to(wide[name]))
    return out
