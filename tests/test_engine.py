"""engine.py against a loop written out, and what it does when things go wrong."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from engine import Step, Watch, append, forget, pick_precision, written


def setting(**options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    batch = dict(x=torch.randn(8, 5), y=torch.randn(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, fused=True)
    return net, batch, Step(net, lambda net, b: F.mse_loss(net(b["x"]), b["y"]), optimizer, **options), optimizer


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_the_plain_loop(accumulate):
    net, batch, step, _ = setting(accumulate=accumulate, grad_clip=0.1)
    plain = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=False, foreach=False)
    for lr in (1e-2, 3e-2, 1e-3):
        loss, norm = step(batch, lr)
        optimizer.zero_grad()
        expected = ((plain(batch["x"]) - batch["y"]) ** 2).mean()
        expected.backward()
        length = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        for p in plain.parameters():
            p.grad *= min(1.0, 0.1 / float(length))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5) and float(norm) == pytest.approx(float(length), rel=1e-5)
    torch.testing.assert_close(weights(net), weights(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(bad, dtype):
    net, batch, step, optimizer = setting(dtype=dtype)
    step(batch, 1e-2)
    before, state = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    loss, norm = step({**batch, "y": batch["y"] * bad}, 1e-2)
    assert not norm.isfinite()
    assert torch.equal(weights(net), before)
    for old, new in zip(state.values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(old[k], new[k]) for k in old)
    step(batch, 1e-2)
    assert weights(net).isfinite().all() and not torch.equal(weights(net), before)


def test_watch_counts_rows_and_names_spikes():
    watch, nan = Watch(spike=5), float("nan")
    assert watch([1.0, 1.2, nan, 0.8], [1, 1, nan, 1], first=0) == dict(loss=pytest.approx(1.0), skipped=1, spikes=[])
    report = watch([1.0, 5.5, 1.0], [1, 1, float("inf")], first=4)
    assert report["spikes"] == [(5, 5.5)] and report["skipped"] == 1 and watch.worst == 1
    for first in (7, 8):                                                           # a row goes on from one report to the next
        assert watch([nan], [nan], first)["loss"] is None
    assert watch.worst == 3


def test_the_batch_that_fits_is_found_by_halving():
    net, batch, step, _ = setting()
    tried = []

    def loss(net, b):
        tried.append(len(b["x"]))
        if len(b["x"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return net(b["x"]).sum()

    step.loss = loss
    assert step.fits(batch) == 2 and tried == [4, 2]
    step.loss = lambda net, b: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert step.fits(batch) == 0
    step.loss = lambda net, b: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        step.fits(batch)


def test_precision_comes_with_its_reason():
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert pick_precision(name, torch.device("cpu")) == (dtype, "asked for")
    assert pick_precision("auto", torch.device("cpu"))[1]
    with pytest.raises(ValueError, match="precision 'int8' is not one of"):
        pick_precision("int8", torch.device("cpu"))


def test_a_log_forgets_later_and_torn_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (2, 4, 6, 8):
        append(path, dict(step=step))
    with open(path, "a") as f:
        f.write('{"step": 1')
    forget(path, lambda line: line["step"] <= 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    forget(tmp_path / "absent.jsonl", lambda line: True)


def test_what_cannot_be_written_is_a_warning(tmp_path, capsys):
    assert written("a", lambda: None)
    assert not written("out/b", lambda: open(tmp_path / "no" / "b", "w"))
    assert "out/b is not written (No such file or directory)" in capsys.readouterr().err
