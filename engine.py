"""What the training of any network needs: options, precision, EMA, steps that nobody waits for, checkpoints,
and what to do when things go wrong.

What it is: small functions that can be copied alone. What it is not: it knows nothing of segmentation.

Use it alone:
    from engine import Step, lock, newest, save_checkpoint, update_ema
    step = Step(net, lambda net, batch: F.mse_loss(net(batch["x"]), batch["y"]),
                torch.optim.AdamW(net.parameters(), fused=True))
    loss, norm = step(batch, lr=1e-4)  # on the device; nan or inf: nothing has changed
    held = lock("run")  # a second process gets a ValueError that names this one
    save_checkpoint("run/ckpt.pt", dict(step=3, net=net.state_dict()), keep_previous=True)  # and ckpt.prev.pt
    content, path, problem = newest("run/ckpt.pt")  # the one before, if ckpt.pt is damaged

A checkpoint survives crashes and full disks, is checked before it is used, and never runs code. It is what
torch.save writes, a zip archive, with the SHA-256 of all bytes before it as the archive's comment: torch.load
and every unzip read it as it is.
"""

import contextlib
import copy
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NO_FLOAT64 = ("mps",)  # devices without it
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def pick_precision(name, device):
    """(a key of PRECISIONS, why). Raises ValueError for an unknown name."""
    if name != "auto":
        if name not in PRECISIONS:
            raise ValueError(f"precision '{name}' is not one of auto, {', '.join(PRECISIONS)}")
        return name, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16"
        return "fp16", "this GPU has no bf16; the loss is scaled"
    if device.type == "cpu" and any(cpu_has(name) for name in ("avx512_bf16", "amx_bf16")):
        return "bf16", "this CPU has bf16"  # with `layout`: bench.py train
    return "fp32", f"this {device.type} has no fast bf16" if device.type == "cpu" else f"on {device.type}"


def cpu_has(name):
    """Whether torch knows that this CPU has a capability; torch before 2.10 does not say, which counts as
    no."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(name))


def layout(device):
    """A key of LAYOUTS: what to train in, as far as the device tells; on a CPU `fastest_form` may find
    another."""
    # on a CPU a group norm in NHWC takes 3 to 10 times as long, on a Mac a convolution's backward pass 30
    return "nhwc" if device.type == "cuda" else "nchw"


def autocast(device, dtype):
    """The context in which a network computes in dtype; None: in float32."""
    # no cache of cast weights: each is used once, and a graph must not find what lay there before
    return torch.autocast(device.type, dtype, cache_enabled=False) if dtype else contextlib.nullcontext()


def fastest_form(net, loss, batch, forms, seconds=3.0):
    """The (precision, layout), keys of PRECISIONS and LAYOUTS, in which a CPU trains net fastest, and a
    sentence that says so.

    forms: candidates, the usual one first: the first that is not out stays unless another is 20 % faster.
    loss, batch: as of Step. Timed is the processor's work on a copy of net, forward and backward, with as
    many rows of the batch as the seconds allow. Out is a form that fails, or in which one row takes 4 times
    as long as in another (bf16 that is emulated) and longer than a first call may, or all these rows twice as
    long. Neither net nor torch's random numbers change.
    """
    until = time.perf_counter() + seconds
    nets = {layout: copy.deepcopy(net).to(memory_format=LAYOUTS[layout]) for _, layout in forms}

    def took(form, rows):
        began, candidate = time.thread_time(), nets[form[1]]
        try:
            with autocast(torch.device("cpu"), PRECISIONS[form[0]]):
                value = loss(candidate, {k: v[:rows] for k, v in batch.items()})
            value.backward()
        except RuntimeError:  # no memory, or no such operation here; where all fail, the first step says why
            return math.inf
        candidate.zero_grad(set_to_none=True)
        return max(time.thread_time() - began, 0.001)  # Windows counts in 16 ms

    with torch.random.fork_rng(devices=[]):
        first = {form: took(form, 1) for form in forms}
        most = max(0.2, 4 * min(first.values()))  # a first call in bf16 takes 0.05 s more than the next
        row = {form: took(form, 1) for form, t in first.items() if t <= most}
        fit = int((until - time.perf_counter()) / (2 * sum(row.values())))
        rows, rounds = max(1, min(fit, len(next(iter(batch.values()))))), 0
        times = dict.fromkeys(row, math.inf)
        while rounds < (10 if time.perf_counter() < until else 2):
            best, rounds = min(times.values()), rounds + 1
            times |= {form: min(t, took(form, rows)) for form, t in times.items() if t <= 2 * best}
    fastest, usual = min(times, key=times.get), next(iter(times))
    form = fastest if times[fastest] < times[usual] / 1.2 else usual
    others = ", ".join(f"{' '.join(f)} {f'{rows / times[f]:.3g}' if f in times else 'far fewer'}"
                       for f in forms if f != form)
    words = f"precision and layout: {' '.join(form)}, {rows / times[form]:.3g} images a processor second"
    return form, f"{words}; {others}" + "; under 20 % more does not count" * (form != fastest)


@torch.no_grad()
def update_ema(ema, net, step, decay):
    """ema <- decay * ema + (1 - decay) * net, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


