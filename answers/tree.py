"""One tree of answers from n samples of an image: small regions, joined one after the other, surest first.

What it is: `gather` (what samples and photo say about neighbouring pixels), `grow` (the tree, with or without
hints) and `Tree.cut` (a label map at any grain; a coarser one never crosses a finer one). What it is not: it
samples nothing, and works at the network's resolution (segment.py enlarges).

Use it alone (needs numpy, scipy and, for learnt odds, weights/tree.npz, copied beside it):
    from answers.tree import gather, grow, learnt
    # (h, w, 3) uint8, (n, h, w, k) in [-1, 1], (n, h, w) below 64
    tree = grow(gather(image, soft, cells, 64), learnt())
    labels, finer = tree.cut(), tree.cut("fine")  # (h, w) each

Sources: regions are a watershed, computed as a minimum spanning forest (Cousty et al. 2009); samples as
evidence about pairs: Fred & Jain 2005. The odds that two regions belong together are a small network's,
fitted by fit_tree.py to people's segmentations.
"""

import copy
import functools
import zipfile
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.ndimage
from scipy.sparse import coo_matrix, csc_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

LEARNT = Path(__file__).with_name("tree.npz")  # copied, with this file
if not LEARNT.exists():  # in the repository
    LEARNT = Path(__file__).parent.parent / "weights" / "tree.npz"
# cut where the log odds that two regions are one fall below this
GRAINS = {"coarse": -0.75, "normal": -0.25, "fine": 1.0}
# Regions join in the order of these odds: all pairs above the first, then all above the second, ... A cut is
# at one of them, or between two.
LEVELS = (6, 4, 3, 2.5, 2, 1.6, 1.3, 1, 0.75, 0.5, 0.25, 0, -0.25, -0.5, -0.75, -1, -1.3, -1.6, -2, -2.5, -3,
          -4, -6)
SURE = 3  # pairs above a level that is this or more join without another look at what they become
WHOLE = 0.5  # how well the view of the whole photo sees a pixel, beside its tiles, which share 1
CLEAR = 2.5  # pixels around a hint in which no other region may start


# ------------------------------------------------------------------------------------------------------------
# Evidence: what is known about pixels and about pairs of neighbours


@dataclass
class View:
    """n samples of a part of a photo, at the photo's resolution; codes mean nothing outside it."""

    soft: np.ndarray  # (n, h, w, k) soft bits in [-1, 1]
    cells: np.ndarray  # (n, h, w) codes, from 0
    weight: np.ndarray  # (h, w) above 0: how well it sees each pixel
    top: int = 0  # where it lies in the photo
    left: int = 0

    def of(self, values):
        """The part of values (H, W, ...) that it sees."""
        h, w = self.weight.shape
        return values[self.top : self.top + h, self.left : self.left + w]


@dataclass
class Evidence:
    """What n samples and a photo of (h, w) pixels say; all arrays are numpy's."""

    appearance: np.ndarray  # (h, w, 28): colour, texture and place, see `appearance_of`
    views: list  # of View: of the whole photo, then of its tiles
    codes: int  # how many codes there are
    steps: list  # for rows and columns: (h - 1, w, 5) and (h, w - 1, 5), see `gather`
    jump: list  # the same pairs: how unlike the two pixels are, smoothed; watersheds are cut along it
    low: np.ndarray  # (h, w) bool: minima of it, where regions start
    grown: tuple | None = None  # net, least, hints and their Tree: what `regrow` keeps


