"""engine.py against a loop written out, and what it does when things go wrong."""

import contextlib
import copy
import dataclasses
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F

import engine
from engine import (
    NoGraph,
    Step,
    Watch,
    append,
    fastest_form,
    fit_state,
    forget,
    host_threads,
    option_words,
    options_given,
    pick_device,
    pick_precision,
    program,
    try_to_write,
)


def setting(**options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    batch = dict(x=torch.randn(8, 5), y=torch.randn(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, fused=True)
    return net, batch, Step(net, lambda net, b: F.mse_loss(net(b["x"]), b["y"]), optimizer,
                            **options), optimizer


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
        assert float(loss) == pytest.approx(float(expected.detach()),
                                            rel=1e-5) and float(norm) == pytest.approx(float(length),
                                                                                       rel=1e-5)
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


@pytest.mark.parametrize("before, after", [(torch.contiguous_format, torch.channels_last),
                                           (torch.channels_last, torch.contiguous_format)])
def test_moments_follow_their_weights_into_the_other_layout(before, after):
    """Fused AdamW pairs numbers by place in memory: with equal gradients, both layouts end with equal
    weights."""
    torch.manual_seed(0)
    old = torch.nn.Conv2d(3, 5, 3).to(memory_format=before)
    new, gradients = copy.deepcopy(old).to(memory_format=after), torch.randn(5, *old.weight.shape)

    def go_on(net, optimizer, gradients):
        for g in gradients:
            net.weight.grad = g.clone(memory_format=torch.preserve_format).to(memory_format=net.memory)
            optimizer.step()

    old.memory, new.memory = before, after
    optimizers = [torch.optim.AdamW([net.weight], lr=0.1, fused=True) for net in (old, new)]
    go_on(old, optimizers[0], gradients[:3])
    new.load_state_dict(old.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    fit_state(optimizers[1])
    go_on(old, optimizers[0], gradients[3:])
    go_on(new, optimizers[1], gradients[3:])
    assert old.weight.stride() != new.weight.stride()
    # paired wrongly, they are 0.1 apart
    torch.testing.assert_close(new.weight, old.weight, rtol=1e-5, atol=1e-6)


class Capture:
    """In place of torch.cuda: a capture that fails, as PyTorch's does, with its stream still current and the
    generator's state still the capture's, which no other use bears."""

    def __init__(self, monkeypatch):
        self.stream, self.modes, self.drawn = "the caller's", [], "the caller's"
        for name, value in dict(CUDAGraph=object, graph=self.graph, current_stream=lambda: self.stream,
                                set_stream=self.set_stream, current_device=lambda: 1,
                                default_generators=(None, self)).items():
            monkeypatch.setattr(engine.torch.cuda, name, value)

    def clone_state(self):
        return "a copy"

    def graphsafe_set_state(self, state):
        self.drawn = state

    def set_stream(self, stream):
        self.stream = stream

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        self.stream = self.drawn = "the capture's"
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: capture invalidated\nand so on")


def test_a_failed_capture_says_why_and_leaves_nothing_behind(monkeypatch):
    net, batch, step, optimizer = setting(graph=True)
    for _ in range(3):
        step(batch, 1e-2)
    before, cuda, loss = weights(net), Capture(monkeypatch), step.loss

    def waits(net, batch):
        raise_later = loss(net, batch)
        raise_later.backward(retain_graph=True)  # a gradient, half made
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    step.loss = waits
    why = r"^no CUDA graph of a step \(operation not permitted when stream is capturing\)$"
    with pytest.raises(NoGraph, match=why):
        step(batch, 1e-2)
    assert (cuda.modes, cuda.stream, cuda.drawn) == (["thread_local"], "the caller's", "a copy")
    assert all(p.grad is None for p in net.parameters()) and torch.equal(weights(net), before)


def test_the_device_picked_is_the_current_one(monkeypatch):
    """With its number, which torch.cuda.set_device asks for."""
    current, zeros = [torch.device("cuda:0")], torch.zeros
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *a, device: zeros(*a))  # as if there were two
    for name, index in ("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cuda", 1):
        assert pick_device(name) == current[-1] == torch.device("cuda", index)
    assert pick_device("cpu") == torch.device("cpu") and len(current) == 5


def test_each_process_touches_its_own_gpu_alone(monkeypatch):
    touched, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("this is another's"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *a, device: touched.append(device) or zeros(*a))
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, index in ("auto", 3), ("cuda", 3), ("cuda:1", 1):
        assert pick_device(name) == torch.device("cuda", index)
        assert touched == [torch.device("cuda", index)] * 2 and not touched.clear()
    assert pick_device("cpu") == torch.device("cpu")


def test_few_threads_beside_a_gpu():
    before = torch.get_num_threads()
    try:
        for threads, beside in (1, 1), (4, 4), (16, 4):
            torch.set_num_threads(threads)
            assert host_threads(torch.device("cuda:0")) == beside
            assert host_threads(torch.device("cpu")) is None
    finally:
        torch.set_num_threads(before)


def test_a_program_leaves_the_garbage_collector_as_it_was():
    frozen = []
    program("name", "")(lambda argv: frozen.append(gc.get_freeze_count()))()
    assert frozen[0] > 1000 and gc.get_freeze_count() == 0


@dataclasses.dataclass
class Options:
    rate: float = 0.0
    note: str = ""
    max_bad: int = 0
    turns: bool = False
    full_size: bool = True


@pytest.mark.parametrize("words, given", [
    ("", {}), ("--rate -1e-3 --note=--x", dict(rate=-1e-3, note="--x")), ("--turns", dict(turns=True)),
    ("--turns --note on", dict(turns=True, note="on")), ("--max-bad 3 --full-size=0", dict(max_bad=3,
                                                                                          full_size=False)),
    ("--turns false --turns 1 --full_size", dict(turns=True, full_size=True))])
def test_options_of_a_dataclass(words, given):
    assert options_given(words.split(), Options) == given
    assert all(type(value) is str for value in option_words(words.split(), Options).values())


@pytest.mark.parametrize("words, message", [
    ("--rate", "--rate needs a value"), ("--note --turns", "--note needs a value"),
    ("--turns maybe", "--turns is true or false, not 'maybe'"), ("--rate 1e", "--rate needs a number"),
    ("--max-bad x", "--max_bad needs a whole number"), ("--turns 1 0", "unknown option '0': see --help"),
    ("--turn", "unknown option '--turn': did you mean --turns?")])
def test_options_that_are_none(words, message):
    with pytest.raises(ValueError) as raised:
        options_given(words.split(), Options)
    assert message in str(raised.value)


def test_watch_counts_rows_and_names_spikes():
    watch, nan = Watch(), float("nan")
    assert watch([1.0, 1.2, nan, 0.8], [1, 1, nan, 1], first=0) == dict(loss=pytest.approx(1.0), skipped=1,
                                                                        spikes=[])
    report = watch([1.0, 5.5, 1.0], [1, 1, float("inf")], first=4)
    assert report["spikes"] == [(5, 5.5)] and report["skipped"] == 1 and watch.worst == 1
    for first in (7, 8):  # a row goes on from one report to the next
        assert watch([nan], [nan], first)["loss"] is None
    assert watch.worst == 3


def test_what_libraries_say_of_a_full_device():
    for words in ("CUDA out of memory. Tried to allocate 2 GiB", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                  "FIND was unable to find an engine to execute this computation",
                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert engine.out_of_memory(RuntimeError(words))
    assert not engine.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_layouts_of_devices():
    assert engine.layout(torch.device("cuda")) == "nhwc"
    assert engine.layout(torch.device("cpu")) == engine.layout(torch.device("mps")) == "nchw"


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
    # nothing for DistributedDataParallel to see
    assert all(p.grad is None for p in net.parameters())

    class Large(torch.autograd.Function):  # whose backward pass does not fit
        @staticmethod
        def forward(ctx, x):
            ctx.rows, ctx.kept = len(x), torch.zeros(9)
            held.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return gradient

    held = []

    def kept(net, b):
        assert not any(of() is not None for of in held)  # of the backward pass that failed
        return Large.apply(net(b["x"])).square().sum()

    step.loss = kept
    assert step.fits(batch) == 1 and len(held) == 3
    step.loss = lambda net, b: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate "
                                                                  "memory"))
    assert step.fits(batch) == 0
    step.loss = lambda net, b: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        step.fits(batch)


def test_precision_comes_with_its_reason():
    for name in ("fp32", "bf16", "fp16"):
        assert pick_precision(name, torch.device("cpu")) == (name, "asked for")
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
    path.write_bytes(b'{"step": 2}\n\xff\xfe\n7\n{"step": 4}\n')  # damaged: what can be read stays
    forget(path, lambda line: line["step"] <= 5)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append(path, dict(step=1))
    real = open

    class Full:
        """A file on a disk with room for 5 bytes more."""

        def __init__(self, file):
            self.file, self.tell, self.truncate = file, file.tell, file.truncate

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            return self.file.write(text[:5])

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full(real(*args, **kwargs)))
    with pytest.raises(OSError, match="no space left"):
        append(path, dict(step=2))
    monkeypatch.undo()
    append(path, dict(step=3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_what_cannot_be_written_is_a_warning(tmp_path, capsys):
    assert try_to_write("a", lambda: None)
    assert not try_to_write("out/b", lambda: open(tmp_path / "no" / "b", "w"))
    assert "out/b is not written (No such file or directory)" in capsys.readouterr().err


def test_threads_follow_what_steps_take(monkeypatch):
    """A clock that says what a step takes: two threads are faster, until another job comes, then one."""
    took, now, before = {1: 1.0, 2: 0.6, 4: 0.7}, [0.0], torch.get_num_threads()
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(engine, "crowded", lambda n: False)

    def steps(crew, count):
        said = []
        for _ in range(count):
            now[0] += took[torch.get_num_threads()]
            said.append(crew())
        return [words for words in said if words]

    try:
        torch.set_num_threads(4)
        crew = engine.Threads()
        assert torch.get_num_threads() == 1
        assert steps(crew, 30) == ["threads: 2, as a step took 1000 ms with 1, 600 ms with 2, 700 ms with 4"]
        took.update({2: 6.0, 4: 20.0})
        assert steps(crew, 60) == ["threads: 1, as a step took 1000 ms with 1, 6000 ms with 2, "
                                   "20000 ms with 4"]
        took.update({2: 0.6})  # the other job has ended
        assert len(steps(crew, 1010)) == 1 and torch.get_num_threads() == 2
        crew = engine.Threads(3)
        took[3] = 9.0
        assert steps(crew, 2000) == [] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


FORMS = [("fp32", "nchw"), ("fp32", "nhwc"), ("bf16", "nchw"), ("bf16", "nhwc")]


@pytest.mark.parametrize("rates, chosen, words", [
    ((10, 13, 8, 9), 1, "fp32 nhwc, 13 images a processor second; fp32 nchw 10, bf16 nchw 8, bf16 nhwc 9"),
    ((10, 10.5, 8, 10.9), 0, "fp32 nchw, 10 images a processor second; fp32 nhwc 10.5, bf16 nchw 8, "
                             "bf16 nhwc 10.9; under 20 % more does not count"),
    ((2, 3, 20, 15), 2, "bf16 nchw, 20 images a processor second; fp32 nchw far fewer, fp32 nhwc far fewer, "
                        "bf16 nhwc 15"),
    ((30, 32, 40, 15), 2, "bf16 nchw, 40 images a processor second; fp32 nchw 30, fp32 nhwc 32, "
                          "bf16 nhwc 15"),
    ((0, 0, 0, 0), 0, "fp32 nchw, 0 images a processor second; fp32 nhwc 0, bf16 nchw 0, bf16 nhwc 0")])
def test_the_fastest_form_is_chosen_and_nothing_else_changes(monkeypatch, rates, chosen, words):
    """By a clock that goes on by what each form takes; 0: it raises."""
    now, seen, net = [0.0], [], torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Dropout(0.5))
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(engine.time, "thread_time", lambda: now[0])

    def loss(candidate, batch):
        out = candidate(batch["x"])
        nhwc = candidate[0].weight.is_contiguous(memory_format=torch.channels_last)
        form = ("bf16" if out.dtype == torch.bfloat16 else "fp32", "nhwc" if nhwc else "nchw")
        seen.append((form, len(out)))
        rate = rates[FORMS.index(form)]
        now[0] += len(out) / rate if rate else 1
        if not rate:
            raise NotImplementedError("no such convolution")
        return out.float().square().mean()

    batch, before, random = dict(x=torch.randn(8, 3, 6, 6)), weights(net), torch.get_rng_state()
    form, why = fastest_form(net, loss, batch, FORMS, seconds=40)
    assert form == FORMS[chosen] and why == f"precision and layout: {words}"
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(weights(net), before)
    assert all(p.grad is None for p in net.parameters())
    assert now[0] < 60 and {rows for _, rows in seen[:4]} == {1}
    for form, rate in zip(FORMS, rates):
        count = sum(1 for other, _ in seen if other == form)
        # one row, once more, and all of them
        assert count == 1 if 4 * rate < max(rates) else count == 3 if 2 * rate < max(rates) else count > 3


def test_a_first_call_that_takes_longer_puts_no_form_out(monkeypatch):
    """As bf16's does: of a small network it takes several times as long as those that follow."""
    now, called, net = [0.0], set(), torch.nn.Linear(3, 2)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(engine.time, "thread_time", lambda: now[0])

    def loss(candidate, batch):
        out = candidate(batch["x"])
        now[0] += len(out) / (200 if out.dtype == torch.bfloat16 else 100) + 0.1 * (out.dtype not in called)
        called.add(out.dtype)
        return out.float().mean()

    called.add(torch.float32)
    form, words = fastest_form(net, loss, dict(x=torch.randn(8, 3)), [FORMS[2], FORMS[0]], seconds=1)
    assert form == ("bf16", "nchw")
    assert words.endswith("bf16 nchw, 200 images a processor second; fp32 nchw 100")
