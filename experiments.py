"""The paper's experiments, rerun: trains and evaluates what is missing, then prints a table beside the
paper's figures.

    python experiments.py palette --seeds 3                          # on synthetic shapes
    python experiments.py palette encoding --dataset path/to/folder  # on real images
    python experiments.py input_scale --palette none --lr 1e-3       # train.py's options hold for every run
    python experiments.py all --list                                 # what there is and what is missing

Every run is one folder of out/experiments/, trained by train.py and evaluated by eval.py with one sample an
image; equal runs of two experiments are one. A finished run (it has a report.json) is kept. Stop at any time
with Ctrl-C or a kill: the same command goes on. --part 1/2 and --part 2/2, at the same time or on two
machines, share the work; with one thread each (OMP_NUM_THREADS=1) that is the fastest on a CPU.

--preset picks the network and the budget: tiny (the default on a CPU), small (on a GPU), paper. The paper's
figures are of its own network, data and budget (EntitySeg, 128 pixels, 300,000 steps): compare orders and
gaps, not values.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import eval as evaluation
import train
from engine import complaint, layout, option_words, pick_device, pick_precision, program

# of every run with this preset's network; written out, so that a change of train.py's presets changes no
# result
BUDGET = {
    "tiny":  "--image_size 32  --bits 4 --batch_size 16 --max_steps 1000   --lr 2e-3 --warmup_steps 50   "
             "--decay_steps 1000   --ema 0.99   --weighting uniform --logsnr_space false",
    "small": "--image_size 64  --bits 6 --batch_size 64 --max_steps 10000  --lr 5e-4 --warmup_steps 500  "
             "--decay_steps 5000   --ema 0.999  --weighting uniform --logsnr_space false",
    "paper": "--image_size 128 --bits 6 --batch_size 8  --max_steps 300000 --lr 1e-4 --warmup_steps 1000 "
             "--decay_steps 50000  --ema 0.9999 --weighting sigmoid --logsnr_space true",
}
COMMON = ("--palette similar --encoding bits --prediction x --loss mse --input_scale 0.1 --schedule cosine "
          "--image_drop 0.05 --steps 8 --guidance 1 "
          "--sampler ddpm --variance large --smooth 0 --augment true --dropout 0 --eval_images 16 "
          "--eval_every 1000000 --save_every 200")


def weightings(prediction, *figures):
    """The five loss weights for a prediction; all but sigmoid without -dlambda/dt, as in the paper."""
    names = ("snr", "sigmoid", "snr+1", "snr_trunc", "uniform")
    return [(f"{prediction}, {name}", f"--palette none --prediction {prediction} --weighting {name} "
                                      f"--logsnr_space {name == 'sigmoid'}".lower(),
             figure, None) for name, figure in zip(names, figures)]


# name: [(label, train.py's options, the paper's ARI, its IoU)]; ~: read off a figure (about 0.005)
EXPERIMENTS = {
    "palette": [  # Table 3
        ("none", "--palette none", 0.517, 0.367),
        ("different", "--palette different", 0.640, 0.422),
        ("random", "--palette random", 0.644, 0.421),
        ("similar (2D Gray)", "--palette similar", 0.670, 0.434)],
    "encoding": [  # Table 1
        ("onehot, no palette", "--encoding onehot --palette none", 0.168, 0.186),
        ("rgb, no palette", "--encoding rgb --palette none", 0.460, 0.283),
        ("bits, no palette", "--palette none", 0.515, 0.368),
        ("onehot, palette", "--encoding onehot", 0.528, 0.323),
        ("rgb, palette", "--encoding rgb", 0.524, 0.312),
        ("bits, palette", "--encoding bits", 0.670, 0.432)],
    "classes": [  # Figure 3, ~
        ("4", "--bits 2", 0.425, None), ("16", "--bits 4", 0.615, None), ("64", "--bits 6", 0.66, None),
        ("256", "--bits 8", 0.66, None), ("1024", "--bits 10", 0.58, None)],
    "weighting": [  # Figure 7, ~, without palette
        *weightings("x", 0.095, 0.55, 0.48, 0.525, 0.49),
        *weightings("v", 0.34, 0.485, 0.43, 0.385, 0.45),
        *weightings("eps", 0.55, 0.57, 0.09, 0.09, 0.05)],
    "tanh": [  # section 4.4: without it, samples keep noisy specks
        ("tanh", "", None, None), ("none", "--activation none", None, None)],
    "input_scale": [  # Figure 9, ~, without palette
        (f"b = {b:g}", f"--palette none --input_scale {b:g}", ari, iou) for b, ari, iou in (
            (0.003, 0.17, 0.17), (0.01, 0.36, 0.275), (0.03, 0.555, 0.38), (0.1, 0.52, 0.375),
            (0.3, 0.31, 0.305), (1, 0.125, 0.175))],
    "loss": [  # not in the paper
        ("squared error", "", None, None), ("cross entropy", "--loss bce", None, None)],
    "bias": [  # of the sigmoid weighting; the paper's is -4
        (f"bias {bias}", f"--weighting sigmoid --logsnr_space true --bias {bias}", None,
         None) for bias in (-6, -4, -2, 0, 2)],
}


def options(text):
    """train.py's, '--bits 4 --lr 1' or a list of the same -> {"bits": "4", "lr": "1"}. Raises ValueError."""
    return option_words(text.split() if isinstance(text, str) else text, train.Config)


