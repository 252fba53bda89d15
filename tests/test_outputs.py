"""What sample.py computes from samples and writes: against loops, pycocotools, the panoptic format's rules, colour vision."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

import diffusion
import sample
from bits import Codec
from diffusion import Diffusion
from metrics import scores
from model import SIZES, UNet
from pictures import colours, grid, outline, overlay, subsample
from sample import folder_names
from segment import Job, Model, denoise, own_size, segment, summarise


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = UNet(7, 4, **SIZES["tiny"]).eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.05 * torch.randn_like(p))                                    # the head is zero in a new network
    return Model(net, Codec(bits=4), Diffusion(), 16, dict(steps=2, guidance=1.0, sampler="ddpm", variance="large"), "mine", 0)


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """sample.py's command line with this network, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: model)

    def go(*arguments):
        try:
            return sample.main([*map(str, arguments), "--ckpt", "x.pt", "--device", "cpu"])
        except SystemExit as e:
            return e.code
    return go


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def samples(n=4, h=12, w=16, codec=Codec(bits=4)):
    """A Job with n soft samples of a few segments that differ from one another."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 5, (n, 3, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :h, :w]
    x = codec.encode(cells) * (0.4 + 0.6 * torch.rand(n, 4, h, w, generator=generator))
    return Job(None, (h, w), list(x)), cells


# ---- numbers


def test_own_size_with_an_image_is_joint_bilateral_upsampling():
    """Pixel by pixel; the image's edge lies between two network pixels."""
    array = np.full((24, 40, 3), (200, 60, 60), np.uint8)
    array[:, 22:] = (40, 90, 220)
    image, codec = Image.fromarray(array), Codec(bits=4)
    x = codec.encode((torch.arange(5) > 2).long()[None, None].expand(1, 3, 5) * 5)             # (1, 4, 3, 5): 8 x 8 pixels each
    x = x * torch.rand(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    mine = own_size(x[0], (3, 5), 40, 24, codec, image)
    small = np.asarray(image.resize((5, 3), Image.Resampling.BOX)) / 255
    big = np.asarray(image.filter(ImageFilter.GaussianBlur(0.2 * 8))) / 255
    for r in range(24):
        for c in range(40):
            y, z, soft = (r + 0.5) / 8 - 0.5, (c + 0.5) / 8 - 0.5, 0
            for i in range(round(y) - 1, round(y) + 2):
                for j in range(round(z) - 1, round(z) + 2):
                    k, m = min(max(i, 0), 2), min(max(j, 0), 4)
                    colour = ((big[r, c] - small[k, m]) ** 2).sum()
                    soft = soft + x[0, :, k, m] * np.exp(-((y - i) ** 2 + (z - j) ** 2) / (2 * 0.5**2) - colour / (2 * 0.1**2))
            score = [float(soft @ codec.table[cell]) for cell in (0, 5)]
            assert mine[r, c] == (0, 5)[int(np.argmax(score))]
    plain = own_size(x[0], (3, 5), 40, 24, codec)
    assert (mine == (torch.arange(40) >= 22) * 5).float().mean() > (plain == (torch.arange(40) >= 22) * 5).float().mean()


def slow_soft_bits(x, width, height, image):
    """(C, h, w) float64 -> (C, height, width): each pixel from its 3 x 3 network pixels, one by one."""
    (C, h, w), out = x.shape, np.zeros((len(x), height, width))
    if image is not None:
        small = np.asarray(image.resize((w, h), Image.Resampling.BOX)) / 255
        big = np.asarray(image.filter(ImageFilter.GaussianBlur(0.2 * max(width, height) / max(w, h)))) / 255
    for r, c in np.ndindex(height, width):
        y, z = (r + 0.5) * h / height - 0.5, (c + 0.5) * w / width - 0.5
        for i, j in np.ndindex(3, 3):
            i, j = round(y) + i - 1, round(z) + j - 1
            k, m = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
            if image is None:
                weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(z - j))
            else:
                far = ((y - i) ** 2 + (z - j) ** 2) / 0.5 + ((big[r, c] - small[k, m]) ** 2).sum() / 0.02
                weight = max(np.exp(-far), 1e-12)
            out[:, r, c] += weight * x[:, k, m]
    return out


