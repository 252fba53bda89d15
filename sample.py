"""Segment images: python sample.py --n 8 photo.jpg

    python sample.py --n 8 photo.jpg                          # 8 plausible segmentations of one image
    python sample.py --n 4 --out masks photos/ a.png          # a folder and a file
    python sample.py --ckpt out/coco-paper/ckpt.pt --steps 8 --guidance 1 photo.jpg

For each image, in --out: <stem>_00.png ... (label maps, one id a pixel, at the image's own size), <stem>_00_overlay.png
... and <stem>_panel.png (image, samples, and where the samples disagree). As a function, from Python:

    from sample import load_checkpoint, segment
    model = load_checkpoint("out/shapes-tiny/ckpt.pt")
    x_hat, sizes = segment([Image.open("photo.jpg")], model, n=8)          # soft bits; own_size(...) gives label maps
"""

import argparse
import colorsys
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment

from bits import Codec
from checkpoint import newest
from data import IMAGE_TYPES, normalise, read_image, resize_image
from diffusion import Diffusion, sample
from metrics import contingency, iou_matrix
from model import UNet


@dataclass
class Model:
    """A network with all that is needed to sample from it."""

    net: torch.nn.Module
    codec: Codec
    diffusion: Diffusion
    image_size: int
    sampling: dict                               # steps, guidance, sampler, variance: the defaults for this network
    dataset: str
    step: int


def read_checkpoint(path, device="cpu"):
    """The dictionary in a checkpoint file, or in the one before it where it is damaged. Raises ValueError naming the file."""
    content, used, problem = newest(path, device)
    if content is None:
        raise ValueError(f"{path}: no such file; train one with: python train.py")
    if problem:
        print(f"{problem}; using the one before, {used}", file=sys.stderr)
    return content


def load_checkpoint(path, device="cpu"):
    """The EMA network of a checkpoint, ready to sample from."""
    c = read_checkpoint(path, device)
    net = UNet(**c["network"])
    try:
        net.load_state_dict(c["ema"])
    except RuntimeError as e:
        raise ValueError(f"{path}: its weights do not fit its network ({str(e).splitlines()[-1].strip()})") from None
    net = net.to(device).eval().requires_grad_(False)
    return Model(net, Codec(**c["codec"]), Diffusion(**c["diffusion"]), c["image_size"], c["sampling"], c["dataset"],
                 c["step"])


