"""Hints, initial maps and what becomes of them: against loops, marginals and exact pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from answers.checkpoints import Model
from answers.jobs import prepare
from answers.prompts import boxes_by_id, hint_map, within_boxes
from answers.segment import denoise, joined, segment
from bits import Codec
from diffusion import Diffusion, alpha_sigma, sample
from frame import shrink
from model import SIZES, UNet

D = Diffusion()


def identity(out):
    return out


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# ---- the sampler


def trace(net, x0, **options):
    steps, (B, C, H, W) = [], x0.shape
    sample(net, torch.zeros(B, 3, H, W), torch.ones(B, H, W, dtype=torch.bool), C, list(range(B)), D,
           identity, guidance=0.0,
           callback=lambda i, t, xt, x_hat: steps.append((t, xt.clone(), x_hat.clone())), **options)
    return steps


def test_init_starts_at_its_noised_value():
    x0 = torch.randint(0, 2, (1, 4, 64, 64), generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    steps = trace(lambda x, t: torch.zeros_like(x[:, :4]), x0, init=x0, strength=0.3, steps=3)
    assert [t for t, _, _ in steps] == pytest.approx([0.3, 0.2, 0.1])
    alpha, sigma = (v.item() for v in alpha_sigma(0.3, D))
    assert torch.allclose(steps[0][1],
                          alpha * x0 + sigma * torch.randn(4, 64, 64,
                                                           generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="strength"):
        trace(identity, x0, init=x0, strength=0.0)


@pytest.mark.parametrize("in_channels", [7, 11])  # 11: with self-conditioning
def test_the_image_part_of_the_stem_is_the_same_seen_once(model, in_channels):
    torch.manual_seed(1)
    net = model.net if in_channels == 7 else UNet(11, 4, **SIZES["tiny"]).eval()
    with torch.no_grad():
        x, image, t = torch.randn(2, in_channels - 3, 16, 16), torch.randn(2, 3, 16, 16), torch.rand(2)
        whole = net(torch.cat([x[:, :4], image, x[:, 4:]], 1), t)
        assert torch.allclose(net(x, t, net.image_part(image)), whole, atol=1e-4)
        calls = []
        plain = lambda x, t: calls.append(x.shape[1]) or net(x, t)  # without image_part
        d = Diffusion(self_condition=0.5 if in_channels == 11 else 0.0)
        run = lambda f: sample(f, image, torch.ones(2, 16, 16, dtype=torch.bool), 4, [0, 1], d, torch.tanh, 3)
        assert torch.allclose(run(net), run(plain), atol=1e-4) and set(calls) == {in_channels}


# ---- from files and clicks to known pixels


@pytest.mark.parametrize("H,W,h,w", [(30, 41, 12, 16), (7, 5, 16, 11), (16, 16, 16, 16), (3, 90, 1, 16)])
def test_shrink_takes_the_most_frequent_id(H, W, h, w):
    ids = np.random.default_rng(0).choice([-1, 0, 0, 0, 3, 5, 70000], (H, W))
    small, rows, cols = shrink(ids, h, w), max(H, h), max(W, w)
    for r in range(h):
        for c in range(w):
            pixels = [ids[y * H // rows, x * W // cols] for y in range(rows) for x in range(cols)
                      if y * h // rows == r and x * w // cols == c]
            counts = {i: pixels.count(i) for i in pixels if i > 0}
            assert counts.get(small[r, c], 0) == max(counts.values(), default=0)


def test_a_hint_map_of_points_and_boxes():
    ids = hint_map(200, 100, "20,20 60,20;100,50", [(120, 20, 180, 80), (140, 40, 160, 60)])
    first, second = ids[20, 20], ids[50, 100]
    assert first == ids[20, 60] != second and 0 not in (first, second)
    # a disc of 0.5 % of 200 pixels
    assert ids[20, 21] == ids[19, 20] == first and ids[20, 22] == ids[19, 19] == 0
    outer, inner = ids[50, 136], ids[50, 150]
    assert len({first, second, outer, inner, 0}) == 5  # the small box lies over the large one
    assert ids[37, 150] == outer and ids[34, 150] == 0 and ids[38, 138] == 0  # an ellipse of half its size
    drawn = np.zeros((100, 200), np.int64)
    drawn[:, 190:] = 7
    ids = hint_map(200, 100, "189,50", drawn=drawn)
    assert ids[50, 190] == 7 and ids[50, 188] == 8  # what is drawn lies over discs
    near = hint_map(200, 100, "50,50;51,50")  # discs that would touch are smaller
    assert near[50, 50] != near[50, 51] and (near > 0).sum() == 2


def test_where_boxes_let_their_segments_lie():
    boxes = [(10, 5, 60, 45), (0, 0, 100, 50)]
    hints = hint_map(100, 50, "80,20", boxes)
    found = boxes_by_id(boxes)
    assert found == {1: (0, 0, 100, 50), 2: (10, 5, 60, 45)} and hints[25, 35] == 2 and hints[20, 80] == 3
    within = within_boxes(found, hints, 25, 50)  # at half the size
    for y, x in np.ndindex(25, 50):
        assert within[:, y, x].tolist() == [True, 10 <= 2 * x + 1 <= 60 and 5 <= 2 * y + 1 <= 45, True]
    drawn = np.zeros((50, 100), np.int64)
    drawn[0, 0] = 4
    assert boxes_by_id(boxes, drawn).keys() == {5, 6}


@pytest.mark.parametrize("points, boxes, words", [
    ("1,2,3", [], "x,y"), ("a,b", [], "x,y"), ("nan,1", [], "x,y"), ("inf,1", [], "x,y"),
    ("200,5", [], "outside"), ("-1,5", [], "outside"),
    ("5,5;5,5", [], "contradictory"), ("", [(0, 0, 50, 50), (0, 0, 50, 50)], "number 1 .* wholly under"),
    ("9,9", [(8, 8, 11, 11)], "number 1 .* wholly under"), ("", [(5, 5, 5, 9)], "box"),
    ("", [(0, 0, 201, 9)], "box")])
def test_wrong_hints_are_named(points, boxes, words):
    with pytest.raises(ValueError, match=words):
        hint_map(200, 100, points, boxes)


def test_prompts_that_do_not_fit_are_named(model):
    image, hints = picture(), np.zeros((30, 40), np.int64)
    result = segment(image, model, 1)
    with pytest.raises(ValueError, match="the hint has 40 x 31 pixels, but the image 40 x 30"):
        prepare(image, model, np.ones((31, 40), np.int64))
    with pytest.raises(ValueError, match="the hint has 40 x 31 pixels, but the image 40 x 30"):
        result.cut(hints=np.ones((31, 40), np.int64))
    with pytest.raises(ValueError, match="the initial map has 4 x 4 pixels"):
        prepare(image, model, init=np.ones((4, 4), np.int64))
    with pytest.raises(ValueError, match="empty"):
        prepare(image, model, hints)
    hints[0, :2] = 3, 4
    for use in (lambda: segment(image, model, 1, hints=hints), lambda: result.cut(hints=hints)):
        with pytest.raises(ValueError, match="contradictory hints: number [34] .*shares all its pixels with "
                                             "others"):
            use()
    with pytest.raises(ValueError, match="0 x 3"):
        prepare(Image.new("RGB", (0, 3)), model)
    hints = hint_map(40, 30, "20,10")
    assert (prepare(image, Model(None, Codec("rgb"), D, 16, {}, "mine", 0), hints).hints == hints).all()
    with pytest.raises(ValueError, match="encoding bits, not rgb"):
        prepare(image, Model(None, Codec("rgb"), D, 16, {}, "mine", 0), init=hints)


def test_of_more_hints_than_the_network_has_codes_it_sees_the_largest(model):
    """And the answer has them all."""
    knowing, side = replace(model, diffusion=Diffusion(hints=0.5)), 16
    many, small = np.kron(np.arange(1, 21).reshape(4, 5), np.ones((4, 3), int)), [3, 8, 14, 20]
    many = np.pad(many, ((0, 0), (0, 1)))  # 20 ids of 12 pixels
    many[np.isin(many, small) & (np.arange(side) % 3 != 1)] = 0  # four of them keep 4
    init = np.full((side, side), 5)
    job = prepare(picture(side, side), knowing, many, init)
    seen = (job.known != 0).any(0).numpy()
    assert (seen == ((many > 0) & ~np.isin(many, small))).all()
    cells = knowing.codec.decode(job.known[None])[0].numpy()
    assert len({(many[p], cells[p]) for p in zip(*np.nonzero(seen))}) == len(np.unique(cells[seen])) == 16
    answer = segment(picture(side, side), model, 1, hints=many, init=init).answer
    pairs = {(many[p], int(answer.labels[p])) for p in zip(*np.nonzero(many))}
    assert len(pairs) == len({label for _, label in pairs}) == 20


def test_hints_get_the_cells_of_their_centroids(model):
    """What a network that was trained with hints is told of them, and an initial map beside them."""
    knowing = replace(model, diffusion=Diffusion(hints=0.5))
    hints = np.zeros((32, 32), np.int64)
    hints[1:5, 1:5], hints[1:5, 25:31], hints[26:30, 2:6] = 9, 2, 400
    job, codec = prepare(picture(32, 32), knowing, hints), model.codec
    cells, small = codec.decode(job.known[None])[0], torch.from_numpy(shrink(hints, 16, 16))
    # corners of the 4 x 4 palette
    assert [int(cells[1, 1]), int(cells[1, 14]), int(cells[14, 2])] == [0, 3, 12]
    assert (job.known[:, small == 0] == 0).all() and (job.known[:, small > 0].abs() == 1).all()
    assert job.init is None
    plain = prepare(picture(32, 32), model, hints)
    assert plain.known is None and plain.init is None and (plain.hints == hints).all()
    init = np.full((32, 32), 3)
    init[:, :4], init[8:10] = 0, 5  # nothing is given at the left
    job = prepare(picture(32, 32), knowing, hints, init)
    cells, start = codec.decode(job.init[None])[0], torch.from_numpy(shrink(init, 16, 16))
    assert torch.equal((job.init != 0).all(0), (small > 0) | (start > 0))
    groups = [set(cells[m].tolist()) for m in (small == 9, small == 2, small == 400,
                                               (start == 3) & (small == 0),
                                               (start == 5) & (small == 0))]
    assert all(len(g) == 1 for g in groups) and len(set().union(*groups)) == 5  # a cell for each, none twice


@pytest.mark.parametrize("merge", [0.0, 1.0])
@pytest.mark.parametrize("size", [(40, 30), (150, 97), (7, 9)])
def test_hints_hold_to_the_pixel(model, merge, size):
    """Pixels of one hint are together and of two apart, in answers of every grain; closed: nothing else is
    left."""
    w, h = size
    hints = np.zeros((h, w), np.int64)
    hints[: h // 3, : w // 4], hints[2 * h // 3 :, w // 2 :] = 40, 7
    hints[-1, 0], hints[h // 2, w // 2 : w // 2 + 2] = 40, 1000  # a hint in two far places, and a small one
    model = replace(model, tidy=dict(least=0, merge=merge))
    result = segment(picture(w, h), model, n=2, hints=hints, grain="fine")
    answers = [result.answer] + [result.cut(grain, hints, closed) for grain in ("coarse", "fine",
                                                                                5) for closed in (False,
                                                                                                  True)]
    for k, answer in enumerate(answers):
        labels = answer.labels.numpy()
        found = [set(labels[hints == i].tolist()) for i in (7, 40, 1000)]
        assert [len(s) for s in found] == [1, 1, 1] and len(set().union(*found)) == 3
        assert labels.shape == (h, w) and sum(s["area"] for s in answer.segments) == h * w
        ids = {s["id"] for s in answer.segments}
        assert ids == set((labels + 1).flat) and {i for pair in answer.borders for i in pair[:2]} <= ids
        assert all(0 <= s["confidence"] <= 1 for s in answer.segments) and all(0 <= p <= 1 for *_,
                                                                               p in answer.borders)
        if k and k % 2 == 0:  # closed
            assert set(labels.flat) == set().union(*found)
    again = segment(picture(w, h), model, n=2, hints=hints, grain="fine")
    assert torch.equal(again.answer.labels,
                       result.answer.labels) and again.answer.segments == result.answer.segments


def test_a_click_into_a_segment_splits_it_and_grains_nest(model):
    result = segment(picture(64, 48), model, n=3)
    whole = result.cut(1)
    assert len(whole.segments) == 1 and not whole.borders
    two = result.cut(1, hint_map(64, 48, "10,10; 50,40"), closed=True)
    assert len(two.segments) == 2 and len(two.borders) == 1 and two.labels[10, 10] != two.labels[40, 50]
    three = result.cut(1, hint_map(64, 48, "10,10; 50,40; 55,5"), closed=True)
    assert len(three.segments) == 3
    counts = [len(result.cut(grain).segments) for grain in (2, 4, 8)]
    assert counts == sorted(counts) and counts[0] >= 2
    _, coarse = joined(result.evidence, model, 3)
    _, fine = joined(result.evidence, model, 7)
    assert all(len(set(coarse[fine == k])) == 1 for k in np.unique(fine))


@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
def test_borders_are_of_segments_that_the_answer_has(model, size):
    """Of photos smaller than the network's maps, which have more segments than the photo has room for."""
    answer = segment(picture(*size), model, n=2).cut(60)
    ids = {s["id"] for s in answer.segments}
    assert ids == set((answer.labels + 1).flatten().tolist()) and {i for pair in answer.borders
                                                                   for i in pair[:2]} <= ids
    assert sum(s["area"] for s in answer.segments) == size[0] * size[1]


