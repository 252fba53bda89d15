"""Files that somebody or something changed: mutated 300 times each, they are used, or named in one
sentence."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_inputs import coco, folder, labelme, scene

import train
from answers.checkpoints import load_checkpoint
from answers.jobs import prepare
from answers.segment import denoise
from engine import MARK, TAIL, read, save_checkpoint
from sources.formats import FORMATS, find_coco
from sources.packing import BAD, DONE, EMPTY, LEFT, convert

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning",
                                        "ignore::RuntimeWarning",
                                        "ignore::PIL.Image.DecompressionBombWarning")
mutated = settings(max_examples=300, deadline=None, derandomize=True, database=None,
                   suppress_health_check=list(HealthCheck))
JUNK = st.sampled_from([None, True, 0, 1, -1, 3, 2.5, 1e300, float("nan"), float("inf"), 2**70, "", "x", "7",
                        [], [1], [[]], [[1, 2], [3, 4]], {}, {"x": 1}, "../x", "\0", "é" * 300])
INTERNAL = ("NoneType", "object at 0x", "Traceback", "unhashable", "subscriptable", "has no len()")


def sentence(text, *names):
    assert text and "\n" not in text and len(text) < 900, text
    assert any(str(name) in text for name in names), text
    assert not any(word in text for word in INTERNAL), text


def places(value, at=()):
    """Every way into nested lists and dictionaries."""
    yield from [at] if at else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*at, key))


def fresh(value):
    """A copy of nested lists and dictionaries; what lies in them is shared."""
    if isinstance(value, dict):
        return {key: fresh(part) for key, part in value.items()}
    return [fresh(part) for part in value] if isinstance(value, list) else value


def change(draw, content, times=3):
    """A copy of nested lists and dictionaries in which up to so many parts are replaced, left out or
    doubled."""
    content = fresh(content)
    for _ in range(draw(st.integers(1, times))):
        if not (ways := list(places(content))):
            break
        *way, last = draw(st.sampled_from(ways))
        inside = content
        for key in way:
            inside = inside[key]
        how = draw(st.integers(0, 3))
        if how == 0:
            del inside[last]
        elif how == 1 and isinstance(inside, list):
            inside.append(inside[last])
        else:
            inside[last] = fresh(draw(JUNK))
    return content


def change_bytes(draw, data):
    """Bytes of which some are others, the end or a part is missing, or a part is there twice."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, how = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(0, 4))
        if how < 3 and data:
            data[at] = draw(st.integers(0, 255))
        elif how == 3:
            del data[at : at + draw(st.sampled_from([1, 2, 7, 10**6]))]
        else:
            data[at:at] = data[at : at + 9]
    return bytes(data)


def used_or_named(home, listing, *names):
    """Every item of a listing is packed, or left with a sentence; so is a listing that cannot be made."""
    try:
        items = listing()
    except (ValueError, OSError) as e:
        return sentence(str(e), *names)
    for item in items:
        outcome, *result = convert(item, 16, "segment", False)
        if outcome == DONE:
            (image,), (h, w), labels = result[:3]
            assert image.shape == (16, 16, 3) and labels.dtype == np.uint16 and 0 < max(h, w) <= 16
        else:
            assert outcome in (BAD, EMPTY, LEFT)
            sentence(result[0], home, *names)


SETS = {}  # what is made once: a folder, a whole file


def once(key, make):
    if key not in SETS:
        SETS[key] = make()
    return SETS[key]


@mutated
@given(st.data())
def test_coco_json(tmp_path_factory, data):
    root = once("coco", lambda: coco(tmp_path_factory.mktemp("fuzz") / "coco", n=2))
    file, draw = root / "annotations/instances_train2017.json", data.draw
    content = once(file, lambda: json.loads(file.read_text()))
    file.write_bytes(json.dumps(change(draw, content)).encode() if draw(st.booleans())
                     else change_bytes(draw, json.dumps(content).encode()))
    used_or_named(root, find_coco(root, "train")[1], file)


