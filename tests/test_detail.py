"""Networks that see the image at a multiple of the label map's resolution: the folded image all the way, and
what they make of it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import diffusion
import eval as evaluation
import frame
import kernels
import sample
import train
from answers.checkpoints import Model, load_checkpoint
from answers.jobs import packed_job, prepare
from answers.segment import segment
from bits import Codec
from model import SIZES, UNet, time_features
from sources.scenes import Shapes

MINI = dict(width=32, mult=(1, 2), blocks=1, attn=1, heads=2, patch=2, groups=8)


def network(detail, seed=0, looks=True, **options):
    """A network of 4 bits with nothing at zero, but for its own convolutions over the image if it does not
    look."""
    torch.manual_seed(seed)
    net = UNet(4 + 3 * detail**2, 4, **{**MINI, **options}, detail=detail).eval()
    for name, p in net.named_parameters():
        if p.ndim > 1 and (looks or not name.startswith("look")):
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.mark.parametrize("detail", [1, 2, 4])
def test_normalise_folds_the_image(detail):
    """Place by place against the image; beyond the label map's size it is 0."""
    image = torch.randint(0, 256, (2, 6 * detail, 6 * detail, 3), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    x, inside = frame.normalise(image, torch.tensor([[6, 4], [3, 6]]), detail)
    assert x.shape == (2, 3 * detail**2, 6, 6) and inside.sum((1, 2)).tolist() == [24, 18]
    for i, c, r, k in ((0, 0, 0, 0), (0, 2, 5, 3), (1, 1, 2, 5), (1, 0, 3, 0)):
        for a in range(detail):
            for b in range(detail):
                true = (float(image[i, r * detail + a, k * detail + b,
                                    c]) / 255 - frame.MEAN[c]) / frame.STD[c] if inside[i, r, k] else 0
                assert float(x[i, c * detail**2 + a * detail + b, r, k]) == pytest.approx(true, abs=1e-5)


@pytest.mark.parametrize("T, S, crop", [(32, 32, 0.5), (32, 16, 1.0), (40, 20, 0.4)])
def test_augment_shows_the_same_scene_in_more_detail(T, S, crop):
    """Colours are linear in the place, so that the mean over d x d is what detail 1 shows; labels are the
    very same."""
    axis = torch.arange(T, dtype=torch.uint8)
    images = torch.stack(torch.broadcast_tensors(6 * axis[:, None], 6 * axis, torch.tensor(90)), -1).repeat(5,
                                                                                                            1,
                                                                                                            1,
                                                                                                            1)
    labels = (torch.arange(T)[:, None] // 5 * 8 + torch.arange(T) // 5).repeat(5, 1, 1)
    sizes, u = torch.tensor([[T, T]]).repeat(5, 1), torch.rand(5, 20,
                                                               generator=torch.Generator().manual_seed(1))
    coarse, inside, new = data.augment(images, labels, sizes, u, S, crop, 0.0)
    fine, inside_too, new_too = data.augment(images, labels, sizes, u, S, crop, 0.0, detail=2)
    assert fine.shape == (5, 12, S, S) and torch.equal(inside, inside_too) and torch.equal(new, new_too)
    inner = ~F.max_pool2d((~inside).float(), 5, 1, 2).bool()  # at the border the image stands still
    inner[:, :2], inner[:, -2:], inner[:, :, :2], inner[:, :, -2:] = False, False, False, False
    mean = fine.unflatten(1, (3, 4)).mean(2)
    assert inner.any() and (mean - coarse).movedim(1, -1)[inner].abs().max() < 2e-3
    # and the four do differ
    assert fine.unflatten(1, (3, 4)).std(2)[:, :2].movedim(1, -1)[inner].min() > 1e-3


def test_coarser_takes_every_second():
    labels = torch.arange(64).view(1, 8, 8)
    small, sizes = frame.coarser(labels, torch.tensor([[8, 5]]), 2)
    assert small.tolist() == [[[8 * r + c for c in (1, 3, 5, 7)] for r in (1, 3, 5,
                                                                           7)]] and sizes.tolist() == [[4, 3]]
    assert torch.equal(frame.coarser(labels, sizes, 1)[0], labels)
    assert data.packed_side(80, 0.5) == 113 and data.packed_side(80, 0.5, 2) == 160


def test_before_it_looks_it_is_the_network_without_detail():
    """Its own convolutions end in zeros: then it sees the mean over d x d, with the same weights."""
    fine, plain = network(2, looks=False), network(1)
    plain.load_state_dict({k: v for k, v in fine.state_dict().items() if not k.startswith("look")})
    xt, image, t = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16), torch.rand(2)
    with torch.no_grad():
        out = fine(torch.cat([xt, F.pixel_unshuffle(image, 2)], 1), t)
        assert torch.allclose(out, plain(torch.cat([xt, F.avg_pool2d(image, 2)], 1), t),
                              atol=1e-5) and out.abs().max() > 1e-3


def test_it_sees_what_the_mean_does_not_show():
    net, xt, t = network(2), torch.randn(1, 4, 8, 8), torch.rand(1)
    image = torch.zeros(1, 3, 16, 16)
    image[..., ::2] = 1.0
    with torch.no_grad():
        # stripes: the same mean
        a, b = (net(torch.cat([xt, F.pixel_unshuffle(v, 2)], 1), t) for v in (image, 1 - image))
        assert (a - b).abs().max() > 1e-3
        part = net.image_part(F.pixel_unshuffle(image, 2))  # what `sample` computes once
        assert torch.allclose(net(xt, t, part), a, atol=1e-5)


def test_finer_starts_as_the_network_without_it():
    """The same numbers at first, but what its last layer learns depends on each bit and pixel, once or at
    every step."""
    net = network(2, finer=16)
    plain = network(2)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("finer")})
    x, t, head = torch.randn(2, 16, 8, 8), torch.rand(2), net.finer.head
    trained = head.weight.detach().clone()
    with torch.no_grad():
        torch.nn.init.zeros_(head.weight)
        assert torch.equal(net(x, t), plain(x, t))
        head.weight.copy_(trained)
        assert torch.allclose(net(x[:, :4], t, net.image_part(x[:, 4:])), net(x, t), atol=1e-5)
        assert (net(x, t) - plain(x, t)).abs().max() > 1e-3


