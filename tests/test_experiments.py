"""experiments.py: its table against train.py's options; missing runs are made, finished ones kept, killed
ones resumed."""

import json
import statistics

import pytest

import experiments
import train
from bits import Codec
from diffusion import Diffusion


def arguments(*words, preset="tiny", out="out"):
    return [*words, "--preset", preset, "--out", str(out), "--device", "cpu"]


@pytest.mark.parametrize("preset", list(experiments.BUDGET))
def test_every_run_is_one_that_train_understands(preset):
    """Every option that makes a result is given, so that train.py's presets have no say."""
    a = type("A", (), dict(preset=preset, dataset="shapes", out="o", root="r", cache="c", device="cpu"))
    for name, rows in experiments.EXPERIMENTS.items():
        seen = set()
        for label, flags, _, _ in rows:
            folder, full = experiments.run_of(flags, {}, a, 1)
            c = train.parse(experiments.train_arguments(folder, full, a))
            Codec(c.encoding, c.bits, c.palette, c.seed, c.activation)
            Diffusion(prediction=c.prediction, weighting=c.weighting, input_scale=c.input_scale, bias=c.bias,
                      schedule=c.schedule)
            assert (c.weighting == "sigmoid") == c.logsnr_space and c.seed == 1 and c.preset == preset
            assert set(train.PRESETS[preset]) - {"log_every"} <= set(full)
            seen.add(str(folder))
        assert len(seen) == len(rows), name  # no two rows are the same run


def test_options_of_train_are_spelt_as_there():
    a, rest = experiments.arguments(["palette", "--components", "--max-bad=0.5", "--lr", "1e-3"])
    assert experiments.options(rest) == dict(components="true", max_bad="0.5", lr="1e-3")


def test_equal_runs_are_one_folder():
    a = type("A", (), dict(preset="tiny", dataset="x/bsds500", out="o"))
    of = {label: experiments.run_of(flags, {}, a, 0)[0] for label, flags, _, _ in
          experiments.EXPERIMENTS["palette"] + experiments.EXPERIMENTS["encoding"]}
    assert of["similar (2D Gray)"] == of["bits, palette"] and of["none"] == of["bits, no palette"]
    assert of["none"].name == "bsds500_palette-none_seed-0"
    assert experiments.run_of("", {"lr": "1e-3"}, a, 0)[0].name == "bsds500_lr-1e-3_seed-0"


def test_the_papers_figures():
    """Tables 1 and 3: what SPEC.md, section 10, says."""
    table = {label: (ari, iou) for name in ("palette", "encoding") for label, _, ari,
             iou in experiments.EXPERIMENTS[name]}
    assert [table[k] for k in ("none", "different", "random", "similar (2D Gray)")] == [
        (0.517, 0.367), (0.640, 0.422), (0.644, 0.421), (0.670, 0.434)]
    assert [table[f"{k}, no palette"] for k in ("onehot", "rgb", "bits")] == [(0.168, 0.186), (0.460, 0.283),
                                                                              (0.515, 0.368)]
    assert [table[f"{k}, palette"] for k in ("onehot", "rgb", "bits")] == [(0.528, 0.323), (0.524, 0.312),
                                                                           (0.670, 0.432)]


@pytest.fixture
def fake(monkeypatch):
    """train.py and eval.py that only note what they are asked; a seed's ARI is seed / 10. fake.stop: exit
    status, once."""
    class Fake:
        trained, stop = [], 0

    def train_main(argv):
        given = dict(zip(argv[::2], argv[1::2]))
        Fake.trained.append(given["--out"].rsplit("/", 1)[-1])
        status, Fake.stop = Fake.stop, 0
        return status

    def eval_main(argv):
        given = dict(zip(argv[::2], argv[1::2]))
        seed = int(given["--ckpt"].split("seed-")[1].split("/")[0])
        Fake.evaluated.append(argv)
        from pathlib import Path
        Path(given["--out"]).mkdir()
        (Path(given["--out"]) / "report.json").write_text(json.dumps(
            {"ari": 9, "iou": 9, "network": {"sample": {"ari": [seed / 10, 0, 1], "iou": [0.5, 0, 1],
                                                        "pred": [7.0, 6, 8]}, "answer": {}}}))
        return 0

    Fake.trained, Fake.evaluated = [], []
    monkeypatch.setattr(experiments.train, "main", train_main)
    monkeypatch.setattr(experiments.evaluation, "main", eval_main)
    return Fake


def test_missing_runs_only_and_going_on_after_a_kill(fake, tmp_path, capsys):
    fake.stop = 130  # Ctrl-C in the first run
    assert experiments.main(arguments("palette", out=tmp_path)) == 130
    assert len(fake.trained) == 1 and "the same command goes on" in capsys.readouterr().err
    assert experiments.main(arguments("palette", out=tmp_path)) == 0
    assert len(fake.trained) == 5 and fake.trained[0] == fake.trained[1]
    assert experiments.main(arguments("palette", "encoding", "--seeds", "2", out=tmp_path)) == 0
    assert len(fake.trained) == 5 + 4 + 4 * 2  # seed 1 of palette; encoding has 4 more rows
    assert len(set(fake.trained)) == len(fake.trained) - 1
    capsys.readouterr()
    assert experiments.main(arguments("encoding", "--list", "--seeds", "3", out=tmp_path)) == 0
    text = capsys.readouterr().out
    assert len(fake.trained) == 17
    assert "18 runs, 6 of them missing" in text and text.count("python train.py") == 6
    forms = {t.split("--precision ")[1].split("--dataset")[0] for t in text.splitlines() if "train.py" in t}
    assert len(forms) == 1 and " --layout nchw" in forms.pop()  # no run measures its form for itself
    line = next(t for t in text.splitlines() if t.startswith("  bits, palette"))
    mean, std = statistics.mean([0, 0.1]), statistics.stdev([0, 0.1])
    assert f"{mean:.3f} +- {std:.3f}" in line and "0.500 +- 0.000" in line and line.split()[-2:] == ["0.670",
                                                                                                     "0.432"]
    last = json.loads(text.splitlines()[-1])
    assert last["experiments"]["encoding"]["bits, palette"] == {"ari": [0.0, 0.1], "iou": [0.5, 0.5],
                                                                "paper": [0.67, 0.432]}