class Step:
    """One optimizer step: forward, backward, clip, update. step(batch, lr) -> (2,): the loss, the gradient's
    norm.

    loss(net, batch) -> a scalar; batch: a dictionary of tensors with a row a sample. optimizer: one parameter
    group, fused on CPU and CUDA (and capturable, for graph), so that a nan or infinite gradient changes
    nothing, without a wait. net: as it is, compiled, or (model) under DistributedDataParallel. accumulate:
    parts of a batch, one after the other.
    graph: after 3 steps all launches become one CUDA graph, which small batches gain from; for one process on
    CUDA, without fp16. Raises NoGraph where that fails.
    """

    def __init__(self, net, loss, optimizer, dtype=None, accumulate=1, grad_clip=1.0, compiled=False,
                 graph=False, world=1):
        self.device = next(net.parameters()).device
        self.net, self.loss, self.optimizer, self.dtype = net, loss, optimizer, dtype
        self.accumulate, self.grad_clip = accumulate, grad_clip
        self.fused = optimizer.defaults["fused"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.lr = torch.zeros((), device=self.device) if self.fused else 0.0  # a graph reads it where it lies
        self.model = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True
        ) if world > 1 else net
        self.fast = torch.compile(self.model) if compiled else self.model
        self.no_sync = self.model.no_sync if world > 1 else contextlib.nullcontext
        self.graph, self.replay, self.count = graph, None, 0

    def autocast(self):
        return autocast(self.device, self.dtype)

    def __call__(self, batch, lr):
        self.lr = self.lr.fill_(lr) if self.fused else lr
        self.count += 1
        if self.graph and self.count == 4:  # the first three were real, and warmed up
            try:
                self.replay = as_cuda_graph(self.run, batch)
            except NoGraph:
                self.optimizer.zero_grad(set_to_none=True)  # recorded perhaps, but never computed
                raise
        return (self.replay or self.run)(batch)

    def run(self, batch):
        mean = 0.0
        for i in range(self.accumulate):
            part = {k: v.chunk(self.accumulate)[i] for k, v in batch.items()}
            last = i == self.accumulate - 1  # gradients travel once a step
            with contextlib.nullcontext() if last else self.no_sync():
                with self.autocast():
                    loss = self.loss(self.fast, part) / self.accumulate
                self.scaler.scale(loss).backward()
            mean = mean + loss.detach()
        return torch.stack([mean, self.finish()])

    def finish(self):
        """Clip and update. -> the gradients' norm before."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip or math.inf)
        self.optimizer.param_groups[0]["lr"] = self.lr
        if self.fused:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # the kernel looks at it
        if self.fused or norm.isfinite():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def fits(self, batch):
        """How many rows go through forward and backward in the memory there is: a half, a quarter, ...; 0:
        not even one."""
        rows = len(next(iter(batch.values()))) // self.accumulate
        while rows := rows // 2:
            self.optimizer.zero_grad(set_to_none=True)
            loss = None  # with what its backward pass kept
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                with self.autocast():
                    loss = self.loss(self.net, {k: v[:rows] for k, v in batch.items()})
                # no loss.backward(), which DistributedDataParallel's hooks would take for their own step
                torch.autograd.grad(loss, [*self.net.parameters()], allow_unused=True)
                break
            except RuntimeError as e:
                if not out_of_memory(e):
                    raise
        return rows


class NoGraph(RuntimeError):
    """Launches that could not be captured. Nothing was computed; the allocator keeps memory back from now
    on."""


def as_cuda_graph(run, batch):
    """run(batch) as one CUDA graph: a small batch waits for its thousands of launches, not for its
    arithmetic.

    run must neither wait for the device nor read anything that does not lie at the same address every time.
    What it returns is copied; the batch of the capture is not computed. Raises NoGraph with the first cause.
    """
    graph, fixed = torch.cuda.CUDAGraph(), {k: v.clone() for k, v in batch.items()}
    stream = torch.cuda.current_stream()
    try:
        # Other threads allocate page-locked memory meanwhile, which the default mode, "global", forbids them.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run(fixed)
    except RuntimeError as e:
        torch.cuda.set_stream(stream)  # the capture's own one stays current when its end fails
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())  # else torch.rand fails from here on
        while e.__context__:
            e = e.__context__
        raise NoGraph(f"no CUDA graph of a step ({str(e).strip().splitlines()[0]})") from e

    def replay(batch):
        for k, v in fixed.items():
            v.copy_(batch[k])
        graph.replay()
        return result.clone()

    return replay


def fit_state(optimizer):
    """Bring an optimizer's loaded state to its parameters' device and layout; load_state_dict keeps strides.

    On another device than before, `layout` may differ, and fused kernels pair numbers by their place in
    memory.
    """
    fused = optimizer.defaults["fused"]
    for p, state in optimizer.state.items():
        for name, v in state.items():
            if v.shape == p.shape:
                state[name] = torch.empty_like(p).copy_(v)
            else:
                state[name] = v.to(p.device if fused else "cpu")  # the number of steps


def out_of_memory(e):
    """Whether an exception says so, on any device."""
    # "engine": what cuDNN's benchmark says; "hold": what segment.denoise does
    phrases = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED",
               "unable to find an engine", "memory does not hold")
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or any(phrase in str(e) for phrase in phrases)


def pick_device(name):
    """auto, cpu, cuda, cuda:1, mps -> torch.device, now the current one; of CUDA with its number, which
    torch.cuda.set_device needs: torchrun's processes have a GPU each. Raises ValueError if it is not
    there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # now: no other GPU is touched
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda and mps")
        torch.zeros(1, device=device)
        if device.type == "cuda":  # Triton launches on the current device, wherever the tensors are
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device '{name}' is not usable here ({str(e).splitlines()[0][:80]}): try --device "
                         f"cpu") from None


