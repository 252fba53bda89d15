"""Files that README says stand alone: each is copied alone into an empty folder, and the example at its head
runs there."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# what the examples take as given
GIVEN = {
    "bits.py": "labels = torch.randint(-1, 5, (2, 16, 16))",
    "diffusion.py": """
model, image, valid = lambda x, t: x[:, :6], torch.randn(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
x0 = torch.randn(2, 6, 8, 8).sign()""",
    "model.py": "",
    "metrics.py": "predicted, true = torch.randint(0, 4, (2, 3, 16, 16))",
    "engine.py": """
F, net = torch.nn.functional, torch.nn.Linear(3, 2)
batch = dict(x=torch.randn(4, 3), y=torch.randn(4, 2))""",
    "frame.py": """
from PIL import Image
photo, labels = Image.new("RGB", (120, 90)), torch.randint(0, 4, (2, 72, 96))""",
    "answers/tree.py": """
import numpy as np
image, soft = np.random.randint(0, 256, (12, 16, 3), np.uint8), np.random.rand(2, 12, 16, 6)
cells = np.random.randint(0, 64, (2, 12, 16))""",
    "kernels": """
labels, image, seeds = torch.randint(-1, 5, (1, 4, 4)), torch.randn(1, 3, 4, 4), torch.arange(1)
alpha, sigma, weight, t = torch.rand(4, 1)
net, out, xt = lambda x, t: x[:, :6], torch.randn(2, 6, 4, 4), torch.randn(1, 6, 4, 4)
alpha_t, sigma_t, a, b, c = 0.6, 0.8, 0.3, 0.5, 0.1
h, gain, bias = torch.randn(1, 6, 4, 4), torch.rand(6), torch.rand(6)
rows = torch.nn.functional.pad(torch.rand(1, 4, 3), (1, 1)), torch.ones(1, 4, 4)
columns = torch.nn.functional.pad(torch.rand(1, 3, 4), (0, 0, 1, 1)), torch.ones(1, 4, 4)""",
}
LARGE = {'SIZES["paper"]': 'SIZES["tiny"]', "128, 128": "16, 16"}  # the same with less to compute


def example(path):
    """The indented lines of a module's docstring that import something."""
    blocks = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")
    lines = [[line[4:] for line in block.splitlines() if line.startswith("    ")] for block in blocks]
    code, = ("\n".join(block) for block in lines if any("import" in line for line in block))
    for old, new in LARGE.items():
        code = code.replace(old, new)
    return code


def test_every_file_runs_its_example_alone(tmp_path):
    """In one process, which forgets what it has loaded from a folder before it enters the next."""
    for name, given in GIVEN.items():
        if name == "kernels" and pytest.importorskip("triton") and torch.cuda.is_available():
            names = "labels, image, seeds, alpha, sigma, weight, out, xt, h, gain, bias"
            given += f"\n{names} = (v.cuda() for v in ({names}))\n" \
                     "rows, columns = ([v.cuda() for v in pair] for pair in (rows, columns))"
        home = tmp_path / name.replace("/", "_").removesuffix(".py")
        (home / name).parent.mkdir(parents=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name)
        else:
            shutil.copy(ROOT / name, home / name)
        if name == "answers/tree.py":
            shutil.copy(ROOT / "weights" / "tree.npz", home / "answers")
        file = ROOT / name / "__init__.py" if (ROOT / name).is_dir() else ROOT / name
        (home / "example.py").write_text(f"import torch\n{given}\n{example(file)}\n")
    code = """
import os, runpy, sys
from pathlib import Path
root = Path.cwd()
for home in sorted(root.iterdir()):
    os.chdir(home)
    sys.path.insert(0, str(home))
    runpy.run_path("example.py")
    sys.path.remove(str(home))
    loaded = {name: m.__spec__.origin for name, m in sys.modules.items() if getattr(m, "__spec__", None)}
    for name, origin in loaded.items():
        if str(root) in str(origin):
            print(Path(origin).relative_to(root))
            del sys.modules[name]
"""
    env = {**os.environ, "BITSEG_KERNELS": "triton"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {Path(line).parts[0] for line in done.stdout.splitlines()}
    assert loaded == {name.replace("/", "_").removesuffix(".py") for name in GIVEN}


@pytest.mark.parametrize("name", ["model.py", "diffusion.py"])
def test_another_package_named_kernels_is_not_taken_for_ours(name, tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert runpy.run_path(str(ROOT / name))["kernels"] is None
