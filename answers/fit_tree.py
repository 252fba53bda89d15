"""Learn from people's segmentations which regions belong together: the small network behind the odds of
tree.py.

    # 800 crops; 60, with the weights in the box, take two and a half minutes of one core
    python -m answers.fit_tree --ckpt out/photos-photo/ckpt.pt --dataset photos
    python -m answers.fit_tree --ckpt weights/photo.pt --dataset photos:3,streets:1:ignore --out tree.npz

Samples of the checkpoint for random crops of the training images become trees: once by a plain measure, once
by a first network's odds. For every two regions that touch on the way, the target is the share of pairs of
pixels, one in each, that the annotators put together. Then simulated users click, into segments or to
correct an object: for every leaf and every hint, the target is the share of the leaf in what the hint means
(claims.py). No set has more than a third of
the weight. Sets differ in how finely people cut; the network of the pairs is told which set it sees, and in
the end it answers as for the first, to whose people's maps the cut of the normal grain is fitted last. Sets
must be labelled everywhere, or else say `ignore`. The file that is used is the tree.npz beside a
checkpoint, or else the one in weights/.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt, label
from tqdm import tqdm

import metrics
from answers import tree
from answers.checkpoints import load_checkpoint, newest_checkpoint
from answers.claims import claims, features, first_owner, leaves_of
from answers.jobs import prepare
from answers.scoring import own_maps, share_who_drew
from answers.segment import denoise, evidence_of
from data import as_trained, originals, parse_parts, selection
from engine import complaint, host_threads, make_folder, pick_device, program
from frame import subsample
from sources.formats import in_words, notice, read_image

WIDTH, STEPS, LR = 48, 3000, 5e-3  # of the small networks and their training
# of the log odds of the grains: to choose from, by so many crops at most; of equally good ones, the first
OFFSETS, CROPS = (0, 0.25, -0.25, 0.5, -0.5, 0.75, 1), 200
MOST = 1 / 3  # of the weight, for any one set
CORRECTED, CORRECTIONS = (1, 2, 4, 7, 12), 0.3  # clicks of a user who corrects an object; their weight


def crops(items, count, settings, seed, crop=None):
    """(PIL image, all annotators' maps (m, H, W)) of `count` random crops of a set's items, half of them
    mirrored. settings: dict(unlabelled, components). crop: the least share of a side; None: 0.74, and the
    first crop of each image is all of it."""
    order = np.random.default_rng(seed).permutation(len(items))
    for c in range(count):
        item, r = items[order[c % len(items)]], np.random.default_rng([*seed, c])
        try:
            image = read_image(item.image)
            maps = own_maps(item, settings["unlabelled"], settings["components"])
        except Exception as e:  # of any library, for whatever is in a file
            notice(item.image, f"left out: {in_words(e)}")
            continue
        share, stretch = 1, 1
        if crop or c >= len(items):
            share = np.sqrt(r.uniform(crop**2 if crop else 0.55, 1))
            stretch = np.exp(r.uniform(-0.08, 0.08))
        w, h = (max(1, min(side, int(side * share * f))) for side,
                f in zip(image.size, (stretch, 1 / stretch)))
        x, y = r.integers(image.width - w + 1), r.integers(image.height - h + 1)
        part, labels = image.crop((x, y, x + w, y + h)), maps[:, y : y + h, x : x + w]
        if r.random() < 0.5:
            part, labels = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels.flip(2)
        yield part, labels


@dataclass
class Crop:
    """A crop of set number `set` that was sampled n times: what people drew, and evidence(slice), of some of
    its samples (tree.Evidence)."""

    set: int
    maps: np.ndarray  # (m, h, w), -1 = unlabelled
    evidence: Callable
    n: int
    objects: bool = False  # single objects alone are labelled: what is not, is none of them

    def some(self, rng):
        """Evidence of one of its samples, of two, or of all."""
        k = min(self.n, rng.choice([1, 2, self.n]))
        first = rng.integers(self.n - k + 1)
        return self.evidence(slice(first, first + k))


def clicks(labels, rng):
    """Simulated hints (h, w) for labels (h, w), -1 = unlabelled: numbers from 1 to K, and the segments that
    are meant: (K, h, w) bool. In three of ten cases one object against the rest, some clicks each; else
    clicks into the largest segments. Each in the middle of what is meant, or (four in ten) anywhere in it."""
    hints, meant, labelled = np.zeros(labels.shape, int), [], labels >= 0
    ids, area = np.unique(labels[labelled], return_counts=True)
    large = ids[area >= 0.01 * labels.size]
    if len(large) and rng.random() < 0.3:
        chosen = labels == rng.choice(large)
        wanted = [(chosen, rng.integers(1, 6)), (labelled & ~chosen, rng.integers(0, 5))]
    else:
        most = rng.choice([1, 2, 4, 8, 16, 10**6])
        wanted = [(labels == i, rng.geometric(0.8)) for i in ids[np.argsort(-area, kind="stable")][:most]]
    for mask, count in wanted:
        for _ in range(count):
            free = mask & (hints == 0)
            if not free.any():
                break
            middle = distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1].argmax()
            hints.flat[middle if rng.random() < 0.6 else rng.choice(np.flatnonzero(free))] = len(meant) + 1
        if (hints == len(meant) + 1).any():
            meant.append(mask)
    return hints, np.array(meant)


def corrections(crop, evidence, labels, net, rng):
    """States of a simulated user who corrects one object of labels (h, w): [(hints, the Tree grown with them,
    what is meant (K, h, w) bool)] after each click: hint 1 for the object, 2 for all around it, in the middle
    of what is wrong or (three in ten) anywhere in it. Three in ten objects are two segments that touch, where
    everything is labelled; else, where it is not, what is unlabelled is not the object."""
    ids, area = np.unique(labels[labels >= 0], return_counts=True)
    large, states = ids[area >= 0.01 * labels.size], []
    if not len(large):
        return states
    known = (labels >= 0) | crop.objects
    chosen = labels == rng.choice(large)
    around = np.unique(labels[binary_dilation(chosen, iterations=2) & ~chosen & (labels >= 0)])
    if rng.random() < 0.3 and len(around) and not crop.objects:
        chosen = chosen | (labels == rng.choice(around))
    meant, hints = np.stack([chosen, known & ~chosen]), np.zeros(labels.shape, int)
    mask = np.zeros(labels.shape, bool)
    for _ in range(rng.choice(CORRECTED)):
        parts, _ = label((mask != chosen) & known & (hints == 0))
        depth = distance_transform_edt(np.pad(parts > 0, 1))[1:-1, 1:-1]
        at = depth.argmax()
        if not depth.flat[at]:
            break
        if rng.random() < 0.3:
            at = rng.choice(np.flatnonzero(parts == parts.flat[at]))
        hints.flat[at] = 1 if chosen.flat[at] else 2
        grown = tree.grow(evidence, net, hints)
        states.append((hints.copy(), grown, meant[: hints.max()]))
        answer = grown.cut(claimed=claims(evidence, grown, hints, net))
        mask = answer == answer[tuple(np.argwhere(hints == 1)[0])]
    return states


def region_pairs(drawn, net, rng, share):
    """Pairs of regions met while trees grow: (m, 53) features, (m,) targets and (m,) number of the set.

    drawn: [Crop]; share: of the pairs that are kept, at random.
    """
    pairs, targets, set_numbers = [], [], []
    for crop in drawn:
        known = [v >= 0 for v in crop.maps]
        ids = [np.unique(v[k], return_inverse=True) if k.any() else None for v, k in zip(crop.maps, known)]

        def watch(region, features, i, j):
            together, counted, n = np.zeros(len(i)), np.zeros(len(i)), region.max() + 1
            for k, pair in zip(known, ids):
                if pair is None:
                    continue
                T = len(pair[0])
                count = np.bincount(region[k] * T + pair[1], minlength=n * T).reshape(n, T)
                total = count.sum(1)
                both = (total[i] > 0) & (total[j] > 0)
                part = count / total.clip(1)[:, None]
                together += np.where(both, (part[i] * part[j]).sum(1), 0)
                counted += both
            use = (counted > 0) & (rng.random(len(i)) < share)
            pairs.append(features[use].astype(np.float32))
            targets.append((together[use] / counted[use]).astype(np.float32))
            set_numbers.append(np.full(use.sum(), crop.set))

        tree.grow(crop.some(rng), net, watch=watch)
    if not sum(map(len, set_numbers)):
        raise ValueError("no two labelled regions touch in any image: there is nothing to learn from")
    return np.concatenate(pairs), np.concatenate(targets), np.concatenate(set_numbers)


def hinted_leaves(drawn, net, rng, times=2):
    """Leaves of trees beside simulated hints: [(features (n, K, 61), the share (n, K) of each leaf in what
    each hint means, area (n,), number of the set, whether an object was corrected)].

    Of each crop, so many times anew drawn `clicks`, unless single objects alone are labelled; and, once net
    has odds of hints, the last state and another of one or two that are corrected.
    """
    out = []
    for crop in drawn:
        evidence, states = crop.some(rng), []
        for _ in range(0 if crop.objects else times):
            labels = crop.maps[rng.integers(len(crop.maps))]
            hints, meant = clicks(labels, rng)
            if len(meant):
                states.append((False, labels, hints, tree.grow(evidence, net, hints), meant))
        for _ in range((1 + crop.objects) * bool(net and "hint_mean" in net)):
            labels = crop.maps[rng.integers(len(crop.maps))]
            way = corrections(crop, evidence, labels, net, rng)
            for k in {len(way) - 1, rng.integers(len(way))} if way else ():
                states.append((True, labels, *way[k]))
        for corrected, labels, hints, grown, meant in states:
            leaves, region = leaves_of(evidence, grown, hints), grown.region.ravel()
            known = (labels >= 0) | (crop.objects and corrected)
            known = np.bincount(region, known.ravel())
            inside = np.stack([np.bincount(region, mask.ravel()) for mask in meant], axis=1)
            use = (leaves.held == 0) & (known > 0)
            x = features(leaves, first_owner(leaves))[use].astype(np.float32)
            out.append((x, (inside / known.clip(1)[:, None])[use].astype(np.float32),
                        leaves.area[use] / leaves.area.sum(), crop.set, corrected))
    return out


def balanced(weight, set_numbers):
    """Weights (m,) such that no set has more than MOST of all, as far as there are enough sets."""
    total = np.bincount(set_numbers, weight)
    share = total / total.sum()
    for _ in range(50):
        share = np.minimum(share, max(MOST, 1 / np.count_nonzero(total)))
        share = share / share.sum()
    return weight * (share / total.clip(1e-9))[set_numbers]


def train(inputs, weight, batch, dropout, steps, loss_of):
    """A small network for so many inputs, trained to a small mean of loss_of(net, rows), over rows drawn by
    weight."""
    net = torch.nn.Sequential(torch.nn.Linear(inputs, WIDTH), torch.nn.SiLU(), torch.nn.Dropout(dropout),
                              torch.nn.Linear(WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Dropout(dropout),
                              torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    chance = torch.from_numpy(weight).cumsum(0)
    for _ in range(steps):
        rows = torch.searchsorted(chance, torch.rand(batch, dtype=torch.float64) * chance[-1])
        loss = loss_of(net, rows.clamp(max=len(chance) - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def standardised(x, set_numbers):
    """Features (m, F) -> the network's inputs: standardised, with the number of the set (m,) as one of S;
    mean and scale (F,)."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    return torch.cat([((x - mean) / scale).clamp(-6, 6), F.one_hot(set_numbers).float()], dim=1), mean, scale


def arrays(net, mean, scale, name=""):
    """What tree.perceptron computes with: the network as it answers for the first set."""
    first = net[0].weight[:, len(mean)]
    result = dict(mean=mean, scale=scale, w1=net[0].weight[:, : len(mean)], b1=net[0].bias + first,
                  w2=net[3].weight, b2=net[3].bias, w3=net[6].weight, b3=net[6].bias)
    return {name + key: v.detach().numpy().astype(np.float32) for key, v in result.items()}


def fit(pairs, targets, set_numbers, seed):
    """-> {name: array}: the odds of pairs of regions, as tree.log_odds takes them."""
    torch.manual_seed(seed)
    # by the root of the smaller region's share of the map
    weight = balanced(np.exp(0.5 * pairs[:, tree.SMALLER]), set_numbers)
    x, mean, scale = standardised(torch.from_numpy(pairs), torch.from_numpy(set_numbers))
    y = torch.from_numpy(targets)

    def loss_of(net, rows):
        return F.binary_cross_entropy_with_logits(net(x[rows])[:, 0], y[rows])

    net = train(x.shape[1], weight, 2048, 0.1, STEPS, loss_of)
    with torch.no_grad():
        each = F.binary_cross_entropy_with_logits(net(x)[:, 0], y, reduction="none").numpy()
    print(f"{len(x)} pairs, {float(y.mean()):.3f} of them together; cross entropy "
          f"{(each * weight).sum() / weight.sum():.4f}")
    return arrays(net, mean, scale)


def fit_hints(rows, seed):
    """-> {name: array}: the odds that a leaf belongs to a hint, as claims.odds takes them. Two errors are
    made small: of each leaf and hint by itself, and of the choice among the hints."""
    torch.manual_seed(seed)
    counts = [len(x) for x, *_ in rows]
    hints = torch.from_numpy(np.repeat([x.shape[1] for x, *_ in rows], counts))
    set_numbers, corrected = (np.repeat(v, counts) for v in zip(*(row[3:] for row in rows)))
    weight = np.sqrt(np.concatenate([area for _, _, area, *_ in rows]))
    for part, share in ((corrected, CORRECTIONS), (~corrected, 1 - CORRECTIONS)):
        if part.any():
            weight[part] = balanced(weight[part], set_numbers[part])
            weight[part] *= share / weight[part].sum()
    set_numbers = np.where(corrected, 0, set_numbers)  # what an object is, no set tells
    x = torch.from_numpy(np.concatenate([x.reshape(-1, x.shape[2]) for x, *_ in rows]))
    x, mean, scale = standardised(x, torch.from_numpy(set_numbers).repeat_interleave(hints))
    y = torch.from_numpy(np.concatenate([y.ravel() for _, y, *_ in rows]))
    start = hints.cumsum(0) - hints

    def loss_of(net, leaf):
        count = hints[leaf]
        at = torch.arange(int(count.max()))[None].expand(len(leaf), -1)
        there = at < count[:, None]
        row = torch.where(there, start[leaf][:, None] + at, 0)
        target, score = y[row] * there, torch.full(row.shape, -1e4)
        score[there] = net(x[row[there]])[:, 0]
        each = F.binary_cross_entropy_with_logits(score, target, reduction="none") * there
        choice = -(target * score.log_softmax(1)).sum() / target.sum().clamp(min=1e-3)
        return (each.sum(1) / count.sqrt()).mean() + choice

    net = train(x.shape[1], weight, 256, 0.25, 2 * STEPS, loss_of)
    print(f"{len(hints)} leaves in {len(rows)} states, {len(x)} pairs of a leaf and a hint")
    return arrays(net, mean, scale, "hint_")


def fit_confidence(drawn, net):
    """How `tree.confidence` weighs what it sees: (4,), by logistic regression on the share of annotators who
    have a segment with IoU above one half, of the maps at every grain; of segments that somebody could have
    drawn."""
    seen, hits, of = [], [], []
    for crop in drawn:
        evidence = crop.evidence(slice(None))
        grown = tree.grow(evidence, net)
        for grain in tree.GRAINS:
            labels = grown.cut(grain)
            *sure, _ = tree.sureness(grown, labels, net)
            hits.append(share_who_drew(labels, torch.from_numpy(crop.maps)))
            seen.append(torch.from_numpy(tree.confidence_features(*sure).T))
            of.append(torch.full((len(hits[-1]),), crop.set))
    x, y, of = torch.cat(seen), torch.cat(hits), torch.cat(of)
    judged = ~y.isnan()
    x, y, of = x[judged], y[judged], of[judged].numpy()
    counts = torch.from_numpy(balanced(np.ones(len(of)), of) * len(of))
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(weight[0] + x @ weight[1:], y, counts)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().numpy()


def fit_offset(drawn, net):
    """What is added to the log odds of every grain, (1,): where the normal one is most like people's maps, by
    the mean ARI and the PQ of all together (ARI hardly sees a small segment too many, PQ does)."""
    scores = []
    for crop in drawn:
        grown = tree.grow(crop.evidence(slice(None)), net)
        maps = torch.from_numpy(np.stack([grown.cut(offset=offset) for offset in OFFSETS]))
        for true in torch.from_numpy(crop.maps):
            scores.append(metrics.all_scores(maps, true.expand(len(maps), -1, -1)))
    s = {key: torch.stack([of_map[key] for of_map in scores]) for key in scores[0]}
    found, segments = metrics.quality(s)["pq"]
    worth = (s["ari"].nanmean(0) + found.nansum(0) / segments.nansum(0)).nan_to_num()
    found = sorted(zip(OFFSETS, worth.tolist()))
    print("ARI + PQ by offset: " + ", ".join(f"{offset:+g} {value:.3f}" for offset, value in found))
    return np.array([OFFSETS[int(worth.argmax())]])


@program("fit_tree.py", "nothing is written; start it again")
def main(argv=None):
    p = argparse.ArgumentParser("python -m answers.fit_tree", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", required=True, help="a data set or several, see train.py; their training "
                                                    "images are used")
    p.add_argument("--root", default="data", help="where named data sets lie (%(default)s)")
    p.add_argument("--objects", help="more sets, in whose images single objects are labelled and all else is "
                                     "not: from these, clicks alone are learnt")
    p.add_argument("--unlabelled", choices=("segment", "ignore"), help="id 0, where a set does not say "
                   ":ignore (default: as the checkpoint was trained on it, else segment)")
    p.add_argument("--ckpt", help="default: the newest under out/, else the weights in the box")
    p.add_argument("--out", help="the file to write (default: tree.npz beside the checkpoint)")
    p.add_argument("--crops", type=int, default=800, help="random crops, of all images together "
                                                               "(%(default)s)")
    p.add_argument("--crop", type=float, help="least share of a side that a crop has, say 0.25 for a network "
                                              "of crowds (default: 0.74, and the first crop is all)")
    p.add_argument("--n", type=int, default=4, help="samples of each crop (%(default)s)")
    p.add_argument("--limit", type=int, help="at most so many images of each set")
    p.add_argument("--batch", type=int, default=8, help="samples at once (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of crops, samples and fit (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    p.error = complaint("fit_tree.py")
    a = p.parse_args(argv)
    try:
        if min(a.crops, a.n, a.batch, a.limit or 1) < 1 or a.limit == 0 or a.seed < 0:
            raise ValueError("--crops, --n, --batch and --limit must be 1 or more, --seed 0 or more")
        if a.crop is not None and not 0.01 <= a.crop <= 1:
            raise ValueError(f"--crop must be from 0.01 to 1, not {a.crop}")
        ckpt = a.ckpt or newest_checkpoint()
        a.out = a.out or Path(ckpt).with_name("tree.npz")
        if Path(a.out).exists():
            raise ValueError(f"{a.out} exists and is not overwritten: choose another --out, or remove it")
        device = pick_device(a.device)
        torch.set_num_threads(host_threads(device) or torch.get_num_threads())
        model = load_checkpoint(ckpt, device)
        if not model.codec.has_bits:
            raise ValueError(f"trees are fitted to samples of the encoding bits, not {model.codec.encoding}")
        sets = parse_parts(a.dataset)
        first = len(sets)  # of --objects
        sets += parse_parts(a.objects) if a.objects else []
        if "shapes" in (name for name, _, _ in sets):
            raise ValueError("shapes have no files: name data sets of images, see train.py")
        for k, (name, weight, own) in enumerate(sets):
            own["unlabelled"] = "ignore" if k >= first else own["unlabelled"] or a.unlabelled
            own = as_trained(model.config, name, {key: value or None for key, value in own.items()})
            items = [item for item in originals(name, "train", a.root, own["void"]) if item.read]
            if not items:
                raise ValueError(f"{name} has no image with labels")
            items = [items[i] for i in selection(items, a.limit or len(items))]
            sets[k] = items, weight, own | dict(objects=k >= first)
        part = Path(f"{a.out}.part")
        make_folder(part.parent)
        try:
            open(part, "wb").close()  # before what may take an hour
        except OSError as e:
            raise ValueError(f"{part}: {e.strerror.lower()}; choose another --out") from None
        try:
            net = fit_sets(model, sets, a)
            with open(part, "wb") as f:
                np.savez(f, **net)
            part.replace(a.out)
        finally:
            part.unlink(missing_ok=True)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: kernels that cannot be had
        print(f"fit_tree.py: {e}", file=sys.stderr)
        return 2
    print(f"wrote {a.out}")
    return 0


def fit_sets(model, sets, a):
    """Draw, grow, fit, grow again by what was learnt, fit again: {name: array}."""
    jobs, drawn = [], []
    whole = sum(weight for _, weight, _ in sets)
    for s, (items, weight, settings) in enumerate(sets):
        for image, maps in crops(items, math.ceil(a.crops * weight / whole), settings, (a.seed, s), a.crop):
            job = prepare(image, model, seed=a.seed + len(jobs) * 1000, tiles=1)
            jobs.append(job)
            seen = partial(evidence_of, job, model.codec)
            drawn.append(Crop(s, subsample(maps, *job.size).numpy(), seen, a.n, settings["objects"]))
    if not any(crop.set == 0 and (crop.maps >= 0).any() for crop in drawn):
        raise ValueError(f"{parse_parts(a.dataset)[0][0]}: nothing to learn from, as no image with labelled "
                         f"pixels can be read (trees are cut by the first set's maps)")
    for _ in tqdm(denoise(jobs, model, a.n, a.batch), "sampling", len(jobs), leave=False):
        pass
    return fit_all(drawn, a.seed)


def fit_hinted(drawn, net, rng, seed):
    """{name: array} of hints, for what joins regions by net: fitted once without corrections, and then with
    those of the answers of the first."""
    return fit_hints(hinted_leaves(drawn, {**net, **fit_hints(hinted_leaves(drawn, net, rng, 1), seed)}, rng),
                     seed)


def fit_all(drawn, seed):
    """What `fit_sets` fits to what was drawn: see `region_pairs` and `hinted_leaves`."""
    rng, every = np.random.default_rng(seed), drawn
    drawn = [crop for crop in every if not crop.objects]
    first = region_pairs(drawn[::2], None, rng, 0.12)
    second = region_pairs(drawn, fit(*first, seed), rng, 0.2)
    net = fit(*(np.concatenate(v) for v in zip(first, second)), seed)
    hints = fit_hinted(every, net, rng, seed)
    # grains are those of the first set's people, as the odds are
    net["offset"] = fit_offset([crop for crop in drawn if crop.set == 0][-CROPS:], net)
    return {**net, **hints, "confidence": fit_confidence(drawn[::2], net)}


if __name__ == "__main__":
    sys.exit(main())