@pytest.mark.parametrize("encoding", ["bits", "onehot"])
@pytest.mark.parametrize("width,height", [(31, 22), (5, 3), (1, 1), (6, 40), (70, 2)])
@pytest.mark.parametrize("with_image", [False, True])
def test_own_size_pixel_by_pixel(encoding, width, height, with_image, monkeypatch):
    """No allowed code is nearer, in strips of one row, too. The first map may not have its largest code."""
    monkeypatch.setattr("segment.STRIP", 1)
    g, codec = torch.Generator().manual_seed(width), Codec(encoding, 4)
    cells = torch.full((2, 7, 9), 3)
    cells[:, :3, :4], cells[1, 4:, 6:] = torch.randint(0, 16, (2, 3, 4), generator=g), 12
    x = codec.encode(cells) * torch.rand(2, 1, 7, 9, generator=g)
    x += 0.1 * torch.randn(x.shape, generator=g)
    among = [torch.tensor([0, 5, 6, 12]), codec.decode(x)[1].unique()]
    image = picture(width, height) if with_image else None
    mine = own_size(x, (7, 9), width, height, codec, image, among)
    assert mine.shape == (2, height, width) and mine.dtype == torch.uint8
    for k, choice in enumerate(among):
        soft = slow_soft_bits(x[k].double().numpy(), width, height, image)
        alike = np.einsum("cyx,kc->yxk", soft, codec.table[choice].double())
        rank = (mine[k][..., None] == choice).int().argmax(-1).numpy()
        assert set(mine[k].unique().tolist()) <= set(choice.tolist())
        best, chosen = alike.max(-1), np.take_along_axis(alike, rank[..., None], -1)[..., 0]
        assert (chosen >= best - 1e-5 * np.abs(best) - 1e-15).all()


def test_no_code_appears_between_two_others():
    codec = Codec(bits=6)
    x = codec.encode(torch.randint(0, 64, (1, 3, 5, 6), generator=torch.Generator().manual_seed(0))[0])
    cells = codec.decode(x)
    for k, labels in enumerate(own_size(x, (5, 6), 90, 77, codec)):
        assert set(labels.unique().tolist()) <= set(cells[k].unique().tolist())
    assert len(codec.decode(torch.nn.functional.interpolate(x, (77, 90), mode="bilinear"))[0].unique()) > len(cells[0].unique())


@pytest.mark.parametrize("encoding", ["bits", "onehot", "rgb"])
@pytest.mark.parametrize("width,height", [(40, 30), (1, 1), (7, 200), (16, 12)])
def test_all_encodings_and_shapes_are_summarised(encoding, width, height):
    codec = Codec(encoding, 4)
    job, _ = samples(2, codec=Codec(bits=4))
    x = codec.encode(torch.randint(0, 9, (2, 12, 16), generator=torch.Generator().manual_seed(0)))
    result = summarise(Job(None, (12, 16), list(x)), picture(width, height), codec)
    assert result.labels.shape == (2, height, width) and result.consensus.shape == result.boundary.shape == (height, width)
    assert (result.entropy is None) == (encoding != "bits") and sum(s["area"] for s in result.segments) == width * height
    assert sample.panel(picture(width, height), result, codec).ndim == 3


def test_medoid_agreement_and_confidence():
    job, cells = samples()
    result = summarise(job, picture(16, 12), Codec(bits=4))
    each = [[float(scores(a[None], b[None])["ari"]) for b in cells] for a in cells]
    means = [(sum(row) - 1) / 3 for row in each]
    assert result.agreement.tolist() == pytest.approx(means) and result.medoid == int(np.argmax(means))
    middle, others = cells[result.medoid], [c for j, c in enumerate(cells) if j != result.medoid]
    for s in result.segments:
        mask = middle == s["id"] - 1
        best = [max(float((mask & (o == i)).sum() / (mask | (o == i)).sum()) for i in o.unique()) for o in others]
        assert s["confidence"] == pytest.approx(np.mean(best))
    one = summarise(samples(1)[0], picture(16, 12), Codec(bits=4))
    assert one.medoid == 0 and one.agreement.isnan().all() and all(s["confidence"] is None for s in one.segments)


def test_consensus_is_the_vote_of_equally_sure_samples():
    codec, cells = Codec(bits=4), torch.tensor([0, 0, 5, 5, 5]).view(5, 1, 1).expand(5, 12, 16).clone()
    cells[2, :6] = 0                                                               # 3 of 5 for cell 0 in the upper half
    result = summarise(Job(None, (12, 16), list(codec.encode(cells) * 0.9)), Image.new("RGB", (16, 12)), codec)
    assert (result.consensus[:5] == 0).all() and (result.consensus[7:] == 5).all()
    p = 0.5 + 0.9 * (3 - 2) / 5 / 2                                                # of each of the two bits that differ
    sure = -(0.95 * np.log2(0.95) + 0.05 * np.log2(0.05))
    assert float(result.entropy[0, 0]) == pytest.approx(2 * sure - 2 * (p * np.log2(p) + (1 - p) * np.log2(1 - p)), abs=1e-4)


