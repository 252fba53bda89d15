"""The data sets' formats as their authors publish them, and every kind of bad input: it is named, skipped and
counted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from pycocotools import mask as coco_mask

from bits import Codec
from data import load
from frame import connected
from sources import formats
from sources.formats import rle_runs
from sources.packing import DONE, convert

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools with numpy 2
ORIGINAL = Path(__file__).parent.parent.parent / "shared/data/original"
original = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="../shared/data/original is not there")
PIXEL = np.random.default_rng(0).integers(1, 255, (24, 32, 3), dtype=np.uint8)  # 32 wide, 24 high
LABEL = np.repeat(np.arange(32, dtype=np.uint8)[None] // 8 * 10, 24, 0)  # four bands: 0, 10, 20, 30


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def same_segments(a, b):
    """Whether two maps differ in nothing but the names of the segments."""
    pairs = set(zip(np.asarray(a).ravel().tolist(), np.asarray(b).ravel().tolist()))
    return len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})


def opened(root, name, split="val", size=32, **options):
    return load(str(name), split, size, root=root, cache=Path(root) / "cache", workers=1, **options)


def nearest(array, size):
    """Label map scaled so that its longer side is `size`, the other the next even number, pixel by pixel."""
    H, W = array.shape[:2]
    h, w = (next(n for n in range(size + 1) if n == size or n % 2 == 0 and n * max(H,
                                                                                   W) >= s * size)
                                                                                   for s in (H, W))
    return np.array([[array[int((i + 0.5) * H / h), int((j + 0.5) * W / w)] for j in range(w)]
                     for i in range(h)])


# ----------------------------------------------------------------------------------------------------- origin


def reference(dataset, expected):
    """Every sample's label maps against full-resolution ones made in the test."""
    for i, maps in enumerate(expected):
        h, w = dataset.sizes[i]
        assert len(dataset.maps(i)) == len(maps)
        for got, want in zip(dataset.maps(i).numpy(), maps):
            assert same_segments(got[:h, :w],
                                 nearest(want, 64)) and (got[h:] == -1).all() and (got[:, w:] == -1).all()


@original
def test_original_coco_panoptic(tmp_path):
    source = ORIGINAL / "coco_panoptic"
    shutil.copytree(source / "input_images", tmp_path / "coco/val2017")
    shutil.copytree(source / "panoptic_examples", tmp_path / "coco/annotations/panoptic_val2017")
    shutil.copy(source / "panoptic_examples.json", tmp_path / "coco/annotations/panoptic_val2017.json")
    dataset = opened(tmp_path, "coco", size=64)
    expected = []
    for a in json.loads((source / "panoptic_examples.json").read_text())["annotations"]:
        rgb = np.asarray(Image.open(source / "panoptic_examples" / a["file_name"])).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        for s in a["segments_info"]:
            assert (ids == s["id"]).sum() == s["area"]  # the file says it itself
            ids[ids == s["id"]] = -1 if s["iscrowd"] else s["id"]
        expected.append([ids])
    reference(dataset, expected)


@original
def test_original_coco_instances(tmp_path):
    dataset = opened(tmp_path, "coco", size=64) if shutil.copytree(ORIGINAL / "coco_instances",
                                                                   tmp_path / "coco") else None
    content = json.loads((ORIGINAL / "coco_instances/annotations/instances_val2017.json").read_text())
    expected = []
    for image in content["images"]:
        shape = image["height"], image["width"]
        label, area, crowd = np.zeros(shape, int), np.full(shape, np.inf), np.zeros(shape, bool)
        for j, a in enumerate([a for a in content["annotations"] if a["image_id"] == image["id"]], 1):
            s = a["segmentation"]
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(s, *shape)) if isinstance(s,
                                                                                                    list) else
                                    coco_mask.frPyObjects(s, *shape)).astype(bool)
            if a["iscrowd"]:
                crowd |= mask
            else:
                over = mask & (mask.sum() <= area)  # the smallest object of a pixel wins
                label[over], area[over] = j, mask.sum()
        expected.append([np.where(crowd & (label == 0), -1, label)])
    assert any((e[0] == -1).any() for e in expected)  # there is a crowd in these files
    reference(dataset, expected)
    ignore = opened(tmp_path, "coco", size=64, unlabelled="ignore")
    reference(ignore, [[np.where(e[0] == 0, -1, e[0])] for e in expected])