def test_finer_by_hand():
    """patch 4, detail 2: bits folded 2 x 2, the image halved twice from 2 H, the U-Net's features doubled."""
    net = network(2, finer=16, patch=4)
    x, t, h = torch.randn(1, 16, 16, 16), torch.rand(1), []
    net.head.register_forward_pre_hook(lambda m, inputs: h.append(inputs[0]))
    net.norm.register_forward_pre_hook(lambda m, inputs: h.append(inputs[0]))
    with torch.no_grad():
        out, f = net(x, t), net.finer
        emb = F.silu(net.time(time_features(t)))
        image = F.silu(net.look[2](F.silu(net.look[0](F.pixel_shuffle(x[:, 4:], 2)))))  # (1, 16, 8, 8)
        below = h[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = f.bits(F.pixel_unshuffle(x[:, :4], 2)) + f.image(image) + f.below(below)
        y = F.silu(f.norm(f.res(y, emb)))
        want = F.pixel_shuffle(net.head(h[1]), 4) + F.pixel_shuffle(f.head(y), 2)
    assert h[0].shape == (1, 32, 4, 4) and image.shape == (1, 16, 8, 8) and torch.allclose(out, want,
                                                                                           atol=1e-5)


@pytest.mark.parametrize("options, words", [
    (dict(finer=16, detail=1), "finer needs a patch and a detail of at least 2, not 2 and 1"),
    (dict(finer=16, patch=1), "finer needs a patch and a detail of at least 2, not 1 and 2"),
    (dict(finer=12), "width 32 and finer 12 must be multiples of 8"),
])
def test_finer_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        UNet(16, 4, **{**MINI, "detail": 2, **options})


def test_details_that_cannot_be():
    with pytest.raises(ValueError, match="detail x patch must be a power of 2, not 6"):
        UNet(4 + 27, 4, **MINI, detail=3)
    cells, one, image = torch.zeros(2, 4, 5, dtype=torch.int64), torch.ones(2), torch.zeros(2, 15, 4, 5)
    with pytest.raises(ValueError, match=r"image must have shape \(2, 12, 4, 5\), not \(2, 15, 4, 5\)"):
        kernels.network_input(cells, one, one, one.long(), 4, image)


def test_the_loss_and_the_fused_loss_take_folded_images(kernel_device):
    torch.manual_seed(0)
    net, codec, d = network(2).to(kernel_device), Codec(bits=4), diffusion.Diffusion(image_drop=0.3)
    labels, image, seeds = (v.to(kernel_device) for v in (torch.randint(0, 5, (3, 8, 8)),
                                                          torch.randn(3, 12, 8, 8), torch.tensor([5, 6, 7])))
    cells = codec.cells(labels)
    drawn = diffusion.draw((3, 4, 8, 8), d, torch.Generator().manual_seed(1), kernel_device)
    drawn["eps"] = kernels.normal(seeds, 4, 8, 8)
    plain = diffusion.training_loss(net, codec.encode(cells), image, cells >= 0, d, codec.activate,
                                    drawn=drawn)
    fast = diffusion.fused_training_loss(net, cells, image, 4, seeds, d, drawn, codec.activate,
                                         codec.activation)
    assert torch.allclose(plain, fast, rtol=1e-5)
    plain.backward()
    assert net.look[0].weight.grad.abs().max() > 0


def test_edges_are_those_of_the_mean():
    image, x, valid = torch.randn(2, 3, 12, 12), torch.randn(2, 4, 6, 6), torch.ones(2, 6, 6).bool()
    folded, mean = F.pixel_unshuffle(image, 2), F.avg_pool2d(image, 2)
    a, b = (diffusion.average(diffusion.edge_aware(v, valid, 0.2), x) for v in (folded, mean))
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, x, atol=0.1)


