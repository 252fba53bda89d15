"""Packed data sets: every item decoded and resized once, appended to two files that are mapped, not read,
afterwards.

What it is: `pack(files, listing, ...)` -> Packed, made by several processes if it is not there yet; a kill or
a full disk costs seconds. What it is not: it knows no file format (formats.py), no batches and no
augmentation (data.py).
"""

import contextlib
import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from frame import IGNORE, connected, fitted, resize_image, resize_label
from sources.formats import HEIC, READING, Notice, ids_of, in_words, open_image, pillow_heif, read_labels

try:
    import fcntl
except ImportError:  # Windows: no lock between processes that pack
    fcntl = None

VERSION = 100 * READING + 7  # of packed data sets
SAVE_EVERY = 5.0  # seconds of packing that a kill can cost


@dataclass
class Packed:
    """A data set in memory-mapped arrays. get(positions, draws) picks label map floor(draw * count) of
    several."""

    name: str
    images: np.ndarray  # (N, d S, d S, 3) uint8
    photos: np.ndarray  # (N, S, S, 3) uint8: the same at the label maps' resolution
    labels: np.ndarray  # (M, S, S) uint16, IGNORE = 65535
    first: np.ndarray  # (N + 1,): the label maps of image i are first[i] to first[i + 1]
    sizes: np.ndarray  # (N, 2): h, w of the label maps' valid part
    names: list  # N file stems
    items: np.ndarray  # (N,): their numbers in the listing of the files
    folder: Path  # where the arrays lie
    labels_below: int  # all ids are below it
    mapped = 0  # bytes touched since the pages were last let go

    def __len__(self):
        return len(self.images)

    def get(self, positions, draws=None):
        """positions (B,) modulo len; draws (B,) in [0, 1): images (B, d S, d S, 3) uint8, labels (B, S, S)
        int64, sizes (B, 2)."""
        i = np.asarray(positions) % len(self)
        pick = self.first[i] + ((draws if draws is not None
                                 else 0) * (self.first[i + 1] - self.first[i])).astype(int)
        images, labels = torch.from_numpy(self.images[i]), unpack(self.labels[pick])
        self.let_go(images.numel() + 2 * labels.numel())
        return images, labels, torch.from_numpy(self.sizes[i]).long()

    def photo(self, i):
        """Image i at the label maps' resolution: (S, S, 3) uint8."""
        return np.array(self.photos[i % len(self)])

    def maps(self, i):
        """All label maps of image i: (annotators, S, S) int64."""
        i %= len(self)
        return unpack(self.labels[self.first[i] : self.first[i + 1]])

    def let_go(self, size, limit=2**28):
        """Unmap the pages now and then (they stay in the system's cache), so that resident memory does not
        grow."""
        self.mapped += size
        if self.mapped > limit and hasattr(mmap, "MADV_DONTNEED"):
            for array in (self.images, self.labels):
                if getattr(array, "_mmap", None) is not None:
                    array._mmap.madvise(mmap.MADV_DONTNEED)
            self.mapped = 0


def unpack(labels):
    # numpy: no second team of threads
    return torch.from_numpy(np.where(labels == IGNORE, -1, labels.astype(np.int64)))


DONE, EMPTY, BAD, LEFT = range(4)


