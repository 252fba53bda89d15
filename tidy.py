"""Tidy answers: no specks, no segment in pieces, no border between two segments that people would not part.

What it is: plain functions on the soft bits of a finished sample. What it is not: a part of the diffusion; answers can do without.

Use it alone:
    from tidy import tidy
    x = tidy(x, codec, image, least=2, merge=1)              # soft bits (N, k, H, W) of one image (H, W, 3) uint8, codec: bits.Codec

Whether two segments belong together is a small network's guess from what they look like (`features`); merge.py fitted it to
people's segmentations, weights/merge.npz holds it.
"""

import functools
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch

LEARNT = Path(__file__).parent / "weights" / "merge.npz"
SMALL, USUAL = 0.25, 0.05                        # log odds that a segment e times smaller than this share of the map needs more


def tidy(x, codec, image, least=0, merge=0.0, keep=None, net=None):
    """Soft bits x (N, C, H, W) of answers for one image (H, W, 3) uint8 -> the same shape, tidied; on the CPU.

    least: connected parts of fewer pixels join, the smallest first, the neighbour that they share most of their border with. All
    others are segments of their own: of several with one code, the largest keeps it; the others get the free one whose cell is
    nearest to where they are (their old one if none is free). 0: all this is left as it is.
    merge: two segments that touch become one while the odds that people would part them are below this, as the network net
    (default: that of `learnt`) sees it; the surest first, see `join`. 1: if together is likelier than apart; 0: never.
    keep: (H, W) bool, pixels whose codes stay (hints): their parts are neither absorbed nor split off, nor joined to each other.
    A changed pixel is as sure of its new code as it was of its old. Raises ValueError for rgb, which decodes to clusters.
    """
    if codec.encoding == "rgb" and (least or merge):
        raise ValueError("answers of the encoding rgb cannot be tidied: its clusters have no codes of their own")
    x, image = x.float().cpu(), np.asarray(image)
    keep = np.zeros(image.shape[:2], bool) if keep is None else np.asarray(keep)
    look, net = (looks(image), net or learnt()) if merge else (None, None)
    old, new = codec.decode(x), []
    for cells, soft in zip(old.numpy(), x.clamp(-1, 1).permute(0, 2, 3, 1).numpy()):
        region = renumber(parts(absorb(cells, least, keep)) if least else cells)
        if merge:
            region = join(region, look, soft, functools.partial(log_odds, net=net), -np.log(merge), region[keep])
        new.append(number(region, cells, codec.side, keep))
    new = torch.from_numpy(np.stack(new))
    return torch.where((new != old)[:, None], codec.encode(new) * x.abs().clamp(min=0.01), x)


# ---------------------------------------------------------------------------------------------------------------------
# Specks and pieces


def renumber(ids):
    """Ids (H, W) -> the same map with ids 0, 1, 2, ..."""
    return np.unique(ids, return_inverse=True)[1].reshape(ids.shape)


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


