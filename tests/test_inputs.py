"""Images, label maps and data sets as people have them: read, or named in a sentence, but never silently
wrong."""

import base64
import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import data
import train
from answers.scoring import own_maps
from data import load, originals
from sources import formats
from sources.formats import HEIC, format_of, read_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:__array__ implementation")
H, W = 24, 32


def scene(k=0):
    """A photo and its label map: two halves and a square, at another place for each k."""
    ids, rgb = np.ones((H, W), np.uint8), np.zeros((H, W, 3), np.uint8)
    ids[:, W // 2 :] = 2
    ids[4 + k % 8 : 12 + k % 8, 5:14] = 3
    for i, colour in enumerate(((60, 90, 200), (60, 160, 60), (240, 220, 40)), 1):
        rgb[ids == i] = colour
    return rgb, ids


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def folder(root, n=4, splits=("train", "val"), label=lambda path, ids: write(path.with_suffix(".png"), ids),
           **options):
    for split in splits:
        for k in range(n):
            rgb, ids = scene(k)
            write(root / "images" / split / f"im{k}.jpg", rgb, **options)
            label(root / "labels" / split / f"im{k}", ids)
    return root


def opened(root, split="train", size=W, name=None, **options):
    return load(name or str(root), split, size,
                **{"root": root.parent, "cache": root.parent / "cache", "workers": 1, **options})


def same_segments(a, b):
    """Whether two maps differ in nothing but the names of the segments; -1 is the same in both."""
    a, b = np.asarray(a), np.asarray(b)
    pairs = set(zip(a.ravel().tolist(), b.ravel().tolist()))
    one_to_one = len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})
    return one_to_one and ((a == -1) == (b == -1)).all()


def as_drawn(dataset, change=lambda ids: ids.astype(int), first=0):
    """Whether the packed maps are those of `scene`, changed."""
    return all(same_segments(dataset.maps(i)[0].numpy()[:H], change(scene(first + i)[1]))
               for i in range(len(dataset)))


def fails(root, words, **options):
    with pytest.raises((ValueError, OSError), match=words) as e:
        opened(root, **options)
    assert "\n" not in str(e.value) and not any(word in str(e.value)
                                                for word in ("NoneType", "Traceback", "object at 0x"))


# -------------------------------------------------------------------------------------------------------- kin


def png(array, colour):
    """A PNG of 16 bits a channel (80 x 60 pixels), of which Pillow writes only grey ones."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 80, 60, 16, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
             (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + a + b + struct.pack(">I",
                                                                                           zlib.crc32(a + b))
                                                                                           for a, b in parts)


RAMP = np.linspace(0, 1, 60 * 80).reshape(60, 80)
HOT = RAMP.copy()
HOT[3, 3] = 1000  # one broken pixel


@pytest.mark.parametrize("name, values", [
    ("twelve_bits.tif", (RAMP * 4095).astype(np.uint16)), ("few.png", (RAMP * 400).astype(np.uint16)),
    ("offset.tif", (29_000 + RAMP * 900).astype(np.uint16)),
    ("signed.tif", (RAMP * 3000 - 1000).astype(np.int32)), ("large.tif", (RAMP * 1e9).astype(np.int32)),
    ("hot.tif", HOT.astype(np.float32)),
    ("below.tif", (RAMP * 2 - 1).astype(np.float32)), ("tiny.tif", (RAMP * 1e-6).astype(np.float32)),
    ("hot16.tif", np.where(HOT > 1, 65535, RAMP * 999).astype(np.uint16))])
def test_numbers_of_any_range_use_the_whole_range_of_grey(tmp_path, name, values):
    got = np.asarray(read_image(write(tmp_path / name, values)))[..., 0].astype(float)
    got[3, 3] = got[3, 2]
    assert got.min() < 10 and got.max() > 245 and np.abs(got - 255 * RAMP).max() < 4  # still a ramp


def test_colours_of_16_bits_of_which_few_are_used_are_refused(tmp_path):
    for colour, channels in ((2, 3), (6, 4), (4, 2)):
        for top, good in ((65535, True), (4095, False)):
            value = np.repeat(RAMP[..., None] * top, channels, 2)
            value[..., 3 if channels == 4 else 1 if channels == 2 else 3:] = 65535  # alpha
            (tmp_path / "x.png").write_bytes(png(value.reshape(60, -1), colour))
            if good:
                assert np.asarray(read_image(tmp_path / "x.png")).max() == 255
            else:
                with pytest.raises(ValueError, match="x.png: not a readable image .16 bits a colour, of "
                                                     "which only the lower"):
                    read_image(tmp_path / "x.png")


@pytest.mark.parametrize("name, options",
                         [("a.jpg", {}), ("p.jpg", dict(progressive=True)), ("b.bmp", {}), ("t.tif", {}),
                          ("p.ppm", {})])
def test_a_file_without_its_last_bytes_is_taken_and_one_without_its_half_is_not(tmp_path, name, options):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8))
    rgb = np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC))
    whole = write(tmp_path / name, rgb, **options).read_bytes()
    right = np.asarray(read_image(tmp_path / name)).astype(int)
    for missing in (1, 2, 9):
        (tmp_path / name).write_bytes(whole[:-missing])
        with pytest.warns(formats.Notice, match=f"{name}: the file lacks its last bytes"):
            got = np.asarray(read_image(tmp_path / name)).astype(int)
        assert (np.abs(got - right).max(2) > 30).mean() < 0.01
    for kept in (0.5, 0.8):
        (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(ValueError, match=f"{name}: not a readable image .*save it again"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["jfif", "jpe", "avif", "jp2", "mpo", "tga", "ico", "webp", "qoi"])
def test_whatever_pillow_reads_is_found(tmp_path, kind):
    if Image.registered_extensions().get(f".{kind}") not in Image.SAVE:
        pytest.skip("this Pillow was built without it")
    folder(tmp_path / "d", splits=("",))
    for path in (tmp_path / "d/images").iterdir():
        write(path.with_suffix(f".{kind}"), Image.open(path),
              **(dict(sizes=[(W, H)]) if kind == "ico" else {}))
        path.unlink()
    assert len(opened(tmp_path / "d")) == 3


def test_what_pillow_cannot_read_is_named_with_the_remedy(tmp_path):
    root = folder(tmp_path / "d")
    for name in (".heic", ".HEIF"):
        assert name.lower() in HEIC
        old = next(root.glob("images/train/im0.*"))
        old.rename(old.with_suffix(name))
        old.with_suffix(name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
        fails(root, f"im0{name}: not a readable image .*(pip install pillow-heif|cannot be|HEIF|heif)")
    old = next(root.glob("images/train/im0.*"))
    old.rename(old.with_suffix(".cr2"))
    fails(root, "im0.png has no image of the same stem .*; there is .*im0.cr2, of no type that Pillow reads")


def exif(kind, value, count=1):
    """A JPEG's EXIF with the orientation tag as this TIFF type."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x112, kind, count, value, 0)


