"""tidy.py and merge.py against maps worked out by hand and brute force in plain Python; and that sample.py uses them, but never on a hint."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import checkpoint
import merge
import tidy as tidy_file
from bits import Codec
from diffusion import Diffusion
from formats import Item, fitted
from model import SIZES, UNet
from segment import Model, denoise, segment
from tidy import join, lab, learnt, log_odds, looks, tidy

GREY = np.zeros((8, 8, 3), np.uint8)
ALWAYS = dict(mean=np.zeros(36), scale=np.ones(36), w1=np.zeros((1, 36)), b1=np.zeros(1), w2=np.zeros((1, 1)), b2=np.full(1, 99.0))     # a network


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
    hinted = codec.decode(tidy(codec.encode(BEFORE[None]), codec, GREY, 3, 1.0, keep, ALWAYS))[0]              # all else joins
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


def pair_by_force(region, image, soft, a, b):
    """What the network sees of two segments, from their pixels and borders one by one."""
    look, (H, W) = looks(image), region.shape
    colour = lab(image / 255) / 20
    calm = np.stack([gaussian_filter(v, 1) for v in np.moveaxis(colour, 2, 0)], axis=2)
    far, border = np.pad(calm, ((1, 1), (1, 1), (0, 0)), "edge"), []
    for y in range(H):
        for x in range(W):
            for dy, dx in ((1, 0), (0, 1)):
                if y + dy < H and x + dx < W and {region[y, x], region[y + dy, x + dx]} == {a, b}:
                    border.append([np.linalg.norm(colour[y, x] - colour[y + dy, x + dx]),
                                   np.linalg.norm(far[y + 1 - dy, x + 1 - dx] - far[y + 1 + 2 * dy, x + 1 + 2 * dx]),
                                   np.linalg.norm(soft[y, x] - soft[y + dy, x + dx]) / 2])
    p, q = region == a, region == b
    apart = abs(look[p].mean(0) - look[q].mean(0))
    small, large = sorted([p.sum(), q.sum()])
    return np.concatenate([[np.linalg.norm(apart[:3]), abs(soft[p].mean(0) - soft[q].mean(0)).sum() / 2], apart, np.mean(border, axis=0),
                           np.log([len(border) / np.sqrt(small), large / region.size, small / region.size])]), len(border)


def joined_by_force(region, image, soft, together, least, kept):
    """Rounds of joining, looking at all pixels each time."""
    region, kept = region.copy(), set(kept)
    while True:
        ids = np.unique(region).tolist()
        touch = {(min(a, b), max(a, b)) for u, v in ((region[1:], region[:-1]), (region[:, 1:], region[:, :-1])) for a, b in zip(u.flat, v.flat) if a != b}
        score = {(a, b): together(pair_by_force(region, image, soft, a, b)[0][None])[0] for a, b in touch if not {a, b} <= kept}
        best = {a: max((v for pair, v in score.items() if a in pair), default=-np.inf) for a in ids}
        pick = [(a, b) for (a, b), v in score.items() if v > least and v == best[a] == best[b]]
        if not pick:
            return region
        for a, b in pick:
            region[region == b] = a
            kept |= {a} if b in kept else set()


@pytest.mark.parametrize("least", [-1.6, -2.2, -4.0])
def test_joining_against_brute_force(least):
    rng = np.random.default_rng(int(-10 * least))
    region = tidy_file.renumber(rng.integers(0, 40, (5, 4)).repeat(3, 0).repeat(3, 1))
    image = (rng.integers(0, 60, (5, 4, 3)).repeat(3, 0).repeat(3, 1) + rng.integers(0, 20, (15, 12, 3))).astype(np.uint8)
    soft, kept = rng.uniform(-1, 1, (15, 12, 6)), [2, 5, 6]

    def together(pairs):
        return -pairs[:, 0] * 2 - pairs[:, 1] / 3 - pairs[:, 30] - pairs[:, -1] / 9

    seen = []
    got = join(region, looks(image), soft, together, least, kept, lambda pairs, home, i, j: seen.append((pairs, home, i, j)))
    want = joined_by_force(region, image, soft, together, least, kept)
    assert all(len(np.unique(got[want == k])) == 1 for k in np.unique(want)) and len(np.unique(got)) == len(np.unique(want)) < region.max()
    pairs, home, i, j = seen[1]                                                    # once some are joined
    for row, a, b in zip(pairs, i, j):
        assert np.allclose(row, pair_by_force(home[region], image, soft, a, b)[0], atol=1e-9)


def test_the_network_is_what_torch_computes():
    net = learnt()
    model = torch.nn.Sequential(torch.nn.Linear(36, len(net["b1"])), torch.nn.SiLU(), torch.nn.Linear(len(net["b1"]), 1)).double()
    for p, name in zip(model.parameters(), ("w1", "b1", "w2", "b2")):
        p.data = torch.from_numpy(net[name])
    pairs = net["mean"] + net["scale"] * np.random.default_rng(0).normal(0, 1, (50, 36))
    pairs[:, -1] = np.log(tidy_file.USUAL)                                         # a segment of the usual size: no correction
    want = model(torch.from_numpy((pairs - net["mean"]) / net["scale"]).clamp(-6, 6))[:, 0].detach().numpy()
    assert np.allclose(log_odds(pairs, net), want)
    pairs[:, -1] -= 2
    assert np.allclose(log_odds(pairs, net) + 2 * tidy_file.SMALL,
                       model(torch.from_numpy((pairs - net["mean"]) / net["scale"]).clamp(-6, 6))[:, 0].detach().numpy())


def test_a_flat_region_in_pieces_joins_and_other_colours_do_not():
    codec, image = Codec(), np.full((40, 60, 3), (200, 60, 40), np.uint8)
    image[:, 30:] = 40, 90, 200
    image += np.random.default_rng(0).integers(0, 10, image.shape, dtype=np.uint8)
    cells = torch.zeros(1, 40, 60, dtype=torch.int64)
    cells[:, 15:, :30], cells[:, :, 30:], cells[:, 25:, 30:] = 8, 39, 47           # next to 0 and to 39 in the palette
    x = codec.encode(cells) * 0.5
    after = codec.decode(tidy(x, codec, image, merge=1.0))[0]
    assert len(after.unique()) == 2 and len(after[:, :30].unique()) == 1 and len(after[:, 30:].unique()) == 1
    assert torch.equal(tidy(x, codec, image, merge=1e-9), x)


def test_a_lost_file_is_named(tmp_path):
    (tmp_path / "b.npz").write_bytes(b"nothing")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            learnt(tmp_path / name)


# ---- merge.py


def test_what_people_put_together():
    rng = np.random.default_rng(0)
    region, maps = rng.integers(0, 4, (9, 7)), torch.from_numpy(rng.integers(-1, 3, (2, 9, 7)))
    for counts, labels in zip(merge.togetherness(region, maps), maps.numpy()):
        for a in range(4):
            for b in range(4):
                p, q = (labels[region == k][labels[region == k] >= 0] for k in (a, b))
                share = counts / counts.sum(1, keepdims=True)
                assert (share[a] * share[b]).sum() == pytest.approx((p[:, None] == q).mean())


def test_crops_are_shared_out_by_weight(tmp_path):
    items = []
    for k in range(3):                                                             # image k is of the colour 100 + k; above, its id is k, below 0
        Image.fromarray(np.full((24, 32), 100 + k, np.uint8)).save(tmp_path / f"{k}.png")
        items.append(Item(str(tmp_path / f"{k}.png"), ["map"], lambda item: [np.repeat([item.arg, 0], 12)[:, None].repeat(32, 1)], k))
    sets = [(items[:2], 3.0, dict(unlabelled="segment", components=False)), (items[2:], 1.0, dict(unlabelled="ignore", components=False))]
    drawn = list(merge.crops(sets, 8, 16, 0))
    value = [int(np.array(image)[0, 0, 0]) - 100 for image, _ in drawn]
    assert set(value[:2]) == {0, 1} and set(value[:6]) == {0, 1} and value[6:] == [2, 2]
    whole = [image.size == (32, 24) for image, _ in drawn]
    assert whole == [True, True, False, False, False, False, True, False]          # the first of each
    for k, (image, maps) in zip(value, drawn):
        h, w = maps.shape[1:]
        assert maps.shape == (1, *fitted(*image.size, 16)[::-1]) and (maps[0, 0] == k).all()
    assert (drawn[6][1][0, -1] == -1).all() and (drawn[0][1][0, -1] == 0).all()    # 0 is ignored in the second set alone


def test_merge_learns_colours_from_a_folder(tmp_path, capsys):
    """Two colours side by side, people part them: of the rough samples of a new network, pieces of one colour come together."""
    for kind in ("images", "labels"):
        (tmp_path / "two" / kind).mkdir(parents=True)
    truth = np.zeros((32, 32), np.uint8)
    truth[:, 16:] = 1
    for k in range(2):
        colours = np.random.default_rng(k).integers(0, 255, (2, 3), dtype=np.uint8)
        colours[1] = 255 - colours[0] // 2
        Image.fromarray(colours[truth]).save(tmp_path / "two/images" / f"{k}.png")
        Image.fromarray(truth + np.uint8(1)).save(tmp_path / "two/labels" / f"{k}.png")
    torch.manual_seed(0)
    net = UNet(7, 4, **SIZES["tiny"])
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    checkpoint.save(tmp_path / "ckpt.pt", dict(network=dict(in_channels=7, out_channels=4, **SIZES["tiny"]),
                    ema=net.state_dict(), codec=dict(bits=4), diffusion={}, image_size=16, dataset="two", step=0,
                    sampling=dict(steps=2, guidance=1.0, sampler="ddpm", variance="large")))
    words = ["--ckpt", str(tmp_path / "ckpt.pt"), "--dataset", f"{tmp_path / 'two'}:3,{tmp_path / 'two'}:1:ignore", "--crops", "4",
             "--out", str(tmp_path / "merge.npz"), "--n", "2"]
    assert merge.main(words) == 0
    before, after = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert max(before, after) < 0.5                                                # 0.69: not even the mean
    region, image = tidy_file.renumber(np.arange(32)[:, None] // 8 * 2 + truth), np.array(Image.open(tmp_path / "two/images/0.png"))
    score = functools.partial(log_odds, net=learnt(tmp_path / "merge.npz"))
    assert (tidy_file.renumber(join(region, looks(image), np.zeros((32, 32, 4)), score, 0.0)) == truth).all()
    assert merge.main(words) == 2 and "exists and is not overwritten" in capsys.readouterr().err


# ---- in sample.py


def test_answers_are_tidied_and_hints_are_not(monkeypatch):
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
    monkeypatch.setattr(tidy_file, "learnt", lambda: ALWAYS)
    model.tidy = dict(least=4, merge=1.0)
    assert len(model.codec.decode(segment(image, model, 1).x_hat).unique()) == 1
    hints = np.zeros((12, 16), np.int64)
    hints[2, 3], hints[9, 12], hints[9, 3] = 1, 2, 1
    labels = segment(image, model, 3, hints=hints).labels
    assert (labels[:, 2, 3] == labels[:, 9, 3]).all() and (labels[:, 2, 3] != labels[:, 9, 12]).all()


def test_colour_clusters_have_no_codes():
    with pytest.raises(ValueError, match="rgb cannot be tidied"):
        tidy(torch.zeros(1, 3, 8, 8), Codec("rgb"), GREY, least=2)
