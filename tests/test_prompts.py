"""Hints, initial maps and what the sampler makes of them: against loops, marginals and exact pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from bits import Codec
from diffusion import Diffusion, alpha_sigma, carry, sample
from model import SIZES, UNet
from segment import Model, denoise, hint_map, prepare, segment, shrink

D = Diffusion()


def identity(out):
    return out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = UNet(7, 4, **SIZES["tiny"]).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.05 * torch.randn_like(p))                                    # the head is zero in a new network
    return Model(net, Codec(bits=4), D, 16, dict(steps=2, guidance=1.0, sampler="ddpm", variance="large"), "mine", 0)


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# ---- the sampler


def trace(net, x0, **options):
    steps, (B, C, H, W) = [], x0.shape
    sample(net, torch.zeros(B, 3, H, W), torch.ones(B, H, W, dtype=torch.bool), C, list(range(B)), D, identity, guidance=0.0,
           callback=lambda i, t, xt, x_hat: steps.append((t, xt.clone(), x_hat.clone())), **options)
    return steps


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_known_pixels_are_x0_noised_for_their_time(sampler):
    x0 = torch.randint(0, 2, (1, 4, 64, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    hint = torch.zeros(1, 64, 64, dtype=torch.int64)
    hint[:, :, :40] = 1
    steps = trace(lambda x, t: torch.tanh(x[:, :4]), x0, known=(x0, hint), sampler=sampler, steps=5, resample=2)
    assert [round(t, 3) for t, _, _ in steps] == [1, 1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2]     # the last one is not repeated
    for t, xt, x_hat in steps:
        alpha, sigma = (v.item() for v in alpha_sigma(t, D))
        z = ((xt - alpha * x0) / sigma)[..., :40]                                  # 10,240 values
        assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.04 and abs((z * x0[..., :40]).mean()) < 0.05
        assert torch.equal(x_hat[..., :40], x0[..., :40])
    noises = [((xt - alpha_sigma(t, D)[0].item() * x0) / alpha_sigma(t, D)[1].item())[..., :40] for t, xt, _ in steps]
    assert all(abs((a * b).mean()) < 0.05 for a, b in zip(noises, noises[1:]))     # fresh at every step


def test_resampling_keeps_the_marginal():
    """With a network that knows x0, the posterior steps and the noise between them leave xt ~ N(alpha x0, sigma^2)."""
    x0 = torch.randint(0, 2, (1, 4, 64, 64), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    steps = trace(lambda x, t: x0, x0, steps=4, resample=3, variance="small")
    assert len(steps) == 3 * 3 + 1
    for t, xt, _ in steps:
        alpha, sigma = (v.item() for v in alpha_sigma(t, D))
        z = (xt - alpha * x0) / sigma                                              # 16,384 values
        assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and abs((z * x0).mean()) < 0.03


def test_init_starts_at_its_noised_value():
    x0 = torch.randint(0, 2, (1, 4, 64, 64), generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    steps = trace(lambda x, t: torch.zeros_like(x[:, :4]), x0, init=x0, strength=0.3, steps=3)
    assert [t for t, _, _ in steps] == pytest.approx([0.3, 0.2, 0.1])
    alpha, sigma = (v.item() for v in alpha_sigma(0.3, D))
    assert torch.allclose(steps[0][1], alpha * x0 + sigma * torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="strength"):
        trace(identity, x0, init=x0, strength=0.0)


def test_carry_is_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(3)
    x_hat, x0 = torch.rand(2, 4, 6, 7, generator=generator) * 2 - 1, torch.randint(0, 2, (2, 4, 1, 1), generator=generator) * 2.0 - 1
    x_hat = torch.where(torch.rand(2, 1, 6, 7, generator=generator) < 0.6, x_hat[:, :, :1, :1].sign(), x_hat)
    hint = torch.zeros(2, 6, 7, dtype=torch.int64)
    hint[:, 0, :2], hint[:, 3, 4], hint[1, 3, 4] = 1, 2, 0                         # the second image has one hint only
    x0 = (x0 * torch.where(hint == 2, -1, 1)[:, None]) * (hint > 0)[:, None]
    out, changed = carry(x_hat, x0, hint), 0
    for b in range(2):
        groups = [(hint[b] == g).nonzero().tolist() for g in (1, 2)]
        for y in range(6):
            for x in range(7):
                want, best = x_hat[b, :, y, x], 0.5
                for pixels in filter(None, groups):
                    middle = torch.stack([x_hat[b, :, r, c] for r, c in pixels]).mean(0)
                    like = float((x_hat[b, :, y, x] * middle).mean())
                    if like > best:
                        want, best = x0[b, :, pixels[0][0], pixels[0][1]], like
                if hint[b, y, x]:
                    want = x0[b, :, y, x]
                changed += not torch.equal(want, x_hat[b, :, y, x])
                assert torch.allclose(out[b, :, y, x], want)
    assert 10 < changed < 80


@pytest.mark.parametrize("in_channels", [7, 11])                                   # 11: with self-conditioning
def test_the_image_part_of_the_stem_is_the_same_seen_once(model, in_channels):
    torch.manual_seed(1)
    net = model.net if in_channels == 7 else UNet(11, 4, **SIZES["tiny"]).eval()
    with torch.no_grad():
        x, image, t = torch.randn(2, in_channels - 3, 16, 16), torch.randn(2, 3, 16, 16), torch.rand(2)
        whole = net(torch.cat([x[:, :4], image, x[:, 4:]], 1), t)
        assert torch.allclose(net(x, t, net.image_part(image)), whole, atol=1e-4)
        calls = []
        plain = lambda x, t: calls.append(x.shape[1]) or net(x, t)                 # without image_part
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
            pixels = [ids[y * H // rows, x * W // cols] for y in range(rows) for x in range(cols) if y * h // rows == r and x * w // cols == c]
            counts = {i: pixels.count(i) for i in pixels if i > 0}
            assert counts.get(small[r, c], 0) == max(counts.values(), default=0)


def test_a_hint_map_of_points_and_boxes():
    ids = hint_map(200, 100, "20,20 60,20;100,50", [(120, 20, 180, 80), (140, 40, 160, 60)])
    first, second = ids[20, 20], ids[50, 100]
    assert first == ids[20, 60] != second and 0 not in (first, second)
    assert ids[20, 24] == first and ids[20, 25] == 0                               # a disc of 2 % of 200 pixels
    outer, inner = ids[50, 136], ids[50, 150]
    assert len({first, second, outer, inner, 0}) == 5                              # the small box lies over the large one
    assert ids[37, 150] == outer and ids[34, 150] == 0 and ids[38, 138] == 0       # an ellipse of half its size
    drawn = np.zeros((100, 200), np.int64)
    drawn[:, 190:] = 7
    ids = hint_map(200, 100, "187,50", drawn=drawn)
    assert ids[50, 191] == 7 and ids[50, 186] == 8                                 # what is drawn lies over discs
    near = hint_map(200, 100, "50,50;53,50")                                       # discs that would touch are smaller
    assert near[50, 50] != near[50, 53] and near[50, 51] in (0, near[50, 50]) and near[50, 52] in (0, near[50, 53])


@pytest.mark.parametrize("points, boxes, words", [
    ("1,2,3", [], "x,y"), ("a,b", [], "x,y"), ("nan,1", [], "x,y"), ("inf,1", [], "x,y"), ("200,5", [], "outside"), ("-1,5", [], "outside"),
    ("5,5;5,5", [], "contradictory"), ("", [(5, 5, 5, 9)], "box"), ("", [(0, 0, 201, 9)], "box")])
def test_wrong_hints_are_named(points, boxes, words):
    with pytest.raises(ValueError, match=words):
        hint_map(200, 100, points, boxes)


def test_prompts_that_do_not_fit_are_named(model):
    image, hints = picture(), np.zeros((30, 40), np.int64)
    with pytest.raises(ValueError, match="40 x 31 pixels, but the image 40 x 30"):
        prepare(image, model, np.ones((31, 40), np.int64))
    with pytest.raises(ValueError, match="empty"):
        prepare(image, model, hints)
    hints[0, :2] = 3, 4
    with pytest.raises(ValueError, match="contradictory hints: id 3 shares|contradictory hints: id 4 shares"):
        prepare(image, model, hints)
    with pytest.raises(ValueError, match="20 ids in the hints are more than the 16"):
        prepare(image, model, np.arange(1, 41).reshape(1, 40).repeat(30, 0) // 2.001 + 1)
    with pytest.raises(ValueError, match="0 x 3"):
        prepare(Image.new("RGB", (0, 3)), model)
    with pytest.raises(ValueError, match="encoding bits, not rgb"):
        prepare(image, Model(None, Codec("rgb"), D, 16, {}, "mine", 0), hints)


def test_hints_get_the_cells_of_their_centroids(model):
    hints = np.zeros((32, 32), np.int64)
    hints[1:5, 1:5], hints[1:5, 25:31], hints[26:30, 2:6] = 9, 2, 400
    job = prepare(picture(32, 32), model, hints)
    cells = model.codec.decode(job.x0[None])[0]
    assert [int(cells[1, 1]), int(cells[1, 14]), int(cells[14, 2])] == [0, 3, 12]  # corners of the 4 x 4 palette
    assert (job.x0[:, job.hint == 0] == 0).all() and set(job.hint.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(job.held, torch.from_numpy(np.select([hints == 9, hints == 2, hints == 400], [0, 3, 12], -1)))


def test_an_edited_region_is_held_exactly_and_the_rest_may_change(model):
    image = picture(64, 48)
    first = segment(image, model, n=1).labels[0].long().numpy() + 1
    edit = np.zeros_like(first)
    edit[10:20, 15:40] = 1                                                         # one new segment, drawn by hand
    result = segment(image, model, n=3, seed=1, hints=edit, init=first, strength=0.5)
    for labels in (*result.labels, result.consensus):
        assert len(labels[10:20, 15:40].unique()) == 1
    other = prepare(image, model, edit, first)
    cells = model.codec.decode(other.x0[None])[0][:12]                             # the edit has a cell of its own
    assert not set(cells[other.hint[:12] > 0].tolist()) & set(cells[other.hint[:12] == 0].tolist())


def test_the_weaker_the_strength_the_more_of_init_is_left():
    """A network that knows nothing (x_hat = tanh of the noisy bits, amplified by what is left of the signal)."""
    codec = Codec(bits=4)
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.zeros(1))
    net.forward = lambda x, t: x[:, :4] * 5
    model = Model(net, codec, Diffusion(input_scale=1.0), 16, dict(steps=4, guidance=0.0, sampler="ddpm", variance="small"), "mine", 0)
    init = np.arange(4).repeat(4)[None].repeat(16, 0) + 1
    kept = []
    for strength in (0.05, 0.5, 1.0):
        job = next(denoise([picture(16, 16)], model, 1, init=init, strength=strength))
        kept.append(float((codec.decode(job.x_hat[0][None]) == codec.decode(job.x0[None])).float().mean()))
    assert kept[0] == 1 and kept[0] > kept[1] > kept[2] and kept[2] < 0.2


def test_simulated_clicks_lie_deep_in_the_largest_segments(model, monkeypatch):
    import scoring

    class Data:
        def get(self, positions):
            return torch.zeros(1, 16, 16, 3, dtype=torch.uint8), None, torch.tensor([[12, 16]])

        def maps(self, i):
            out = torch.full((2, 16, 16), -1)
            out[:, :12], out[0, 2:7, 9:14], out[1, 0, 0] = 4, 9, 3
            return out

    seen = []

    def answer(image, model, n, seed, hints, resample):
        seen.append((image.size, seed, hints))
        return type("Result", (), dict(labels=torch.zeros(n, 12, 16, dtype=torch.uint8), medoid=1))

    monkeypatch.setattr(scoring, "segment", answer)
    curve = scoring.clicks_curve(model, Data(), [5], [0, 1, 2, 8], n=2)
    assert list(curve) == [0, 1, 2, 8] and curve[2] == [[0.0, 0.0]]                # one segment for all: ARI 0
    assert {(size, seed) for size, seed, _ in seen} == {((16, 12), 5000)} and len(seen) == 2 * 4
    (none, one, two, all_), (_, _, tiny, _) = [h for _, _, h in seen[:4]], [h for _, _, h in seen[4:]]
    assert none is None and len(np.unique(one)) == 2 and np.array_equal(two, all_)
    y, x = np.argwhere(two == two[4, 11])[0]                                       # the middle of the small square
    assert two[4, 11] > 0 and (y, x) == (4, 11) and tiny[0, 0] > 0
