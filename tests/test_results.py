"""sample.py's results: all old or all new, an image's fault is its own, what is sampled is written."""

import errno
import itertools
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import eval as evaluation
import sample
import train
from answers import segment as answers
from answers.pictures import overlaid, overlay
from answers.segment import coco_segments, segment
from metrics import pairwise


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """sample.py's command line with this network, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: model)
    (tmp_path / "x.pt").write_text("weights")

    def go(*arguments):
        try:
            return sample.main(["--ckpt", "x.pt", "--device", "cpu", *map(str, arguments)])
        except SystemExit as e:
            return e.code
    return go


def picture(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def is_whole(folder):
    """Asserts that a folder holds one set, as its segments.json lists it; -> its seed."""
    content = json.loads((folder / "segments.json").read_text())
    for name, size in content["info"]["files"].items():
        path = folder.parent / "panoptic" / f"{folder.name}.png" if name == "panoptic.png" else folder / name
        assert path.stat().st_size == size, name
    there = {p.name for p in folder.iterdir()} - {"segments.json", "notes.txt"}
    assert there <= content["info"]["files"].keys()
    assert content["info"]["n"] == len(list(folder.glob("labels_*.png")))
    return content["info"]["seed"]


# ---- old or new


@pytest.mark.parametrize("at", [0, 1, 4, 6, "json"])
def test_a_full_disk_leaves_what_was_there(run, monkeypatch, capsys, at):
    """Whichever file it is that does not fit any more."""
    picture().save("a.png")
    assert run("a.png", "--n", 2) == 0
    before, count = contents("samples"), []
    where, name = (Path, "write_text") if at == "json" else (Image.Image, "save")
    write = getattr(where, name)

    def full(*args, **options):
        count.append(1)
        if at == "json" or len(count) > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **options)

    monkeypatch.setattr(where, name, full)
    assert run("a.png", "--n", 2, "--seed", 3) == 2
    err = capsys.readouterr().err
    assert "a.png: nothing is written to samples/a" in err and "No space left" in err and "there stays" in err
    assert contents("samples") == before
    monkeypatch.setattr(where, name, write)
    assert run("a.png", "--n", 2, "--seed", 3) == 0 and is_whole(Path("samples/a")) == 3


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("calls", range(8))
def test_a_kill_while_folders_change_places_leaves_one_whole_set(run, tmp_path, calls, old):
    """The process ends at the first, second, ... change of a name; the next one finds one set, and notes."""
    picture().save("a.png")
    words = ("a.png", "--n", 1, "--format", "coco_panoptic")
    if old:
        assert run(*words) == 0
        Path("samples/a/notes.txt").write_text("mine")
    child = os.fork()
    if child == 0:
        left = [calls]

        def dying(function):
            def call(*args, **options):
                left[0] -= 1
                return os._exit(9) if left[0] < 0 else function(*args, **options)
            return call

        for name in ("rename", "replace", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
        sample.main([*map(str, words), "--seed", "1", "--ckpt", "x.pt", "--device", "cpu"])
        os._exit(0)
    os.waitpid(child, 0)
    folder = tmp_path / "samples/a"
    for place in (folder, folder.with_name(".a.old"), folder.with_name(".a.new")):
        if (place / "segments.json").exists():
            break
    else:
        assert not old
    sample.swap(folder)
    if folder.exists():
        assert is_whole(folder) in (0, 1)
    assert not old or (folder / "notes.txt").read_text() == "mine"
    assert run(*words, "--seed", 1, "--resume") == 0 and is_whole(folder) == 1
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"a", "panoptic", "panoptic.json"}


def test_files_of_others_stay_when_folders_change_places(run):
    picture().save("a.png")
    Path("samples/a/more").mkdir(parents=True)
    Path("samples/a/more/notes.txt").write_text("mine"), Path("samples/a/list.json").write_text("[]")
    for n in (3, 1):
        if n == 1:  # copies of what was written, kept by other names
            copies = {"answer_3.png": "answer.png", "3.json": "segments.json", "my_00.png": "labels_00.png"}
            for copy, name in copies.items():
                shutil.copy(f"samples/a/{name}", f"samples/a/{copy}")
        assert run("a.png", "--n", n) == 0
        assert len(list(Path("samples/a").glob("labels_*.png"))) == n
    assert Path("samples/a/more/notes.txt").read_text() == "mine"
    assert Path("samples/a/list.json").read_text() == "[]"
    assert all(Path("samples/a", copy).exists() for copy in copies)


def test_resume_counts_on_nothing_that_is_not_there(run, capsys):
    picture().save("a.png")
    words = ("a.png", "--n", 2, "--resume", "--format", "coco_panoptic")
    assert run(*words) == 0 and run(*words) == 0 and "done already" in capsys.readouterr().out
    names = ("a/labels_01.png", "a/overlay_00.png", "a/panel.png", "a/answer.png", "a/answer_overlay.png",
             "a/uncertainty.png", "a/segments.json", "panoptic/a.png")
    info = json.loads(Path("samples/a/segments.json").read_text())["info"]
    del info["files"]
    assert sample.done(Path("samples/a"), info)
    for name in names:
        path = Path("samples", name)
        content = path.read_bytes()
        for kept in 0, -1:  # by a crash of the machine
            path.write_bytes(content[:kept])
            assert not sample.done(Path("samples/a"), info), name
        path.unlink()
        assert run(*words) == 0 and "a.png ->" in capsys.readouterr().out and path.stat().st_size > 0, name
        assert is_whole(Path("samples/a")) == 0


# ---- one image among several


@pytest.mark.parametrize("where, error", [
    ("read_image", KeyError("Orientation")), ("prepare", MemoryError()), ("summarise", OSError("no answer")),
    *itertools.product(("denoise", "write"), (KeyError("x"), MemoryError(), OSError(5, "no answer")))])
def test_whatever_is_raised_for_one_image_is_its_own_fault(run, model, monkeypatch, capsys, where, error):
    """In a batch, too: the one at fault is named, the others are done."""
    for k, name in enumerate("abc"):
        picture(20, 20 + 2 * k).save(f"{name}.png")
    target = answers if where == "denoise" else sample
    function = getattr(target, "sample" if where == "denoise" else where)
    of_b = {"read_image": lambda path: "b.png" in str(path),
            "prepare": lambda image, *_, **__: image.size == (20, 22),
            "denoise": lambda *_, seeds, **__: 2 in seeds,  # its seeds are 2 and 3
            "summarise": lambda job, image, *_: image.size == (20, 22),
            "write": lambda folder, result, *_: result.image.size == (20, 22)}

    def faulty(*args, **options):
        if of_b[where](*args, **options):
            raise error
        return function(*args, **options)

    monkeypatch.setattr(target, "sample" if where == "denoise" else where, faulty)
    if where == "denoise":  # every image has seeds of its own
        prepare, seeds = sample.prepare, iter((0, 2, 4))
        monkeypatch.setattr(sample, "prepare", lambda *args, **_: prepare(*args, seed=next(seeds)))
    assert run("a.png", "b.png", "c.png", "--n", 2, "--batch", 6) == 2
    err = capsys.readouterr().err
    assert "sample.py: b.png: " in err and "1 of 3 images failed" in err and "Traceback" not in err
    assert {p.name for p in Path("samples").iterdir()} == {"a", "c"}


def test_what_is_sampled_before_memory_ends_is_written(run, monkeypatch, capsys):
    picture().save("a.png")
    function, count = answers.sample, []

    def full(*args, **options):
        count.append(1)
        if len(count) in (4, 8):  # and again, alone
            raise RuntimeError("out of memory")
        return function(*args, **options)

    monkeypatch.setattr(answers, "sample", full)
    assert run("a.png", "--n", 30) == 2
    captured = capsys.readouterr()
    assert "memory does not hold one sample" in captured.err and "3 samples" in captured.out
    assert len(list(Path("samples/a").glob("labels_*.png"))) == 3


def test_what_is_sampled_before_a_stop_is_written(run, monkeypatch, capsys):
    """And is done again with --resume, as it is less than was asked for; images after it are not begun."""
    for name in "ab":
        picture().save(f"{name}.png")
    function, count = answers.sample, []

    def stopped(*args, **options):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        return function(*args, **options)

    monkeypatch.setattr(answers, "sample", stopped)
    words = ("a.png", "b.png", "c.png", "--n", 5, "--format", "coco_panoptic")
    assert run(*words) == 130
    assert "with --resume goes on" in capsys.readouterr().err
    labels = {name: len(list(Path("samples", name).glob("labels_*.png"))) for name in "ab"}
    assert labels == {"a": 5, "b": 2} and is_whole(Path("samples/b")) == 0
    images = json.loads(Path("samples/panoptic.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "b.png"]
    picture().save("c.png")
    assert run(*words, "--resume") == 0
    out = capsys.readouterr().out
    assert "a.png: done already" in out and "b.png ->" in out and "c.png ->" in out
    assert len(list(Path("samples/b").glob("labels_*.png"))) == 5


@pytest.mark.parametrize("tiles, samples", [(1, 3), (2, 3 + 4 * 2)])
def test_one_photo_shows_its_samples_and_steps(run, monkeypatch, capsys, tiles, samples):
    seen = []

    class Bar(sample.tqdm):
        def update(self, n=1):
            seen.append((self.n + n, self.total, self.postfix))
            return super().update(n)

    monkeypatch.setattr(sample, "tqdm", Bar)
    picture().save("a.png")
    assert run("a.png", "--n", 3, "--steps", 4, "--tiles", tiles, "--batch", 1) == 0
    steps = 4 * samples
    assert [n for n, _, _ in seen] == list(range(1, steps + 1)) and {t for _, t, _ in seen} == {steps}
    words = [f"a.png: sample {j + 1} of {samples}" for j in range(samples)]
    assert [text for _, _, text in seen[::4]] == words


# ---- options


def test_points_add_up(run):
    picture().save("a.png")
    given = []
    for words in (["--points", "10,10 12,10", "--points", "30,20"], ["--points", "10,10 12,10;30,20"]):
        assert run("a.png", "--n", 1, *words) == 0
        given.append(Path("samples/a/answer.png").read_bytes())
        info = json.loads(Path("samples/a/segments.json").read_text())["info"]
        assert info["points"] == "10,10 12,10;30,20"
    assert given[0] == given[1]


def test_two_dashes_end_the_options(run):
    picture().save("-a.png"), picture().save("b.png")
    assert run("b.png", "--n", 1, "--", "-a.png") == 0
    assert {p.name for p in Path("samples").iterdir()} == {"-a", "b"}


@pytest.mark.parametrize("words", [
    ["--n", "9" * 12], ["--steps", "9" * 12], ["--batch", "9" * 12], ["--guidance", "1e30"],
    ["--smooth", "1e30"], ["--least", "9" * 30], ["--merge", "1e300"], ["--grain", "²"],
    ["--strength", "nan"], ["--points", "1e999,0"], ["--points", ""], ["--points", " ; "],
    ["--box", "nan,0,9,9"], ["--hint", "m.png", "--hint", "m.png"], ["--init", "m.png", "--init", "m.png"],
    ["--device", "cuda:-1"], ["--seed", "-1"]])
def test_numbers_out_of_range_get_one_sentence(run, capsys, words):
    picture().save("a.png"), Image.new("L", (40, 30), 1).save("m.png")
    assert run("a.png", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("sample.py: ") and err.count("\n") == 1


def test_folders_within_a_folder_and_long_pictures_are_told(run):
    Path("d/within").mkdir(parents=True), Path("e/none").mkdir(parents=True)
    for path in ("d/a.png", "d/within/b.png", "e/a.png"):
        picture().save(path)
    with pytest.warns(UserWarning, match="d: images in folders within it are left out: .*d/[*]/"):
        assert [p.name for p in sample.find_images(["d"])] == ["a.png"]
    Path("e/result").mkdir(), picture().save("e/result/answer.png"), Path("e/result/segments.json").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sample.find_images(["e", "d/within"])) == 2
    picture(400, 20).save("long.png"), picture(80, 20).save("four.png")
    with pytest.warns(UserWarning, match="long.png: its short side is seen at .* pixels") as told:
        assert run("long.png", "four.png", "--n", 1) == 0
    assert len(told) == 1


def test_no_image_gets_one_sentence(run, capsys):
    assert run("--n", 1) == 2
    assert capsys.readouterr().err == "sample.py: no image is named: python sample.py photo.jpg\n"


# ---- large photos, piece by piece


@pytest.mark.parametrize("width, height", [(1, 1), (7, 300), (1500, 70), (90, 64), (40, 129)])
def test_strips_make_the_same_overlay(width, height):
    image = picture(width, height)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 9, (height // 9 + 1, width // 9 + 1)))
    labels = labels.repeat_interleave(9, 0).repeat_interleave(9, 1)[:height, :width]
    assert (np.asarray(overlaid(image, labels, 3)) == overlay(image, labels, 3)).all()


def test_samples_one_after_the_other_are_all_at_once(model):
    result = segment(picture(90, 64), model, n=4)
    one_by_one = torch.stack(list(result.enlarged()))
    assert one_by_one.shape == (4, 64, 90) and torch.equal(one_by_one, result.labels)
    small = next(result.enlarged(picture(30, 20)))
    assert small.shape == (20, 30)


def test_agreement_is_the_mean_of_pairs():
    cells = torch.randint(0, 4, (6, 5, 7), generator=torch.Generator().manual_seed(0))
    every = pairwise(cells)[0]
    torch.testing.assert_close(answers.agreement(cells), (every.sum(1) - 1) / 5)
    assert answers.agreement(cells[:1]).isnan().all()


@pytest.mark.parametrize("height, width, ids", [(1, 1, 1), (1, 9, 3), (8, 1, 2), (13, 17, 5), (40, 30, 300)])
def test_segments_in_one_pass_are_pycocotools_own(height, width, ids):
    labels = np.random.default_rng(0).integers(0, ids, (height, width))
    found = coco_segments(labels, dict.fromkeys(range(ids), 0.5))
    assert [s["id"] for s in found] == [v + 1 for v in np.unique(labels).tolist()]
    for s in found:
        rle = coco_mask.encode(np.asfortranarray(labels == s["id"] - 1).view(np.uint8))
        assert s["segmentation"] == dict(size=rle["size"], counts=rle["counts"].decode())
        assert s["area"] == (labels == s["id"] - 1).sum() and s["bbox"] == coco_mask.toBbox(rle).tolist()


def test_uncertainty_is_shown_at_512_pixels(model):
    result = segment(picture(1100, 300), model, n=2)
    assert result.boundary.shape == result.entropy.shape == (140, 512)
    assert result.answer.labels.shape == (300, 1100)


# ---- eval.py's files


def test_a_full_disk_leaves_an_evaluation_that_was_there(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--baseline", "grid", "--device", "cpu", "--out", "o", "--size", "32", "--limit"]
    assert evaluation.main([*words, "3"]) == 0
    before = contents("o")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    capsys.readouterr()
    assert evaluation.main([*words, "2"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["images"] == 2 and "there stays" in captured.err
    assert contents("o") == before
    monkeypatch.undo()


@pytest.mark.parametrize("out", ["a.png", "a.png/below"])
def test_an_out_that_cannot_be_a_folder_gets_one_sentence(run, capsys, out):
    picture().save("a.png")
    assert run("a.png", "--out", out) == 2
    assert train.main(["--max_steps", "1", "--image_size", "16", "--bits", "2", "--out", out]) == 2
    assert evaluation.main(["--baseline", "grid", "--limit", "1", "--out", out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["sample.py", "train.py", "eval.py"]
    assert all(f" {out}: no folder can be made there (" in line and line.endswith("choose another --out")
               for line in lines)