@pytest.mark.parametrize("block",
                         [exif(2, b"6\0\0\0", 2), exif(3, b"\x09\0\0\0"), exif(3, b"\0\0\0\0"),
                          exif(11, struct.pack("<f", 6.5)), exif(5, b"\xff\xff\0\0"),
                                   exif(7, b"\x06abc", 4), exif(99, b"\x06\0\0\0"),
                                   exif(3, b"\x06\0\0\0", 2**31), b"Exif\0\0",
                                   b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_exif_of_a_wrong_kind_turns_nothing(tmp_path, block):
    root = folder(tmp_path / "d")
    path = root / "images/train/im0.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:])
    assert read_image(path).size == (W, H)
    assert len(opened(root)) == 4 and as_drawn(opened(root))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_label_is_turned_with_its_photo_where_the_sizes_say_so(tmp_path, turn, capsys):
    """Against cameras' own rule: orientation t is stored such that the t-th of these operations on the stored
    pixels is upright."""
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
               5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, 3),
               7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1), 8: np.rot90}[turn]
    tag = Image.Exif()
    tag[0x112] = turn
    root = folder(tmp_path / "d", exif=tag)  # photos and labels, both as stored
    dataset = opened(root)
    stored = np.asarray(read_image(root / "images/train/im0.jpg")).astype(int)
    assert np.abs(stored - upright(scene()[0])).mean() < 15
    h, w = dataset.sizes[0]
    drawn_on_stored_pixels = turn >= 5
    # 2 to 4: cannot be known, and is said
    want = upright(scene()[1]) if drawn_on_stored_pixels else scene()[1]
    assert same_segments(dataset.maps(0)[0].numpy()[:h, :w], want)
    assert ("mirrored or turned by an EXIF tag" in (out := capsys.readouterr().out)) == (turn in (2, 3, 4))
    assert "(and 3 more of these: " in out or turn not in (2, 3, 4)
    maps = own_maps(originals(str(root), "train", "data")[0], "segment")  # eval.py's
    assert same_segments(maps[0], want)


# --------------------------------------------------------------------------------------------------- what lie


def test_what_systems_and_editors_leave_behind_is_no_data(tmp_path):
    root = folder(tmp_path / "d")
    for part, kind in (("images", "jpg"), ("labels", "png")):
        for name in (f"._im0.{kind}", ".DS_Store", "Thumbs.db", "desktop.ini",
                     f".ipynb_checkpoints/im0-checkpoint.{kind}", f"@eaDir/im0.{kind}", f"~im0.{kind}"):
            for at in (root / part, root / part / "train"):
                (at / name).parent.mkdir(exist_ok=True)
                (at / name).write_bytes((root / part / f"train/im0.{kind}").read_bytes())
        (root / part / "test").mkdir(), (root / part / "notes").mkdir()  # without images
    (root / "images/readme.txt").write_text("hello")
    assert opened(root, max_bad=0).names == [f"im{k}" for k in range(4)]
    fails(root, "images has train, val, but no test/", split="test")
    flat = folder(tmp_path / "flat", splits=("",))
    (flat / "images/.ipynb_checkpoints").mkdir(), (flat / "images/val").mkdir()
    assert len(opened(flat)) == 3 and len(opened(flat, "val")) == 1


def test_folders_in_folders(tmp_path):
    root = folder(tmp_path / "d", splits=("train/aachen", "train/bonn", "valid/köln"))
    dataset = opened(root)
    assert len(dataset) == 8 and len(opened(root, "val")) == 4
    for k, city in ((0, "aachen"), (4, "bonn")):
        assert same_segments(dataset.maps(k)[0].numpy()[:H], scene(0)[1]), city
    other = folder(tmp_path / "other", splits=("aachen", "bonn"))  # no splits: every tenth is val
    assert len(opened(other)) == 7 and len(opened(other, "val")) == 1
    both = folder(tmp_path / "both", splits=("train", "val", "validation"))
    fails(both, "val and .*validation are both named after the split val", split="val")