def join_processes(rank, world, backend, patient=False):
    """Make this one of `world` processes that torchrun started. patient: they wait for each other as long as
    it takes, not 10 or 30 minutes."""
    host, port, env = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ.get
    store = dist.TCPStore(host, port, world, is_master=rank == 0
                          and env("TORCHELASTIC_USE_AGENT_STORE") != "True")
    # after a restart the store still holds the addresses of the dead processes
    store = dist.PrefixStore(env("TORCHELASTIC_RESTART_COUNT", "0"), store)
    longest = datetime.timedelta(days=365) if patient else None
    dist.init_process_group(backend, timeout=longest, store=store, rank=rank, world_size=world)


def wait_for_all():
    """Until all joined processes have come here; it can be interrupted. Returns whether this is the first of
    them, or the only one."""
    if not dist.is_initialized():
        return True
    work = dist.barrier(async_op=True)
    while not work.is_completed():
        time.sleep(0.1)
    return dist.get_rank() == 0


def any_stopped(stop, world):
    """Endless: is the list `stop` filled? Of several processes, in any, as of one step ago, so that none
    waits for the others."""
    before = None
    while True:
        if world == 1:
            yield bool(stop)
        else:
            told = torch.tensor(len(stop))
            work = dist.all_reduce(told, async_op=True)
            yield before is not None and before[1].wait() and bool(before[0])
            before = told, work


def host_threads(device):
    """How many threads of torch the CPU's part takes beside a GPU: at most 4. With 16 of them a photo's tree
    took 1.6 times as long (NVIDIA H200, 16 cores). None for a CPU, where Threads measures it."""
    return None if device.type == "cpu" else min(4, torch.get_num_threads())