def test_an_edited_region_is_held_exactly_and_the_rest_may_change(model):
    image = picture(64, 48)
    first = segment(image, model, n=1).labels[0].long().numpy() + 1
    edit = np.zeros_like(first)
    edit[10:20, 15:40] = 1  # one new segment, drawn by hand
    result = segment(image, model, n=3, seed=1, hints=edit, init=first, strength=0.5)
    assert len(result.answer.labels[10:20, 15:40].unique()) == 1
    job = prepare(image, model, edit, first)
    cells = model.codec.decode(job.init[None])[0][:12]  # the edit has a cell of its own
    small = torch.from_numpy(shrink(edit, 12, 16) > 0)
    assert not set(cells[small].tolist()) & set(cells[~small & (job.init != 0).all(0)[:12]].tolist())


def test_the_weaker_the_strength_the_more_of_init_is_left():
    """A network that knows nothing (x_hat = tanh of the noisy bits, amplified by what is left of the
    signal)."""
    codec = Codec(bits=4)
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.zeros(1))
    net.forward = lambda x, t: x[:, :4] * 5
    model = Model(net, codec, Diffusion(input_scale=1.0), 16,
                  dict(steps=4, guidance=0.0, sampler="ddpm", variance="small"), "mine", 0)
    init = np.arange(4).repeat(4)[None].repeat(16, 0) + 1
    kept = []
    for strength in (0.05, 0.5, 1.0):
        job = next(denoise([prepare(picture(16, 16), model, init=init)], model, 1, strength=strength))
        kept.append(float((codec.decode(job.x_hat[0][None]) == codec.decode(job.init[None])).float().mean()))
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2] and kept[2] < 0.2
