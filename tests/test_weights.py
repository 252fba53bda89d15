"""The weights in the box: what is in the file, and that they segment."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import train
from answers.checkpoints import SHIPPED, load_checkpoint, newest_checkpoint, read_checkpoint
from answers.segment import segment
from metrics import scores


def test_the_file_says_where_it_comes_from():
    content = read_checkpoint(SHIPPED)
    assert SHIPPED.stat().st_size <= 12e6 and {v.dtype for v in content["ema"].values()} == {torch.bfloat16}
    assert {"data", "budget", "scores", "licence"} <= content["about"].keys() and "net" not in content
    words = json.dumps({k: v for k, v in content.items() if k != "ema"}, default=str)
    assert "/home" not in words and "/tmp" not in words and "/work" not in words


def test_a_checkpoint_of_the_users_own_comes_first(tmp_path):
    assert newest_checkpoint(tmp_path) == SHIPPED
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.pt").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == tmp_path / "run/ckpt.pt"
    with pytest.raises(ValueError, match="python train.py"):
        newest_checkpoint(tmp_path / "nothing", tmp_path / "missing.pt")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_not_the_files_fault(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not usable here"):
        load_checkpoint(SHIPPED, device)


def test_a_file_that_is_no_checkpoint_need_not_be_removed(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: not a readable checkpoint") as told:
        load_checkpoint(tmp_path / "a.png")
    assert "remove it" not in str(told.value)


def test_they_tell_a_few_flat_regions_apart():
    image, truth = np.zeros((96, 128, 3), np.uint8), np.zeros((96, 128), np.int64)
    image[:] = (120, 170, 230)
    image[60:], truth[60:] = (70, 130, 50), 1
    y, x = np.mgrid[:96, :128]
    disc = (y - 55) ** 2 + (x - 70) ** 2 < 22**2
    image[disc], truth[disc] = (200, 60, 40), 2
    result = segment(Image.fromarray(image), load_checkpoint(SHIPPED), n=4)
    assert float(scores(result.answer.labels[None].long(), torch.from_numpy(truth)[None])["ari"]) > 0.8


def test_in_bfloat16_what_a_sample_gets_does_not_depend_on_its_batch():
    model, photo = load_checkpoint(SHIPPED), Image.effect_noise((64, 48), 90).convert("RGB")
    if next(model.net.parameters()).dtype == torch.float32:
        pytest.skip("this CPU has no bfloat16")
    one, two = (segment(photo, model, n=2, batch=batch, steps=1).x_hat for batch in (1, 2))
    assert torch.equal(one, two)


def test_the_readmes_commands_start_from_them(tmp_path):
    """Every command of README and docs that starts from weights/photo.pt, one step on a small folder."""
    texts = [(SHIPPED.parent.parent / name).read_text() for name in ("README.md", "docs/results.md")]
    commands = [c for text in texts for c in re.findall(r"python train\.py ((?:\\\n|[^`\n])*)", text)
                if "--init weights/photo.pt" in c or "--preset finetune" in c]
    assert len(commands) >= 4
    for kind, value in (("images", 90), ("labels", 1)):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for k in range(4):
            picture = Image.fromarray(np.full((16, 24), value + k, np.uint8))
            picture.save(tmp_path / "mine" / kind / f"{k}.png")
    quick = dict(dataset=tmp_path / "mine", init=SHIPPED, cache=tmp_path / "cache", max_steps=1, batch_size=1,
                 eval_images=1, steps=1, guidance=0, eval_every=9, device="cpu")
    for k, command in enumerate(commands):
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        for key, value in {**quick, "out": tmp_path / f"run{k}"}.items():
            words += [f"--{key}", str(value)]
        assert train.main(words) == 0, command
