"""What sample.py computes from samples and writes: against loops, pycocotools, the panoptic format's rules,
colour vision."""

import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

import diffusion
import sample
from answers.checkpoints import Model
from answers.jobs import Job, prepare
from answers.pictures import colours, grid, overlay
from answers.segment import denoise, placed, segment, summarise
from bits import Codec
from diffusion import Diffusion
from frame import enlarge, outline, subsample
from metrics import scores
from sample import folder_names


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """sample.py's command line with this network, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: model)
    (tmp_path / "x.pt").write_text("weights")

    def go(*arguments):
        try:
            return sample.main([*map(str, arguments), "--ckpt", "x.pt", "--device", "cpu"])
        except SystemExit as e:
            return e.code
    return go


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def plain(codec, merge=0.0):
    """A Model without a network, for what is made of its samples."""
    return Model(None, codec, Diffusion(), 16, {}, "mine", 0, dict(least=0, merge=merge))


def job_of(x, image=None):
    """A Job with samples x (n, C, h, w); its photo is black, if not given."""
    h, w = x.shape[2:]
    return Job(None, np.zeros((h, w, 3), np.uint8) if image is None else image, list(x))


def samples(n=4, h=12, w=16, codec=Codec(bits=4)):
    """A Job with n soft samples of a few segments that differ from one another, and their cells."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 5, (n, 3, 4), generator=generator)
    cells = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :h, :w]
    return job_of(codec.encode(cells) * (0.4 + 0.6 * torch.rand(n, 4, h, w, generator=generator))), cells


# ---- numbers


def slow_votes(labels, image):
    """Labels (h, w) -> {label: weight} at every pixel of an image: what its 3 x 3 nearest pixels of the map
    say."""
    (h, w), (width, height) = labels.shape, image.size
    small = np.asarray(image.resize((w, h), Image.Resampling.BOX)) / 255
    big = np.asarray(image.filter(ImageFilter.GaussianBlur(0.2 * max(width, height) / max(w, h)))) / 255
    votes = {}
    for r, c in np.ndindex(height, width):
        y, z, here = (r + 0.5) * h / height - 0.5, (c + 0.5) * w / width - 0.5, votes.setdefault((r, c), {})
        for i, j in np.ndindex(3, 3):
            i, j = round(y) + i - 1, round(z) + j - 1
            k, m = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
            near = ((big[r, c] - small[k, m]) ** 2).sum()
            far = ((y - i) ** 2 + (z - j) ** 2) / (2 * 0.5**2) + near / (2 * 0.1**2)
            here[labels[k, m]] = here.get(labels[k, m], 0) + max(np.exp(-far), 1e-12)
    return votes


@pytest.mark.parametrize("width,height", [(31, 22), (5, 3), (1, 1), (6, 40), (70, 2), (9, 7)])
def test_enlarging_pixel_by_pixel(width, height, monkeypatch):
    """The label with most votes, in strips of one row, too; of several maps at once; with few labels and with
    many."""
    rng = np.random.default_rng(width)
    maps = np.full((2, 7, 9), 3)
    maps[:, :3, :4], maps[1, 4:, 6:] = rng.integers(0, 16, (2, 3, 4)), 300
    image = picture(width, height)
    whole = enlarge(maps, image)
    monkeypatch.setattr("frame.STRIP", 1)
    assert torch.equal(enlarge(maps, image), whole) and whole.shape == (2, height,
                                                                        width) and whole.dtype == torch.int16
    few = enlarge(maps % 16, image)
    assert few.dtype == torch.uint8
    for got, labels in zip([*whole, *few], [*maps, *maps % 16]):
        votes = slow_votes(labels, image)
        for at, chosen in np.ndenumerate(got.numpy()):
            assert votes[at][chosen] >= max(votes[at].values()) * (1 - 1e-4)


