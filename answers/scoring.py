"""Scores of one image after another: of samples and their joint answer, and of baselines.

What it is: `score_images(data, positions, ...)` -> a row an image, of plain numbers. What it is not: it
averages, prints and writes nothing (eval.py does); answers to clicks are clicks.py's.
"""

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

import metrics
from answers import tree
from answers.checkpoints import odds_of
from answers.jobs import packed_job, prepare, prompted
from answers.segment import denoise, evidence_of, joined, placed, sample_maps
from answers.tree import lab
from frame import connected, enlarge, shrink, subsample
from sources.formats import read_image, read_labels

ANSWERS = {"coarse": "coarse", "answer": "normal", "fine": "fine"}  # name of the joint answer: its grain


# ------------------------------------------------------------------------------------------------------------
# Baselines


def regular_grid(h, w, side=3):
    """side x side rectangles: (h, w) int64."""
    return torch.arange(h)[:, None] * side // h * side + torch.arange(w) * side // w


def kmeans(image, k=8, position=60.0):
    """k-means on Lab and position (the longer side counts as `position` Lab units): (h, w, 3) uint8 -> (h, w)
    int64."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w] * (position / max(h, w))
    features = np.concatenate([lab(image / 255), y[..., None], x[..., None]], axis=-1).reshape(h * w, 5)
    return torch.from_numpy(kmeans2(features, k, minit="++", seed=0)[1].reshape(h, w)).long()


def foreground(image):
    """(h, w, 3) uint8 -> (h, w) bool: the side of Otsu's threshold of grey (1979) with fewer pixels."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    count = np.bincount(grey.ravel(), minlength=256).astype(float)
    below, total = np.cumsum(count), np.cumsum(count * np.arange(256))
    between = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below)).clip(min=1)
    bright = grey > between.argmax()
    return bright if bright.mean() <= 0.5 else ~bright


def otsu(image):
    """The connected parts of the foreground: (h, w, 3) uint8 -> (h, w) int64, 0 = background."""
    return torch.from_numpy(scipy.ndimage.label(foreground(image))[0]).long()


def watershed(image, apart=7):
    """The foreground, cut where its distance to the background is low between two peaks, which are more than
    apart / 2 pixels from each other: (h, w, 3) uint8 -> (h, w) int64, 0 = background."""
    inside = foreground(image)
    depth = scipy.ndimage.gaussian_filter(scipy.ndimage.distance_transform_edt(inside), 1)
    peaks = inside & (scipy.ndimage.maximum_filter(depth, apart) == depth)
    markers, count = scipy.ndimage.label(peaks, np.ones((3, 3)))
    slope = depth.max() - depth * inside
    climb = [np.maximum(slope[1:], slope[:-1]), np.maximum(slope[:, 1:], slope[:, :-1])]
    labels = tree.forest(climb, np.where(inside, markers, count + 1))
    return torch.from_numpy(np.where(inside, labels + 1, 0)).long()


BASELINES = {"grid": lambda image: regular_grid(*image.shape[:2]), "kmeans": kmeans, "otsu": otsu,
             "watershed": watershed}


# ------------------------------------------------------------------------------------------------------------
# Data


def own_maps(item, unlabelled, components=False):
    """All label maps of one image at its own size: (annotators, H, W) int64, -1 = ignore."""
    maps = torch.from_numpy(np.stack([connected(v) if components else v for v in read_labels(item)])).long()
    return maps.masked_fill(maps == 0, -1) if unlabelled == "ignore" else maps


def at_own_size(files, data, unlabelled, components, i):
    """A place for `score_images`: the files of a packed data set."""
    item = files[data.items[i]]
    return read_image(item.image), own_maps(item, unlabelled, components)


def at_size_of(other, i):
    """A place for `score_images`: another packed data set of the same images."""
    job = packed_job(other, i)
    return Image.fromarray(job.photo), other.maps(i)[:, : job.size[0], : job.size[1]]


# ------------------------------------------------------------------------------------------------------------
# One image


def judge(answers, maps, scores=metrics.all_scores):
    """{answer: {metric: mean over annotators}} of answers {name: (H, W)} and label maps (m, H, W); and of
    each annotator against the others, as "human"."""
    result, m = {}, len(maps)
    if answers:
        s = scores(torch.stack(list(answers.values())).repeat_interleave(m, 0),
                   maps.repeat(len(answers), 1, 1))
        for i, name in enumerate(answers):
            result[name] = {key: float(v[i * m : i * m + m].nanmean()) for key, v in s.items()}
    if m > 1:
        a, b = (~torch.eye(m, dtype=torch.bool)).nonzero(as_tuple=True)
        s = scores(maps[a], maps[b].masked_fill(maps[a] == -1, -1))
        result["human"] = {key: float(v.nanmean()) for key, v in s.items()}
    return result


