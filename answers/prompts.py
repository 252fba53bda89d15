"""Prompts: what a user says of an image, as label maps of its own size; 0 and below = not given.

What it is: `hint_map` (clicks, boxes, a drawn map) and `strokes_map` (the page's), their check and their copy
at the network's size. What it is not: it samples nothing (segment.py) and gives no region away (claims.py).

    from answers.prompts import hint_map
    clicks = hint_map(640, 480, "120,80 160,90; 30,200")  # (480, 640): 1 at two places, 2 at the third
"""

import numpy as np
from PIL import Image, ImageDraw

from frame import shrink

CLICK = 0.005  # radius of a click, as a share of the longer side: about one of the network's pixels
HINTS = 225  # strokes of so many ids at most: they are kept in 8 bits, with colours of their own


def boxes_by_id(boxes, drawn=None):
    """{id in `hint_map`: box}: large ones first, after the ids that are drawn."""
    first = 1 if drawn is None else max(0, int(drawn.max())) + 1
    return dict(enumerate(sorted(boxes, key=lambda b: (b[0] - b[2]) * (b[3] - b[1])), first))


def within_boxes(boxes, hints, height, width):
    """Where each hint's segment may lie: (K, height, width) bool, in the order of the ids in hints (H, W);
    boxes {id: (x0, y0, x1, y1)}, in the hints' pixels."""
    (H, W), names = hints.shape, np.unique(hints[hints > 0])
    y, x = ((np.arange(n) + 0.5) * of / n for n, of in ((height, H), (width, W)))
    out = np.ones((len(names), height, width), bool)
    for inside, name in zip(out, names.tolist()):
        x0, y0, x1, y1 = boxes.get(name, (0, 0, W, H))
        inside &= ((y0 <= y) & (y <= y1))[:, None] & (x0 <= x) & (x <= x1)
    return out


def hint_map(width, height, points="", boxes=(), drawn=None):
    """Points, boxes and drawn hints as one hint map (height, width), of integers. Raises ValueError.

    points: "x,y x,y;x,y", groups of clicks: each is a disc of CLICK of the longer side, smaller if another
    group is near.
    boxes: (x0, y0, x1, y1), each about one segment: an ellipse of half its size is known; small boxes lie
    over large ones, points and drawn (height, width) over all.
    """
    out = np.zeros((height, width), np.int32 if drawn is None else np.int64)
    y, x = np.arange(height)[:, None], np.arange(width)
    if drawn is not None and drawn.shape != out.shape:
        raise ValueError(f"the hint has {drawn.shape[1]} x {drawn.shape[0]} pixels, but the image {width} x "
                         f"{height}")
    first = 1 if drawn is None else max(0, int(drawn.max())) + 1  # the first id not taken
    for i, (x0, y0, x1, y1) in boxes_by_id(boxes, drawn).items():
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"box {x0:g},{y0:g},{x1:g},{y1:g} is no left,top,right,bottom in the image of "
                             f"{width} x {height} pixels")
        at = slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1)
        down, across = (2 * y[at[0]] + 1 - y0 - y1) / (y1 - y0), (2 * x[at[1]] + 1 - x0 - x1) / (x1 - x0)
        out[at][down**2 + across**2 <= 0.25] = i
        out[int((y0 + y1) / 2), int((x0 + x1) / 2)] = i  # at least one pixel
    try:
        clicks = [(g, *map(float, p.split(","))) for g, group in enumerate(points.split(";"))
                  for p in group.split()]
        clicks = [(first + len(boxes) + g, int(px), int(py)) for g, px, py in clicks]
    except (ValueError, OverflowError):
        raise ValueError(f"points '{points}' are not of the form \"x,y x,y;x,y\"") from None
    for g, px, py in clicks:
        if not (0 <= px < width and 0 <= py < height):
            raise ValueError(f"point {px},{py} lies outside the image of {width} x {height} pixels")
        apart = min([np.hypot(px - qx, py - qy) for other, qx, qy in clicks if other != g], default=np.inf)
        if apart == 0 or drawn is not None and drawn[py, px] > 0:
            raise ValueError(f"contradictory hints: point {px},{py} belongs to something else already")
        radius = min(CLICK * max(width, height), apart / 2.1)
        at = tuple(slice(max(0, int(p - radius)), int(p + radius) + 1) for p in (py, px))
        out[at][np.hypot(y[at[0]] - py, x[at[1]] - px) <= radius] = g
    out = out if drawn is None else np.where(drawn > 0, drawn, out)
    asked = {*boxes_by_id(boxes, drawn), *(g for g, *_ in clicks)}
    if lost := sorted(asked - set(np.unique(out).tolist())):
        raise ValueError(f"contradictory hints: number {lost[0]} (boxes come first, then groups of points) "
                         f"lies wholly under others: move it, or leave it out")
    return out


def strokes_map(strokes, size):
    """Strokes [{id, points: [[x, y], ...]}] in a photo of (W, H) pixels -> hint map (H, W) uint8, later ones
    over earlier ones; None if there are none. Raises ValueError."""
    hints, r = Image.new("L", size), max(1, CLICK * max(size))
    pen = ImageDraw.Draw(hints)
    for number, points in ((int(s["id"]), [(int(x), int(y)) for x, y in s["points"]]) for s in strokes):
        pen.line(points, min(number, 255), round(2 * r))
        for x, y in points:
            pen.ellipse((x - r, y - r, x + r, y + r), min(number, 255))
    pixels = hints.histogram()
    if not all(0 < s["id"] <= HINTS and pixels[s["id"]] for s in strokes):
        raise ValueError(f"a hint is wholly under later ones, outside, or beyond the {HINTS}th: take it away")
    return np.array(hints) if strokes else None


def network_hints(hints, height, width):
    """Hint map (H, W) of ids, 0 and below = none -> the same at the network's size, numbered from 1 in the
    order of the ids. Raises ValueError where an id has no pixel left."""
    names = np.unique(hints[hints > 0])
    small = shrink(hints, height, width)
    if lost := sorted(set(names.tolist()) - set(small.flat)):
        raise ValueError(f"contradictory hints: number {lost[0]} (a map's id; boxes come first, then groups "
                         f"of points) shares all its pixels with others at the network's "
                         f"{max(height, width)} pixels; make it larger or move it away")
    return np.where(small > 0, np.searchsorted(names, small) + 1, 0)


def checked(name, ids, image):
    """A map of ids for a PIL image, as integers from 0; None stays None. Raises ValueError where the sizes
    differ."""
    if ids is None:
        return None
    ids = np.asarray(ids)
    ids = ids if ids.dtype in (np.int32, np.int64) else ids.astype(np.int64)
    ids = ids.clip(min=0) if (ids < 0).any() else ids
    if ids.shape != image.size[::-1]:
        raise ValueError(f"the {name} has {' x '.join(map(str, ids.shape[::-1]))} pixels, but the image "
                         f"{image.width} x {image.height}")
    return ids
