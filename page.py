"""A page to click on: a photo with its answer over it, in the browser, on this machine alone.

    python page.py photo.jpg  # or without a file: drop one onto the page, or choose it there

What it is: a web server on 127.0.0.1 and its page.html. A photo is sampled as by sample.py, again where the
network sees new hints; grains are cuts. What it is not: for others; their Hosts, Origins, tokens are refused.
"""

import argparse
import base64
import io
import json
import os
import secrets
import tempfile
import threading
import warnings
import webbrowser
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def options(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("photo", nargs="?", help="an image file (default: choose one on the page)")
    p.add_argument("--port", type=int, default=8765, help="of 127.0.0.1; 0: one that is free (%(default)s)")
    p.add_argument("--no_browser", "--no-browser", action="store_true", help="only print the address")
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/, else weights/photo.pt)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--tiles", help="also look closer at T x T tiles, or auto (default: as sample.py does)")
    p.error = lambda message: p.exit(2, f"page.py: {message}\n")
    return p.parse_args(argv)


if __name__ == "__main__":
    options()  # before torch, whose import takes seconds: --help and mistakes end here
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, whose products are small here

import numpy as np
from PIL import Image

from answers import checkpoints, jobs, segment
from answers.pictures import colours, overlaid, runs, shade
from answers.prompts import strokes_map
from engine import Threads, complaint, host_threads, pick_device, program
from sample import MARK, fault, grain_of, read_image, save, save_ids, save_json

fail = complaint("page.py")
N, FIRST, SEED, VIEW = 8, 4, 0, 800  # samples, those of a first answer, first seed; pixels of the side shown
PHOTOS, UPLOAD, TEXT = 4, 64_000_000, 1_000_000  # at hand; bytes of one, of anything else
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; "
          "connect-src 'self'; frame-ancestors 'none'")  # nothing comes from elsewhere, nothing goes there


@dataclass(eq=False)
class Photo:
    file: Path  # as it was sent
    size: tuple  # (W, H)
    view: Image.Image  # at VIEW pixels
    asked: list  # strokes that a network with an input for hints is to see while sampling
    done: list | None = None  # those that were asked for when sampling ended last
    job: jobs.Job | None = None  # with the samples at hand
    result: segment.Segmentation | None = None  # what they say, at the view's size
    version: int = 0  # counts what the page should know of
    error: str = ""


