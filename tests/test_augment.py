"""data.augment: what each of the sample's uniform numbers does, and that image and labels never part."""

import numpy as np
import pytest
import torch

from data import augment
from frame import normalise

OFF = torch.full((16,), 0.999)  # nothing happens ...
OFF[6:] = 0.9  # ... however large the amounts
STD, MEAN = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))


def scene(B=3, S=24, sizes=((24, 24), (24, 15), (10, 24))):
    """Smooth images, so that interpolation is exact to see; labels from the same coordinates; three
    shapes."""
    y, x = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    image = torch.stack([8 * x + 20, 8 * y + 20, 4 * (x + y) + 20], -1).byte().expand(B, S, S, 3).clone()
    labels, sizes = (y // 3 * 8 + x // 3).expand(B, S, S).clone(), torch.tensor(sizes[:B])
    for i, (h, w) in enumerate(sizes.tolist()):
        labels[i, h:], labels[i, :, w:], image[i, h:], image[i, :, w:] = -1, -1, 0, 0
    return image, labels, sizes


def settings(**values):
    """u (1, 16) with everything off but the numbers named, u3=0.2 for example."""
    u = OFF.clone()
    for name, value in values.items():
        u[int(name[1:])] = value
    return u[None]


def run(u, B=3):
    images, labels, sizes = scene(B)
    x, inside, new = augment(images, labels, sizes, u.expand(B, 16))
    return (x * STD + MEAN) * 255, inside, new, images.movedim(-1, 1).float(), labels, sizes


def test_off_is_the_identity():
    images, labels, sizes = scene()
    x, inside, new = augment(images, labels, sizes, OFF.expand(3, 16))
    expected, valid = normalise(images, sizes)
    assert torch.allclose(x, expected, atol=1e-4) and torch.equal(new, labels) and torch.equal(inside, valid)


def test_flip_is_exact_within_the_valid_part():
    x, inside, new, images, labels, sizes = run(settings(u0=0.49))
    for i, (h, w) in enumerate(sizes.tolist()):
        assert torch.equal(new[i, :h, :w], labels[i, :h, :w].flip(1)) and (new[i][~inside[i]] == -1).all()
        assert torch.allclose(x[i, :, :h, :w], images[i, :, :h, :w].flip(2), atol=0.02)
    assert torch.equal(inside, labels >= 0)


@pytest.mark.parametrize("u15,degrees", [(0.0, -20), (0.25, -10), (0.999999, 20)])
@pytest.mark.parametrize("u0", [0.0, 0.9])  # with and without a flip
def test_rotation_moves_image_and_labels_together(u15, degrees, u0):
    x, inside, new, images, labels, sizes = run(settings(u0=u0, u5=0.29, u15=u15))
    for i, (h, w) in enumerate(sizes.tolist()):
        col, row = (x[i, 0] - 20) / 8, (x[i, 1] - 20) / 8  # the image tells where it came from
        near = ((row - row.round()).abs() < 0.45) & ((col - col.round()).abs() < 0.45) & inside[i]
        source = (row.round().long() // 3 * 8 + col.round().long() // 3)
        assert torch.equal(new[i][near], source[near]) and near.sum() > 0.5 * inside[i].sum()
        a, b = h // 2, w // 2  # where three pixels came from: a right angle
        across = np.array([row[a, b + 3] - row[a, b - 3], col[a, b + 3] - col[a, b - 3]]) / 6
        down = np.array([row[a + 3, b] - row[a - 3, b], col[a + 3, b] - col[a - 3, b]]) / 6
        assert np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=0.02)
        assert abs(np.degrees(np.arcsin(abs(across[0]))) - abs(degrees)) < 1 and (across[1] < 0) == (u0 < 0.5)


def test_new_pixels_are_ignored_and_padding_stays_zero():
    images, labels, sizes = scene()
    x, inside, new = augment(images, labels, sizes, settings(u5=0.0, u15=0.0).expand(3, 16))
    for i, (h, w) in enumerate(sizes.tolist()):
        assert not inside[i, h:].any() and not inside[i, :, w:].any()  # never into the padding
        assert not inside[i, 0, 0] and not inside[i, h - 1, w - 1]  # turned corners come from outside
    assert torch.equal(new == -1, ~inside) and (x.movedim(1, -1)[~inside] == 0).all()


def test_no_black_bleeds_in_at_the_border():
    images, labels, sizes = scene()
    images[labels >= 0] = 200
    x, inside, _ = augment(images, labels, sizes, settings(u0=0.0, u5=0.0, u15=0.2).expand(3, 16))
    values = ((x * STD + MEAN) * 255).movedim(1, -1)[inside]
    assert torch.allclose(values, torch.full_like(values, 200.0), atol=0.05)


@pytest.mark.parametrize("on", [dict(u1=0.2), dict(u2=0.2), dict(u3=0.2), dict(u4=0.05)])
def test_colour_leaves_labels_alone(on):
    x, inside, new, images, labels, sizes = run(settings(**on))
    changed = (x - images).abs().amax(1) > 1
    assert torch.equal(new, labels) and torch.equal(inside,
                                                    labels >= 0) and changed[inside].float().mean() > 0.5
    assert (x >= -0.01).all() and (x <= 255.01).all()


def test_gamma_and_shift_by_formula():
    x, inside, _, images, _, _ = run(settings(u1=0.0, u6=0.0))  # exponent 2^-0.5
    expected = (images / 255) ** 2**-0.5 * 255
    assert torch.allclose(x[0], expected[0], atol=0.05)
    x, _, _, images, _, _ = run(settings(u4=0.0))
    shift = x[0] - images[0]
    assert (shift.flatten(1).std(1) < 0.05).all() and (shift.abs() < 0.1 * 255).all()  # one number a channel


def test_how_often():
    u = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    images, labels, sizes = (v.expand(2000, *v.shape[1:]) for v in scene(1))
    x, inside, new = augment(images.contiguous(), labels.contiguous(), sizes, u)
    moved = (new != labels).flatten(1).any(1)
    assert abs(moved.float().mean() - (1 - 0.5 * 0.7)) < 0.05  # a flip (0.5) or a rotation (0.3)
    assert 0.22 < (~inside).flatten(1).any(1).float().mean() < 0.3  # below 2 degrees, nothing new comes in


def test_samples_do_not_depend_on_their_batch():
    images, labels, sizes = scene()
    u = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    together = augment(images, labels, sizes, u)
    for i in range(3):
        one = slice(i, i + 1)
        alone = augment(images[one], labels[one], sizes[one], u[one])
        assert torch.allclose(alone[0], together[0][one], atol=1e-5) and torch.equal(alone[2],
                                                                                     together[2][one])


def test_jitter_multiplies_how_often_colours_change_and_nothing_else():
    images, labels, sizes = scene()
    plain = normalise(images, sizes)[0]
    for number, p in ((1, 0.3), (2, 0.3), (3, 0.3), (4, 0.1)):
        u = settings(**{f"u{number}": 1.5 * p}).expand(3, 16)  # off at 1, on at 2
        for jitter, changed in ((1.0, False), (2.0, True), (0.0, False)):
            x, _, new = augment(images, labels, sizes, u, jitter=jitter)
            assert torch.allclose(x, plain, atol=1e-4) != changed and torch.equal(new, labels)
    for number in (0, 5):  # flips and rotations are as they were
        u = settings(**{f"u{number}": 0.6}).expand(3, 16)
        assert torch.allclose(augment(images, labels, sizes, u, jitter=3.0)[0], plain, atol=1e-4)


def test_turns_show_a_square_in_all_eight_ways_and_never_part_image_and_labels():
    images, labels, _ = scene(1)
    seen = set()
    for k in range(8):
        u = settings(u0=(k + 0.5) / 8)
        x, inside, new = augment(images, labels, torch.tensor([[24, 24]]), u, turns=True)
        mirrored = labels.flip(2) if k < 4 else labels  # then by k quarter turns
        ways = [torch.rot90(mirrored, turn, (1, 2)) for turn in range(4)]
        assert sum(torch.equal(new, way) for way in ways) == 1 and inside.all()
        place = ((x * STD + MEAN) * 255 - 20).round().long() // 24  # columns and rows, as `scene` has them
        assert torch.equal(place[:, 1] * 8 + place[:, 0], new)
        seen.add(tuple(new.flatten().tolist()))
        assert torch.equal(augment(images, labels, torch.tensor([[24, 24]]), u)[2], mirrored)  # not asked for
    assert len(seen) == 8


def test_turns_keep_what_lies_in_the_middle_of_a_long_photo():
    images, labels, sizes = scene(3)
    new = augment(images, labels, sizes, settings(u0=5.5 / 8).expand(3, 16), turns=True)[2]  # a quarter turn
    for i, (h, w) in enumerate(sizes.tolist()):
        if (h - w) % 2 == 0:  # its pixels fall on pixels
            a, b, r = h // 2, w // 2, min(h, w) // 2
            part, turned = (v[i, a - r : a + r, b - r : b + r] for v in (labels, new))
            assert any(torch.equal(turned, torch.rot90(part, turn)) for turn in (1, 3))
        assert (new[i, :h, :w] == -1).any() == (h != w)  # beyond the photo: not labelled


@pytest.mark.parametrize("share, u4, negative", [(0.3, 0.71, True), (0.3, 0.69, False), (0.0, 0.9999, False),
                                                 (1.0, 0.21, True)])
def test_a_negative_is_white_less_the_photo(share, u4, negative):
    images, labels, sizes = scene()
    x, inside, new = augment(images, labels, sizes, settings(u4=u4).expand(3, 16), negative=share)
    here, values = inside[:, None].expand_as(x), images.movedim(-1, 1).float()
    values = 255 - values if negative else values
    assert torch.allclose(((x * STD + MEAN) * 255)[here], values[here], atol=0.02)
    assert torch.equal(new, labels)