def test_enlarged_borders_follow_the_photo():
    """The photo's edge lies between two pixels of the map."""
    array = np.full((24, 40, 3), (200, 60, 60), np.uint8)
    array[:, 22:] = (40, 90, 220)
    labels = np.where(np.arange(5) > 2, 5, 1) + np.zeros((3, 1), int)  # 8 x 8 pixels each: the border at 24
    for image, border in ((Image.fromarray(array), 22), (Image.new("RGB", (40, 24)), 24)):
        columns = enlarge(labels[None], image)[0].numpy()
        assert (columns == columns[0]).all() and set(columns[0]) == {1, 5}
        # the photo is blurred a little
        assert abs(np.count_nonzero(columns[0] == 1) - border) <= (border == 22)


@pytest.mark.parametrize("merge", [0.0, 1.0])
@pytest.mark.parametrize("encoding", ["bits", "onehot", "rgb"])
@pytest.mark.parametrize("width,height", [(40, 30), (1, 1), (7, 200), (16, 12)])
def test_all_encodings_and_shapes_are_summarised(encoding, width, height, merge):
    codec = Codec(encoding, 4)
    x = codec.encode(torch.randint(0, 9, (2, 12, 16), generator=torch.Generator().manual_seed(0)))
    result = summarise(job_of(x), picture(width, height), plain(codec, merge))
    assert result.labels.shape == (2, height, width)
    assert result.answer.labels.shape == result.boundary.shape == (height, width)
    assert (result.entropy is None) == (encoding != "bits")
    assert sum(s["area"] for s in result.answer.segments) == width * height
    assert sample.panel(result).ndim == 3


def test_agreement_is_the_mean_ari_to_the_others():
    job, cells = samples()
    result = summarise(job, picture(16, 12), plain(Codec(bits=4)))
    each = [[float(scores(a[None], b[None])["ari"]) for b in cells] for a in cells]
    assert result.agreement.tolist() == pytest.approx([(sum(row) - 1) / 3 for row in each])
    assert summarise(samples(1)[0], picture(16, 12), plain(Codec(bits=4))).agreement.isnan().all()


def test_the_answer_is_the_vote_of_equally_sure_samples():
    codec, cells = Codec(bits=4), torch.full((5, 12, 16), 5)
    cells[:3, :6] = 0  # 3 of 5 part the halves
    result = summarise(job_of(codec.encode(cells) * 0.9), Image.new("RGB", (16, 12)), plain(codec))
    assert len(result.answer.segments) == 2 and result.answer.borders[0][2] == pytest.approx(3 / 5)
    assert (result.answer.labels[:6] == result.answer.labels[0, 0]).all()
    assert result.answer.labels[0, 0] != result.answer.labels[6, 0]
    assert len(summarise(job_of(codec.encode(cells[2:])), Image.new("RGB", (16, 12)),
                         plain(codec)).answer.segments) == 1
    p = 0.5 + 0.9 * (3 - 2) / 5 / 2  # of each of the two bits that differ
    sure = -(0.95 * np.log2(0.95) + 0.05 * np.log2(0.05))
    both = 2 * sure - 2 * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert float(result.entropy[0, 0]) == pytest.approx(both, abs=1e-4)


def test_boundary_is_the_share_of_samples():
    codec, cells = Codec(bits=4), torch.zeros(4, 12, 16, dtype=torch.int64)
    cells[:, :, 8:], cells[:3, 6:] = 3, 9  # all see the upper vertical, three the horizontal
    result = summarise(job_of(codec.encode(cells)), Image.new("RGB", (160, 120)), plain(codec))
    at = lambda y, x: float(result.boundary[y, x])
    assert at(20, 80) == 1 and at(100, 80) == 0.25 and at(60, 20) == 0.75 and at(20, 20) == at(100, 140) == 0
    assert 8 <= int((result.boundary[20] > 0.5).sum()) <= 12  # a network pixel wide: 10
    again = summarise(job_of(codec.encode((cells + 2) % 16)), Image.new("RGB", (160, 120)), plain(codec))
    assert (again.boundary != result.boundary).float().mean() < 0.01  # whatever the numbers, but for corners


