"""Packed copies (killed, cut off, shared, full disk), batches, crops, the download of COCO and data.py's
command line."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import frame
from data import augment, batches, load, main, order, uniforms
from frame import fitted
from sources import formats, packing
from sources.packing import Packed

ROOT = Path(__file__).parent.parent


def folder(root, n=40):
    """n images of one colour each, with 1 or 2 label maps each."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((6, 8, 3), i + 1, np.uint8)).save(root / f"images/train/{i:03}.png")
        for a in range(1 + i % 2):
            label = np.full((6, 8), i, np.uint8) + np.arange(8, dtype=np.uint8) // (4 - a)
            Image.fromarray(label).save(root / f"labels/train/{i:03}_a{a}.png")
    return root


def opened(tmp_path, **options):
    return load(str(tmp_path / "d"), "train", 8, **{"cache": tmp_path / "cache", "workers": 1, **options})


def content(dataset):
    return (dataset.images.tobytes(), dataset.labels.tobytes(), dataset.first.tolist(),
            dataset.sizes.tolist(), dataset.names)


def counted(monkeypatch, stop_at=None):
    """Count conversions, and break off at one of them."""
    seen, convert = [], packing.convert

    def convert_and_count(item, **options):
        seen.append(item.image)
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return convert(item, **options)

    monkeypatch.setattr(packing, "convert", convert_and_count)
    return seen


# -------------------------------------------------------------------------------------------------------- pac


def test_workers_do_not_change_the_copy(tmp_path):
    folder(tmp_path / "d", 100)
    one, three = (content(opened(tmp_path, cache=tmp_path / str(w), workers=w)) for w in (1, 3))
    assert one == three and len(one[4]) == 100 and one[2][-1] == 150
    assert opened(tmp_path, cache=tmp_path / "1").labels_below == 3
    assert np.frombuffer(one[0], np.uint8).reshape(100, 8, 8, 3)[:, 0, 0, 0].tolist() == list(range(1, 101))


def test_stopped_packing_goes_on(tmp_path, monkeypatch):
    folder(tmp_path / "d")
    whole = content(opened(tmp_path, cache=tmp_path / "other"))
    first = counted(monkeypatch, stop_at=25)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    assert not list(tmp_path.glob("cache/*/index.json"))
    monkeypatch.undo()
    (part,) = tmp_path.glob("cache/*.part")
    with open(part / "images.u8", "ab") as f:  # a row that was written, but not entered
        f.write(b"x" * 100)
    second = counted(monkeypatch)
    assert content(opened(tmp_path)) == whole
    assert len(first) == 25 and len(second) == 16 and not set(first[:24]) & set(second)
    opened(tmp_path)
    assert len(second) == 16 and not list(tmp_path.glob("cache/*.part"))  # nor anything again


def test_killed_packing_goes_on(tmp_path):
    """SIGKILL, in a process of its own, at a moment nobody chose."""
    folder(tmp_path / "d")
    whole = content(opened(tmp_path, cache=tmp_path / "other"))
    slow = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import data; from sources import "
            f"packing; packing.SAVE_EVERY, convert = 0, packing.convert\n"
            f"done = []\n"
            f"def slowly(item, **o):\n"  # the kill comes before the 30th, however late it comes
            f"    done.append(item); time.sleep(0.02 if len(done) < 30 else 300); return convert(item, **o)\n"
            f"packing.convert = slowly; data.load({str(tmp_path / 'd')!r}, 'train', 8, "
            f"cache={str(tmp_path / 'cache')!r}, workers=1)")
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL)
    while not (state := list(tmp_path.glob("cache/*.part/rows.npy"))) or len(np.load(state[0])) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(np.load(state[0]))
    assert 5 <= kept < 40 and not list(tmp_path.glob("cache/*/index.json"))
    with pytest.MonkeyPatch.context() as patch:
        seen = counted(patch)
        assert content(opened(tmp_path)) == whole and len(seen) == 40 - kept


