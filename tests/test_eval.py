"""eval.py as a user runs it, on label maps whose scores are known, and its parts against loops."""

import argparse
import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import frame
import metrics
import train
from answers import scoring, tree
from answers.checkpoints import load_checkpoint
from answers.jobs import Job
from answers.segment import evidence_of, joined
from bits import Codec
from diffusion import sample
from engine import read, save_checkpoint
from metrics import calibration_error


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("run")
    options = ("--preset tiny --device cpu --max_steps 2 --batch_size 2 --image_size 16 --bits 4 "
               "--eval_images 1 --steps 2 --guidance 0")
    assert train.main([*options.split(), "--out", str(out)]) == 0
    return out / "ckpt.pt"


def folder(path, maps, split="val"):
    """A data set: maps {stem: [label map, ...]}, with noise for images."""
    for part in ("images", "labels"):
        (path / part / split).mkdir(parents=True, exist_ok=True)
    for stem, several in maps.items():
        noise = np.random.default_rng(0).integers(0, 256, (*several[0].shape, 3), np.uint8)
        Image.fromarray(noise).save(path / "images" / split / f"{stem}.png")
        for j, one in enumerate(several):
            Image.fromarray(one.astype(np.uint8)).save(path / "labels" / split / f"{stem}_a{j}.png")
    return path


def run(capsys, tmp_path, *arguments):
    """main's exit status and its last line."""
    given = [str(v) for v in arguments]
    status = evaluation.main([*given, "--device", "cpu", "--cache", str(tmp_path / "cache"), "--out",
                              str(tmp_path / "out")])
    said = capsys.readouterr()
    assert said.out, said.err
    return status, json.loads(said.out.strip().splitlines()[-1])


def thirds(h, w):
    return np.arange(h)[:, None] * 3 // h * 3 + np.arange(w) * 3 // w


