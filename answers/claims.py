"""Who gets a region: what hints (clicks, strokes, boxes) make of a tree of answers.

What it is: `claims` gives leaves of a tree to hints, by how likely a person sees them as one segment; a small
network says so of every leaf and every hint, near or far, from where the two meet in the tree, the way from
one to the other, and how alike they look to the photo and to the samples. What it is not: it asks nobody
again; the samples stay as they are.

    from answers.claims import claims
    tree = grow(evidence, net, hints)  # hints (h, w): numbers from 1, 0 = none
    labels = tree.cut("normal", claimed=claims(evidence, tree, hints, net))
"""

import heapq
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, breadth_first_tree, dijkstra, minimum_spanning_tree

from answers.tree import PLACE, collect, neighbours, perceptron

PIECES = 0.75  # leaves that the tree joins at so much above the normal grain's log odds go to hints together
# Mean log odds above which a hint takes a segment that it does not lie in: of one hint, and by how much less
# where there are twice as many; the higher of two such. The more hints, the fewer segments belong to none.
WANTED = (4.0, 1.9), (1.2, 0.5)
PARTS = 32  # of a hint, the largest, that leaves are compared with


@dataclass
class Leaves:
    """What evidence says about the n leaves of a tree, and about each and the K hints."""

    area: np.ndarray  # (n,) pixels
    mean: np.ndarray  # (n, F): of the appearance and of all samples' soft bits
    visible: int  # how many of these are appearance
    codes: np.ndarray  # (n, samples, codes): each leaf's pixels of each code
    links: tuple  # pairs of leaves that touch: i, j, (m,) each
    held: np.ndarray  # (n,): the hint, from 1, that lies in a leaf; 0 = none
    near: np.ndarray  # (n, K, 8): see `nearness`
    looks: np.ndarray  # (n, K, 12): see `likeness`


def leaves_of(evidence, tree, hints):
    """Leaves for hints (h, w): numbers from 1 to K, 0 = none."""
    graph, region = tree.graph, tree.region
    whole = np.flatnonzero(graph.part % graph.views == 0)  # the view that sees all of every leaf, as well
    soft = graph.seen[whole, 1:] / graph.seen[whole, :1]
    area, codes = graph.total[:, 0], graph.count[whole].reshape(graph.n, graph.samples, -1)
    mean = np.concatenate([graph.total[:, 1:] / area[:, None], soft], axis=1)
    held = np.zeros(graph.n, int)
    held[region[hints > 0]] = hints[hints > 0]
    i, j, jump = touching(region, evidence.jump)
    near, meet = nearness(tree, held, mean[:, PLACE], i, j, jump)
    codes, visible = codes * (area / graph.seen[whole, 0])[:, None, None], graph.total.shape[1] - 1
    clicks = np.array([label(hints == k, np.ones((3, 3)))[1] for k in range(1, hints.max() + 1)])
    looks = likeness(codes / area[:, None, None], mean, visible, area, held, meet, clicks)
    return Leaves(area, mean, visible, codes, (i, j), held, near, looks)


def touching(region, jumps):
    """The pairs i < j of regions that touch, and the jumps between them, least and mean: (m, 2)."""
    n = int(region.max()) + 1
    a, b, values = neighbours(region, [v[..., None] for v in jumps])
    i, j, total = collect(a, b, np.concatenate([np.ones_like(values), values], axis=1), n)
    least, apart = np.full(len(i), np.inf), a != b
    pair = np.searchsorted(i * n + j, (np.minimum(a, b) * n + np.maximum(a, b))[apart])
    np.minimum.at(least, pair, values[apart, 0])
    return i, j, np.stack([least, total[:, 1] / total[:, 0]], axis=1)


MEET = 4  # column of `nearness`: the odds at which they meet; the next one: how much nearer than any other