def gather(image, soft, cells, codes, tiles=(), like=None):
    """Photo (h, w, 3) uint8, soft bits (n, h, w, k), their codes (n, h, w) below `codes` -> Evidence. tiles:
    Views of as many samples or fewer, each of which looks closer at its part. like: Evidence of other samples
    of the same photo and tiles, whose colours need not be computed again."""
    views = [View(soft, cells, np.full(image.shape[:2], WHOLE if tiles else 1.0)), *tiles]
    seen = like.appearance if like else appearance_of(image, max(views[-1].weight.shape))
    looks = [step[..., 1:3] for step in like.steps] if like else contrasts(seen[..., :3] * 1.25)
    steps, jump = [], []
    edge = np.zeros(image.shape[:2])
    for axis in (0, 1):
        def along(values, first, last, axis=axis):
            return np.moveaxis(np.moveaxis(values, axis, 0)[first:last], 0, axis)

        near, far = np.moveaxis(looks[axis], 2, 0)
        said, weight = np.zeros((*near.shape, 3)), np.zeros((*near.shape, 1))
        for view in views:
            bits = np.abs(np.diff(view.soft, axis=axis + 1)).sum(-1)  # 2 for each sure bit that differs
            differ = (np.diff(view.cells, axis=axis + 1) != 0).mean(0)
            both = pair_weight(view, axis)[..., None]
            at = slice(view.top, view.top + both.shape[0]), slice(view.left, view.left + both.shape[1])
            weight[at] += both
            said[at] += both * np.stack([np.minimum(bits / 2, 1).mean(0), differ,
                                         np.minimum(bits, 2).mean(0)], axis=2)
        said /= weight
        steps.append(np.stack([np.ones_like(near), near, far, said[..., 0], said[..., 1]], axis=2))
        unlike = said[..., 2] + 0.3 * near
        jump.append(scipy.ndimage.gaussian_filter(unlike, 0.5))
        # views: a pixel has the largest of its four
        for part in (along(edge, 1, None), along(edge, None, -1)):
            np.maximum(part, unlike, out=part)
    edge = scipy.ndimage.gaussian_filter(edge, 0.7)
    return Evidence(seen, views, codes, steps, jump, scipy.ndimage.minimum_filter(edge, size=3) == edge)


def contrasts(colour):
    """How unlike neighbours along rows and columns are in colour (h, w, 3), and what lies a little further on
    both sides: (h - 1, w, 2) and (h, w - 1, 2)."""
    calm, out = scipy.ndimage.gaussian_filter(colour, (1, 1, 0)), []
    for axis in (0, 1):
        wide = np.moveaxis(np.pad(calm, [(1, 1) if i == axis else (0, 0) for i in range(3)], "edge"), axis, 0)
        far = np.moveaxis(wide[3:] - wide[:-3], 0, axis)
        out.append(np.stack([np.linalg.norm(v, axis=2) for v in (np.diff(colour, axis=axis), far)], axis=2))
    return out


def pair_weight(view, axis):
    """How well a view sees its pairs of neighbours along an axis: the lesser of the two pixels' weights."""
    lines = np.moveaxis(view.weight, axis, 0)
    return np.moveaxis(np.minimum(lines[1:], lines[:-1]), 0, axis)


PLACE = slice(6, 8)  # columns of `appearance_of`


def appearance_of(image, side):
    """(h, w, 3) uint8 -> (h, w, 28): Lab, texture of L, place in units of `side` pixels, histograms of Lab;
    all of about the same size."""
    colour = lab(image / 255)
    L, a, b = np.moveaxis(colour, 2, 0)
    mean = scipy.ndimage.uniform_filter(L, 3)
    rough = np.sqrt((scipy.ndimage.uniform_filter(L**2, 3) - mean**2).clip(min=0))
    texture = [abs(scipy.ndimage.sobel(L, 0)) / 16, abs(scipy.ndimage.sobel(L, 1)) / 16, rough / 8]
    place = np.mgrid[: len(L), : len(L[0])] / side
    bins = [histogram(L, 0, 100, 8), histogram(a, -40, 40, 6), histogram(b, -40, 40, 6)]
    return np.concatenate([colour / 25, np.stack([*texture, *place], axis=2), *bins], axis=2)