def test_boundary_is_the_share_of_samples():
    codec, cells = Codec(bits=4), torch.zeros(4, 12, 16, dtype=torch.int64)
    cells[:, :, 8:], cells[:3, 6:] = 3, 9                                          # all see the upper vertical, three the horizontal
    result = summarise(Job(None, (12, 16), list(codec.encode(cells))), Image.new("RGB", (160, 120)), codec)
    at = lambda y, x: float(result.boundary[y, x])
    assert at(20, 80) == 1 and at(100, 80) == 0.25 and at(60, 20) == 0.75 and at(20, 20) == at(100, 140) == 0
    assert 8 <= int((result.boundary[20] > 0.5).sum()) <= 12                       # a network pixel wide: 10
    again = summarise(Job(None, (12, 16), list(codec.encode((cells + 2) % 16))), Image.new("RGB", (160, 120)), codec)
    assert (again.boundary != result.boundary).float().mean() < 0.01               # whatever the numbers, but for corners


# ---- the same seed, whatever else


def test_a_seed_gives_the_same_x_hat_whatever_the_order_and_number_of_images(model):
    images = [picture(40, 30, 1), picture(20, 33, 2), picture(64, 64, 3)]
    jobs = list(denoise(images, model, 3, 5))
    back = list(denoise(images[::-1], model, 2, 6))[::-1]
    assert [job.size for job in jobs] == [(12, 16), (16, 10), (16, 16)]
    for job, other in zip(jobs, back):
        assert all(torch.equal(a, b) for a, b in zip(job.x_hat[1:], other.x_hat))
    mixed = list(denoise(images, model, 3, 5, batch=4))                            # batches hold several images
    assert all(torch.allclose(a, b, atol=1e-4) for job, other in zip(jobs, mixed) for a, b in zip(job.x_hat, other.x_hat))


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    whole, sizes, real = list(denoise([picture()], model, 7, batch=8))[0], [], diffusion.sample

    def small(net, x, *rest, **options):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("no")
        return real(net, x, *rest, **options)

    monkeypatch.setattr("segment.sample", small)
    job = next(denoise([picture()], model, 7, batch=8))
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and len(job.x_hat) == 7
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(job.x_hat, whole.x_hat))
    monkeypatch.setattr("segment.sample", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(ValueError, match="memory does not hold one sample"):
        next(denoise([picture()], model, 2))


# ---- pictures


def seen(rgb, matrix):
    """sRGB (N, 3) in 0..255 as a colour-blind person sees it, in CIE Lab."""
    linear = np.where(rgb / 255 > 0.04045, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92) @ np.array(matrix).T
    xyz = linear.clip(0, 1) @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("matrix", [                                               # Machado et al. 2009, severity 1
    np.eye(3), [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]],
    ids=["normal", "protan", "deutan", "tritan"])
def test_neighbouring_cells_have_colours_that_all_tell_apart(matrix):
    table = seen(colours(8).astype(float), matrix).reshape(8, 8, 3)
    far = [np.linalg.norm(table[r, c] - table[r + dr, c + dc]) for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1))
           for r in range(8 - dr) for c in range(max(0, -dc), 8 - max(0, dc))]
    assert min(far) > 15 and np.mean(far) > 30                                     # 2.3 is just noticeable


def test_an_overlay_has_thin_outlines_and_leaves_the_rest(model):
    image, cells = picture(20, 10), np.full((10, 20), -1)
    cells[:, 5:] = 3
    cells[:, 12:] = 7
    out = overlay(image, cells, 4)
    assert (out[:, :5] == np.asarray(image)[:, :5]).all() and (out[:, [5, 12]] == 255).all()
    blend = 0.45 * np.asarray(image)[:, 6:12] + 0.55 * colours(4)[3]
    assert abs(out[:, 6:12] - blend).max() <= 1
    assert outline(torch.from_numpy(cells)).sum() == 20


def test_subsample_and_grid():
    a = torch.arange(6).view(2, 3)
    assert subsample(a, 4, 6).tolist() == a.repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    assert subsample(torch.arange(9)[None], 1, 3).tolist() == [[1, 4, 7]]
    tiles = [np.full((5, 7, 3), v, np.uint8) for v in (10, 20, 30)]
    sheet = grid(tiles, 2, gap=1)
    assert sheet.shape == (11, 15, 3) and (sheet[:5, 8:] == 20).all() and (sheet[6:, :7] == 30).all() and (sheet[6:, 8:] == 255).all()


