"""How good is a checkpoint? One command, a table, and one JSON line last.

    python eval.py --dataset path/to/folder --split val                           # the newest checkpoint under out/
    python eval.py --ckpt out/shapes-tiny/ckpt.pt --dataset shapes --limit 256
    python eval.py --baseline grid --dataset path/to/folder --size 128            # what needs no training

One sample an image, at the network's resolution. With several annotators, every score is the mean over them.
Baselines: grid (3 x 3 rectangles), kmeans (colour in Lab and position, 8 clusters), human (each annotator in turn against
the others).
"""

import argparse
import json
import sys

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

from data import load, normalise
from metrics import scores
from sample import load_checkpoint, newest_checkpoint, pick_device
from diffusion import sample


def regular_grid(h, w, side=3):
    """side x side rectangles: (h, w) int64."""
    return torch.arange(h)[:, None] * side // h * side + torch.arange(w) * side // w


def lab(rgb):
    """sRGB in 0..1, (..., 3) -> CIE L*a*b*, D65."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])   # / white
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def kmeans(image, k=8, position=60.0):
    """k-means on Lab and position (the longer side counts as `position` Lab units): (h, w, 3) uint8 -> (h, w) int64."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w] * (position / max(h, w))
    features = np.concatenate([lab(image / 255), y[..., None], x[..., None]], axis=-1).reshape(h * w, 5)
    return torch.from_numpy(kmeans2(features, k, minit="++", seed=0)[1].reshape(h, w)).long()


def predict(baseline, model, images, sizes, seeds, device):
    """One label map an image: (B, S, S) int64."""
    if baseline:
        out = torch.zeros(images.shape[:3], dtype=torch.int64)
        for one, image, (h, w) in zip(out, images, sizes.tolist()):
            one[:h, :w] = regular_grid(h, w) if baseline == "grid" else kmeans(image[:h, :w].numpy())
        return out
    x, inside = normalise(images.to(device), sizes.to(device))
    x_hat = sample(model.net, x, inside, model.codec.channels, seeds, model.diffusion, model.codec.activate, **model.sampling)
    return model.codec.decode(x_hat, inside).cpu()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/)")
    p.add_argument("--baseline", choices=["grid", "kmeans", "human"], help="instead of a checkpoint")
    p.add_argument("--dataset", default="shapes", help="shapes, coco, or a folder")
    p.add_argument("--split", default="val")
    p.add_argument("--size", type=int, default=128, help="longer side for a baseline; a network has its own")
    p.add_argument("--limit", type=int, default=256, help="at most so many images")
    p.add_argument("--root", default="data")
    p.add_argument("--cache", default="cache")
    p.add_argument("--seed", type=int, default=0, help="image i is sampled with the seed SEED + i")
    p.add_argument("--steps", type=int)
    p.add_argument("--guidance", type=float)
    p.add_argument("--sampler", choices=["ddpm", "ddim"])
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--device", default="auto")
    a = p.parse_args(argv)
    try:
        device = pick_device(a.device)
        path = None if a.baseline else a.ckpt or newest_checkpoint()
        model = None if a.baseline else load_checkpoint(path, device)
        data = load(a.dataset, a.split, model.image_size if model else a.size, a.root, a.cache)
    except (ValueError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    if model:
        model.sampling.update({k: v for k in ("steps", "guidance", "sampler") if (v := getattr(a, k)) is not None})

    rows = []                                                                      # (ari, iou, hiou) of each image
    count = min(a.limit, len(data))
    for start in tqdm(range(0, count, a.batch), leave=False):
        at = list(range(start, min(start + a.batch, count)))
        images, _, sizes = data.get(at)
        if a.baseline != "human":
            predicted = predict(a.baseline, model, images, sizes, [a.seed + i for i in at], device)
        for row, i in enumerate(at):
            maps = data.maps(i)
            if a.baseline == "human":
                first, second = (~torch.eye(len(maps), dtype=torch.bool)).nonzero(as_tuple=True)
                pred, true = maps[first], maps[second]
            else:
                pred, true = predicted[row].expand(len(maps), -1, -1), maps
            if len(true):                                                          # one annotator alone has no others
                rows.append([float(v.nanmean()) for v in scores(pred, true).values()])
    mean = torch.tensor(rows, dtype=torch.float64).nanmean(0).tolist() if rows else [float("nan")] * 3
    name = a.baseline or str(path)
    print(f"{name} on {a.dataset} {a.split}, {len(rows)} images, {data.images.shape[1] if hasattr(data, 'images') else data.size} pixels")
    print(f"ARI {mean[0]:.3f}   IoU {mean[1]:.3f}   hIoU {mean[2]:.3f}")
    print(json.dumps(dict(name=name, dataset=a.dataset, split=a.split, images=len(rows), ari=mean[0], iou=mean[1], hiou=mean[2])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
