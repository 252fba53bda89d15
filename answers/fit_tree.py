"""Learn from people's segmentations which regions belong together: the small network behind the odds of
tree.py.

    # 800 crops: a quarter of an hour
    python -m answers.fit_tree --ckpt weights/photo.pt --dataset PATH --out tree.npz
    python -m answers.fit_tree --ckpt weights/photo.pt --dataset photos:3,streets:1:ignore --out tree.npz

Samples of the checkpoint for random crops of the training images become trees, with and without simulated
clicks: once by a plain measure, once by a first network's odds. For every two regions that touch on the way,
the target is the share of pairs of pixels, one in each, that the annotators put together. No set has more
than a third of the weight. Sets differ in how finely people cut; the network is told which set it sees, and
in the end it answers as for the first. Sets must be labelled everywhere, or else say `ignore`. To use the
file: tree.LEARNT.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

import metrics
from answers import tree
from answers.scoring import own_maps
from answers.segment import denoise, load_checkpoint, newest_checkpoint, prepare
from data import originals, parse_parts
from engine import pick_device
from frame import fitted, subsample
from sources.formats import read_image

WIDTH, DROPOUT, STEPS, BATCH, LR = 48, 0.1, 3000, 2048, 5e-3  # of the small network and its training
MOST = 1 / 3  # of the weight, for any one set


def crops(items, count, size, own, seed):
    """(PIL image, all annotators' maps (m, h, w) at the network's size) of `count` random crops of a set's
    items, half of them mirrored; the first of each image is all of it. own: dict(unlabelled, components)."""
    order = np.random.default_rng(seed).permutation(len(items))
    for c in range(count):
        item, r = items[order[c % len(items)]], np.random.default_rng([*seed, c])
        image, maps = read_image(item.image), own_maps(item, own["unlabelled"], own["components"])
        share, stretch = (np.sqrt(r.uniform(0.55, 1)),
                          np.exp(r.uniform(-0.08, 0.08))) if c >= len(items) else (1, 1)
        w, h = (max(1, min(side, int(side * share * f))) for side,
                f in zip(image.size, (stretch, 1 / stretch)))
        x, y = r.integers(image.width - w + 1), r.integers(image.height - h + 1)
        part, labels = image.crop((x, y, x + w, y + h)), maps[:, y : y + h, x : x + w]
        if r.random() < 0.5:
            part, labels = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels.flip(2)
        yield part, subsample(labels, *fitted(w, h, size)[::-1])


def clicks(labels, count, rng):
    """A hint map (h, w): clicks into up to `count` segments of labels (h, w), -1 = unlabelled, the largest
    first, each at the pixel farthest from its border, or (one in three) anywhere in it."""
    hints = np.zeros(labels.shape, int)
    ids, area = np.unique(labels[labels >= 0], return_counts=True)
    for number, label in enumerate(ids[np.argsort(-area, kind="stable")][:count], 1):
        depth = distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        anywhere = np.flatnonzero(labels.ravel() == label)
        at = rng.choice(anywhere) if rng.random() < 1 / 3 else depth.argmax()
        hints.flat[at] = number
    return hints


def region_pairs(drawn, net, rng, share):
    """Pairs of regions met while trees grow, (m, 54) features, (m,) targets and (m,) number of the set.

    drawn: [(set, image, maps, soft, cells, codes)]; share: of the pairs that are kept, at random.
    """
    pairs, targets, of = [], [], []
    for number, image, maps, soft, cells, codes in drawn:
        some = rng.permutation(len(soft))[: rng.choice([1, 2, len(soft)])]
        evidence = tree.gather(image, soft[some], cells[some], codes)
        hints, closed = None, False
        if rng.random() < 0.5:  # one annotator clicks
            maps = maps[rng.integers(len(maps))][None]
            closed = rng.random() < 0.5
            hints = clicks(maps[0], rng.choice([1, 2, 4, 8, 16, 10**6]), rng)
        known = [v >= 0 for v in maps]
        ids = [np.unique(v[k], return_inverse=True) if k.any() else None for v, k in zip(maps, known)]

        def watch(region, features, claimed, i, j):
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
            use = (counted > 0) & (claimed < 2) & (rng.random(len(i)) < share)
            pairs.append(np.concatenate([features, (claimed == 1)[:, None]], axis=1)[use].astype(np.float32))
            targets.append((together[use] / counted[use]).astype(np.float32))
            of.append(np.full(use.sum(), number))

        tree.grow(evidence, net, hints, closed, watch=watch)
    if not sum(map(len, of)):
        raise ValueError("no two labelled regions touch in any image: there is nothing to learn from")
    return np.concatenate(pairs), np.concatenate(targets), np.concatenate(of)


def weights(pairs, of):
    """(m,): larger regions count more, and no set for more than MOST of all, as far as there are enough
    sets."""
    weight = np.exp(0.5 * pairs[:, 52])  # the root of the smaller one's share of the map
    total = np.bincount(of, weight)
    share = total / total.sum()
    for _ in range(50):
        share = np.minimum(share, max(MOST, 1 / np.count_nonzero(total)))
        share = share / share.sum()
    return weight * (share / total.clip(1e-9))[of]


def fit(pairs, targets, of, seed):
    """-> {name: array}: what tree.log_odds computes with."""
    torch.manual_seed(seed)
    sets = int(of.max()) + 1
    which = F.one_hot(torch.from_numpy(of), sets).float()
    x, y, weight = torch.from_numpy(pairs), torch.from_numpy(targets), torch.from_numpy(weights(pairs, of))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = torch.cat([((x - mean) / scale).clamp(-6, 6), which], dim=1)
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], WIDTH), torch.nn.SiLU(), torch.nn.Dropout(DROPOUT),
                              torch.nn.Linear(WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Dropout(DROPOUT),
                              torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    chance = weight.cumsum(0)
    for step in range(STEPS):
        some = torch.searchsorted(chance,
                                  torch.rand(BATCH, dtype=torch.float64) * chance[-1]).clamp(max=len(x) - 1)
        loss = F.binary_cross_entropy_with_logits(net(x[some])[:, 0], y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        each = F.binary_cross_entropy_with_logits(net.eval()(x)[:, 0], y, reduction="none")
    print(f"{len(x)} pairs, {float(y.mean()):.3f} of them together; cross entropy "
          f"{float((each * weight).sum() / weight.sum()):.4f}")
    w1, b1 = net[0].weight[:, : -sets], net[0].bias + net[0].weight[:, -sets]  # as for the first set
    result = dict(mean=mean, scale=scale, w1=w1, b1=b1, w2=net[3].weight, b2=net[3].bias, w3=net[6].weight,
                  b3=net[6].bias)
    return {name: v.detach().numpy().astype(np.float32) for name, v in result.items()}


def fit_confidence(drawn, net):
    """How `tree.confidence` weighs what it sees: (4,), by logistic regression on the share of annotators who
    have a segment with IoU above one half, of the maps at every grain."""
    seen, hits = [], []
    for _, image, maps, soft, cells, codes in drawn:
        evidence = tree.gather(image, soft, cells, codes)
        grown = tree.grow(evidence, net)
        for grain in tree.GRAINS:
            labels = grown.cut(grain)
            inside, outside, share = tree.sureness(evidence, grown, labels, net)
            table = metrics.contingency(torch.from_numpy(labels).long().expand(len(maps), -1, -1),
                                        torch.from_numpy(maps))
            hits.append((metrics.iou_matrix(table).amax(2) > 0.5).double().mean(0)[: len(share)])
            seen.append(torch.from_numpy(tree.confidence_features(inside, outside, share).T))
    x, y = torch.cat(seen), torch.cat(hits)
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(weight[0] + x @ weight[1:], y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().numpy()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", required=True, help="a data set or several, see train.py; their training "
                                                    "images are used")
    p.add_argument("--root", default="data", help="where named data sets lie")
    p.add_argument("--unlabelled", default="segment", choices=("segment", "ignore"),
                   help="id 0, where a set does not say :ignore")
    p.add_argument("--ckpt", help="default: the newest under out/, else the weights in the box")
    p.add_argument("--out", default="tree.npz", help="the file to write")
    p.add_argument("--crops", type=int, default=800, help="of all images; the first of each is all of it")
    p.add_argument("--n", type=int, default=4, help="samples of each crop")
    p.add_argument("--limit", type=int, help="at most so many images of each set")
    p.add_argument("--batch", type=int, default=8, help="samples at once")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    a = p.parse_args(argv)
    try:
        if min(a.crops, a.n, a.batch) < 1 or a.seed < 0:
            raise ValueError("--crops, --n and --batch must be 1 or more, --seed 0 or more")
        if Path(a.out).exists():
            raise ValueError(f"{a.out} exists and is not overwritten: choose another --out, or remove it")
        model = load_checkpoint(a.ckpt or newest_checkpoint(), pick_device(a.device))
        if not model.codec.has_bits:
            raise ValueError(f"trees are fitted to samples of the encoding bits, not {model.codec.encoding}")
        sets = parse_parts(a.dataset)
        if "shapes" in (name for name, _, _ in sets):
            raise ValueError("shapes have no files: name data sets of images, see train.py")
        sets = [(originals(name, "train", a.root, own["void"])[: a.limit], weight,
                 {**own, "unlabelled": own["unlabelled"] or a.unlabelled})
                for name, weight, own in sets]
        net, part = fit_sets(model, sets, a), Path(f"{a.out}.part")
        with open(part, "wb") as f:
            np.savez(f, **net)
        part.replace(a.out)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: kernels that cannot be had
        print(f"fit_tree.py: {e}", file=sys.stderr)
        return 2
    print(f"wrote {a.out}")
    return 0


def fit_sets(model, sets, a):
    """Draw, grow, fit, grow again by what was learnt, fit again: {name: array}."""
    jobs, truth = [], []
    whole = sum(weight for _, weight, _ in sets)
    for s, (items, weight, own) in enumerate(sets):
        for image, maps in crops(items, math.ceil(a.crops * weight / whole), model.image_size, own,
                                 (a.seed, s)):
            jobs.append(prepare(image, model, seed=a.seed + len(jobs) * 1000))
            truth.append((s, maps.numpy()))
    drawn = []
    for job in tqdm(denoise(jobs, model, a.n, a.batch), "sampling", len(jobs), leave=False):
        x = torch.stack(job.x_hat).clamp(-1, 1)
        s, maps = truth[len(drawn)]
        drawn.append((s, job.photo, maps, x.permute(0, 2, 3, 1).numpy(),
                      model.codec.decode(x).numpy(), model.codec.classes))
    return fit_all(drawn, a.seed)


def fit_all(drawn, seed):
    """What `fit_sets` fits to what was drawn: see `region_pairs`."""
    rng = np.random.default_rng(seed)
    first = region_pairs(drawn[::2], None, rng, 0.12)
    second = region_pairs(drawn, fit(*first, seed), rng, 0.2)
    net = fit(*(np.concatenate(v) for v in zip(first, second)), seed)
    return {**net, "confidence": fit_confidence(drawn[::2], net)}


if __name__ == "__main__":
    sys.exit(main())