def run_of(flags, also, a, seed):
    """(folder, train.py's options) of one run; equal options are one folder."""
    base = options(COMMON) | options(BUDGET[a.preset])
    full = {"dataset": a.dataset, "preset": a.preset} | base | options(flags) | also
    differ = [f"{key}-{value}" for key, value in full.items() if base.get(key, value) != value
              or key not in base]
    name = "_".join([Path(a.dataset).name, *differ[2:], f"seed-{seed}"])  # [2:]: not dataset and preset
    folder = Path(a.out) / a.preset / name.replace("/", "-")
    return folder, full | {"seed": str(seed)}


def train_arguments(folder, full, a):
    device = pick_device(a.device)
    # not measured by each run, which might make two rows of a table differ
    full = dict(precision=pick_precision("auto", device)[0], layout=layout(device)) | full
    full |= {"out": str(folder), "root": a.root, "cache": a.cache, "device": a.device}
    return [word for key, value in full.items() for word in (f"--{key}", value)]


def finished(folder, full, a):
    """The report of a finished run, or None. Raises ValueError if it was made with other options."""
    if not (folder / "report.json").exists():
        return None
    try:
        content = json.loads((folder / "report.json").read_text())
        content["options"], content["report"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'report.json'} was not written by experiments.py, or is cut short: "
                         f"move it away") from None
    new = full | {"limit": a.limit, "root": a.root}  # where named data sets lie
    old = {"root": a.root} | content["options"]
    if old != new:
        differ = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in old | new
                           if old.get(key) != new.get(key))
        raise ValueError(f"{folder} was made with other options ({differ}): move it away, or use another "
                         f"--out")
    return content


def finish(folder, full, a):
    """Train and evaluate one run, going on from where it was; 0, or the exit status that stopped it."""
    folder.mkdir(parents=True, exist_ok=True)
    clock, start = folder / "minutes", time.time()
    torch.compiler.reset()  # every run compiles a network of its own
    status = train.main(train_arguments(folder, full, a))
    before = clock.read_text().strip() if clock.exists() else ""
    minutes = (time.time() - start) / 60 + float(before or 0)  # of this and the interrupted calls
    part = clock.with_suffix(".part")
    part.write_text(str(minutes))
    part.replace(clock)
    if status:
        return status
    c = train.parse(train_arguments(folder, full, a))
    with open(folder / "eval.txt", "w") as tables, contextlib.redirect_stdout(tables):
        status = evaluation.main(["--ckpt", str(folder / "ckpt.pt"), "--dataset", a.dataset, "--limit",
                                  str(a.limit), "--out", str(folder / "eval"), "--root", a.root, "--cache",
                                  a.cache, "--device", a.device, "--unlabelled", c.unlabelled,
                                  f"--void={c.void}", f"--max_bad={c.max_bad}",
                                  *["--components"] * c.components])
    if status:
        return status
    report = json.loads((folder / "eval/report.json").read_text())
    content = {"options": full | {"limit": a.limit, "root": a.root}, "minutes": minutes, "report": report}
    (folder / "report.part").write_text(json.dumps(content))
    (folder / "report.part").replace(folder / "report.json")  # the run is finished
    for name in ("ckpt.prev.pt", "best.pt"):  # ckpt.pt stays
        (folder / name).unlink(missing_ok=True)
    return 0