@pytest.mark.parametrize("file", ["images.u8", "labels.u16", "rows.npy", "index.json"])
def test_a_cut_off_copy_is_made_anew(tmp_path, file):
    folder(tmp_path / "d")
    dataset = opened(tmp_path)
    whole = content(dataset)
    with open(dataset.folder / file, "r+b") as f:
        f.truncate(50)
    assert content(opened(tmp_path)) == whole


def test_a_copy_belongs_to_its_options_and_sources(tmp_path, monkeypatch):
    folder(tmp_path / "d")
    seen = counted(monkeypatch)
    same = opened(tmp_path)
    index = json.loads((same.folder / "index.json").read_text())
    assert index["version"] == packing.VERSION and index["options"]["size"] == 8
    assert re.fullmatch("[0-9a-f]{16}", index["fingerprint"])
    others = [opened(tmp_path, unlabelled="ignore"), opened(tmp_path, components=True),
              load(str(tmp_path / "d"), "train", 9, cache=tmp_path / "cache", workers=1)]
    assert len({d.folder for d in (same, *others)}) == 4 and len(seen) == 160
    monkeypatch.setattr(formats, "read_label", None)  # reading again would fail
    assert content(opened(tmp_path)) == content(same)
    monkeypatch.setattr(packing, "VERSION", packing.VERSION + 1)
    with pytest.raises(ValueError, match="TypeError"):
        opened(tmp_path)
    monkeypatch.undo()
    for change in (lambda: os.utime(tmp_path / "d/labels/train/003_a1.png", (1, 1)),
                   lambda: (tmp_path / "d/labels/train/003_a1.png").unlink(),
                   lambda: shutil.copy(tmp_path / "d/images/train/000.png",
                                       tmp_path / "d/images/train/001.png")):
        before = opened(tmp_path).folder
        change()
        assert opened(tmp_path).folder != before
    assert len(opened(tmp_path).maps(3)) == 1


def test_processes_that_want_the_same_copy_make_it_once(tmp_path, monkeypatch):
    folder(tmp_path / "d")
    convert = packing.convert

    def convert_and_note(item, **options):
        with open(tmp_path / "notes", "a") as f:
            f.write(f"{os.getpid()}\n")
        return convert(item, **options)

    monkeypatch.setattr(packing, "convert", convert_and_note)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = [pool.apply_async(opened, (tmp_path,)) for _ in range(3)]
        assert [len(r.get(30)) for r in results] == [40] * 3
    notes = (tmp_path / "notes").read_text().split()
    assert len(set(notes)) == 1 and len(notes) == 40


def test_full_disk(tmp_path, monkeypatch):
    folder(tmp_path / "d")
    whole = content(opened(tmp_path, cache=tmp_path / "other"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 999, 999))
    with pytest.raises(OSError, match=r"d-train needs 0\.00 GB in .*cache .*disk is full; what was written "
                                      r"is kept"):
        opened(tmp_path)
    monkeypatch.undo()
    appended, append = [], packing.append

    def append_until_full(file, array):
        appended.append(file)
        if len(appended) == 22:
            file.write(b"only half")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, array)

    fsync, full = os.fsync, [True, True]

    def fsync_when_there_is_room(number):  # the list of what is done needs room too
        if appended and len(appended) >= 22 and full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(packing, "append", append_until_full)
    monkeypatch.setattr(os, "fsync", fsync_when_there_is_room)
    with pytest.raises(OSError, match="GB in .*what was written is kept.*run the same command again"):
        opened(tmp_path)
    monkeypatch.undo()
    seen = counted(monkeypatch)
    assert content(opened(tmp_path)) == whole and len(seen) == 30 + 2  # 2 of 10 made room


def test_a_copy_in_the_making_that_is_cut_off_starts_anew(tmp_path, monkeypatch):
    folder(tmp_path / "d")
    whole = content(opened(tmp_path, cache=tmp_path / "other"))
    counted(monkeypatch, stop_at=25)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    monkeypatch.undo()
    (part,) = tmp_path.glob("cache/*.part")
    with open(part / "labels.u16", "r+b") as f:
        f.truncate(100)
    seen = counted(monkeypatch)
    assert content(opened(tmp_path)) == whole and len(seen) == 40