def convert(item, size, unlabelled, components, detail=1):
    """One item -> (DONE, [image (d S, d S, 3) uint8; if d > 1: the photo, (S, S, 3)], (h, w), label maps (n,
    S, S) uint16, numbers of segments before and after resizing, notices), or (EMPTY, BAD or LEFT, reason).
    Whatever is wrong, nothing is raised."""
    if item.read is None:
        return LEFT if item.image else BAD, item.arg
    labels, segments, kept = [], 0, 0
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            image, (W, H) = open_image(item.image, size * detail)
            w, h = fitted(W, H, size)
            pictures = [resize_image(image, size * d, (w * d, h * d))[0] for d in dict.fromkeys((detail, 1))]
            for label in read_labels(item):
                label = connected(label) if components else label
                label = np.where(label == 0, -1, label) if unlabelled == "ignore" else label
                labels.append(resize_label(label, size))
                segments += int((ids_of(label) != -1).sum())
                kept += int((ids_of(labels[-1]) != IGNORE).sum())
            labels = np.stack(labels)
            if not kept:
                return EMPTY, f"{item.labels[0]}: nothing labelled in {item.image}"
    except Exception as e:  # of any library, for whatever is in a file
        named = any(path in str(e) for path in (item.image, *item.labels))
        where = " with ".join([item.image, *item.labels[:1]])
        return BAD, str(e) if named else f"{where}: cannot be used ({in_words(e)})"
    notices = list(dict.fromkeys(str(w.message) for w in told if w.category is Notice))
    return DONE, pictures, (h, w), labels, (segments, kept), notices


def pack(files, listing, cache, name, options, workers, max_bad):
    """The packed copy of these files with these options: made if it is not there, mapped if it is."""
    home = os.path.commonpath([path for path, _, _ in files]) if files else ""
    print_of = json.dumps([(os.path.relpath(path, home), *rest) for path, *rest in files])
    fingerprint = hashlib.sha256(print_of.encode()).hexdigest()[:16]
    heic = pillow_heif is not None and any(Path(path).suffix.lower() in HEIC for path, _, _ in files)
    made = json.dumps([VERSION, fingerprint, options] + ["HEIC"] * heic)
    key = hashlib.sha256(made.encode()).hexdigest()[:8]
    target = cache / f"{name}-{options['size']}-{key}"
    if not is_complete(target):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = open(f"{target}.lock", "w")
        except OSError as e:
            raise OSError(f"{cache}: {(e.strerror or str(e)).lower()}; choose another --cache") from None
        with lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be packing the same
            if not is_complete(target):
                shutil.rmtree(target, ignore_errors=True)  # cut off from outside
                pack_items(target, listing(), name, options, fingerprint, workers, max_bad)
        Path(f"{target}.lock").unlink(missing_ok=True)
    elif bad := json.loads((target / "index.json").read_text())["bad"]:
        print(f"NOTE: {bad} items of {name} were skipped when it was packed ({target / 'skipped.txt'}); "
              f"where that is mended, remove {target}")
    index = json.loads((target / "index.json").read_text())
    if index["bad"] > max_bad * (index["bad"] + index["images"]):
        raise too_bad(target, index["bad"], index["bad"] + index["images"], max_bad, index["example"])
    rows, S = np.load(target / "rows.npy"), options["size"]  # (N, 7), see `Store`
    sides = dict.fromkeys((S * options["detail"], S))  # of the pictures that each image has
    images = np.memmap(target / "images.u8", [(str(side), np.uint8, (side, side, 3)) for side in sides], "r",
                       shape=len(rows))
    labels = np.memmap(target / "labels.u16", np.uint16, "r", shape=(index["label_maps"], S, S))
    return Packed(name, images[str(S * options["detail"])], images[str(S)], labels,
                  first=np.concatenate([[0], rows[:, 3].cumsum()]), sizes=rows[:, 1:3],
                  names=(target / "names.txt").read_text("utf-8").splitlines(), items=rows[:, 0],
                  folder=target, labels_below=index["segments"])