def halves(h, w):
    return np.broadcast_to(np.arange(w) * 2 // w, (h, w))


def test_a_baseline_on_known_maps(tmp_path, capsys):
    """The 3 x 3 grid on its own picture, and on two halves: middle column split, so 6 of 9 cells are
    whole."""
    d = folder(tmp_path / "d", {"a": [thirds(48, 48)], "b": [halves(48, 48)]})
    status, report = run(capsys, tmp_path, "--baseline", "grid", "--dataset", d, "--size", 24)
    assert status == 0 and report["images"] == 2
    for where in ("network", "own"):
        got = {key: report[where]["grid"][key][0] for key in ("iou", "hiou", "covering", "pq", "pred",
                                                              "true")}
        cell, half = 1 / 9, 1 / 2  # the best cell has IoU 2/9 with its half
        assert got == pytest.approx({"iou": (1 + cell / half) / 2, "hiou": (1 + 2 * cell / half / 9) / 2,
                                     "covering": (1 + 2 / 9) / 2,
                                     "pq": 9 / ((9 + 9) / 2 + (9 + 2) / 2), "pred": 9, "true": 5.5}, abs=1e-9)
    assert report["iou"] == report["network"]["grid"]["iou"][0] and (tmp_path / "out/examples.png").exists()
    rows = list(csv.DictReader(open(tmp_path / "out/images.csv")))
    assert [(row["name"], row["position"]) for row in rows] == [("a", "0"), ("b", "1")]
    assert float(rows[0]["own_grid_ari"]) == 1
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


def test_reports_name_their_options_and_share_no_folder(tmp_path, capsys, monkeypatch, ckpt):
    d = folder(tmp_path / "d", {"a": [thirds(40, 48)]})
    monkeypatch.chdir(tmp_path)
    for more, tiles, name in (((), 1, ""), (("--tiles", "2"), 2, "-tiles-2"),  # its samples stay as they are
                              (("--merge", "1"), 2, "-merge-1.0"), (("--n", "1,2"), 1, "-n-1-2"),
                              (("--merge", "1", "--tiles", "1"), 1, "-merge-1.0-tiles-1"),
                              (("--components", "--size", "20"), 1, "-components-size-20")):
        assert evaluation.main(["--ckpt", str(ckpt), "--dataset", str(d), "--device", "cpu", *more]) == 0
        report = json.loads(Path(f"out/eval/{ckpt.parent.name}-d-val{name}/report.json").read_text())
        assert report["tiles"] == tiles
    assert evaluation.main(["--baseline", "grid", "--dataset", str(d), "--tiles", "2"]) == 2
    assert "--tiles is a checkpoint's, not a baseline's" in capsys.readouterr().err
    best = tmp_path / "run" / "best.pt"  # each run has one
    best.parent.mkdir()
    shutil.copyfile(ckpt, best)
    for name, more in (("-components", ":components"), ("", "")):
        assert evaluation.main(["--ckpt", str(best), "--dataset", f"{d}{more}", "--device", "cpu"]) == 0
        report = json.loads(Path(f"out/eval/run-best-d-val{name}/report.json").read_text())
        assert bool(report["components"]) == bool(name) and report["seed"] == 0 and report["limit"] == 256


def test_humans_against_each_other(tmp_path, capsys):
    """Annotators A, A, B: of the six ordered pairs two are equal."""
    d = folder(tmp_path / "d", {"a": [halves(20, 40), halves(20, 40), np.zeros((20, 40))]})
    status, report = run(capsys, tmp_path, "--baseline", "human", "--dataset", d, "--size", 40)
    human = {key: v[0] for key, v in report["own"]["human"].items()}
    n = 20 * 40
    same = 2 * math.comb(n // 2, 2) / math.comb(n, 2)  # pairs of pixels in one half
    assert status == 0 and report["annotators"] == 3 and human["voi"] == pytest.approx(4 / 6 * 1)
    assert human["pri"] == pytest.approx(2 / 6 + 4 / 6 * same) and human["ari"] == pytest.approx(2 / 6)
    assert human["covering"] == pytest.approx(2 / 6 + 2 / 6 * 0.5 + 2 / 6 * 0.5)


def test_a_checkpoint_with_several_annotators_and_a_sweep(ckpt, tmp_path, capsys):
    rng = np.random.default_rng(0)
    d = folder(tmp_path / "bsds-like", {f"i{k}": [rng.integers(1, 4, (4, 5)).repeat(8, 0).repeat(8, 1)
                                                  for _ in range(k + 1)]
                                        for k in range(3)})
    status, report = run(capsys, tmp_path, "--ckpt", ckpt, "--dataset", d, "--n", "1,3", "--steps", "1,2",
                         "--guidance", "0,1",
                         "--sampler", "ddpm,ddim", "--batch", 2, "--size", 48)
    assert report["48"].keys() == {"sample", "coarse", "answer", "fine", "human"}
    assert status == 0 and (report["images"], report["annotators"], report["steps"]) == (3, 2, 2)
    settings = [(s["sampler"], s["steps"], s["guidance"], s["n"]) for s in report["sweep"]]
    expected = [(sampler, steps, guidance, n)
                for sampler in ("ddpm", "ddim") for steps in (1, 2) for guidance in (0, 1)
                for n in ((1, 3) if (sampler, steps) == ("ddpm", 2) else (1,))]
    assert sorted(settings) == sorted(expected)
    for s in report["sweep"]:
        assert s["oracle"][0] >= s["one"][0] and (s["n"] > 1 or s["one"] == s["oracle"])
    home = next(s for s in report["sweep"] if (s["sampler"], s["steps"], s["guidance"], s["n"]) == ("ddpm", 2,
                                                                                                    0, 3))
    for k, key in enumerate(("ari", "iou")):
        assert report["network"]["answer"][key][0] == report[key] == pytest.approx(home["answer"][k])
    for where, answer in itertools.product(("network", "own"),
                                           ("sample", "coarse", "answer", "fine", "human")):
        for key, (mean, low, high) in report[where][answer].items():
            # sq: no match at all
            assert low <= mean <= high if mean is not None else key == "sq", (where, answer, key)
    eces = [report[f"{key}_ece"] for key in ("bits", "joined", "segments", "borders")]
    alone = report["network"]["answer"]["pred"][0] == 1  # one segment everywhere has no borders
    assert all(v is None and alone or 0 <= v <= 1 for v in eces[3:]) and all(0 <= v <= 1 for v in eces[:3])
    assert len(report["spread_ARI"]) == 3
    rows = list(csv.DictReader(open(tmp_path / "out/images.csv")))
    values = [float(row["network_answer_ari"]) for row in rows]
    # a single annotator
    assert np.mean(values) == pytest.approx(report["ari"]) and rows[0]["own_human_ari"] == ""
    assert (tmp_path / "out/examples.png").exists()
    alone = run(capsys, tmp_path, "--baseline", "human", "--dataset", d, "--size", 48)[1]["network"]["human"]
    assert alone.keys() == report["48"]["human"].keys() and all(alone[k] == pytest.approx(v) for k,
                                                                v in report["48"]["human"].items())


def test_a_limit_takes_images_of_all_names(tmp_path, capsys):
    d = folder(tmp_path / "d", {f"{n:02}": [halves(8, 8)] for n in range(12)})
    run(capsys, tmp_path, "--baseline", "grid", "--dataset", d, "--size", 8, "--limit", 4)
    names = [row["name"] for row in csv.DictReader(open(tmp_path / "out/images.csv"))]
    assert names == [f"{n:02}" for n in sorted(np.random.default_rng(0).permutation(12)[:4])]


def test_the_same_answers_in_every_batch(ckpt, tmp_path, capsys):
    reports = [run(capsys, tmp_path, "--ckpt", ckpt, "--limit", 3, "--n", 2, "--batch",
                   batch)[1] for batch in (1, 5)]
    for key in ("ari", "iou", "hiou"):
        assert reports[0][key] == pytest.approx(reports[1][key], abs=1e-6)
    assert "own" not in reports[0]  # shapes has no files


@pytest.fixture
def lively(ckpt):
    """The checkpoint's model; zero-initialised layers speak, as after training."""
    model = load_checkpoint(ckpt)
    torch.manual_seed(0)
    for p in model.net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("merge", [0.0, 1.0])
def test_rows_are_scores_of_plain_samples_and_of_their_tree(lively, merge):
    """Sample j of image i is what `sample` gives alone for its seed; "answer" of n is the tree of the first
    n."""
    lively.tidy = dict(least=0, merge=merge)
    images, _, sizes = (shapes := data.load("shapes", "val", 16)).get([0, 1])
    setting = {**lively.sampling, "steps": 2}
    a = argparse.Namespace(seed=3, batch=4, baseline=None, tiles=1)
    rows = scoring.score_images(shapes, [0, 1], lively, a, setting, [1, 3], {}, keep=True)
    x, inside = frame.normalise(images, sizes)
    for i, row in enumerate(rows):
        (h, w), photo = sizes[i].tolist(), images[i].numpy()
        alone = [sample(lively.net, x[i : i + 1], inside[i : i + 1], 4, [(3 * 10**6 + i) * 1000 + j],
                        lively.diffusion,
                        torch.tanh, **setting)[0, :, :h, :w] for j in range(3)]
        job = Job(None, photo[:h, :w], alone)
        evidence = evidence_of(job, lively.codec)
        grown, joint = joined(evidence, lively)
        each = [lively.codec.decode(v[None])[0] for v in alone] if not merge else [
            torch.from_numpy(joined(evidence_of(job, lively.codec, slice(k, k + 1)), lively)[1])
            for k in range(3)]
        true = shapes.maps(i)[:, :h, :w]

        def score(labels):
            s = metrics.scores(torch.as_tensor(labels).long()[None], true)
            return [float(s["ari"]), float(s["iou"])]

        curve = row["curve"]
        assert curve[3]["one"] == pytest.approx(np.mean([score(v) for v in each], 0), abs=1e-6)
        assert curve[3]["oracle"] == pytest.approx(np.max([score(v) for v in each], 0), abs=1e-6)
        assert curve[3]["answer"] == pytest.approx(score(joint), abs=1e-6)
        assert curve[1]["one"] == pytest.approx(score(each[0]), abs=1e-6)
        assert list(row["network"]) == ["sample", "coarse", "answer", "fine"]
        for name, grain in (("coarse", "coarse"), ("answer", "normal"), ("fine", "fine")):
            want = score(joined(evidence, lively, grain)[1])[0]
            assert row["network"][name]["ari"] == pytest.approx(want, abs=1e-6)
        assert len(row["tiles"]) == 1 + 1 + 4


def test_bit_table():
    codec, g = Codec(bits=4), torch.Generator().manual_seed(0)
    maps = torch.randint(0, 5, (2, 8, 8), generator=g)
    maps[:, :2] = -1
    truth = codec.encode(codec.cells(maps))  # (2, 4, 8, 8)
    sure = scoring.bit_table(truth[0], maps[:1], codec, 8)
    assert calibration_error(sure) == 0 and sure[9].tolist() == [6 * 8 * 4] * 3
    table = scoring.bit_table(0.6 * truth[0], maps, codec, 8)  # against both
    right = int((truth[0] == truth[1])[:, 2:].sum()) + 6 * 8 * 4
    assert table.sum(0).tolist() == pytest.approx([2 * 6 * 8 * 4, 0.8 * 2 * 6 * 8 * 4, right], rel=1e-6)
    assert (table[:, 0] > 0).sum() == 1 and table[5:7, 0].sum() == 2 * 6 * 8 * 4  # 0.8 is an edge
    wide = torch.full((1, 8, 8), -1)  # whose palette is that of the square, as in training
    wide[:, :3] = torch.randint(0, 5, (1, 3, 8), generator=g)
    truth = codec.encode(codec.cells(wide))[0, :, :3]
    assert calibration_error(scoring.bit_table(truth, wide[:, :3], codec, 8)) == 0


@pytest.fixture
def cut():
    """A map of 4 segments that a tree was cut into, its evidence, and what three people drew; pixels without
    a label."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 4, (2, 3, 4)).repeat(4, 1).repeat(4, 2)
    soft = (cells[..., None] >> np.arange(2) & 1) * 2.0 - 1
    evidence = tree.gather(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8), soft, cells, 4)
    grown = tree.grow(evidence)
    labels = grown.cut(4)
    maps = torch.from_numpy(rng.integers(0, 3, (3, 3, 4)).repeat(4, 1).repeat(4, 2))
    maps[0] = torch.from_numpy(np.where(labels == 2, 7, 5))  # has one of the segments
    maps[1, :, :3], maps[2] = -1, torch.where(torch.from_numpy(labels == 1), -1, maps[2])
    return evidence, grown, labels, maps


def test_segments_are_right_where_people_have_one_like_them(cut):
    evidence, grown, labels, maps = cut
    sure = np.array([0.05, 0.35, 0.95, 0.55])
    table = scoring.segment_table(sure, labels, maps)
    want = np.zeros((10, 3))
    for k, p in enumerate(sure):
        hits = []
        for truth in maps.numpy():
            if ((labels == k) & (truth >= 0)).sum() * 2 < (labels == k).sum():
                continue  # this person has not labelled it
            mask = (labels == k) & (truth >= 0)
            best = max((mask & (truth == one)).sum() / (mask | (truth == one)).sum()
                       for one in np.unique(truth[truth >= 0]))
            hits.append(best > 0.5)
        want[int(p * 10)] += [1, p, np.mean(hits)]
    assert np.allclose(table, want) and want[:, 2].sum() > 0


def test_borders_are_right_where_people_part_the_two(cut):
    """Weighed by their length; against every pair of pixels, one in each segment."""
    _, grown, labels, maps = cut
    table = scoring.border_table(grown, labels, maps, None)
    want = np.zeros((10, 3))
    for i, j, chance in tree.confidence(grown, labels)[1]:
        steps = [(a, b) for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1]))]
        length = sum(int((((a == i) & (b == j)) | ((a == j) & (b == i))).sum()) for a, b in steps)
        parted = []
        for truth in maps.numpy():
            p, q = (truth[(labels == k) & (truth >= 0)] for k in (i, j))
            if len(p) and len(q):
                parted.append((p[:, None] != q).mean())
        if parted:
            want[min(9, int(chance * 10))] += length * np.array([1, chance, np.mean(parted)])
    assert np.allclose(table, want) and want[:, 0].sum() > 10
    nothing = scoring.border_table(grown, labels, torch.full_like(maps, -1), None)
    assert nothing.shape == (10, 3) and not nothing.any()


def test_joined_table():
    g = torch.Generator().manual_seed(0)
    cells, maps = torch.randint(0, 2, (3, 5, 4), generator=g), torch.randint(0, 2, (2, 5, 4), generator=g)
    maps[1, 0, 0] = -1
    expected = np.zeros((4, 3))
    for y, x, (dy, dx) in itertools.product(range(5), range(4), ((0, 1), (1, 0))):
        if y + dy < 5 and x + dx < 4 and (y, x) != (0, 0):
            s, t = (sum(bool(m[y, x] == m[y + dy, x + dx]) for m in several) for several in (cells, maps))
            expected[s] += [1, s / 3, t / 2]
    assert np.allclose(scoring.joined_table(cells, maps), expected)


def test_maps_at_their_own_size(tmp_path):
    rng = np.random.default_rng(0)
    several = [rng.integers(0, 9, (30, 20)) for _ in range(2)]
    folder(tmp_path, {"a": several, "b": several[:1]})
    files = data.originals(str(tmp_path), "val", "data")
    a, b = (files[i] for i in data.load(str(tmp_path), "val", 16, cache=tmp_path / "cache").items)
    assert len(files) == 2 and a.image.endswith("a.png") and np.array_equal(scoring.own_maps(a, "segment"),
                                                                            several)
    assert np.array_equal(scoring.own_maps(b, "ignore")[0], np.where(several[0] == 0, -1, several[0]))


def test_clicks_are_tables_of_every_method(ckpt, tmp_path, capsys):
    d = folder(tmp_path / "d", {f"i{k}": [thirds(24, 32), halves(24, 32)][: k + 1] for k in range(2)})
    words = ["--ckpt", str(ckpt), "--dataset", str(d), "--n", "2", "--device", "cpu", "--cache",
             str(tmp_path / "cache")]
    assert evaluation.main([*words, "--clicks", "0,2,all"]) == 0
    out = capsys.readouterr().out.splitlines()
    report = json.loads(out[-1])
    assert (report["images"], report["n"]) == (2, 2) and report["clicks"]["open"].keys() == {"0", "2", "all"}
    for name in ("closed", "nearest click", "watershed, Lab", "watershed, samples", "random walker"):
        by = report["clicks"][name]
        assert by.keys() == {"2", "all"} and by["2"]["pred"] == [2, 2, 2]  # two clicks, two segments
        mean, low, high = by["all"]["ari"]
        assert low <= mean <= high and any(line.startswith(name) for line in out)
    assert report["clicks"]["closed"]["all"]["pred"][0] == pytest.approx((9 + 5.5) / 2)
    # noise has no borders; objects are of half the photo or a ninth
    assert evaluation.main([*words, "--clicks_to", "0.6", "--limit", "3"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["clicks_to"].keys() == {"tree", "watershed, Lab", "watershed, samples", "nearest click"}
    assert all(1 <= low <= mean <= high <= 20 for mean, low, high in report["clicks_to"].values())
    # of classes, connected parts: here one class in four places, of which each is an object of its own
    classes = np.kron([[1, 0, 1], [0, 0, 0], [1, 0, 1]], np.ones((8, 8), int))
    words[3] = str(folder(tmp_path / "e", {"a": [classes]}))
    for more, objects in (([], 1), (["--components"], 4)):
        assert evaluation.main([*words, "--clicks_to", "0.3", *more]) == 0
        assert f"of {objects} objects" in capsys.readouterr().out
    words[3] = str(folder(tmp_path / "f", {"a": [0 * classes]}))
    assert evaluation.main([*words, "--clicks_to", "0.3"]) == 2
    assert "there is no object to click at" in capsys.readouterr().err
    assert evaluation.main(["--ckpt", str(ckpt), "--clicks_to", "0.85", "--device", "cpu"]) == 2
    assert "--clicks_to needs a data set of files" in capsys.readouterr().err


def test_files_of_others_stay(ckpt, tmp_path, capsys):
    (tmp_path / "images.csv").write_text("mine")
    assert evaluation.main(["--ckpt", str(ckpt), "--limit", "1", "--device", "cpu", "--out",
                            str(tmp_path)]) == 2
    assert "images.csv was not written by eval.py" in capsys.readouterr().err
    assert (tmp_path / "images.csv").read_text() == "mine"
    (tmp_path / "images.csv").rename(tmp_path / "examples.png")
    assert evaluation.main(["--ckpt", str(ckpt), "--limit", "1", "--device", "cpu", "--out",
                            str(tmp_path)]) == 2
    (tmp_path / "examples.png").unlink(), (tmp_path / "images.csv").touch()  # ours, of a full disk
    assert evaluation.main(["--ckpt", str(ckpt), "--limit", "1", "--device", "cpu", "--out",
                            str(tmp_path)]) == 0


def test_pooled_quality_and_missing_humans():
    rows = [{"network": {"sample": dict(ari=0.5, overlap=1.5, matched=2.0, pred=4.0, true=2.0)}},
            {"network": {"sample": dict(ari=1.0, overlap=0.0, matched=0.0, pred=1.0, true=3.0), "human": dict(
                ari=0.25, overlap=1.0, matched=1.0, pred=1.0, true=1.0)}}]
    for row in rows:
        for s in row["network"].values():
            s.update({key: 0.0 for key in evaluation.ROWS if key not in s and key not in ("pq", "sq", "rq")})
    s = evaluation.summary(rows, "network")
    assert s["sample"]["pq"][0] == pytest.approx(1.5 / (3 + 2))
    assert s["sample"]["sq"][0] == 0.75 and s["sample"]["ari"][0] == 0.75
    assert s["human"]["ari"] == (0.25, 0.25, 0.25) and list(s["sample"]) == list(evaluation.ROWS)


def test_the_name_of_a_data_set_carries_its_options(tmp_path, capsys):
    """Classes in four places, and background: only as connected parts, without id 0, is it the grid's
    picture."""
    classes = np.kron([[1, 0, 1], [0, 2, 0], [2, 0, 1]], np.ones((16, 16), int))
    d = folder(tmp_path / "d", {"a": [classes]})
    scores = []
    for options in ([d], [f"{d}:components:ignore"], [d, "--components", "--unlabelled", "ignore"]):
        _, report = run(capsys, tmp_path, "--baseline", "grid", "--size", 48, "--dataset", *options)
        scores.append(report["network"]["grid"]["ari"][0])
    assert scores[0] < 0.9 and scores[1] == scores[2] == 1


def test_a_data_set_is_read_as_in_training_unless_the_command_line_says_otherwise(ckpt, tmp_path, capsys):
    classes = np.kron([[1, 0, 1], [0, 2, 0], [2, 0, 1]], np.ones((16, 16), int))
    d, content = folder(tmp_path / "d", {"a": [classes]}), read(ckpt)
    texts = [str(d), f"shapes:2,{tmp_path}/x/../d:3:components:ignore"]
    for dataset, more in zip(texts, (dict(components=True, unlabelled="ignore"), {})):
        content["config"].update(dict(dataset=dataset, components=False, unlabelled="segment"), **more)
        save_checkpoint(tmp_path / "ckpt.pt", content)
        found = []
        for options in ([], ["--no-components"], ["--unlabelled", "segment"], ["--void", "0,1"]):
            given = ["--ckpt", tmp_path / "ckpt.pt", "--dataset", d, "--n", 1, *options]
            found.append(run(capsys, tmp_path, *given)[1]["network"]["sample"]["true"][0])
        assert found == [5, 2, 6, 2]  # parts of classes 1 and 2; the two; with id 0, one segment; of class 2


def test_shared_rows_without_torchrun():
    rows = [{"position": 1}, {"position": 0}]
    assert evaluation.shared(rows) is rows


def test_clicks_are_for_one_process(monkeypatch, capsys):
    """Several would each do all of the work."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluation.main(["--clicks", "2"]) == 2
    assert "start eval.py without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    ("--ckpt nowhere.pt", "nowhere.pt"), ("--baseline grid --dataset nowhere", "nowhere"),
    ("--baseline grid --limit 0", "--limit"),
    ("--baseline grid --dataset a:2,shapes", "names 2 data sets"),
    ("--baseline grid --ckpt nowhere.pt", "--ckpt is a checkpoint's"), ("--baseline grid --n 2", "--n is"),
    ("--dataset a:components --no-components", "--dataset and --components contradict each other"),
    ("--clicks 2 --guidance 0,8", "one value of each option"), ("--clicks 2 --size 64", "and no --size"),
    ("--n 0", "'0' is not a number from 1 up"), ("--steps 4,x", "'4,x'"), ("--guidance -1", "-1"),
    ("--sampler euler", "'euler'"),
    ("--guidance 1,nan", "nan"), ("--seed 1000000", "--seed"),
    ("--clicks 0,1 --baseline grid", "leave out --baseline"), ("--clicks few", "'few'"),
    ("--at_once", "--at_once goes with --clicks or --clicks_to"),
    ("--clicks_to 0.85 --out o", "leave out"), ("--clicks_to 1.5", "--clicks_to must be above 0"),
    ("--merge nan", "--merge"),
    ("--variance tiny", "'tiny'"), ("--baseline human --limit 2 --out o", "several annotators"),
    ("--baseline grid --dataset shapes --device cuda:99", "cuda:99")])