@original
def test_original_ade20k(tmp_path):
    full, parsing = ORIGINAL / "ade20k_full", ORIGINAL / "ade20k_sceneparsing"
    dataset = load("ade20k", "train", 64, root=full, cache=tmp_path, workers=1)
    rgb = np.asarray(Image.open(full / "ADE_train_00016964_seg.png")).astype(int)
    reference(dataset, [[(rgb[..., 0] // 10 * 256 + rgb[..., 1]) * 256 + rgb[..., 2]]])
    objects = json.loads((full / "ADE_train_00016964.json").read_text())["annotation"]["object"]
    visible = [np.asarray(Image.open(full / o["instance_mask"])) == 255 for o in objects
               if o["parts"]["part_level"] == 0]
    got = dataset.maps(0)[0].numpy()[: dataset.sizes[0][0]]
    assert len(np.unique(got)) <= len(visible) + 1  # and the unlabelled
    for mask in visible[:8]:  # an object is one segment, but for its parts
        ids, counts = np.unique(got[nearest(mask, 64)], return_counts=True)
        assert counts.max() == counts.sum()
    dataset = load("ade20k", "val", 64, root=parsing, cache=tmp_path, workers=1)
    reference(dataset, [[np.asarray(Image.open(parsing / f"annotations/ADE_val_0000000{i}.png"))]
                        for i in (1, 2, 3)])
    assert dataset.names == [f"ADE_val_0000000{i}" for i in (1, 2, 3)]
    with pytest.raises(FileNotFoundError, match="no ADE_train_"):
        load("ade20k", "train", 64, root=parsing, cache=tmp_path)


@original
def test_original_bsds500(tmp_path):
    dataset = load("bsds500", "train", 64, root=ORIGINAL / "bsds500", cache=tmp_path, workers=1)
    assert dataset.names == ["100075", "100080"]
    mats = [scipy.io.loadmat(ORIGINAL / f"bsds500/data/groundTruth/train/{n}.mat")["groundTruth"]
            for n in dataset.names]
    reference(dataset, [[m[0, k]["Segmentation"][0, 0] for k in range(m.shape[1])] for m in mats])
    assert [len(dataset.maps(i)) for i in (0, 1)] == [6, 5]
    draws = [dataset.get([0], np.array([d]))[1][0] for d in (0.0, 0.2, 0.99)]  # one annotator each
    assert all((d == dataset.maps(0)[k]).all() for d, k in zip(draws, (0, 1, 5)))


# ------------------------------------------------------------------------------------------------------------


def rle(mask, compressed):
    """Written here: counts of 0s and 1s in turn, column by column; compressed by pycocotools."""
    if compressed:
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": code["size"], "counts": code["counts"].decode()}
    flat, counts, value = mask.T.ravel().tolist(), [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def box(top, left, bottom, right):
    mask = np.zeros((24, 32), bool)
    mask[top:bottom, left:right] = True
    return mask


def instances(root, segmentations, split="val", names=("a",), name=None, **changes):
    """root/coco with images `names`, each with these (segmentation, iscrowd)."""
    images = [{"id": 5 + i, "file_name": f"{n}.png", "height": 24, "width": 32, **changes} for i,
              n in enumerate(names)]
    for n in names:
        write(root / f"{split}2017" / f"{n}.png", PIXEL)
    notes = [{"image_id": i["id"], "segmentation": s, "iscrowd": c} for i in images for s, c in segmentations]
    file = name or root / f"annotations/instances_{split}2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    return file


def test_instances_of_every_kind(tmp_path):
    small, middle, large, crowd = box(4, 4, 8, 8), box(2, 2, 12, 12), box(0, 0, 20, 20), box(10, 0, 24, 32)
    polygon = [[2, 2, 12, 2, 12, 12, 2, 12], [20, 2, 22, 2, 22, 4, 20, 4]]  # one object of two parts
    instances(tmp_path / "coco",
              [(rle(small, True), 0), (polygon, 0), (rle(large, False), 0), (rle(crowd, False), 1)])
    got = opened(tmp_path, "coco").maps(0)[0].numpy()[:24]
    want = np.zeros((24, 32), int)  # painted in the right order by hand
    for value, mask in ((-1, crowd), (3, large), (2, middle | box(2, 20, 4, 22)), (1, small)):
        want[mask] = value
    assert same_segments(got, want) and ((got == -1) == (want == -1)).all()
    ignore = opened(tmp_path, "coco", unlabelled="ignore").maps(0)[0].numpy()[:24]
    assert ((ignore == -1) == (want <= 0)).all()


@pytest.mark.parametrize("shape", [(1, 1), (24, 32), (480, 640)])
def test_rle_runs_are_the_mask_s(shape):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = rng.random(shape) < rng.random() ** 4  # from nearly empty to nearly full
        assert rle_runs(rle(mask, True)["counts"]) == rle(mask, False)["counts"]


@pytest.mark.parametrize("segmentation, words", [
    ({"size": [24, 32], "counts": [5, 5]}, "add up to 10, not to 24 \\* 32 = 768"),
    ({"size": [24, 32], "counts": [700, 100]}, "add up to 800"),
    ({"size": [24, 32], "counts": [800, -32]}, "add up to 768"),
    ({"size": [24, 32], "counts": rle(box(0, 0, 9, 9), True)["counts"][:-2]}, "RLE"),
    ({"size": [24, 32], "counts": "~~"}, "RLE"),
    ({"size": [24, 32], "counts": ""}, "RLE"),
    (rle(np.zeros((9, 9), bool), True), "an RLE of \\[9, 9\\] for an image of \\[24, 32\\]"),
    ({"counts": [768]}, "size"),
    ([[1, 1, 5, 5]], "a polygon of 2 points"),
    ([[1, 1, 5, 5, 9]], "a polygon of 2.5 points"),
    ([[40, 5, 50, 5, 50, 9]], "a polygon outside the image of 32 x 24"),
    ([[0, 0, 1e9, 0, 5, 5]], "a polygon outside the image"),
    ([], "no polygon"),
    ("bed", "a list of polygons .* or an RLE, not \"bed\""),
])
def test_bad_segmentations(tmp_path, segmentation, words):
    instances(tmp_path / "coco", [(segmentation, 0)])
    with pytest.raises(ValueError, match=f"instances_val2017.json: annotation 0, of .*a.png: .*{words}") as e:
        opened(tmp_path, "coco")
    assert "\n" not in str(e.value)


def test_a_polygon_that_reaches_over_the_edge_is_cut(tmp_path):
    instances(tmp_path / "coco", [([[-5, -5, 16, -5, 16, 30, -5, 30]], 0)])
    assert same_segments(opened(tmp_path, "coco").maps(0)[0].numpy()[:24], box(0, 0, 24, 16))


# ----------------------------------------------------------------------------------------------------- entity


def test_entity_split(tmp_path):
    files = {}
    for part, folder, count in (("val", "entity_02", 8), ("train", "entity_01", 80)):
        files[part] = [f"{folder}/{i:03}" for i in range(count)]
        if part == "train":
            files[part].append("entity_02/003")  # one that is in both: it is a test image
        instances(tmp_path / "entity/skip", [(rle(box(0, 0, 9, 9), True), 0)], names=files[part],
                  name=tmp_path / f"entity/entityseg_{part}_lr.json")
        shutil.copytree(tmp_path / "entity/skip/val2017", tmp_path / "entity/images_lr", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "entity/skip")

    def parts():
        sets = [formats.find_entity(tmp_path / "entity", split)[1]() for split in ("train", "val", "test")]
        return [{Path(item.image).relative_to(tmp_path / "entity/images_lr").with_suffix("").as_posix()
                 for item in s} for s in sets]

    train, val, test = parts()
    assert (len(train), len(val), len(test)) == (70, 9, 9) and set(files["val"]) < test
    assert train | val | test == set(files["train"]) | set(files["val"]) and not (train & val or train & test
                                                                                  or val & test)
    assert parts() == [train, val, test]
    dataset = opened(tmp_path, "entity", "test")
    assert len(dataset) == 9 and same_segments(dataset.maps(0)[0].numpy()[:24], box(0, 0, 9, 9))
    with pytest.raises(FileNotFoundError, match="EntitySeg is not complete: .*entityseg_train_lr.json"):
        load("entity", "train", 32, root=tmp_path / "nowhere")


def test_ade20k_in_both_formats(tmp_path):
    ids = np.zeros((24, 32, 3), np.uint8)
    ids[:, 8:16], ids[:, 16:24], ids[:, 24:] = (0, 43, 1), (10, 43, 1), (10, 43, 2)  # classes 0, 43, 299, 299
    root = tmp_path / "ade20k"
    write(root / "full/images/ADE/validation/street/ADE_val_00000001.jpg", PIXEL)
    write(root / "full/images/ADE/validation/street/ADE_val_00000001_seg.png", ids)
    write(root / "full/images/ADE/validation/street/ADE_val_00000001/instance_000_ADE_val_00000001.png",
          LABEL)
    write(root / "parsing/images/validation/ADE_val_00000002.jpg", PIXEL)
    write(root / "parsing/annotations/validation/ADE_val_00000002.png", LABEL)
    dataset = opened(tmp_path, "ade20k")
    assert dataset.names == ["ADE_val_00000001", "ADE_val_00000002"]
    assert all(same_segments(dataset.maps(i)[0].numpy()[:24], LABEL) for i in (0, 1))
    with pytest.raises(ValueError, match="use split val"):
        opened(tmp_path, "ade20k", "test")
    (root / "parsing/annotations/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(ValueError, match="ADE_val_00000002.jpg has no label"):
        opened(tmp_path, "ade20k")


def flood(label):
    """Connected components by walking from pixel to pixel."""
    out, number = np.zeros(label.shape, int), 0
    for start in np.ndindex(label.shape):
        if label[start] > 0 and not out[start]:
            number += 1
            stack = [start]
            while stack:
                i, j = stack.pop()
                inside = 0 <= i < label.shape[0] and 0 <= j < label.shape[1]
                if inside and label[i, j] == label[start] and not out[i, j]:
                    out[i, j] = number
                    stack += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return out


def test_names_match_however_their_accents_are_written(tmp_path):
    """macOS writes an e and an accent where others write one letter."""
    for image, label in (("cafe\u0301", "caf\u00e9"), ("\u00fc", "u\u0308_a0")):
        write(tmp_path / f"d/images/val/{image}.png", PIXEL)
        write(tmp_path / f"d/labels/val/{label}.png", LABEL)
    assert len(opened(tmp_path, tmp_path / "d")) == 2


def test_components_of_classes(tmp_path):
    for seed, shape in enumerate([(24, 32), (1, 40), (33, 1), (1, 1)]):
        label = np.random.default_rng(seed).integers(0, 4, shape)
        assert same_segments(connected(label), flood(label))
    label = np.zeros((24, 32), np.uint8)
    label[2:9, 2:9], label[9:20, 9:20], label[2:9, 20:30] = 7, 7, 7  # the first two touch at a corner only
    write(tmp_path / "d/images/val/x.png", PIXEL), write(tmp_path / "d/labels/val/x.png", label)
    classes, parts = (opened(tmp_path, tmp_path / "d", components=c).maps(0)[0].unique().tolist()
                      for c in (False, True))
    assert classes == [-1, 0, 1] and parts == [-1, 0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------


def sick_folder(root, n=200):
    for i in range(n):
        write(root / f"images/train/{i:03}.png", PIXEL[:6, :8])
        write(root / f"labels/train/{i:03}.png", LABEL[:6, :8])
    return root


def whole_jpeg(path):
    return write(path, np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8)).read_bytes()


def bomb(path):
    """A PNG header that promises 30,000 x 30,000 pixels."""
    import struct
    import zlib
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head
                     + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT")


SICK = {
    "truncated.jpg": (lambda p: p.write_bytes(whole_jpeg(p)[:1500]), "not a readable image .*cut off: get "
                                                                     "it anew"),
    "text.jpg": (lambda p: p.write_text("this is no picture"), "not a readable image \\(no image format"),
    "zero.png": (lambda p: p.write_bytes(b""), "not a readable image \\(the file is empty\\)"),
    "bomb.png": (bomb, "more than [0-9]+ pixels"),
    "size.png": (lambda p: write(p, PIXEL[:5, :8]), "is 8 x 6 pixels, its image .* 8 x 5"),
}


@pytest.mark.parametrize("name", SICK)
def test_bad_images(tmp_path, name):
    make, words = SICK[name]
    write(tmp_path / "d/labels/val" / Path(name).with_suffix(".png"), LABEL[:6, :8])
    (tmp_path / "d/images/val").mkdir(parents=True)
    make(tmp_path / "d/images/val" / name)
    with pytest.raises(ValueError, match=words) as e:
        opened(tmp_path, tmp_path / "d")
    assert name in str(e.value) and "1 of 1 items cannot be used" in str(e.value) and "\n" not in str(e.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """As a label map, and as a declared size of an RLE: a minimal PNG, so decoding would fail otherwise."""
    write(tmp_path / "d/images/val/x.png", PIXEL), (tmp_path / "d/labels/val").mkdir(parents=True)
    bomb(tmp_path / "d/labels/val/x.png")
    with pytest.raises(ValueError, match="labels/val/x.png: more than"):
        opened(tmp_path, tmp_path / "d")
    instances(tmp_path / "coco", [({"size": [30_000, 30_000], "counts": [900_000_000]}, 0)], height=30_000,
              width=30_000)
    with pytest.raises(ValueError, match="a.png is 32 x 24 pixels, but 30000 x 30000 in"):
        opened(tmp_path, "coco")


@pytest.mark.parametrize("words, change", [
    ("x.png: 768 colours, most of them in single pixels: no label map",
     lambda d: write(d / "labels/val/x.png", PIXEL)),
    ("x.png is 30 x 24 pixels, its image .*x.png 32 x 24",
     lambda d: write(d / "labels/val/x.png", LABEL[:, :30])),
    ("x.png has no label: expected .*labels/val/x.png or x_a0.png",
     lambda d: (d / "labels/val/x.png").unlink()),
    ("x.png has no image of the same stem", lambda d: (d / "images/val/x.png").unlink()),
    ("x.png: not a readable label map", lambda d: (d / "labels/val/x.png").write_bytes(b"\x89PNG")),
    ("holds no image that can be used", lambda d: [p.unlink() for p in d.glob("*/val/*")]),
    ("holds no image that can be used: .*x.png: nothing labelled",
     lambda d: write(d / "labels/val/x.png", LABEL * 0)),
])
def test_bad_folders(tmp_path, words, change):
    write(tmp_path / "d/images/val/x.png", PIXEL), write(tmp_path / "d/labels/val/x.png", LABEL)
    change(tmp_path / "d")
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, tmp_path / "d", unlabelled="ignore")


def panoptic(root, edit=lambda content: None):
    ids = LABEL.astype(int) * 1000
    write(root / "val2017/a.png", PIXEL)
    write(root / "annotations/panoptic_val2017/a.png",
          np.dstack([ids % 256, ids // 256 % 256, ids // 65536]).astype(np.uint8))
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [
        {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": i}
                                                                for i in (10_000, 20_000, 30_000)]}]}
    file = root / "annotations/panoptic_val2017.json"
    file.write_text(edit(content) or json.dumps(content))


def test_good_panoptic(tmp_path):
    panoptic(tmp_path / "coco")
    assert same_segments(opened(tmp_path, "coco").maps(0)[0].numpy()[:24], LABEL)


@pytest.mark.parametrize("words, edit", [
    ("panoptic_val2017.json: cut off, or no JSON", lambda c: json.dumps(c)[:-20]),
    ("panoptic_val2017.json: it has no list 'annotations'", lambda c: c.pop("annotations") and None),
    ("panoptic_val2017.json: it has no list 'images'", lambda c: "[1, 2]"),
    ("panoptic_val2017.json: entry 0 has no key 'segments_info'",
     lambda c: c["annotations"][0].pop("segments_info") and None),
    ("panoptic_val2017.json: entry 0: unknown image id 77",
     lambda c: c["annotations"][0].update(image_id=77)),
    ("file_name '../a.png' is absolute or has '..' in it: refused",
     lambda c: c["images"][0].update(file_name="../a.png")),
    ("file_name '/etc/passwd' is absolute", lambda c: c["annotations"][0].update(file_name="/etc/passwd")),
    ("file_name 'C:.x.png' is absolute", lambda c: c["annotations"][0].update(file_name="C:\\x.png")),
    ("gone.png: no such file", lambda c: c["images"][0].update(file_name="gone.png")),
    ("a.png: no id encoding of its segments_info: 20000",
     lambda c: c["annotations"][0]["segments_info"].pop(1) and None),
])
def test_bad_panoptic(tmp_path, words, edit):
    panoptic(tmp_path / "coco", edit)
    with pytest.raises(ValueError, match=words) as e:
        opened(tmp_path, "coco")
    assert "\n" not in str(e.value)


def test_instances_json_with_faults(tmp_path):
    file = instances(tmp_path / "coco", [(rle(box(0, 0, 9, 9), True), 0)])
    content = json.loads(file.read_text())
    for words, change in (("entry 0 has no key 'height'", lambda c: c["images"][0].pop("height")),
                          ("entry 1: unknown image id 99",
                           lambda c: c["annotations"].append({"image_id": 99})),
                          ("file_name '../a.png' is absolute",
                           lambda c: c["images"][0].update(file_name="../a.png")),
                          ("annotation 0, of .*a.png: no segmentation in it",
                           lambda c: c["annotations"][0].pop("segmentation"))):
        copy = json.loads(json.dumps(content))
        change(copy)
        file.write_text(json.dumps(copy))
        with pytest.raises(ValueError, match=words):
            opened(tmp_path, "coco")


def test_bad_mat(tmp_path):
    root = tmp_path / "bsds500"
    write(root / "images/val/x.jpg", PIXEL)
    (root / "groundTruth/val").mkdir(parents=True)
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(300)):
        (root / "groundTruth/val/x.mat").write_bytes(content)
        with pytest.raises(ValueError, match="x.mat: not a readable .mat file"):
            opened(tmp_path, "bsds500")
    scipy.io.savemat(root / "groundTruth/val/x.mat", {"other": np.ones((3, 3))})
    with pytest.raises(ValueError, match="x.mat: not a readable .mat file .*groundTruth"):
        opened(tmp_path, "bsds500")


def test_bad_items_are_skipped_counted_and_listed(tmp_path, capsys):
    root = sick_folder(tmp_path / "d")
    (root / "images/train/007.png").write_bytes(b"")
    (root / "labels/train/100.png").unlink()
    dataset = opened(tmp_path, root, "train", 8)
    assert len(dataset) == 198 and "007" not in dataset.names
    assert "2 skipped as bad" in capsys.readouterr().out
    skipped = (dataset.folder / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 2 and any("007.png: not a readable image" in s
                                     for s in skipped) and any("100.png has no label" in s for s in skipped)
    with pytest.raises(ValueError, match="2 of 200 items cannot be used, more than --max_bad 0.005 allows"):
        opened(tmp_path, root, "train", 8, max_bad=0.005)  # also where the copy is there already
    (root / "images/train/008.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 200 items cannot be used.*skipped.txt lists them"):
        opened(tmp_path, root, "train", 8)
    assert len(opened(tmp_path, root, "train", 8, max_bad=0.02)) == 197


def test_nothing_labelled_is_skipped_but_not_bad(tmp_path, capsys):
    write(tmp_path / "d/images/val/x.png", PIXEL), write(tmp_path / "d/labels/val/x.png", LABEL)
    write(tmp_path / "d/images/val/y.png", PIXEL), write(tmp_path / "d/labels/val/y.png", LABEL * 0)
    assert opened(tmp_path, tmp_path / "d", unlabelled="ignore").names == ["x"]
    assert "0 skipped as bad, 1 without labels" in capsys.readouterr().out
    one = opened(tmp_path, tmp_path / "d")  # only one segment: a sample like any other
    assert one.names == ["x", "y"] and one.maps(1)[0].unique().tolist() == [-1, 0]


def test_more_segments_than_codes(tmp_path):
    """All survive packing; the palette merges the smallest into the largest."""
    label = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) // 2  # 384 of two pixels each
    write(tmp_path / "d/images/val/x.png", PIXEL), write(tmp_path / "d/labels/val/x.png", label)
    maps = opened(tmp_path, tmp_path / "d").maps(0)
    assert len(maps.unique()) == 384 + 1 and len(Codec(bits=4).cells(maps).unique()) == 16 + 1


def test_images_of_every_mode_are_read_right(tmp_path):
    """Grey of 16 bits, alpha, CMYK, palette, turned by EXIF: in a folder, next to labels of the upright
    size."""
    flat, exif = np.full((24, 32, 3), (200, 60, 20), np.uint8), Image.Exif()
    exif[0x0112] = 6
    cases = {"deep.png": (Image.fromarray(np.full((24, 32), 100 * 257, np.uint16)), [100] * 3),
             "cmyk.jpg": (Image.fromarray(flat).convert("CMYK"), flat[0, 0]),
             "alpha.png": (Image.fromarray(np.dstack([flat, np.zeros((24, 32), np.uint8)])), [255] * 3),
             "index.png": (Image.fromarray(flat).quantize(4), [200, 60, 20]),
             "turned.jpg": (Image.fromarray(flat.transpose(1, 0, 2)), flat[0, 0])}
    for name, (image, _) in cases.items():
        (tmp_path / "d/images/val").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "d/images/val" / name, **({"exif": exif} if name == "turned.jpg" else {}))
        write(tmp_path / "d/labels/val" / Path(name).with_suffix(".png"), LABEL)
    dataset = opened(tmp_path, tmp_path / "d")
    for i, stem in enumerate(dataset.names):
        image, _, (size,) = dataset.get([i])
        colour = next(c for name, (_, c) in cases.items() if Path(name).stem == stem)
        assert size.tolist() == [24,
                                 32] and np.abs(image[0, :24].numpy().astype(int) - colour).max() <= 5, stem


def test_reduced_jpeg_decoding_stays_close_to_the_area_filter(tmp_path):
    """A noisy JPEG, decoded at 1/2 and then resized, against the mean of all pixels in each new pixel's
    area."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    smooth = coarse.resize((1280, 960), Image.Resampling.BICUBIC)
    file = write(tmp_path / "x.jpg",
                 (np.asarray(smooth) * 0.8 + rng.integers(0, 50, (960, 1280, 1))).astype(np.uint8),
                 quality=90)
    assert formats.open_image(file, 128)[0].size == (640, 480) and formats.open_image(file, 128)[1] == (1280,
                                                                                                        960)
    item = formats.Item(str(file), ["label"], lambda item: [np.ones((960, 1280), np.int32)])
    outcome, (image,), size, labels, *_ = convert(item, 128, "segment", False)
    assert outcome == DONE and size == (96, 128) and (labels[0, :96] == 0).all()
    means = np.asarray(Image.open(file)).reshape(96, 10, 128, 10, 3).mean((1, 3))
    assert np.abs(image[:96] - means).mean() < 1
