"""Label maps as pictures: colours, outlines, overlays, sheets of tiles.

What it is: functions from label maps and images to (H, W, 3) uint8. What it is not: it computes no
segmentation.

    from answers.pictures import grid, overlay
    Image.fromarray(grid([overlay(image, one, side=8) for one in labels], columns=4)).save("sheet.png")
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter

from bits import Codec
from frame import fitted, outline, run_ends, shrink, subsample


def colours(side):
    """One colour for each cell of the palette: (side^2, 3) uint8.

    Nine hues, near to Okabe & Ito's, fill each block of 3 x 3 cells; blocks differ in lightness. Neighbours
    differ by 15 or more in CIE Lab, in normal, protan, deutan and tritan vision (Machado et al. 2009): a
    search moved the hues until then.
    """
    hues = np.array([(251, 186, 19), (107, 195, 240), (0, 144, 116), (81, 16, 0), (227, 221, 110),
                     (3, 82, 179), (225, 150, 188), (110, 110, 110), (194, 55, 20)])
    row, col = np.divmod(np.arange(side**2), side)
    hue, block = hues[row % 3 * 3 + col % 3], (row // 3 + col // 3) % 3
    tint = np.array([0, 0.3, 0.25])[block][:, None]  # towards white, towards black
    return (hue * (1 - tint) + np.where(block == 1, 255, 0)[:, None] * tint).round().astype(np.uint8)


def overlay(image, cells, side, opacity=0.55, thick=None):
    """Coloured segments with thin outlines over an image: (H, W, 3) uint8; (H, W) cells, -1 stays plain.
    thick: by how many pixels outlines are wider than one (default: `outline_of`)."""
    image, cells = np.asarray(image), torch.as_tensor(np.asarray(cells).astype(np.int64))
    colour = Image.fromarray(np.where((cells >= 0)[..., None], colours(side)[cells % side**2], image))
    out = np.array(Image.blend(Image.fromarray(image), colour, opacity))
    edge = outline(cells)
    for _ in range(outline_of(cells.shape) if thick is None else thick):
        edge |= F.pad(edge[:, :-1], (1, 0)) | F.pad(edge[:-1], (0, 0, 1, 0))
    out[edge] = 255
    return out


def outline_of(shape):
    """How many pixels an outline is wider than one, on an image of this shape."""
    return round(max(shape) / 1000)


def overlaid(image, labels, side, rows=64):
    """`overlay` of a PIL image of any size, strip by strip, whose memory is bounded: a PIL image."""
    (width, height), out, thick = image.size, Image.new("RGB", image.size), outline_of(image.size)
    for top in range(0, height, rows):
        above = max(0, top - thick - 1)  # as far as the outline reaches down
        part = image.crop((0, above, width, min(height, top + rows)))
        strip = overlay(part, labels[above : top + rows], side, thick=thick)
        out.paste(Image.fromarray(strip[top - above :]), (0, top))
    return out


def runs(labels):
    """(H, W) integers -> [label, length, label, length, ...], row by row."""
    flat = np.asarray(labels).ravel()
    ends = run_ends(flat)
    return np.stack([flat[ends].astype(int), np.diff(ends, prepend=-1)], axis=1).ravel().tolist()


def shade(share):
    """(H, W) in [0, 1] -> white, blue, nearly black: (H, W, 3) uint8."""
    stops = np.array([(255, 255, 255), (66, 130, 190), (8, 20, 60)])
    return np.stack([np.interp(np.asarray(share), (0, 0.5, 1), stop) for stop in stops.T],
                    -1).round().astype(np.uint8)


def grid(tiles, columns, gap=4, captions=()):
    """Tiles (each (h, w, 3) uint8, all of one size) as one picture, row by row, each under its caption if
    there are any.

    A caption (text, low, high) is followed by the scale of `shade` between two words.
    """
    rows, (h, w) = -(-len(tiles) // columns), tiles[0].shape[:2]
    top = 18 if captions else 0
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + top + gap) - gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, tile in enumerate(tiles):
        x, y = i % columns * (w + gap), i // columns * (h + top + gap)
        sheet.paste(Image.fromarray(tile), (x, y + top))
        if captions:
            text, *ends = (captions[i],) if isinstance(captions[i], str) else captions[i]
            pen.text((x + 1, y + 2), text, (60, 60, 60), font)
            if ends:
                right = x + w - pen.textlength(ends[1], font) - 2
                pen.text((right, y + 2), ends[1], (60, 60, 60), font)
                sheet.paste(Image.fromarray(shade(np.tile(np.linspace(0, 1, 40), (9, 1)))),
                            (int(right) - 45, y + 5))
                pen.text((right - 49 - pen.textlength(ends[0], font), y + 2), ends[0], (60, 60, 60), font)
    return np.array(sheet)


def panel(result, hints=None, most=16):
    """Of a Segmentation: image, hints (H, W) if any, joint answer, samples (at most `most`) and uncertainty
    in one picture, (h, w, 3) uint8."""
    w, h = fitted(*result.image.size, 320)
    small = result.image.resize((w, h), Image.Resampling.LANCZOS)
    tiles, captions = [np.asarray(small)], ["image"]

    def add(caption, labels, side):
        tiles.append(overlay(small, labels, side))
        captions.append(caption)

    if hints is not None and hints.any():
        seen = maximum_filter(shrink(hints, h, w), 7)  # large enough that colours tell which belong together
        add("hints", torch.from_numpy(seen) - 1, 8)
    add("answer", subsample(result.answer.labels, h, w), result.answer.side)
    for j, labels in zip(range(most), result.enlarged(small)):
        add(f"sample {j}", labels, result.side)
    for name, value, top, words in uncertainty(result):
        shown = F.interpolate(value[None, None], (h, w), mode="bilinear", antialias=True)[0, 0]
        tiles.append(shade(shown / top))
        captions.append((name, *words))
    fits = max(1, round((len(tiles) * 1.6 * h / w) ** 0.5))  # a sheet about 1.6 times as wide as high
    rows = -(-len(tiles) // fits)
    return grid(tiles, -(-len(tiles) // rows), 6, captions)  # as few gaps as possible


def uncertainty(result):
    """Of a Segmentation: [(name, map, its largest value, words for the scale's ends)]: boundaries, and
    entropy if there are bits."""
    k, rows = result.model.codec.bits, []
    if len(result.cells) > 1:
        rows.append(("boundaries", result.boundary, 1, ("0", "all")))
    return rows if result.entropy is None else [*rows, ("entropy", result.entropy, k, ("0", f"{k} bits"))]


def example_sheet(path, rows, titles, height=160):
    """A picture: for each row its image, up to two annotators, and the answers."""
    palette, font, strips = Codec(bits=8), ImageFont.load_default(13), []
    for row, title in zip(rows, titles):
        image, *maps = row["tiles"]
        k = max(1, round(height / max(image.shape[:2])))
        tiles = [image.numpy(), *(overlay(image, palette.cells(m[None])[0], 16, 0.8) for m in maps)]
        tiles = grid([np.asarray(t).repeat(k, 0).repeat(k, 1) for t in tiles], len(tiles))
        strip = Image.new("RGB", (tiles.shape[1], tiles.shape[0] + 22), "white")
        strip.paste(Image.fromarray(tiles), (0, 22))
        ImageDraw.Draw(strip).text((2, 3), title, "black", font)
        strips.append(strip)
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, sum(s.height for s in strips[:i])))
    sheet.save(path)
