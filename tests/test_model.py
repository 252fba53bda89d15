"""model.py: the paper's layout as golden lists, its layers against plain formulas, and what every network
must do."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import (
    SIZES,
    Attention,
    ResBlock,
    UNet,
    position_features,
    time_features,
)

MINI = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seen(size):
    """Channels of the image that a network sees."""
    return 3 * SIZES[size].get("detail", 1) ** 2


def randomised(module):
    """Zero-initialised layers hide everything behind them: random numbers instead."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5
    return module.eval()


@pytest.fixture(scope="module")
def paper():
    return UNet(9, 6, **SIZES["paper"])


def test_paper_has_38496262_parameters(paper):
    assert sum(p.numel() for p in paper.parameters()) == 38_496_262


def test_paper_layout(paper):
    """Channels of every residual block, width of every attention and where they run, in the order of the
    forward pass."""
    blocks, attention = [], []

    def note(m, inputs, out):
        if isinstance(m, ResBlock):
            blocks.append((inputs[0].shape[1], out.shape[1], out.shape[-1]))
        else:
            attention.append((m.heads, out.shape[1], out.shape[-1]))

    handles = [m.register_forward_hook(note) for m in paper.modules() if isinstance(m, (ResBlock, Attention))]
    with torch.no_grad():
        out = paper(torch.randn(1, 9, 32, 32), torch.rand(1))  # 32: a quarter of the paper's side
    for h in handles:
        h.remove()
    encoder = [(64, 64, 32)] * 3 + [(64, 128, 16)] + [(128, 128, 16)] * 2 + [(128, 128, 8)] * 3
    encoder += [(128, 256, 4)] + [(256, 256, 4)] * 2 + [(256, 256, 2)] * 3
    decoder = [(512, 256, 2)] * 4 + [(512, 256, 4)] * 3 + [(384, 256, 4)] + [(384, 128, 8)] + [(256, 128,
                                                                                                8)] * 3
    decoder += [(256, 128, 16)] * 3 + [(192, 128, 16)] + [(192, 64, 32)] + [(128, 64, 32)] * 3
    assert blocks == encoder + [(256, 256, 2)] * 2 + decoder
    assert attention == [(4, 256, 4)] * 3 + [(4, 256, 2)] * (3 + 1 + 4) + [(4, 256, 4)] * 4
    assert out.shape == (1, 6, 32, 32)


def test_time_features():
    t = [0.0, 0.3, 1.0]
    expected = [[f(x * 10 ** (-i / 32)) for f in (math.cos, math.sin) for i in range(32)] for x in t]
    assert torch.allclose(time_features(torch.tensor(t)), torch.tensor(expected), atol=1e-6)


def test_attention_by_hand():
    layer = randomised(Attention(64, 4))
    x = torch.randn(2, 64, 3, 5)  # not square: rows and columns differ
    p = dict(layer.named_parameters())
    tokens = F.group_norm(x, 32, p["norm.weight"], p["norm.bias"]).flatten(2)  # (B, C, N)
    qkv = p["qkv.weight"][:, :, 0, 0] @ tokens + p["qkv.bias"][:, None]
    q, k, v = qkv.split(64, dim=1)
    heads = []
    for h in range(4):
        a, b, c = (part[:, 16 * h : 16 * h + 16] for part in (q, k, v))  # (B, 16, N)
        heads.append(c @ (a.transpose(1, 2) @ b / 16**0.5).softmax(-1).transpose(1, 2))
    out = p["out.weight"][:, :, 0, 0] @ torch.cat(heads, 1) + p["out.bias"][:, None]
    assert torch.allclose(layer(x), x + out.view_as(x), atol=1e-5)


@pytest.mark.parametrize("c_out", [32, 64])  # same width: no 1x1 on the skip
def test_residual_block_by_hand(c_out):
    layer = randomised(ResBlock(32, c_out, 8))
    x, emb, p = torch.randn(2, 32, 4, 6), torch.randn(2, 8), dict(layer.named_parameters())
    h = F.silu(F.group_norm(x, 32, p["norm1.weight"], p["norm1.bias"]))
    # 32: any bias, any time
    h = F.conv2d(h, p["conv1.weight"], p.get("conv1.bias", torch.randn(32)), padding=1)
    time = F.linear(F.silu(emb), p["emb.weight"], p["emb.bias"]) if c_out == 64 else torch.randn(2, 32)
    h = h + time[:, :, None, None]
    h = F.silu(F.group_norm(h, 32, p["norm2.weight"], p["norm2.bias"]))
    h = F.conv2d(h, p["conv2.weight"], p["conv2.bias"], padding=1)
    skip = F.conv2d(x, p["skip.weight"], p["skip.bias"]) if c_out != 32 else x
    assert torch.allclose(layer(x, F.silu(emb)), skip + h, atol=1e-4)  # the caller applies emb's SiLU
    assert c_out == 64 or not {"skip.weight", "conv1.bias", "emb.weight"} & p.keys()


