"""A run that is killed with SIGKILL at random moments ends with the same bits as one that is not.

    python tests/test_resume.py 50  # 50 kills; says how many runs ended as the uninterrupted one
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import train
from engine import read

# Checkpoints at log lines: a line after a resume is the mean since the resume.
OPTIONS = ("--device cpu --image_size 16 --batch_size 2 --max_steps 12 --save_every 2 --eval_every 6 "
           "--eval_images 2 --steps 1 --log_every 2 "
           "--self_condition 0.5 --dropout 0.1 --accumulate 2 --keep_every 5").split()


def start(out):
    """A run in a process of its own: its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(f"{out}.txt", "a", buffering=1)
            train.SIZES["tiny"] = dict(width=32, mult=(1,), blocks=1, attn=1, heads=4, patch=2)
            status = train.main([*OPTIONS, "--out", str(out)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def whole_run(out):
    """Seconds of a run that nobody disturbs."""
    began = time.time()
    _, status = os.waitpid(start(out), 0)
    assert status == 0, Path(f"{out}.txt").read_text()
    return time.time() - began


def killed_run(out, seconds, rng, kills):
    """Start, kill, start again, ... at random moments until `kills` kills are done; then let it end. ->
    number of kills.

    A moment is drawn from what a whole run takes, and less each time one came too late: the machine may have
    got faster.
    """
    done = 0
    while True:
        child, until = start(out), time.time() + rng.uniform(0, seconds) if done < kills else float("inf")
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, Path(f"{out}.txt").read_text()
                if done:
                    return done
                shutil.rmtree(out)  # ended before its first kill: again
                seconds /= 2
                break
            if time.time() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                break
            time.sleep(0.002)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(out):
    """All that must not depend on the kills: the checkpoints, without the name of the folder, and the last
    validation."""
    files = {name: read(out / name) for name in ("ckpt.pt", "best.pt")}
    for content in files.values():
        del content["config"]["out"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return files, [(line["step"], line["ari"], line["iou"]) for line in lines if "ari" in line][-1]


@pytest.mark.forked
def test_three_kills_change_no_bit(tmp_path):
    seconds = whole_run(tmp_path / "whole")
    kills, rng = 0, random.Random(time.time())
    while kills < 3:
        out = tmp_path / f"killed{kills}"
        kills += killed_run(out, seconds, rng, 3 - kills)
        assert same(results(tmp_path / "whole"), results(out))


def main(kills):
    folder = Path(tempfile.mkdtemp())
    try:
        seconds, rng, done, runs = whole_run(folder / "whole"), random.Random(0), 0, 0
        print(f"{seconds:.1f} s undisturbed")
        while done < kills:
            out = folder / f"killed{runs}"
            done += killed_run(out, seconds, rng, min(10, kills - done))
            runs += 1
            if not same(results(folder / "whole"), results(out)):
                print(f"run {runs}, after {done} kills: NOT the same; see {folder}")
                folder = None
                return 1
            shutil.rmtree(out)
            print(f"{done} kills, {runs} runs, all with the bits of the undisturbed one", flush=True)
        print(f"{done} of {kills}")
        return 0
    finally:
        if folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
