"""How good is a checkpoint, and does it know that people segment differently? Tables, pictures, and one JSON
line last.

    python eval.py --dataset path/to/folder --n 8                       # the newest checkpoint under out/
    python eval.py --ckpt out/shapes-tiny/ckpt.pt --n 1,2,4,8,16        # best of n, the joint answer of n
    python eval.py --steps 1,2,4,8,16,50 --guidance 0,1,2,3             # sweeps: a table
    python eval.py --clicks 0,1,2,4,8,16,all --dataset path/to/folder   # what do hints bring?
    python eval.py --clicks_to 0.85 --dataset path/to/folder            # how many does an object take?
    python eval.py --baseline grid --dataset path/to/folder --size 128  # what needs no training

Answers of an image: the first of n samples, and the joint answer of all n at three grains (coarse, normal:
`answer`, fine), at the network's resolution, at another (--size 128) and, where the label maps are files, at
the images' own. With several annotators every score is the mean over them, and every annotator is scored
against the others ("human"). Brackets: 95 % bootstrap interval over images. Into --out: images.csv (a row an
image), report.json, examples.png (best, median and worst images).

Sweeps: each setting of steps, guidance, sampler, variance and smooth is run with one sample an image; those
with the checkpoint's own (but any guidance; or the first given) with all n. All but the sweep's table is of
the checkpoint's own.
Baselines: grid (3 x 3 rectangles), kmeans (colour in Lab and position, 8 clusters), otsu (connected parts of
the foreground of Otsu's threshold), watershed (these cut by their distance transform), human (the annotators
only). AP at IoU 0.5: TP / (TP + FP + FN) of objects; id 0 and the largest predicted segment are background.
"""

import argparse
import csv
import functools
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

# options that make other results, and name the folder where they are not the default
NAMED = ("components", "unlabelled", "void", "size", "limit", "seed", "n", "steps", "guidance", "sampler",
         "variance", "smooth", "least", "merge", "tiles")