def table(name, rows, also, a):
    """Print one experiment: mean +- standard deviation over the finished seeds, beside the paper's
    figures."""
    def figure(values):
        if not values:
            return "-"
        return f"{statistics.mean(values):.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1
                                                   else "")

    print(f"\n{name:<22}{'seeds':<7}{'ARI':<18}{'IoU':<18}{'segments':<10}{'minutes':<9}paper's ARI  IoU")
    result = {}
    for label, flags, ari, iou in rows:
        done = [r for seed in range(a.seeds) if (r := finished(*run_of(flags, also, a, seed), a))]
        # of one sample: a joint answer knows the photo, too
        *values, segments = ([r["report"]["network"]["sample"][key][0] for r in done]
                             for key in ("ari", "iou", "pred"))
        print(f"  {label:<20}{len(done):<7}{figure(values[0]):<18}{figure(values[1]):<18}"
              + (f"{statistics.mean(segments):<10.1f}{statistics.mean(r['minutes'] for r in done):<9.1f}"
                 if done else f"{'-':<10}{'-':<9}")
              + " ".join(f"{v:<12.3f}" if v is not None else f"{'-':<12}" for v in (ari, iou)))
        result[label] = {"ari": values[0], "iou": values[1], "paper": [ari, iou]}
    return result


def arguments(argv):
    """This script's options, and the rest, which are train.py's."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="experiment",
                   help=f"{', '.join(EXPERIMENTS)}, or all")
    p.add_argument("--preset", choices=list(BUDGET), default="small" if torch.cuda.is_available() else "tiny",
                   help="network and budget")
    p.add_argument("--dataset", default="shapes", help="shapes, coco, or a folder")
    p.add_argument("--seeds", type=int, default=1, help="runs of each row, with seeds 0, 1, ...")
    p.add_argument("--rows", default="", help="only rows whose name contains one of these words: "
                                              "sigmoid,uniform")
    p.add_argument("--limit", type=int, default=256, help="validation images")
    p.add_argument("--list", action="store_true", help="train nothing: print what is missing, and the tables")
    p.add_argument("--part", default="1/1", help="i/k: only every k-th of the runs")
    p.add_argument("--out", default="out/experiments")
    p.add_argument("--root", default="data")
    p.add_argument("--cache", default="cache")
    p.add_argument("--device", default="auto")
    p.error = complaint("experiments.py")
    return p.parse_known_args(argv)


@program("experiments.py", "the same command goes on")
def main(argv=None):
    a, rest = arguments(argv)
    try:
        also, (part, _, parts) = options(rest), a.part.partition("/")
        if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
            raise ValueError(f"--part is i/k with i from 1 to k, not {a.part}")
        if a.seeds < 1 or a.limit < 1:
            raise ValueError(f"--seeds and --limit are at least 1, not {a.seeds} and {a.limit}")
        evaluation.check(evaluation.arguments(["--dataset", a.dataset]))
        names = list(EXPERIMENTS) if "all" in a.names else list(dict.fromkeys(a.names))
        tables = {name: [row for row in EXPERIMENTS[name]
                         if any(word in row[0] for word in a.rows.split(","))] for name in names}
        if not all(tables.values()):
            raise ValueError(f"--rows {a.rows}: no row of {next(n for n in names if not tables[n])} has "
                             f"such a name")
        for name, rows in tables.items():
            own = [options(flags) for _, flags, *_ in rows]
            if lost := [key for key in also if any(also[key] != row.get(key) for row in own)
                        and any(key in row for row in own)]:
                raise ValueError(f"--{lost[0]} is what rows of {name} differ in: leave it out")
        if "seed" in also:
            raise ValueError("--seed is each run's own: --seeds says how many")
        runs = {}  # all seeds 0 first: an early table is whole
        for seed in range(a.seeds):
            for name in names:
                for _, flags, _, _ in tables[name]:
                    folder, full = run_of(flags, also, a, seed)
                    train.parse(train_arguments(folder, full, a))  # complains now, not in the night
                    runs[folder] = full
        Path(a.out).mkdir(parents=True, exist_ok=True)
        missing = [(folder, full) for folder, full in runs.items() if not finished(folder, full, a)]
    except (ValueError, OSError) as e:
        print(f"experiments.py: {e}", file=sys.stderr)
        return 2

    print(f"{len(runs)} runs, {len(missing)} of them missing")
    mine = [*runs][int(part) - 1 :: int(parts)]  # the same at every start, whatever is missing then
    todo = [(folder, full) for folder, full in missing if folder in mine]
    for k, (folder, full) in enumerate(todo):
        print(f"\n--- {k + 1} of {len(todo)}: {folder}\npython train.py "
              f"{' '.join(train_arguments(folder, full, a))}", flush=True)
        try:
            status = 0 if a.list else finish(folder, full, a)
        except OSError as e:  # a full disk, say
            print(f"experiments.py: {folder}: {e}", file=sys.stderr)
            status = 2
        if status:
            print(f"experiments.py: stopped; the same command goes on with {folder}", file=sys.stderr)
            return status
    result = {name: table(name, tables[name], also, a) for name in names}
    print(json.dumps({"preset": a.preset, "dataset": a.dataset, "options": also, "experiments": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