# ---- files


def test_coco_reads_segments_json(run, tmp_path):
    picture().save("a.png")
    assert run("a.png", "--n", 3) == 0
    coco = COCO(str(tmp_path / "samples/a/segments.json"))
    medoid = np.array(Image.open("samples/a/medoid.png"))
    for s in coco.loadAnns(coco.getAnnIds(imgIds=[1])):
        mask = coco.annToMask(s).astype(bool)
        rows, cols = np.nonzero(mask)
        assert (mask == (medoid == s["id"])).all() and s["area"] == mask.sum() and 0 < s["confidence"] <= 1
        assert s["bbox"] == [cols.min(), rows.min(), np.ptp(cols) + 1, np.ptp(rows) + 1]


def test_panoptic_files_obey_the_formats_rules(run):
    picture(40, 30, 1).save("a.png"), picture(30, 30, 2).save("b.png"), picture(25, 20, 3).save("panoptic.png")
    assert run("a.png", "b.png", "panoptic.png", "--n", 2, "--format", "coco_panoptic", "--out", "o") == 0
    with open("o/panoptic.json") as f:
        content = json.load(f)
    images, categories = {i["id"]: i for i in content["images"]}, {c["id"]: c for c in content["categories"]}
    assert len(images) == len(content["annotations"]) == 3
    assert all({"name", "isthing", "color", "supercategory"} <= c.keys() for c in categories.values())
    for a in content["annotations"]:
        rgb = np.array(Image.open(f"o/panoptic/{a['file_name']}")).astype(int)
        ids, image = rgb @ [1, 256, 65536], images[a["image_id"]]
        assert ids.shape == (image["height"], image["width"]) and a["file_name"].endswith(".png")
        assert sorted(s["id"] for s in a["segments_info"]) == np.unique(ids).tolist()          # no void, none missing
        for s in a["segments_info"]:
            assert s["area"] == (ids == s["id"]).sum() and s["category_id"] in categories and s["iscrowd"] == 0


