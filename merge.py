"""Learn from people's segmentations which segments belong together: the small network that tidy.py merges by.

    python merge.py --ckpt weights/photo.pt --dataset PATH --out merge.npz         # 800 crops: a quarter of an hour on two cores
    python merge.py --ckpt weights/photo.pt --dataset photos:3,streets:1:components:ignore --out merge.npz         # of two sets

Samples of the checkpoint for random crops of the training images, untidied but for specks, are joined in rounds, once by
a plain distance and once by a first network's odds. For every two segments that touch on the way, the target is the share of
pairs of pixels, one in each, that the annotators put together; the loss is its cross entropy. To use it: tidy.LEARNT.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import find, parse_parts
from engine import pick_device
from formats import fitted, read_image
from pictures import subsample
from scoring import own_maps
from segment import denoise, load_checkpoint, newest_checkpoint
from tidy import absorb, join, log_odds, looks, parts, renumber

WIDTH, DROPOUT, STEPS, BATCH, LR = 32, 0.1, 2000, 2048, 1e-2                       # of the small network and its training


def crops(sets, count, size, seed):
    """(PIL image, all annotators' maps (m, h, w) at the network's size) of `count` random crops, half of them mirrored; the
    first of each image is all of it. sets: of (items, weight, dict(unlabelled, components)); each has its weight's share."""
    for s, (items, weight, own) in enumerate(sets):
        order = np.random.default_rng([seed, s]).permutation(len(items))
        for c in range(math.ceil(count * weight / sum(w for _, w, _ in sets))):
            item, r = items[order[c % len(items)]], np.random.default_rng([seed, s, c])
            image, maps = read_image(item.image), own_maps(item, **own)
            share, stretch = (np.sqrt(r.uniform(0.55, 1)), np.exp(r.uniform(-0.08, 0.08))) if c >= len(items) else (1, 1)
            w, h = (max(1, min(side, int(side * share * f))) for side, f in zip(image.size, (stretch, 1 / stretch)))
            x, y = r.integers(image.width - w + 1), r.integers(image.height - h + 1)
            part, labels = image.crop((x, y, x + w, y + h)), maps[:, y : y + h, x : x + w]
            if r.random() < 0.5:
                part, labels = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels.flip(2)
            yield part, subsample(labels, *fitted(w, h, size)[::-1])


def togetherness(region, maps):
    """For each annotator, how each region (H, W) is shared among their segments: list of (n, T), rows of zeros if unlabelled."""
    n, out = region.max() + 1, []
    for labels in maps.numpy():
        valid, T = labels >= 0, int(labels.max()) + 1
        out.append(np.bincount(region[valid] * T + labels[valid], minlength=n * T).reshape(n, T).astype(float))
    return out


def examples(drawn, score, least, rng):
    """Pairs of segments met while joining, (m, 36), and their targets (m,); least: thresholds to choose from, one a sample."""
    pairs, targets = [], []
    for image, maps, samples in drawn:
        look = looks(image)
        for cells, soft in samples:
            region = renumber(parts(cells))
            counts = togetherness(region, maps)

            def watch(seen, home, i, j):
                both, known = np.zeros(len(i)), np.zeros(len(i))
                for count in counts:
                    now = np.zeros((home.max() + 1, count.shape[1]))
                    np.add.at(now, home, count)
                    now /= now.sum(1, keepdims=True).clip(min=1)
                    both += (now[i] * now[j]).sum(1)
                    known += now[i].any(1) & now[j].any(1)
                some = (known > 0) & (rng.random(len(i)) < 0.4)
                pairs.append(seen[some].astype(np.float32))
                targets.append((both[some] / known[some]).astype(np.float32))

            join(region, look, soft, score, rng.choice(least), watch=watch)
    if not pairs:
        raise ValueError("no two segments touch in any sample: there is nothing to learn from")
    return np.concatenate(pairs), np.concatenate(targets)


def fit(pairs, targets, seed):
    """-> {name: array}: what tidy.log_odds computes with."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(pairs), torch.from_numpy(targets)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = ((x - mean) / scale).clamp(-6, 6)
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], WIDTH), torch.nn.SiLU(), torch.nn.Dropout(DROPOUT), torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for step in range(STEPS):
        some = torch.randint(len(x), (BATCH,))
        loss = F.binary_cross_entropy_with_logits(net(x[some])[:, 0], y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = F.binary_cross_entropy_with_logits(net.eval()(x)[:, 0], y)
    print(f"{len(x)} pairs, {float(y.mean()):.3f} of them together; cross entropy {float(loss):.4f}")
    weights = dict(mean=mean, scale=scale, w1=net[0].weight, b1=net[0].bias, w2=net[3].weight, b2=net[3].bias)
    return {name: v.detach().numpy().astype(np.float64) for name, v in weights.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", required=True, help="a data set or several, see train.py; their training images are used")
    p.add_argument("--root", default="data", help="where named data sets lie")
    p.add_argument("--unlabelled", default="segment", choices=("segment", "ignore"), help="id 0, where a set does not say :ignore")
    p.add_argument("--ckpt", help="default: the newest under out/, else the weights in the box")
    p.add_argument("--out", default="merge.npz", help="the file to write")
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
        if model.codec.encoding == "rgb":
            raise ValueError("samples of the encoding rgb are not tidied: there is nothing to fit")
        sets = parse_parts(a.dataset)
        if "shapes" in (name for name, _, _ in sets):
            raise ValueError("shapes have no files: name data sets of images, see train.py")
        sets = [(find(name, "train", a.root, void=own.pop("void"))[1]()[: a.limit], weight,
                 {**own, "unlabelled": own["unlabelled"] or a.unlabelled})
                for name, weight, own in sets]
        net, part = run(model, sets, a), Path(f"{a.out}.part")
        with open(part, "wb") as f:
            np.savez(f, **net)
        part.replace(a.out)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"wrote {a.out}")
    return 0


def run(model, sets, a):
    """Draw, look, fit, look again with what was learnt, fit again: {name: array}."""
    truth, drawn = [], []

    def images():
        for image, maps in crops(sets, a.crops, model.image_size, a.seed):
            truth.append(maps)
            yield image

    for job in tqdm(denoise(images(), model, a.n, a.seed, batch=a.batch, least=0, merge=0.0), "sampling", a.crops, leave=False):
        (h, w), x = job.size, torch.stack(job.x_hat)
        cells, none = model.codec.decode(x).numpy(), np.zeros(job.size, bool)
        cells = [absorb(v, max(2, model.tidy["least"]), none) for v in cells]
        drawn.append((job.image[:h, :w], truth[len(drawn)], list(zip(cells, x.clamp(-1, 1).permute(0, 2, 3, 1).numpy()))))
    rng = np.random.default_rng(a.seed)
    pairs, targets = examples(drawn, lambda pairs: -pairs[:, 0] - pairs[:, 1] / 1.5, (-1.0, -1.3, -1.8), rng)
    first = fit(pairs, targets, a.seed)
    more = examples(drawn, partial(log_odds, net=first), (-0.4, 0.4), rng)
    return fit(*map(np.concatenate, zip((pairs, targets), more)), a.seed)


if __name__ == "__main__":
    sys.exit(main())