def number(region, cells, side, keep):
    """A cell for each region (H, W): the most frequent of its old ones, and its own as far as the side^2 cells suffice."""
    K, n = side**2, region.max() + 1
    count = np.bincount((region * K + cells).ravel(), minlength=n * K).reshape(n, K)
    cell_of, kept, seen = count.argmax(1), set(region[keep]), set(cells[keep])
    cell_of[region[keep]] = cells[keep]
    free = set(range(K)) - set(cell_of)
    for j in np.argsort(-count.sum(1), kind="stable"):                             # the largest first
        if cell_of[j] in seen and free and j not in kept:
            row, col = ((v.mean() + 0.5) / max(cells.shape) * side - 0.5 for v in (region == j).nonzero())     # the palette covers a square
            cell_of[j] = min(free, key=lambda k: (k // side - row) ** 2 + (k % side - col) ** 2)
            free.remove(cell_of[j])
        seen.add(cell_of[j])
    return cell_of[region]


# ---------------------------------------------------------------------------------------------------------------------
# Segments that belong together


def lab(rgb):
    """sRGB in 0..1, (..., 3) -> CIE L*a*b*, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])   # / white
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def histogram(v, low, high, bins):
    """Values (...) -> (..., bins): how much of each pixel is in each bin, shared linearly between the two nearest."""
    width = (high - low) / bins
    centre = low + (np.arange(bins) + 0.5) * width
    return (1 - abs(v.clip(centre[0], centre[-1])[..., None] - centre) / width).clip(min=0)


def looks(image):
    """(H, W, 3) uint8 -> (H, W, 28): Lab, its histograms, texture of L, place; all of about the same size. Segments have means of it."""
    colour = lab(image / 255)
    L, a, b = np.moveaxis(colour, 2, 0)
    mean = scipy.ndimage.uniform_filter(L, 3)
    rough = np.sqrt((scipy.ndimage.uniform_filter(L**2, 3) - mean**2).clip(min=0))
    texture = [abs(scipy.ndimage.sobel(L, 0)) / 16, abs(scipy.ndimage.sobel(L, 1)) / 16, rough / 8]
    place = np.mgrid[: len(L), : len(L[0])] / max(L.shape)
    return np.concatenate([colour / 25, np.stack([*texture, *place], axis=2), histogram(L, 0, 100, 8), histogram(a, -40, 40, 6),
                           histogram(b, -40, 40, 6)], axis=2)


def collect(i, j, values, n):
    """Values (m, F) of pairs of regions, in either order -> the pairs that differ, i < j, once each, and their values' sums."""
    apart = i != j
    pair, at = np.unique((np.minimum(i, j) * n + np.maximum(i, j))[apart], return_inverse=True)
    return pair // n, pair % n, np.stack([np.bincount(at, v, len(pair)) for v in values[apart].T], axis=1)


def borders(region, look, soft):
    """Regions (H, W) that touch: i, j (m,), and sums over the border (m, 4): its length; differences in Lab, in Lab two pixels to
    either side of a smoothed map, and in soft bits."""
    colour, i, j, sums = look[..., :3] * 1.25, [], [], []
    calm = scipy.ndimage.gaussian_filter(colour, (1, 1, 0))
    for axis in (0, 1):
        first, last, around = (np.moveaxis(v, axis, 0) for v in (region, np.concatenate([colour, soft / 2], axis=2), calm))
        wide = np.pad(around, ((1, 1), (0, 0), (0, 0)), "edge")
        step = np.diff(last, axis=0)
        i.append(first[1:].ravel())
        j.append(first[:-1].ravel())
        sums.append(np.stack([np.ones(step.shape[:2]), *(np.linalg.norm(v, axis=2) for v in (step[..., :3], wide[3:] - wide[:-3], step[..., 3:]))],
                             axis=2).reshape(-1, 4))
    return collect(*map(np.concatenate, (i, j, sums)), region.max() + 1)


def features(area, look, soft, i, j, border):
    """What the network sees of pairs i, j (m,) of segments: (m, 36). area (n,), mean looks (n, 28) and soft bits (n, C) of all."""
    apart, bits = abs(look[i] - look[j]), abs(soft[i] - soft[j]).sum(1) / 2         # sure and different in one bit: 1
    colour, length = np.linalg.norm(apart[:, :3], axis=1), border[:, :1]
    small, large = np.minimum(area[i], area[j]), np.maximum(area[i], area[j])
    sizes = np.log(np.stack([length[:, 0] / np.sqrt(small), large / area.sum(), small / area.sum()], axis=1))
    return np.concatenate([colour[:, None], bits[:, None], apart, border[:, 1:] / length, sizes], axis=1)


@functools.cache
def learnt(path=LEARNT):
    """The network in a file of merge.py: {name: array}. Raises ValueError where there is none."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name].astype(np.float64) for name in ("mean", "scale", "w1", "b1", "w2", "b2")}
    except (OSError, KeyError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}): restore it from the repository, or use --merge 0") from None


def log_odds(pairs, net):
    """Features (m, 36) -> log odds (m,) that people see one segment, less for small ones: wrongly gone, they are gone for good."""
    hidden = ((pairs - net["mean"]) / net["scale"]).clip(-6, 6) @ net["w1"].T + net["b1"]
    return (hidden / (1 + np.exp(-hidden))) @ net["w2"][0] + net["b2"][0] + SMALL * (pairs[:, -1] - np.log(USUAL))


def join(region, look, soft, together, least, kept=(), watch=None):
    """Regions (H, W) from 0 on, joined in rounds: two that touch become one where together(features) -> (m,) is above `least` and,
    of all that either of them could join, highest. look (H, W, 28), soft (H, W, C). Two of `kept` are never joined.

    watch(features, home, i, j): is told of every round; home (n,), what each region has become.
    """
    def sums(at, values, n):                                                       # (m,), (m, F) -> (n, F)
        return np.stack([np.bincount(at, v, n) for v in values.T], axis=1)

    n, F = region.max() + 1, look.shape[2]
    home, held = np.arange(n), np.isin(np.arange(n), kept)
    total = sums(region.ravel(), np.concatenate([np.ones((*region.shape, 1)), look, soft], axis=2).reshape(region.size, -1), n)
    i, j, border = borders(region, look, soft)
    while len(i):
        mean = total[:, 1:] / total[:, :1]
        seen = features(total[:, 0], mean[:, :F], mean[:, F:], i, j, border)
        if watch:
            watch(seen, home, i, j)
        score, best = np.where(held[i] & held[j], -np.inf, together(seen)), np.full(n, -np.inf)
        np.maximum.at(best, i, score)
        np.maximum.at(best, j, score)
        pick = (score > least) & (score == best[i]) & (score == best[j])
        if not pick.any():
            break
        to = np.arange(n)
        to[j[pick]] = i[pick]
        while (to[to] != to).any():                                                # chains of equally good ones
            to = to[to]
        to = np.unique(to, return_inverse=True)[1]
        n, home = to.max() + 1, to[home]
        total, held = sums(to, total, n), np.bincount(to, held, n) > 0
        i, j, border = collect(to[i], to[j], border, n)
    return home[region]