def number_list(text, kind, minimum):
    """'1,2,4' -> [1, 2, 4], each at least `minimum`. For argparse."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(minimum <= value <= 10**6 for value in values):  # nan is neither
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number from {minimum} up to 1000000, or several separated by commas")
    return list(dict.fromkeys(values))


def click_numbers(text):
    """'0,4,all' -> [0, 4, "all"]. For argparse."""
    return [k for part in text.split(",") for k in (["all"] if part == "all" else number_list(part, int, 0))]


def words(text):
    return list(dict.fromkeys(text.split(",")))


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = functools.partial(number_list, kind=int, minimum=1)
    real = functools.partial(number_list, kind=float, minimum=0)
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/, else weights/photo.pt)")
    p.add_argument("--raw", action="store_true", help="the network's last weights instead of their average")
    p.add_argument("--baseline", choices=["grid", "kmeans", "otsu", "watershed", "human"],
                   help="instead of a checkpoint")
    p.add_argument("--dataset", default="shapes", help="shapes, coco, or a folder (%(default)s)")
    p.add_argument("--split", default="val", help="its folder or list of that name (%(default)s)")
    p.add_argument("--components", action=argparse.BooleanOptionalAction,
                   help="label maps hold classes, whose connected parts are the segments (default of this "
                        "and the next two: as the checkpoint was trained on this data set)")
    p.add_argument("--unlabelled", choices=["segment", "ignore"], help="what id 0 is (else: segment)")
    p.add_argument("--void", help="ids that are ignored, e.g. 255 or 254,255 (else: none)")
    p.add_argument("--max_bad", "--max-bad", type=float, default=0.01,
                   help="share of unusable items that is too much (%(default)s)")
    p.add_argument("--size", type=int, help="longer side to score at: of a baseline (128), of a network "
                                            "besides its own")
    p.add_argument("--limit", type=int, default=256, help="at most so many images, or with --clicks_to "
                                                          "objects, drawn at random (%(default)s)")
    p.add_argument("--root", default="data", help="where named data sets lie (%(default)s)")
    p.add_argument("--cache", default="cache", help="of resized images; safe to delete (%(default)s)")
    p.add_argument("--out", help="where the files go (default: out/eval/<checkpoint>-<dataset>-<split>, and "
                                 "what else is not the default)")
    p.add_argument("--seed", type=int, default=0, help="sample j of image i has the seed (SEED 10^6 + i) "
                                                       "1000 + j (%(default)s)")
    p.add_argument("--n", type=whole, default=[1], help="samples an image, e.g. 8, or 1,2,4,8,16 (1)")
    p.add_argument("--clicks", type=click_numbers, help="instead: scores after so many clicks, e.g. "
                                                        "0,1,2,4,8,16,all")
    p.add_argument("--clicks_to", "--clicks-to", type=float,
                   help="instead: how many clicks an object takes until this IoU, e.g. 0.85")
    p.add_argument("--at_once", "--at-once", action="store_true",
                   help="with clicks: cut the samples of before, without sampling again, which is slow")
    p.add_argument("--steps", type=whole, help="denoising steps, e.g. 8, or 1,2,4,8,16")
    p.add_argument("--guidance", type=real, help="e.g. 1, or 0,1,2,3 (default: the checkpoint's, but at most "
                                                 "3 where it sees clicks)")
    p.add_argument("--sampler", type=words, help="ddpm, ddim, or several with commas")
    p.add_argument("--variance", type=words, help="of ddpm: large, small or large,small")
    p.add_argument("--smooth", type=real, help="e.g. 0.2, or 0,0.1,0.2,0.4")
    p.add_argument("--least", type=int, help="regions of fewer pixels, of the network's, join a neighbour "
                                             "first (default: the checkpoint's)")
    p.add_argument("--merge", type=float, help="as in sample.py (default: the checkpoint's; 0: samples as "
                                               "the network makes them)")
    p.add_argument("--tiles", help="as in sample.py; 1 where the data set has no files")
    p.add_argument("--batch", type=int, default=32, help="samples denoised at once (%(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    p.add_argument("--kernels", help="auto, triton or torch (default: BITSEG_KERNELS, or auto: Triton with "
                                     "CUDA)")
    p.error = lambda message: p.exit(2, f"eval.py: {message}\n")
    a = p.parse_args(argv)
    a.usual = {key: p.get_default(key) for key in NAMED}
    return a


if __name__ == "__main__":
    arguments(sys.argv[1:])  # before torch, whose import takes seconds: --help and mistakes end here

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, whose products are small here

import numpy as np
import torch
import torch.distributed as dist

import kernels
import metrics
from answers.checkpoints import load_checkpoint, newest_checkpoint, set_tidy
from answers.clicks import clicks_curve, clicks_needed
from answers.jobs import tiles_of
from answers.pictures import example_sheet
from answers.scoring import at_own_size, at_size_of, score_images
from answers.segment import sampling_of
from data import as_trained, load, originals, parse_parts, parse_void, selection
from diffusion import SAMPLERS, VARIANCES, WITHOUT_VARIANCE
from engine import crowded, foreign, host_threads, join_processes, make_folder, pick_device, program

ROWS = {"ari": "ARI", "iou": "IoU", "hiou": "hIoU", "pq": "PQ", "sq": "SQ", "rq": "RQ",
        "ap50": "AP at IoU 0.5", "covering": "covering", "pri": "PRI", "voi": "VoI (bits)",
        "boundary": "boundary F", "pred": "segments predicted", "true": "segments true"}
PUBLISHED = [  # covering, PRI, VoI on the BSDS500 test images, best single scale (Arbelaez et al. 2011)
    ("human", 0.72, 0.88, 1.17), ("gPb-owt-ucm", 0.59, 0.83, 1.69), ("mean shift", 0.54, 0.79, 1.85),
    ("Felzenszwalb-Huttenlocher", 0.52, 0.80, 2.21), ("normalised cuts", 0.45, 0.78, 2.23),
    ("quad-tree", 0.32, 0.73, 2.46)]


# ------------------------------------------------------------------------------------------------------------
# All images


def shared(rows):
    """The rows of all processes of torchrun, in order."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return sorted(itertools.chain(*parts), key=lambda row: row["position"])


