"""Checkpoint files that survive crashes and full disks, are checked before they are used, and never run code.

What it is: `save`, `read` and `newest` for one dictionary of tensors and plain values in one file, `on_host`
and `Beside` to save while training goes on, and `lock` for the folder that a run writes to. What it is not: it
knows nothing of networks or training; it needs torch only.

Use it alone:
    from checkpoint import lock, newest, save
    held = lock("run")                                       # a second process gets a ValueError that names this one
    save("run/ckpt.pt", dict(step=3, net=net.state_dict()), keep_previous=True)      # and run/ckpt.prev.pt
    content, path, problem = newest("run/ckpt.pt")           # the one before, if ckpt.pt is damaged

A file is what torch.save writes, a zip archive, with the SHA-256 of all bytes before it as the archive's comment: torch.load
and every unzip read it as it is.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None
    import msvcrt

FORMAT = 2                                       # of the dictionaries; `save` writes it, `read` refuses any other
MARK = b"sha256:"                                # then 64 hexadecimal digits
TAIL = 2 + len(MARK) + 64                        # the length of a zip archive's comment, and the comment


class Damaged(ValueError):
    """The file is cut short or altered."""


def previous(path):
    """Where `save` keeps the checkpoint before: run/ckpt.pt -> run/ckpt.prev.pt."""
    return Path(path).with_suffix(f".prev{Path(path).suffix}")


def save(path, content, keep_previous=False):
    """Write a dictionary so that a crash at any moment leaves a whole file: temporary file, fsync, rename, fsync.

    keep_previous: the file that was at path stays, as previous(path). Raises OSError (disk full, say): nothing has changed
    then, and the temporary file is gone.
    """
    path, buffer = Path(path), io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getbuffer()[:-2]                                                 # without the length of no comment
    comment = MARK + hashlib.sha256(data).hexdigest().encode()
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.write(len(comment).to_bytes(2, "little") + comment)
            f.flush()
            os.fsync(f.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))                                       # a crash here: `newest` takes that one
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":                                                         # the renames, too, are on the disk now
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


class Beside:
    """Jobs in a thread beside the caller: beside(job) begins one, once the one before has ended."""

    def __init__(self):
        self.pool, self.job = ThreadPoolExecutor(1), None

    def __call__(self, job):
        self.wait()
        self.job = self.pool.submit(job)

    def wait(self):
        """What the last job returned, once it has; None before the first. Raises what it raised."""
        return self.job and self.job.result()

    def close(self):
        self.pool.shutdown()  # what has begun is brought to its end


def read(path, device="cpu"):
    """The dictionary in a file that `save` wrote. Raises ValueError naming the file: Damaged, or refused for its contents."""
    path = Path(path)
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; train one with: python train.py") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    if whole[-TAIL + 2 : -64] != MARK:
        raise Damaged(f"{path}: not a readable checkpoint: no checksum at its end, so it is cut short or of another kind")
    if hashlib.sha256(memoryview(whole)[:-TAIL]).hexdigest().encode() != whole[-64:]:
        raise Damaged(f"{path}: not a readable checkpoint: its contents do not match its checksum")
    try:
        content = torch.load(io.BytesIO(whole), map_location=device, weights_only=True)
    except pickle.UnpicklingError as e:
        what = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise ValueError(f"{path}: refused: it holds {what[1] if what else 'something'}, which is neither tensor nor plain "
                         f"value and could run code; use a file from a source that you trust") from None
    except Exception as e:                                                         # torch raises many kinds here
        raise Damaged(f"{path}: not a readable checkpoint ({str(e).splitlines()[0][:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        other = content.get("format", "none") if isinstance(content, dict) else f"none, a {type(content).__name__}"
        raise ValueError(f"{path}: its format is {other}, this version reads format {FORMAT}: use the version that wrote it")
    return content


def newest(path, device="cpu"):
    """(content, its path, what is wrong with path or ""): path, or the one before where it is missing or damaged.

    (None, None, "") when there is neither. Raises ValueError when none of those that there are can be used.
    """
    problem = "" if Path(path).exists() else f"{path}: missing"
    for candidate in (Path(path), previous(path)):
        if candidate.exists():
            try:
                return read(candidate, device), candidate, problem
            except Damaged as e:
                problem = f"{problem}; {e}" if problem else str(e)
    if Path(path).exists() or previous(path).exists():
        raise ValueError(f"{problem}; remove it to start anew")
    return None, None, ""


def lock(folder):
    """Take folder/lock for this process, until the returned file is closed or the process ends, however it ends.

    Raises ValueError, saying which process has it.
    """
    file = open(Path(folder) / "lock", "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2**20)                                                       # beyond the text, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{folder} is in use by {holder}: stop that one first, or use another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