def nearness(tree, held, place, i, j, jump):
    """How near each leaf is to each hint, and how much nearer than to any other: (n, K, 8), in pairs; and the
    odds at which it meets each leaf that holds one: (n, S).

    The highest jump on the way (a watershed's measure), the cheapest way, the odds at which they meet in the
    tree, and the distance; a hint that lies in several leaves is as near as its nearest.
    """
    n, seeds = len(held), np.flatnonzero(held)
    low, mean = jump[:, 0] + 1e-3, jump[:, 1] + 0.05
    ridge = minimum_spanning_tree(csr_matrix((low, (i, j)), shape=(n, n))).tocoo()
    passes = highest(ridge.row, ridge.col, ridge.data, seeds, n)
    ways = dijkstra(csr_matrix((mean, (i, j)), shape=(n, n)), directed=False, indices=seeds).T
    some = np.arange(n + len(tree.height))  # of every node, one of its leaves
    for node, (a, _) in enumerate(tree.children, n):
        some[node] = some[a]
    meet = highest(*some[tree.children].T, -tree.height, seeds, n)
    far = np.linalg.norm(place[:, None] - place[seeds][None], axis=2)
    out = []
    for value, top in ((passes, 4), (ways, 20), (meet, 6), (4 * far, 4)):
        each = best(-value, held[seeds]).clip(-top, top)
        out += [each, ahead(each)]
    return np.stack(out, axis=2), -meet


def best(values, hint):
    """Of every hint the highest of the columns that are its own: (n, S), whose they are (S,) -> (n, K)."""
    return np.stack([values[:, hint == k].max(1) for k in range(1, hint.max() + 1)], axis=1)