def summary(rows, where):
    """{answer: {metric: (mean, low, high)}} over images; PQ, SQ and RQ of all images' segments together."""
    result = {}
    # "human" may not be in every row
    for answer in dict.fromkeys(name for row in rows for name in row[where]):
        scores = [row[where][answer] for row in rows if answer in row[where]]
        s = {key: np.array([of_image[key] for of_image in scores]) for key in scores[0]}
        value = {key: metrics.bootstrap(s[key]) for key in ROWS if key in s}
        value |= {key: metrics.bootstrap(*parts) for key, parts in metrics.quality(s).items()}
        if math.isnan(value.get("ap50", (math.nan,))[0]):  # no label map has an id 0
            value.pop("ap50", None)
        result[answer] = {key: value[key] for key in ROWS if key in value}
    return result


def print_summary(title, result):
    print(f"\n{title:<28}" + "".join(f"{answer:<24}" for answer in result))
    for key, name in ROWS.items():
        if not any(key in r for r in result.values()):
            continue
        digits = 1 if key in ("pred", "true") else 3
        cells = (f"{m:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for m, low,
                 high in (r.get(key, (math.nan,) * 3) for r in result.values()))
        print(f"  {name:<26}" + "".join(f"{cell:<24}" for cell in cells))


def sweep_table(sweep):
    """Print the table of the settings and return it as a list of {setting and n: ..., answer: [ARI, IoU]}."""
    print("\none: the mean of n samples; oracle: the best of n; answer: the joint one of n; gain: the share "
          "of (oracle - one) in ARI that it "
          f"realises\n{'':<43}{'ARI':<28}IoU\nsampler variance smooth steps guidance   n   one    oracle "
          f"answer  gain  one    oracle answer")
    table = []
    for setting, rows in sweep:
        for n in rows[0]["curve"]:
            mean = {key: np.nanmean([row["curve"][n][key] for row in rows],
                                    axis=0).tolist() for key in rows[0]["curve"][n]}
            one, oracle, answer = (v[0] for v in mean.values())
            gain = f"{(answer - one) / (oracle - one):.0%}" if oracle > one else "-"
            ari, iou = ("".join(f"{v[i]:<7.3f}" for v in mean.values()) for i in (0, 1))
            print(f"{setting['sampler']:<7} {setting['variance']:<8} {setting['smooth']:>6g} "
                  f"{setting['steps']:>5} {setting['guidance']:>8g} {n:>3}   {ari}{gain:>5}  {iou}")
            table.append({**setting, "n": n, **mean})
    return table


def print_clicks(curve, ks):
    """Tables of `clicks_curve`: ARI / IoU after so many clicks, with intervals of ARI; -> {method: {k:
    {metric: (mean, low, high)}}}."""
    print(f"{'ARI [95 %] / IoU':<20}" + "".join(f"k = {k:<26}" for k in ks))
    table = {}
    for method, by_clicks in curve.items():
        row, cells = {}, dict.fromkeys(ks, "-")
        for k, images in by_clicks.items():
            row[str(k)] = means = {key: metrics.bootstrap([scores[key] for scores in images])
                                   for key in ("ari", "iou", "covering", "voi", "pred")}
            cells[k] = "{:.3f} [{:.3f}, {:.3f}] / {:.3f}".format(*means["ari"], means["iou"][0])
        print(f"{method:<20}" + "".join(f"{cells[k]:<34}" for k in ks))
        table[method] = row
    return table