def test_from_training_to_pictures(tmp_path, monkeypatch, capsys):
    """Shapes and a folder: train, sample, evaluate, click; what is drawn is at the photo's own size."""
    monkeypatch.setitem(SIZES, "tiny", dict(MINI, detail=2))
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(rng.integers(0, 256, (40, 54, 3),
                                         np.uint8)).save(root / "images" / split / f"{name}.png")
            label = np.arange(40 * 54).reshape(40, 54).astype(np.uint8) // 64 + 1
            Image.fromarray(label).save(root / "labels" / split / f"{name}.png")
    common = ("--preset tiny --device cpu --max_steps 2 --batch_size 2 --image_size 16 --eval_images 2 "
              "--steps 2 --cache").split() + [str(tmp_path / "cache")]
    for dataset, out in (("shapes", "a"), (f"{root},shapes", "b")):
        assert train.main([*common, "--dataset", dataset, "--crop", "0.5" if out == "b" else "1", "--out",
                           str(tmp_path / out)]) == 0
    ckpt = tmp_path / "b" / "ckpt.pt"
    assert load_checkpoint(ckpt).net.detail == 2
    files = ["--device", "cpu", "--ckpt", str(ckpt)]
    assert sample.main([str(root / "images" / "val" / "a.png"), "--n", "2", *files, "--out",
                        str(tmp_path / "s")]) == 0
    assert Image.open(tmp_path / "s" / "a" / "labels_01.png").size == (54, 40)
    more = [*files, "--dataset", str(root), "--n", "2", "--cache", str(tmp_path / "cache"), "--out",
            str(tmp_path / "e")]
    assert evaluation.main([*more, "--size", "32"]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["images"] == 3 and report["network"].keys() == report["32"].keys() == report["own"].keys()
    assert evaluation.main([*more[:-2], "--clicks", "0,1"]) == 0
    monkeypatch.setitem(SIZES, "tiny", MINI)
    assert train.main([*common, "--out", str(tmp_path / "a")]) == 2  # another network now: a sentence
    assert "was made with other options (in_channels 16 -> 7; detail 2 -> (none))" in capsys.readouterr().err


def test_a_sample_sees_the_photo_s_detail():
    """Two photos that are the same at the network's size, one with stripes: `segment` gives different soft
    bits."""
    model = Model(network(2), Codec(bits=4), diffusion.Diffusion(), 16,
                  dict(steps=2, guidance=1.0, sampler="ddpm",
                         variance="large", smooth=0.0), "shapes", 1)
    stripes = np.full((32, 32, 3), 100, np.uint8)
    stripes[:, ::2] = 200
    a, b = (segment(Image.fromarray(v), model, 1).x_hat for v in (stripes, stripes[:, ::-1].copy()))
    assert not torch.equal(a, b)
    flat = [Image.fromarray(np.full((32, 32, 3), 150, np.uint8))] * 2
    assert torch.equal(*(segment(v, model, 1).x_hat for v in flat))


def test_no_pixel_of_the_label_map_lacks_a_part_of_its_image(tmp_path):
    """100 x 53 is 16 x 10 at the network's size, and 32 x 18 at twice that: rows 18 and 19 must not be
    black."""
    model = Model(network(2), Codec(bits=4), diffusion.Diffusion(), 16, {}, "shapes", 1)
    white = Image.new("RGB", (100, 53), "white")
    job = prepare(white, model)
    assert job.size == (10, 16) and (job.image[:20] == 255).all() and (job.image[20:] == 0).all()
    assert job.photo.shape == (10, 16, 3) and (job.photo == 255).all()
    for kind, picture in (("images", white), ("labels", Image.new("L", (100, 53), 1))):
        (tmp_path / kind).mkdir()
        picture.save(tmp_path / kind / "a.png")
    dot = np.zeros((53, 100), np.uint8)
    dot[1, 1] = 1  # seen at 32 pixels, lost at 16
    white.save(tmp_path / "images/b.png"), Image.fromarray(dot).save(tmp_path / "labels/b.png")
    few = [len(data.load(str(tmp_path), "val", size, cache=tmp_path / "cache", unlabelled="ignore",
                         detail=d)) for size, d in ((100, 1), (100, 2), (32, 1))]
    assert few == [1, 1, 1]
    with pytest.raises(ValueError, match="no image that can be used"):
        data.load(str(tmp_path), "val", 16, cache=tmp_path / "cache", unlabelled="ignore", detail=2)
    (tmp_path / "images/b.png").unlink(), (tmp_path / "labels/b.png").unlink()
    load = lambda size, detail: data.load(str(tmp_path), "train", size, cache=tmp_path / "cache",
                                          detail=detail).get([0])
    (image, labels, sizes), (short, *_) = load(16, 2), load(32, 1)
    assert sizes.tolist() == [[10, 16]] and labels.shape == (1, 16, 16) and (labels[0, :10] == 0).all()
    assert (image[0] == torch.from_numpy(job.image)).all() and (short[0, 18:] == 0).all()


def test_one_pack_holds_images_and_labels_of_two_resolutions(tmp_path):
    """Beside a pack of detail 1: the same label maps and the same photos."""
    rng = np.random.default_rng(0)
    for kind, most, shape in (("images", 256, (75, 120, 3)), ("labels", 9, (75, 120))):
        (tmp_path / kind).mkdir()
        Image.fromarray(rng.integers(0, most, shape, np.uint8)).save(tmp_path / kind / "a.png")
    one, four = (data.load(str(tmp_path), "train", 16, cache=tmp_path / "cache", detail=d) for d in (1, 4))
    (image, labels, sizes), (large, *same) = one.get([0]), four.get([0])
    assert large.shape == (1, 64, 64, 3) and torch.equal(labels, same[0]) and torch.equal(sizes, same[1])
    job, plain = packed_job(four, 0), packed_job(one, 0)
    assert job.size == (10, 16) and (job.photo == plain.photo).all()
    assert (plain.photo == image[0, :10].numpy()).all() and (job.image == large[0].numpy()).all()


def test_shapes_are_drawn_once_for_both_resolutions():
    images, labels, sizes = Shapes("val", 16, detail=2).get([3])
    drawn, ids, _ = Shapes("val", 32).get([3])
    assert torch.equal(images, drawn) and torch.equal(labels, ids[:, 1::2, 1::2])
    assert sizes.tolist() == [[16, 16]]
