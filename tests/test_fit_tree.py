"""fit_tree.py: what it asks of people's maps, against loops; a small run from images to a file."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from answers import fit_tree, tree
from answers.checkpoints import load_checkpoint
from model import SIZES, UNet
from sources.formats import Item


def test_targets_are_shares_of_pairs_of_pixels_and_unlabelled_ones_never_count(monkeypatch):
    """Two annotators; nobody has labelled region 3, one alone region 2."""
    rng = np.random.default_rng(0)
    region, maps = rng.integers(0, 4, (9, 7)), rng.integers(-1, 3, (2, 9, 7))
    maps[:, region == 3], maps[0, region == 2] = -1, -1
    i, j = (np.array(v) for v in zip(*[(a, b) for a in range(4) for b in range(a + 1, 4)]))
    features = rng.normal(0, 1, (6, 53))
    monkeypatch.setattr(fit_tree.tree, "grow", lambda evidence, net, watch: watch(region, features, i, j))
    soft = np.zeros((2, 9, 7, 2))
    evidence = tree.gather(np.zeros((9, 7, 3), np.uint8), soft, soft[..., 0].astype(int), 4)
    drawn = [fit_tree.Crop(4, maps, lambda samples: evidence, 2)]
    pairs, targets, of = fit_tree.region_pairs(drawn, None, np.random.default_rng(0), 1.1)
    rows = []
    for k, (a, b) in enumerate(zip(i, j)):
        shares = []
        for labels in maps:
            p, q = (labels[(region == r) & (labels >= 0)] for r in (a, b))
            if len(p) and len(q):
                shares.append((p[:, None] == q).mean())
        if shares:
            rows.append((k, np.mean(shares)))
    assert len(rows) == 3 and (of == 4).all()
    assert np.allclose(pairs, features[[k for k, _ in rows]]) and np.allclose(targets, [s for _, s in rows])


def test_no_set_has_more_than_a_third():
    rng = np.random.default_rng(0)
    raw = rng.uniform(0.1, 3, 2000)
    for counts, most in (
        ([1970, 20, 10], 1 / 3),
        ([1500, 400, 90, 10], 1 / 3),
        ([1990, 10], 1 / 2),
        ([2000], 1.0),
    ):
        of = np.repeat(np.arange(len(counts)) + 1, counts)  # set 0 has no pair
        weight = fit_tree.balanced(raw, of)
        share = np.bincount(of, weight)[1:] / weight.sum()
        assert share.max() == pytest.approx(most, abs=1e-6) and share.min() > 0
        assert np.allclose(weight[of == 1] / weight[0], raw[of == 1] / raw[0])


def test_clicks_say_what_they_mean():
    """Into the largest segments, or into one object and the rest; never where nobody has labelled."""
    labels = np.full((12, 12), -1)
    labels[:8, :8], labels[:8, 8:], labels[9, :3] = 5, 0, 7
    objects, deep, middle = 0, 0, 0
    for seed in range(200):
        hints, meant = fit_tree.clicks(labels, np.random.default_rng(seed))
        assert set(np.unique(hints)) - {0} == set(range(1, len(meant) + 1))
        for k, mask in enumerate(meant, 1):
            assert mask[hints == k].all() and (labels[mask] >= 0).all()
        if [set(labels[mask]) for mask in meant] == [{5}, {0}, {7}][: len(meant)]:
            y, x = np.argwhere(hints == 1)[0]
            middle, deep = middle + 1, deep + (3 <= y <= 4 and 3 <= x <= 4)  # no farther than 4 from borders
        else:  # one object, and perhaps the rest
            objects += 1
            assert set(labels[meant[0]]) in ({0}, {5}, {7})
            assert len(meant) == 1 or (meant[0] ^ meant[1] == (labels >= 0)).all()
    assert 25 < objects < 80 and 0.4 < deep / middle < 0.9


def test_leaves_beside_hints(monkeypatch):
    """The target is the leaf's share in what each hint means; leaves with a hint, or without a label, are
    left out."""
    rng = np.random.default_rng(0)
    image, soft = rng.integers(0, 255, (12, 12, 3)).astype(np.uint8), rng.uniform(-1, 1, (2, 12, 12, 2))
    labels = np.where(np.arange(12) < 5, 0, 1) + np.zeros((12, 1), int)
    labels[9:] = -1
    seen, grow = [], tree.grow

    def watched(evidence, net, hints):
        seen.append((grow(evidence, net, hints), hints))
        return seen[-1][0]

    monkeypatch.setattr(fit_tree.tree, "grow", watched)
    cells = ((soft > 0) * [1, 2]).sum(-1)
    drawn = [fit_tree.Crop(3, labels[None], lambda s: tree.gather(image, soft[s], cells[s], 4), 2)]
    rows = fit_tree.hinted_leaves(drawn, None, rng, times=6)
    assert len(rows) == len(seen) == 6
    for (x, target, area, number, corrected), (grown, hints) in zip(rows, seen):
        region, k = grown.region, 0
        for leaf in range(region.max() + 1):
            inside = (region == leaf) & (labels >= 0)
            if not inside.any() or hints[region == leaf].any():
                continue
            for hint in range(1, hints.max() + 1):
                means = labels[hints == hint][0]
                assert target[k, hint - 1] == pytest.approx((labels[inside] == means).mean())
            assert area[k] == pytest.approx((region == leaf).mean())
            k += 1
        assert len(x) == len(target) == len(area) == k and x.shape[1:] == (hints.max(), 61) and number == 3
        assert not corrected


def scene(objects=False):
    """A crop of three segments and unlabelled pixels below, with random samples of a random photo."""
    rng = np.random.default_rng(1)
    image, soft = rng.integers(0, 255, (18, 18, 3)).astype(np.uint8), rng.uniform(-1, 1, (2, 18, 18, 2))
    labels, cells = np.arange(18) // 6 + np.zeros((18, 1), int), ((soft > 0) * [1, 2]).sum(-1)
    labels[14:] = -1
    return fit_tree.Crop(1, labels[None], lambda s: tree.gather(image, soft[s], cells[s], 4), 2, objects)


@pytest.mark.parametrize("objects", [False, True])
def test_a_user_corrects_what_is_wrong(objects):
    crop, net, ways, second = scene(objects), tree.learnt(), 0, 0
    (labels,), evidence = crop.maps, crop.evidence(slice(None))
    for seed in range(12):
        way = fit_tree.corrections(crop, evidence, labels, net, np.random.default_rng(seed))
        mask, before = np.zeros(labels.shape, bool), np.zeros(labels.shape, int)
        for k, (hints, grown, meant) in enumerate(way, 1):
            new = hints != before
            assert new.sum() == 1 and (hints > 0).sum() == k and len(meant) == hints.max()
            assert (mask != meant[0])[new].all() and meant[hints[new][0] - 1][new].all()
            if len(meant) == 2:
                rest = ~meant[0] & (objects | (labels >= 0))
                assert (meant[1] == rest).all()
            ids = set(labels[meant[0]])
            assert -1 not in ids and len(ids) in ((1,) if objects else (1, 2))
            second += len(ids) == 2
            claimed = fit_tree.claims(evidence, grown, hints, net)
            answer, before = grown.cut(claimed=claimed), hints
            mask = answer == answer[tuple(np.argwhere(hints == 1)[0])]
        ways += len(way)
    assert ways > 24 and (second > 0) == (not objects)
    nothing = fit_tree.corrections(crop, evidence, labels * 0 - 1, net, np.random.default_rng(0))
    assert nothing == []


def test_of_single_objects_corrections_alone_are_learnt():
    """There, what is unlabelled is not the object; without odds of hints, nobody corrects yet."""
    net, rng = tree.learnt(), np.random.default_rng
    plain = {k: v for k, v in net.items() if not k.startswith("hint_")}
    assert fit_tree.hinted_leaves([scene(True)], plain, rng(0)) == []
    rows = [row for k in range(8) for row in fit_tree.hinted_leaves([scene(True)], net, rng(k), times=5)]
    assert rows and all(row[4] for row in rows)
    for x, target, *_ in rows:
        if x.shape[1] == 2:
            assert np.allclose(target.sum(1), 1)  # every pixel is the object's or not
    kinds = [row[4] for row in fit_tree.hinted_leaves([scene()], net, rng(0), times=5)]
    assert kinds.count(False) == 5 and 1 <= kinds.count(True) <= 2


def test_crops_of_a_set(tmp_path):
    """Image k has the colour 100 + k; its map has the id k above, 0 below."""
    items = []
    for k in range(2):
        Image.fromarray(np.full((24, 32), 100 + k, np.uint8)).save(tmp_path / f"{k}.png")
        items.append(
            Item(
                str(tmp_path / f"{k}.png"),
                [str(tmp_path)],
                lambda item: [np.repeat([item.arg + 1, 0], 12)[:, None].repeat(32, 1)],
                k,
            )
        )
    drawn = list(fit_tree.crops(items, 6, dict(unlabelled="ignore", components=False), (0, 1)))
    value = [int(np.array(image)[0, 0, 0]) - 100 for image, _ in drawn]
    assert sorted(value) == [0, 0, 0, 1, 1, 1] and value[0] != value[1]
    assert [image.size == (32, 24) for image, _ in drawn] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]  # all of it first
    for k, (image, maps) in zip(value, drawn):
        assert maps.shape == (1, *image.size[::-1]) and set(maps.unique().tolist()) <= {
            k + 1,
            -1,
        }
    assert (drawn[0][1][0, 0] == value[0] + 1).all() and (drawn[0][1][0, -1] == -1).all()
    own = dict(unlabelled="ignore", components=False)
    (tmp_path / "none.png").write_bytes(b"no image")  # left out, and said
    with pytest.warns(UserWarning, match="none.png: left out: .*not a readable image"):
        bad = items[0]._replace(image=str(tmp_path / "none.png"))
        some = list(fit_tree.crops([*items, bad], 6, own, (0, 1)))
    assert len(some) == 4
    widths = [image.width for image, _ in fit_tree.crops(items, 40, own, (0, 1), 0.25)]
    assert 7 <= min(widths) < 0.7 * 32 < max(widths) and widths[:2] != [32, 32]  # any, from the first on


@pytest.fixture
def folder(tmp_path):
    """Two colours side by side, whom people part; and an untrained network, whose samples are noise."""
    truth = np.arange(32) // 16 + np.zeros((32, 1), int)
    for kind in ("images", "labels"):
        (tmp_path / "two" / kind).mkdir(parents=True)
    for k in range(3):
        first = np.random.default_rng(k).integers(0, 255, 3)
        image = np.stack([first, 255 - first // 2])[truth] + np.random.default_rng(k).integers(
            -20, 20, (32, 32, 3)
        )
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "two/images" / f"{k}.png")
        Image.fromarray((truth + 1).astype(np.uint8)).save(tmp_path / "two/labels" / f"{k}.png")
    torch.manual_seed(0)
    net = UNet(7, 4, **SIZES["tiny"])
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    engine.save_checkpoint(
        tmp_path / "ckpt.pt",
        dict(
            network=dict(in_channels=7, out_channels=4, **SIZES["tiny"]),
            ema=net.state_dict(),
            codec=dict(bits=4),
            diffusion={},
            image_size=16,
            dataset="two",
            step=0,
            sampling=dict(steps=2, guidance=1.0, sampler="ddpm", variance="large"),
        ),
    )
    return tmp_path


def test_it_learns_colours_from_a_folder(folder, capsys, monkeypatch):
    monkeypatch.setattr(fit_tree, "STEPS", 150)
    two, out = folder / "two", folder / "tree.npz"
    words = [
        "--ckpt",
        str(folder / "ckpt.pt"),
        "--dataset",
        f"{two}:3,{two}:1:ignore",
        "--crops",
        "12",
        "--n",
        "2",
        "--device",
        "cpu",
    ]
    assert load_checkpoint(folder / "ckpt.pt").odds == tree.LEARNT
    assert fit_tree.main(words) == 0  # beside the checkpoint
    assert load_checkpoint(folder / "ckpt.pt").odds == out
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "cross entropy" in line
    ]
    net = tree.learnt(out)
    assert len(losses) == 2 and max(losses) < 0.4  # 0.69: not even the mean
    assert net.keys() == tree.learnt().keys() | {"offset"} and net["offset"] in fit_tree.OFFSETS
    assert all(net[k].shape[1:] == v.shape[1:] for k, v in tree.learnt().items())

    truth, rng = np.arange(16) // 8 + np.zeros((16, 1), int), np.random.default_rng(9)
    photo = np.array([[210, 60, 40], [30, 90, 220]])[truth] + rng.integers(-9, 9, (16, 16, 3))
    cells = rng.integers(0, 16, (2, 16, 16))
    soft = (cells[..., None] >> np.arange(4) & 1) * 2.0 - 1
    evidence = tree.gather(photo.astype(np.uint8), soft, cells, 16)
    grown = tree.grow(evidence, net)
    labels = grown.cut(2)
    assert (labels == truth).mean() > 0.97 or (labels != truth).mean() > 0.97
    sure, borders = tree.confidence(grown, labels, net)
    assert min(sure) > 0.5 and borders[0][2] > 0.5

    before = out.read_bytes()
    assert (
        fit_tree.main(words) == 2 and out.read_bytes() == before and not (folder / "tree.npz.part").exists()
    )
    assert f"{out} exists and is not overwritten" in capsys.readouterr().err


def test_sets_are_read_as_in_training_unless_they_say_otherwise(folder, monkeypatch, capsys):
    two, content, seen = folder / "two", engine.read(folder / "ckpt.pt"), []
    content["config"] = dict(dataset=f"{two}:components", unlabelled="ignore", void="7")
    engine.save_checkpoint(folder / "ckpt.pt", content)
    monkeypatch.setattr(fit_tree, "fit_sets", lambda _, sets, a: seen.append([own for *_, own in sets]) or {})
    for k, more in enumerate(([f"{two},{two}:void=9"], [str(two), "--unlabelled", "segment"])):
        words = ["--ckpt", str(folder / "ckpt.pt"), "--out", str(folder / f"{k}.npz"), "--dataset", *more]
        assert fit_tree.main([*words, "--device", "cpu"]) == 0
    trained = dict(components=True, unlabelled="ignore", void=(7,), objects=False)
    assert seen == [[trained, {**trained, "void": (9,)}], [{**trained, "unlabelled": "segment"}]]
    said = [line for line in capsys.readouterr().out.splitlines() if "as in training" in line]
    assert said == [f"{two} is read as in training: {taken}" for taken in (
        "components True, unlabelled ignore, void (7,)", "components True, unlabelled ignore",
        "components True, void (7,)")]


def test_objects_are_more_sets(folder, monkeypatch):
    """Of which id 0 is never a segment; the pairs, the grain and the confidence do not see them."""
    two, seen = folder / "two", []
    monkeypatch.setattr(fit_tree, "STEPS", 20)
    for name in ("region_pairs", "fit_confidence", "fit_offset", "hinted_leaves"):
        def watched(drawn, *more, name=name, usual=getattr(fit_tree, name), **options):
            seen.append((name, {(crop.set, crop.objects) for crop in drawn}))
            return usual(drawn, *more, **options)

        monkeypatch.setattr(fit_tree, name, watched)
    words = ["--ckpt", str(folder / "ckpt.pt"), "--dataset", str(two), "--objects", f"{two}:2", "--crops",
             "9", "--n", "1", "--device", "cpu"]
    assert fit_tree.main(words) == 0 and len(tree.learnt(folder / "tree.npz")["hint_mean"]) == 61
    assert {name for name, _ in seen} == {"region_pairs", "fit_confidence", "fit_offset", "hinted_leaves"}
    for name, sets in seen:
        assert sets == ({(0, False), (1, True)} if name == "hinted_leaves" else {(0, False)})


def test_the_cut_is_where_people_cut():
    """Of maps that are cuts of the tree, some pixels without a label; without any label, there is none."""
    rng = np.random.default_rng(4)
    image = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    soft = rng.uniform(-1, 1, (2, 40, 40, 2))
    evidence = tree.gather(image, soft, ((soft > 0) * [1, 2]).sum(-1), 4)
    net = {**tree.learnt(), "b3": tree.learnt()["b3"] + 1}
    grown, chosen = tree.grow(evidence, net), []
    for cut in sorted(fit_tree.OFFSETS):
        labels = grown.cut(offset=cut)
        labels[:2] = -1
        drawn = [fit_tree.Crop(0, np.stack([labels, labels]), lambda s: evidence, 2)]
        chosen.append(float(fit_tree.fit_offset(drawn, net)[0]))
        assert (grown.cut(offset=chosen[-1])[2:] == grown.cut(offset=cut)[2:]).all()
        there = tree.grow(evidence, {**net, "offset": np.array([cut])})
        assert all((there.cut(g) == grown.cut(g, cut)).all() for g in tree.GRAINS) and there.offset == cut
        assert (there.cut(7) == grown.cut(7)).all()
    assert len(set(chosen)) == 4  # as many maps as there are among these cuts
    assert fit_tree.fit_offset([fit_tree.Crop(0, labels[None] * 0 - 1, lambda s: evidence, 2)], net) == [0]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--dataset", "shapes"], "shapes have no files"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--crops", "0"], "--crops"),
        (["--ckpt", "nothing.pt"], "nothing.pt: no such file"),
    ],
)
def test_wrong_use_gets_one_sentence(folder, capsys, words, said):
    given = [
        "--ckpt",
        str(folder / "ckpt.pt"),
        "--dataset",
        str(folder / "two"),
        "--out",
        str(folder / "new.npz"),
        *words,
    ]
    assert fit_tree.main([*given, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (folder / "new.npz").exists()


def test_where_nothing_can_be_written_is_said_before_hours_of_work(folder, monkeypatch, capsys):
    monkeypatch.setattr(fit_tree, "fit_sets", lambda *_: {"weights": np.zeros(1)})
    words = ["--ckpt", str(folder / "ckpt.pt"), "--dataset", str(folder / "two"), "--device", "cpu", "--out"]
    assert fit_tree.main([*words, str(folder / "new/folder/t.npz")]) == 0
    assert [p.name for p in (folder / "new/folder").iterdir()] == ["t.npz"]
    monkeypatch.setattr(fit_tree, "fit_sets", lambda *_: pytest.fail("it was begun"))
    (folder / "new/file").touch(), (folder / "new/t.npz.part").mkdir()
    for name in ("file/x.npz", "t.npz"):
        assert fit_tree.main([*words, str(folder / "new" / name)]) == 2
        assert "choose another --out" in capsys.readouterr().err


def test_maps_without_a_label_are_nothing_to_learn_from(folder, capsys):
    shutil.copytree(folder / "two", folder / "other")
    for k in range(3):
        Image.new("L", (32, 32)).save(folder / "two/labels" / f"{k}.png")
    words = ["--ckpt", str(folder / "ckpt.pt"), "--crops", "3", "--n", "1", "--dataset"]
    for sets in (f"{folder / 'two'}:1:ignore", f"{folder / 'two'}:1:ignore,{folder / 'other'}"):
        given = [*words, sets, "--out", str(folder / "new.npz"), "--device", "cpu"]
        assert fit_tree.main(given) == 2 and "two: nothing to learn from" in capsys.readouterr().err