def bit_table(x_hat, maps, codec, side):
    """Reliability of Eq. 3's bits of a sample (k, h, w) against every annotator's (m, h, w), whose palette is
    that of a network's square of side x side: (10, 3) over confidences from 0.5."""
    h, w = maps.shape[1:]
    cells = codec.cells(F.pad(maps, (0, side - w, 0, side - h), value=-1))[:, :h, :w]  # (m, h, w)
    truth, valid = codec.encode(cells) > 0, (cells >= 0)[:, None].expand(-1, len(x_hat), -1, -1)
    x = x_hat.clamp(-1, 1).expand_as(truth)
    return metrics.reliability(((1 + x.abs()) / 2)[valid], ((x > 0) == truth)[valid], low=0.5)


def joined_table(cells, maps):
    """Of every two neighbouring pixels: the share of n samples that join them, against that of the
    annotators: (n + 1, 3)."""
    valid, pairs = (maps != -1).all(0), []
    for a, b in (((..., slice(1, None), slice(None)), (..., slice(-1), slice(None))),
                 ((..., slice(1, None)), (..., slice(-1)))):
        both = valid[a] & valid[b]
        pairs.append([(x[a] == x[b]).double().mean(0)[both] for x in (cells, maps)])
    samples, annotators = (torch.cat(p) for p in zip(*pairs))
    return metrics.reliability(samples, annotators, bins=len(cells) + 1)


def border_table(grown, labels, maps, net):
    """Reliability of the confidence of borders: chances that people part two segments of a map, against the
    share of the annotators' pairs of pixels, one in each segment, that they part, by the length of the
    border: (10, 3)."""
    graph, rows = grown.graph_of(labels), []
    for i, j, chance, length in zip(graph.i, graph.j, tree.border_chances(graph, net), graph.border[:, 0]):
        parted = []
        for truth in maps.numpy():
            a, b = truth[(labels == i) & (truth >= 0)], truth[(labels == j) & (truth >= 0)]
            if len(a) and len(b):
                most = int(max(a.max(), b.max())) + 1
                together = np.bincount(a, minlength=most) @ np.bincount(b, minlength=most)
                parted.append(1 - together / (len(a) * len(b)))
        if parted:
            rows.append((chance, float(np.mean(parted)), length))
    chance, truth, length = torch.tensor(rows, dtype=torch.float64).view(-1, 3).T
    return metrics.reliability(chance, truth, weight=length)


def share_who_drew(labels, maps):
    """Of each segment of labels (h, w) the share of the annotators' maps (m, h, w) that have one with IoU
    above one half, of those who labelled half of it: (segments,) float64, nan where nobody did."""
    table = metrics.contingency(torch.from_numpy(labels).long().expand(len(maps), -1, -1), maps)
    drew = metrics.iou_matrix(table).amax(2) > 0.5
    could = table.sum(2) >= torch.from_numpy(np.bincount(labels.ravel())) / 2
    return (drew & could).sum(0) / could.sum(0).double()


def segment_table(sure, labels, maps):
    """Reliability of the confidence of segments, against the share of annotators who drew them: (10, 3)."""
    drew = share_who_drew(labels, maps)
    judged = ~drew.isnan()
    return metrics.reliability(torch.as_tensor(sure)[judged], drew[judged])


def own_scores(pred, true):
    """metrics.all_scores, and the precision of objects, where the ids are the files' own."""
    return metrics.all_scores(pred, true) | {"ap50": metrics.object_precision(pred, true)}


def seed_of(seed, i):
    """The first seed of image i; sample j has j more."""
    return (seed * 10**6 + i) * 1000


def job_of(data, i, model, seed, tiles, files, hints=None):
    """Image number i of a data set as a Job: as it is packed or, where tiles is not 1, from its own file, of
    those of `data.originals`. hints (h, w), at the size of the packed one: numbers from 1, 0 = none."""
    if tiles == 1:
        job = packed_job(data, i, seed)
        return job if hints is None else prompted(job, model, hints, None)
    picture = read_image(files[data.items[i]].image)
    size = picture.height, picture.width
    if hints is not None and any(a > b for a, b in zip(hints.shape, size)):
        hints = shrink(hints, *size)  # which loses none
    elif hints is not None:
        hints = subsample(hints, *size)
    return prepare(picture, model, hints, seed=seed, tiles=tiles)