def test_a_killed_worker_is_told(tmp_path, monkeypatch):
    folder(tmp_path / "d", 64)
    monkeypatch.setattr(packing, "convert", die)
    with pytest.raises(OSError, match="was killed, perhaps for lack of memory: run again with fewer "
                                      "--workers"):
        opened(tmp_path, workers=2)


def die(item, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_are_forked_before_the_progress_bar_starts_a_thread(tmp_path, monkeypatch):
    folder(tmp_path / "d", 64)
    monkeypatch.setattr(packing, "tqdm", lambda results, *args, **more: pytest.fail("no process yet")
                        if not multiprocessing.active_children() else results)
    assert len(opened(tmp_path, workers=2)) == 64 and not multiprocessing.active_children()


def resident():
    return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_resident_memory_does_not_grow(tmp_path, monkeypatch):
    """192 MB read through, with 8 MB between two releases; and, so that the test can fail, without any."""
    N, S = 1200, 200
    for name, size in (("i", N * S * S * 3), ("l", N * S * S * 2)):
        with open(tmp_path / name, "wb") as f:
            f.truncate(size)

    def grown():
        images = np.memmap(tmp_path / "i", [("8", np.uint8, (S, S, 3))], "r", shape=N)["8"]
        dataset = Packed("x", images, images, np.memmap(tmp_path / "l", np.uint16, "r", shape=(N, S, S)),
                         np.arange(N + 1), np.full((N, 2), S), [], np.arange(N), tmp_path, 1)
        before, most = resident(), 0
        for start in range(0, N, 8):
            dataset.get(range(start, start + 8))
            most = max(most, resident() - before)
        return most

    monkeypatch.setattr(Packed.let_go, "__defaults__", (2**23,))
    assert grown() < 40
    monkeypatch.setattr(Packed, "let_go", lambda *a: None)
    assert grown() > 150


# ------------------------------------------------------------------------------------------------------------


def take(source, n):
    result = [next(source) for _ in range(n)]
    source.close()
    return result


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for one, other in zip(a, b) for p, q in zip(one, other))


def test_batches_are_the_same_for_any_workers_and_after_a_resume(tmp_path):
    folder(tmp_path / "d")
    dataset = opened(tmp_path)
    plain = take(batches(dataset, 0, 6, 3, workers=0), 20)  # three epochs of 40
    assert [tuple(p.shape) for p in plain[0]] == [(6, 8, 8, 3), (6, 8, 8), (6, 2), (6, 20)]
    for workers in (1, 4):
        assert equal(take(batches(dataset, 0, 6, 3, workers), 20), plain)
    assert equal(take(batches(dataset, 7 * 6, 6, 3, workers=4), 13), plain[7:])  # in the middle of an epoch
    assert not equal(take(batches(dataset, 0, 6, 4, workers=0), 20), plain)
    colours = torch.cat([p[0][:, 0, 0, 0] for p in plain])  # one an image
    for epoch in colours.split(40):
        assert len(epoch.unique()) == len(epoch)  # without replacement
    pairs = {(int(i[0, 0, 0]), int(l[0].unique(return_counts=True)[1][0])) for p in plain for i,
             l in zip(p[0], p[1])}
    assert len(pairs) > 50  # and annotators vary


def test_ranks_share_a_batch(tmp_path):
    folder(tmp_path / "d")
    dataset = opened(tmp_path)
    alone = take(batches(dataset, 12, 6, 3, workers=0), 8)
    shares = [take(batches(dataset, 12, 6, 3, 1, rank, 3), 8) for rank in range(3)]
    for step, batch in enumerate(alone):
        for rank in range(3):
            assert equal([shares[rank][step]], [tuple(p[rank::3] for p in batch)])
    assert sorted(np.concatenate([order(0, 40, 40, 1, r, 4) for r in range(4)]).tolist()) == list(range(40))
    assert (uniforms(0, 9, 1, 4, 2, 3) == uniforms(0, 9, 1, 4)[2::3]).all()
    with pytest.raises(ValueError, match="a batch of 6 samples cannot be shared by 4"):
        next(batches(dataset, 0, 6, 3, 0, 0, 4))


