"""sample.py as a user runs it: files of every kind, what is written, the same seed in every batch, prompts,
wrong use."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import answers.segment as segment_module
import sample
import train
from answers.checkpoints import load_checkpoint
from answers.segment import segment


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("run")
    options = ("--device cpu --max_steps 3 --batch_size 2 --image_size 16 --eval_images 1 --steps 2 "
               "--eval_every 3")
    assert train.main([*options.split(), "--out", str(out)]) == 0
    return out / "ckpt.pt"


def photo(size=(40, 30), mode="RGB"):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    return image.convert(mode)


def run(ckpt, tmp_path, *arguments):
    try:
        return sample.main([*map(str, arguments), "--ckpt", str(ckpt), "--out", str(tmp_path / "out"),
                            "--device", "cpu"])
    except SystemExit as e:
        return e.code


def test_one_image_gives_everything_at_its_own_size(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 3) == 0
    out = tmp_path / "out" / "a"
    maps = [f"{kind}_{j:02d}.png" for kind in ("labels", "overlay") for j in range(3)]
    assert {p.name for p in out.iterdir()} == {*maps, "answer.png", "answer_overlay.png", "uncertainty.png",
                                               "panel.png", "segments.json"}
    assert all(Image.open(out / name).size == (40, 30) for name in (*maps, "answer.png",
                                                                    "answer_overlay.png"))
    label = np.array(Image.open(out / "labels_00.png"))
    assert label.ndim == 2 and label.min() >= 1 and label.max() <= 16
    text = capsys.readouterr().out
    assert "step 3" in text and "only seen synthetic shapes" in text


def test_segments_json_is_the_answer_in_coco_format(ckpt, tmp_path):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 3) == 0
    answer = np.array(Image.open(tmp_path / "out" / "a" / "answer.png"))
    content = json.loads((tmp_path / "out" / "a" / "segments.json").read_text())
    segments = content["annotations"]
    assert [s["id"] for s in segments] == np.unique(answer).tolist()
    masks = [coco_mask.decode(s["segmentation"]).astype(bool) for s in segments]
    assert (sum(m.astype(int) for m in masks) == 1).all()  # they tile the image
    for s, m in zip(segments, masks):
        assert s["area"] == m.sum() and (answer[m] == s["id"]).all() and 0 <= s["confidence"] <= 1
    assert all(i != j and {i, j} <= set(answer.flat) and 0 <= p <= 1 for i, j, p in content["borders"])


def test_tiles(ckpt, tmp_path, capsys):
    photo((70, 50)).save(tmp_path / "a.png")
    points = ("--points", "20,20 50,30; 60,5")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 2, "--tiles", 2, *points) == 0
    out = tmp_path / "out" / "a"
    content = json.loads((out / "segments.json").read_text())
    answer = np.array(Image.open(out / "answer.png"))
    assert content["info"]["tiles"] == 2 and answer.shape == (50, 70)
    assert answer[20, 20] == answer[30, 50] != answer[5, 60]
    assert sorted(np.unique(answer)) == [s["id"] for s in content["annotations"]]
    assert len(list(out.glob("labels_*.png"))) == 2 and (out / "uncertainty.png").exists()
    capsys.readouterr()
    for tiles, done in ((2, True), (1, False)):
        assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 2, "--tiles", tiles, *points, "--resume") == 0
        assert ("done already" in capsys.readouterr().out) == done
    for wrong in ("0", "two", "17"):
        assert run(ckpt, tmp_path, tmp_path / "a.png", "--tiles", wrong) == 2
        err = capsys.readouterr().err
        assert "tiles are a number from 1 to 16 a side, or auto" in err and err.count("\n") == 1


@pytest.mark.parametrize("stop", [3, 11])  # among the samples of the whole, and among those of the tiles
def test_what_is_stopped_among_tiles_is_not_done(ckpt, tmp_path, monkeypatch, capsys, stop):
    photo((70, 50)).save(tmp_path / "a.png")
    real, samples = segment_module.sampled, []

    def sampled(*args, **options):
        samples.append(1)
        if len(samples) == stop:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(segment_module, "sampled", sampled)
    words = (tmp_path / "a.png", "--n", 4, "--tiles", 2, "--batch", 1)
    for _ in range(2):  # the second goes on from where the first began
        samples.clear()
        assert run(ckpt, tmp_path, *words, "--resume") == 130
        info = json.loads((tmp_path / "out" / "a" / "segments.json").read_text())["info"]
        assert info["unfinished"] and info["n"] == min(4, stop - 1)
    samples[:] = [1] * stop
    assert run(ckpt, tmp_path, *words, "--resume") == 0
    assert len(samples) - stop == 4 + 4 * 2 and "done already" not in capsys.readouterr().out
    info = json.loads((tmp_path / "out" / "a" / "segments.json").read_text())["info"]
    assert "unfinished" not in info and info["n"] == 4
    assert run(ckpt, tmp_path, *words, "--resume") == 0 and "done already" in capsys.readouterr().out


def test_the_guidance_that_is_told_is_the_one_sampled_with(tmp_path, monkeypatch):
    """The weights in the box see hints, and then take less."""
    photo().save(tmp_path / "a.png")
    real, used = segment_module.sampled, []

    def sampled(*args, **options):
        used.append(options["guidance"])
        return real(*args, **options)

    monkeypatch.setattr(segment_module, "sampled", sampled)
    points = ("--points", "8,8; 30,20")
    for asked in ((), points, (*points, "--guidance", 5)):
        out = tmp_path / "out" / "a" / "segments.json"
        assert run(sample.SHIPPED, tmp_path, tmp_path / "a.png", "--n", 1, "--steps", 1, *asked) == 0
        assert json.loads(out.read_text())["info"]["guidance"] == used[-1]
    assert list(dict.fromkeys(used)) == [8, 3, 5]


@pytest.mark.parametrize("name, mode, size", [
    ("grey.png", "L", (40, 30)), ("alpha.png", "RGBA", (40, 30)), ("cmyk.jpg", "CMYK", (40, 30)),
    ("p.gif", "P", (40, 30)),
    ("two.png", "1", (40, 30)), ("dot.png", "RGB", (1, 1)), ("wide.png", "RGB", (10000, 3)),
    ("tall.png", "RGB", (2, 900))])
def test_images_of_every_kind(ckpt, tmp_path, name, mode, size):
    photo(size, mode).save(tmp_path / name)
    assert run(ckpt, tmp_path, tmp_path / name, "--n", 1) == 0
    assert Image.open(tmp_path / "out" / name.split(".")[0] / "labels_00.png").size == size


def test_rotated_by_exif_comes_out_upright(ckpt, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo((40, 30)).save(tmp_path / "r.jpg", exif=exif)
    assert run(ckpt, tmp_path, tmp_path / "r.jpg", "--n", 1) == 0
    assert Image.open(tmp_path / "out" / "r" / "labels_00.png").size == (30, 40)


def test_a_bad_file_is_named_and_the_others_are_done(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    assert run(ckpt, tmp_path, tmp_path / "bad.png", tmp_path / "missing.png", tmp_path / "good.png", "--n",
               1) == 2
    err = capsys.readouterr().err
    assert "bad.png: not a readable image" in err and "missing.png: no such file" in err
    assert "Traceback" not in err
    assert (tmp_path / "out" / "good" / "labels_00.png").exists()


def test_resume_skips_what_is_done_and_strangers_files_stay(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 1) == 0
    before = (tmp_path / "out" / "a" / "panel.png").stat().st_mtime_ns
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 1, "--resume") == 0
    assert "done already" in capsys.readouterr().out
    assert (tmp_path / "out" / "a" / "panel.png").stat().st_mtime_ns == before
    photo().save(tmp_path / "b.png")
    (tmp_path / "out" / "b").mkdir()
    (tmp_path / "out" / "b" / "panel.png").write_bytes(b"mine")
    assert run(ckpt, tmp_path, tmp_path / "b.png", "--n", 1) == 2
    assert (tmp_path / "out" / "b" / "panel.png").read_bytes() == b"mine"
    assert "panel.png" in capsys.readouterr().err


def test_a_seed_gives_the_same_map_beside_other_images(ckpt):
    model, image = load_checkpoint(ckpt), photo()
    several, one = segment(image, model, n=4, seed=5), segment(image, model, n=1, seed=7)
    assert torch.equal(several.labels[2], one.labels[0])
    batched = segment(image, model, n=4, seed=5, batch=4)
    assert (batched.labels == several.labels).float().mean() > 0.99  # other kernels round otherwise
    assert not torch.equal(several.labels[0], several.labels[1])


def numbers_in(folder):
    return np.array(Image.open(folder / "answer.png"))


def test_grain_cuts_coarser_and_finer(ckpt, tmp_path):
    photo().save(tmp_path / "a.png")
    counts = []
    for grain in ("1", "4", "12"):
        assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 2, "--grain", grain) == 0
        counts.append(len(np.unique(numbers_in(tmp_path / "out/a"))))
    assert counts[0] == 1 < counts[1] <= 4 and counts[1] <= counts[2]
    info = json.loads((tmp_path / "out/a/segments.json").read_text())["info"]
    assert info["grain"] == 12
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 2, "--grain", "coarse", "--merge", 1, "--least",
               2) == 0
    info = json.loads((tmp_path / "out/a/segments.json").read_text())["info"]
    assert (info["grain"], info["merge"], info["least"]) == ("coarse", 1.0, 2)


def test_clicks_are_held_and_closed_leaves_nothing_else(ckpt, tmp_path, capsys):
    photo((32, 32)).save(tmp_path / "a.png")
    hint = np.zeros((32, 32), np.uint8)
    hint[:6, 20:] = 9
    Image.fromarray(hint).save(tmp_path / "hint.png")
    words = (tmp_path / "a.png", "--n", 2, "--points", "4,4 8,20;26,16", "--hint", tmp_path / "hint.png",
             "--box", "2,24,20,30")
    for more in ((), ("--closed",)):
        assert run(ckpt, tmp_path, *words, *more) == 0
        label = numbers_in(tmp_path / "out/a")
        held = [{label[4, 4], label[20, 8]}, {label[16, 26]}, set(label[:6, 20:].flat), {label[27, 11]}]
        assert [len(s) for s in held] == [1] * 4 and len(set().union(*held)) == 4
    assert set(label.flat) == set().union(*held)
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 2, "--closed") == 2
    assert "--closed gives every pixel to a hint: name two" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--least", "-1"], "--least and --merge must be 0"), (["--merge", "-0.5"], "--least and --merge must "
                                                                                "be 0"),
    (["--grain", "huge"], "--grain is coarse, normal, fine, or a number"), (["--grain", "0"], "--grain is"),
    (["--grain", "-3"], "--grain is"), (["--n", "0"], "--n must be at least 1"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--device", "cuda:99"], "try --device cpu"), (["--ckpt", "nowhere.pt"], "no such file"),
    (["--ckpt", "README.md"], "README.md"), (["--box", "1,2"], "x0,y0,x1,y1"),
    (["--points", "900,900"], "900")])
def test_wrong_use_gets_one_sentence(ckpt, tmp_path, capsys, arguments, words):
    photo().save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(tmp_path / "a.png"), "--ckpt", str(ckpt), "--out", str(tmp_path), *arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count("\n") == 1


def test_damaged_odds_are_named_before_sampling_and_can_be_done_without(ckpt, tmp_path, capsys):
    shutil.copy(ckpt, tmp_path / "ckpt.pt")
    (tmp_path / "tree.npz").write_bytes(b"nothing")
    photo().save(tmp_path / "a.png")
    assert run(tmp_path / "ckpt.pt", tmp_path, tmp_path / "a.png", "--n", 1, "--merge", 1) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'tree.npz'} cannot be read" in said and said.count("\n") == 1
    assert "--merge 0" in said and not (tmp_path / "out").exists()
    assert run(tmp_path / "ckpt.pt", tmp_path, tmp_path / "a.png", "--n", 1, "--merge", 0) == 0


def test_the_newest_checkpoint_is_taken_and_without_one_the_weights_in_the_box(ckpt, tmp_path, monkeypatch,
                                                                               capsys):
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")
    assert sample.main(["a.png", "--n", "1", "--steps", "1", "--out", "s"]) == 0
    out = capsys.readouterr().out
    assert "weights/photo.pt" in out and "come with this repository" in out
    assert (tmp_path / "s/a/answer.png").exists()
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "ckpt.pt").write_bytes(ckpt.read_bytes())
    (tmp_path / "out" / "experiments" / "rgb").mkdir(parents=True)
    (tmp_path / "out" / "experiments" / "rgb" / "ckpt.pt").write_bytes(ckpt.read_bytes())  # newer
    assert sample.main(["a.png", "--n", "1", "--out", "s"]) == 0
    assert "out/mine/ckpt.pt" in capsys.readouterr().out