def test_the_same_place_has_the_same_number_in_all_trees():
    """Places of a 4 x 4 palette, by the learnt odds: halves left and right, at their centroids, in every
    sample."""
    codec, cells = Codec(bits=4), torch.tensor([[0, 5], [9, 3]])[:, None].repeat_interleave(8, 2).expand(2,
                                                                                                         12,
                                                                                                         16)
    image = np.where(np.arange(16)[:, None] < 8, (200, 60, 40),
                     (40, 90, 200)).astype(np.uint8)[None].repeat(12, 0)
    result = summarise(job_of(codec.encode(cells), image), Image.fromarray(image), plain(codec, merge=1.0),
                       "coarse")
    assert result.side == result.answer.side == 4
    for labels in (*result.labels, result.answer.labels):
        # rows 1.5, columns 0.5 and 2.5: half to even
        assert (labels[:, :8] == 8).all() and (labels[:, 8:] == 10).all()


def test_more_segments_than_the_palette_has_places_get_a_larger_one():
    maps = np.arange(12 * 16).reshape(1, 12, 16) // 4  # 48
    cells, side = placed(maps, 4)
    assert side == 8 and len(cells.unique()) == 48 and placed(maps % 16, 4)[1] == 4


# ---- the same seed, whatever else


def jobs_of(images, model, seed):
    return [prepare(image, model, seed=seed) for image in images]


def test_a_seed_gives_the_same_x_hat_whatever_the_order_and_number_of_images(model):
    images = [picture(40, 30, 1), picture(20, 33, 2), picture(64, 64, 3)]
    jobs = list(denoise(jobs_of(images, model, 5), model, 3))
    back = list(denoise(jobs_of(images[::-1], model, 6), model, 2))[::-1]
    assert [job.size for job in jobs] == [(12, 16), (16, 10), (16, 16)]
    for job, other in zip(jobs, back):
        assert all(torch.equal(a, b) for a, b in zip(job.x_hat[1:], other.x_hat))
    mixed = list(denoise(jobs_of(images, model, 5), model, 3, batch=4))  # batches hold several images
    assert all(torch.allclose(a, b, atol=1e-4) for job, other in zip(jobs, mixed) for a,
               b in zip(job.x_hat, other.x_hat))


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    whole, sizes, real = list(denoise([prepare(picture(), model)], model, 7,
                                      batch=8))[0], [], diffusion.sample

    held = []  # what the batches that failed had in memory: free before the next one

    def small(net, image, **options):
        sizes.append(len(image))
        assert not any(of() is not None for of in held)
        maps = image + 1
        held.extend((weakref.ref(maps), weakref.ref(image)))
        if len(image) > 2:
            raise torch.OutOfMemoryError("no")
        return real(net, image=maps - 1, **options)

    monkeypatch.setattr("answers.segment.sample", small)
    job = next(denoise([prepare(picture(), model)], model, 7, batch=8))
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and len(job.x_hat) == 7
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(job.x_hat, whole.x_hat))

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("answers.segment.sample", no_memory)
    with pytest.raises(ValueError, match="memory does not hold one sample"):
        next(denoise([prepare(picture(), model)], model, 2))


# ---- pictures


def seen(rgb, matrix):
    """sRGB (N, 3) in 0..255 as a colour-blind person sees it, in CIE Lab."""
    linear = np.where(rgb / 255 > 0.04045, ((rgb / 255 + 0.055) / 1.055) ** 2.4,
                      rgb / 255 / 12.92) @ np.array(matrix).T
    xyz = linear.clip(0,
                      1) @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095],
                                     [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("matrix", [  # Machado et al. 2009, severity 1
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]],
    ids=["normal", "protan", "deutan", "tritan"])
