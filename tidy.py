"""Tidy answers: no specks, no segment in pieces, no border between two segments that hardly differ.

What it is: plain functions on the soft bits of a finished sample. What it is not: a part of the diffusion; answers can do without.

Use it alone:
    from tidy import tidy
    x = tidy(x, codec, image, least=2, merge=1.0)            # soft bits (N, k, H, W) of one image (H, W, 3) uint8, codec: bits.Codec
"""

import numpy as np
import scipy.ndimage
import torch

COLOUR, BITS = 25.0, 1.5                         # so far apart in mean colour (Lab), or in mean soft bits, two segments are 1 apart


def tidy(x, codec, image, least=0, merge=0.0, keep=None):
    """Soft bits x (N, C, H, W) of answers for one image (H, W, 3) uint8 -> the same shape, tidied; on the CPU.

    least: connected parts of fewer pixels join, the smallest first, the neighbour that they share most of their border with. Of
    what then still is in several parts, the largest keeps its code; the others get the free one whose cell is nearest to
    where they are (their old one if none is free), and are segments of their own. 0: all this is left as it is.
    merge: two segments that touch become one while their distance, `distance`, is below this; the nearest first. 0: never.
    keep: (H, W) bool, pixels whose codes stay (hints): their parts are neither absorbed nor split off, nor joined to each other.
    A changed pixel is as sure of its new code as it was of its old. Raises ValueError for rgb, which decodes to clusters.
    """
    if codec.encoding == "rgb" and (least or merge):
        raise ValueError("answers of the encoding rgb cannot be tidied: its clusters have no codes of their own")
    x, colour = x.float().cpu(), lab(np.asarray(image) / 255)
    keep = np.zeros(colour.shape[:2], bool) if keep is None else np.asarray(keep)
    old, new = codec.decode(x), []
    for cells, soft in zip(old.numpy(), x.clamp(-1, 1).permute(0, 2, 3, 1).numpy()):
        cells = split(absorb(cells, least, keep), codec.side, keep) if least else cells
        new.append(join(cells, np.concatenate([colour, soft], axis=2), merge, keep) if merge else cells)
    new = torch.from_numpy(np.stack(new))
    return torch.where((new != old)[:, None], codec.encode(new) * x.abs().clamp(min=0.01), x)


def lab(rgb):
    """sRGB in 0..1, (..., 3) -> CIE L*a*b*, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])   # / white
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def parts(cells):
    """The 4-connected parts of equal cells (H, W), numbered from 1."""
    H, W = cells.shape
    links = np.zeros((2 * H - 1, 2 * W - 1), bool)                                 # pixels, and links between equal ones
    links[::2, ::2] = True
    links[::2, 1::2] = cells[:, 1:] == cells[:, :-1]
    links[1::2, ::2] = cells[1:] == cells[:-1]
    return scipy.ndimage.label(links)[0][::2, ::2]


def absorb(cells, least, keep):
    """Cells (H, W) whose connected parts all have `least` pixels or more (or the whole map)."""
    part = parts(cells)
    size, boxes = np.bincount(part.ravel()), [None, *scipy.ndimage.find_objects(part)]
    cell_of = np.zeros(len(size), cells.dtype)
    cell_of[part] = cells
    kept = set(part[keep])
    for j in np.argsort(size, kind="stable"):
        if 0 < size[j] < min(least, cells.size) and j not in kept:                 # by now: others may have joined it
            near = part[tuple(slice(max(0, v.start - 1), v.stop + 1) for v in boxes[j])]           # a view
            mask = near == j
            to = np.bincount(near[scipy.ndimage.binary_dilation(mask) & ~mask]).argmax()
            near[mask], size[to], size[j] = to, size[to] + size[j], 0
            boxes[to] = [slice(min(v.start, w.start), max(v.stop, w.stop)) for v, w in zip(boxes[j], boxes[to])]
    return cell_of[part]


def split(cells, side, keep):
    """Cells (H, W) whose connected parts have a cell each, as far as the side^2 cells suffice."""
    cells, part = cells.copy(), parts(cells)
    free, seen, kept = set(range(side**2)) - set(cells.flat), set(cells[keep]), set(part[keep])
    for j in np.argsort(-np.bincount(part.ravel())[1:], kind="stable") + 1:        # the largest first
        mask = part == j
        cell = cells[mask][0]
        if cell in seen and free and j not in kept:
            row, col = ((v.mean() + 0.5) / max(cells.shape) * side - 0.5 for v in mask.nonzero())    # the palette covers a square
            cells[mask] = nearest = min(free, key=lambda k: (k // side - row) ** 2 + (k % side - col) ** 2)
            free.remove(nearest)
        seen.add(cell)
    return cells


def distance(a, b):
    """Of segments with mean Lab colours and soft bits a, b (..., 3 + C): colours apart / COLOUR + bits apart / BITS."""
    bits = np.abs(a[..., 3:] - b[..., 3:]).sum(-1) / 2                             # sure and different in one bit: 1
    return np.linalg.norm(a[..., :3] - b[..., :3], axis=-1) / COLOUR + bits / BITS


def join(cells, looks, most, keep):
    """Cells (H, W) in which no two that touch are nearer than `most`; looks (H, W, 3 + C). The cell of the larger stays."""
    ids, at = np.unique(cells, return_inverse=True)
    at = at.reshape(cells.shape)                                                   # (H, W) in [0, n)
    n, size, kept = len(ids), np.bincount(at.ravel()).astype(float), np.isin(ids, cells[keep])
    mean = np.stack([np.bincount(at.ravel(), v.ravel()) for v in np.moveaxis(looks, 2, 0)], axis=1) / size[:, None]
    touch, home = np.zeros((n, n), bool), np.arange(n)
    touch[at[:, 1:], at[:, :-1]] = touch[at[1:], at[:-1]] = True
    touch |= touch.T
    while True:
        i, j = np.triu(touch, 1).nonzero()
        far = np.where(kept[i] & kept[j], np.inf, distance(mean[i], mean[j]))
        if not len(far) or far.min() >= most:
            return ids[home][at]
        a, b = i[far.argmin()], j[far.argmin()]
        a, b = (a, b) if (kept[a], size[a]) >= (kept[b], size[b]) else (b, a)      # b joins a
        mean[a] = (size[a] * mean[a] + size[b] * mean[b]) / (size[a] + size[b])
        size[a] += size[b]
        touch[a] |= touch[b]
        touch[:, a] |= touch[b]
        touch[b] = touch[:, b] = False
        home[home == b] = a