@mutated
@given(st.data())
def test_labelme_json(tmp_path_factory, data):
    root = once("labelme", lambda: labelme(tmp_path_factory.mktemp("fuzz"), n=2))
    file = root / "im0.json"
    content = once(file, lambda: json.loads(file.read_text()))
    file.write_text(json.dumps(change(data.draw, content)))
    used_or_named(root, FORMATS["labelme"].find(root, "train")[1], file)


def encoded(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


TURNED = Image.Exif()
TURNED[0x112] = 6
IMAGES = [("jpg", "JPEG", dict(exif=TURNED)), ("jpg", "JPEG", dict(progressive=True)),
          ("png", "PNG", dict(exif=TURNED)), ("tif", "TIFF", dict(compression="tiff_lzw")),
          ("webp", "WEBP", dict(exif=TURNED)), ("gif", "GIF", {}), ("bmp", "BMP", {}),
          ("jp2", "JPEG2000", {}), ("ppm", "PPM", {}), ("tga", "TGA", {})]


@mutated
@given(st.data())
def test_image_bytes(tmp_path_factory, data):
    root = once("images", lambda: folder(tmp_path_factory.mktemp("fuzz") / "d", 1))
    suffix, kind, options = data.draw(st.sampled_from(IMAGES))
    for old in (root / "images/train").iterdir():
        old.unlink()
    path = root / f"images/train/im0.{suffix}"
    path.write_bytes(change_bytes(data.draw, encoded(Image.fromarray(scene()[0]), kind, **options)))
    used_or_named(root, FORMATS["folder"].find(root, "train")[1], path)


@mutated
@given(st.data())
def test_label_bytes(tmp_path_factory, data):
    root = once("labels", lambda: folder(tmp_path_factory.mktemp("fuzz") / "d", 1))
    path, mode = root / "labels/train/im0.png", data.draw(st.sampled_from(["L", "P", "RGB", "I;16"]))
    path.write_bytes(change_bytes(data.draw, encoded(Image.fromarray(scene()[1]).convert(mode), "PNG")))
    used_or_named(root, FORMATS["folder"].find(root, "train")[1], path, root / "images/train/im0.jpg")


def trained(out):
    """What sampling needs of a small network's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.SIZES, "tiny",
                      dict(width=16, mult=(1,), blocks=1, attn=0, heads=2, patch=2, groups=4))
        assert train.main(["--image_size", "16", "--batch_size", "2", "--max_steps", "1", "--eval_images",
                           "1", "--steps", "1", "--device", "cpu", "--out", str(out)]) == 0
    return {k: v for k, v in train.portable(read(out / "ckpt.pt")).items() if k not in ("format", "config")}


@mutated
@given(st.data())
def test_checkpoint_content(tmp_path_factory, data):
    """With its checksum made anew, as `save` does. A network that can be loaded also samples."""
    content = once("checkpoint", lambda: trained(tmp_path_factory.mktemp("run")))
    path = once("changed", lambda: tmp_path_factory.mktemp("changed") / "ckpt.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)  # 300 times
        if data.draw(st.booleans()):
            save_checkpoint(path, change(data.draw, content, 2))
        else:
            save_checkpoint(path, content)
            archive = change_bytes(data.draw, path.read_bytes()[:-TAIL])
            comment = MARK + hashlib.sha256(archive).hexdigest().encode()
            path.write_bytes(archive + len(comment).to_bytes(2, "little") + comment)
    try:
        model = load_checkpoint(path)
        job = next(denoise([prepare(Image.fromarray(scene()[0]), model)], model, 1, steps=1, guidance=0))
    except ValueError as e:
        return sentence(str(e), path, "sampler", "variance", "steps", "multiple", "sides")
    assert len(job.x_hat) == 1 and torch.is_tensor(job.x_hat[0])