def test_neighbouring_cells_have_colours_that_all_tell_apart(matrix):
    table = seen(colours(8).astype(float), matrix).reshape(8, 8, 3)
    far = [np.linalg.norm(table[r, c] - table[r + dr, c + dc]) for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1))
           for r in range(8 - dr) for c in range(max(0, -dc), 8 - max(0, dc))]
    assert min(far) > 15 and np.mean(far) > 30  # 2.3 is just noticeable


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
    assert sheet.shape == (11, 15, 3) and (sheet[:5, 8:] == 20).all()
    assert (sheet[6:, :7] == 30).all() and (sheet[6:, 8:] == 255).all()


# ---- files


def test_coco_reads_segments_json(run, tmp_path):
    picture().save("a.png")
    assert run("a.png", "--n", 3) == 0
    coco = COCO(str(tmp_path / "samples/a/segments.json"))
    answer = np.array(Image.open("samples/a/answer.png"))
    for s in coco.loadAnns(coco.getAnnIds(imgIds=[1])):
        mask = coco.annToMask(s).astype(bool)
        rows, cols = np.nonzero(mask)
        assert (mask == (answer == s["id"])).all() and s["area"] == mask.sum() and 0 < s["confidence"] <= 1
        assert s["bbox"] == [cols.min(), rows.min(), np.ptp(cols) + 1, np.ptp(rows) + 1]


def test_panoptic_files_obey_the_formats_rules(run):
    picture(40, 30, 1).save("a.png"), picture(30, 30, 2).save("b.png"), picture(25, 20,
                                                                                3).save("panoptic.png")
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
        assert sorted(s["id"] for s in a["segments_info"]) == np.unique(ids).tolist()  # no void, none missing
        for s in a["segments_info"]:
            assert s["area"] == (ids == s["id"]).sum()
            assert s["category_id"] in categories and s["iscrowd"] == 0


