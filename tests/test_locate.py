"""The location-aware palette of bits.py against a plain, slow version; and the palette `none`."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from bits import Codec, locate, random_cells


def locate_slow(labels, s):
    """One map (H, W), int64 -> cells (H, W), one segment after the other."""
    H, W = labels.shape
    size = {i: int((labels == i).sum()) for i in sorted(set(labels.ravel().tolist()) - {-1})}
    kept = sorted(size, key=lambda i: (-size[i], i))[: s * s]  # dicts: ascending labels
    labels = np.where((labels == -1) | np.isin(labels, kept), labels, kept[0] if kept else -1)
    out, free = np.full((H, W), -1), list(itertools.product(range(s), range(s)))
    for i in sorted(kept):
        rows, cols = np.nonzero(labels == i)
        half = Fraction(1, 2)  # exact: rounding cannot break ties
        p, q = ((Fraction(int(x.sum()), len(x)) + half) / n * s - half for x, n in ((rows, H), (cols, W)))
        cell = (round(p), round(q))  # half to even
        if cell not in free:
            cell = min(free, key=lambda c: (p - c[0]) ** 2 + (q - c[1]) ** 2)  # min: the first on ties
        free.remove(cell)
        out[labels == i] = cell[0] * s + cell[1]
    return out


def random_map(rng, H, W, n):
    """A label map with up to n ids: every other one pixel noise (all centroids collide), or nearest of n
    points."""
    if rng.random() < 0.5:
        return rng.integers(-1, n, (H, W))
    y, x = np.mgrid[:H, :W]
    points = rng.random((n, 2)) * (H, W)
    near = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    return np.where(rng.random((H, W)) < 0.1, -1, near)


# more ids than cells overflow; 11: the rgb grid, no power of two
@pytest.mark.parametrize("side,n", [(2, 9), (4, 10), (4, 40), (8, 60), (8, 100), (11, 140)])
# one pixel, one row, square, odd and wide
@pytest.mark.parametrize("H,W", [(1, 1), (1, 17), (16, 16), (13, 24)])
def test_locate_equals_brute_force(side, n, H, W):
    rng = np.random.default_rng(side * n + H)
    maps = np.stack([random_map(rng, H, W, n) for _ in range(4)])
    cells = locate(torch.from_numpy(maps), side).numpy()
    for cell, label in zip(cells, maps):
        assert (cell == locate_slow(label, side)).all()


def test_collisions_in_the_middle_go_to_the_first_of_the_nearest():
    ring = torch.tensor([4, 3, 2, 1, 0, 0, 1, 2, 3, 4])  # 5 squares about the centre, (1.5, 1.5)
    cells = locate(torch.maximum(ring[:, None], ring)[None], 4)[0]
    assert cells[5:, 4].tolist() == [10, 5, 6, 9, 1]  # half to even: (2, 2), then in raster order


def test_locate_merges_1030_segments_into_1024():
    labels = np.random.default_rng(0).permutation(np.arange(40 * 40) % 1030).reshape(40, 40)
    cells = locate(torch.from_numpy(labels)[None], 32)[0].numpy()
    assert len(np.unique(cells)) == 1024 and (cells == locate_slow(labels, 32)).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"])
def test_ids_of_any_integer_type(dtype):
    info = np.iinfo(dtype)
    ids = np.array([info.max, info.min, info.max - 1, 7], dtype)  # negative ids are segments, -1 is not
    rank = np.random.default_rng(0).integers(0, 4, (2, 9, 9))
    expected = [locate_slow(ids.astype(np.int64)[r], 4) for r in rank]
    assert (locate(torch.from_numpy(ids[rank]), 4).numpy() == expected).all()


def test_sparse_huge_ids_next_to_ignored_pixels():
    ids = np.array([-1, -(2**60), -2, 0, 2**60, 2**60 + 1])  # the last two are one float64
    rank = np.random.default_rng(1).integers(0, 6, (3, 8, 12))
    assert (locate(torch.from_numpy(ids[rank]), 4).numpy() == [locate_slow(ids[r], 4) for r in rank]).all()


def test_one_segment_and_none():
    labels = torch.full((2, 6, 6), -1)
    labels[1] = 9
    cells = locate(labels, 4)
    assert (cells[0] == -1).all() and (cells[1] == 10).all()  # p = (1.5, 1.5) -> (2, 2)


def test_an_image_gets_the_same_cells_in_any_batch():
    rng = np.random.default_rng(2)
    # 90: overflow at 4 x 4
    maps = torch.from_numpy(np.stack([random_map(rng, 12, 12, n) for n in (3, 9, 90, 40)]))
    assert torch.equal(locate(maps, 4), torch.cat([locate(m[None], 4) for m in maps]))


def test_none_palette_draws_distinct_codes_anew():
    labels = torch.randint(-1, 12, (200, 10, 10), generator=torch.Generator().manual_seed(0)) * 1000
    labels[labels == -1000] = -1
    cells = Codec(bits=4, palette="none").cells(labels, torch.Generator().manual_seed(0))
    pairs = [set(zip(a.flatten().tolist(), b.flatten().tolist())) for a, b in zip(labels, cells)]
    for p in pairs:  # one to one, ignored stay ignored
        assert len(p) == len({a for a, _ in p}) == len({b for _,
                                                        b in p}) and all((a == -1) == (b == -1) for a, b in p)
    assert {b for p in pairs for a, b in p if a == 0} == set(range(16))  # label 0 got every code at some time


def test_none_palette_merges_the_smallest_into_the_largest():
    labels = torch.tensor([[[1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6]]])  # 6 segments, 4 codes: 3 and 6 join 2
    order = torch.tensor([[7, 0, 5, 2]])
    for below in None, 7, 50:
        cells = random_cells(labels, order, below)[0, 0].tolist()
        assert cells == [0, 0, 7, 7, 7, 7, 5, 5, 2, 2, 7]


@pytest.mark.parametrize("labels",
                         [torch.zeros(4, 4).long(), torch.zeros(1, 4, 4), torch.zeros(0, 4, 4).long()])
def test_wrong_labels(labels):
    with pytest.raises(ValueError, match=r"integers of shape \(B, H, W\)"):
        locate(labels, 4)


def test_cells_of_the_codec_is_the_palette_grid():
    labels = torch.randint(-1, 30, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    assert (Codec(bits=6).cells(labels).numpy() == [locate_slow(m, 8) for m in labels.numpy()]).all()