def report_clicks(a, model, data, positions, files, path, name):
    """What --clicks and --clicks_to print; 0, the exit status. Raises ValueError where they cannot be had."""
    asked, n = {"guidance": a.guidance[0]} if a.guidance else {}, a.n[0]
    asked["at_once"] = a.at_once
    about = dict(name=str(path)) | what_of(a, model) | sampling_of(model, True) | asked | dict(n=n)
    if a.clicks_to is None:
        curve = clicks_curve(model, data, positions, a.clicks, n, a.seed, a.batch, a.tiles, files, **asked)
        print(f"{name} on {a.dataset} {a.split}, {len(positions)} images, {n} samples: every annotator "
              f"clicks")
        print(json.dumps(dict(about, images=len(positions), clicks=print_clicks(curve, a.clicks))))
        return 0
    if not files:
        raise ValueError("--clicks_to needs a data set of files")
    counts, left_out = clicks_needed(model, data, files, a.clicks_to, objects=a.limit, n=n, seed=a.seed,
                                     batch=a.batch, tiles=a.tiles, components=a.components, **asked)
    print(f"{name} on {a.dataset} {a.split}, {n} samples: clicks until an object has IoU {a.clicks_to:g}, "
          f"at most 20; {left_out} objects left out (too small or too fine for the network's pixels)")
    needed = {method: metrics.bootstrap(values) for method, values in counts.items()}
    for method, (mean, low, high) in needed.items():
        in_time = np.mean(np.array(counts[method]) < 20)
        print(f"  {method:<20} {mean:.2f} [{low:.2f}, {high:.2f}], of {len(counts[method])} objects "
              f"{in_time:.0%} in fewer")
    print(json.dumps(dict(about, target=a.clicks_to, left_out=left_out, clicks_to=needed)))
    return 0


def reliability_tables(rows, n):
    """Print how samples and confidences compare with the annotators; -> what of it goes into the report."""
    result = {}
    if spread := [row["spread"] for row in rows if "spread" in row]:
        print(f"\n{n} samples and the annotators        energy distance          diversity of samples     "
              f"of annotators")
        for d in spread[0]:
            result[f"spread_{d}"] = values = [metrics.bootstrap([s[d][k] for s in spread]) for k in range(3)]
            print(f"  d = 1 - {d:<24}" + "".join(f"{f'{m:.3f} [{low:.3f}, {high:.3f}]':<25}" for m, low,
                                                 high in values))
    deciles = {low: [f"{low + (1 - low) * k / 10:.2f} - {low + (1 - low) * (k + 1) / 10:.2f}"
                     for k in range(10)] for low in (0.0, 0.5)}
    for key, bins, title in (
            ("bits", deciles[0.5], "bits (Eq. 3): share of them, and how many are right, by confidence"),
            ("segments", deciles[0.0], "segments: share of them, and of the annotators who drew them, by "
                                       "confidence"),
            ("borders", deciles[0.0], "borders: share of their length, and of the annotators who part the "
                                      "two, by confidence"),
            ("joined", [f"{k / n:.3f}" for k in range(n + 1)],
             "neighbouring pixels: share of samples that join them, share of such pairs, share of annotators "
             "that join them")):
        tables = [row[key] for row in rows if key in row]
        if not tables:
            continue
        table = sum(tables)
        result[f"{key}_ece"] = metrics.calibration_error(table)
        print(f"\n{title}")
        for label, (count, _, right) in zip(bins, table):
            if count:
                share = f"{count / table[:, 0].sum():>{'8.2%' if key == 'joined' else '7.1%'}}"
                print(f"  {label} {share} {right / count:>7.3f}")
        print(f"  expected calibration error: {result[f'{key}_ece']:.4f}")
    return result


def flat_rows(rows, places):
    """Rows of images.csv: an image each, with its scores at each of the places that it has."""
    return [{"name": row["name"], "annotators": row["annotators"], "position": row["position"]}
            | {f"{where}_{who}_{key}": v for where in places
               for who, scores in row.get(where, {}).items() for key, v in scores.items()}
            for row in rows]