def score_images(data, positions, model, a, setting, ns, places, files=None, full=True, keep=False):
    """A row (dictionary) for each image: "curve", {n: {one, oracle, answer: (ARI, IoU)}}; if full, the
    scores; if keep, the maps.

    Scores are at the network's size, and at other places {name: function}, which gives the PIL image and the
    label maps (m, H, W) of image number i there. With a.tiles other than 1 the images are read from their
    files (of `data.originals`), and the answers subsampled to the network's size.
    """
    rows, n = [], max(ns)
    bar = tqdm(positions, " ".join(map(str, setting.values())), leave=False)
    jobs = (job_of(data, i, model, seed_of(a.seed, i), a.tiles, files) for i in positions)
    if model:
        jobs = denoise(jobs, model, n, a.batch, **setting)
    for i, job in zip(bar, jobs):
        (h, w), photo = job.size, job.photo
        maps = data.maps(i)[:, :h, :w]
        row = dict(position=i, name=data.names[i] if hasattr(data, "names") else str(i), annotators=len(maps))
        answers = {}
        if model:
            m = len(maps)
            samples = sample_maps(job, model)
            grown = {k: joined(evidence_of(job, model.codec, slice(k)), model) for k in ns}
            every = np.stack([*samples, *(labels for _, labels in grown.values())])
            every = subsample(torch.from_numpy(every), h, w).long()
            s = metrics.scores(every.repeat_interleave(m, 0), maps.repeat(len(every), 1, 1))
            s = torch.stack([s["ari"], s["iou"]]).view(2, len(every), m).nanmean(2)  # (2, n + len(ns))
            row["curve"] = {k: {"one": s[:, :k].mean(1).tolist(), "oracle": s[:, :k].amax(1).tolist(),
                                "answer": s[:, n + p].tolist()}
                            for p, k in enumerate(ns)}
            answers = {"sample": samples[0]} | {name: grown[n][0].cut(grain, odds_of(model)[1]) for name,
                                                grain in ANSWERS.items()}
        elif a.baseline != "human":
            answers[a.baseline] = BASELINES[a.baseline](photo).numpy()
        answers = {name: torch.from_numpy(labels).long() for name, labels in answers.items()}
        rows.append(row)
        if not full:
            continue
        row["network"] = judge({k: subsample(v, h, w) for k, v in answers.items()}, maps)
        for where, place in places.items():
            picture, truth = place(i)
            H, W = truth.shape[1:]
            row[where] = judge({k: enlarge(v[None], picture)[0].long() if model else subsample(v, H, W)
                                for k, v in answers.items()}, truth,
                               own_scores if where == "own" else metrics.all_scores)
        if model:
            row |= reliability_of(job, every[:n], maps, *grown[n], model)
        if keep:
            shown = [placed(subsample(v[None], h, w).numpy(), 16)[0][0] for v in answers.values()]
            row["tiles"] = [torch.from_numpy(photo), *maps[:2], *shown]
    return rows


def reliability_of(job, every, maps, tree_of_all, labels, model):
    """How n samples and the confidences of their joint answer compare with the annotators: the entries
    spread, joined, segments, borders and bits of a row, as far as there are enough of both. every: the
    samples' maps (n, h, w), at the size of maps (m, h, w)."""
    n, result, finer = len(every), {}, subsample(maps, *labels.shape)
    if n > 1 and len(maps) > 1:
        result["spread"] = {
            name: [metrics.energy_distance(1 - e, n), metrics.diversity(1 - e[:n, :n]),
                   metrics.diversity(1 - e[n:, n:])]
            for name, e in zip(("ARI", "covering"), metrics.pairwise(torch.cat([every, maps])))}
    if n > 1:
        result["joined"] = joined_table(every, maps)
    net = odds_of(model)[0]
    sure, _ = tree.confidence(tree_of_all, labels, net)
    result["segments"] = segment_table(sure, labels, finer)
    result["borders"] = border_table(tree_of_all, labels, finer, net)
    if model.codec.has_bits and model.codec.palette != "none":
        result["bits"] = bit_table(job.x_hat[0], maps, model.codec, model.image_size)
    return result