# ------------------------------------------------------------------------------------------------------ crops


def places(T, h, w):
    """An image whose red and green are the row and column of each pixel, times 2, and labels that number the
    pixels."""
    rows, cols = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    images = torch.stack([2 * rows, 2 * cols, 0 * rows], -1).byte()[None]
    inside = (rows < h) & (cols < w)
    return images, (rows * T + cols).masked_fill(~inside, -1)[None], torch.tensor([[h, w]])


def still(**changes):
    """Uniform numbers that switch every augmentation off, but for changes by number."""
    u = torch.full((1, 20), 0.99)
    u[0, 19] = 0.5  # not stretched
    for i, value in changes.items():
        u[0, int(i[1:])] = value
    return u


def source(x, channel):
    """Row or column that each pixel of an augmented `places` came from."""
    mean, std = ((0.485, 0.229), (0.456, 0.224))[channel]
    return (x[0, channel] * std + mean) * 255 / 2


@pytest.mark.parametrize("T,h,w,S,crop,zoom,y,x,flip,stretch", [
    (40, 40, 40, 40, 0.5, 0.0, 0.5, 0.5, False, 0.5), (40, 40, 30, 40, 0.5, 0.4, 0.0, 1.0, False, 0.9),
    (40, 20, 40, 40, 0.3, 0.9, 0.7, 0.2, True, 0.0),
    (48, 48, 36, 32, 0.5, 0.0, 0.3, 0.6, False, 1.0), (48, 48, 36, 32, 1.0, 0.0, 0.5, 0.5, True, 0.0),
    (48, 36, 48, 32, 0.5, 1.0, 0.5, 0.5, False, 0.1)])
