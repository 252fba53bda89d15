"""locate in Triton against bits.locate."""

import pytest
import torch

import bits
import kernels

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too slow in the interpreter")


@pytest.fixture(autouse=True)
def triton():
    kernels.use("triton")
    yield
    kernels.use("auto")


def maps(B, H, W, segments, patch=1, seed=0):
    """Labels in [-1, segments), in patches."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randint(-1, segments, (B, -(-H // patch), -(-W // patch)), generator=g)
    return small.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :H, :W].contiguous().to(DEVICE)


LABELS = {
    "patches":          (maps(3, 24, 40, 12, 6), 8),
    "one pixel":        (maps(2, 1, 1, 3), 8),
    "odd sizes":        (maps(1, 7, 13, 30), 8),
    "collisions":       (maps(2, 16, 16, 60), 8),  # noise: all centroids near the middle
    "too many":         (maps(2, 16, 16, 100, seed=1), 4),  # for 16 cells
    "two cells a side": (maps(2, 9, 9, 9), 2),
    "11 a side":        (maps(1, 20, 20, 40, 2), 11),
    "32 a side":        (maps(1, 24, 24, 50), 32),
    "all ignored":      (torch.full((2, 5, 5), -1, device=DEVICE), 8),
    "some ignored":     (torch.cat([maps(1, 5, 5, 4), torch.full((1, 5, 5), -1, device=DEVICE)]), 8),
    "large ids":        (maps(2, 16, 16, 9, 4) * 10**12 + 7, 8),
    "negative ids":     (maps(2, 16, 16, 9, 4) - 5, 8),  # -1 among them
    "ties":             (torch.arange(4, device=DEVICE).view(1, 2, 2)
                         .repeat_interleave(4, 1).repeat_interleave(4, 2), 3),
}


@pytest.mark.parametrize("name", LABELS)
def test_locate(name):
    labels, side = LABELS[name]
    assert torch.equal(kernels.locate(labels, side), bits.locate(labels, side))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_locate_takes_every_integer_type_and_strides(kind):
    labels = maps(1, 16, 20, 9, 4).clamp(min=0)
    true = bits.locate(labels, 8)
    assert torch.equal(kernels.locate(labels.to(kind), 8), true)
    assert torch.equal(kernels.locate(labels.to(kind).transpose(1, 2).contiguous().transpose(1, 2), 8), true)
    small = kernels.locate(labels.to(kind), 8, dtype=torch.int8)
    assert small.dtype == torch.int8 and torch.equal(small.long(), true)


def test_locate_with_a_bound_ignores_what_is_beyond_it():
    labels = maps(2, 16, 16, 12, 4)
    assert torch.equal(kernels.locate(labels, 8, labels_below=12), bits.locate(labels, 8))
    assert torch.equal(kernels.locate(labels, 8, labels_below=6),
                       bits.locate(labels.masked_fill(labels >= 6, -1), 8))
    huge = labels.masked_fill(labels == 3, 2**32 + 3)  # not to be taken for 3
    assert torch.equal(kernels.locate(huge, 8, labels_below=12),
                       bits.locate(labels.masked_fill(labels == 3, -1), 8))


@pytest.mark.parametrize("segments, side, share", [(12, 4, 0.05), (40, 4, 0.004), (40, 4, 0.5), (9, 3, 0.0)])
def test_locate_with_hints(segments, side, share):
    """A few segments with hints, more segments than places, more hinted segments than places, no hint."""
    labels = maps(2, 24, 20, segments, 2)
    hints = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) < share
    true = bits.locate(labels, side, hints=hints & (labels >= 0))
    assert torch.equal(kernels.locate(labels, side, labels_below=segments, hints=hints), true)
    # in another order in memory, and ids of a type without -1
    turned = hints.mT.contiguous().mT
    assert torch.equal(kernels.locate(labels, side, labels_below=segments, hints=turned), true)
    if segments < 256:
        whole = labels.clamp(min=0)
        got = kernels.locate(whole.to(torch.uint8), side, labels_below=256, hints=hints)
        assert torch.equal(got, bits.locate(whole, side, hints=hints))
    assert share == 0 or not torch.equal(true, bits.locate(labels, side))


def test_locate_more_distinct_ids_than_the_kernel_holds():
    labels = torch.randperm(40 * 40).view(1, 40, 40).to(DEVICE)
    labels[0, :20, :20] = 7
    assert torch.equal(kernels.locate(labels, 8), bits.locate(labels, 8))


@gpu
@pytest.mark.parametrize("B, H, W, segments, patch",
                         [(257, 16, 16, 20, 4), (8, 128, 128, 64, 16), (2, 512, 512, 900, 3)])
def test_locate_large(B, H, W, segments, patch):
    labels = maps(B, H, W, segments, patch)
    assert torch.equal(kernels.locate(labels, 8), bits.locate(labels, 8))