class Desk:
    """The photos used last. `work` samples one at a time; the methods after `sample` answer requests."""

    def __init__(self, model, ckpt, folder, tiles):
        self.model, self.ckpt, self.folder, self.photos, self.first = model, ckpt, Path(folder), {}, None
        self.news, self.turn, self.slow = threading.Condition(), threading.Lock(), threading.Lock()
        device, self.tiles = next(model.net.parameters()).device, jobs.tiles_of(tiles, model)
        self.on_cpu, self.threads = device.type == "cpu", Threads(host_threads(device))

    def tell(self, photo, **news):
        with self.news:
            vars(photo).update({"version": photo.version + 1, **news})
            self.news.notify_all()

    def work(self):
        while True:
            with self.news:
                waiting = self.news.wait_for(lambda: [p for p in self.photos.values() if p.done != p.asked])
                photo = sorted(waiting, key=lambda p: not p.result)[-1]  # the newest that shows nothing
                strokes = photo.asked
                while photo.job and self.news.wait_for(lambda: photo.asked is not strokes, 0.5):  # seconds
                    strokes = photo.asked  # more clicks may follow
            try:
                self.sample(photo, strokes)
            except Exception as e:  # the next photo is sampled all the same
                if not isinstance(e, InterruptedError):
                    self.tell(photo, done=strokes, error=f"this photo could not be sampled: {e}")

    def sample(self, photo, strokes):
        """Of a new photo FIRST samples, then the rest; on a GPU, which rounds by the batch, all at once."""
        def step(*_):
            self.threads()
            with self.turn:
                if photo.asked is not strokes or photo.file.name not in self.photos:
                    raise InterruptedError  # nobody asks for these samples any more
        job = jobs.prepare(read_image(photo.file), self.model, strokes_map(strokes, photo.size), seed=SEED,
                           tiles=self.tiles)
        for part, n in ((replace(job, tiles=[]), FIRST), (job, N))[not self.on_cpu or bool(photo.result) :]:
            part = replace(next(segment.denoise([part], self.model, n, callback=step)).first(n), hints=None)
            result, done = segment.summarise(part, photo.view, self.model), None if part.lacks(N) else strokes
            self.tell(photo, job=part, result=result, done=done, error="")

    def open(self, data, name="this file"):
        """The bytes of an image file; the photo used longest ago goes, but not the command line's."""
        file = self.folder / secrets.token_hex(8)
        try:
            with self.slow, warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                file.write_bytes(data)
                image = read_image(file)
        except (ValueError, OSError) as e:  # OSError: a full disk, say
            file.unlink(missing_ok=True)
            raise ValueError(str(fault(file, e)).replace(str(file), name)) from None
        view = image.resize([max(1, round(s * VIEW / max(image.size))) for s in image.size], Image.LANCZOS)
        with self.news:
            if len(self.photos) == PHOTOS:
                self.photos.pop(next(name for name in self.photos if name != self.first)).file.unlink()
            self.photos[file.name] = Photo(file, image.size, view, [])
            self.news.notify_all()
        view.save(picture := io.BytesIO(), "JPEG", quality=95)
        notes = "".join(n.replace(f"{file}:", ";") for w in told if file.name in (n := str(w.message)))
        return dict(photo=file.name, size=image.size, view=view.size, notes=notes,
                    image="data:image/jpeg;base64," + base64.b64encode(picture.getvalue()).decode())

    def wait(self, photo, version):
        with self.news:
            p = self.photos[photo]  # now the last to go: whoever has it open waits here
            self.photos = {name: one for name, one in self.photos.items() if one is not p} | {photo: p}
            self.news.wait_for(lambda: p.version != version, timeout=20)  # seconds
            samples = len(p.job.x_hat) if p.job else 0
            return dict(version=p.version, samples=samples, busy=p.asked != p.done, error=p.error)

    def cut(self, photo, strokes, grain, closed):
        """The joint answer at once; where the network sees hints, samples that have seen them follow."""
        hints = strokes_map(strokes, (p := self.photos[photo]).size)
        with self.turn:
            tree, labels = segment.joined(p.result.evidence, self.model, grain_of(grain), hints, closed)
            joint = segment.answer(tree, labels, p.result, hints)
            if self.model.diffusion.hints and p.asked != strokes:
                self.tell(p, asked=strokes, version=p.version)
        return dict(runs=runs(joint.labels), colours=colours(joint.side).tolist(), busy=p.asked != p.done,
                    confidence={s["id"]: s["confidence"] for s in joint.segments})

    def samples(self, photo, grain, **_):  # the map of each, and where they disagree
        with self.slow:
            result = segment.summarise((p := self.photos[photo]).job, p.view, self.model, grain_of(grain))
        votes = Image.fromarray((result.boundary.numpy() * N).round().astype("u1")).resize(p.view.size, 0)
        return dict(samples=[runs(labels) for labels in result.enlarged()], boundary=runs(votes),
                    colours=colours(result.side).tolist(), shades=shade(np.linspace(0, 1, N + 1)).tolist())

    def download(self, photo, kind, n, strokes, grain, closed, name):
        """labels, overlay, coco or hints at the photo's size, of n samples: (bytes, type)."""
        p, grain = self.photos[photo], grain_of(grain)
        hints, out = strokes_map(strokes, p.size), self.folder / "a"
        if kind == "hints":  # these wait for no samples
            save_ids(hints.astype(int) - 1, 15, picture := io.BytesIO())
            return picture.getvalue(), "image/png"
        if self.model.diffusion.hints and p.done != strokes:
            raise ValueError("not all samples are there yet: wait a moment")
        with self.slow:
            result = segment.summarise(p.job.first(n), p.view, self.model, grain)
            joint = replace(result, image=(image := read_image(p.file))).cut(grain, hints, closed)
            if kind == "coco":
                about = dict(id=1, file_name=name[:200], width=image.width, height=image.height)
                info = dict(software=MARK, checkpoint=self.ckpt, n=n, seed=SEED, grain=grain, closed=closed,
                            tiles=self.tiles)
                save_json(out, info, [about], joint.segments, {}, borders=joint.borders)
            elif kind == "overlay":
                save(overlaid(image, joint.labels, joint.side), out)
            else:
                save_ids(joint.labels.numpy(), joint.side, out)
            return out.read_bytes(), "application/json" if kind == "coco" else "image/png"


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a client may leave its connection silent
    log_message = lambda *_: None  # says nothing of requests

    def reply(self, status, body, kind="application/json", policy="default-src 'none'"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)),
                            ("Cache-Control", "no-store"), ("Content-Security-Policy", policy)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        server, headers, most = self.server, self.headers, UPLOAD if self.path == "/open" else TEXT
        host, token, length = headers["Host"], headers.get("X-Token", ""), headers.get("Content-Length", "-")
        if (host not in (f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}")
                or headers["Origin"] not in (None, f"http://{host}")):
            return self.reply(403, dict(error="only this machine's own page is answered"))
        if self.command == "GET" and self.path == "/":
            nonce, config = secrets.token_hex(16), json.dumps(server.config).replace("<", "\\u003c")
            page = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("NONCE", nonce)
            return self.reply(200, page.replace("CONFIG", config).encode(), "text/html", POLICY.format(nonce))
        if (self.path not in ("/open", "/wait", "/cut", "/samples", "/download") or self.command == "GET"
                or not secrets.compare_digest(token.encode(), server.config["token"].encode())):
            return self.reply(403, dict(error="only the page is answered, with its token: load it again"))
        if not length.isdecimal() or int(length) > most:
            return self.reply(413, dict(error=f"at most {most:,} bytes are taken"))
        try:
            data, act = self.rfile.read(int(length)), getattr(server.desk, self.path[1:])
            result = act(data) if self.path == "/open" else act(**json.loads(data))
            self.reply(200, *result) if isinstance(result, tuple) else self.reply(200, result)
        except ConnectionError:
            pass  # the browser's tab was closed meanwhile
        except (ValueError, KeyError, OSError) as e:
            gone = f"only the last {PHOTOS} photos are at hand: open this one again"
            self.reply(400, dict(error=gone if isinstance(e, KeyError) else str(e)))
    do_GET = do_POST