@pytest.mark.parametrize("names, more, words", [
    ("classes", ["--bits", "6"], "--bits is what rows of classes differ in"),
    ("loss", ["--loss", "bce"], "--loss is what rows of loss"),
    ("palette", ["--seed", "3"], "--seed is each run's own")])
def test_no_option_takes_the_place_of_a_rows_own(fake, tmp_path, capsys, names, more, words):
    assert experiments.main(arguments(names, *more, out=tmp_path)) == 2 and not fake.trained
    assert words in capsys.readouterr().err


def test_two_parts_share_the_runs(fake, tmp_path):
    assert experiments.main(arguments("input_scale", "--list", "--part", "1/2",
                                      out=tmp_path)) == 0 and not fake.trained
    runs = [experiments.run_of(flags, {}, type("A", (), dict(preset="tiny", dataset="shapes", out=tmp_path)),
                               0)[0].name
            for _, flags, _, _ in experiments.EXPERIMENTS["input_scale"]]
    experiments.main(arguments("input_scale", "--part", "2/2", out=tmp_path))
    assert fake.trained == runs[1::2]
    experiments.main(arguments("input_scale", "--part", "1/2", out=tmp_path))  # though fewer are missing now
    assert fake.trained == runs[1::2] + runs[::2]


def test_some_rows_only(fake, tmp_path, capsys):
    assert experiments.main(arguments("weighting", "--rows", "sigmoid,uniform", out=tmp_path)) == 0
    text = capsys.readouterr().out
    assert len(fake.trained) == 6 and "eps, uniform" in text and "snr" not in text.split("weighting  ")[1]


def test_a_finished_run_with_other_options_is_not_taken_for_this_one(fake, tmp_path, capsys, monkeypatch):
    experiments.main(arguments("tanh", out=tmp_path))
    monkeypatch.setitem(experiments.BUDGET, "tiny", experiments.BUDGET["tiny"].replace("2e-3", "5e-3"))
    assert experiments.main(arguments("tanh", out=tmp_path)) == 2
    assert "lr 2e-3 -> 5e-3" in capsys.readouterr().err
    assert experiments.main(arguments("palette", out=tmp_path / "b")) == 0  # named sets lie elsewhere
    assert experiments.main(arguments("palette", "--root", "other", out=tmp_path / "b")) == 2
    assert "root data -> other" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (("palette", "--palet", "none"), "did you mean --palette"), (("palette", "--lr"), "--lr needs a value"),
    (("palette", "--part", "3/2"), "--part"),
    (("palette", "--seeds", "0"), "--seeds"), (("palette", "--part", "x"), "--part"),
    (("nothing",), "invalid choice"),
    (("palette", "tanh", "--rows", "similar"), "no row of tanh")])
def test_wrong_use(words, message, tmp_path, capsys):
    try:
        status = experiments.main(arguments(*words, out=tmp_path))
    except SystemExit as e:
        status = e.code
    assert status == 2 and message in capsys.readouterr().err


def test_one_real_run(tmp_path, capsys):
    given = arguments("tanh", "--limit", "2", "--cache", str(tmp_path / "cache"), "--max_steps", "1",
                      "--image_size", "16", "--batch_size", "2",
                      "--eval_images", "1", "--steps", "1", out=tmp_path)
    assert experiments.main(given) == 0
    first = capsys.readouterr().out
    reports = sorted(tmp_path.glob("tiny/*/report.json"))
    assert len(reports) == 2 and all((r.parent / "eval.txt").read_text().count("ARI") >= 2 for r in reports)
    assert experiments.main(given) == 0
    # the same table without training
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]


def test_the_evaluation_sees_the_labels_as_the_training_does(fake, tmp_path, capsys):
    labels = ["--components", "true", "--unlabelled", "ignore", "--void", "-1,255", "--max_bad", "0.5"]
    assert experiments.main([*arguments("palette", out=tmp_path), *labels]) == 0
    asked = [experiments.evaluation.arguments(argv) for argv in fake.evaluated]
    assert len(asked) == 4
    assert all((a.components, a.unlabelled, a.void, a.max_bad) == (True, "ignore", "-1,255", 0.5)
               for a in asked)
    report = next(tmp_path.glob("**/report.json"))
    report.write_text("{}")
    assert experiments.main([*arguments("palette", out=tmp_path), *labels]) == 2
    assert f"{report} was not written by experiments.py" in capsys.readouterr().err
    assert experiments.main(arguments("palette", "--dataset", "shapes:2,shapes", out=tmp_path)) == 2
    assert "--dataset names 2 data sets: one at a time is evaluated" in capsys.readouterr().err