def test_images_of_the_same_name_do_not_clash(run, tmp_path):
    for name in ("a.png", "a.jpg", "x/a.png", "x/b.png", "B.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(name)
    assert run("a.png", "./a.png", "a.jpg", "x", "B.png", "--n", 1) == 0
    assert len(list((tmp_path / "samples").glob("*/segments.json"))) == 5
    names = folder_names([tmp_path / n for n in ("a.png", "a.jpg", "x/a.png", "A.png", "b.c.png", "panoptic.png")])
    assert len({n.casefold() for n in names.values()}) == len(names) == 6
    assert names[tmp_path / "a.jpg"] == "a_jpg" and names[tmp_path / "x/a.png"] == "x_a_png"
    assert folder_names([tmp_path / "...png", tmp_path / "..png"]) == {tmp_path / "...png": "___png", tmp_path / "..png": "__png"}
    assert names[tmp_path / "b.c.png"] == "b.c" and names[tmp_path / "panoptic.png"] == "panoptic_png"


def test_results_of_another_image_and_a_strangers_file_stay(run, tmp_path, capsys):
    picture().save("a.png"), picture().save("a.jpg")
    assert run("a.png", "--n", 3) == 0 and run("a.jpg", "--n", 1) == 2
    assert "holds the results of a.png" in capsys.readouterr().err
    assert run("a.png", "--n", 2) == 0 and not (tmp_path / "samples/a/labels_02.png").exists()               # none left over
    picture().save("samples/a/labels_00.png")                                      # edited by hand: no longer ours
    assert run("a.png", "--n", 2) == 2 and "labels_00.png was not written by sample.py" in capsys.readouterr().err
    (tmp_path / "o").mkdir()
    (tmp_path / "o/panoptic.json").write_text("{}")
    assert run("a.png", "--n", 1, "--out", "o", "--format", "coco_panoptic") == 2
    assert (tmp_path / "o/panoptic.json").read_text() == "{}"


def test_resume_does_again_what_had_other_settings(run, capsys):
    picture().save("a.png"), picture(20, 20, 1).save("b.png")
    assert run("a.png", "--n", 1) == 0 and run("a.png", "b.png", "--n", 1, "--resume") == 0
    out = capsys.readouterr().out
    assert "a.png: done already" in out and "b.png ->" in out
    assert run("a.png", "--n", 1, "--resume", "--seed", 1) == 0 and "a.png ->" in capsys.readouterr().out


def test_resume_does_again_what_was_made_of_other_files(run, capsys):
    """Another photo or map under the same name; a format that was not written yet."""
    picture().save("a.png"), Image.new("L", (40, 30), 1).save("map.png")
    words = ("a.png", "--n", 1, "--resume")
    again = lambda *more: (run(*words, *more), "a.png ->" in capsys.readouterr().out)
    assert again("--init", "map.png") == (0, True) and again("--init", "map.png") == (0, False)
    Image.new("L", (40, 30), 2).save("map.png")
    assert again("--init", "map.png") == (0, True) and again() == (0, True)
    picture(40, 30, 5).save("a.png")
    assert again() == (0, True) and again() == (0, False)
    assert again("--format", "coco_panoptic") == (0, True) and again() == (0, False)           # which has all of coco's


def test_no_panoptic_png_of_an_earlier_answer_stays(run, tmp_path):
    picture().save("a.png"), picture(20, 20, 1).save("b.png")
    assert run("a.png", "--n", 1, "--format", "coco_panoptic") == 0 and (tmp_path / "samples/panoptic/a.png").exists()
    assert run("a.png", "--n", 1, "--seed", 5) == 0 and not (tmp_path / "samples/panoptic/a.png").exists()
    assert json.loads((tmp_path / "samples/panoptic.json").read_text())["images"] == []
    assert run("b.png", "--n", 1, "--format", "coco_panoptic") == 0
    with open("samples/panoptic.json") as f:
        assert [image["file_name"] for image in json.load(f)["images"]] == ["b.png"]


def test_a_map_corrected_in_place_is_not_overwritten(run, tmp_path, capsys):
    picture().save("a.png")
    assert run("a.png", "--n", 1) == 0
    before = (tmp_path / "samples/a/medoid.png").read_bytes()
    assert run("a.png", "--n", 1, "--init", "samples/a/medoid.png") == 2
    assert "lies where this image's results go" in capsys.readouterr().err and (tmp_path / "samples/a/medoid.png").read_bytes() == before
    assert run("a.png", "--n", 1, "--init", "samples/a/medoid.png", "--out", "o") == 0


def test_the_processes_of_torchrun_share_the_images(run, tmp_path, monkeypatch):
    for i in range(5):
        picture(20, 20, i).save(f"{i}.png")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(".", "--n", 1, "--out", "o", "--format", "coco_panoptic") == 0
        done.append(sorted(p.parent.name for p in (tmp_path / "o").glob("*/segments.json")))
    assert done == [["1", "3"], ["0", "1", "2", "3", "4"]]
    with open("o/panoptic.json") as f:
        assert len(json.load(f)["annotations"]) == 5


def test_what_is_written_is_what_segment_returns(run, model):
    picture().save("a.png")
    assert run("a.png", "--n", 3, "--seed", 7, "--steps", 3) == 0
    result = segment(picture(), model, n=3, seed=7, steps=3)
    for j in range(3):
        assert (np.array(Image.open(f"samples/a/labels_{j:02d}.png")) == result.labels[j].numpy() + 1).all()
    assert (np.array(Image.open("samples/a/consensus.png")) == result.consensus.numpy() + 1).all()
    assert Image.open("samples/a/labels_00.png").convert("RGB").getpixel((0, 0)) == tuple(colours(4)[result.labels[0, 0, 0]])


@pytest.mark.parametrize("arguments, words", [
    (["--format", "voc"], "format"), (["--hint", "small.png"], "4 x 4 pixels, but the image 40 x 30"), (["--hint", "a.png"], "one id a pixel"),
    (["--hint", "none.png"], "none.png"), (["--init", "small.png"], "4 x 4"), (["--init", "zero.png"], "empty"),
    (["--init", "small.png", "--strength", "0"], "--strength"), (["--points", "1,1;1,1"], "contradictory"), (["--box", "9,9,5,5"], "box 9,9,5,5"),
    (["b.png", "--points", "1,1"], "for one image, not for 2"), (["--nonsense"], "nonsense"), (["--n", "x"], "--n"),
    (["--guidance", "nan"], "--guidance"), (["--smooth", "inf"], "--smooth"), (["--merge", "nan"], "--merge"), (["--seed", "-1"], "--seed"),
    (["--seed", "9" * 20], "--seed")])
def test_wrong_use_gets_one_sentence(run, capsys, arguments, words):
    picture().save("a.png"), picture().save("b.png")
    Image.new("L", (4, 4), 1).save("small.png"), Image.new("L", (40, 30)).save("zero.png")
    assert run("a.png", "--n", 1, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("sample.py: ")
