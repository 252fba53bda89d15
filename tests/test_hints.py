"""Hints while the network learns: what is drawn, who chooses first, and that steps, resumed runs and sampling
see them."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_locate import random_map
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import train
from bits import Codec, finer_bits, hint_bits, locate, palette
from diffusion import Diffusion, draw, fused_training_loss, sample, training_loss
from engine import read, save_checkpoint
from model import SIZES, UNet, widened
from sources.hints import NUMBERS, draw_hints

pytestmark = pytest.mark.usefixtures("small")
QUICK = ("--device cpu --batch_size 4 --image_size 16 --eval_images 2 --steps 1 --log_every 1 --save_every "
         "2 --eval_every 4 "
         "--precision fp32 --hints 0.7").split()


def scene(B, size, n, seed=0):
    """Label maps (B, size, size) with up to n segments, and ignored pixels."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([random_map(rng, size, size, n) for _ in range(B)]))


def numbers(B, seed=0):
    return torch.rand(B, NUMBERS, generator=torch.Generator().manual_seed(seed))


# ---- the palette


def located(labels, hints, s):
    """One map (H, W), one segment after the other: cells (H, W)."""
    H, W = labels.shape
    ids = sorted(set(labels.ravel().tolist()) - {-1})
    first = [i for i in ids if (hints & (labels == i)).any()]
    size = {i: int((labels == i).sum()) for i in ids}
    kept = sorted(ids, key=lambda i: (i not in first, -size[i], i))[: s * s]
    largest = max(kept, key=lambda i: (size[i], -i)) if kept else None
    labels = np.where((labels == -1) | np.isin(labels, kept), labels, largest if kept else -1)
    out, free = np.full((H, W), -1), list(itertools.product(range(s), range(s)))
    for i in sorted(kept, key=lambda i: (i not in first, i)):
        rows, cols = np.nonzero((labels == i) & hints if i in first else labels == i)
        half = Fraction(1, 2)
        p, q = ((Fraction(int(x.sum()), len(x)) + half) / n * s - half for x, n in ((rows, H), (cols, W)))
        cell = (round(p), round(q))
        if cell not in free:
            cell = min(free, key=lambda c: (p - c[0]) ** 2 + (q - c[1]) ** 2)
        free.remove(cell)
        out[labels == i] = cell[0] * s + cell[1]
    return out


@pytest.mark.parametrize("side,n,share",
                         [(4, 6, 0.02), (4, 14, 0.02), (4, 40, 0.01), (8, 30, 0.05), (2, 12, 0.2)])
def test_hinted_segments_choose_first(side, n, share):
    labels = scene(6, 18, n, seed=n)
    hints = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < share
    cells = Codec(bits=2 * (side.bit_length() - 1)).cells(labels, hints=hints).numpy()
    assert (cells == [located(*pair, side) for pair in zip(labels.numpy(), hints.numpy())]).all()
    assert not torch.equal(torch.from_numpy(cells), locate(labels, side))
    assert torch.equal(locate(labels, side, hints=torch.zeros_like(hints)), locate(labels, side))


# ---- what is drawn


def test_drawn_hints_depend_on_the_sample_alone():
    labels, u = scene(8, 32, 12), numbers(8)
    labels[3] = -1
    labels[4] += 10 * (labels[4] >= 0)
    mask = draw_hints(labels, u, 0.8)
    assert mask.any() and not mask[labels < 0].any() and mask.dtype == torch.bool
    assert torch.equal(mask, torch.cat([draw_hints(labels[i : i + 1], u[i : i + 1], 0.8) for i in range(8)]))
    assert torch.equal(mask, draw_hints(labels, u, 0.8, below=700))  # nor on what labels there might be
    assert not draw_hints(labels, u, 0.0).any()
    x0 = torch.randn(8, 6, 32, 32)
    bits = hint_bits(x0, mask)
    bits, x0 = (v.permute(0, 2, 3, 1) for v in (bits, x0))
    assert torch.equal(bits[mask], x0[mask]) and not bits[~mask].any()


def grid(B, size=64, across=8):
    """Label maps of across x across equal squares."""
    axis = torch.arange(size) // (size // across)
    return (axis[:, None] * across + axis).expand(B, -1, -1)


def test_shares_and_numbers_of_drawn_hints():
    B = 800
    labels, u = grid(B), numbers(B)
    u[:, 1] = 0.5  # clicks alone
    mask = draw_hints(labels, u, 0.5)
    pixels = mask.view(B, 8, 8, 8, 8).sum((2, 4)).view(B, 64)  # of each square
    segments = (pixels > 0).sum(1)
    assert (segments > 0).float().mean() == pytest.approx(0.5, abs=0.05)
    counts = torch.bincount(segments[segments > 0], minlength=21) / (segments > 0).sum()
    expected = [np.log1p(1 / k) / np.log(21) for k in range(1, 21)]
    assert len(counts) == 21 and counts[1:] == pytest.approx(expected, abs=0.05)
    touched = (pixels > 0).float().sum(0) / (pixels > 0).sum()  # equal segments: none is preferred
    assert touched == pytest.approx(torch.full((64,), 1 / 64), rel=0.5)
    assert 1 <= pixels[pixels > 0].min() and pixels.max() <= 3 * 21  # 3 discs of 21 pixels at most


