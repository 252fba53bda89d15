"""sample.py as a user runs it: files of every kind, the same seed in every batch, wrong use."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from sample import disagreement, load_checkpoint, own_size, segment


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
    return sample.main([*map(str, arguments), "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_one_image_gives_labels_overlays_and_a_panel(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png", "--n", 3) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([f"a_{j:02d}{end}.png" for j in range(3) for end in ("", "_overlay")] + ["a_panel.png"])
    label = np.array(Image.open(tmp_path / "out" / "a_00.png"))
    assert label.shape == (30, 40) and label.min() >= 1 and label.max() <= 64
    assert "step 3" in capsys.readouterr().out


@pytest.mark.parametrize("name, mode, size", [
    ("grey.png", "L", (40, 30)), ("alpha.png", "RGBA", (40, 30)), ("cmyk.jpg", "CMYK", (40, 30)), ("p.gif", "P", (40, 30)),
    ("two.png", "1", (40, 30)), ("dot.png", "RGB", (1, 1)), ("wide.png", "RGB", (10000, 3)), ("tall.png", "RGB", (2, 900))])
def test_images_of_every_kind(ckpt, tmp_path, name, mode, size):
    photo(size, mode).save(tmp_path / name)
    assert run(ckpt, tmp_path, tmp_path / name, "--n", 1) == 0
    assert Image.open(tmp_path / "out" / f"{name.split('.')[0]}_00.png").size == size


def test_rotated_by_exif_comes_out_upright(ckpt, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                               # turn by 90 degrees to see it upright
    photo((40, 30)).save(tmp_path / "r.jpg", exif=exif)
    assert run(ckpt, tmp_path, tmp_path / "r.jpg", "--n", 1) == 0
    assert Image.open(tmp_path / "out" / "r_00.png").size == (30, 40)


def test_a_bad_file_is_named_and_the_others_are_done(ckpt, tmp_path, capsys):
    photo().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    assert run(ckpt, tmp_path, tmp_path / "bad.png", tmp_path / "missing.png", tmp_path / "good.png", "--n", 1) == 2
    err = capsys.readouterr().err
    assert "bad.png: not a readable image" in err and "missing.png: no such file" in err and err.count("\n") == 2
    assert (tmp_path / "out" / "good_00.png").exists()


def test_a_seed_gives_the_same_map_in_every_batch(ckpt):
    model, image = load_checkpoint(ckpt), photo()
    together, _ = segment([image, photo((20, 20))], model, n=4, seed=5, batch=8)
    alone, _ = segment([image], model, n=1, seed=7, batch=1)
    assert torch.equal(model.codec.decode(together[0, 2:3]), model.codec.decode(alone[0]))
    assert not torch.equal(together[0, 0], together[0, 1])


def test_own_size_is_torchs_bilinear_upsampling(ckpt):
    model, x = load_checkpoint(ckpt), torch.randn(4, 16, 16)
    whole = torch.nn.functional.interpolate(x[None, :, :12, :16], (37, 50), mode="bilinear", align_corners=False)
    assert torch.equal(own_size(x, (12, 16), 50, 37, model.codec), model.codec.decode(whole)[0])


def test_disagreement_ignores_the_numbers_of_segments():
    a = torch.tensor([[0, 0, 1, 1]])
    assert disagreement(torch.stack([a, 9 - a])).max() == 0
    assert disagreement(torch.stack([a, torch.tensor([[0, 0, 0, 1]])])).tolist() == [[0, 0, 1, 0]]
    b = torch.tensor([[3, 3, 5, 7]])                                               # 3 pairs, 2 of them with b
    assert torch.allclose(disagreement(torch.stack([a, a, b])), torch.tensor([[0, 0, 0, 2 / 3]]))


@pytest.mark.parametrize("arguments, words", [
    (["--n", "0"], "--n must be at least 1"), (["--steps", "0"], "--steps must be at least 1"),
    (["--device", "cuda:99"], "try --device cpu"), (["--ckpt", "nowhere.pt"], "no such file"),
    (["--ckpt", "README.md"], "README.md")])
def test_wrong_use_gets_one_sentence(ckpt, tmp_path, capsys, arguments, words):
    photo().save(tmp_path / "a.png")
    assert run(ckpt, tmp_path, tmp_path / "a.png") == 0
    assert sample.main([str(tmp_path / "a.png"), "--ckpt", str(ckpt), "--out", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")
    assert sample.main(["a.png"]) == 2
    assert "python train.py" in capsys.readouterr().err


def test_the_newest_checkpoint_is_found(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "ckpt.pt").write_bytes(ckpt.read_bytes())
    photo().save("a.png")
    assert sample.main(["a.png", "--n", "1", "--out", "s"]) == 0
    assert "out/mine/ckpt.pt" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert sample.main(["empty"]) == 2
    assert "no images in this folder" in capsys.readouterr().err