def plain_forward(net, x, t):
    """A two-level network of one block a level, written out layer by layer."""
    emb = F.silu(net.time[2](F.silu(net.time[0](time_features(t)))))
    a = net.stem(x)
    b = net.down[0].res(a, emb)
    c = net.down[1](b)  # stride 2
    d = net.down[2].attn(net.down[2].res(c, emb))
    h = net.middle[1].res(net.middle[0].attn(net.middle[0].res(d, emb)), emb)
    h = net.up[0].attn(net.up[0].res(torch.cat([h, d], 1), emb))
    h = net.up[1].attn(net.up[1].res(torch.cat([h, c], 1), emb))
    h = net.up[1].up(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    h = net.up[2].res(torch.cat([h, b], 1), emb)
    h = net.up[3].res(torch.cat([h, a], 1), emb)
    return net.head(F.silu(net.norm(h)))


def test_forward_layer_by_layer():
    net, x, t = randomised(UNet(9, 6, **MINI)), torch.randn(2, 9, 8, 12), torch.rand(2)
    assert torch.allclose(net(x, t), plain_forward(net, x, t), atol=1e-4)
    with_patch = randomised(UNet(9, 6, **MINI, patch=2))  # folded outside, the same inside
    folded = F.pixel_shuffle(plain_forward(with_patch, F.pixel_unshuffle(x, 2), t), 2)
    assert torch.allclose(with_patch(x, t), folded, atol=1e-4)


@pytest.mark.parametrize("size", [s for s in SIZES if s != "paper"])
def test_every_size_starts_at_zero_and_learns(size):
    net = UNet(6 + seen(size), 6, **SIZES[size])
    # the smallest image, not square
    out = net(torch.randn(2, 6 + seen(size), net.multiple, 2 * net.multiple), torch.rand(2))
    assert out.shape == (2, 6, net.multiple, 2 * net.multiple) and (out == 0).all()
    ((out - 1) ** 2).sum().backward()
    assert net.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size, mult", [(16, (1, 2, 2)), (32, (1, 2, 2, 2)), (64, (1, 2, 3, 4)),
                                        (128, SIZES["paper"]["mult"]), (256, (1, 1, 2, 2, 4, 4))])
def test_every_image_size_of_the_paper(size, mult):
    net = randomised(UNet(9, 6, 32, mult, 1, 2, 4))
    assert net.multiple == 2 ** (len(mult) - 1) and size % net.multiple == 0
    assert net(torch.randn(1, 9, net.multiple, net.multiple), torch.rand(1)).shape[-1] == net.multiple


def test_every_parameter_gets_a_gradient():
    net = randomised(UNet(9, 6, **MINI))
    net(torch.randn(1, 9, 8, 8), torch.rand(1)).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_samples_of_a_batch_do_not_mix():
    net, x, t = randomised(UNet(9, 6, **MINI)), torch.randn(3, 9, 8, 8), torch.rand(3)
    assert torch.allclose(net(x, t), torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)]),
                          atol=1e-4)
    assert not torch.allclose(net(x, t), net(x, 1 - t), atol=1e-2)  # t matters


def test_channels_last_in_and_out_is_the_same():
    net, x, t = randomised(UNet(9, 6, **MINI)), torch.randn(2, 9, 8, 8), torch.rand(2)
    assert torch.allclose(net(x, t), net(x.contiguous(memory_format=torch.channels_last), t), atol=1e-5)


def test_dropout_only_in_training():
    net, x, t = randomised(UNet(9, 6, **MINI, dropout=0.5)), torch.randn(1, 9, 8, 8), torch.rand(1)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("H,W", [(8, 9), (7, 8), (1, 1)])
def test_a_side_that_cannot_be_halved(H, W):
    with pytest.raises(ValueError, match=f"{H} x {W}.*multiples of 2"):
        UNet(9, 6, **MINI)(torch.randn(1, 9, H, W), torch.rand(1))


def test_a_width_that_cannot_be_normalised():
    with pytest.raises(ValueError, match="48.*32"):
        UNet(9, 6, **{**MINI, "width": 48})


def test_position_features_are_the_formula():
    features = position_features(3, 4, 2)
    assert features.shape == (1, 8, 3, 4)
    for i, (octave, kind) in enumerate(((0, math.cos), (1, math.cos), (0, math.sin), (1, math.sin))):
        for r, c in ((0, 0), (2, 3), (1, 2)):
            assert float(features[0, i, r, c]) == pytest.approx(kind(math.pi * 2**octave * (r + 0.5) / 3),
                                                                abs=1e-6)
            assert float(features[0, 4 + i, r, c]) == pytest.approx(kind(math.pi * 2**octave * (c + 0.5) / 4),
                                                                    abs=1e-6)


def test_a_network_with_position_knows_where_it_is():
    """On a constant input, away from the border, outputs of a network of convolutions are constant; with
    position they are not."""
    for name, knows in (("tiny", False), ("photo", True)):
        torch.manual_seed(0)
        net = UNet(6 + seen(name), 6, **{**SIZES[name], "attn": 0, "mult": (1,), "patch": 2})
        torch.nn.init.normal_(net.head.weight, std=0.1)
        # every second: the same place in a patch
        out = net(torch.ones(1, 6 + seen(name), 64, 64), torch.full((1,), 0.5))[0, :, 28:36:2, 28:36:2]
        assert bool(out.amax((1, 2)).sub(out.amin((1, 2))).max() > 1e-3) == knows


@pytest.mark.parametrize("name", SIZES)
def test_time_has_an_effect_wherever_it_has_weights(name):
    """What a normalisation takes away has gradients of rounding errors alone, some 1e-6 of its
    neighbours'."""
    torch.manual_seed(0)
    net = UNet(6 + seen(name), 6, **SIZES[name])
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.05)
    net(torch.randn(2, 6 + seen(name), 32, 32), torch.tensor([0.3, 0.6])).square().sum().backward()
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    assert any(block.emb is not None for block in blocks)
    for block in blocks:
        for p in () if block.emb is None else (block.emb.weight, block.emb.bias, block.conv1.bias):
            assert p.grad.abs().max() > 1e-4 * block.norm2.bias.grad.abs().max()
