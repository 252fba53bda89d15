"""Processes that make batches ahead, into one ring of shared memory.

What it is: `ring(make, rows, workers)`, endless batches in order, the same for any number of processes, none
of which outlives its parent. What it is not: it knows nothing of images.

The memory has no name in the file system while it is used, so that no end of the program leaves any behind. A
process waits at the pipe that tells it which piece to make, and ends when the parent's end of that is closed,
however the parent ended.
"""

import contextlib
import itertools
import mmap
import multiprocessing
import signal
import sys
from collections import Counter, deque
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize

import numpy as np
import torch

START = "fork" if sys.platform == "linux" else "spawn"  # spawn: a new interpreter, seconds and 200 MB each
PIECE = 8  # rows at most that a process makes at once
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Unread(Exception):
    """A process that makes samples failed or was killed. The text says what to do."""


def ring(make, rows, workers, pin=False):
    """Batches 0, 1, 2, ... of so many rows, without end: tuples of tensors that `workers` processes make.

    make(batch, first, last) -> the rows first to last - 1 of a batch, a tuple of tensors whose types and
    shapes, but for the number of rows, are always the same; where processes are spawned, it is pickled. pin:
    for CUDA. A batch then lies in the ring itself, in page-locked memory: copy it to the device, on the
    current stream, before the next one is asked for. Otherwise it is the caller's. Raises Unread.
    """
    context, processes, lent = multiprocessing.get_context(START), {}, deque()  # {its pipe: process}
    piece = min(PIECE, -(-rows // workers))
    firsts = range(0, rows, piece)
    slots = max(2, -(-2 * workers // len(firsts))) + pin  # two pieces a process, and the batch that is lent
    example = make(0, 0, 1)
    memory = [context.RawArray("b", slots * rows * part.nbytes) for part in example]
    shapes = [(part.numpy().dtype, (slots, rows, *part.shape[1:])) for part in example]
    parts = [torch.from_numpy(part) for part in arrays(memory, shapes)]
    tasks, commands = context.Pipe(duplex=False)
    lock, made = context.Lock(), Counter()

    def order(batch):
        for first in firsts:
            commands.send((batch, first, min(first + piece, rows)))

    end = Finalize(None, kill, (processes,), exitpriority=1)  # also when the interpreter ends first
    try:
        start(processes, context, workers, (make, memory, shapes, tasks, commands, lock))
        tasks.close()
        if pin:
            for part in parts:
                locked(part)
        for batch in range(slots):
            order(batch)
        for batch in itertools.count():
            while made[batch] < len(firsts):
                for done in wait([*processes]):
                    made[heard(done)] += 1
            del made[batch]
            here = tuple(part[batch % slots] for part in parts)
            if not pin:
                here = tuple(part.clone() for part in here)
                order(batch + slots)
            yield here
            if pin:  # its copy is on the way; that of the batch before has arrived, or is waited for
                lent.append(torch.cuda.current_stream().record_event())
                if batch:
                    lent.popleft().synchronize()
                    order(batch - 1 + slots)
    finally:
        end()
        for pipe in (commands, *processes):
            pipe.close()
        if pin:
            torch.cuda.synchronize()
            for part in parts:
                torch.cuda.cudart().cudaHostUnregister(part.data_ptr())


def start(processes, context, workers, arguments):
    """Start processes that `work`, each with a pipe of its own, into {that pipe: process}."""
    with blocked(SIGNALS):  # which children inherit: it is for the parent to say when they end
        for _ in range(workers):
            done, childs_end = context.Pipe(duplex=False)
            process = context.Process(target=work, daemon=True, args=(*arguments, childs_end))
            process.start()
            childs_end.close()
            processes[done] = process


def kill(processes):
    for process in processes.values():
        process.kill()  # it holds nothing but a piece of a batch
    for process in processes.values():
        process.join()


def arrays(memory, shapes):
    return [np.frombuffer(block, kind).reshape(shape) for block, (kind, shape) in zip(memory, shapes)]


@contextlib.contextmanager
def blocked(numbers):
    """Signals wait for the end of this, in this thread; a process that is started in it never gets them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def locked(part):
    """Lock the pages of a tensor, so that CUDA copies it without a wait."""
    status = torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.nbytes, 0)
    if int(status):
        raise Unread(f"the system does not lock {part.nbytes / 1e6:.0f} MB of memory for the readers "
                     f"({status}): use --workers 0")


def heard(done):
    """The number of the batch that a process has made a piece of."""
    try:
        message = done.recv()
    except (EOFError, OSError):
        raise Unread("a process that makes samples was killed, perhaps for lack of memory: use fewer "
                     "--workers, and run the same command again") from None
    if isinstance(message, str):
        raise Unread(f"a process that makes samples failed ({message}): --workers 0 shows where; mend that, "
                     f"and run the same command again")
    return message


def work(make, memory, shapes, tasks, commands, lock, done):
    """What a process does: the pieces that come by `tasks`, until nobody is left to send any."""
    commands.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows cannot block it
    torch.set_num_threads(1)
    whole = arrays(memory, shapes)
    with contextlib.suppress(EOFError, OSError):  # of the pipes: the parent is gone
        while True:
            with lock:
                batch, first, last = tasks.recv()
            try:
                for array, part in zip(whole, make(batch, first, last)):
                    array[batch % len(array), first:last] = part.numpy()
            except Exception as e:
                done.send(" ".join(f"{type(e).__name__}: {e}".split()))
                return
            done.send(batch)


# A mapped array travels to a spawned process as the place of its file, not as its numbers.


def mapped(path, kind, shape, strides, at):
    whole = np.memmap(path, np.uint8, "r")
    first = whole[at : at + kind.itemsize].view(kind)
    return np.lib.stride_tricks.as_strided(first, shape, strides, subok=True)


def place(array):
    if array._mmap is None:  # a copy in memory
        return np.ndarray.__reduce__(array)
    start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY  # of the map in the file
    at = start + array.ctypes.data - np.frombuffer(array._mmap, np.uint8).ctypes.data
    return mapped, (array.filename, array.dtype, array.shape, array.strides, at)


ForkingPickler.register(np.memmap, place)
