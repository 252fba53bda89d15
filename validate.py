"""Validation during training: scores by real sampling, and a picture.

What it is: `validate`, which any number of processes share, and `save_picture`. What it is not: the evaluation of a finished network, with
intervals, sweeps and several samples an image, is eval.py.
"""

import torch
import torch.distributed as dist
from PIL import Image

from bits import Codec
from data import normalise
from diffusion import fused, sample
from metrics import scores
from pictures import grid, overlay, side_of
from tidy import tidy


class Stopped(Exception):
    pass


@torch.no_grad()
def validate(net, data, fine, codec, diffusion, c, device, autocast, stop, rank, world):
    """Mean ARI and IoU over images and annotators, one sample an image, and a picture of the first 8; None if stopped.

    fine: the same data set at the resolution of the images that the network sees, `net.detail` times the label maps'.
    """
    n, totals, tiles, side = min(c.eval_images, len(data)), [], [], side_of(codec)
    size = min(32, c.batch_size) if device.type == "cpu" else 32                   # small: a signal is looked at in between

    def cells_of(x, inside, seeds, images, sizes):
        def look(*_):
            if stop:
                raise Stopped

        with autocast():
            x_hat = sample(net, x, inside, codec.channels, seeds, diffusion, codec.activate, c.steps, c.guidance, c.sampler,
                           c.variance, c.smooth, callback=look, fused=fused(codec, device))
        for i, (h, w) in enumerate(sizes.tolist() if c.least or c.merge else ()):
            x_hat[i : i + 1, :, :h, :w] = tidy(x_hat[i : i + 1, :, :h, :w], codec, images[i, :h, :w], c.least, c.merge)
        return codec.decode(x_hat, inside).cpu()

    try:
        for start in range(size * rank, n, size * world):
            at = list(range(start, min(start + size, n)))
            images, labels, sizes = data.get(at)
            sharp = images if net.detail == 1 else fine.get(at)[0]
            x, inside = normalise(sharp.to(device), sizes.to(device), net.detail)
            cells = cells_of(x, inside, at, images, sizes)
            for i, one in zip(at, cells):
                maps = data.maps(i)
                s = scores(one.expand(len(maps), -1, -1), maps)
                totals.append([float(s["ari"].nanmean()), float(s["iou"].nanmean())])
            m = min(8 - len(tiles), len(at)) if rank == 0 else 0
            if m > 0:
                truth = (Codec(bits=codec.bits) if codec.palette == "none" else codec).cells(labels[:m])
                more = [cells_of(x[:m], inside[:m], [1000 * j + i for i in at[:m]], images, sizes[:m]) for j in (1, 2)]
                for image, true, *three in zip(images[:m], truth, cells, *more):
                    tiles.append([image.numpy(), *(overlay(image, v, side, 0.8) for v in (true, *three))])
    except Stopped:
        pass
    scored = torch.tensor(totals, dtype=torch.float64).reshape(-1, 2)
    sums = torch.cat([scored.nansum(0), (~scored.isnan()).sum(0), torch.tensor([len(stop)])]).double()
    if world > 1:
        dist.all_reduce(sums)
    if sums[4]:
        return None
    ari, iou = (sums[:2] / sums[2:4]).tolist()
    if rank > 0:
        return ari, iou, None
    scale = max(1, 128 // c.image_size)
    sheet = grid([tile.repeat(scale, 0).repeat(scale, 1) for row in tiles for tile in row], columns=2 * len(tiles[0]))
    return ari, iou, Image.fromarray(sheet)


def save_picture(picture, path):
    """Write it, or raise OSError and leave no half of it."""
    try:
        picture.save(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
