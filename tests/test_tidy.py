"""tidy.py against maps worked out by hand and brute force in plain Python; and that sample.py uses it, but never on a hint."""

import numpy as np
import pytest
import torch
from PIL import Image

from bits import Codec
from diffusion import Diffusion
from model import SIZES, UNet
from segment import Model, denoise, segment
from tidy import BITS, COLOUR, distance, lab, tidy

GREY = np.zeros((8, 8, 3), np.uint8)


def flood(cells):
    """The 4-connected parts of equal cells, by brute force: a list of sets of (row, column)."""
    left, out = {(y, x) for y in range(cells.shape[0]) for x in range(cells.shape[1])}, []
    while left:
        first = min(left)
        part, edge = set(), [first]
        while edge:
            at = edge.pop()
            if at in left and cells[at] == cells[first]:
                left.remove(at)
                part.add(at)
                edge += [(at[0] + dy, at[1] + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        out.append(part)
    return out


# ---- small parts and parts of their own

BEFORE = torch.tensor([[0, 0, 0, 0, 0, 0, 5, 5],
                       [0, 7, 0, 0, 0, 0, 5, 5],                                   # a speck in 0, ...
                       [0, 0, 0, 0, 0, 0, 5, 5],
                       [0, 0, 9, 9, 9, 9, 9, 8],                                   # ... one with more of 9 around it than of 5
                       [9, 9, 9, 9, 9, 9, 9, 9],
                       [9, 9, 9, 9, 9, 9, 9, 9],
                       [0, 0, 0, 9, 9, 9, 0, 9],                                   # a second part of 0, and a speck of it in 9
                       [0, 0, 0, 9, 9, 9, 9, 9]])


def test_least_by_hand():
    codec, after = Codec(bits=4), BEFORE.clone()
    after[1, 1], after[3, 7], after[6, 6], after[6:, :3] = 0, 9, 9, 12             # 12: the lower left cell of 4 x 4
    x = codec.encode(BEFORE[None]) * 0.7
    got = tidy(x, codec, GREY, least=3)
    assert torch.equal(codec.decode(got)[0], after) and torch.allclose(got.abs(), torch.full_like(x, 0.7))
    assert torch.equal(got[:, :, BEFORE == after], x[:, :, BEFORE == after])
    assert torch.equal(tidy(got, codec, GREY, least=3), got)
    assert torch.equal(tidy(x, codec, GREY), x)
    wide = torch.zeros(1, 3, 8, dtype=torch.int64)                                 # the upper part of the palette's square
    wide[0, :, 4] = 5
    parted = codec.decode(tidy(codec.encode(wide), codec, GREY[:3], least=1))[0]
    assert (parted[:, :4] == 0).all() and (parted[:, 4] == 5).all() and (parted[:, 5:] == 3).all()     # in the first row of 4


def test_hints_stay_where_they_are():
    codec, keep = Codec(bits=4), torch.zeros(8, 8, dtype=torch.bool)
    keep[1, 1] = keep[7, 1] = True                                                 # the speck 7, and the lower part of 0
    after = BEFORE.clone()
    after[3, 7], after[6, 6] = 9, 9
    got = codec.decode(tidy(codec.encode(BEFORE[None]), codec, GREY, 3, keep=keep))[0]
    upper = got[0, 0]
    after[:4][BEFORE[:4] == 0] = upper                                             # the hint's part keeps the code, the larger moves
    assert torch.equal(got, after) and upper not in (0, 5, 7, 8, 9)
    hinted = codec.decode(tidy(codec.encode(BEFORE[None]), codec, GREY, 3, merge=99.0, keep=keep))[0]      # all else joins
    assert hinted[1, 1] == 7 and hinted[7, 1] == 0 and set(hinted.unique().tolist()) == {0, 7}


@pytest.mark.parametrize("encoding", ["bits", "onehot"])
@pytest.mark.parametrize("least", [1, 2, 6])
def test_least_leaves_nothing_small_and_nothing_apart(encoding, least):
    codec, g = Codec(encoding), torch.Generator().manual_seed(least)
    coarse = torch.randint(0, 8, (4, 6, 5), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    specks = torch.rand(coarse.shape, generator=g) < 0.1
    before = torch.where(specks, torch.randint(0, 64, coarse.shape, generator=g), coarse)
    after = codec.decode(tidy(codec.encode(before), codec, np.zeros((24, 20, 3), np.uint8), least))
    for old, new in zip(before.numpy(), after.numpy()):
        now = flood(new)
        home = {at: k for k, part in enumerate(now) for at in part}
        assert min(map(len, now)) >= least and len(np.unique(new)) == min(len(now), 64)        # a code each, while there are some
        assert all(len({home[at] for at in part}) == 1 for part in flood(old))     # what was one stays one


def test_a_map_smaller_than_a_part_and_a_crowd_beyond_the_codes():
    codec = Codec(bits=2)
    one = codec.encode(torch.full((1, 1, 3), 2))
    assert torch.equal(tidy(one, codec, GREY[:1, :3], 10, 1.0), one)
    assert len(codec.decode(tidy(codec.encode(torch.tensor([[[0, 1, 2]]])), codec, GREY[:1, :3], 10)).unique()) == 1
    board = torch.arange(6)[:, None].add(torch.arange(6)).remainder(2)[None]       # 36 parts, 4 codes
    assert len(codec.decode(tidy(codec.encode(board), codec, GREY[:6, :6], 1)).unique()) == 4


# ---- neighbours that look alike


def test_lab_golden():
    """CIE's values for sRGB white, black, red, green, blue and middle grey (Lindbloom)."""
    rgb = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    want = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [53.39, 0, 0]]
    assert np.allclose(lab(rgb), want, atol=0.1)


def test_distance_of_segments():
    a, b = np.zeros(9), np.zeros(9)
    a[3:], b[3:] = [1, 1, -1, -1, 1, 1], [1, 1, -1, -1, 1, -1]
    assert distance(a, b) == pytest.approx(1 / BITS)                               # one sure bit
    b[:3] = 30, 0, -40
    assert distance(a, b) == pytest.approx(1 / BITS + 50 / COLOUR)
    b[8] = 0.5                                                                     # a bit that is not sure
    assert distance(a, b) == pytest.approx(0.25 / BITS + 50 / COLOUR)


def merged_by_force(cells, looks, most):
    """The two nearest segments that touch, found by looking at all pixels each time, until none are nearer than `most`."""
    cells = cells.copy()
    while True:
        best = (most, None)
        for a in np.unique(cells):
            for b in np.unique(cells):
                here, there = np.pad(cells == a, 1), np.pad(cells == b, 1)
                if a < b and any((np.roll(here, step, axis) & there).any() for step in (-1, 1) for axis in (0, 1)):
                    x, y = looks[cells == a].mean(0), looks[cells == b].mean(0)
                    d = np.sqrt(((x[:3] - y[:3]) ** 2).sum()) / COLOUR + np.abs(x[3:] - y[3:]).sum() / 2 / BITS
                    best = min(best, (d, (a, b))) if d < best[0] else best
        if best[1] is None:
            return cells
        a, b = best[1]
        a, b = (a, b) if (cells == a).sum() >= (cells == b).sum() else (b, a)
        cells[cells == b] = a


@pytest.mark.parametrize("most", [1.0, 1.5, 2.5])
def test_merging_against_brute_force(most):
    codec, rng = Codec(), np.random.default_rng(int(10 * most))
    before = rng.integers(0, 64, (3, 5, 4)).repeat(3, 1).repeat(3, 2)
    image = (rng.integers(0, 60, (5, 4, 3)).repeat(3, 0).repeat(3, 1) + rng.integers(0, 20, (15, 12, 3))).astype(np.uint8)
    x = codec.encode(torch.from_numpy(before)) * torch.from_numpy(rng.uniform(0.2, 1, (3, 6, 15, 12)).astype(np.float32))
    after = codec.decode(tidy(x, codec, image, merge=most)).numpy()
    for old, new, soft in zip(before, after, x.permute(0, 2, 3, 1).numpy()):
        assert (new == merged_by_force(old, np.concatenate([lab(image / 255), soft], 2), most)).all()
    assert len(np.unique(after)) < len(np.unique(before))


# ---- in sample.py


def test_answers_are_tidied_and_hints_are_not():
    torch.manual_seed(0)
    net = UNet(7, 4, **SIZES["tiny"]).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.05 * torch.randn_like(p))                                    # the head is zero in a new network
    model = Model(net, Codec(bits=4), Diffusion(), 16, dict(steps=2, guidance=1.0, sampler="ddpm", variance="large"), "mine", 0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    rough = segment(image, model, 2)
    neat = segment(image, model, 2, least=4)
    assert max(len(flood(v)) for v in model.codec.decode(rough.x_hat).numpy()) > 16        # noise
    for cells in model.codec.decode(neat.x_hat).numpy():
        assert min(map(len, flood(cells))) >= 4
    job = next(denoise([image], model, 3, least=4))                                # their mean, too: it has specks of its own
    mean, consensus = (model.codec.decode(v[None])[0].numpy() for v in (torch.stack(job.x_hat).mean(0), job.consensus))
    assert min(map(len, flood(mean))) < 4 <= min(map(len, flood(consensus)))
    model.tidy = dict(least=4, merge=0.0)                                          # as a checkpoint says
    assert torch.equal(segment(image, model, 2).x_hat, neat.x_hat) and torch.equal(segment(image, model, 2, least=0).x_hat, rough.x_hat)
    model.tidy = dict(least=4, merge=9.0)
    assert len(model.codec.decode(segment(image, model, 1).x_hat).unique()) == 1
    hints = np.zeros((12, 16), np.int64)
    hints[2, 3], hints[9, 12], hints[9, 3] = 1, 2, 1
    labels = segment(image, model, 3, hints=hints).labels
    assert (labels[:, 2, 3] == labels[:, 9, 3]).all() and (labels[:, 2, 3] != labels[:, 9, 12]).all()


def test_colour_clusters_have_no_codes():
    with pytest.raises(ValueError, match="rgb cannot be tidied"):
        tidy(torch.zeros(1, 3, 8, 8), Codec("rgb"), GREY, least=2)
