"""bits.py against golden tables, brute force in plain Python, and enumeration over all codes."""

import itertools

import numpy as np
import pytest
import torch

from bits import (
    Codec,
    confidence,
    dichotomy,
    entropy,
    gray,
    palette,
)

SIMILAR_16 = [0, 1, 3, 2, 4, 5, 7, 6, 12, 13, 15, 14, 8, 9, 11, 10]
GRAY_8 = [0, 1, 3, 2, 6, 7, 5, 4]


def distance(a, b):
    return bin(int(a) ^ int(b)).count("1")


# ------------------------------------------------------------------------------------------------- Gray code,


def test_gray_golden():
    assert [gray(i) for i in range(8)] == GRAY_8
    assert [gray(i) for i in range(16)] == [0, 1, 3, 2, 6, 7, 5, 4, 12, 13, 15, 14, 10, 11, 9, 8]


def test_similar_golden():
    assert palette(4).tolist() == SIMILAR_16
    grid = palette(8).reshape(8, 8).tolist()
    assert grid[0] == GRAY_8
    assert grid[1] == [8, 9, 11, 10, 14, 15, 13, 12]
    assert grid[7] == [32, 33, 35, 34, 38, 39, 37, 36]


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_similar_neighbours_differ_in_one_bit(side):
    grid = palette(side).reshape(side, side)
    for r, c in itertools.product(range(side), range(side - 1)):
        assert distance(grid[r, c], grid[r, c + 1]) == distance(grid[c, r], grid[c + 1, r]) == 1


@pytest.mark.parametrize("side", [2, 4, 8])
def test_different_is_the_greedy_snake(side):
    walk, unused = [0], list(range(1, side * side))
    while unused:
        walk.append(max(unused, key=lambda code: (distance(code, walk[-1]), -code)))  # ties: the lowest code
        unused.remove(walk[-1])
    rows = [walk[r * side : (r + 1) * side][:: -1 if r % 2 else 1] for r in range(side)]
    assert palette(side, "different").tolist() == sum(rows, [])


def test_random_and_range():
    assert (palette(8, "random", seed=3) == np.random.default_rng(3).permutation(64)).all()
    assert palette(4, "range").tolist() == list(range(16))


@pytest.mark.parametrize("order", ["similar", "random", "different", "range"])
@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_palette_is_a_permutation(side, order):
    assert sorted(palette(side, order).tolist()) == list(range(side * side))


# ------------------------------------------------------------------------------------------------------------


