"""Packed data sets: every item decoded and resized once, appended to two files that are mapped, not read,
afterwards.

What it is: `pack(files, listing, ...)` -> Packed, made by several processes if it is not there yet; a kill or
a full disk costs seconds. What it is not: it knows no file format (formats.py), no batches and no
augmentation (data.py).
"""

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
from sources.formats import Notice, ids_of, open_image, read_labels, said

try:
    import fcntl
except ImportError:  # Windows: no lock between processes that pack
    fcntl = None

VERSION = 7  # of packed data sets
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
            pictures = []
            for side in dict.fromkeys((size * detail, size)):
                image, (W, H) = open_image(item.image, side)
                w, h = fitted(W, H, size)
                pictures.append(resize_image(image, side, (w * side // size, h * side // size))[0])
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
        return BAD, str(e) if named else f"{where}: cannot be used ({said(e)})"
    notices = list(dict.fromkeys(str(w.message) for w in told if w.category is Notice))
    return DONE, pictures, (h, w), labels, (segments, kept), notices


def pack(files, listing, cache, name, options, workers, max_bad):
    """The packed copy of these files with these options: made if it is not there, mapped if it is."""
    home = os.path.commonpath([path for path, _, _ in files]) if files else ""
    print_of = json.dumps([(os.path.relpath(path, home), *rest) for path, *rest in files])
    fingerprint = hashlib.sha256(print_of.encode()).hexdigest()[:16]
    key = hashlib.sha256(json.dumps([VERSION, fingerprint, options]).encode()).hexdigest()[:8]
    target = cache / f"{name}-{options['size']}-{key}"
    if not whole(target):
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{target}.lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be packing the same
            if not whole(target):
                shutil.rmtree(target, ignore_errors=True)  # cut off from outside
                pack_items(target, listing(), name, options, fingerprint, workers, max_bad)
        Path(f"{target}.lock").unlink(missing_ok=True)
    index = json.loads((target / "index.json").read_text())
    if index["bad"] > max_bad * (index["bad"] + index["images"]):
        raise too_bad(target, index["bad"], index["bad"] + index["images"], max_bad, index["example"])
    rows, S = np.load(target / "rows.npy"), options["size"]  # (N, 7), see `pack_items`
    sides = dict.fromkeys((S * options["detail"], S))  # of the pictures that each image has
    images = np.memmap(target / "images.u8", [(str(side), np.uint8, (side, side, 3)) for side in sides], "r",
                       shape=len(rows))
    labels = np.memmap(target / "labels.u16", np.uint16, "r", shape=(index["label_maps"], S, S))
    return Packed(name, images[str(S * options["detail"])], images[str(S)], labels,
                  first=np.concatenate([[0], rows[:, 3].cumsum()]), sizes=rows[:, 1:3],
                  names=(target / "names.txt").read_text("utf-8").splitlines(), items=rows[:, 0],
                  folder=target, labels_below=index["segments"])


def whole(folder):
    """Whether a packed copy is complete: the index is written last, and says how long the files are."""
    try:
        index = json.loads((folder / "index.json").read_text())
        return all((folder / file).stat().st_size == size for file, size in index["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def too_bad(folder, bad, total, max_bad, example):
    return ValueError(f"{example} ({bad} of {total} items cannot be used, more than --max_bad {max_bad:g} "
                      f"allows; "
                      f"{folder / 'skipped.txt'} lists them)")


def pack_items(target, items, name, options, fingerprint, workers, max_bad):
    """Pack items into target.part, going on from what an earlier call left there, and rename it when it is
    complete."""
    part, S = target.with_name(target.name + ".part"), options["size"]

    def lengths(images, label_maps):
        """Bytes of so many images and label maps."""
        sides = {S * options["detail"], S}
        return 3 * sum(side**2 for side in sides) * images, 2 * S * S * label_maps

    def lengths_of(rows):
        return lengths(len(rows), sum(row[3] for row in rows))

    part.mkdir(exist_ok=True)
    # item, h, w, maps, largest number of an id, segments before resizing, after
    rows = np.load(part / "rows.npy").tolist() if (part / "rows.npy").exists() else []
    if any(not (part / file).exists() or (part / file).stat().st_size < length
           for file, length in zip(("images.u8", "labels.u16"), lengths_of(rows))):
        rows = []  # cut off from outside
    todo = sorted(set(range(len(items))) - {row[0] for row in rows})
    need = sum(lengths(len(items), sum(len(item.labels) for item in items)))
    full = OSError(f"{name} needs {need / 1e9:.2f} GB in {target.parent} when packed, and the disk is full; "
                   f"what was "
                   f"written is kept: free some space, or give another --cache, and run the same command "
                   f"again")
    if shutil.disk_usage(part).free < need - sum(lengths_of(rows)):
        raise full
    reasons, started, already = {EMPTY: [], BAD: [], LEFT: []}, time.monotonic(), len(rows)
    saved = started
    task = functools.partial(convert, size=S, unlabelled=options["unlabelled"],
                             components=options["components"], detail=options["detail"])
    workers = max(1, min(workers, len(todo) // 16))
    pool = None
    with (open(part / "images.u8", "ab", 0) as images, open(part / "labels.u16", "ab", 0) as labels,
          open(part / "notices.txt", "a", encoding="utf-8", errors="replace") as notices):
        def truncate():
            """Cut off what no row tells of."""
            for file, length in zip((images, labels), lengths_of(rows)):
                file.truncate(length)

        def commit():
            """Only rows whose pixels are surely on the disk count as done."""
            os.fsync(images.fileno())
            os.fsync(labels.fileno())
            with open(part / "rows.tmp", "wb") as f:
                np.save(f, np.array(rows, np.int64).reshape(-1, 7))
                f.flush()
                os.fsync(f.fileno())
            os.replace(part / "rows.tmp", part / "rows.npy")

        truncate()
        try:
            if workers > 1:  # not threads: no lock limits them
                context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
                pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
                results = pool.map(task, [items[i] for i in todo], chunksize=8)
            else:
                results = map(task, (items[i] for i in todo))
            bar = tqdm(results, f"packing {name}", len(items), initial=len(rows), unit="image", leave=False)
            for i, (outcome, *result) in zip(todo, bar):
                if outcome != DONE:
                    reasons[outcome].append(result[0])
                    continue
                pictures, (h, w), segmentations, counts, told = result
                notices.writelines(text.replace("\n", " ") + "\n" for text in told)
                for picture in pictures:
                    append(images, picture)
                append(labels, segmentations)
                rows.append([i, h, w, len(segmentations),
                             1 + int(segmentations[segmentations != IGNORE].max(initial=0)), *counts])
                if time.monotonic() - saved > SAVE_EVERY:
                    commit()
                    saved = time.monotonic()
            commit()
        except BrokenProcessPool:
            raise OSError(f"a process that packed {name} was killed, perhaps for lack of memory: run again "
                          f"with fewer "
                          f"--workers; what was written is kept") from None
        except OSError as e:
            raise full if e.errno == errno.ENOSPC else e from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
            while True:
                try:
                    commit()
                    break
                except OSError as e:
                    if e.errno != errno.ENOSPC or not rows:
                        break
                    del rows[-1 - len(rows) // 20 :]  # makes room for the list of the others
                    truncate()
    skipped = reasons[BAD] + reasons[EMPTY] + reasons[LEFT]
    (part / "skipped.txt").write_text("".join(reason.replace("\n", " ") + "\n" for reason in skipped),
                                      "utf-8", "replace")
    total = len(items) - len(reasons[LEFT])
    if len(reasons[BAD]) > max_bad * total:
        raise too_bad(part, len(reasons[BAD]), total, max_bad, reasons[BAD][0])
    if not rows:
        raise ValueError(f"{name} holds no image that can be used" + (f": {skipped[0]}" if skipped else ""))
    (part / "names.txt").write_text("".join(Path(items[row[0]].image).stem + "\n" for row in rows), "utf-8",
                                    "replace")
    sizes = {file: (part / file).stat().st_size for file in ("images.u8", "labels.u16", "rows.npy",
                                                             "names.txt")}
    index = dict(version=VERSION, name=name, options=options, fingerprint=fingerprint, images=len(rows),
                 bytes=sizes,
                 label_maps=sum(row[3] for row in rows), segments=max(row[4] for row in rows),
                 bad=len(reasons[BAD]),
                 empty=len(reasons[EMPTY]), example=reasons[BAD][0] if reasons[BAD] else "")
    (part / "index.json").write_text(json.dumps(index, indent=1))
    os.replace(part, target)
    spent = time.monotonic() - started
    new = len(rows) - already
    print(f"packed {name}: {len(rows):,} images into {target} ({sum(sizes.values()) / 1e9:.2f} GB), {new:,} "
          f"of them now in "
          f"{spent:.1f} s = {new / spent:.0f} a second with {workers} process{'es' * (workers > 1)}; "
          f"{len(reasons[BAD])} skipped "
          f"as bad, {len(reasons[EMPTY])} without labels" + f" ({target / 'skipped.txt'})" * bool(skipped))
    told = (target / "notices.txt").read_text("utf-8").splitlines()
    for text in warned(rows, S, reasons[LEFT] + told, target):
        print(f"NOTE: {text}")


def warned(rows, S, notices, target):
    """What the user should know of a packed set, in sentences; each kind of notice "path: what" is one."""
    kinds = {}
    for text in notices:
        kinds.setdefault(text.rpartition(": ")[2], []).append(text.encode("utf-8", "replace").decode())
    said = [same[0] + f" (and {len(same) - 1} more of these: {target / 'notices.txt'})" * (len(same) > 1)
            for same in kinds.values()]
    maps, segments, kept = (sum(row[k] for row in rows) for k in (3, 5, 6))
    if kept <= maps:
        said.append("every label map holds one id only: there is nothing to tell apart")
    if kept < segments / 2:
        said.append(f"of {segments:,} segments, only {kept:,} have a pixel left at {S} pixels: a larger size "
                    "keeps more")
    return said


def append(file, array):
    """Write all of an array, or raise: an unbuffered write may stop halfway."""
    rest = memoryview(np.ascontiguousarray(array)).cast("B")
    while rest:
        rest = rest[file.write(rest):]