def newest_checkpoint(root="out"):
    """The checkpoint under root that was written last. Raises ValueError when there is none."""
    found = sorted(Path(root).glob("**/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint under {root}/: train one first (python train.py, about 5 minutes on a laptop), "
                         f"or name one with --ckpt")
    return found[-1]


# ---------------------------------------------------------------------------------------------------------------------
# From images to soft bits to label maps


def segment(images, model, n=8, seed=0, batch=32, **sampling):
    """n samples for each of a list of PIL images.

    -> x_hat (len(images), n, C, S, S) in [-1, 1] on the CPU and sizes, a list of (h, w): the valid part of S x S. Sample j
    of every image has the seed `seed` + j. sampling: steps, guidance, sampler, variance (default: the checkpoint's).
    """
    device = next(model.net.parameters()).device
    small, sizes = zip(*(resize_image(image, model.image_size) for image in images))
    x, inside = normalise(torch.from_numpy(np.stack(small)).to(device), torch.tensor(sizes, device=device))
    which = [(i, j) for i in range(len(images)) for j in range(n)]
    parts = []
    for start in range(0, len(which), batch):
        some = which[start : start + batch]
        i = [a for a, _ in some]
        parts.append(sample(model.net, x[i], inside[i], model.codec.channels, [seed + j for _, j in some], model.diffusion,
                            model.codec.activate, **{**model.sampling, **sampling}).cpu())
    return torch.cat(parts).unflatten(0, (len(images), n)), list(sizes)


def own_size(x_hat, size, width, height, codec):
    """Label map (height, width) int64 of one image: x_hat (C, S, S) cut to size (h, w), upsampled and decoded.

    Soft bits are interpolated bilinearly, then thresholded, in strips: a 10,000 x 10,000 image needs no 10,000 x 10,000
    x C tensor. (rgb, which clusters, is decoded first.)
    """
    h, w = size
    x = x_hat[None, :, :h, :w]                                                     # (1, C, h, w)
    if codec.encoding == "rgb":
        return F.interpolate(codec.decode(x)[None].float(), (height, width), mode="nearest")[0, 0].long()
    x = F.interpolate(x, (h, width), mode="bilinear", align_corners=False)
    row = ((torch.arange(height) + 0.5) * h / height - 0.5).clamp(0, h - 1)        # as interpolate does
    low = row.floor().long()
    out = torch.empty(height, width, dtype=torch.int64)
    strip = max(1, 4_000_000 // width)
    for s in range(0, height, strip):
        a, b = low[s : s + strip], (low[s : s + strip] + 1).clamp(max=h - 1)
        out[s : s + strip] = codec.decode(x[:, :, a].lerp(x[:, :, b], (row[s : s + strip] - a).view(-1, 1)))[0]
    return out


def disagreement(cells):
    """Share of the pairs of samples that put a pixel into different segments, after matching segments by overlap.

    cells (n, h, w) -> (h, w) float in [0, 1]. Only the partition counts, not the numbers of the segments.
    """
    n, (h, w) = len(cells), cells.shape[1:]
    differ, pairs = torch.zeros(h * w), 0
    for a in range(n):
        for b in range(a + 1, n):
            ids_a, p = cells[a].reshape(-1).unique(return_inverse=True)
            ids_b, q = cells[b].reshape(-1).unique(return_inverse=True)
            overlap = contingency(p.view(1, h, w), q.view(1, h, w))
            rows, cols = linear_sum_assignment(iou_matrix(overlap)[0].numpy(), maximize=True)
            partner = torch.full((len(ids_a),), -1)
            partner[torch.from_numpy(rows)] = torch.from_numpy(cols)
            differ += partner[p] != q
            pairs += 1
    return (differ / max(1, pairs)).view(h, w)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def colours(side):
    """One colour for each cell of the palette, neighbours far apart in hue or lightness: (side^2, 3) uint8."""
    table = []
    for row in range(side):
        for col in range(side):
            hue, level = (0.7549 * row + 0.5698 * col) % 1, (row + 2 * col) % 3
            table.append(colorsys.hls_to_rgb(hue, (0.42, 0.56, 0.70)[level], (0.85, 0.7, 0.8)[level]))
    return (np.array(table) * 255).astype(np.uint8)


def overlay(image, cells, side, opacity=0.55):
    """Coloured segments with thin dark outlines over an image: (H, W, 3) uint8, (H, W) cells; -1 stays plain."""
    image, cells = np.asarray(image), np.asarray(cells)
    colour = colours(side)[cells % side**2]
    out = np.where((cells >= 0)[..., None], image * (1 - opacity) + colour * opacity, image)
    edge = np.zeros(cells.shape, bool)
    edge[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    edge[1:] |= cells[1:] != cells[:-1]
    out[edge] *= 0.25
    return out.round().astype(np.uint8)


def heat(share):
    """(H, W) in [0, 1] -> black, red, yellow, white (H, W, 3) uint8."""
    share = np.asarray(share, np.float32)[..., None]
    return ((share * 3 - np.array([0, 1, 2])).clip(0, 1) * 255).astype(np.uint8)


def grid(tiles, columns, gap=4):
    """Tiles (each (h, w, 3) uint8, all of one size) as one picture, row by row."""
    rows = -(-len(tiles) // columns)
    h, w = tiles[0].shape[:2]
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = tile
    return sheet


def side_of(codec):
    """Side of the colour grid for a codec's cells."""
    return int(np.ceil(codec.classes**0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def write_outputs(path, image, x_hat, size, codec, out):
    """The files for one image; returns the panel's path and the mean number of segments."""
    n, side, (h, w) = len(x_hat), side_of(codec), size
    panel_size = min(1.0, 320 / max(image.size))
    small = image.resize([max(1, round(v * panel_size)) for v in image.size])
    tiles, counts = [np.asarray(small)], []
    for j in range(n):
        cells = own_size(x_hat[j], size, *image.size, codec).numpy()
        kind = np.uint8 if codec.classes < 256 else np.uint16
        Image.fromarray((cells + 1).astype(kind)).save(out / f"{path.stem}_{j:02d}.png")     # 0 is never used
        Image.fromarray(overlay(image, cells, side)).save(out / f"{path.stem}_{j:02d}_overlay.png")
        tiles.append(overlay(small, own_size(x_hat[j], size, *small.size, codec), side))
        counts.append(len(np.unique(cells)))
    if n > 1:
        apart = disagreement(torch.stack([codec.decode(x[None, :, :h, :w])[0] for x in x_hat]))
        tiles.append(heat(F.interpolate(apart[None, None], small.size[::-1], mode="bilinear")[0, 0]))
    panel = out / f"{path.stem}_panel.png"
    Image.fromarray(grid(tiles, columns=min(len(tiles), 5))).save(panel)
    return panel, sum(counts) / n


def find_images(names):
    """Files and folders as a list of image files. Raises ValueError for what is not there."""
    files = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(p for p in name.iterdir() if p.suffix.lower() in IMAGE_TYPES)
            if not inside:
                raise ValueError(f"{name}: no images in this folder")
            files += inside
        else:
            files.append(name)
    return files


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device. Raises ValueError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device '{name}' is not usable here ({str(e).splitlines()[0][:80]}): try --device cpu") from None


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="+", help="image files or folders")
    p.add_argument("--n", type=int, default=8, help="samples for each image")
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/)")
    p.add_argument("--out", default="samples", help="where the pictures go")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--guidance", type=float, help="guidance weight, 0 = none (default: the checkpoint's)")
    p.add_argument("--sampler", choices=["ddpm", "ddim"], help="(default: the checkpoint's)")
    p.add_argument("--seed", type=int, default=0, help="sample j of every image has the seed SEED + j")
    p.add_argument("--batch", type=int, default=32, help="samples denoised at once: less needs less memory")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    a = p.parse_args(argv)
    try:
        for name in ("n", "steps", "batch"):
            if (getattr(a, name) or 1) < 1 or getattr(a, name) == 0:
                raise ValueError(f"--{name} must be at least 1, not {getattr(a, name)}")
        files = find_images(a.images)
        device = pick_device(a.device)
        ckpt = Path(a.ckpt) if a.ckpt else newest_checkpoint()
        model = load_checkpoint(ckpt, device)
        out = Path(a.out)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2

    chosen = {k: v for k in ("steps", "guidance", "sampler") if (v := getattr(a, k)) is not None}
    settings = " ".join(f"{k} {v}" for k, v in {**model.sampling, **chosen}.items())
    print(f"{ckpt}: trained on {model.dataset}, step {model.step}, {model.image_size} pixels; {settings}; on {device}")
    stems, failed = {}, 0
    for path in files:
        start = time.time()
        try:
            image = read_image(path)
            if stems.setdefault(path.stem, path) != path:
                raise ValueError(f"{path}: has the same stem as {stems[path.stem]}, whose results would be overwritten; "
                                 f"run it with another --out")
            x_hat, sizes = segment([image], model, a.n, a.seed, a.batch, **chosen)
            panel, count = write_outputs(path, image, x_hat[0], sizes[0], model.codec, out)
            print(f"{path} -> {panel} ({a.n} samples, {count:.1f} segments on average, {time.time() - start:.1f} s)")
        except (ValueError, OSError) as e:
            print(f"sample.py: {e}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