def test_images_beside_the_splits_are_left_out_and_that_is_said(tmp_path, capsys):
    root = folder(tmp_path / "d")
    for at in ("x", "more/y"):
        write(root / f"images/{at}.jpg", scene(9)[0])
    assert len(opened(root, max_bad=0)) == 4
    out = capsys.readouterr().out
    assert "y.jpg: left out, as it lies beside the folders train, val (and 1 more" in out
    assert "0 skipped as bad" in out


def test_two_images_of_one_stem(tmp_path):
    root = folder(tmp_path / "d")
    write(root / "images/train/im2.png", scene()[0])
    fails(root, "im2.jpg and .*im2.png have the same stem")
    (root / "images/train/im2.png").unlink()
    write(root / "labels/train/im2.tif", scene()[1])
    fails(root, "im2.png and .*im2.tif are both a label map of .*im2.jpg: keep one")


def test_one_image_without_splits(tmp_path):
    root = folder(tmp_path / "d", 1, ("",))
    fails(root, "holds one image: two are needed, as one is kept for validation", split="val")


# ------------------------------------------------------------------------------------------------------------


COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)


def masks(path, ids, name="{}_mask_{}.png", value=255):
    for i in np.unique(ids):
        write(path.parent / name.format(path.name, i), (ids == i).astype(np.uint8) * value)


