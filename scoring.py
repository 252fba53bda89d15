"""Scores of one image after another: of samples, medoid, consensus and grouping, of baselines, and of answers to clicks.

What it is: `run(data, positions, ...)` -> a row an image, of plain numbers; `clicks_curve`. What it is not: it averages,
prints and writes nothing (eval.py does).
"""

import numpy as np
import torch
from PIL import Image
from scipy.cluster.vq import kmeans2
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

import metrics
from data import find, normalise
from diffusion import fused, hint_channels, network_input, sample
from formats import fitted, read_image, read_labels
from packing import connected
from pictures import subsample
from segment import hint_map, own_size, segment
from tidy import lab, tidy


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def regular_grid(h, w, side=3):
    """side x side rectangles: (h, w) int64."""
    return torch.arange(h)[:, None] * side // h * side + torch.arange(w) * side // w


def kmeans(image, k=8, position=60.0):
    """k-means on Lab and position (the longer side counts as `position` Lab units): (h, w, 3) uint8 -> (h, w) int64."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w] * (position / max(h, w))
    features = np.concatenate([lab(image / 255), y[..., None], x[..., None]], axis=-1).reshape(h * w, 5)
    return torch.from_numpy(kmeans2(features, k, minit="++", seed=0)[1].reshape(h, w)).long()


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def draw(model, images, sizes, seeds, batch, setting, sharp=None):
    """Samples of a few images and, for calibration, the last step's network output for the first sample of each.

    images (B, S, S, 3) uint8, sizes (B, 2), seeds (B, n) -> x_hat (B, n, C, S, S), out (B, C, S, S), on the CPU. sharp: the
    images as a network of detail d sees them, (B, d S, d S, 3).
    """
    device = next(model.net.parameters()).device
    x, inside = normalise((images if sharp is None else sharp).to(device), sizes.to(device), model.detail)
    n, trace, parts, outs = len(seeds[0]), [], [], []

    def remember(step, t, xt, x_hat):                                              # the last two steps
        trace[:] = [*trace[-1:], (t, xt, x_hat)]

    which = [(i, j) for i in range(len(images)) for j in range(n)]
    for start in range(0, len(which), batch):
        some = which[start : start + batch]
        i = [a for a, _ in some]
        trace.clear()
        parts.append(sample(model.net, x[i], inside[i], model.codec.channels, [seeds[a][j] for a, j in some], model.diffusion,
                            model.codec.activate, callback=remember,
                            fused=fused(model.codec, device), **setting).cpu())
        first = [k for k, (_, j) in enumerate(some) if j == 0]
        if first:
            t, xt, x_hat = trace[-1]
            before = trace[0][2] if len(trace) > 1 else torch.zeros_like(x_hat)    # for self-conditioning
            hints = hint_channels(None, model.diffusion, x_hat[first].shape, device)
            x_self = before[first] if model.diffusion.self_condition > 0 else None
            with torch.no_grad():
                out = model.net(network_input(xt[first], x[i][first], x_self, hints), torch.full((len(first),), t, device=device))
            outs.append(out.float().cpu())
    x_hat = torch.cat(parts).unflatten(0, (len(images), n))
    for i, (h, w) in enumerate(sizes.tolist() if any(model.tidy.values()) else ()):
        x_hat[i, ..., :h, :w] = tidy(x_hat[i, ..., :h, :w], model.codec, images[i, :h, :w], **model.tidy)
    return x_hat, torch.cat(outs)


def originals(name, split, root, void=()):
    """The listing of a data set of files, which Packed.items are numbers in; of shapes, which has none, []."""
    return [] if name == "shapes" else find(name, split, root, void=void)[1]()


def own_maps(item, unlabelled, components=False):
    """All label maps of one image at its own size: (annotators, H, W) int64, -1 = ignore."""
    maps = torch.from_numpy(np.stack([connected(v) if components else v for v in read_labels(item)])).long()
    return maps.masked_fill(maps == 0, -1) if unlabelled == "ignore" else maps


# ---------------------------------------------------------------------------------------------------------------------
# One image


def judge(answers, maps):
    """{answer: {metric: mean over annotators}} of answers {name: (H, W)} and label maps (m, H, W); and of each annotator
    against the others, as "human"."""
    result, m = {}, len(maps)
    if answers:
        s = metrics.all_scores(torch.stack(list(answers.values())).repeat_interleave(m, 0), maps.repeat(len(answers), 1, 1))
        for i, name in enumerate(answers):
            result[name] = {key: float(v[i * m : i * m + m].nanmean()) for key, v in s.items()}
    if m > 1:
        a, b = (~torch.eye(m, dtype=torch.bool)).nonzero(as_tuple=True)
        s = metrics.all_scores(maps[a], maps[b].masked_fill(maps[a] == -1, -1))
        result["human"] = {key: float(v.nanmean()) for key, v in s.items()}
    return result


def best_of(cells, consensus, groups, maps, agreement, ns):
    """{n: {answer: (ARI, IoU)}} for the first n of the samples cells (N, S, S); consensus, groups (len(ns), S, S), for each n.

    Answers: one (the mean over n samples), oracle (the best of n for this image), medoid, consensus, grouping.
    """
    every, m = torch.cat([cells, consensus, groups]), len(maps)
    s = metrics.scores(every.repeat_interleave(m, 0), maps.repeat(len(every), 1, 1))
    s = torch.stack([s["ari"], s["iou"]]).view(2, len(every), m).nanmean(2)        # (2, N + 2 len(ns))
    curve = {}
    for k, n in enumerate(ns):
        curve[n] = {"one": s[:, :n].mean(1), "oracle": s[:, :n].amax(1), "medoid": s[:, metrics.medoid(agreement[:n, :n])],
                    "consensus": s[:, len(cells) + k], "grouping": s[:, len(cells) + len(ns) + k]}
    return {n: {name: v.tolist() for name, v in c.items()} for n, c in curve.items()}


def bit_tables(x_hat, out, maps, codec, tanh):
    """Reliability of Eq. 3's bits against every annotator's: {name: (10, 3)} over confidences from 0.5 to 1.

    x_hat, out (k, S, S): the sample, and the last step's network output of the conditional half, before any activation.
    """
    cells = codec.cells(maps)                                                      # (m, S, S)
    truth, valid = codec.encode(cells) > 0, (cells >= 0)[:, None].expand(-1, len(x_hat), -1, -1)

    def table(x):
        x = x.clamp(-1, 1).expand_as(truth)
        return metrics.reliability(((1 + x.abs()) / 2)[valid], ((x > 0) == truth)[valid], low=0.5)

    tables = {"sample": table(x_hat)}
    return {**tables, "last step, tanh": table(out.tanh()), "last step, no tanh": table(out)} if tanh else tables


def joined_table(cells, maps):
    """Of every two neighbouring pixels: the share of n samples that join them, against that of the annotators: (n + 1, 3)."""
    valid, pairs = (maps != -1).all(0), []
    for a, b in (((..., slice(1, None), slice(None)), (..., slice(-1), slice(None))), ((..., slice(1, None)), (..., slice(-1)))):
        both = valid[a] & valid[b]
        pairs.append([(x[a] == x[b]).double().mean(0)[both] for x in (cells, maps)])
    samples, annotators = (torch.cat(p) for p in zip(*pairs))
    return metrics.reliability(samples, annotators, bins=len(cells) + 1)


def run(data, positions, model, a, setting, ns, files, larger=None, full=True, keep=False, fine=None):
    """A row (dictionary) for each image: "curve", see best_of; if full, the scores; if keep, the label maps.

    Scores are at the network's size; at the images' own, given files; and at that of the data set `larger`, the same images.
    fine: they again, at the resolution that a network with detail sees.
    """
    rows, n = [], max(ns)
    per = max(1, a.batch // n)
    for start in tqdm(range(0, len(positions), per), " ".join(map(str, setting.values())), leave=False):
        at = positions[start : start + per]
        images, _, sizes = data.get(at)
        if model:
            seeds = [[(a.seed * 10**6 + i) * 1000 + j for j in range(n)] for i in at]
            x_hat, out = draw(model, images, sizes, seeds, a.batch, setting, fine and fine.get(at)[0])
        for b, i in enumerate(at):
            maps, (h, w) = data.maps(i), sizes[b].tolist()
            row = dict(position=i, name=data.names[i] if hasattr(data, "names") else str(i), annotators=len(maps))
            answers, own = {}, {}
            if model:
                inside = torch.zeros(maps.shape[1:], dtype=torch.bool)
                inside[:h, :w] = True
                mean = torch.stack([x_hat[b, :k].mean(0) for k in ns])             # soft consensus of the first k
                for k, one in zip(ns, mean if any(model.tidy.values()) else ()):
                    if k > 1:
                        one[:, :h, :w] = tidy(one[None, :, :h, :w], model.codec, images[b, :h, :w], **model.tidy)[0]
                cells = model.codec.decode(torch.cat([x_hat[b], mean]), inside.expand(n + len(ns), -1, -1))
                every = metrics.pairwise(torch.cat([cells[:n], maps]) if full else cells[:n])
                groups = torch.stack([metrics.grouping(cells[:k]) for k in ns])
                row["curve"] = best_of(cells[:n], cells[n:], groups, maps, every[0][:n, :n], ns)
                middle = metrics.medoid(every[0][:n, :n])
                answers["sample"], own["sample"] = cells[0], x_hat[b, 0]
                if n > 1:
                    answers["medoid"], own["medoid"] = cells[middle], x_hat[b, middle]
                    answers["consensus"], own["consensus"] = cells[-1], mean[-1]
                    answers["grouping"] = groups[-1]
                    own["grouping"] = model.codec.encode(model.codec.cells(groups[-1:], torch.Generator().manual_seed(0)))[0]
            elif a.baseline != "human":
                answers[a.baseline] = torch.zeros(maps.shape[1:], dtype=torch.int64)
                own[a.baseline] = regular_grid(h, w) if a.baseline == "grid" else kmeans(images[b, :h, :w].numpy())
                answers[a.baseline][:h, :w] = own[a.baseline]
            rows.append(row)
            if not full:
                continue
            row["network"] = judge(answers, maps)
            bigger = {}
            if larger:
                photo, _, (size,) = larger.get([i])
                bigger[f"{a.size}"] = Image.fromarray(photo[0, : size[0], : size[1]].numpy()), larger.maps(i)[:, : size[0], : size[1]]
            if files:
                item = files[data.items[i]]
                bigger["own"] = read_image(item.image), own_maps(item, a.unlabelled, a.components)
            for where, (photo, truth) in bigger.items():
                H, W = truth.shape[1:]
                row[where] = judge({k: own_size(v, (h, w), W, H, model.codec, photo) if model else subsample(v, H, W)
                                    for k, v in own.items()}, truth)
            if model and n > 1 and len(maps) > 1:
                row["spread"] = {name: [metrics.energy_distance(1 - e, n), metrics.diversity(1 - e[:n, :n]),
                                        metrics.diversity(1 - e[n:, n:])] for name, e in zip(("ARI", "covering"), every)}
            if model and n > 1:
                row["joined"] = joined_table(cells[:n], maps)
            if model and model.codec.encoding == "bits" and model.codec.palette != "none":
                row["bits"] = bit_tables(x_hat[b, 0], out[b], maps, model.codec, model.diffusion.prediction == "x"
                                         and model.codec.activation == "tanh")
            if keep:
                row["tiles"] = [images[b, :h, :w], *(v[:h, :w] for v in (*maps[:2], *answers.values()))]
    return rows


def clicks_curve(model, data, positions, ks, n=1, seed=0):
    """ARI to the annotator who clicks, after k clicks: {k: [(mean over n samples, medoid) for each image]}.

    Simulated: an annotator clicks into k of their segments, the largest first, each at the pixel farthest from its border.
    Mean over annotators; image i has the seeds from (seed 10^6 + i) 1000 on, with as many resampling steps at k = 0.
    """
    if model.codec.encoding != "bits" or max(ks) > model.codec.classes:
        raise ValueError(f"--clicks needs a checkpoint with the encoding bits and at least {max(ks)} codes, not {model.codec.classes} of "
                         f"{model.codec.encoding}")
    curve = {k: [] for k in ks}
    for i in tqdm(positions, "clicks", leave=False):
        images, _, sizes = data.get([i])
        h, w = sizes[0].tolist()
        W, H = fitted(w, h, model.image_size)
        image, scored = Image.fromarray(images[0, :h, :w].numpy()), {k: [] for k in ks}
        for true in data.maps(i)[:, :h, :w]:
            ids, area = true[true >= 0].unique(return_counts=True)
            if not len(ids):
                continue
            points, taken = [], set()
            for label in ids[area.argsort(descending=True, stable=True)]:
                if len(points) == max(ks):
                    break
                depth = distance_transform_edt(np.pad(true == label, 1))[1:-1, 1:-1]
                y, x = np.unravel_index(depth.argmax(), depth.shape)
                pixel = (y * H // h, x * W // w)                                   # the network's
                if pixel not in taken:                                             # of two that share one, the larger is clicked
                    points.append(f"{x},{y}")
                    taken.add(pixel)
            for k in ks:
                hints = hint_map(w, h, ";".join(points[:k])) if points[:k] else None
                result = segment(image, model, n, (seed * 10**6 + i) * 1000, hints=hints, resample=2)
                ari = metrics.scores(result.labels.long(), true.expand(n, -1, -1))["ari"]
                scored[k].append((float(ari.mean()), float(ari[result.medoid])))
        for k in ks:
            curve[k] += [np.mean(scored[k], axis=0).tolist()] if scored[k] else []
    return curve