@program("page.py", "start it again, and load the page anew")
def main(argv=None):
    a = options(argv)
    warnings.simplefilter("ignore", UserWarning)  # notices of files, which the page says
    with tempfile.TemporaryDirectory(prefix="bitseg-", ignore_cleanup_errors=True) as folder:
        try:
            device, ckpt = pick_device(a.device), a.ckpt or checkpoints.newest_checkpoint()
            desk = Desk(checkpoints.load_checkpoint(ckpt, device), str(ckpt), folder, a.tiles)
            first = a.photo and dict(desk.open(Path(a.photo).read_bytes(), a.photo), name=Path(a.photo).name)
            server = ThreadingHTTPServer(("127.0.0.1", a.port), Handler)
        except OSError as e:
            fail(f"{e.filename or f'--port {a.port}'}: {e.strerror.lower()}; choose another")
        except (ValueError, RuntimeError, OverflowError) as e:
            fail(f"--port is from 0 to 65535, not {a.port}" if isinstance(e, OverflowError) else e)
        desk.first, server.desk, server.config = first and first["photo"], desk, dict(tiles=desk.tiles,
            token=secrets.token_hex(16), first=first, ckpt=str(ckpt), seed=SEED, upload=UPLOAD)
        threading.Thread(target=lambda: (pick_device(str(device)), desk.work()), daemon=True).start()
        print(url := f"http://127.0.0.1:{server.server_port}/", f"by {ckpt}; Ctrl-C ends it", flush=True)
        try:
            a.no_browser or webbrowser.open(url)
            server.serve_forever()
        except KeyboardInterrupt:
            print("page.py: stopped", flush=True)
    os._exit(0)  # Python's own end would abort where threads are in the middle of sampling


if __name__ == "__main__":
    raise SystemExit(main())