def is_complete(folder):
    """Whether a packed copy is complete: the index is written last, and says how long the files are."""
    try:
        index = json.loads((folder / "index.json").read_text())
        return all((folder / file).stat().st_size == size for file, size in index["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def too_bad(folder, bad, total, max_bad, example):
    return ValueError(f"{example} ({bad} of {total} items cannot be used, more than --max_bad {max_bad:g} "
                      f"allows; {folder / 'skipped.txt'} lists them)")


class Store:
    """The files of a packed copy in the making: only what a row of rows.npy tells of counts as done, all else
    is cut off."""

    def __init__(self, folder, options):
        folder.mkdir(exist_ok=True)
        self.folder, self.size = folder, options["size"]
        self.sides = {self.size * options["detail"], self.size}  # of the pictures that each image has
        self.images, self.labels = (open(folder / file, "ab", 0) for file in ("images.u8", "labels.u16"))
        self.notices = open(folder / "notices.txt", "a", encoding="utf-8", errors="replace")
        # item, h, w, maps, largest number of an id, segments before resizing, after
        self.rows = np.load(folder / "rows.npy").tolist() if (folder / "rows.npy").exists() else []
        if any(os.fstat(file.fileno()).st_size < length for file, length in self.lengths().items()):
            self.rows = []  # cut off from outside
        self.truncate()

    def close(self):
        for file in (self.images, self.labels, self.notices):
            file.close()

    def bytes_of(self, images, label_maps):
        return 3 * sum(side**2 for side in self.sides) * images, 2 * self.size**2 * label_maps

    def lengths(self):
        """{file: bytes that the rows tell of}."""
        return dict(zip((self.images, self.labels),
                        self.bytes_of(len(self.rows), sum(row[3] for row in self.rows))))

    def truncate(self):
        for file, length in self.lengths().items():
            file.truncate(length)

    def add(self, number, pictures, sizes, labels, counts, notices):
        """What `convert` made of an item."""
        self.notices.writelines(" ".join(text.splitlines()) + "\n" for text in notices)
        for picture in pictures:
            append(self.images, picture)
        append(self.labels, labels)
        ids = 1 + int(labels[labels != IGNORE].max(initial=0))
        self.rows.append([number, *sizes, len(labels), ids, *counts])

    def commit(self):
        """Write rows.npy, once their pixels are surely on the disk."""
        os.fsync(self.images.fileno())
        os.fsync(self.labels.fileno())
        with open(self.folder / "rows.tmp", "wb") as f:
            np.save(f, np.array(self.rows, np.int64).reshape(-1, 7))
            f.flush()
            os.fsync(f.fileno())
        os.replace(self.folder / "rows.tmp", self.folder / "rows.npy")

    def rescue(self):
        """Commit what is there; on a full disk fewer rows, which makes room for the list of the others."""
        while True:
            try:
                return self.commit()
            except OSError as e:
                if e.errno != errno.ENOSPC or not self.rows:
                    return
                del self.rows[-1 - len(self.rows) // 20 :]
                self.truncate()


def pack_items(target, items, name, options, fingerprint, workers, max_bad):
    """Pack items into target.part, going on from what an earlier call left there, and rename it when it is
    complete."""
    part, started = target.with_name(target.name + ".part"), time.monotonic()
    with contextlib.closing(Store(part, options)) as store:
        rows, already = store.rows, len(store.rows)
        todo = sorted(set(range(len(items))) - {row[0] for row in rows})
        workers = max(1, min(workers, len(todo) // 16))
        need = sum(store.bytes_of(len(items), sum(len(item.labels) for item in items)))
        full = OSError(f"{name} needs {need / 1e9:.2f} GB in {target.parent} when packed, and the disk is "
                       f"full; what was written is kept: free some space, or give another --cache, and run "
                       f"the same command again")
        if shutil.disk_usage(part).free < need - sum(store.lengths().values()):
            raise full
        try:
            reasons = convert_all(store, items, todo, name, options, workers)
        except BrokenProcessPool:
            raise OSError(f"a process that packed {name} was killed, perhaps for lack of memory: run again "
                          f"with fewer --workers; what was written is kept") from None
        except OSError as e:
            raise full if e.errno == errno.ENOSPC else e from None
        finally:
            store.rescue()
    skipped = reasons[BAD] + reasons[EMPTY] + reasons[LEFT]
    write_lines(part / "skipped.txt", skipped)
    total = len(items) - len(reasons[LEFT])
    if len(reasons[BAD]) > max_bad * total:
        raise too_bad(part, len(reasons[BAD]), total, max_bad, reasons[BAD][0])
    if not rows:
        raise ValueError(f"{name} holds no image that can be used" + (f": {skipped[0]}" if skipped else ""))
    write_lines(part / "names.txt", [Path(items[row[0]].image).stem for row in rows])
    files = ("images.u8", "labels.u16", "rows.npy", "names.txt")
    sizes = {file: (part / file).stat().st_size for file in files}
    index = dict(version=VERSION, name=name, options=options, fingerprint=fingerprint, images=len(rows),
                 bytes=sizes, label_maps=sum(row[3] for row in rows), segments=max(row[4] for row in rows),
                 bad=len(reasons[BAD]), empty=len(reasons[EMPTY]), example=next(iter(reasons[BAD]), ""))
    (part / "index.json").write_text(json.dumps(index, indent=1))
    os.replace(part, target)
    spent, new = time.monotonic() - started, len(rows) - already
    print(f"packed {name}: {len(rows):,} images into {target} ({sum(sizes.values()) / 1e9:.2f} GB), {new:,} "
          f"of them now in {spent:.1f} s = {new / spent:.0f} a second with {workers} "
          f"process{'es' * (workers > 1)}; {len(reasons[BAD])} skipped as bad, {len(reasons[EMPTY])} without "
          f"labels" + f" ({target / 'skipped.txt'})" * bool(skipped))
    told = list(dict.fromkeys((target / "notices.txt").read_text("utf-8").splitlines()))
    for text in warned(rows, options["size"], reasons[LEFT] + told, target):
        print(f"NOTE: {text}")


def convert_all(store, items, todo, name, options, workers):
    """Convert the items number `todo` into the store. -> {EMPTY, BAD or LEFT: reasons}."""
    task = functools.partial(convert, size=options["size"], unlabelled=options["unlabelled"],
                             components=options["components"], detail=options["detail"])
    reasons, saved = {EMPTY: [], BAD: [], LEFT: []}, time.monotonic()
    with mapped(task, [items[i] for i in todo], workers) as results:
        bar = tqdm(results, f"packing {name}", len(items), initial=len(store.rows), unit="image", leave=False)
        for i, (outcome, *result) in zip(todo, bar):
            if outcome == DONE:
                store.add(i, *result)
            else:
                reasons[outcome].append(result[0])
            if time.monotonic() - saved > SAVE_EVERY:
                store.commit()
                saved = time.monotonic()
        store.commit()
    return reasons


@contextlib.contextmanager
def mapped(task, items, workers):
    """task(item) of each item, in order, by so many processes: not threads, so that no lock limits them."""
    if workers == 1:
        yield map(task, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map(task, items, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def write_lines(path, lines):
    path.write_text("".join(" ".join(line.splitlines()) + "\n" for line in lines), "utf-8", "replace")


def warned(rows, S, notices, target):
    """What the user should know of a packed set, in sentences; each kind of notice "path: what" is one."""
    kinds = {}
    for text in notices:
        kinds.setdefault(text.rpartition(": ")[2], []).append(text.encode("utf-8", "replace").decode())
    sentences = [same[0] + f" (and {len(same) - 1} more of these: {target / 'notices.txt'})" * (len(same) > 1)
                 for same in kinds.values()]
    maps, segments, kept = (sum(row[k] for row in rows) for k in (3, 5, 6))
    if kept <= maps:
        sentences.append("every label map holds one id only: there is nothing to tell apart")
    if kept < segments / 2:
        sentences.append(f"of {segments:,} segments, only {kept:,} have a pixel left at {S} pixels: a larger "
                         f"size keeps more")
    return sentences


def append(file, array):
    """Write all of an array, or raise: an unbuffered write may stop halfway."""
    rest = memoryview(np.ascontiguousarray(array)).cast("B")
    while rest:
        rest = rest[file.write(rest):]
