"""What data.py does to a single image or label map: reading every format, resizing, normalising."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from frame import fitted, normalise, resize_image, resize_label
from sources.formats import Item, open_image, read_image, read_label, sizes_of
from sources.packing import DONE, convert

PIXEL = (np.arange(6 * 8 * 3) * 255 // 143).astype(np.uint8).reshape(6, 8, 3)  # 8 wide, 6 high
LABEL = np.repeat(np.arange(8, dtype=np.uint8)[None] // 3 * 50, 6, 0)  # three bands: 0, 50, 100


def write(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_read_image_of_every_mode(tmp_path):
    grey, wide = np.full((6, 8), 100, np.uint8), np.full((6, 8), 100 * 257, np.uint16)
    clear = np.dstack([PIXEL, np.full((6, 8), 255, np.uint8)])
    clear[0, 0, 3] = 0  # a transparent pixel shows white
    cases = {"rgb.png": (PIXEL, PIXEL), "grey.png": (grey, 100), "sixteen.png": (wide, 100),
             "sixteen.tif": (wide, 100),
             "int.tif": (wide.astype(np.int32), 100), "bit.png": (grey > 1, 255),
             "alpha.png": (clear, np.where(clear[..., 3:] == 0, 255, PIXEL)),
             "float.tif": (np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8), None)}
    for name, (array, expected) in cases.items():
        image = np.asarray(read_image(write(tmp_path / name, array)))
        assert image.shape == (6, 8, 3) and image.dtype == np.uint8
        if expected is not None:
            assert (image == expected).all(), name
    assert (image[0, 0], image[-1, -1]) == pytest.approx((0, 255))  # float: stretched to its maximum


def test_little_contrast_is_raised_and_said_alike_for_answers_and_for_training(tmp_path):
    r = np.random.default_rng(0)
    dark = r.integers(10, 50, (40, 60, 3)).astype(np.uint8)  # as of a fluorescence microscope
    dark[0, 0] = 255  # a hot pixel
    low, high = np.percentile(dark, (0.1, 99.9))
    write(tmp_path / "dark.png", dark)
    with pytest.warns(UserWarning, match="dark.png: its contrast was raised"):
        image = np.asarray(read_image(tmp_path / "dark.png"))
    assert np.abs(image - ((dark - low) * 255 / (high - low)).clip(0, 255)).max() <= 0.5
    # what training sees of it
    item = Item(str(tmp_path / "dark.png"), ["label"], lambda item: [(dark[..., 0] > 30).astype(np.int32)])
    outcome, (seen, photo), size, _, _, notices = convert(item, 20, "segment", False, detail=2)
    assert outcome == DONE and size == (14, 20) and len(notices) == 1 and "contrast" in notices[0]
    expected, _ = resize_image(Image.fromarray(image), 40, (40, 28))
    assert (seen == expected).all() and np.ptp(photo[:14].astype(int)) > np.ptp(dark.astype(int)[1:]) * 1.5

    # at most 8 times, around the middle: noise stays weak, and a white page stays no black one
    flat = np.full((200, 300, 3), (250, 251, 253), np.uint8)
    flat[50:55, 50:55] = 0  # on it, something small
    with pytest.warns(UserWarning, match="contrast"):
        image = np.asarray(read_image(write(tmp_path / "noise.png", flat))).astype(int)
    assert np.ptp(image[0, 0]) == 8 * 3 and 100 < image[0, 0].mean() < 150 and image[52, 52].max() == 0

    # a large JPEG is decoded smaller for training: noise that is averaged there says nothing
    noise = np.where(np.arange(2400)[:, None] // 400 % 2, 110, 150)[..., None]
    noise = noise + r.normal(0, 20, (2400, 1200, 3))
    write(tmp_path / "large.jpg", noise.clip(0, 255).astype(np.uint8), quality=92)
    with pytest.warns(UserWarning, match="contrast"):
        image = read_image(tmp_path / "large.jpg")
    item = Item(str(tmp_path / "large.jpg"), ["label"], lambda item: [np.ones((2400, 1200), np.int32)])
    _, (seen,), _, _, _, notices = convert(item, 64, "segment", False)
    expected, _ = resize_image(image, 64, (32, 64))
    assert notices and np.abs(seen[:, :32].astype(int) - expected[:, :32]).mean() < 15
    for name, whole in (("usual", r.integers(40, 220, (40, 60, 3))), ("one", np.full((40, 60, 3), 90))):
        whole = whole.astype(np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (np.asarray(read_image(write(tmp_path / f"{name}.png", whole))) == whole).all()


def test_of_a_stack_the_first_page_is_taken_and_it_is_said(tmp_path):
    pages = [Image.fromarray(np.full((6, 8, 3), v, np.uint8)) for v in (10, 20, 30)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="stack.tif: of its 3 pages, the first is taken"):
        assert (np.asarray(read_image(tmp_path / "stack.tif")) == 10).all()
    pages[0].save(tmp_path / "moving.gif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="moving.gif: of its 3 pages, the first is taken"):
        assert np.asarray(read_image(tmp_path / "moving.gif")).std() == 0


def test_what_is_white_and_transparent_around_it_is_seen(tmp_path):
    """On black; of any other colour, on white."""
    inside = np.zeros((40, 60), bool)
    inside[10:30, 20:40] = True
    for colour, ground in (((255,) * 3, 0), ((250, 240, 255), 0), ((200, 30, 30), 255), ((0,) * 3, 255)):
        image = np.dstack([np.where(inside[..., None], colour, (9, 9, 9)), 255 * inside]).astype(np.uint8)
        got = np.asarray(read_image(write(tmp_path / "x.png", image)))
        assert (got[inside] == colour).all() and (got[~inside] == ground).all()
    clear = write(tmp_path / "clear.png", np.zeros((6, 8, 4), np.uint8))  # nothing to be seen
    assert (np.asarray(read_image(clear)) == 255).all()


def test_pixels_that_are_no_numbers_and_integers_of_32_bits(tmp_path):
    array = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    for bad in (np.nan, np.inf):
        array[2, 3] = bad
        with pytest.raises(ValueError, match="x.tif: not a readable image.*infinite or no numbers"):
            read_image(write(tmp_path / "x.tif", array))
    image = np.asarray(read_image(write(tmp_path / "y.tif",
                                        (np.arange(48, dtype=np.int32) * 100_000).reshape(6, 8))))
    assert (image[0, 0] == 0).all() and (image[-1, -1] == 255).all() and len(np.unique(image)) == 48


def test_read_image_converted_modes(tmp_path):
    image = Image.fromarray(np.full((6, 8, 3), (200, 60, 20), np.uint8))
    for mode, name in (("CMYK", "c.jpg"), ("CMYK", "c.tif"), ("P", "p.png"), ("P", "p.gif"), ("LA", "a.png"),
                       ("YCbCr", "y.jpg")):
        image.convert(mode).save(tmp_path / name)
        colour = np.asarray(read_image(tmp_path / name)).reshape(-1, 3).mean(0)
        assert colour == pytest.approx([99] * 3 if mode == "LA" else [200, 60, 20], abs=4), name
    flat = image.quantize(1)  # one colour, number 0
    flat.save(tmp_path / "t.png", transparency=0)
    assert (np.asarray(read_image(tmp_path / "t.png")) == 255).all()  # all transparent


def test_read_image_turns_by_exif(tmp_path):
    """Of a TIFF, too, which Pillow turns by itself."""
    turned = {1: PIXEL, 2: PIXEL[:, ::-1], 3: PIXEL[::-1, ::-1], 4: PIXEL[::-1], 5: PIXEL.swapaxes(0, 1),
              6: np.rot90(PIXEL, -1), 7: PIXEL[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(PIXEL)}
    for (turn, want), kind in itertools.product(turned.items(), ("png", "tif", "webp")):
        exif = Image.Exif()
        exif[0x0112] = turn
        options = dict(lossless=True) if kind == "webp" else {}
        path = write(tmp_path / f"{turn}.{kind}", PIXEL, exif=exif, **options)
        image, size = open_image(path)
        stored, upright, tag = sizes_of(path)
        assert (np.asarray(image) == want).all() and size == upright == image.size, path
        assert stored == (8, 6) and tag == turn


def test_sides_are_rounded_up_to_even_numbers():
    """As in training, after a crop. A network whose last stage sees 2 x 2 pixels does worse at 80 x 53 (3:2)
    and 80 x 45 (16:9)."""
    for width, height, size, want in ((256, 171, 80, (80, 54)), (171, 256, 80, (54, 80)),
                                      (300, 200, 128, (128, 86)), (640, 480, 80, (80, 60)),
                                      (1920, 1080, 80, (80, 46)), (900, 1, 80, (80, 2)),
                                      (21, 20, 15, (15, 15)), (5, 5, 1, (1, 1))):
        assert fitted(width, height, size) == want


@pytest.mark.parametrize("H,W,h,w",
                         [(1, 1, 16, 16), (1, 10_000, 2, 16), (300, 7, 16, 2), (6, 8, 12, 16),
                          (32, 64, 8, 16)])
def test_resize_keeps_the_shape_at_the_top_left(H, W, h, w):
    rng = np.random.default_rng(0)
    out, size = resize_image(Image.fromarray(rng.integers(1, 256, (H, W, 3), dtype=np.uint8)), 16)
    label = resize_label(np.full((H, W), 7), 16)
    assert size == (h, w) and out.shape == (16, 16, 3)
    assert (out[:h, :w] > 0).all() and (out[h:] == 0).all() and (out[:, w:] == 0).all()
    assert (label[:h, :w] == 0).all() and (label[h:] == 65535).all() and (label[:, w:] == 65535).all()


def test_resize_is_area_for_images_and_nearest_for_labels():
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (24, 48, 3), dtype=np.uint8), rng.choice([-1, -9, 3, 10**12],
                                                                                 (24, 24))
    means = image.reshape(8, 3, 16, 3, 3).mean((1, 3))
    # Pillow rounds rows, then columns
    assert np.abs(resize_image(Image.fromarray(image), 16)[0][:8] - means).max() <= 1
    middle = label[1::3, 1::3]  # of each 3 x 3 pixels
    expected = np.where(middle == -1, 65535, np.searchsorted([-9, -1, 3, 10**12], middle))
    assert (resize_label(label, 8) == expected).all()  # ids renumbered in their order


def test_labels_as_they_are(tmp_path):
    wide = LABEL.astype(np.uint16) * 600
    palette = Image.fromarray(LABEL).convert("P")
    palette.putpalette([i // 6 for i in range(768)])  # colours that are not the indices
    palette.putdata(LABEL.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    assert (read_label(write(tmp_path / "eight.png", LABEL)) == LABEL).all()
    assert (read_label(write(tmp_path / "sixteen.png", wide)) == wide).all() and wide.max() == 60_000
    assert (read_label(tmp_path / "palette.png") == LABEL).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own about damaged TIFF
@pytest.mark.parametrize("name", ["rgb.png", "p.gif", "c.jpg", "t.tif", "w.webp", "b.bmp", "g.ppm"])
def test_broken_files_are_a_ValueError_with_their_name(tmp_path, name):
    whole = write(tmp_path / name,
                  np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).read_bytes()
    rng, cut = np.random.default_rng(1), tmp_path / name
    for n in [0, 1, 5, *rng.integers(6, len(whole), 20)]:
        damaged = bytearray(whole[:n] if n % 2 else whole)
        for i in rng.integers(0, len(damaged), 5 if len(damaged) else 0):
            damaged[i] = rng.integers(256)
        cut.write_bytes(bytes(damaged))
        try:
            assert read_image(cut).mode == "RGB"  # some damage goes unnoticed
        except ValueError as e:
            assert name in str(e)
    with pytest.raises(ValueError, match="nothing.png: no such file"):
        read_image(tmp_path / "nothing.png")


def test_normalise():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    x, inside = normalise(images, torch.tensor([[8, 5], [1, 8]]))
    assert inside.sum((1, 2)).tolist() == [40, 8] and inside[0, :, :5].all() and inside[1, 0].all()
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected = (images[..., c].numpy() / 255 - mean) / std
        assert np.allclose(x[:, c], np.where(inside, expected, 0), atol=1e-5)
