"""kernels/__init__.py: which path runs, what it refuses, and that the folder stands alone, compiles and can
be captured."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import bits
import diffusion
import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def auto():
    yield
    kernels.use("auto")


def fresh(code, cwd, **env):
    """Lines that a new process prints, without Triton's interpreter."""
    env = {**{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BITSEG_KERNELS")}, **env}
    r = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout.splitlines()


def test_without_triton_it_says_why_not(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = """
import torch, kernels
for mode in ("triton", "auto"):
    try:
        x = torch.ones(1, 6, 1, 1)
        kernels.step(x, x, 1, 1, 1, 1)
    except RuntimeError as e:
        print(e)
    kernels.use("auto")
"""
    assert fresh(code, tmp_path, BITSEG_KERNELS="triton") == [
        "Triton kernels were asked for, but triton cannot be imported (no triton here): use 'auto' or "
        "'torch'",
        "the kernels need Triton, but PyTorch is live here (triton cannot be imported (no triton here))"]


def test_an_old_triton_is_none(tmp_path):
    (tmp_path / "triton.py").write_text("__version__ = '3.3.1'")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    assert fresh("import kernels; print(*kernels.live('cpu'))", tmp_path) == [
        "torch triton cannot be imported (version 3.3.1 is older than 3.4)"]


@needs_triton
def test_a_second_copy_has_operators_of_its_own(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "kernels", tmp_path / "others" / "kernels")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("others.kernels")
    args, grads = training_arguments(), []
    for each in theirs, kernels:
        each.use("triton")
        loss = each.loss(args[0], args[1], args[-1]).sum()
        grads += torch.autograd.grad(loss, args[0])
    assert torch.equal(*grads)
    assert theirs._loss.loss_forward._qualname == "bitseg_others_kernels::loss_forward"


@needs_triton
def test_forced_on_a_cpu_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    kernels.use("triton")
    with pytest.raises(RuntimeError, match="asked for, but the tensors are on cpu: use 'auto' or 'torch'"):
        kernels.step(X, X, 1, 1, 1, 1)


@needs_triton
def test_what_is_called_where_pytorch_is_live_says_so():
    for mode, why in ("auto", "the tensors are on cpu"), ("torch", "asked for"):
        kernels.use(mode)
        for call in (lambda: kernels.normal(SEEDS, 6, 2, 2), lambda: kernels.locate(CELLS, 8),
                     lambda: kernels.noise(CELLS, ONE, ONE, SEEDS, 6), lambda: kernels.loss(X, CELLS, ONE),
                     lambda: kernels.average(X, (X[:, 0, :, [*range(5), 0]], X[:, 0]),
                                             (X[:, 0, [*range(4), 0]], X[:, 0])),
                     lambda: kernels.step(X, X, 1, 1, 1, 1),
                     lambda: kernels.norm(X, torch.ones(6), torch.ones(6), 3)):
            with pytest.raises(RuntimeError) as e:
                call()
            assert str(e.value) == f"the kernels need Triton, but PyTorch is live here ({why})"


@needs_triton
def test_a_gpu_of_another_maker_takes_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernels.use("auto")
    assert kernels.live("cuda") == ("torch", "they are in part PTX, for NVIDIA")


def test_modes_have_names(monkeypatch):
    with pytest.raises(ValueError, match="kernels 'cuda' is not one of auto, triton, torch"):
        kernels.use("cuda")
    monkeypatch.setattr(kernels, "mode", "fast")  # as read from the environment
    with pytest.raises(ValueError, match="BITSEG_KERNELS 'fast' is not one of auto, triton, torch"):
        kernels.step(X, X, 1, 1, 1, 1)


def test_auto_takes_triton_on_cuda_alone():
    assert kernels.live("cpu")[0] == "torch"  # although the interpreter could
    if DEVICE == "cuda":
        assert kernels.live("cuda")[0] == "triton"


@needs_triton
@pytest.mark.parametrize("lacks", ["no C compiler", "no C compiler /no/gcc, which CC names",
                                   "Python.h is missing"])
def test_a_gpu_without_a_compiler_gets_a_sentence_with_the_remedy(monkeypatch, tmp_path, lacks):
    kernels.use("triton")
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels._can_launch.cache_clear()
    assert kernels.live("cuda") == ("triton", "asked for")
    kernels._can_launch.cache_clear()
    paths, variable = sysconfig.get_paths, sysconfig.get_config_var
    if "Python.h" in lacks:
        monkeypatch.setattr(sysconfig, "get_paths",
                            lambda **more: {**paths(**more), "include": str(tmp_path)})
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "INCLUDEPY"
                            else variable(name))
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        if "CC" in lacks:
            monkeypatch.setenv("CC", "/no/gcc")
    for mode in "triton", "auto":
        kernels.use(mode)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(RuntimeError,
                           match=f"{lacks}.*apt install gcc python3-dev.*dnf install.*conda "
                                 f"install.*--kernels torch"):
            kernels.live("cuda")
    kernels.use("torch")
    assert kernels.live("cuda") == ("torch", "asked for")
    if "Python.h" in lacks:  # it may lie where only the compiler looks
        kernels.use("triton")
        monkeypatch.setenv("CPATH", variable("INCLUDEPY"))
        assert kernels.live("cuda")[0] == "triton"
    kernels._can_launch.cache_clear()


@needs_triton
def test_a_failed_launch_is_not_hidden(monkeypatch):
    kernels.use("triton")

    def fail(*args):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(kernels._step, "step", fail)
    with pytest.raises(RuntimeError, match="out of everything"):
        kernels.step(X.to(DEVICE), X.to(DEVICE), 1, 1, 1, 1)


X, CELLS, ONE, SEEDS = torch.zeros(2, 6, 4, 5), torch.zeros(2, 4, 5,
                                                            dtype=torch.int64), torch.ones(2), torch.arange(2)
META = torch.zeros(2, 6, 4, 5, device="meta")


@pytest.mark.parametrize("call, message", [
    (lambda: kernels.loss(X, CELLS[:1], ONE), r"cells must have shape \(2, 4, 5\), not \(1, 4, 5\)"),
    (lambda: kernels.loss(X, CELLS.float(), ONE), "cells must be int8 or int16 or int32 or int64, not "
                                                  "float32"),
    (lambda: kernels.loss(X, CELLS, ONE[:1]), r"weight must have shape \(2,\), not \(1,\)"),
    (lambda: kernels.loss(META, CELLS, ONE), "cells must be on meta, not on cpu"),
    (lambda: kernels.loss(X, CELLS, ONE, "y"), "prediction 'y' is not one of x, eps, v"),
    (lambda: kernels.loss(X, CELLS, ONE, "x", "relu"), "activation 'relu' is not one of tanh, none"),
    (lambda: kernels.loss(X, CELLS, ONE, "eps"), r"prediction 'eps' needs xt \(2, 6, 4, 5\)"),
    (lambda: kernels.loss(X, CELLS, ONE, "v", "tanh", X[:, :5], ONE, ONE), r"xt must have shape \(2, 6, 4, "
                                                                           r"5\), not \(2, 5, 4, 5\)"),
    (lambda: kernels.loss(X, CELLS, ONE, "x", "none", bce=True), "bce needs prediction 'x' and activation "
                                                                 "'tanh'"),
    (lambda: kernels.loss(X, CELLS, ONE, codes=SEEDS), r"codes must have shape \(64,\), not \(2,\)"),
    (lambda: kernels.step(X, X.double(), 1, 1, 1, 1), r"xt must be \(B, k, H, W\).*in float64"),
    (lambda: kernels.step(X, X[:, :1], 1, 1, 1, 1), r"k from 2 to 10.*not \(2, 1, 4, 5\)"),
    (lambda: kernels.step(X, X[:0], 1, 1, 1, 1), "not empty"),
    (lambda: kernels.step(X, X, 1, 1, 1, 1, valid=ONE), r"valid must have shape \(2, 4, 5\), not \(2,\)"),
    (lambda: kernels.average(X, (ONE, ONE), (ONE, ONE)), r"rows\[0\] must have shape \(2, 4, 6\), not"),
    (lambda: kernels.average(X.half(), (ONE, ONE), (ONE, ONE)), "x must be .* float32.* in float16"),
    (lambda: kernels.average(X[0], (ONE, ONE), (ONE, ONE)), r"x must be .*; not \(6, 4, 5\)"),
    (lambda: kernels.average(X[:0], (ONE, ONE), (ONE, ONE)), "x must be .*not empty"),
    (lambda: kernels.normal(SEEDS, 3, 4, 4, dtype=torch.float64), "not 3 x 4 x 4 in float64"),
    (lambda: kernels.normal(SEEDS, 3, 4, 4, dtype=torch.int64), "in int64"),
    (lambda: kernels.normal(SEEDS, 0, 4, 4), "not 0 x 4 x 4"),
    (lambda: kernels.normal(SEEDS, 6, 2**15, 2**15), r"to 2\^30 - 1 a sample; not 6 x 32768 x 32768"),
    (lambda: kernels.normal(SEEDS[0], 3, 4, 4), r"seeds must have shape \(1,\), not \(\)"),
    (lambda: kernels.loss(X, CELLS, ONE.clone().requires_grad_()), "weight has no gradient here: pass"),
    (lambda: kernels.loss(X, CELLS, ONE, "eps", "none", X.clone().requires_grad_(), ONE, ONE),
     "xt has no gradient"),
    (lambda: kernels.step(X, X, 1, 1, 1, 1, guidance=1.0), r"out must have shape \(4, 6, 4, 5\), not \(2, "
                                                           r"6, 4, 5\)"),
    (lambda: kernels.step(X, X, 1, 1, 1, 1, c=0.5), r"c = 0.5 needs seeds \(2,\)"),
    (lambda: kernels.noise(CELLS, ONE, ONE[:1], SEEDS, 6), r"sigma must have shape \(2,\), not \(1,\)"),
    (lambda: kernels.noise(CELLS, ONE, ONE, SEEDS.int(), 6), "seeds must be int64, not int32"),
    (lambda: kernels.noise(CELLS, ONE, ONE, SEEDS, 6, stream=-1), "stream must be from 0"),
    (lambda: kernels.noise(CELLS.byte(), ONE, ONE, SEEDS, 6), "cells must be int8 or int16 or int32 or "
                                                              "int64, not uint8"),
    (lambda: kernels.network_input(CELLS, ONE, ONE, SEEDS, 6, X), r"image must have shape \(2, 3, 4, 5\), "
                                                                  r"not \(2, 6, 4, 5\)"),
    (lambda: kernels.network_input(CELLS, ONE, ONE, SEEDS, 6, torch.zeros(2, 3, 4, 5).byte()),
     "image must be float32.*not uint8"),
    (lambda: kernels.locate(X, 8), r"labels must be integers of shape \(B, H, W\)"),
    (lambda: kernels.locate(CELLS, 8, hints=CELLS > 0), "hints need labels_below"),
    (lambda: kernels.locate(CELLS, 8, labels_below=9, hints=CELLS), r"hints must be bool, not"),
    (lambda: kernels.locate(CELLS[:1, :1, :1].expand(1, 2**14, 2**14), 32), r"below 3.0e9 / 32 pixels a map"),
    (lambda: bits.locate(CELLS[:1, :1, :1].expand(1, 2**14, 2**14), 32), r"below 3.0e9 / 32 pixels a map"),
    (lambda: kernels.locate(CELLS, 33), "side must be from 1 to 32, not 33"),
    (lambda: kernels.locate(CELLS, 16, dtype=torch.int8), "cells up to 255 do not fit into int8"),
    (lambda: kernels.locate(CELLS, 8, labels_below=5000), "labels_below must be from 1 to 1024, not 5000"),
])
def test_mistakes_are_named_before_anything_runs(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------
# As parts of larger things


def training_loss(out, cells, image, alpha, sigma, seeds, weight):
    x = kernels.network_input(cells, alpha, sigma, seeds, 6, image, keep=weight)
    return kernels.loss(out + x[:, :6], cells, weight).mean()


def training_arguments():
    cells, out, image = torch.randint(-1, 64, (2, 4, 5)), torch.rand(2, 6, 4,
                                                                     5).requires_grad_(), torch.rand(2, 3, 4,
                                                                                                     5)
    return [v.detach().to(DEVICE).requires_grad_(v.requires_grad) for v in (out, cells, image,
                                                                            *torch.rand(2, 2), SEEDS,
                                                                            torch.rand(2))]


@needs_triton
def test_torch_compile_sees_one_graph_and_the_same_result():
    kernels.use("triton")
    args = training_arguments()
    loss = torch.compile(training_loss, backend="aot_eager" if DEVICE == "cpu" else "inductor",
                         fullgraph=True)(*args)
    true = training_loss(*args)
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(torch.autograd.grad(loss, args[0]), torch.autograd.grad(true, args[0]))


@needs_triton
def test_operators_are_registered_properly():
    """torch's own check: schema, fake implementation, no aliasing."""
    x, cells, one, seeds = (v.to(DEVICE) for v in (X, CELLS, ONE, SEEDS))
    check = lambda op, *args: torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    check(kernels._loss.loss_forward, x, cells, one, "x", True, False, False, None, None, None, None)
    check(kernels._loss.loss_backward, one, one, one, x, cells, "x", True, False, False, None, None, None,
          None)
    check(kernels._step.step, x, x, False, 0.5, 0.5, 0.5, 0.5, 0.5, None, 0.0, seeds, 1, "x", True, True)
    check(kernels._noise.noise, seeds, 0, 4, 5, 6, torch.float32, True, cells, one, one)
    check(kernels._locate.locate, cells, 8, torch.int8, 4, cells > 0)
    check(kernels._average.average, x, torch.rand(2, 4, 6, device=DEVICE), x[:, 0].contiguous(), True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph_replays_the_same_result():
    labels, seeds = torch.randint(-1, 20, (2, 32, 32), device=DEVICE), torch.arange(2, device=DEVICE)
    alpha, sigma, weight = torch.rand(3, 2, device=DEVICE)
    image = torch.rand(2, 3, 32, 32, device=DEVICE)
    out = torch.rand(2, 6, 32, 32, device=DEVICE, requires_grad=True)

    def work():
        cells = kernels.locate(labels, 8, labels_below=20)
        xt = kernels.noise(cells, alpha, sigma, seeds, 6)
        loss = kernels.loss(out * xt, cells, weight).mean()
        after = kernels.step(xt, xt, 0.5, 0.5, 0.2, 0.3, 0.1, seeds=seeds)
        after = kernels.average(after, *diffusion.as_lines(diffusion.edge_aware(image, labels >= 0, 0.2)))
        return cells, xt, loss, torch.autograd.grad(loss, out)[0], after

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            true = [v.clone() for v in work()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    for a, b in zip(captured, true):
        assert torch.equal(a, b)


@needs_triton
def test_a_training_step_through_the_kernels_is_eq_2():
    """labels -> cells -> input -> loss against bits.py and diffusion.py, given the same t and noise."""
    kernels.use("triton")
    labels = torch.randint(-1, 9, (2, 4, 4), device=DEVICE).repeat_interleave(3, 1).repeat_interleave(3, 2)
    image, seeds = torch.rand(2, 3, 12, 12, device=DEVICE), torch.tensor([7, 8], device=DEVICE)
    d = diffusion.Diffusion()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, device=DEVICE)
    net = torch.nn.Conv2d(9, 6, 3, padding=1).to(DEVICE)
    alpha, sigma = (v.float() for v in diffusion.alpha_sigma(t, d))
    weight = diffusion.loss_weight(t, d).float()

    cells = kernels.locate(labels, 8)
    out = net(kernels.network_input(cells, alpha, sigma, seeds, 6, image))
    loss = kernels.loss(out, cells, weight).mean()
    grad = torch.autograd.grad(loss, net.weight)[0]

    codec = bits.Codec()
    x0, valid = codec.encode(codec.cells(labels)), labels >= 0
    xt = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * kernels.normal(seeds, 6, 12, 12)
    true = (weight * diffusion.per_sample_error(net(diffusion.network_input(xt, image)).tanh(), x0,
                                                valid)).mean()
    torch.testing.assert_close(loss, true, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(true, net.weight)[0], rtol=1e-3, atol=1e-5)