def every_cell(codec):
    """Each cell once, padded by -1 to a (1, 33, n) map (33: an odd height)."""
    cells = torch.full((33 * (codec.classes // 33 + 1),), -1)
    cells[: codec.classes] = torch.arange(codec.classes)
    return cells.view(1, 33, -1)


@pytest.mark.parametrize("order", ["similar", "random", "different", "range", "none"])
@pytest.mark.parametrize("encoding", ["bits", "onehot"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8, 10])
def test_round_trip(bits, encoding, order):
    codec = Codec(encoding, bits, order)
    cells = every_cell(codec)
    x0 = codec.encode(cells)
    assert x0.shape[1] == codec.channels == (bits if encoding == "bits" else 2**bits)
    assert (x0.movedim(1, -1)[cells == -1] == 0).all()
    for scale in (1, 0.01):  # only the sign, or the order, counts
        assert torch.equal(codec.decode(scale * x0)[cells >= 0], cells[cells >= 0])


@pytest.mark.parametrize("order", ["similar", "random", "different", "range"])
def test_bits_encode_least_significant_first(order):
    cells = torch.tensor([[[0, 5, 63, -1]]])
    x0 = Codec("bits", 6, order, seed=4).encode(cells)[0, :, 0].T  # (4, 6)
    for cell, bits in zip((0, 5, 63), x0.tolist()):
        code = int(palette(8, order, 4)[cell])
        assert bits == [1.0 if code & 2**b else -1.0 for b in range(6)]
    assert x0[3].tolist() == [0.0] * 6


@pytest.mark.parametrize("bits", [2, 6, 10])
def test_decode_reads_the_signs_of_soft_bits(bits):
    x = torch.randn(2, bits, 5, 7, generator=torch.Generator().manual_seed(bits))
    x[0, :, 0, 0], x[1, 0, 1] = 0.0, -0.0  # zero is no set bit
    cell_of = {int(code): cell for cell, code in enumerate(palette(2 ** (bits // 2)))}
    want = [[[cell_of[sum(2**b for b, v in enumerate(x[i, :, r, c]) if v > 0)] for c in range(7)]
             for r in range(5)] for i in range(2)]
    codec = Codec(bits=bits)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        assert codec.decode(laid_out).tolist() == want and codec.decode(laid_out).dtype == torch.int64


def test_rgb_colours():
    free, located = Codec("rgb", palette="none"), Codec("rgb")
    assert (free.classes, located.classes, located.palette) == (125, 121, "random")
    for codec, code in ((free, range(125)), (located, np.random.default_rng(0).permutation(121))):
        colours = [[min(64 * d, 255) / 127.5 - 1 for d in (i // 25, i % 25 // 5, i % 5)] for i in map(int,
                                                                                                      code)]
        x0 = codec.encode(torch.arange(codec.classes)[None, None])[0, :, 0].T
        assert np.allclose(x0, colours, atol=1e-6)


def test_rgb_round_trip_up_to_names():
    codec = Codec("rgb")
    labels = torch.arange(5).repeat_interleave(32 * 6)[:900].view(1, 30, 30)  # 5 bands of at least 132 pixels
    found = codec.decode(codec.encode(codec.cells(labels)))
    assert len(set(zip(found.flatten().tolist(), labels.flatten().tolist()))) == 5


def test_dichotomy_stops_at_small_or_tight_clusters():
    rgb = torch.zeros(3, 8, 8)
    rgb[:, :2] = 200.0  # 16 pixels of white, 48 of black
    assert dichotomy(rgb).unique(return_counts=True)[1].sort().values.tolist() == [16, 48]
    assert (dichotomy(rgb / 25) == 0).all()  # all within 10 of their mean
    assert (dichotomy(rgb[:, 1:3]) == 0).all()  # half white, but only 16 < 20 pixels


@pytest.mark.parametrize("activation,expected", [
    ("none", lambda v: v), ("tanh", np.tanh), ("sigmoid", lambda v: 1 / (1 + np.exp(-v))),
    ("softmax", lambda v: np.exp(v) / np.exp(v).sum(1, keepdims=True))])
def test_activations(activation, expected):
    out = torch.randn(2, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    assert np.allclose(Codec("onehot", 4, activation=activation).activate(out), expected(out.numpy()),
                       atol=1e-6)


@pytest.mark.parametrize("wrong",
                         [dict(bits=5), dict(bits=0), dict(bits=12), dict(encoding="hex"),
                          dict(palette="nice"),
                                   dict(activation="relu"), dict(encoding="rgb", palette="different")])
def test_wrong_codec(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
        Codec(**wrong)


# ----------------------------------------------------------------------------------------------------- soft b


@pytest.mark.parametrize("k", [2, 6])
def test_eq3_by_enumeration_of_all_codes(k):
    x = torch.randn(2, k, 3, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    x[0, 0, 0, 0], x[1, :, 0, 1] = 1.0, -1.0  # certain bits: 0 log 0
    clamped = np.clip(x.numpy(), -1, 1)
    p = np.ones((2**k, 2, 3, 5))
    for code, b in itertools.product(range(2**k), range(k)):
        p[code] *= 1 - abs((1 if code >> b & 1 else -1) - clamped[:, b]) / 2
    assert np.allclose(p.sum(0), 1)
    assert np.allclose(confidence(x), p.max(0), atol=1e-6)
    assert np.allclose(entropy(x), -(p * np.log2(np.where(p > 0, p, 1))).sum(0), atol=1e-5)