def check_out(out):
    """Raises ValueError where a file of somebody else's would be overwritten."""
    table, report, picture = (out / name for name in ("images.csv", "report.json", "examples.png"))
    kept = [path for path, start in ((table, b"name,annotators"), (report, b'{"name": '))
            if foreign(path, start)]
    if picture.exists() and not table.exists():
        kept.append(picture)
    if kept:
        raise ValueError(f"{kept[0]} was not written by eval.py and is not overwritten: move it, or choose "
                         f"another --out")


def write(out, rows, pictures, line):
    """All files of an evaluation: made in a folder of their own, then put in the old ones' place. Raises
    OSError."""
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=out))  # another evaluation's has another name
    try:
        with open(new / "images.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        for name, draw in pictures.items():
            draw(new / name)
        (new / "report.json").write_text(line)
        for name in ("report.json", "examples.png"):
            (out / name).unlink(missing_ok=True)
        for name in ("images.csv", *pictures, "report.json"):
            os.replace(new / name, out / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check(a):
    """Make the options one data set's. Raises ValueError for what cannot be."""
    if a.limit < 1 or a.batch < 1 or not 8 <= (8 if a.size is None else a.size) <= 16384:
        raise ValueError(f"--limit and --batch must be at least 1 and --size 8, and this at most 16384, "
                         f"not {a.limit}, {a.batch} and {a.size}")
    tiles_of(a.tiles)
    if not 0 <= a.max_bad <= 1:
        raise ValueError(f"--max_bad is a share, from 0 to 1, not {a.max_bad}")
    if not 0 <= a.seed < 10**6:
        raise ValueError(f"--seed must be from 0 to 999999, not {a.seed}")
    for name, choices in (("sampler", SAMPLERS), ("variance", VARIANCES)):
        if unknown := [word for word in getattr(a, name) or [] if word not in choices]:
            raise ValueError(f"--{name}: '{unknown[0]}' is not one of {', '.join(choices)}")
    a.clicking = a.clicks is not None or a.clicks_to is not None
    lists = ("n", "steps", "guidance", "sampler", "variance", "smooth")
    if a.baseline:
        if given := [key for key in ("ckpt", *lists, "least", "merge", "tiles")
                     if getattr(a, key) != a.usual.get(key)]:
            raise ValueError(f"--{given[0]} is a checkpoint's, not a baseline's: leave it out (but give "
                             f"--components, --unlabelled and --void as the checkpoint was trained)")
    elif a.clicking and (a.size or any(len(getattr(a, key) or [0]) > 1 for key in lists)):
        raise ValueError("--clicks and --clicks_to take one value of each option, and no --size")
    if a.clicking and (a.baseline or a.out):
        raise ValueError("--clicks and --clicks_to need a checkpoint, not a baseline, and print their table "
                         "only: leave out --baseline and --out")
    if a.at_once and not a.clicking:
        raise ValueError("--at_once goes with --clicks or --clicks_to")
    if a.clicking and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--clicks and --clicks_to run in one process: start eval.py without torchrun")
    if a.clicks_to is not None and not 0 < a.clicks_to < 1:
        raise ValueError(f"--clicks_to must be above 0 and below 1, not {a.clicks_to}")
    (a.dataset, _, settings), *more = parse_parts(a.dataset)
    if more:
        raise ValueError(f"--dataset names {1 + len(more)} data sets: one at a time is evaluated")
    a.void = None if a.void is None else parse_void(a.void)
    for key in ("components", "unlabelled", "void"):
        if settings[key] and getattr(a, key) not in (None, settings[key]):
            raise ValueError(f"--dataset and --{key} contradict each other: leave one out")
        setattr(a, key, settings[key] or getattr(a, key))
    given = []
    for key, usual in a.usual.items():
        if (value := getattr(a, key)) != usual:
            given += [key, *([] if value is True else value if isinstance(value, (list, tuple)) else [value])]
    a.others = "".join(f"-{part}" for part in given)


def load_model(a):
    """The checkpoint's path and Model, (None, None) for a baseline. Raises ValueError, or RuntimeError where
    kernels that were asked for cannot be had."""
    # torchrun: the processes share the images
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        join_processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "gloo", patient=True)
    device = pick_device(a.device)
    kernels.use(a.kernels or kernels.mode)
    kernels.live(device)
    if device.type == "cuda":
        torch.set_num_threads(host_threads(device))
    elif crowded(torch.get_num_threads()):
        torch.set_num_threads(1)
    if a.baseline:
        return None, None
    path = Path(a.ckpt or newest_checkpoint())
    model = load_checkpoint(path, device, a.raw)
    set_tidy(model, a.least, a.merge)
    return path, model


def load_data(a, model):
    """The data set at the network's size; the `places` of score_images; the listing of its files."""
    def at_size(size, detail=1):
        return load(a.dataset, a.split, size, a.root, a.cache, unlabelled=a.unlabelled,
                    components=a.components, detail=detail, void=",".join(map(str, a.void)),
                    max_bad=a.max_bad)

    data = at_size(model.image_size, model.detail) if model else at_size(a.size or 128)
    places, files = {}, originals(a.dataset, a.split, a.root, a.void)
    if model and a.size:
        other = at_size(a.size)
        if not np.array_equal(getattr(other, "items", None), getattr(data, "items", None)):
            raise ValueError(f"{a.dataset}: other images have labelled pixels at {a.size} pixels than at "
                             f"{model.image_size}: leave out --size")
        places[str(a.size)] = functools.partial(at_size_of, other)
    if files:
        places["own"] = functools.partial(at_own_size, files, data, a.unlabelled, a.components)
    if a.tiles and tiles_of(a.tiles) != 1 and not (files and model):
        raise ValueError("--tiles needs a checkpoint and a data set of files")
    a.tiles = tiles_of(a.tiles, model) if files else 1
    return data, places, files


def settings_of(a, model):
    """The checkpoint's own setting of the sampler, or the first given, and all that are given."""
    if not model:
        return {}, [{}]
    axes = {key: getattr(a, key) or [value] for key, value in model.sampling.items()}
    home = {key: model.sampling[key] if model.sampling[key] in axes[key] else axes[key][0] for key in axes}
    settings = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return home, [s for s in settings if s["sampler"] not in WITHOUT_VARIANCE
                  or s["variance"] == home["variance"]]


def what_of(a, model):
    """What an evaluation is of, for its report."""
    keys = ("dataset", "split", "components", "unlabelled", "void", "seed", "limit", "tiles", "raw")
    return {key: getattr(a, key) for key in keys} | (model.tidy if model else {})


def print_tables(a, model, name, rows, home):
    """Print the scores of all places; -> the report."""
    people, ns = np.mean([row["annotators"] for row in rows]), sorted(a.n)
    print(f"{name} on {a.dataset} {a.split}: {len(rows)} images, {people:.1f} annotators; "
          + " ".join(f"{key} {value}" for key, value in home.items()))
    result = dict(**what_of(a, model), images=len(rows), annotators=people, **home, n=ns)
    for where in [w for w in ("network", str(a.size), "own") if w in rows[0]]:
        result[where] = summary(rows, where)
        side = model.image_size if model and where == "network" else a.size or 128
        print_summary("the images' own size" if where == "own" else f"{side} pixels", result[where])
    if people > 1 and "bsds" in Path(a.dataset).name.lower():
        print("  published, BSDS500 test, best single scale (Arbelaez et al. 2011): covering / PRI / VoI")
        print("\n".join(f"    {who:<28}{c:.2f} / {p:.2f} / {v:.2f}" for who, c, p, v in PUBLISHED))
    return result


def examples(rows, answer):
    """The best, median and worst rows by the ARI of an answer: [(best, median or worst; row)]."""
    ranking = sorted((row for row in rows if answer in row["network"]
                      and not math.isnan(row["network"][answer]["ari"])),
                     key=lambda row: -row["network"][answer]["ari"])
    ranks = ((0, "best"), (1, "best"), (len(ranking) // 2, "median"), (-2, "worst"), (-1, "worst"))
    # of few images one may have several ranks, but each rank is shown once
    n = len(ranking)
    shown = {k % n: kind for k, kind in reversed(ranks) if -n <= k < n}
    return [(kind, ranking[k]) for k, kind in reversed(shown.items())]


def title_of(kind, row, answer):
    scores = row["network"][answer]
    answers = [s for s in row["network"] if s != "human"]
    shown = ["image", *["annotator"] * min(2, row["annotators"]), *answers]
    return f"{kind}: {row['name']}, ARI {scores['ari']:.3f}, IoU {scores['iou']:.3f}; {', '.join(shown)}"


def complain(e):
    print(f"eval.py: {e}", file=sys.stderr)
    return 2


@program("eval.py", "run the same command again")
def main(argv=None):
    a = arguments(argv)
    try:
        check(a)
        path, model = load_model(a)
        given = {key: getattr(a, key) for key in ("components", "unlabelled", "void")}
        vars(a).update(as_trained(model.config if model else {}, a.dataset, given))
        data, places, files = load_data(a, model)
        stem = {"ckpt.pt": "", "best.pt": "-best"}
        name = a.baseline or (path.parent.name + stem[path.name] if path.name in stem else path.stem)
        name += "-raw" * a.raw
        out = Path(a.out or f"out/eval/{name}-{Path(a.dataset).resolve().name}-{a.split}{a.others}")
        if not a.clicking:
            check_out(out)
            make_folder(out)
            tempfile.TemporaryFile(dir=out).close()  # before what may take an hour
    except (ValueError, OSError, RuntimeError) as e:
        return complain(e)
    home, settings = settings_of(a, model)
    ns, sweep = sorted(a.n), []
    positions = selection(data, a.limit)
    try:
        if a.clicking:
            model.sampling.update(home)
            return report_clicks(a, model, data, positions, files, path, name)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for setting in settings:
            many = all(setting[key] == home[key] for key in setting if key != "guidance")
            rows = score_images(data, positions[rank::world], model, a, setting, ns if many else [1], places,
                                files, setting == home)
            sweep.append((setting, shared(rows)))
    except ValueError as e:  # a photo that is gone meanwhile, too little memory
        return complain(e)
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    rows = next(result for setting, result in sweep if setting == home)
    if not any(row["network"] for row in rows):
        return complain(f"--baseline human needs several annotators, {a.dataset} {a.split} has one an image")

    result = dict(name=str(path or name)) | print_tables(a, model, name, rows, home)
    answer = "answer" if "answer" in result["network"] else next(iter(result["network"]))
    result.update({key: result["network"][answer][key][0] for key in ("ari", "iou", "hiou")})
    if model:
        result["sweep"] = sweep_table(sweep)
    result.update(reliability_tables(rows, max(ns)))
    chosen, pictures = examples(rows, answer), {}
    if chosen and answer != "human":
        again = score_images(data, [row["position"] for _, row in chosen], model, a, home, ns, places,
                             files, keep=True)
        titles = [title_of(kind, row, answer) for kind, row in chosen]
        pictures["examples.png"] = lambda path: example_sheet(path, again, titles)
    line = json.dumps(json.loads(json.dumps(result), parse_constant=lambda nan: None))
    try:
        write(out, flat_rows(rows, ("network", str(a.size), "own")), pictures, line)
        print(f"\nin {out}/: {', '.join(sorted(p.name for p in out.iterdir()))}\n{line}")
    except OSError as e:
        print(f"\n{line}")
        return complain(f"nothing is written to {out} ({e.strerror or e}): what was there stays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