def test_larger_segments_are_chosen_by_the_root_of_their_area():
    labels = torch.zeros(1000, 20, 20, dtype=torch.int64)
    labels[:, :, 16:] = 1  # 320 and 80 pixels: 2 to 1
    u = numbers(1000)
    u[:, 1], u[:, 2] = 0.5, 0.0  # clicks, into one segment
    mask = draw_hints(labels, u, 1.0)
    assert (mask & (labels == 0)).any((1, 2)).float().mean() == pytest.approx(2 / 3, abs=0.04)
    assert ((mask & (labels == 0)).any((1, 2)) ^ (mask & (labels == 1)).any((1, 2))).all()


def test_clicks_are_discs_that_prefer_the_middle():
    labels, u = torch.zeros(500, 40, 40, dtype=torch.int64), numbers(500)
    labels[:, :, 20:], labels[:, :, 25:] = 1, 2  # a strip of 5 between two halves
    u[:, 1], u[:, 3 + 512 : 3 + 512 + 20] = 0.5, 0.0  # one click each
    for mask in draw_hints(labels, u, 1.0):
        for i in range(3):
            y, x = (mask & (labels[0] == i)).nonzero(as_tuple=True)
            if len(y):
                middle = torch.tensor([y.float().mean(), x.float().mean()])  # none is wider than a disc
                assert len(y) <= 21 and (torch.stack([y, x]) - middle[:, None]).norm(dim=0).max() <= 3
    # the strip's middle column most often
    columns = (draw_hints(labels, u, 1.0) & (labels == 1)).sum((0, 1))[20:25]
    assert columns.argmax() == 2 and columns[2] > 1.2 * columns[[0, 4]].max()


def test_strokes_and_ellipses():
    labels, u = scene(60, 48, 5, seed=3), numbers(60)
    u[:, 2], u[:, 1] = 0.3, 0.1  # two segments; strokes
    clicks = u.clone()
    clicks[:, 1] = 0.5
    assert draw_hints(labels, u, 1.0).sum() > 1.5 * draw_hints(labels, clicks, 1.0).sum()
    u[:, 1], u[:, 2] = 0.95, 0.999  # ellipses, in every segment
    mask = draw_hints(labels, u, 1.0)
    for got, label in zip(mask.numpy(), labels.numpy()):
        want = np.zeros_like(got)
        for i in set(label.ravel()) - {-1}:
            here = label == i
            (top, bottom), (left, right) = ((v.min(), v.max() + 1) for v in np.nonzero(here))
            y, x = np.mgrid[:48, :48] + 0.5
            dy, dx = (y - (top + bottom) / 2) / (bottom - top), (x - (left + right) / 2) / (right - left)
            want |= here & (16 * (dy**2 + dx**2) <= 1 + 1e-6)
        assert (got == want).all()


# ---- the network