def likeness(share, mean, visible, area, held, meet, clicks):
    """How alike each leaf is to that part of a hint to which it is most alike, and how much more than to any
    other hint's: (n, K, 10), in pairs; and the logarithm of the number of the hint's clicks (K,), and of one
    more than all others': (n, K, 2). A part is one leaf that holds the hint with all that meets it before any
    other hint, at even odds or better. share (n, samples, codes): of a leaf's pixels in each code; mean,
    visible, area, held: as Leaves has them; meet (n, S): as of `nearness`.

    Compared are the samples' codes, their bits, colour, its histograms and texture. So a hint of several
    clicks need not look the same everywhere, as all around an object does not.
    """
    seeds = np.flatnonzero(held)
    hint = held[seeds]
    every = best(meet.clip(-99, 99), hint)
    own = (meet > 0) & (meet > rivals(every)[:, hint - 1])
    own[seeds, np.arange(len(seeds))] = True
    own = (own * area[:, None]).T  # (S, n)
    order = np.argsort(-own.sum(1), kind="stable")
    kept = np.sort(np.concatenate([order[hint[order] == k][:PARTS] for k in range(1, hint.max() + 1)]))
    hint, own = hint[kept], own[kept] / own[kept].sum(1, keepdims=True)
    pure, columns = (share**2).sum(2)[:, None], []
    for some in np.array_split(own, -(-len(own) // 16)):  # of hundreds, all at once take gigabytes
        theirs, looks = np.tensordot(some, share, 1), some @ mean
        alike = np.einsum("nsk,hsk->nhs", share, theirs)
        alike /= np.sqrt(pure * (theirs**2).sum(2)[None]).clip(1e-6)
        apart = abs(mean[:, None] - looks)
        bits = apart[..., visible :].reshape(*alike.shape, -1).sum(3) / 2
        columns.append([np.log(alike.mean(2) + 0.02), -np.minimum(bits, 2).mean(2),
                        -np.linalg.norm(apart[..., :3], axis=2), -apart[..., 8 : visible].sum(2),
                        -apart[..., 3:6].sum(2)])
    out = []
    for value in zip(*columns):
        value = best(np.concatenate(value, axis=1), hint)
        out += [value, ahead(value)]
    same = np.ones_like(every)
    return np.stack([*out, same * np.log(clicks), same * np.log(1 + clicks.sum() - clicks)], axis=2)


def highest(i, j, cost, seeds, n):
    """The highest cost on the way from each node of a spanning tree with the edges i, j (n - 1,) to each of
    the seeds: (n, seeds). From a node to itself there is none: -inf."""
    out = np.full((n, len(seeds)), np.inf)
    out[seeds, np.arange(len(seeds))] = -np.inf
    if n == 1:
        return out
    least = cost.min() - 1  # a matrix without an entry has no edge
    links = csr_matrix((cost - least, (i, j)), shape=(n, n))
    edges = breadth_first_tree(links, 0, directed=False).tocoo()
    above, up = np.zeros(n, int), np.zeros(n)
    above[edges.col], up[edges.col] = edges.row, edges.data + least
    order = breadth_first_order(links, 0, directed=False, return_predecessors=False)[1:]
    for k in order[::-1]:
        np.minimum(out[above[k]], np.maximum(out[k], up[k]), out=out[above[k]])
    for k in order:
        np.minimum(out[k], np.maximum(out[above[k]], up[k]), out=out[k])
    return out


def rivals(values):
    """Values (n, K) -> the highest of the others in its row; -inf if there is none."""
    if values.shape[1] == 1:
        return np.full_like(values, -np.inf)
    first, second = np.sort(values, axis=1)[:, :-3:-1].T[:, :, None]
    return np.where(values == first, second, first)


def ahead(values):
    """Values (n, K) -> by how much each exceeds the highest of the others in its row; 0 if there is none."""
    return values - rivals(values) if values.shape[1] > 1 else np.zeros_like(values)


ALIKE = 48  # column of `features`: the share of samples that put both together, as far as they are pure


def features(leaves, owner):
    """(n, K, 61) of every leaf and every hint, where hints look as the leaves do that they own; owner (n,):
    their numbers, 0 = nobody's."""
    n, K, area = *leaves.near.shape[:2], leaves.area
    own = (owner[None] == np.arange(1, K + 1)[:, None]).astype(float)
    size = own @ area
    mean = (own * area) @ leaves.mean / size[:, None]
    share = leaves.codes / area[:, None, None]
    theirs = np.tensordot(own, leaves.codes, 1) / size[:, None, None]
    pure = np.sqrt((share**2).sum(2)[:, None] * (theirs**2).sum(2)[None]).clip(1e-6)
    together = np.einsum("nsk,hsk->nhs", share, theirs)  # the chance of one code for two pixels, one in each
    alike = (together / pure).mean(2)
    together = together.mean(2)
    apart = abs(leaves.mean[:, None] - mean[None])
    appearance = apart[..., : leaves.visible]
    bits = np.minimum(apart[..., leaves.visible :].reshape(n, K, leaves.codes.shape[1], -1).sum(3) / 2, 2)
    colour = np.linalg.norm(appearance[..., :3], axis=2)
    same = np.broadcast_to(1.0, (n, K))
    more = [together, np.log(together + 0.02), np.log(alike + 0.02), ahead(alike), bits.mean(2), bits.min(2),
            colour, ahead(-colour), same * np.log(size / area.sum()),
            same * np.log(area / area.sum())[:, None], own.T, same * np.log(K)]
    return np.concatenate([leaves.near, np.stack(more, axis=2), appearance, alike[..., None], leaves.looks],
                          axis=2)


def odds(leaves, owner, net):
    """Log odds (n, K) that people see one segment in a leaf and a hint; of leaves that hold one: certain."""
    x = features(leaves, owner)
    if net is None:  # the samples alone decide
        share = x[..., ALIKE].clip(0.02, 0.98)
        score = np.log(share / (1 - share))
    else:
        score = perceptron(x[..., : len(net["hint_mean"])], net, "hint_")  # files of before know fewer
    sure = leaves.held > 0
    score[sure] = np.where(leaves.held[sure, None] == np.arange(1, score.shape[1] + 1), 99, -99)
    return score


def piece_odds(leaves, piece, score):
    """Log odds (n, K) of leaves -> their mean, by area, in the piece (n,) of the tree that each leaf lies in.
    Leaves with a hint keep theirs, and so do all of a piece with several hints."""
    clipped, area = score.clip(-6, 6), np.bincount(piece, leaves.area)
    mean = np.stack([np.bincount(piece, leaves.area * s) / area for s in clipped.T], axis=1)
    pairs = np.unique(np.stack([piece, leaves.held])[:, leaves.held > 0], axis=1)
    single = np.bincount(pairs[0], minlength=len(area)) < 2
    return np.where((leaves.held > 0)[:, None], score, np.where(single[piece, None], mean[piece], clipped))


def first_owner(leaves):
    """Before anything is known: leaves (n,) belong to the hint that they meet first, at even odds or better;
    0 where there is none, or several."""
    meet, lead = leaves.near[..., MEET], leaves.near[..., MEET + 1]
    clear = (meet.max(1) > 0) & ((lead.max(1) > 0) | (meet.shape[1] == 1))
    return np.where(leaves.held > 0, leaves.held, np.where(clear, meet.argmax(1) + 1, 0))


def flood(leaves, score):
    """Leaves (n,) -> hints, from 1: from the leaves that hold one outwards, the surest first."""
    around = [[] for _ in leaves.held]
    for a, b in zip(*(v.tolist() for v in leaves.links)):
        around[a].append(b)
        around[b].append(a)
    owner, waiting = np.zeros(len(around), int), []

    def take(leaf, hint):
        owner[leaf] = hint
        for other in around[leaf]:
            if not owner[other]:
                heapq.heappush(waiting, (-score[other, hint - 1], other, hint))

    for leaf in np.flatnonzero(leaves.held):
        owner[leaf] = leaves.held[leaf]
    for leaf in np.flatnonzero(leaves.held):
        take(leaf, owner[leaf])
    while waiting:
        _, leaf, hint = heapq.heappop(waiting)
        if not owner[leaf]:
            take(leaf, hint)
    return owner


def claims(evidence, tree, hints, net=None, closed=False, offset=0.0, within=None):
    """The hint (n,) that each leaf of a tree belongs to, from 1; 0 = none, which happens unless closed.

    tree: grown with these hints (h, w), numbers from 1 to K, 0 = none. net: of `tree.learnt`; None: the
    samples alone decide. A segment of the tree, cut at the normal grain with this offset, stays as it is
    where no hint lies in it and none wants it by enough (see WANTED). within (K, h, w) bool: where each
    hint's segment may lie, which, unless closed, has no leaf whose larger part lies elsewhere.
    """
    leaves = leaves_of(evidence, tree, hints)
    owner, piece = first_owner(leaves), tree.of_leaves(tree.cut("normal", offset + PIECES))
    barred = np.zeros((len(owner), hints.max()), bool)  # (n, K)
    if within is not None:
        share = [np.bincount(tree.region.ravel(), inside.ravel()) / leaves.area for inside in within]
        barred = (np.stack(share, axis=1) < 0.5) & (leaves.held == 0)[:, None]
    score = np.where(barred, -99, piece_odds(leaves, piece, odds(leaves, owner, net)))
    owner = flood(leaves, score)
    if closed:
        return owner
    owner = np.where(barred[np.arange(len(owner)), owner - 1], 0, owner)
    segment = tree.of_leaves(tree.cut("normal", offset))
    held, area = np.bincount(segment, leaves.held) > 0, np.bincount(segment, leaves.area)
    wish = np.stack([np.bincount(segment, leaves.area * s) / area for s in score.clip(-6, 6).T], axis=1)
    wanted = max(one - less * np.log2(wish.shape[1]) for one, less in WANTED)
    return np.where((held | (wish.max(1) > wanted))[segment], owner, 0)