def test_wrong_use(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = evaluation.main(arguments.split())
    except SystemExit as e:  # argparse's own
        status = e.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()  # nothing is left behind


def test_raw_weights(ckpt, tmp_path, capsys):
    """--raw takes the last weights; a file made by --export has only the averaged ones."""
    assert train.main(["--export", str(tmp_path / "model.pt"), "--out", str(ckpt.parent)]) == 0
    few = ("--limit", 2, "--steps", 1)
    averaged, exported, raw = (run(capsys, tmp_path, "--ckpt", path, *few, *more)[1]["sweep"] for path,
                               more in (
        (ckpt, ()), (tmp_path / "model.pt", ()), (ckpt, ("--raw",))))
    assert averaged == exported and raw != averaged
    assert evaluation.main(["--ckpt", str(tmp_path / "model.pt"), "--raw", "--device", "cpu", "--out",
                            str(tmp_path / "o")]) == 2
    assert "averaged weights only" in capsys.readouterr().err


def test_every_image_is_an_example_once():
    rows = [dict(name=k, network=dict(answer=dict(ari=v))) for k, v in enumerate((0.2, 0.9, 0.5, 0.1, 0.7))]
    for n, kinds in ((1, ["best"]), (2, ["best"] * 2), (3, ["best", "best", "worst"]),
                     (5, ["best", "best", "median", "worst", "worst"])):
        shown = evaluation.examples(rows[:n], "answer")
        assert [kind for kind, _ in shown] == kinds and len({row["name"] for _, row in shown}) == n
        scores = [row["network"]["answer"]["ari"] for _, row in shown]
        assert scores == sorted(scores, reverse=True)