class Threads:
    """How many threads torch computes with on a CPU: 1, half of those that it would take, or all, whichever
    takes real steps least time.

    They wait for each other thousands of times a step: where another job has the core of one of two, both
    together take a hundred times as long as one alone. Call it after every step; it sets the number for the
    next one, and returns a sentence where that has changed, else "". It measures at the start, every 1,000
    steps, and when steps take twice as long as they did. fixed: that many, unmeasured.
    """

    def __init__(self, fixed=None):
        most = fixed or torch.get_num_threads()
        self.choices = [fixed] if fixed else sorted({1, max(1, most // 2), most})
        self.before, self.chosen = None, None
        self.measure()

    def measure(self):
        self.times = {n: [] for n in self.choices if len(self.choices) == 1 or n == 1 or not crowded(n)}
        self.recent, self.steps = deque(maxlen=3), 0
        torch.set_num_threads(self.choices[0])

    def __call__(self):
        now, before = time.perf_counter(), self.before
        self.before, self.steps = now, self.steps + 1
        if len(self.choices) == 1 or before is None:
            return ""
        if self.recent:  # decided
            self.recent.append(now - before)
            if min(self.recent) > 2 * min(self.times[self.chosen]) or self.steps > 1000:
                self.measure()
            return ""
        self.times[torch.get_num_threads()].append(now - before)
        best = min(min(t) for t in self.times.values() if t)
        if todo := [n for n, t in self.times.items() if len(t) < 3 and (not t or min(t) < 3 * best)]:
            torch.set_num_threads(todo[0])
            return ""
        last, self.chosen = self.chosen, min(self.times, key=lambda n: min(self.times[n]))
        torch.set_num_threads(self.chosen)
        self.recent.append(best)
        took = [f"{1000 * min(self.times[n]):.0f} ms with {n}" if n in self.times
                else f"far longer with {n}, which wait for a core" for n in self.choices]
        return f"threads: {self.chosen}, as a step took {', '.join(took)}" if self.chosen != last else ""


def crowded(n):
    """Whether n threads of torch wait for a core that another job has: milliseconds for what takes 10 us."""
    torch.set_num_threads(n)
    x, began = torch.zeros(2**17), time.perf_counter()
    for _ in range(500):
        x.add_(1)
        if time.perf_counter() - began > 0.05:
            return True
    return False


class Watch:
    """What the losses (N,) and gradient norms (N,) of the last steps say: mean, skipped steps, spikes, steps
    lost in a row."""

    def __init__(self):
        self.mean, self.row, self.worst = None, 0, 0

    def __call__(self, losses, norms, first):
        """-> dict(loss, skipped, spikes [(step, loss)], above 5 times the mean before); self.worst: the
        longest row of steps without a finite gradient."""
        ok = [abs(n) < float("inf") for n in norms]  # False for nan, too
        for good in ok:
            self.row = 0 if good else self.row + 1
            self.worst = max(self.worst, self.row)
        finite = [v for v, good in zip(losses, ok) if good]
        spikes = [(first + i, v) for i, (v, good) in enumerate(zip(losses, ok))
                  if good and self.mean is not None and v > 5 * self.mean]
        mean = sum(finite) / len(finite) if finite else None
        self.mean = self.mean if mean is None else mean
        return dict(loss=mean, skipped=len(ok) - len(finite), spikes=spikes)


class Output:
    """A text stream that takes what it can and never raises: a closed pipe, a full disk, a terminal that is
    gone."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


# the terminal, or the connection to it, was closed; Windows has none
HANGUP = getattr(signal, "SIGHUP", None)


def one_line():
    """A warnings.formatwarning, whose third warning from one line of code, as of one kind of file, says that
    it is the last."""
    seen = Counter()

    def told(message, category, file, number, line=None):
        seen[file, number] += 1
        last = " (further ones of this kind are not named)" * (seen[file, number] == 3)
        return f"NOTE: {message}{last}\n" * (seen[file, number] <= 3)

    return told


def program(name, stopped):
    """Decorates main(argv) -> exit status, so that it outlasts its terminal.

    Nothing that is printed inside can raise, and a warning is one line. SIGTERM and SIGHUP (unless it is
    ignored, as with nohup) raise KeyboardInterrupt as Ctrl-C does; where main lets it pass, the sentence
    "name: stopped: ..." and 128 + the signal's number are the end.
    """
    def interrupt(process, number, frame):
        if os.getpid() != process:  # forked meanwhile: ends as without this handler
            os._exit(128 + number)
        if number == HANGUP:  # the shell repeats the kernel's
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    def around(main):
        @functools.wraps(main)
        def run(argv=None):
            for number in range(3):  # a closed one would be the next file's, which gets what is printed
                try:
                    os.fstat(number)
                except OSError:
                    os.open(os.devnull, os.O_RDWR)
            handlers, streams = {}, (sys.stdout, sys.stderr)
            if threading.current_thread() is threading.main_thread():
                handlers = {n: signal.signal(n, functools.partial(interrupt, os.getpid()))
                            for n in (signal.SIGTERM, HANGUP) if n and signal.getsignal(n) == signal.SIG_DFL}
            sys.stdout, sys.stderr = outputs = [Output(stream) for stream in streams]
            gc.freeze()  # else the collector looks through all that was imported, 80 ms each time
            usual, warnings.formatwarning = warnings.formatwarning, one_line()
            try:
                return main(argv)
            except KeyboardInterrupt as e:
                print(f"\n{name}: stopped: {stopped}", file=sys.stderr)
                return 128 + (e.args or (signal.SIGINT,))[0]
            finally:
                sys.stdout, sys.stderr = streams
                warnings.formatwarning = usual
                gc.unfreeze()
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                for output in outputs:
                    drop(output.stream)
        return run
    return around


def complaint(name):
    """error(message) for argparse and others: one sentence, without usage, and exit status 2."""
    def error(message):
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(2)
    return error


def drop(stream):
    """Flush a stream; if that fails, Python's own attempt at the end must not, which would change the exit
    status."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def try_to_write(what, action):
    """Whether action(), which writes a file, worked. A full disk is a warning, not the end of a run."""
    try:
        action()
        return True
    except OSError as e:
        print(f"WARNING: {what} is not written ({e.strerror or e}). Training goes on; make room on the disk",
              file=sys.stderr)
        return False


def foreign(path, start):
    """Whether there is a file at path that does not begin with the bytes `start`, as far as it goes: a kill
    may have cut it."""
    return path.exists() and not start.startswith(path.read_bytes()[: len(start)])


def append(path, line):
    """Add a dictionary to a .jsonl file, all of it or, where the disk is full, nothing."""
    with open(path, "ab", buffering=0) as f:
        end, text = f.tell(), (json.dumps(line) + "\n").encode()
        try:
            if f.write(text) < len(text):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            f.truncate(end)
            raise


def forget(path, keep):
    """Drop the lines of a .jsonl file that are half written or for which not keep(line): they will be written
    again."""
    def kept(line):
        try:
            return keep(json.loads(line))
        except (ValueError, KeyError, TypeError):
            return False

    if Path(path).exists():
        with open(path, errors="replace") as f:
            lines = [line for line in f if kept(line)]
        part = Path(path).with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, path)

# ------------------------------------------------------------------------------------------------------------
# Options


def options_given(argv, kind):
    """Command line -> {key: value}, of the type that the dataclass `kind` gives each. Raises ValueError."""
    return {key: typed(key, value, kind.__dataclass_fields__[key].type)
            for key, value in option_words(argv, kind).items()}


def option_words(argv, kind):
    """Command line of --key value, --key=value or, if it is to be true, --key -> {key: value as it stands
    there}. Keys are fields of the dataclass `kind`, their underscores dashes if one likes. Raises
    ValueError."""
    fields, given, left = kind.__dataclass_fields__, {}, list(argv)
    while left:
        word = left.pop(0)
        key, eq, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.4) if word.startswith("--") else []
            more = f"did you mean --{near[0]}?" if near else "see --help"
            if not word.startswith("--") and "dataset" in fields:
                more = f"did you mean --dataset {word}?"
            raise ValueError(f"unknown option '{word}': {more}")
        if not eq and left and not left[0].startswith("--"):
            value = left.pop(0)
        elif not eq and fields[key].type is bool:
            value = "true"
        elif not eq:
            raise ValueError(f"--{key} needs a value")
        given[key] = value
    return given


def typed(key, value, kind):
    if kind is bool:
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--{key} is true or false, not '{value}'")
        return value.lower() in ("true", "1")
    try:
        return int(float(value)) if kind is int and float(value).is_integer() else kind(value)
    except ValueError:
        raise ValueError(f"--{key} needs a {'whole ' * (kind is int)}number, not '{value}'") from None


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


FORMAT = 2  # of the dictionaries; `save_checkpoint` writes it, `read` refuses any other
MARK = b"sha256:"  # then 64 hexadecimal digits
TAIL = 2 + len(MARK) + 64  # the length of a zip archive's comment, and the comment


def make_folder(path):
    """Make the folder of --out, and those above it. Raises ValueError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{path}: no folder can be made there ({e.strerror.lower()}): choose another "
                         f"--out") from None


class Damaged(ValueError):
    """The file is cut short or altered."""


def previous(path):
    """Where `save_checkpoint` keeps the one before: run/ckpt.pt -> run/ckpt.prev.pt."""
    return Path(path).with_suffix(f".prev{Path(path).suffix}")


def save_checkpoint(path, content, keep_previous=False):
    """Write a dictionary so that a crash at any moment leaves a whole file: temporary file, fsync, rename,
    fsync.

    keep_previous: the file that was at path stays, as previous(path). Raises OSError (disk full, say):
    nothing has changed then, and the temporary file is gone.
    """
    path, buffer = Path(path), io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getbuffer()[:-2]  # without the length of no comment
    comment = MARK + hashlib.sha256(data).hexdigest().encode()
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.write(len(comment).to_bytes(2, "little") + comment)
            f.flush()
            os.fsync(f.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))  # a crash here: `newest` takes that one
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renames, too, are on the disk now
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def on_host(content):
    """A copy of dictionaries, lists and tensors on the host, which later changes do not reach."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {k: on_host(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(on_host, content))
    return content


def ahead(function, items, count=1):
    """function(item) of each item, in order, computed in a thread up to `count` items ahead."""
    pool, waiting = ThreadPoolExecutor(1), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read(path):
    """The dictionary in a file of `save_checkpoint`, its tensors on the host. Raises ValueError naming the
    file: Damaged, or refused for its contents."""
    path = Path(path)
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train one with: python train.py") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    if whole[-TAIL + 2 : -64] != MARK:
        raise Damaged(f"{path}: not a readable checkpoint: no checksum at its end, so it is cut short or of "
                      f"another kind")
    if hashlib.sha256(memoryview(whole)[:-TAIL]).hexdigest().encode() != whole[-64:]:
        raise Damaged(f"{path}: not a readable checkpoint: its contents do not match its checksum")
    try:
        content = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        what = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise ValueError(f"{path}: refused: it holds {what[1] if what else 'something'}, which is neither "
                         f"tensor nor plain "
                         f"value and could run code; use a file from a source that you trust") from None
    except Exception as e:  # torch raises many kinds here
        raise Damaged(f"{path}: not a readable checkpoint ({str(e).splitlines()[0][:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        other = f"none, a {type(content).__name__}"
        if isinstance(content, dict):
            other = content.get("format", "none")
        raise ValueError(f"{path}: its format is {other}, this version reads format {FORMAT}: "
                         f"use the version that wrote it")
    return content


def newest(path):
    """(content, its path, what is wrong with path or ""): path, or the one before where it is missing or
    damaged.

    (None, None, "") when there is neither. Raises ValueError when none of those that there are can be used.
    """
    problem = "" if Path(path).exists() else f"{path}: missing"
    for candidate in (Path(path), previous(path)):
        if candidate.exists():
            try:
                return read(candidate), candidate, problem
            except Damaged as e:
                problem = f"{problem}; {e}" if problem else str(e)
    if stored(path):
        raise ValueError(problem)
    return None, None, ""


def stored(path):
    """Whether there is a file, damaged or not, for `newest` to go on from."""
    return Path(path).exists() or previous(path).exists()


def lock(folder):
    """Take folder/lock for this process, until the returned file is closed or the process ends, however it
    ends.

    Raises ValueError, saying which process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / "lock", "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2**20)  # beyond the text, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is in use by {holder}: "
                         f"stop that one first, or use another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