LABELS = {
    "tif": lambda path, ids: write(path.with_suffix(".tif"), ids),
    "tif of 32 bits": lambda path, ids: write(path.with_suffix(".tif"), ids.astype(np.int32) * 100_000),
    "tif of floats": lambda path, ids: write(path.with_suffix(".TIF"), ids.astype(np.float32)),
    "bmp": lambda path, ids: write(path.with_suffix(".bmp"), ids),
    "16 bits": lambda path, ids: write(path.with_suffix(".png"), ids.astype(np.uint16) * 20_000),
    "colours": lambda path, ids: write(path.with_suffix(".png"), COLOURS[ids]),
    "colours and alpha": lambda path,
    ids: write(path.with_suffix(".png"), np.dstack([COLOURS[ids], np.full((H, W), 255, np.uint8)])),
    "grey and alpha": lambda path,
    ids: write(path.with_suffix(".png"), Image.fromarray(ids * 80).convert("LA")),
    "a mask a segment": masks,
    "masks of 0 and 1": lambda path, ids: masks(path, ids, value=1),
    "masks by another name": lambda path, ids: masks(path, ids, "{}-instance{}.png"),
    "masks by number": lambda path, ids: masks(path, ids, "{}_{}.png"),
    "a folder of masks": lambda path, ids: masks(path, ids, "{}/{}.png"),
    "a PNG and a picture of it": lambda path,
    ids: (write(path.with_suffix(".png"), ids), write(path.with_suffix(".jpg"), scene()[0])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_label_maps_of_every_kind(tmp_path, kind):
    root = folder(tmp_path / "d", label=LABELS[kind])
    assert len(opened(root, max_bad=0)) == 4 and as_drawn(opened(root))


def smooth(ids):
    large = Image.fromarray(COLOURS[ids]).resize((4 * W, 4 * H), Image.Resampling.BICUBIC)
    return np.asarray(large.rotate(20).resize((W, H), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("words, label", [
    ("im0.jpg: not a readable label map .a JPEG, whose compression changes the ids: export it as PNG",
     lambda path, ids: write(path.with_suffix(".jpg"), ids * 80)),
    ("im0.png: not a readable label map .a JPEG, whose", lambda path,
     ids: write(path.with_suffix(".png"), ids * 80, format="JPEG")),
    ("im0.tif: not a readable label map .a TIFF, whose compression", lambda path,
     ids: write(path.with_suffix(".tif"), ids * 80, compression="jpeg")),
    ("im0.webp: not a readable label map .a WEBP", lambda path,
     ids: write(path.with_suffix(".webp"), COLOURS[ids])),
    ("im0.png: [0-9]+ colours, most of them in single pixels", lambda path,
     ids: write(path.with_suffix(".png"), smooth(ids))),
    ("im0.png: [0-9]+ ids, most of them in single pixels", lambda path,
     ids: write(path.with_suffix(".png"), Image.fromarray(smooth(ids)).convert("L"))),
    ("im0.tif: not a readable label map .2 pages in one file", lambda path,
     ids: write(path.with_suffix(".tif"), ids, save_all=True, append_images=[Image.fromarray(ids)])),
    ("im0.tif: a label map has whole numbers", lambda path,
     ids: write(path.with_suffix(".tif"), ids / np.float32(3))),
    ("im0_mask_1.png: one of 3 files of .*im0.jpg, .* it has 3 values", lambda path,
     ids: masks(path, ids) or write(path.with_name(f"{path.name}_mask_1.png"), ids)),
    ("im0.jpg has no label: expected .*; there is .*im0.txt, of no type", lambda path,
     ids: (path.parent.mkdir(parents=True, exist_ok=True), path.with_suffix(".txt").write_text("0 0.5"))),
])
def test_label_maps_that_are_none(tmp_path, words, label):
    fails(folder(tmp_path / "d", label=label), words)


@pytest.mark.parametrize("colour", (2, 6, 4), ids=("RGB", "RGBA", "LA"))
def test_label_maps_of_16_bits_a_colour_which_would_lose_ids_are_named(tmp_path, colour):
    ids = np.repeat(np.repeat(np.arange(12).reshape(3, 4) + 1, 20, 0), 20, 1)

    def label(path, _):
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = {2: 3, 6: 4, 4: 2}[colour]
        path.with_suffix(".png").write_bytes(png(np.stack([ids] * channels, -1), colour))

    fails(folder(tmp_path / "d", label=label), "16 bits a colour, of which 8 are lost: save it in 16-bit")


def test_thin_upright_things_are_no_photo(tmp_path):
    poles = np.zeros((H, W), np.uint8)
    poles[2:22, 1::2] = np.arange(1, 17)
    for label in (poles, poles.repeat(2, 1)[:, 1:33].T[:H]):
        assert (formats.read_label(write(tmp_path / "a.png", np.ascontiguousarray(label))) == label).all()


def test_what_can_be_read_later_is_not_left_out_for_good(tmp_path, monkeypatch, capsys):
    """A photo that could not be read when the set was packed: said at every opening, with the remedy; a HEIC
    one is tried anew once pillow-heif is there."""
    root = folder(tmp_path / "d", n=4, splits=("train",))
    photo, bad = root / "images/train/im1.jpg", root / "images/train/im1.heic"
    photo.rename(bad)
    monkeypatch.setattr("sources.packing.pillow_heif", None)
    real = formats.Image.open

    def opening(path, *more):
        if str(path) == str(bad):
            raise formats.UnidentifiedImageError
        return real(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(formats.Image, "open", opening)
        assert len(opened(root, max_bad=0.5)) == 3
    capsys.readouterr()
    assert len(opened(root, max_bad=0.5)) == 3  # as it is packed
    out = capsys.readouterr().out
    assert "NOTE: 1 items of d-train were skipped when it was packed" in out and "remove" in out
    monkeypatch.setattr("sources.packing.pillow_heif", object())
    assert len(opened(root, max_bad=0.5)) == 4


def test_names_with_what_ends_lines_stay_in_their_rows(tmp_path):
    root, names = tmp_path / "d", ("a", "b\x85c", "d", "e\u2028f", "g")
    for k, name in enumerate(names):
        write(root / "images/train" / f"{name}.png", scene(k)[0])
        write(root / "labels/train" / f"{name}.png", scene(k)[1])
    assert opened(root).names == ["a", "b c", "d", "e f", "g"]


def test_void(tmp_path, capsys):
    def border(path, ids):
        ids = ids.copy()
        ids[10:13] = 255
        write(path.with_suffix(".png"), ids)

    def without(ids, also=255):
        ids = ids.astype(int)
        ids[10:13] = -1
        return np.where(ids == also, -1, ids)

    root = folder(tmp_path / "d", label=border)
    opened(root)
    assert ("im0.png: id 255 is a segment like any other; where it is void, as 255 in VOC and Cityscapes, "
            "add --void 255 (and 3 more") in capsys.readouterr().out
    assert as_drawn(opened(root, void="255"), without) and "NOTE" not in capsys.readouterr().out
    assert as_drawn(opened(root, void="255,2"), lambda ids: without(ids, 2))
    assert as_drawn(opened(root, name=f"{root}:void=255:void=2"), lambda ids: without(ids, 2))
    # eval.py's, at the images' own size
    maps = own_maps(originals(str(root), "train", "data", (255,))[0], "segment")
    assert same_segments(maps[0], without(scene()[1]))
    fails(root, "--void 'x' is no id", void="x")
    assert data.main([str(root), "--void", "255", "--size", str(W), "--cache", str(tmp_path / "cache"),
                      "--workers", "1"]) == 0


def test_sets_with_nothing_to_tell_apart_are_warned_of(tmp_path, capsys):
    binary = lambda path, ids: write(path.with_suffix(".png"), (ids == 3) * np.uint8(255))
    opened(folder(tmp_path / "binary", label=binary))
    opened(folder(tmp_path / "binary", label=lambda path,
                  ids: write(path.with_suffix(".png"), (ids == 3) * np.uint8(255))))
    assert "NOTE" not in capsys.readouterr().out

    def specks(path, ids):
        ids = np.zeros((H, W), np.uint16)
        ids[::2, ::2] = 1 + np.arange(ids[::2, ::2].size).reshape(ids[::2, ::2].shape)
        write(path.with_suffix(".png"), ids)

    opened(folder(tmp_path / "specks", label=specks), size=8)
    assert "NOTE: of 772 segments, only 192 have a pixel left at 8 pixels" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------


def coco(root, edit=lambda content: None, n=3, file="annotations/instances_{}2017.json", images="{}2017",
         encoding="utf-8"):
    """Each image has two squares; what `scene` draws does not matter here."""
    for split in ("train", "val"):
        content = dict(images=[], annotations=[], categories=[dict(id=1, name="a")])
        for k in range(n):
            write(root / images.format(split) / f"im{k}.jpg", scene(k)[0])
            content["images"].append(dict(id=k, file_name=f"im{k}.jpg", height=H, width=W))
            for j, (x, y) in enumerate(((2.0, 2.0), (16.0, 10.0))):
                content["annotations"].append(dict(id=10 * k + j, image_id=k, category_id=1, iscrowd=0,
                                                   bbox=[x, y, 8.0, 8.0],
                                                   segmentation=[[x, y, x + 8, y, x + 8, y + 8, x, y + 8]]))
        text = edit(content)
        (root / file.format(split)).parent.mkdir(parents=True, exist_ok=True)
        (root / file.format(split)).write_text(text or json.dumps(content), encoding=encoding)
    return root


SQUARES = np.zeros((H, W), int)
SQUARES[2:10, 2:10], SQUARES[10:18, 16:24] = 1, 2


def first(**changes):
    return lambda content: content["annotations"][0].update(changes)


def every(make):
    return lambda content: [a.update(make(a)) for a in content["annotations"]] and None


def pairs(polygon):
    return np.reshape(polygon, (-1, 2)).tolist()


RLE = {"size": [H, W],
       "counts": coco_mask.encode(np.asfortranarray((SQUARES == 1).astype(np.uint8)))["counts"].decode()}


@pytest.mark.parametrize("edit", [
    every(lambda a: dict(image_id=str(a["image_id"]))), every(lambda a: dict(image_id=float(a["image_id"]))),
    every(lambda a: dict(segmentation=[pairs(a["segmentation"][0])])),
    every(lambda a: dict(segmentation=pairs(a["segmentation"][0]))),
    every(lambda a: dict(segmentation=a["segmentation"][0])),
    every(lambda a: dict(segmentation=[a["segmentation"]])),
    every(lambda a: dict(segmentation=[[str(v) for v in a["segmentation"][0]]])),
    every(lambda a: dict(iscrowd="0")), every(lambda a: dict(iscrowd=[])),
    every(lambda a: dict(iscrowd=None)),
    every(lambda a: dict(iscrowd=0.0)), lambda c: [a.pop("iscrowd") for a in c["annotations"]] and None,
    lambda c: [i.update(height=str(H), width=float(W)) for i in c["images"]] and None,
    first(segmentation=RLE), first(segmentation=[RLE]),
    first(segmentation={**RLE, "size": [float(H), str(W)]}), lambda c: "\ufeff" + json.dumps(c),
    lambda c: c["annotations"].sort(key=lambda a: -a["id"])], ids=range(18))
def test_coco_written_otherwise_is_read(tmp_path, edit):
    root = coco(tmp_path / "coco", edit)
    assert all(same_segments(opened(root, name="coco", max_bad=0).maps(i)[0].numpy()[:H], SQUARES)
               for i in range(3))


def test_coco_in_utf_16(tmp_path):
    assert len(opened(coco(tmp_path / "coco", encoding="utf-16"), name="coco")) == 3


@pytest.mark.parametrize("words, edit", [
    ("annotation 0, of .*im0.jpg: no segmentation in it", first(segmentation=None)),
    ("annotation 0, of .*im0.jpg: no segmentation in it", first(segmentation={})),
    ("annotation 0, of .*im0.jpg: no polygon in it", first(segmentation=[])),
    ("annotation 0, .*: a polygon is a list of numbers", first(segmentation=[[None, 1, 2, 3, 4, 5]])),
    ("annotation 0, .*: a polygon is a list of numbers",
     first(segmentation=[[{"x": 1}, {"x": 2}, {"x": 3}]])),
    ("annotation 0, .*: a polygon is a list of numbers", first(segmentation=[[[1, 2], [3]]])),
    ("annotation 0, .*: a polygon is a list of numbers", first(segmentation=[[1e999, 1, 2, 3, 4, 5]])),
    ("annotation 0, .*: a polygon is a list of numbers", first(segmentation=[[float("nan"), 1, 2, 3, 4, 5]])),
    ("annotation 0, .*: a polygon of 0.5 points", first(segmentation=7)),
    ("annotation 0, .*: a segmentation is a list of polygons", first(segmentation=[7, "x"])),
    ("annotation 0, .*: an RLE without 'counts'", first(segmentation=dict(size=[H, W]))),
    ("annotation 0, .*: an RLE whose counts are neither",
     first(segmentation=dict(size=[H, W], counts=None))),
    ("annotation 0, .*: 'counts' is \"a\", a whole number is needed",
     first(segmentation=dict(size=[H, W], counts=["a"]))),
    ("annotation 0, .*: an RLE of \\[32, 24\\] for an image",
     first(segmentation=dict(size=[W, H], counts=[H * W]))),
    ("annotation 0, .*: an RLE whose counts add up to 768, not|RLE",
     first(segmentation=dict(size=[H, W], counts=[800, -32]))),
    ("entry 0: 'iscrowd' is \"yes\", a whole number", first(iscrowd="yes")),
    ("entry 0: unknown image id", first(image_id=[1])),
    ("entry 0: unknown image id null", first(image_id=None)),
    ("entry 0: 'height' is null, a whole number", lambda c: c["images"][0].update(height=None)),
    ("entry 0: 'width' is 32.5", lambda c: c["images"][0].update(width=32.5)),
    ("entry 0: 'file_name' is null, a text", lambda c: c["images"][0].update(file_name=None)),
    ("entry 0: it is no object in braces", lambda c: c["annotations"].insert(0, 3)),
    ("entry 0: it is no object in braces", lambda c: c["images"].insert(0, None)),
    ("the polygons of .*im0.jpg are shares of its size",
     every(lambda a: dict(segmentation=[[v / W for v in a["segmentation"][0]]]))),
    ("its 6 annotations are boxes only: export polygons or masks", every(lambda a: dict(segmentation=[]))),
    ("its 6 annotations are boxes only",
     lambda c: [a.pop("segmentation") for a in c["annotations"]] and None),
    ("it has no list 'annotations'", lambda c: c.update(annotations=None)),
    ("it has no list 'annotations'", lambda c: c.update(annotations={})),
    ("cut off, or no JSON", lambda c: "[" * 100_000),
    ("cut off, or no JSON", lambda c: json.dumps(c)[:-9]), ("cut off, or no JSON", lambda c: "\0" * 40)])
def test_coco_that_cannot_be_read_is_named(tmp_path, words, edit):
    fails(coco(tmp_path / "coco", edit), f"instances_train2017.json.*{words}", name="coco")


def test_images_without_annotations_and_a_bad_one_do_not_stop_the_others(tmp_path, capsys):
    root = coco(tmp_path / "coco",
                lambda c: c.update(annotations=c["annotations"][:-2])
                or c["annotations"][0].update(segmentation=None), 5)
    assert opened(root, name="coco", max_bad=0.5).names == ["im1", "im2", "im3", "im4"]
    assert opened(root, name="coco", max_bad=0.5, unlabelled="ignore").names == ["im1", "im2", "im3"]
    assert "1 skipped as bad, 1 without labels" in capsys.readouterr().out
    empty = coco(tmp_path / "empty/coco", lambda c: c.update(annotations=[]))
    assert len(opened(empty,
                      name="coco")) == 3 and "every label map holds one id only" in capsys.readouterr().out


def test_an_RLE_of_negative_counts(tmp_path):
    """They add up."""
    def text(counts):
        out = b""
        for k, x in enumerate(counts):
            x -= counts[k - 2] if k > 2 else 0
            while True:
                bits, x = x & 31, x >> 5
                more = x != (-1 if bits & 16 else 0)
                out += bytes([48 + (bits | 32 * more)])
                if not more:
                    break
        return out.decode()

    assert text([5, 7, 756]) == coco_mask.frPyObjects(dict(size=[H, W], counts=[5, 7, 756]), H,
                                                      W)["counts"].decode()
    fails(coco(tmp_path / "coco", first(segmentation=dict(size=[H, W], counts=text([5, 2000, -1237])))),
          "annotation 0, .*RLE", name="coco")


# ------------------------------------------------------------------------------------------------------ forma


def labelme(root, edit=lambda content, k: None, n=4, at="", **changes):
    for k in range(n):
        rgb, _ = scene(k)
        write(root / at / f"im{k}.jpg", rgb, **changes)
        shapes = [dict(label="a", points=[[2, 2], [10, 2], [10, 10], [2, 10]], group_id=None,
                       shape_type="polygon", flags={}),
                  dict(label="b", points=[[16, 10], [24, 18]], group_id=None, shape_type="rectangle",
                       flags={})]
        content = dict(version="5.4.1", flags={}, shapes=shapes, imagePath=f"im{k}.jpg", imageData=None,
                       imageHeight=H, imageWidth=W)
        edit(content, k)
        (root / at / f"im{k}.json").write_text(json.dumps(content))
    return root


def test_labelme(tmp_path, capsys):
    root = labelme(tmp_path / "d")
    write(root / "alone.jpg", scene()[0])
    (root / "classes.txt").write_text("a b")
    assert format_of(root) == "labelme" and all(same_segments(opened(root).maps(i)[0].numpy()[:H], SQUARES)
                                                for i in range(3))
    out = capsys.readouterr().out
    assert f"{root}: LabelMe" in out and "alone.jpg: left out, for want of a LabelMe file" in out
    assert len(opened(root, "val")) == 1
    splits = labelme(labelme(tmp_path / "splits", at="train"), at="val", n=2)
    assert len(opened(splits)) == 4 and len(opened(splits, "val")) == 2


def test_labelme_shapes(tmp_path):
    """Against pixels painted by hand: a circle, a mask, two parts of one object; lines and points are
    none."""
    want, disc = SQUARES.copy(), np.hypot(np.arange(H)[:, None] - 17.5, np.arange(W) - 5.5) < 4.5
    want[disc], want[2:5, 26:31], want[0:2, 20:24] = 3, 4, 1
    png = io.BytesIO()
    Image.fromarray(np.full((3, 5), 255, np.uint8)).save(png, "PNG")

    def more(content, k):
        content["shapes"][0]["group_id"] = 7
        content["shapes"] += [dict(points=[[6, 18], [10.5, 18]], shape_type="circle"),
                              dict(points=[[26, 2], [30, 4]], shape_type="mask",
                                   mask=base64.b64encode(png.getvalue()).decode()),
                              dict(points=[[20, 0], [24, 0], [24, 2], [20, 2]], group_id=7),
                              dict(points=[[3, 3]], shape_type="point"),
                              dict(points=[[3, 3], [9, 9]], shape_type="line")]

    got = opened(labelme(tmp_path / "d", more)).maps(0)[0].numpy()[:H]
    assert (got != 0).sum() == pytest.approx((want != 0).sum(), abs=8)  # the circle's border
    radius = np.hypot(np.arange(H)[:, None] - 17.5, np.arange(W) - 5.5)
    inside = ~(disc ^ (radius < 6)) & (radius > 3) | ~disc
    inside &= ~((radius < 6.5) & (want != 3)) & ~(disc & (radius > 3))
    assert same_segments(got[inside], want[inside])


@pytest.mark.parametrize("words, edit", [
    (r"im\d.json: shape 0 cannot be drawn", lambda c, k: c["shapes"][0].update(points=None)),
    (r"im\d.json: shape 1 cannot be drawn", lambda c, k: c["shapes"].insert(1, 5)),
    (r"im\d.json: shape 1 cannot be drawn .the shape_type 'blob' is not known",
     lambda c, k: c["shapes"][1].update(shape_type="blob")),
    (r"im\d.json: no LabelMe file", lambda c, k: c.pop("shapes")),
    (r"im\d.jpg is 32 x 24 pixels, but 640 x 24 in", lambda c, k: c.update(imageWidth=640)),
    ("'imageHeight' is \"x\", a whole number", lambda c, k: c.update(imageHeight="x")),
    (r"im\d.json: annotation 0, of .*: a polygon of 2 points",
     lambda c, k: c["shapes"][0].update(points=[[1, 1], [2, 2]])),
    (r"im\d.json: shape 1 cannot be drawn", lambda c, k: c["shapes"][1].update(shape_type="mask"))])
def test_labelme_files_that_are_none(tmp_path, words, edit):
    fails(labelme(tmp_path / "d", edit), words)


def test_labelme_beside_a_turned_photo(tmp_path):
    tag = Image.Exif()
    tag[0x112] = 6
    stored = opened(labelme(tmp_path / "a", exif=tag))
    assert same_segments(stored.maps(0)[0].numpy()[:W, :H],
                         np.rot90(SQUARES, 3)) and stored.sizes[0].tolist() == [W, H]


def voc(root, colour=False, lists=True):
    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * (255 * 3 - 12) + [224, 224, 192])
    for k in range(4):
        rgb, ids = scene(k)
        ids[10:13] = 255
        picture = Image.fromarray(ids).convert("P")
        picture.putdata(ids.ravel().tolist()), picture.putpalette(palette.getpalette())
        write(root / f"JPEGImages/2007_00000{k}.jpg", rgb)
        write(root / f"SegmentationObject/2007_00000{k}.png", picture.convert("RGB") if colour else picture)
        write(root / f"SegmentationClass/2007_00000{k}.png", picture)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, which in (("train", (0, 1, 2)), ("val", (3,)),
                        ("trainval", range(4))) if lists else (("default", range(4)),):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"2007_00000{k}\n" for k in which))


def test_voc_names_with_spaces_and_accents(tmp_path):
    root, names = tmp_path / "d", ("my photo 0", "my photo 1", "Tu\u0308r", "x")  # as macOS writes it
    for k, name in enumerate(names):
        write(root / "JPEGImages" / f"{name}.jpg", scene(k)[0])
        write(root / "SegmentationObject" / f"{name}.png", scene(k)[1])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("my photo 0\nmy photo 1\nT\u00fcr\n", "utf-8")
    assert len(opened(root)) == 3


@pytest.mark.parametrize("at, colour, lists",
                         [("", False, True), ("VOCdevkit/VOC2012", False, True), ("", True, False)],
                         ids=["VOC", "VOCdevkit", "CVAT's Segmentation mask"])
def test_voc(tmp_path, at, colour, lists, capsys):
    voc(tmp_path / "d" / at, colour, lists)
    assert format_of(tmp_path / "d") == "voc" and len(opened(tmp_path / "d", "val")) == 1

    def void(ids):
        ids = ids.astype(int)
        ids[10:13] = -1
        return ids

    dataset = opened(tmp_path / "d")
    assert len(dataset) == 3 and as_drawn(dataset, void) and "Pascal VOC" in capsys.readouterr().out
    if lists:
        fails(tmp_path / "d", "has train, val, but no test.txt", split="test")
    shutil.rmtree(tmp_path / "d" / at / "JPEGImages")
    fails(tmp_path / "d", "but no JPEGImages/: put the images there")


def test_cityscapes(tmp_path):
    ids = np.full((H, W), 7, np.int32)  # road
    # out of roi; a person; two cars; a group
    ids[:4], ids[4:9, :9], ids[12:, :9], ids[12:, 20:], ids[4:9, 20:] = 3, 24_000, 26_001, 26_002, 26
    for split in ("train", "val"):
        for k, city in enumerate(("aachen", "bonn")):
            stem = f"{split}/{city}/{city}_{k:06}_000019"
            write(tmp_path / f"d/leftImg8bit/{stem}_leftImg8bit.png",
                  scene(k)[0]), write(tmp_path / f"d/gtFine/{stem}_gtFine_instanceIds.png",
                                      ids.astype(np.uint16))
            write(tmp_path / f"d/gtFine/{stem}_gtFine_color.png", scene(k)[0])
    dataset = opened(tmp_path / "d")
    want = np.where((ids == 3) | (ids == 26), -1, ids)
    assert format_of(tmp_path / "d") == "cityscapes" and len(dataset) == 2
    assert same_segments(dataset.maps(1)[0].numpy()[:H], want)
    fails(tmp_path / "d", "Cityscapes is not complete", split="test")
    (tmp_path / "d/gtFine/train/bonn/bonn_000001_000019_gtFine_instanceIds.png").unlink()
    fails(tmp_path / "d", "bonn_000001_000019_leftImg8bit.png has no label")


def named(prefix):
    return lambda content: [i.update(file_name=prefix + i["file_name"]) for i in content["images"]] and None


@pytest.mark.parametrize("file, images, edit, counts", [
    ("{}/_annotations.coco.json", "{}", None, (3, 3)),
    ("annotations/instances_{}.json", "images/{}", None, (3, 3)),
    ("annotations/instances_default.json", "images", None, (2, 1)),
    ("annotations/instances_default.json", "images/default", None, (2, 1)),
    ("result.json", "images", named("images/"), (2, 1)),
    ("result.json", "images", named("images\\"), (2, 1))],
    ids=["Roboflow", "CVAT with splits", "CVAT", "CVAT of 2024", "Label Studio", "Label Studio on Windows"])
def test_coco_as_other_tools_export_it(tmp_path, file, images, edit, counts, capsys):
    root = coco(tmp_path / "d", edit or (lambda content: None), file=file, images=images)
    if file.startswith("{}"):
        (root / "val").rename(root / "valid")
    assert format_of(root) == "export" and tuple(len(opened(root, split))
                                                 for split in ("train", "val")) == counts
    assert same_segments(opened(root).maps(0)[0].numpy()[:H],
                         SQUARES) and "COCO as Roboflow, CVAT" in capsys.readouterr().out


def test_an_image_that_two_people_annotated_in_label_studio_lies_in_one_split(tmp_path):
    """Its export has an entry in `images` for every annotation of a task, with one file_name."""
    def twice(content):
        content["images"] += [{**image, "id": image["id"] + 50} for image in content["images"]]
        content["annotations"] += [{**a, "id": a["id"] + 500, "image_id": a["image_id"] + 50}
                                   for a in content["annotations"]]

    root = coco(tmp_path / "d", twice, n=12, file="result.json", images="images")
    train, val = (opened(root, split).names for split in ("train", "val"))
    assert len(train) + len(val) == 24 and not set(train) & set(val) and len(val) >= 2


def test_formats_are_known_by_their_files_and_named_where_none_is(tmp_path):
    assert format_of(coco(tmp_path / "coco")) == "coco" and len(opened(tmp_path / "coco")) == 3
    assert format_of(folder(tmp_path / "d")) == "folder"
    (tmp_path / "nothing/images").mkdir(parents=True)
    fails(tmp_path / "nothing", "has no folder labels/: .*known by their files, too: COCO; .*Pascal "
                                "VOC.*Cityscapes.*LabelMe")
    fails(tmp_path / "gone", "is neither shapes, nor coco, nor a folder .*LabelMe")


# --------------------------------------------------------------------------------------------------- an item'


def test_any_exception_of_an_item_is_its_own(tmp_path, monkeypatch):
    root = folder(tmp_path / "d")
    read = formats.read_pngs
    for error in (TypeError("x"), KeyError("x"), AttributeError("x"), RecursionError(), ZeroDivisionError(),
                  MemoryError(), struct.error("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
                  AssertionError()):
        def sometimes(item):
            if "im2" in item.image:
                raise error
            return read(item)

        monkeypatch.setattr(formats, "read_pngs", sometimes)
        dataset = opened(root, max_bad=0.3, cache=tmp_path / type(error).__name__)
        assert dataset.names == ["im0", "im1", "im3"]
        why = f"im2.jpg with {root}/labels/train/im2.png: cannot be used ({type(error).__name__}"
        assert why in (dataset.folder / "skipped.txt").read_text()


# ----------------------------------------------------------------------------------------------- options, and


def run(root, *more):
    return train.main(["--preset", "tiny", "--image_size", "16", "--batch_size", "2", "--eval_images", "1",
                       "--steps", "1", "--device", "cpu", "--log_every", "1",
                       "--cache", str(root / "cache"), "--out", str(root / "out"), *more])


def test_bad_files_do_not_keep_from_training(tmp_path, small, capsys):
    """What the message names, the command has; and a copy that data.py made so is taken."""
    root = folder(tmp_path / "mine", 10)
    (root / "labels/train/im3.png").write_bytes(b"")
    assert run(tmp_path, "--dataset", str(root), "--max_steps", "1") == 2
    assert "--max_bad 0.01" in capsys.readouterr().err
    assert run(tmp_path, "--dataset", str(root), "--max_steps", "1", "--max_bad", "0.2") == 0
    assert run(tmp_path, "--dataset", str(root), "--max_steps", "2", "--max_bad", "2") == 2
    assert "--max_bad must be from 0 to 1" in capsys.readouterr().err
    import eval
    options = ["--baseline", "grid", "--dataset", str(root), "--split", "train", "--size", "16", "--cache",
               str(tmp_path / "cache"), "--out", str(tmp_path / "eval")]
    assert eval.main(options) == 2 and eval.main([*options, "--max_bad", "0.2"]) == 0


def test_the_same_run_by_another_path_goes_on(tmp_path, small, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "mine")
    for step, name in enumerate(("mine", "mine/", "./mine", str(root), "../" + tmp_path.name + "/mine"), 1):
        assert run(tmp_path, "--dataset", name, "--max_steps", str(step)) == 0
    shutil.move(root, tmp_path / "elsewhere")
    assert run(tmp_path, "--dataset", "elsewhere", "--max_steps", "6") == 0
    assert "going on from step 5" in capsys.readouterr().out
    assert run(tmp_path, "--dataset", "elsewhere:void=9", "--max_steps", "7") == 2
    folder(tmp_path / "other/elsewhere", 5)  # another set of the same name
    assert run(tmp_path, "--dataset", "other/elsewhere", "--max_steps", "7") == 2
    assert "dataset elsewhere -> other/elsewhere" in capsys.readouterr().err


def test_a_checkpoint_of_before_these_options_goes_on(tmp_path, small):
    from engine import read, save_checkpoint
    root = folder(tmp_path / "mine")
    assert run(tmp_path, "--dataset", str(root), "--max_steps", "1") == 0
    content = read(tmp_path / "out/ckpt.pt")
    for key in ("void", "max_bad"):
        content["config"].pop(key)
    content.pop("contents"), save_checkpoint(tmp_path / "out/ckpt.pt", content)
    assert run(tmp_path, "--dataset", str(root) + "/", "--max_steps", "2") == 0


def test_a_label_map_with_a_few_single_pixels_is_one(tmp_path):
    """People's outlines leave ids of single pixels; only where these are a good part of the image is it no
    label map."""
    ids = np.arange(120 * 100).reshape(120, 100) // 3000
    ids[10:30, 5] = np.arange(20, 40)  # 20 ids of one pixel each, of 12,000
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "a.png")
    assert np.array_equal(formats.read_label(tmp_path / "a.png"), ids)
