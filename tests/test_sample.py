"""sample.py as a user runs it: files of every kind, what is written, the same seed in every batch, prompts, wrong use."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import sample
import train
from bits import Codec
from answers.segment import hint_map, load_checkpoint, own_size, segment


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = "--device cpu --max_steps 3 --batch_size 2 --image_size 16 --eval_images 1 --steps 2 --eval_every 3"
    assert train.main([*options.split(), "--out", str(out)]) == 0
    return out / "ckpt.pt"


def photo(size=(40, 30), mode="RGB"):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    return image.convert(mode)


def run(ckpt, tmp_path, *arguments):
    try:
        return sample.main([*map(str, arguments), "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--device", "cpu"])
    except SystemExit as e:
        return e.code


def test_one_image_gives_everything_at_its_own_size(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 3) == 0
    out = tmp_path / "out" / "a"
    maps = [f"{kind}_{j:02d}.png" for kind in ("labels", "overlay") for j in range(3)]
    assert {p.name for p in out.iterdir()} == {*maps, "medoid.png", "consensus.png", "grouping.png", "uncertainty.png", "panel.png", "segments.json"}
    assert all(Image.open(out / name).size == (40, 30) for name in (*maps, "medoid.png", "consensus.png", "grouping.png"))
    label = np.array(Image.open(out / "labels_00.png"))
    assert label.ndim == 2 and label.min() >= 1 and label.max() <= 16
    text = capsys.readouterr().out
    assert "step 3" in text and "only seen synthetic shapes" in text


def test_segments_json_is_the_medoid_in_coco_format(ckpt, tmp_path):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 3) == 0
    medoid = np.array(Image.open(tmp_path / "out" / "a" / "medoid.png"))
    content = json.loads((tmp_path / "out" / "a" / "segments.json").read_text())
    segments = content["annotations"]
    assert len(segments) == len(np.unique(medoid))
    masks = [coco_mask.decode(s["segmentation"]).astype(bool) for s in segments]
    assert (sum(m.astype(int) for m in masks) == 1).all()                          # they tile the image
    for s, m in zip(segments, masks):
        assert s["area"] == m.sum() and len(np.unique(medoid[m])) == 1


@pytest.mark.parametrize("name, mode, size", [
    ("grey.png", "L", (40, 30)), ("alpha.png", "RGBA", (40, 30)), ("cmyk.jpg", "CMYK", (40, 30)), ("p.gif", "P", (40, 30)),
    ("two.png", "1", (40, 30)), ("dot.png", "RGB", (1, 1)), ("wide.png", "RGB", (10000, 3)), ("tall.png", "RGB", (2, 900))])
def test_images_of_every_kind(ckpt, tmp_path, name, mode, size):
    photo(size, mode).save(tmp_path / name)
    assert run(ckpt, tmp_path, tmp_path / name, "--n", 1) == 0
    assert Image.open(tmp_path / "out" / name.split(".")[0] / "labels_00.png").size == size


def test_rotated_by_exif_comes_out_upright(ckpt, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                               # turn by 90 degrees to see it upright
    photo((40, 30)).save(tmp_path / "r.jpg", exif=exif)
    assert run(ckpt, tmp_path, tmp_path / "r.jpg", "--n", 1) == 0
    assert Image.open(tmp_path / "out" / "r" / "labels_00.png").size == (30, 40)


def test_a_bad_file_is_named_and_the_others_are_done(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    assert run(ckpt, tmp_path, tmp_path / "bad.png", tmp_path / "missing.png", tmp_path / "good.png", "--n", 1) == 2
    err = capsys.readouterr().err
    assert "bad.png: not a readable image" in err and "missing.png: no such file" in err and "Traceback" not in err
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
    assert (tmp_path / "out" / "b" / "panel.png").read_bytes() == b"mine" and "panel.png" in capsys.readouterr().err


def test_a_seed_gives_the_same_map_beside_other_images(ckpt):
    model, image = load_checkpoint(ckpt), photo()
    several, one = segment(image, model, n=4, seed=5), segment(image, model, n=1, seed=7)
    assert torch.equal(several.labels[2], one.labels[0])
    batched = segment(image, model, n=4, seed=5, batch=4)
    assert (batched.labels == several.labels).float().mean() > 0.99                # other kernels round otherwise
    assert not torch.equal(several.labels[0], several.labels[1])


def test_own_size_is_bilinear_then_the_nearest_code():
    """Without the image and with every code allowed, this is interpolation and the signs."""
    codec, x = Codec(bits=4), torch.randn(4, 16, 16)
    whole = torch.nn.functional.interpolate(x[None, :, :12, :16].clamp(-1, 1), (37, 50), mode="bilinear", align_corners=False)
    mine = own_size(x.clamp(-1, 1), (12, 16), 50, 37, codec, among=[torch.arange(16)])
    assert torch.equal(mine, codec.decode(whole)[0])


def test_hints_are_held(ckpt):
    model, image = load_checkpoint(ckpt), photo((32, 32))
    hints = hint_map(32, 32, "4,4 8,20;26,16")
    assert set(np.unique(hints)) == {0, 1, 2} and hints[4, 4] == hints[20, 8] != hints[16, 26]
    labels = segment(image, model, n=2, hints=hints).labels
    for one in labels:
        assert one[4, 4] == one[20, 8] != one[16, 26]


@pytest.mark.parametrize("arguments, words", [
    (["--least", "-1"], "--least and --merge must be 0"), (["--merge", "-0.5"], "--least and --merge must be 0"),
    (["--n", "0"], "--n must be at least 1"), (["--steps", "0"], "--steps must be at least 1"),
    (["--device", "cuda:99"], "try --device cpu"), (["--ckpt", "nowhere.pt"], "no such file"),
    (["--ckpt", "README.md"], "README.md"), (["--box", "1,2"], "x0,y0,x1,y1"), (["--points", "900,900"], "900")])
def test_wrong_use_gets_one_sentence(ckpt, tmp_path, capsys, arguments, words):
    photo().save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(tmp_path / "a.png"), "--ckpt", str(ckpt), "--out", str(tmp_path), *arguments])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count("\n") == 1


def test_the_newest_checkpoint_is_taken_and_without_one_the_weights_in_the_box(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")
    assert sample.main(["a.png", "--n", "1", "--out", "s"]) == 0
    assert "weights/photo.pt" in capsys.readouterr().out
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "ckpt.pt").write_bytes(ckpt.read_bytes())
    assert sample.main(["a.png", "--n", "1", "--out", "s"]) == 0
    assert "out/mine/ckpt.pt" in capsys.readouterr().out