def test_both_losses_see_hints_before_the_first_guess(kernel_device):
    torch.manual_seed(0)
    codec, d = Codec(bits=4), Diffusion(hints=0.5, self_condition=0.5)
    labels = scene(3, 16, 6)
    mask = draw_hints(labels, numbers(3), 1.0).to(kernel_device)
    cells = codec.cells(labels.to(kernel_device), hints=mask)
    image, seeds = torch.randn(3, 3, 16, 16).to(kernel_device), torch.tensor([5, 6, 7]).to(kernel_device)
    x0, inputs, net = codec.encode(cells), [], UNet(4 + 3 + 4 + 4, 4, **SIZES["tiny"]).to(kernel_device)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    seen = lambda x, t: inputs.append(x) or net(x, t)
    drawn = draw((3, 4, 16, 16), d, torch.Generator().manual_seed(1), kernel_device)
    drawn["eps"] = kernels.normal(seeds, 4, 16, 16)
    bits = hint_bits(x0, mask)
    plain = training_loss(seen, x0, image, cells >= 0, d, codec.activate, drawn=drawn, hints=bits)
    fast = fused_training_loss(seen, cells, image, 4, seeds, d, drawn, codec.activate, codec.activation,
                               hints=bits)
    assert torch.allclose(plain, fast, rtol=1e-5) and len(inputs) == 4
    assert all(torch.equal(x[:, 7:11], bits) for x in inputs)
    none = training_loss(seen, x0, image, cells >= 0, d, codec.activate, drawn=drawn)
    assert not inputs[-1][:, 7:11].any() and none != plain
    with pytest.raises(ValueError, match="no input for hints"):
        training_loss(net, x0, image, cells >= 0, Diffusion(), codec.activate, drawn=drawn, hints=bits)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_sampling_sees_hints_at_every_step_in_both_halves(guidance):
    torch.manual_seed(0)
    image, valid = torch.randn(2, 3, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool)
    inputs, d = [], Diffusion(hints=0.5)
    net = UNet(4 + 3 + 4, 4, **SIZES["tiny"]).eval()
    torch.nn.init.normal_(net.head.weight, std=0.05)
    seen = lambda x, t: inputs.append(x) or net(x, t)
    hints = hint_bits(torch.randn(2, 4, 16, 16).sign(), torch.rand(2, 16, 16) < 0.1)
    x = sample(seen, image, valid, 4, [0, 1], d, torch.tanh, 3, guidance, hints=hints)
    assert len(inputs) == 3 and all(torch.equal(v[:, 7:], hints.repeat(len(v) // 2, 1, 1, 1)) for v in inputs)
    again = lambda hints, d=d: sample(net, image, valid, 4, [0, 1], d, torch.tanh, 3, guidance, hints=hints)
    assert torch.allclose(again(hints), x, atol=1e-4)  # by image_part
    nothing = again(None)
    assert torch.equal(nothing, again(torch.zeros_like(hints)))
    assert not torch.allclose(nothing, x, atol=1e-3)
    for bad, options, words in ((hints, Diffusion(), "no input for hints"),
                                (hints[:1], d, r"shape \(2, 4, 16, 16\)")):
        with pytest.raises(ValueError, match=words):
            again(bad, options)


@pytest.mark.parametrize("size", ["tiny", "photo"])
def test_a_widened_network_without_hints_is_the_one_it_came_from(size):
    torch.manual_seed(0)
    d = SIZES[size].get("detail", 1)
    old, new = (UNet(n * 6 + 3 * d**2, 6, **SIZES[size]).eval() for n in (1, 2))
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.05)  # what starts at zero would hide the rest
    new.load_state_dict(widened(old.state_dict(), new.state_dict(), list(range(6))))
    x, t = torch.randn(2, 6 + 3 * d**2, 32, 32), torch.rand(2)
    with torch.no_grad():
        true = old(x, t)
        assert true.abs().max() > 0.01 and torch.equal(new(torch.cat([x, torch.zeros(2, 6, 32, 32)], 1), t),
                                                       true)


def test_weights_on_the_host_are_widened_to_those_of_a_device():
    """Without one: fake tensors know no numbers, but which device they are on."""
    image = 3 * SIZES["photo"]["detail"]**2
    old, new = (UNet(n * k + image, k, **SIZES["photo"]).state_dict() for n, k in ((1, 6), (2, 8)))
    changed = [name for name in new if old[name].shape != new[name].shape]
    with FakeTensorMode():
        made = widened({name: torch.empty(v.shape) for name, v in old.items()},
                       {name: torch.empty(v.shape, device="cuda") for name, v in new.items()},
                       list(finer_bits(6, 8)))
    assert changed and all(made[name].shape == new[name].shape for name in new)
    assert {made[name].device.type for name in changed} == {"cuda"}


@pytest.mark.parametrize("size", ["tiny", "photo"])
def test_bits_that_are_added_change_nothing_at_first(size):
    torch.manual_seed(0)
    image, at = 3 * SIZES[size].get("detail", 1)**2, finer_bits(4, 8)
    old, new = (UNet(2 * k + image, k, **SIZES[size]).eval() for k in (4, 8))
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.05)
    new.load_state_dict(widened(old.state_dict(), new.state_dict(), at))
    x, t = torch.randn(2, 2 * 8 + image, 32, 32), torch.rand(2)
    x[:, 8 + image :, :16] = 0  # known here only
    with torch.no_grad():
        few = old(torch.cat([x[:, at], x[:, 8 : 8 + image], x[:, 8 + image :][:, at]], 1), t)
        many = new(x, t)
    assert few.abs().max() > 0.01 and torch.allclose(many[:, at], few, atol=1e-5)
    assert not many[:, [b for b in range(8) if b not in at]].any()


@pytest.mark.parametrize("few, many", [(2, 4), (4, 8), (6, 8)])
def test_a_finer_palette_has_the_coarser_ones_bits(few, many):
    coarse, fine = palette(2 ** (few // 2)), palette(2 ** (many // 2))
    times, side = 2 ** ((many - few) // 2), 2 ** (many // 2)
    for cell in range(side**2):
        row, col = divmod(cell, side)
        code = coarse[row // times * (side // times) + col // times]
        assert [fine[cell] >> b & 1 for b in finer_bits(few, many)] == [code >> b & 1 for b in range(few)]


# ---- train.py


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_pixel_weights(balance):
    cells = torch.full((2, 8, 8), 3)
    cells[0, :2, :2], cells[0, 7], cells[1] = 0, -1, 2
    weight = train.pixel_weights(cells, 4, balance)
    small, large = weight[0, 0, 0], weight[0, 6, 6]
    near = 5 * 5  # the segment's 2 x 2 pixels and three beside it, below and to the right
    assert torch.allclose(small / large, torch.tensor((52 / 4) ** balance))
    assert weight[0, 4, 4] == weight[0, 0, 4] == small and weight[0, 5, 0] == weight[0, 0, 5] == large
    assert torch.allclose(near * small + (56 - near) * large, torch.tensor(56.0)) and not weight[0, 7].any()
    assert torch.allclose(weight[1], torch.ones(8, 8))  # one segment alone
    one = Diffusion(loss="bce")
    drawn = draw((2, 2, 8, 8), one, torch.Generator().manual_seed(0))
    x0, image = torch.randn(2, 2, 8, 8).sign(), torch.zeros(2, 3, 8, 8)
    out = torch.randn(2, 2, 8, 8)
    loss = training_loss(lambda x, t: out, x0, image, weight, one, torch.tanh, drawn=drawn)
    each = -torch.nn.functional.logsigmoid(2 * x0 * out).sum(1) * weight
    by_hand = each.sum((1, 2)) / torch.tensor([56.0, 64.0])
    assert torch.allclose(loss, (drawn["weight"].flatten() * by_hand).mean())


def run(tmp_path, out, steps, *more):
    return train.main([*QUICK, "--max_steps", str(steps), "--out", str(tmp_path / out), "--cache",
                       str(tmp_path), *more])


def test_a_run_with_hints_resumes_exactly(tmp_path):
    steady = ("--decay_steps", "1")  # the same learning rates whatever max_steps
    assert [run(tmp_path, out, steps, *steady) for out, steps in (("one", 5), ("two", 3), ("two", 5))] == [0,
                                                                                                           0,
                                                                                                           0]
    one, two = (read(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert one["network"]["in_channels"] == 4 + 3 + 4 and one["diffusion"]["hints"] == 0.7
    lines = [map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) for name in ("one",
                                                                                                    "two")]
    a, b = ({line["step"]: line["loss"] for line in part if "loss" in line} for part in lines)
    assert a == b and len(a) == 5
    columns = one["net"]["stem.weight"][:, 7 * 4 :]  # patch 2: 4 of each channel
    assert columns.shape[1] == 16 and columns.abs().max() > 0


def test_init_takes_fewer_bits(tmp_path, capsys):
    assert run(tmp_path, "old", 1, "--hints", "0") == 0
    more = ("--init", str(tmp_path / "old/ckpt.pt"), "--bits", "6", "--balance", "0.5", "--kernels", "torch")
    assert run(tmp_path, "new", 1, *more) == 0
    out = capsys.readouterr().out
    assert "8 more input channels at zero, its 4 bits the high ones of 6" in out and "(for --balance)" in out
    assert run(tmp_path, "no", 1, *more, "--palette", "random") == 2
    assert "is another network" in capsys.readouterr().err
    assert run(tmp_path, "no", 1, *more[:2], "--bits", "2") == 2
    assert "is another network" in capsys.readouterr().err


def test_init_widens_and_refuses_other_meanings(tmp_path, capsys):
    assert run(tmp_path, "old", 2, "--hints", "0") == 0
    old = read(tmp_path / "old/ckpt.pt")
    assert run(tmp_path, "new", 1, "--init", str(tmp_path / "old/ckpt.pt"), "--lr", "0") == 0
    assert "4 more input channels at zero" in capsys.readouterr().out
    new = read(tmp_path / "new/ckpt.pt")["net"]["stem.weight"]
    assert torch.equal(new[:, :28], old["ema"]["stem.weight"]) and not new[:, 28:].any()
    assert run(tmp_path, "no", 1, "--init", str(tmp_path / "new/ckpt.pt"), "--hints", "0") == 2
    assert "--hints as it has them" in capsys.readouterr().err
    del old["diffusion"]["hints"]  # a checkpoint from before there were hints
    old["diffusion"]["self_condition"] = 0.5
    old["network"]["in_channels"] = 11
    save_checkpoint(tmp_path / "self.pt", old)
    for more in ([], ["--self_condition", "0.5"]):
        assert run(tmp_path, "no", 1, "--init", str(tmp_path / "self.pt"), *more) == 2
        err = capsys.readouterr().err
        assert "is another network" in err and err.count("\n") == 1
    assert run(tmp_path, "no", 1, "--encoding", "onehot") == 2
    assert "--hints are bits: use --encoding bits, not onehot" in capsys.readouterr().err