def test_crop_shows_the_part_it_should(T, h, w, S, crop, zoom, y, x, flip, stretch):
    """Every new pixel's centre, mapped by hand: as a linear ramp is sampled exactly, its colour tells where
    it came from."""
    got, inside, labels = augment(*places(T, h, w), still(i0=0.1 if flip
                                                          else 0.9, i16=zoom, i17=y, i18=x, i19=stretch), S,
                                                          crop)
    H, W = round(h * S / T), round(w * S / T)
    assert got.shape == (1, 3, S, S) and inside[0, :H, :W].all() and inside.sum() == H * W
    area = 1 - (1 - crop) * zoom
    both = area * 2 ** (stretch / 2 - 0.25), area / 2 ** (stretch / 2 - 0.25)
    tall, wide = (min(1, max(crop, share)) for share in both)  # as shares of the sides
    top, left = y * (1 - tall) * h, x * (1 - wide) * w
    for i in range(0, H, 5):
        for j in range(0, W, 3):
            row = top + (i + 0.5) * tall * h / H - 0.5
            col = left + ((W - 1 - j if flip else j) + 0.5) * wide * w / W - 0.5
            assert float(source(got, 0)[i, j]) == pytest.approx(min(max(row, 0), h - 1), abs=2e-3)
            assert float(source(got, 1)[i, j]) == pytest.approx(min(max(col, 0), w - 1), abs=2e-3)
            assert abs(labels[0, i, j] // T - row) <= 0.501 and abs(labels[0, i, j] % T - col) <= 0.501
    assert (labels[0, H:] == -1).all() and (labels[0, :, W:] == -1).all()


@pytest.mark.parametrize("h, want", [(160, 80), (90, 46), (92, 46), (94, 48), (108, 54), (2, 2)])
def test_crops_have_the_shape_that_evaluation_has(h, want):
    """Of a photo packed at twice the side, 160 x h: rounded up to even, as `fitted` does with the photo
    itself."""
    inside = augment(*places(160, h, 160), still(), 80, 0.5)[1][0]
    assert inside[:want].all() and not inside[want:].any() and fitted(160, h, 80) == (80, want)


def test_augmentation_is_one_sample_at_a_time():
    """A batch of 21 (in pieces on a CPU) equals 21 batches of one; crops alone need the last four numbers."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (21, 16, 16, 3), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 5, (21, 16, 16), generator=g)
    sizes, u = torch.randint(4, 17, (21, 2), generator=g), torch.rand(21, 20, generator=g)
    whole = augment(images, labels, sizes, u, crop=0.5)
    for i in range(21):
        assert equal([augment(images[i : i + 1], labels[i : i + 1], sizes[i : i + 1], u[i : i + 1],
                              crop=0.5)], [tuple(v[i : i + 1] for v in whole)])
    assert equal([augment(images, labels, sizes, u[:, :16])], [augment(images, labels, sizes, u, 16, 1.0)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augmentation_never_waits_for_the_host():
    batch = [v.cuda() for v in (torch.zeros(9, 16, 16, 3, dtype=torch.uint8),
                                torch.zeros(9, 16, 16, dtype=torch.long), torch.full((9, 2), 12))]
    u = torch.rand(9, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(*batch, u, crop=0.5), augment(*batch, u.pin_memory()), frame.normalise(batch[0], batch[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A loopback server: files {path: bytes}; cut {path: [bytes after which the next connections break]}; log
    of ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            start = int(re.match(r"bytes=(\d+)-",
                                 self.headers.get("Range", "bytes=0-"))[1]) if self.server.ranges else 0
            self.server.log.append((self.path, start))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if self.server.ranges else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cuts = self.server.cut.get(self.path, [])
            self.wfile.write(body[start : start + cuts.pop(0)] if cuts else body[start:])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cut, server.log, server.ranges = {}, {}, [], True
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # else shutdown waits
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        server.shutdown()


def zipped(files):
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, body in files.items():
            z.writestr(name, body)
    return out.getvalue()


def png(array):
    out = BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def coco_files():
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    ids = np.zeros((60, 80, 3), np.uint8)
    ids[:, 40:] = (7, 1, 0)
    note = {"images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 263}]}]}
    inner = zipped({"panoptic_val2017/a.png": png(ids), "__MACOSX/panoptic_val2017/._a.png": b"junk"})
    annotations = zipped({"annotations/panoptic_val2017.json": json.dumps(note),
                          "annotations/panoptic_val2017.zip": inner})
    return {"/zips/val2017.zip": zipped({"val2017/a.jpg": png(pixels)}),
            "/annotations/panoptic_annotations_trainval2017.zip": annotations}


def fetch_coco(tmp_path, server):
    return main(["coco", "--download", "--root", str(tmp_path), "--split", "val", "--server", server.url])


def test_download_goes_on_where_it_broke(tmp_path, server, capsys):
    server.files, image_zip = coco_files(), "/zips/val2017.zip"
    server.cut[image_zip] = [5000, 0, 3000]
    assert fetch_coco(tmp_path, server) == 0
    assert [start for path, start in server.log if path == image_zip] == [0, 5000, 5000, 8000]
    dataset = load("coco", "val", 16, root=tmp_path, cache=tmp_path / "cache")
    assert len(dataset) == 1 and dataset.maps(0)[0, 0].tolist() == [0] * 8 + [1] * 8
    assert not list(tmp_path.rglob("*.zip")) and not list(tmp_path.rglob("__MACOSX"))
    assert "train.py --dataset coco --root" in capsys.readouterr().out
    server.log.clear()
    assert fetch_coco(tmp_path, server) == 0 and not server.log  # complete: nothing is fetched again


def test_download_goes_on_in_another_call(tmp_path, server, capsys):
    server.files, image_zip = coco_files(), "/zips/val2017.zip"
    server.cut[image_zip] = [4000] + [0] * 4
    assert fetch_coco(tmp_path, server) == 2
    err = capsys.readouterr().err
    assert "could not be fetched" in err and err.count("\n") == 1
    assert f"4000 of {len(server.files[image_zip])} bytes came" in err
    server.log.clear()
    assert fetch_coco(tmp_path, server) == 0 and server.log[0] == (image_zip, 4000)


def test_download_from_a_server_that_cannot_go_on(tmp_path, server):
    server.files, server.ranges = coco_files(), False
    server.cut["/zips/val2017.zip"] = [4000]
    assert fetch_coco(tmp_path, server) == 0
    assert (tmp_path / "coco/val2017/a.jpg").exists()


def test_download_of_another_file_and_of_a_complete_part(tmp_path, server):
    server.files = coco_files()
    body = server.files["/zips/val2017.zip"]
    annotations = server.files["/annotations/panoptic_annotations_trainval2017.zip"]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip.part").write_bytes(body + b"longer than it should be")
    (tmp_path / "coco/panoptic_annotations_trainval2017.zip.part").write_bytes(annotations)
    assert fetch_coco(tmp_path, server) == 0
    assert [start for _, start in server.log] == [len(body) + 24, 0, len(annotations)]


def test_download_faults_get_one_sentence(tmp_path, server, capsys, monkeypatch):
    assert fetch_coco(tmp_path, server) == 2
    assert "zips/val2017.zip: HTTP Error 404" in capsys.readouterr().err
    server.files = coco_files()
    damaged = bytearray(server.files["/zips/val2017.zip"])
    damaged[200] ^= 1
    server.files["/zips/val2017.zip"] = bytes(damaged)
    assert fetch_coco(tmp_path, server) == 2
    assert "val2017.zip was damaged and is deleted" in capsys.readouterr().err
    assert not (tmp_path / "coco/val2017.zip").exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 999, 999))
    assert fetch_coco(tmp_path, server) == 2
    assert "GB are needed to fetch and unpack it, 0.0 GB are free" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- co


def test_command_line(tmp_path, capsys):
    folder(tmp_path / "d")
    shutil.copytree(tmp_path / "d/images/train",
                    tmp_path / "d/images/val"), shutil.copytree(tmp_path / "d/labels/train",
                                                                tmp_path / "d/labels/val")
    assert main([str(tmp_path / "d"), "--size", "16", "--crop", "0.5", "--workers", "1", "--cache",
                 str(tmp_path / "cache")]) == 0
    out = capsys.readouterr().out
    assert "train: 40 images, 60 label maps of 23 x 23 pixels" in out
    assert "val: 40 images, 60 label maps of 16 x 16 pixels" in out
    assert main([f"{tmp_path / 'd'}:2,shapes", "--size", "16", "--crop", "0.5", "--detail", "2", "--workers",
                 "1", "--cache", str(tmp_path / "cache")]) == 0
    mine = sorted(p.name for p in (tmp_path / "cache").iterdir())  # just what train.py with `photo` looks for
    load(str(tmp_path / "d"), "train", data.packed_side(16, 0.5, 2), cache=tmp_path / "cache")
    load(str(tmp_path / "d"), "val", 16, cache=tmp_path / "cache", detail=2)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == mine
    out = capsys.readouterr().out
    assert "train: 40 images, 60 label maps of 32 x 32 pixels" in out
    assert "val: 40 images, 60 label maps of 16 x 16 pixels" in out
    (tmp_path / "empty").mkdir()
    command = "python data.py coco --download --root"
    for arguments, words in ((["coco", "--root", str(tmp_path / "r")], f"{command} {tmp_path / 'r'}\n"),
                             (["coco", "--root", str(tmp_path / "empty")],
                              f"{command} {tmp_path / 'empty'}\n"),
                             (["entity", "--download"], "--download fetches coco only"),
                             (["shapes"], "nothing to prepare"), (["shapes:2"], "nothing to prepare"),
                             ([str(tmp_path / "d"), "--crop", "0"], "--crop is from 0.01 to 1"),
                             ([str(tmp_path / "gone")], "neither shapes, nor coco"),
                             ([str(tmp_path / "d"), "--unlabelled", "drop"], "'segment' or 'ignore'")):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("data.py: ") and words in err and err.count("\n") == 1