def test_images_of_the_same_name_do_not_clash(run, tmp_path):
    for name in ("a.png", "a.jpg", "x/a.png", "x/b.png", "B.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(name)
    assert run("a.png", "./a.png", "a.jpg", "x", "B.png", "--n", 1) == 0
    assert len(list((tmp_path / "samples").glob("*/segments.json"))) == 5
    names = folder_names([tmp_path / n for n in ("a.png", "a.jpg", "x/a.png", "A.png", "b.c.png",
                                                 "panoptic.png")], tmp_path)
    assert len({n.casefold() for n in names.values()}) == len(names) == 6
    assert names[tmp_path / "a.jpg"] == "a_jpg" and names[tmp_path / "x/a.png"] == "x_a_png"
    assert folder_names([tmp_path / "...png", tmp_path / "..png"], tmp_path) == {
        tmp_path / "...png": "___png", tmp_path / "..png": "__png"}
    assert names[tmp_path / "b.c.png"] == "b.c" and names[tmp_path / "panoptic.png"] == "panoptic_png"


def test_a_folder_that_grows_keeps_the_results_that_it_has(run, tmp_path):
    (tmp_path / "d").mkdir(), picture().save("d/a.jpg")
    assert run("d/a.jpg", "--n", 1) == 0
    picture(seed=1).save("d/a.png")
    assert run("d", "--n", 1, "--resume", "--format", "coco_panoptic") == 0
    assert sorted(p.parent.name for p in (tmp_path / "samples").glob("*/segments.json")) == ["a", "a_png"]
    listed = json.loads((tmp_path / "samples/panoptic.json").read_text())["images"]
    assert sorted(image["file_name"] for image in listed) == ["a.jpg", "a.png"]


def test_one_file_by_two_names_is_done_once_and_that_is_said(run, tmp_path):
    picture().save("a.png"), (tmp_path / "last.png").symlink_to("a.png")
    with pytest.warns(UserWarning, match="last.png: it is a.png by another name"):
        assert run("a.png", "./a.png", "last.png", "--n", 1) == 0
    assert [p.parent.name for p in (tmp_path / "samples").glob("*/segments.json")] == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_and_an_empty_folder_do_not_keep_others_from_being_done(run, tmp_path, capsys):
    picture().save("a.png"), os.mkfifo("b.png"), (tmp_path / "none").mkdir()
    with pytest.warns(UserWarning, match="none: no images in this folder"):
        assert run("a.png", "b.png", "none", "--n", 1) == 2
    assert "b.png: no ordinary file" in capsys.readouterr().err
    assert (tmp_path / "samples/a/panel.png").exists()
    with pytest.warns(UserWarning, match="samples: no images"):  # what it wrote is no input
        assert run("samples", "samples/a", "--n", 1) == 2
    assert "samples samples/a: no images found" in capsys.readouterr().err


def test_results_of_another_image_and_a_strangers_file_stay(run, tmp_path, capsys):
    picture().save("a.png"), picture(seed=1).save("a.jpg")
    assert run("a.png", "--n", 3) == 0 and run("a.jpg", "--n", 1) == 2
    assert "holds the results of a.png" in capsys.readouterr().err
    # none left over
    assert run("a.png", "--n", 2) == 0 and not (tmp_path / "samples/a/labels_02.png").exists()
    picture().save("samples/a/labels_00.png")  # edited by hand: no longer ours
    assert run("a.png", "--n",
               2) == 2 and "labels_00.png was not written by sample.py" in capsys.readouterr().err
    (tmp_path / "o").mkdir()
    (tmp_path / "o/panoptic.json").write_text("{}")
    assert run("a.png", "--n", 1, "--out", "o", "--format", "coco_panoptic") == 2
    assert (tmp_path / "o/panoptic.json").read_text() == "{}"


def test_a_photo_is_the_same_by_whichever_path(run, tmp_path, capsys):
    picture().save("a.png")
    assert run("a.png", "--n", 1) == 0 and run(tmp_path / "a.png", "--n", 1, "--resume") == 0
    assert f"{tmp_path / 'a.png'}: done already" in capsys.readouterr().out
    assert run(tmp_path / "a.png", "--n", 2) == 0


def test_a_folder_of_results_that_is_a_link_is_refused_and_stays(run, tmp_path, capsys):
    picture().save("a.png")
    link, target = tmp_path / "samples/a", tmp_path / "elsewhere"
    target.mkdir(), link.parent.mkdir(), link.symlink_to(target, target_is_directory=True)
    assert run("a.png", "--n", 1) == 2 and run("a.png", "--n", 1) == 2
    assert capsys.readouterr().err.count("samples/a is a symbolic link") == 2
    assert list(link.parent.iterdir()) == [link] and link.is_symlink() and not list(target.iterdir())


def test_resume_does_again_what_had_other_settings(run, capsys):
    picture().save("a.png"), picture(20, 20, 1).save("b.png")
    assert run("a.png", "--n", 1) == 0 and run("a.png", "b.png", "--n", 1, "--resume") == 0
    out = capsys.readouterr().out
    assert "a.png: done already" in out and "b.png ->" in out
    assert run("a.png", "--n", 1, "--resume", "--seed", 1) == 0 and "a.png ->" in capsys.readouterr().out


def test_resume_does_again_what_was_made_of_other_files(run, model, monkeypatch, capsys):
    """Another photo or map under the same name; a format that was not written yet."""
    picture().save("a.png"), Image.new("L", (40, 30), 1).save("map.png")
    words = ("a.png", "--n", 1, "--resume")
    again = lambda *more: (run(*words, *more), "a.png ->" in capsys.readouterr().out)
    assert again("--init", "map.png") == (0, True) and again("--init", "map.png") == (0, False)
    Image.new("L", (40, 30), 2).save("map.png")
    assert again("--init", "map.png") == (0, True) and again() == (0, True)
    picture(40, 30, 5).save("a.png")
    assert again() == (0, True) and again() == (0, False)
    Path("x.pt").write_text("other weights")
    assert again() == (0, True) and again() == (0, False)
    Path("odds.npz").write_bytes(model.odds.read_bytes())
    monkeypatch.setattr(model, "odds", Path("odds.npz"))
    monkeypatch.setattr(model, "tidy", dict(model.tidy))
    assert again("--merge", "1") == (0, True) and again("--merge", "1") == (0, False)
    fitted = dict(np.load("odds.npz"))
    np.savez("odds.npz", **{**fitted, "b3": fitted["b3"] + 1})
    assert again("--merge", "1") == (0, True) and again("--merge", "1") == (0, False)
    # which has all of coco's
    assert again("--format", "coco_panoptic") == (0, True) and again() == (0, False)


def test_photos_of_one_name_have_their_paths_in_panoptic_json(run, tmp_path):
    for name in ("s1/IMG_1.jpg", "s2/IMG_1.jpg", "s2/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    assert run("s1", "s2", "--n", 1, "--format", "coco_panoptic") == 0
    listed = json.loads((tmp_path / "samples/panoptic.json").read_text())
    names = [image["file_name"] for image in listed["images"]]
    assert sorted(names) == ["s1/IMG_1.jpg", "s2/IMG_1.jpg", "x.jpg"]


def test_no_panoptic_png_of_an_earlier_answer_stays(run, tmp_path):
    picture().save("a.png"), picture(20, 20, 1).save("b.png")
    assert run("a.png", "--n", 1, "--format",
               "coco_panoptic") == 0 and (tmp_path / "samples/panoptic/a.png").exists()
    assert run("a.png", "--n", 1, "--seed", 5) == 0 and not (tmp_path / "samples/panoptic/a.png").exists()
    assert json.loads((tmp_path / "samples/panoptic.json").read_text())["images"] == []
    assert run("b.png", "--n", 1, "--format", "coco_panoptic") == 0
    with open("samples/panoptic.json") as f:
        assert [image["file_name"] for image in json.load(f)["images"]] == ["b.png"]


def test_a_map_corrected_in_place_is_not_overwritten(run, tmp_path, capsys):
    picture().save("a.png")
    assert run("a.png", "--n", 1) == 0
    before = (tmp_path / "samples/a/answer.png").read_bytes()
    assert run("a.png", "--n", 1, "--init", "samples/a/answer.png") == 2
    assert "lies where this image's results go" in capsys.readouterr().err
    assert (tmp_path / "samples/a/answer.png").read_bytes() == before
    assert run("a.png", "--n", 1, "--init", "samples/a/answer.png", "--out", "o") == 0


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
    assert (np.array(Image.open("samples/a/answer.png")) == result.answer.labels.numpy() + 1).all()
    first = Image.open("samples/a/labels_00.png").convert("RGB").getpixel((0, 0))
    assert first == tuple(colours(4)[result.labels[0, 0, 0]])


@pytest.mark.parametrize("arguments, words", [
    (["--format", "voc"], "format"), (["--hint", "small.png"], "4 x 4 pixels, but the image 40 x 30"),
    (["--hint", "a.png"], "one id a pixel"),
    (["--hint", "none.png"], "none.png"), (["--closed"], "--closed gives every pixel to a hint"),
    (["--grain", "x"], "not 'x'"), (["--init", "small.png"], "4 x 4"), (["--init", "zero.png"], "empty"),
    (["--init", "small.png", "--strength", "0"], "--strength"), (["--points", "1,1;1,1"], "contradictory"),
    (["--box", "9,9,5,5"], "box 9,9,5,5"),
    (["b.png", "--points", "1,1"], "for one image, not for 2"), (["--nonsense"], "nonsense"),
    (["--n", "x"], "--n"),
    (["--guidance", "nan"], "--guidance"), (["--smooth", "inf"], "--smooth"), (["--merge", "nan"], "--merge"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "9" * 20], "--seed")])
def test_wrong_use_gets_one_sentence(run, capsys, arguments, words):
    picture().save("a.png"), picture().save("b.png")
    Image.new("L", (4, 4), 1).save("small.png"), Image.new("L", (40, 30)).save("zero.png")
    assert run("a.png", "--n", 1, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("sample.py: ")
