"""The network's frame: images and label maps at its resolution, and back at the photo's own.

What it is: plain functions on images and label maps. What it is not: it opens no files and knows nothing of
networks.

    from frame import enlarge, resize_image
    # PIL image -> (96, 96, 3) uint8, its longer side 96; the rest is padding
    small, (h, w) = resize_image(photo, 96)
    maps = enlarge(labels, photo)  # (N, h, w) -> (N, H, W), along the photo's own edges
"""

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

IGNORE = 65535  # in packed uint16 label maps; -1 everywhere else
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
STRIP = 1_000_000  # numbers at once, when maps are made at an image's size


def fitted(width, height, size):
    """(w, h) with the longer side equal to size, the other rounded up to an even number (a network's last
    stage may see 2 x 2 pixels at once, and half a block confuses it), but not beyond size."""
    return tuple(min(size, 2 * -(-n * size // (2 * max(width, height)))) for n in (width, height))


def resize_image(image, size, fit=None):
    """A PIL image as (S, S, 3) uint8, area-averaged (bilinear, where it grows) to `size` on the longer side
    (or to fit: w, h), top-left; and (h, w)."""
    w, h = fit or fitted(*image.size, size)
    out = np.zeros((size, size, 3), np.uint8)
    out[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BOX if w <= image.width
                                          else Image.Resampling.BILINEAR))
    return out, (h, w)


def resize_label(label, size):
    """(H, W) ids as (S, S) uint16, by nearest; ids renumbered in their order, -1 and padding become
    IGNORE."""
    w, h = fitted(*label.shape[::-1], size)
    small = subsample(label, h, w)
    ids, small_rank = np.unique(small, return_inverse=True)
    if len(ids) >= IGNORE:
        raise ValueError(f"{len(ids)} segments in one label map: at most {IGNORE - 1} are possible")
    out = np.full((size, size), IGNORE, np.uint16)
    out[:h, :w] = np.where(small == -1, IGNORE, small_rank.reshape(h, w))
    return out


def normalise(images, sizes, detail=1):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, ImageNet mean and deviation, 0 outside; and inside (B, S,
    S).

    With detail d: images (B, d S, d S, 3) beside label maps of S x S, whose sizes (B, 2) are -> (B, 3 d^2, S,
    S).
    """
    x = images.permute(0, 3, 1, 2).contiguous().float() / 255
    x, axis = F.pixel_unshuffle(x, detail), torch.arange(images.shape[1] // detail, device=sizes.device)
    inside = (axis[:, None] < sizes[:, 0, None, None]) & (axis < sizes[:, 1, None, None])
    # in place; no tensor made on the host
    for channel, mean, std in zip(x.unflatten(1, (3, -1)).unbind(1), MEAN, STD):
        channel.sub_(mean).div_(std)
    return x.mul_(inside[:, None].float()), inside


def coarser(labels, sizes, detail):
    """Label maps (..., d S, d S) and sizes (..., 2) at the side S: every d-th pixel of both axes."""
    return labels[..., detail // 2 :: detail, detail // 2 :: detail], (sizes + detail // 2) // detail


def connected(label):
    """Classes (H, W) -> segments: the 4-connected parts of each class, numbered from 1. 0 (unlabelled) and -1
    stay."""
    H, W = label.shape
    links = np.zeros((2 * H - 1, 2 * W - 1), bool)  # pixels, and links between equal ones
    links[::2, ::2] = True
    links[::2, 1::2] = label[:, 1:] == label[:, :-1]
    links[1::2, ::2] = label[1:] == label[:-1]
    return np.where(label > 0, scipy.ndimage.label(links)[0][::2, ::2], label)


def outline(labels):
    """(..., H, W) -> bool: pixels that differ from the one to the left or above."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[..., 1:] |= labels[..., 1:] != labels[..., :-1]
    edge[..., 1:, :] |= labels[..., 1:, :] != labels[..., :-1, :]
    return edge


def run_ends(flat):
    """Where runs of one id end, in an array (N,): the places of their last items."""
    return np.append(np.flatnonzero(flat[1:] != flat[:-1]), len(flat) - 1) if len(flat) else np.array([], int)


def subsample(maps, height, width):
    """(..., H, W), an array or a tensor -> (..., height, width), by nearest."""
    (H, W), rows, cols = maps.shape[-2:], np.arange(height), np.arange(width)
    return maps[..., ((2 * rows + 1) * H // (2 * height))[:, None], (2 * cols + 1) * W // (2 * width)]


def shrink(ids, height, width):
    """(H, W) ids -> (height, width): the most frequent id above 0 of the pixels that fall there, 0 where
    there is none."""
    # at least height x width
    rows, cols = (np.arange(max(a, b)) for a, b in zip(ids.shape, (height, width)))
    place = cols * width // len(cols)
    ends = np.searchsorted(rows * height // len(rows), np.arange(height + 1))
    out = np.zeros((height, width), np.int64)
    for y in range(height):  # one row after the other, as they may have millions of pixels
        strip = ids[rows[ends[y] : ends[y + 1]] * ids.shape[0] // len(rows)]
        if not (strip > 0).any():  # as in most rows of a map of clicks
            continue
        strip = strip[:, cols * ids.shape[1] // len(cols)]
        names, rank = np.unique(strip[strip > 0], return_inverse=True)
        at = np.broadcast_to(place, strip.shape)[strip > 0]
        votes, count = np.unique(rank * width + at, return_counts=True)
        votes = votes[np.argsort(count, kind="stable")]
        out[y, votes % width] = names[votes // width]  # the last one stays
    return out


def blurred(image, h, w):
    """A PIL image without the texture that is finer than a map's pixels, of (h, w)."""
    return image.filter(ImageFilter.GaussianBlur(0.2 * max(image.size) / max(w, h)))


def enlarge(labels, image, calm=None):
    """Label maps (N, h, w) -> (N, H, W) at the size of a PIL image. calm: `blurred` of it, where there is
    one.

    By joint bilateral votes (after Kopf et al. 2007): a pixel gets the label that has most weight among the 3
    x 3 nearest pixels of the map; those that are near, and of like colour in the photo, weigh more. The photo
    is blurred a little, for calm borders in texture. Where all 3 x 3 agree, nothing is computed. In strips,
    whose memory is bounded.
    """
    (h, w), (width, height) = labels.shape[1:], image.size
    labels, most = torch.as_tensor(labels), int(labels.max())
    kind = torch.uint8 if most < 255 else torch.int16 if most < 32767 else torch.int32
    row, col = ((torch.arange(a) + 0.5) * b / a - 0.5 for a, b in ((height, h), (width, w)))
    near_row, near_col = row.round().long(), col.round().long()
    # squared distances to three rows, or columns, of the map: (H, 3) and (W, 3)
    down, across = ((at[:, None] - (near[:, None] + torch.arange(-1, 2))) ** 2
                    for at, near in ((row, near_row), (col, near_col)))
    colour = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BOX))).float() / 255  # (h, w, 3)
    calm = calm or blurred(image, h, w)

    def around(maps):  # (N, h, w) -> (N, h w, 9): what each pixel's 3 x 3 hold
        return F.unfold(F.pad(maps[:, None].float(), (1, 1, 1, 1), mode="replicate"), 3).mT.contiguous()

    names, colours = around(labels), around(colour.permute(2, 0, 1)).permute(1, 2, 0).flatten(1)
    same = (names == names[:, :, 4:5]).float()  # as the middle one's
    mixed, small = (same == 0).any(2), labels.to(kind).flatten(1)
    out = torch.empty(len(labels), height, width, dtype=kind)
    strip = max(1, STRIP // (width * 9))
    for top in range(0, height, strip):
        cell = near_row[top : top + strip, None] * w + near_col
        out[:, top : top + strip] = small[:, cell]
        y, x = mixed[:, cell].any(0).nonzero(as_tuple=True)  # the pixels in question, of any map
        if not len(y):
            continue
        pixels = torch.from_numpy(np.array(calm.crop((0, top, width, top + len(cell)))))[y, x].float() / 255
        at = cell[y, x]
        far = (down[top + y][:, :, None] + across[x][:, None]).flatten(1)
        unlike = (pixels[:, None] - colours[at].view(-1, 9, 3)).square().sum(2)
        # Gaussians: of 0.5 pixels, and of 0.1 of the colours' range; (P, 9)
        weight = torch.exp(-far / 0.5 - unlike / 0.02).clamp(min=1e-12)
        for result, name, alike in zip(out, names, same):
            # where more than half of the weight is the middle one's label, as at most pixels, it stays
            open_ = ((weight * alike[at]).sum(1) < 0.501 * weight.sum(1)).nonzero()[:, 0]
            label, votes = name[at[open_]], weight[open_]
            total = [(votes * (label == candidate[:, None])).sum(1) for candidate in label.unbind(1)]
            best = torch.stack(total, 1).argmax(1, keepdim=True)
            result[top + y[open_], x[open_]] = label.gather(1, best)[:, 0].to(kind)
    return out