def lab(rgb):
    """sRGB in 0..1, (..., 3) -> CIE L*a*b*, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    # columns: X, Y and Z, each divided by white's
    matrix = np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    xyz = linear @ matrix
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])],
                    axis=-1)


def histogram(v, low, high, bins):
    """Values (...) -> (..., bins): how much of each pixel is in each bin, shared linearly between the two
    nearest."""
    width = (high - low) / bins
    centre = low + (np.arange(bins) + 0.5) * width
    return (1 - abs(v.clip(centre[0], centre[-1])[..., None] - centre) / width).clip(min=0)


# ------------------------------------------------------------------------------------------------------------
# Regions to start from


def regions(evidence, hints=None):
    """Watershed: every minimum of the jumps, and every hint, becomes a region: (h, w) from 0.

    hints (h, w): numbers from 1, 0 = none. Each connected part of a hint is a region.
    """
    h, w = evidence.low.shape
    low, pieces = evidence.low, np.zeros((h, w), int)
    if hints is not None and hints.any():
        low = low & (scipy.ndimage.distance_transform_edt(hints == 0) >= CLEAR)
        for number in np.unique(hints[hints > 0]):
            parts, _ = scipy.ndimage.label(hints == number, np.ones((3, 3)))
            pieces = np.where(parts > 0, parts + pieces.max(), pieces)
    marker, _ = scipy.ndimage.label(low, np.ones((3, 3)))
    marker = np.where(marker > 0, marker + pieces.max(), pieces)
    return forest(evidence.jump, marker)


def forest(jump, marker):
    """Minimum spanning forest of the pixels, one tree for each marker (h, w) above 0: (h, w) numbers from 0.

    Pixels of one marker are joined at no cost, and each marker to a root that all share; without the root's
    edges, the minimum spanning tree falls apart into the forest.
    """
    h, w = marker.shape
    n, at, flat = h * w, np.arange(h * w).reshape(h, w), marker.ravel()
    order = np.flatnonzero(flat)
    order = order[np.argsort(flat[order], kind="stable")]
    if not len(order):
        return np.zeros((h, w), int)
    again = flat[order[1:]] == flat[order[:-1]]  # the same marker as the one before
    first = order[np.concatenate([[True], ~again])]
    i, j = order[:-1][again], order[1:][again]
    down, right = jump[0] + 1e-3, jump[1] + 1e-3
    below, beside = j - i == w, (j - i == 1) & (j % w > 0)  # an edge that is there already
    down[np.divmod(i[below], w)] = right[np.divmod(i[beside], w)] = 1e-9
    far = ~(below | beside)
    i = np.concatenate([at[:-1].ravel(), at[:, :-1].ravel(), i[far], first])
    j = np.concatenate([at[1:].ravel(), at[:, 1:].ravel(), j[far], np.full(len(first), n)])
    # above 0: a matrix without an entry has no edge
    cost = np.concatenate([down.ravel(), right.ravel(), np.full(far.sum(), 1e-9), np.full(len(first), 1e-8)])
    tree = minimum_spanning_tree(csr_matrix((cost, (i, j)), shape=(n + 1, n + 1))).tocoo()
    keep = np.maximum(tree.row, tree.col) < n
    links = coo_matrix((tree.data[keep], (tree.row[keep], tree.col[keep])), shape=(n, n))
    # int64, as the pairs of many regions have numbers above 2^31
    return connected_components(links, directed=False)[1].astype(int).reshape(h, w)


# ------------------------------------------------------------------------------------------------------------
# Pairs of regions that touch, and what the odds see of them


def groups(at, n):
    """Items, each in group at (m,) below n -> a matrix (n, m): its product with values (m, F) is the sum in
    every group."""
    return csc_matrix((np.ones(len(at)), at, np.arange(len(at) + 1)), shape=(n, len(at)))


def sums(at, n, values):
    """The same for values of few columns: (n, F)."""
    return np.stack([np.bincount(at, column, n) for column in values.T], axis=1)


def collect(i, j, values, n):
    """Values (m, F) of pairs of groups, in either order -> the pairs that differ, i < j, once each, and their
    sums."""
    apart = i != j
    pair, at = np.unique((np.minimum(i, j) * n + np.maximum(i, j))[apart], return_inverse=True)
    return pair // n, pair % n, sums(at, len(pair), values[apart])


def neighbours(maps, values):
    """Of maps (h, w) and what is known of their pairs of neighbours along rows and columns, (h - 1, w, F) and
    (h, w - 1, F): both pixels of every pair, (m,), and their values (m, F)."""
    lines = [np.moveaxis(maps, axis, 0) for axis in (0, 1)]
    values = [np.moveaxis(v, axis, 0).reshape(-1, v.shape[2]) for axis, v in enumerate(values)]
    return (np.concatenate([v[1:].ravel() for v in lines]), np.concatenate([v[:-1].ravel() for v in lines]),
            np.concatenate(values))


class Graph:
    """Regions (h, w) from 0 and the pairs i, j of them that touch; `merge` joins regions, `features`
    describes pairs.

    What a view sees of a region is a part of it, with a mean and counts of its own, and two parts that touch
    are a sight of the pair: what samples say of a pair is the mean of its sights.
    """

    def __init__(self, evidence, region):
        views, visible = evidence.views, evidence.appearance.shape[2]
        self.samples, self.bits, self.views = len(views[0].soft), views[0].soft.shape[-1], len(views)
        self.n, self.codes, flat = int(region.max()) + 1, evidence.codes, region.ravel()
        seen = groups(flat, self.n) @ evidence.appearance.reshape(-1, visible)
        self.total = np.concatenate([np.bincount(flat)[:, None], seen], axis=1)  # (n, 1 + 28): area and sums
        self.pixels = np.full(self.n, float(region.size))  # (n,): of the whole map
        parts, ends = [self.parts_of(view, k, view.of(region)) for k, view in enumerate(views)], [0]
        for part, *_ in parts:
            ends.append(ends[-1] + len(part))
        part, seen, count, a, b, sight = zip(*parts)
        self.part = np.concatenate(part)  # region * views + view
        self.seen = np.concatenate(seen)  # (parts, 1 + samples * bits): weight and sums
        self.count = np.concatenate(count)  # (parts, samples * codes): weight of each code
        self.a, self.b = (np.concatenate([v + end for v, end in zip(each, ends)]) for each in (a, b))
        self.sight = np.concatenate(sight)
        i, j, steps = neighbours(region, evidence.steps)
        inside = i == j
        self.inner = sums(i[inside], self.n, steps[inside])  # (n, 5): of pairs of pixels inside a region
        self.i, self.j, self.border = collect(i, j, steps, self.n)  # border (m, 5): of those between two

    def parts_of(self, view, k, region):
        """What view number k sees of regions (h, w): part, seen, count, a, b and sight."""
        there = np.bincount(region.ravel(), minlength=self.n) > 0
        owner, maps = np.flatnonzero(there), (np.cumsum(there) - 1)[region]
        at, n, draws = maps.ravel(), len(owner), len(view.soft)
        weight = view.weight.ravel()
        soft = sums(at, n, (np.moveaxis(view.soft, 3, 1).reshape(-1, len(at)) * weight).T)
        place = (at * draws)[None] + np.arange(draws)[:, None]
        place = place * self.codes + view.cells.reshape(draws, -1)
        count = np.bincount(place.ravel(), np.tile(weight, draws), n * draws * self.codes)
        # fewer draws than samples take turns; of an odd number of samples, the first counts for one more
        turn = np.arange(self.samples) % draws
        soft, count = (v.reshape(n, draws, -1)[:, turn].reshape(n, -1) for v in (soft, count))
        weights = [pair_weight(view, axis)[..., None] for axis in (0, 1)]
        return (owner * self.views + k, np.column_stack([np.bincount(at, weight, n), soft]), count,
                *collect(*neighbours(maps, weights), n))

    def merge(self, to, n):
        """Regions k become to[k], which are n."""
        joined, pixels = groups(to, n), np.empty(n)
        pixels[to] = self.pixels
        self.total, self.inner, self.pixels = joined @ self.total, joined @ self.inner, pixels
        self.part, at = np.unique(to[self.part // self.views] * self.views + self.part % self.views,
                                  return_inverse=True)
        joined = groups(at, len(self.part))
        self.seen, self.count = joined @ self.seen, joined @ self.count
        self.a, self.b, self.sight = collect(at[self.a], at[self.b], self.sight, len(self.part))
        i, j = to[self.i], to[self.j]
        inside = i == j
        self.inner = self.inner + sums(i[inside], n, self.border[inside])
        self.i, self.j, self.border = collect(i, j, self.border, n)
        self.n = n

    def features(self, of=slice(None)):
        """(m, 53) of the pairs, or of some: a mask or a slice."""
        i, j, area = self.i[of], self.j[of], self.total[:, 0]
        seen, joined = self.sights(of)
        parts, at = np.unique(np.concatenate([self.a[seen], self.b[seen]]), return_inverse=True)
        a, b = np.split(at, 2)
        mean = self.total[:, 1:] / area[:, None]
        apart = abs(mean[i] - mean[j])
        smaller = area[i] < area[j]
        weight = self.seen[parts, :1]
        soft = (self.seen[parts, 1:] / weight).reshape(len(parts), self.samples, self.bits)
        share = (self.count[parts] / weight).reshape(len(parts), self.samples, self.codes)
        pure = (share**2).sum(2)  # (parts, samples): the chance that two pixels of a part have one code
        together = np.einsum("msk,msk->ms", share[a], share[b])  # the same, one in each
        alike = together / np.sqrt(pure[a] * pure[b]).clip(1e-6)
        bits = np.minimum(abs(soft[a] - soft[b]).sum(2) / 2, 2)
        bits, alike = joined @ bits, joined @ alike
        together, pure_i, pure_j = ((joined @ v).mean(1) for v in (together, pure[a], pure[b]))
        same = alike.mean(1)
        inner = self.inner[:, 1:] / self.inner[:, :1].clip(1)
        small, large = np.where(smaller, i, j), np.where(smaller, j, i)
        border = self.border[of]
        length = border[:, 0]
        sizes = [length / np.sqrt(area[small]), area[large] / self.pixels[i], area[small] / self.pixels[i]]
        samples = [bits.mean(1), bits.min(1), together, np.log(together + 0.02), same, np.log(same + 0.02),
                   (alike > 0.5).mean(1), *np.where(smaller, (pure_i, pure_j), (pure_j, pure_i))]
        return np.concatenate([np.linalg.norm(apart[:, :3], axis=1)[:, None], apart,
                               np.stack(samples, axis=1),
                               border[:, 1:] / length[:, None], inner[small], inner[large],
                               np.log(np.stack(sizes, axis=1))], axis=1)

    def sights(self, of):
        """Of the sights, those of some pairs, and a matrix: its product with values (sights, F) is their mean
        of each pair, weighted by how well each sight sees it."""
        i, j = self.part[self.a] // self.views, self.part[self.b] // self.views
        pair = np.searchsorted(self.i * self.n + self.j, i * self.n + j)
        chosen = np.zeros(len(self.i), bool)
        chosen[of] = True
        seen = np.flatnonzero(chosen[pair])
        i, j, pair = i[seen], j[seen], (np.cumsum(chosen) - 1)[pair[seen]]
        small = np.where(self.total[i, 0] < self.total[j, 0], i, j)
        held = self.seen[np.where(small == i, self.a[seen], self.b[seen]), 0]
        joined = groups(pair, chosen.sum())
        joined.data = self.sight[seen, 0] * held / self.total[small, 0]
        joined.data /= (joined @ np.ones(len(seen)))[pair]
        return seen, joined


def side_by_side(graphs):
    """Graphs with as many samples, bits and views each -> one Graph of them all; none touches another's
    regions."""
    if len({(g.samples, g.bits, g.views) for g in graphs}) != 1:
        raise ValueError("trees grow together where there are as many samples, bits and views of each")
    whole, region, part = copy.copy(graphs[0]), 0, 0
    whole.n, whole.codes = sum(g.n for g in graphs), max(g.codes for g in graphs)
    arrays = {name: [] for name in ("part", "a", "b", "i", "j", "count")}
    for g in graphs:
        arrays["part"].append(g.part + region * g.views)
        for name, first in (("a", part), ("b", part), ("i", region), ("j", region)):
            arrays[name].append(getattr(g, name) + first)
        count = np.zeros((len(g.part), g.samples, whole.codes))
        count[..., : g.codes] = g.count.reshape(len(g.part), g.samples, g.codes)
        arrays["count"].append(count.reshape(len(g.part), -1))
        region, part = region + g.n, part + len(g.part)
    for name in ("total", "pixels", "seen", "sight", "inner", "border"):
        arrays[name] = [getattr(g, name) for g in graphs]
    for name, values in arrays.items():
        setattr(whole, name, np.concatenate(values))
    return whole


# columns of `features`: the share of samples that put both together, as far as regions are pure, and the
# logarithm of the smaller region's share of the map
SAME, SMALLER = 33, 52


@functools.cache
def learnt(path=LEARNT):
    """The networks in a file of fit_tree.py: {name: array}. Raises ValueError where there are none."""
    try:
        with np.load(path, allow_pickle=False) as f:
            net = {name: f[name].astype(np.float64) for name in f.files}
        for name, known in (("", (53,)), ("hint_", (61, 49))):  # 49: files of before
            inputs = len(net[name + "mean"])
            if inputs not in known:
                raise ValueError(f"it was fitted to {inputs} features, not {known[0]}")
            perceptron(np.zeros((1, inputs)), net, name)
        net["confidence"].reshape(4)
        offset_of(net)
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} cannot be read ({e}): fit it anew (python -m answers.fit_tree), or restore "
                         f"it from the repository, or use --merge 0") from None
    return net


def offset_of(net):
    """What a net of `learnt` adds to the log odds of GRAINS; 0 for none, and for files of before."""
    return float(net["offset"].reshape(())) if net and "offset" in net else 0.0


def perceptron(x, net, name=""):
    """Features (..., F) -> (...): the output of a small network whose arrays in `net` begin with a name."""
    x = ((x - net[name + "mean"]) / net[name + "scale"]).clip(-6, 6)
    for layer in ("1", "2"):
        x = x @ net[f"{name}w{layer}"].T + net[f"{name}b{layer}"]
        x = x / (1 + np.exp(-x))
    return x @ net[name + "w3"][0] + net[name + "b3"][0]


def log_odds(features, net):
    """Log odds (m,) that people see one segment in a pair, of features (m, 53). net: of `learnt`; None: what
    the samples alone say."""
    if not len(features):
        return np.zeros(0)
    if net is None:
        share = features[:, SAME].clip(0.02, 0.98)
        return np.log(share / (1 - share))
    return perceptron(features, net)


# ------------------------------------------------------------------------------------------------------------
# The tree


@dataclass
class Tree:
    """Regions and how they join: node k of `regions` leaves and then of merges, each of two earlier nodes."""

    region: np.ndarray  # (h, w): the leaves' numbers, from 0
    children: np.ndarray  # (m, 2): what each merge joins
    odds: np.ndarray  # (m,): log odds of each merge
    height: np.ndarray  # (m,): the lowest odds of a merge and of all below it: cuts at one height nest
    graph: Graph  # of the leaves
    offset: float = 0.0  # of the log odds of GRAINS, fitted by fit_tree.py
    claimed: dict = field(default_factory=dict)  # by its hints, as segment.joined keeps it

    def of_leaves(self, labels):
        """A map (h, w) that was cut from this tree -> its label of every leaf."""
        out = np.zeros(self.graph.n, int)
        out[self.region.ravel()] = labels.ravel()
        return out

    def graph_of(self, labels):
        """The Graph of a map (h, w) from 0 that was cut from this tree."""
        graph = copy.copy(self.graph)
        graph.merge(self.of_leaves(labels), int(labels.max()) + 1)
        return graph

    def cut(self, grain="normal", offset=0.0, claimed=None):
        """A label map (h, w), from 0. grain: a name of GRAINS, or the number of segments (int), claimed ones
        among them; offset is added to the log odds of GRAINS: above 0, finer. claimed (leaves,): which leaves
        are one segment, whatever the grain says, by a number above 0 (see claims.py)."""
        leaves = self.graph.n
        if isinstance(grain, str):
            if grain not in GRAINS:
                raise ValueError(f"grain '{grain}' is not one of {', '.join(GRAINS)}, nor a number of "
                                 f"segments")
            used = np.flatnonzero(self.height > GRAINS[grain] + self.offset + offset)
        else:
            if grain < 1:
                raise ValueError(f"grain must be at least 1 segment, not {grain}")
            order, few = np.argsort(-self.height, kind="stable"), int(grain)
            if claimed is not None:
                few = bisect_left(range(leaves), grain, 1, key=lambda k: len(
                    np.unique(self.homes(order[: leaves - k], claimed))))
            used = order[: max(0, leaves - few)]
        return np.unique(self.homes(used, claimed)[self.region], return_inverse=True)[1].reshape(
            self.region.shape)

    def homes(self, used, claimed=None):
        """(leaves,): a number for each segment, where some merges are used and leaves are claimed."""
        leaves = self.graph.n
        home = np.arange(leaves + len(self.height))
        for k in np.sort(used)[::-1]:  # from the root down: a node hands its name on to what it joins
            home[self.children[k]] = home[leaves + k]
        home = home[:leaves]
        return home if claimed is None else np.where(claimed > 0, leaves + len(self.height) + claimed, home)


def grow(evidence, net=None, hints=None, least=0, watch=None):
    """Evidence -> Tree. Two regions join that are surest of each other, level by level of LEVELS; above SURE,
    all that are surer than the level.

    net: of `learnt`; None: the samples alone decide. hints (h, w): numbers from 1, 0 = none, each connected
    part of which becomes a leaf, with what is around it. least: regions of fewer pixels join first.
    watch(tree region (h, w), features, i, j) is told of every round, for fitting.
    """
    region = regions(evidence, hints)
    graph, told = Graph(evidence, region), watch and (lambda home, *seen: watch(home[region], *seen))
    return Tree(region, *join(copy.copy(graph), net, least, told), graph, offset_of(net))


def grow_each(evidences, net=None, least=0):
    """The same, of Evidences with as many samples, bits and views each -> a Tree of each, grown together,
    which takes half of the time of one after the other. Raises ValueError where these numbers differ."""
    maps = [regions(evidence) for evidence in evidences]
    graphs = [Graph(evidence, region) for evidence, region in zip(evidences, maps)]
    merges = split(*join(side_by_side(graphs), net, least), [g.n for g in graphs])
    return [Tree(region, *its, graph, offset_of(net)) for region, its, graph in zip(maps, merges, graphs)]


def regrow(evidence, net=None, hints=None, least=0):
    """As `grow`; the Tree is kept with the evidence and is what comes back for the same once more, so that
    another grain, or closed instead of open, costs a cut alone. Neither it nor net may be changed."""
    last = evidence.grown
    if not (last and last[0] is net and last[1] == least and np.array_equal(last[2], hints)):
        evidence.grown = net, least, hints, grow(evidence, net, hints, least)
    return evidence.grown[3]


def join(graph, net, least, watch=None):
    """The Graph of the leaves, which is changed -> children, odds and height of a Tree's merges. watch: gets
    the current region of every leaf, features, i, j."""
    children, odds, height, leaves = [], [], [], graph.n
    high = np.full(2 * leaves, np.inf)  # of every node: its height
    home = np.arange(leaves)  # of every leaf: its region
    node, new = np.arange(leaves), np.ones(leaves, bool)  # of every region; new: its pairs have no score
    score = np.zeros(len(graph.i))  # of every pair
    for level in (*LEVELS, -np.inf):
        while len(graph.i):
            i, j = graph.i, graph.j
            if new.any():
                if watch:
                    watch(home, graph.features(), i, j)
                of = new[i] | new[j]
                # rounded: in the last bits, they depend on what else is computed beside
                score[of] = log_odds(graph.features(of), net).round(9)
                if least:
                    score[of] += 10.0 * (np.minimum(graph.total[i, 0], graph.total[j, 0])[of] < least)
                new[:] = False
                best = np.full(graph.n, -np.inf)
                np.maximum.at(best, i, score)
                np.maximum.at(best, j, score)
            pick = (score == best[i]) & (score == best[j])
            if level >= SURE:
                pick |= np.minimum(graph.total[i, 0], graph.total[j, 0]) >= least
            pick = np.flatnonzero(pick & (score > level))
            to, free = list(range(graph.n)), np.ones(graph.n, bool)
            for k in pick[np.argsort(-score[pick], kind="stable")].tolist():
                a, b = root(to, i[k]), root(to, j[k])
                if a == b or level < SURE and not (free[a] and free[b]):  # of equally good pairs, the first
                    continue
                free[a] = free[b] = False
                high[leaves + len(odds)] = min(score[k], high[node[a]], high[node[b]])
                height.append(high[leaves + len(odds)])
                children.append((node[a], node[b]))
                to[b], node[a] = a, leaves + len(odds)
                odds.append(score[k])
            if len(pick) == 0:
                break
            to = [root(to, k) for k in to]
            kept, to, size = np.unique(to, return_inverse=True, return_counts=True)
            node, home, new = node[kept], to[home], size > 1
            old = score[~(new[to[i]] | new[to[j]])]
            graph.merge(to, len(kept))
            score = np.zeros(len(graph.i))
            score[~(new[graph.i] | new[graph.j])] = old  # `to` keeps the order of the others
    return np.array(children, int).reshape(-1, 2), np.array(odds), np.array(height)


def split(children, odds, height, counts):
    """The merges of trees that grew side by side, with so many leaves each -> [(children, odds, height)] of
    each."""
    owner = np.repeat(np.arange(len(counts)), counts).tolist()  # of every node
    for a, _ in children.tolist():
        owner.append(owner[a])
    owner, number, out = np.array(owner), np.empty(len(owner), int), []
    for k, count in enumerate(counts):
        nodes = np.flatnonzero(owner == k)
        number[nodes] = np.arange(len(nodes))
        merges = nodes[count:] - sum(counts)
        out.append((number[children[merges]], odds[merges], height[merges]))
    return out


def root(to, k):
    """Where k ends that is on its way to[k], to[to[k]] ..."""
    while to[k] != k:
        to[k] = to[to[k]]  # the next time, half as far
        k = to[k]
    return k


def sureness(tree, labels, net=None):
    """What a map (h, w) from 0, cut from a tree, is sure of, of each segment, (n,) each: the chance that two
    of its pixels belong together, the chance that one of them and one across the border do not, and the
    segment's share of the map; and its borders [(i, j, chance that a person parts these two)]."""
    graph, leaves = tree.graph_of(labels), tree.graph.n
    apart = border_chances(graph, net)
    area, owner = (np.append(of, np.full(len(tree.odds), -1)) for of in
                   (tree.graph.total[:, 0], tree.of_leaves(labels)))  # of every node
    together, pairs = np.zeros(graph.n), np.zeros(graph.n)
    for node, ((a, b), odds) in enumerate(zip(tree.children, tree.odds), leaves):
        area[node] = area[a] + area[b]
        if owner[a] == owner[b] >= 0:  # as many pairs of pixels as this merge joins
            owner[node] = owner[a]
            together[owner[node]] += area[a] * area[b] / (1 + np.exp(-odds))
            pairs[owner[node]] += area[a] * area[b]
    inside = np.where(pairs > 0, together / pairs.clip(1), 1.0)
    length = graph.border[:, 0]
    around = np.bincount(graph.i, length, graph.n) + np.bincount(graph.j, length, graph.n)
    outside = np.bincount(graph.i, length * apart, graph.n) + np.bincount(graph.j, length * apart, graph.n)
    return (inside, np.where(around > 0, outside / around.clip(1), 1.0), graph.total[:, 0] / labels.size,
            list(zip(graph.i.tolist(), graph.j.tolist(), apart.tolist())))


def border_chances(graph, net=None):
    """(m,): the chance that a person parts the two regions of each pair of a graph."""
    return 1 / (1 + np.exp(log_odds(graph.features(), net)))


def confidence(tree, labels, net=None):
    """Of a map (h, w) from 0, cut from a tree: of each segment (n,) the chance that a person drew it (without
    a net: how sure the samples are of it), and its borders, as of `sureness`."""
    *seen, borders = sureness(tree, labels, net)
    if net is None:
        return seen[0] * seen[1], borders
    bias, *slopes = net["confidence"]
    return 1 / (1 + np.exp(-bias - slopes @ confidence_features(*seen))), borders


def confidence_features(inside, outside, share):
    """(3, n): log odds of inside and outside, and the logarithm of the share of the map; fit_tree.py fits how
    they count."""
    return np.stack([*(np.log(p.clip(0.01, 0.99) / (1 - p.clip(0.01, 0.99))) for p in (inside, outside)),
                     np.log(share)])
