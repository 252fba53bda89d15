"""Validation during training: scores by real sampling, and a picture.

What it is: `validate`, which any number of processes share, and `save_picture`. What it is not: the evaluation of a finished network, with
intervals, sweeps and several samples an image, is eval.py.
"""

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from bits import Codec
from metrics import scores
from pictures import grid, overlay, side_of
from segment import Job, Model, denoise, placed, sample_map


class Stopped(Exception):
    pass


def validate(net, data, fine, codec, diffusion, c, stop, rank, world):
    """Mean ARI and IoU over images and annotators, one sample an image, and a picture of the first 8; None if stopped.

    fine: the same data set at the resolution of the images that the network sees, `net.detail` times the label maps'.
    """
    n, totals, tiles, side = min(c.eval_images, len(data)), [], [], side_of(codec)
    device = next(net.parameters()).device
    sampling = dict(steps=c.steps, guidance=c.guidance, sampler=c.sampler, variance=c.variance, smooth=c.smooth)
    model = Model(net, codec, diffusion, c.image_size, sampling, c.dataset, 0, dict(least=c.least, merge=c.merge))
    size = min(32, c.batch_size) if device.type == "cpu" else 32  # small: a signal is looked at in between

    def look(*_):
        if stop:
            raise Stopped

    def maps_of(at, seeds):
        """One sample's map (h, w) of each image."""
        images, _, sizes = data.get(at)
        sharp = images if net.detail == 1 else fine.get(at)[0]
        jobs = [Job(image.numpy(), big.numpy(), tuple(hw), [], seed=seed)
                for image, big, hw, seed in zip(images, sharp, sizes.tolist(), seeds)]
        return [sample_map(job.x_hat[0], job.image[: job.size[0], : job.size[1]], model)
                for job in denoise(jobs, model, 1, size, callback=look)]

    try:
        for start in range(size * rank, n, size * world):
            at = list(range(start, min(start + size, n)))
            images, labels, sizes = data.get(at)
            found = maps_of(at, at)
            for i, one in zip(at, found):
                maps = data.maps(i)[:, : one.shape[0], : one.shape[1]]
                s = scores(torch.from_numpy(one).long().expand(len(maps), -1, -1), maps)
                totals.append([float(s["ari"].nanmean()), float(s["iou"].nanmean())])
            m = min(8 - len(tiles), len(at)) if rank == 0 else 0
            if m > 0:
                truth = (Codec(bits=codec.bits) if codec.palette == "none" else codec).cells(labels[:m])
                more = [maps_of(at[:m], [1000 * j + i for i in at[:m]]) for j in (1, 2)]
                for image, true, *three in zip(images[:m], truth, found, *more):
                    if c.merge:
                        three = [placed(one[None], side)[0][0] for one in three]
                    padded = [np.pad(one, [(0, c.image_size - n) for n in one.shape], constant_values=-1) for one in three]
                    tiles.append([image.numpy(), *(overlay(image, v, side, 0.8) for v in (true, *padded))])
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
