"""What clicks bring: scores after so many of them, and how many it takes, beside what needs no training.

What it is: `clicks_curve` (an annotator clicks into every segment) and `clicks_needed` (a user corrects one
object until it is right), with simulated users. What it is not: a page to click on.
"""

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, label
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve
from tqdm import tqdm

import metrics
from answers import tree
from answers.jobs import packed_job
from answers.scoring import job_of, seed_of
from answers.segment import denoise, evidence_of, joined
from answers.tree import lab
from frame import connected, enlarge, shrink, subsample
from sources.formats import read_image, read_labels


def clicks_of(true):
    """Where an annotator clicks: the pixel farthest from the border of each segment of true (h, w), the
    largest first: [(y, x)]."""
    ids, area = np.unique(true[true >= 0], return_counts=True)
    points = []
    for number in ids[np.argsort(-area, kind="stable")]:
        depth = distance_transform_edt(np.pad(true == number, 1))[1:-1, 1:-1]
        points.append(np.unravel_index(depth.argmax(), depth.shape))
    return list(dict.fromkeys((int(y), int(x)) for y, x in points))


def hints_of(points, shape):
    """Single pixels as a hint map (h, w), numbered from 1 in their order."""
    hints = np.zeros(shape, int)
    for number, point in enumerate(points, 1):
        hints[point] = number
    return hints


def gradient(photo):
    """Of Lab, between neighbours of (h, w, 3) uint8: (h - 1, w) and (h, w - 1)."""
    colour = lab(photo / 255)
    return [np.linalg.norm(np.diff(colour, axis=axis), axis=2) for axis in (0, 1)]


def nearest_click(hints):
    """The label of the nearest hinted pixel: (h, w)."""
    at = distance_transform_edt(hints == 0, return_distances=False, return_indices=True)
    return hints[tuple(at)]


def random_walker(photo, hints, beta=0.02):
    """The hint that a random walk reaches first, most likely (Grady 2006): (h, w). Steps are exp(-beta
    |dLab|^2) likely."""
    h, w = hints.shape
    at, jump = np.arange(h * w).reshape(h, w), gradient(photo)
    i = np.concatenate([at[:-1].ravel(), at[:, :-1].ravel()])
    j = np.concatenate([at[1:].ravel(), at[:, 1:].ravel()])
    weight = np.exp(-beta * np.concatenate([v.ravel() for v in jump]) ** 2) + 1e-6
    links = coo_matrix((np.r_[weight, weight], (np.r_[i, j], np.r_[j, i])), shape=(h * w, h * w)).tocsr()
    laplacian = diags(np.asarray(links.sum(1)).ravel()) - links
    seed, free = np.flatnonzero(hints), np.flatnonzero(hints.ravel() == 0)
    numbers = np.unique(hints[hints > 0])
    sides = (hints.ravel()[seed][:, None] == numbers).astype(float)
    chance = spsolve(laplacian[free][:, free].tocsc(), -laplacian[free][:, seed] @ sides)
    chance = chance.reshape(len(free), -1)
    out = hints.ravel().copy()
    out[free] = numbers[chance.argmax(1)]
    return out.reshape(h, w)


def baselines(photo, x_hat):
    """{name: function of hints (h, w) -> label map (h, w)} of what needs no training, and of a watershed on
    samples' soft bits (n, C, h, w); hints are the markers."""
    jump, x_hat = gradient(photo), x_hat.float().clamp(-1, 1)
    soft = [x_hat.diff(dim=axis).abs().sum(1).clamp(max=2).mean(0).numpy() for axis in (2, 3)]
    jump_of_samples = [s + 0.3 * g / 20 for s, g in zip(soft, jump)]
    return {"nearest click": nearest_click, "watershed, Lab": lambda hints: tree.forest(jump, hints),
            "random walker": lambda hints: random_walker(photo, hints),
            "watershed, samples": lambda hints: tree.forest(jump_of_samples, hints)}


def to_click(model, data, positions, n, seed, batch, tiles, files, at_once=False, **asked):
    """For each image: its position, maps (m, h, w), baselines, and a function: hints (h, w) -> evidence of n
    samples that have seen them; None, and at once or where the network sees no hints: of samples that have
    not. tiles, files: as of `clicks_curve`; asked: as of `denoise`."""
    def job(i, hints=None):
        return job_of(data, i, model, seed_of(seed, i), tiles, files, hints)

    jobs = denoise(map(job, positions), model, n, batch, **asked)
    for i in tqdm(positions, "clicks", leave=False):
        packed, unseeing = packed_job(data, i), next(jobs)
        (h, w), plain = packed.size, evidence_of(unseeing, model.codec)

        def evidence(hints=None, i=i, plain=plain):
            if hints is None or at_once or not model.diffusion.hints:
                return plain
            return evidence_of(next(denoise([job(i, hints)], model, n, batch, **asked)), model.codec)

        yield (i, data.maps(i)[:, :h, :w].numpy(), baselines(packed.photo, torch.stack(unseeing.x_hat)),
               evidence)


def clicks_curve(model, data, positions, ks, n=1, seed=0, batch=1, tiles=1, files=None, at_once=False,
                 **asked):
    """Scores after k clicks of every annotator in turn: {method: {k: [{metric: mean over annotators}, one an
    image]}}.

    ks: numbers of clicks, "all" for one in every segment. Methods: open and closed (this model's; "at once":
    where the network sees hints, by the samples that have not seen these), and baselines. tiles: as `prepare`
    has them; more than 1 needs the images' files, as of `data.originals`. at_once: nothing is sampled again.
    """
    curve = {}
    for _, maps, methods, evidence in to_click(model, data, positions, n, seed, batch, tiles, files, at_once,
                                               **asked):
        plain, scored = evidence(), {}
        for true in maps:
            points = clicks_of(true)
            for k in ks:
                hints = hints_of(points if k == "all" else points[:k], true.shape)
                given = hints if hints.any() else None
                seen = evidence(given)
                answers = {"open": joined(seen, model, hints=given)[1]}
                if given is not None:
                    answers["closed"] = joined(seen, model, hints=given, closed=True)[1]
                    if seen is not plain:
                        answers["open, at once"] = joined(plain, model, hints=given)[1]
                        answers["closed, at once"] = joined(plain, model, hints=given, closed=True)[1]
                    answers |= {name: method(hints) for name, method in methods.items()}
                answers = {name: subsample(torch.from_numpy(v), *true.shape) for name, v in answers.items()}
                s = metrics.all_scores(torch.stack(list(answers.values())).long(),
                                       torch.from_numpy(true).expand(len(answers), -1, -1))
                for p, name in enumerate(answers):
                    scored.setdefault((name, k), []).append({key: float(v[p]) for key, v in s.items()})
        for (name, k), several in scored.items():
            mean = {key: float(np.nanmean([scores[key] for scores in several])) for key in several[0]}
            curve.setdefault(name, {}).setdefault(k, []).append(mean)
    return curve


def clicks_needed(model, data, files, target=0.85, most=20, objects=100, n=4, seed=0, batch=1, tiles=1,
                  components=False, at_once=False, **asked):
    """How many clicks a simulated user needs until an object reaches IoU `target`: {method: [clicks, one
    number an object]}, and how many objects are left out since their own mask, made small for the network and
    large again, misses the target.

    An object is a label above 0 of the first annotator, or if components a connected part of one, that
    covers 1 % of its image or more; at most `objects` of them, drawn by seed. Each click is in the middle of
    the largest wrong region, at the image's own size; all clicks beside the object share one id. Who is not
    there after `most` clicks counts as `most`. at_once: nothing is sampled again. Raises ValueError where
    there is no object.
    """
    def map_of(item):
        return connected(read_labels(item)[0]) if components else read_labels(item)[0]

    found = []
    for i in range(len(data)):
        true = map_of(files[data.items[i]])
        ids, area = np.unique(true[true > 0], return_counts=True)
        found += [(i, int(number)) for number in ids[area >= 0.01 * true.size]]
    if not found:
        raise ValueError("no label above 0 covers 1 % of its image: there is no object to click at")
    chosen = np.random.default_rng(seed).permutation(len(found))[:objects]
    wanted = {}
    for k in chosen:
        wanted.setdefault(found[k][0], []).append(found[k][1])
    counts, left_out = {}, 0
    for i, maps, by_baseline, evidence in to_click(model, data, sorted(wanted), n, seed, batch, tiles, files,
                                                   at_once, **asked):
        item = files[data.items[i]]
        picture, labels = read_image(item.image), map_of(item)
        methods = {"tree": lambda hints: joined(evidence(hints), model, hints=hints)[1],
                   **{name: by_baseline[name]
                      for name in ("watershed, Lab", "watershed, samples", "nearest click")}}
        if model.diffusion.hints and not at_once:
            methods["tree, at once"] = lambda hints: joined(evidence(), model, hints=hints)[1]
        for number in wanted[i]:
            truth = labels == number
            small = shrink(truth.astype(np.int64) + 1, *maps.shape[1:]) == 2
            if iou(enlarge(small[None].astype(np.int64), picture)[0].numpy() > 0, truth) < target:
                left_out += 1
                continue
            for name, method in methods.items():
                counts.setdefault(name,
                                  []).append(clicks_to(method, truth, maps.shape[1:], picture, target, most))
    return counts, left_out


def clicks_to(method, truth, shape, picture, target, most):
    """Clicks until method(hints (h, w)) -> labels, of any size, has the object truth (H, W) by IoU `target`;
    `most` if it never has."""
    hints, mask = np.zeros(shape, int), np.zeros(truth.shape, bool)
    for count in range(1, most + 1):
        missed, extra = (middle_of_largest(v) for v in (truth & ~mask, mask & ~truth))
        (_, y, x), number = max((missed, 1), (extra, 2))
        at = y * shape[0] // truth.shape[0], x * shape[1] // truth.shape[1]
        # the network's pixel belongs to the other side already: nothing more can be said
        if hints[at] == 3 - number:
            return most
        hints[at] = number
        labels = method(hints)
        y, x = (np.argwhere(hints == 1)[0] * 2 + 1) * labels.shape // (2 * np.array(shape))
        inside = labels == labels[y, x]
        mask = enlarge(inside[None].astype(np.int64), picture)[0].numpy() > 0
        if iou(mask, truth) >= target:
            return count
    return most


def middle_of_largest(wrong):
    """(pixels, y, x) of the largest connected part of wrong (H, W) bool: its size and its deepest pixel; (0,
    0, 0) if there is none."""
    parts, count = label(wrong)
    if not count:
        return 0, 0, 0
    sizes = np.bincount(parts.ravel())[1:]
    depth = distance_transform_edt(np.pad(parts == sizes.argmax() + 1, 1))[1:-1, 1:-1]
    return int(sizes.max()), *(int(v) for v in np.unravel_index(depth.argmax(), depth.shape))


def iou(a, b):
    """Of two masks."""
    return (a & b).sum() / max(1, (a | b).sum())
