"""page.py, without a browser and in a real one.

    python tests/test_page.py PHOTO docs 0.1,0.2 +0.3,0.4  # the README's pictures, without and with clicks
"""

import atexit
import base64
import errno
import fcntl
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

import page
import sample
import train
from answers.checkpoints import SHIPPED

ROOT = Path(__file__).parent.parent
VIEW = 400  # pixels of the side shown: half of page.py's, for a quarter of the work
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(not BROWSER, reason="no chromium is installed: apt-get install chromium")


# ---- the server


class Server:
    """A running page.py, and requests to it as its page makes them. alone: a program of its own; else a fork
    of this one, which has loaded what takes long, and shows less."""

    def __init__(self, *arguments, alone=False):
        words = ["--port", "0", "--no_browser", "--device", "cpu", *map(str, arguments)]
        (out, write_out), (err, write_err) = os.pipe(), os.pipe()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(write_out, 1), os.dup2(write_err, 2), os.chdir(ROOT)
                if alone:
                    os.execv(sys.executable, [sys.executable, "page.py", *words])
                sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
                page.VIEW = VIEW
                page.main(words)
            finally:
                os._exit(1)
        atexit.register(lambda: self.child and os.kill(self.child, signal.SIGKILL))  # after a failed test
        os.close(write_out), os.close(write_err)
        self.out, self.err = os.fdopen(out), os.fdopen(err)
        line = self.out.readline()
        assert line.startswith("http://127.0.0.1:"), self.err.read()
        assert "--ckpt" not in words or f"by {words[words.index('--ckpt') + 1]}; Ctrl-C ends it" in line
        self.url = line.split()[0]
        self.port = int(self.url.split(":")[2].strip("/"))
        self.config = json.loads(re.search(r"const config = (.*);\n", self.get("GET", "/")[1].decode())[1])

    def get(self, method, path, body=None, **headers):
        """(status, body) of a request; headers replace the ones that the page sends, None leaves one out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        token = self.config["token"] if hasattr(self, "config") else ""
        length = str(len(body or b""))
        sent = dict(Host=f"127.0.0.1:{self.port}", X_Token=token, Content_Length=length) | headers
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def ask(self, path, **body):
        status, content = self.get("POST", path, json.dumps(body).encode())
        assert status == 200, content
        return json.loads(content)

    def open(self, image):
        out = io.BytesIO()
        image.save(out, "PNG")
        status, content = self.get("POST", "/open", out.getvalue())
        assert status == 200, content
        return json.loads(content)

    def upload(self, image):
        """The answer to an image, after all its samples are there."""
        photo, news = self.open(image), dict(version=0, busy=True)
        while news["busy"]:
            news = self.ask("/wait", photo=photo["photo"], version=news["version"])
        assert not news["error"] and news["samples"] == 8
        return photo

    def stop(self, how=signal.SIGINT):
        """(exit status, what it said on stderr)"""
        os.kill(self.child, how)
        said, _ = self.err.read(), self.out.close()
        self.err.close()
        ended, self.child = os.waitpid(self.child, 0), None
        return os.waitstatus_to_exitcode(ended[1]), said


# ---- the browser, by the DevTools protocol over a pipe


class Browser:
    """A headless chromium with a profile of its own."""

    def __init__(self, folder):
        (theirs_in, self.out), (self.back, theirs_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def pipes():  # chromium reads from 3 and writes to 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
                 "--disable-background-networking --disable-component-update --remote-debugging-pipe").split()
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(command, preexec_fn=pipes, pass_fds=(3, 4), **silent)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.folder, self.number, self.rest, self.tabs = folder, 0, b"", []
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "saved"))

    def call(self, method, session=None, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if session:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                got = os.read(self.back, 1 << 20)
                assert got, "the browser has ended"
                self.rest += got
            one, self.rest = self.rest.split(b"\0", 1)
            reply = json.loads(one)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def attach(self, target):
        return Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def tab(self, url, size=(1280, 800)):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.tabs.append(target)
        tab = self.attach(target)
        tab.resize(*size)
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def close_tabs(self):
        while self.tabs:
            self.call("Target.closeTarget", targetId=self.tabs.pop())

    def stop(self):
        self.call("Browser.close")
        self.process.wait(120)
        os.close(self.out)
        os.close(self.back)


class Tab:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def js(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait(self, expression, seconds=120):
        end = time.time() + seconds
        while not self.js(expression):
            assert time.time() < end, f"not in {seconds} s: {expression} {self.js('document.body.innerText')}"
            time.sleep(0.02)

    def resize(self, width, height):
        window = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **window)

    def place(self, x, y):
        """Shares of the photo's width and height -> pixels of the window."""
        box = self.js("(b => [b.left, b.top, b.width, b.height])(canvas.getBoundingClientRect())")
        return box[0] + x * box[2], box[1] + y * box[3]

    def mouse(self, kind, x, y, button="left", modifiers=0):
        x, y = self.place(x, y)
        held = 0 if kind == "mouseReleased" else 1
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=held, clickCount=1,
                  modifiers=modifiers)

    def click(self, x, y, button="left", shift=False):
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button, 8 * shift)

    def drag(self, *points):
        self.mouse("mousePressed", *points[0])
        for point in points[1:]:
            self.mouse("mouseMoved", *point)
        self.mouse("mouseReleased", *points[-1])

    def key(self, key, shift=False, control=False):
        codes = dict(Tab=9, Enter=13, Delete=46, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40)
        event = dict(key=key, windowsVirtualKeyCode=codes.get(key, ord(key[0].upper())))
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, modifiers=8 * shift + 2 * control, **event)

    def choose_file(self, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def settle(self):
        """Until nothing is in work: all samples are there, and what was asked for last is answered."""
        self.wait("state.samples === 8 && !state.busy && state.maps[7] && !cut.running && !samples.running")

    def label(self, x, y):
        """Of the answer, at shares of its width and height."""
        width, height = self.js("state.view")
        return self.js(f"state.maps.a.labels[{int(y * height) * width + int(x * width)}]")

    def shot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


# ---- what is checked


def trained(out, *more):
    """The checkpoint of a network that has learnt next to nothing."""
    options = "--max_steps 2 --batch_size 2 --image_size 32 --eval_images 1 --steps 2 --eval_every 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.SIZES, "tiny", dict(SMALL, attn=0))
        assert train.main([*options.split(), "--device", "cpu", *more, "--out", str(out)]) == 0
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def server(ckpt):
    server = Server("--ckpt", ckpt)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def hinted(tmp_path_factory):
    """The server of a network that has learnt with hints and looks at tiles, and its checkpoint."""
    ckpt = trained(tmp_path_factory.mktemp("hinted"), "--hints", "0.5")
    server = Server("--ckpt", ckpt, "--tiles", 2)
    yield server, ckpt
    server.stop()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("browser"))
    yield chromium
    chromium.stop()


@pytest.fixture
def browser(chromium):
    """Six tabs that wait for one server's news would keep the next test's waiting: a browser opens no more
    connections to it."""
    yield chromium
    chromium.close_tabs()


def photo(size=(90, 60), seed=1):
    """Blocks of colour, with noise."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
    noisy = np.asarray(blocks) + rng.normal(0, 8, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def whole(runs, width, height):
    """Run lengths [label, length, ...] -> (height, width)."""
    return np.repeat(runs[::2], runs[1::2]).reshape(height, width)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_photo_is_sampled_and_cut(server):
    one = server.upload(photo())
    assert one["size"] == [90, 60] and one["view"] == [VIEW, 267]
    asked = dict(photo=one["photo"], strokes=[], closed=False)
    found = {grain: server.ask("/cut", grain=grain, **asked) for grain in ("3", "9")}
    maps = {grain: whole(cut["runs"], *one["view"]) for grain, cut in found.items()}
    assert [len(np.unique(maps[grain])) for grain in ("3", "9")] == [3, 9]
    for grain, cut in found.items():
        assert {int(k) - 1 for k in cut["confidence"]} == set(np.unique(maps[grain]).tolist())
        assert len(cut["colours"]) > maps[grain].max()
    samples = server.ask("/samples", photo=one["photo"], grain="normal")
    assert len(samples["samples"]) == 8 and whole(samples["boundary"], *one["view"]).max() <= 8
    assert all(whole(runs, *one["view"]).max() < len(samples["colours"]) for runs in samples["samples"])


STROKES = [dict(id=i, points=p) for i, p in ((1, [[10, 10]]), (2, [[50, 20], [70, 50]]), (1, [[20, 50]]))]


def test_clicks_of_one_id_are_together_and_of_two_apart(server):
    one = server.upload(photo())
    asked, scale = dict(photo=one["photo"], strokes=STROKES, grain="coarse"), one["view"][0] / 90
    labels = whole(server.ask("/cut", closed=False, **asked)["runs"], *one["view"])
    spots = [10, 10], [20, 50], [50, 20], [60, 35], [70, 50]
    at = [labels[int((y + 0.5) * scale), int((x + 0.5) * scale)] for x, y in spots]
    assert at[0] == at[1] != at[2] == at[3] == at[4]
    closed = server.ask("/cut", closed=True, **asked)
    assert len(closed["confidence"]) == 2


@pytest.mark.parametrize("strokes, grain, closed, size", [
    ([], "normal", False, (90, 60)), (STROKES, "normal", False, (90, 60)), (STROKES, "fine", True, (90, 60)),
    (STROKES, "5", False, (530, 400)), ([dict(id=7, points=[[0, 0]])], "12", False, (7, 5))])
def test_downloads_are_what_sample_py_makes_of_them(server, ckpt, tmp_path, strokes, grain, closed, size):
    photo(size).save(tmp_path / "a.png")
    one = server.upload(photo(size))
    asked = dict(photo=one["photo"], strokes=strokes, grain=grain, closed=closed, n=8, name="a.png")

    def saved(kind):
        status, content = server.get("POST", "/download", json.dumps(dict(asked, kind=kind)).encode())
        assert status == 200, content
        return content

    command = [tmp_path / "a.png", "--ckpt", ckpt, "--device", "cpu", "--out", tmp_path / "out"]
    command += ["--n", 8, "--seed", 0, "--grain", grain]
    if strokes:
        (tmp_path / "hints.png").write_bytes(saved("hints"))
        command += ["--hint", tmp_path / "hints.png", *["--closed"] * closed]
    assert sample.main([*map(str, command)]) == 0
    out = tmp_path / "out" / "a"
    assert np.array_equal(pixels(saved("labels")), np.asarray(Image.open(out / "answer.png")))
    assert np.array_equal(pixels(saved("overlay")), np.asarray(Image.open(out / "answer_overlay.png")))
    page, theirs = json.loads(saved("coco")), json.loads((out / "segments.json").read_text())
    assert all(page[key] == theirs[key] for key in ("images", "annotations", "categories", "borders"))
    assert all(page["info"][key] == theirs["info"][key] for key in ("software", "checkpoint", "n", "seed"))


def test_a_network_that_sees_hints_samples_with_them(hinted, tmp_path):
    server, ckpt = hinted
    one = server.upload(photo())
    asked = dict(photo=one["photo"], strokes=STROKES, grain="normal", closed=False)
    server.ask("/cut", **asked)  # at once, from samples without them
    asked |= dict(n=8, name="a.png")
    body = {kind: json.dumps(dict(asked, kind=kind)).encode() for kind in ("labels", "hints")}
    news = server.ask("/wait", photo=one["photo"], version=-1)
    while news["busy"]:
        status = server.get("POST", "/download", body["labels"])[0]
        assert status == 400 or not server.ask("/wait", photo=one["photo"], version=-1)["busy"]
        news = server.ask("/wait", photo=one["photo"], version=news["version"])
    photo().save(tmp_path / "a.png")
    (tmp_path / "hints.png").write_bytes(server.get("POST", "/download", body["hints"])[1])
    command = [tmp_path / "a.png", "--ckpt", ckpt, "--device", "cpu", "--out", tmp_path / "out"]
    command += ["--hint", tmp_path / "hints.png", "--tiles", 2]
    assert sample.main([*map(str, command)]) == 0
    labels = pixels(server.get("POST", "/download", body["labels"])[1])
    assert np.array_equal(labels, np.asarray(Image.open(tmp_path / "out" / "a" / "answer.png")))


def test_hints_are_saved_before_there_are_samples_and_labels_are_not(hinted):
    one = hinted[0].open(photo())
    asked = dict(photo=one["photo"], strokes=STROKES, grain="normal", closed=False, n=0, name="a.png")
    status, hints = hinted[0].get("POST", "/download", json.dumps(dict(asked, kind="hints")).encode())
    assert status == 200 and np.array_equal(pixels(hints), page.strokes_map(STROKES, (90, 60)))
    body = json.dumps(dict(asked, kind="labels", strokes=[])).encode()
    status, reply = hinted[0].get("POST", "/download", body)
    assert status == 400 and json.loads(reply)["error"] == "not all samples are there yet: wait a moment"


@pytest.mark.parametrize("method, path, headers, status", [
    ("GET", "/", {}, 200), ("GET", "/", dict(Host="localhost:{port}"), 200),
    ("GET", "/", dict(Host="evil.example"), 403), ("GET", "/", dict(Host="127.0.0.1"), 403),
    ("GET", "/", dict(Host="127.0.0.1.evil.example:{port}"), 403), ("GET", "/", dict(Host=None), 403),
    ("GET", "/", dict(Origin="http://evil.example"), 403), ("POST", "/open", dict(Origin="null"), 403),
    ("POST", "/open", dict(Origin="http://evil.example"), 403),
    ("POST", "/open", dict(Origin="https://127.0.0.1:{port}"), 403),
    ("POST", "/open", dict(Origin="http://localhost:{port}"), 403),
    ("POST", "/open", dict(Origin="http://127.0.0.1:1"), 403),
    ("POST", "/open", dict(X_Token=None), 403), ("POST", "/open", dict(X_Token="0" * 32), 403),
    ("POST", "/cut", dict(X_Token=""), 403), ("POST", "/cut", dict(X_Token="é"), 403),
    ("GET", "/../page.py", {}, 403), ("GET", "/page.py", {}, 403), ("GET", "/%2e%2e/etc/passwd", {}, 403),
    ("GET", "//etc/passwd", {}, 403), ("POST", "/__init__", {}, 403), ("POST", "/work", {}, 403),
    ("POST", "/open/..", {}, 403), ("POST", "/open", dict(Content_Length="64000001"), 413),
    ("POST", "/open", dict(Content_Length="-1"), 413), ("POST", "/open", dict(Content_Length=None), 413),
    ("POST", "/cut", dict(Content_Length="1000001"), 413)])
def test_only_its_own_page_is_answered(server, method, path, headers, status):
    headers = {name: value and value.format(port=server.port) for name, value in headers.items()}
    got, content = server.get(method, path, **headers)
    assert got == status
    if status != 200:
        assert list(json.loads(content)) == ["error"] and server.config["token"].encode() not in content


def test_the_page_may_load_and_send_nothing_elsewhere(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    reply = connection.getresponse()
    policy, page = reply.getheader("Content-Security-Policy"), reply.read().decode()
    for rule in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert rule in policy
    nonce = re.search("'nonce-(.+?)'", policy)[1]
    tags = re.findall("<(?:script|style)[^>]*>", page)
    assert tags == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.parametrize("content, words", [
    (b"I am a text, though I am named a.jpg", "no image format"), (b"", "empty"),
    (b"P5 30000 30000 255 0", "pixels; scale it down first")])
def test_a_file_that_is_no_image_gets_a_sentence(server, content, words):
    status, reply = server.get("POST", "/open", content)
    error = json.loads(reply)["error"]
    assert status == 400 and words in error and error.startswith("this file: ") and "/" not in error


def test_what_a_file_is_read_like_is_said_on_the_page(server):
    dark = Image.fromarray((np.asarray(photo()) // 8).astype(np.uint8))
    assert server.open(dark)["notes"].startswith("; its contrast was raised")
    assert server.open(photo())["notes"] == ""


def test_what_another_file_is_read_like_is_not_said_of_this_one(tmp_path, monkeypatch):
    desk, real = page.Desk.__new__(page.Desk), page.read_image
    desk.folder, desk.slow, desk.news, desk.photos = tmp_path, threading.Lock(), threading.Condition(), {}

    def beside(path):  # `work` reads an older photo in the same moment
        warnings.warn("/tmp/older: its contrast was raised", stacklevel=1)
        warnings.warn(f"{path}: its colours were converted", stacklevel=1)
        return real(path)

    monkeypatch.setattr(page, "read_image", beside)
    photo().save(out := io.BytesIO(), "PNG")
    assert desk.open(out.getvalue(), "a.png")["notes"] == "; its colours were converted"


def test_a_full_disk_is_named_and_the_next_photo_opens(tmp_path, monkeypatch):
    desk, real = page.Desk.__new__(page.Desk), Path.write_bytes
    desk.folder, desk.slow, desk.news, desk.photos = tmp_path, threading.Lock(), threading.Condition(), {}

    def full(path, data):
        real(path, data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    out = io.BytesIO()
    photo().save(out, "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match="a.png: .*No space left on device"):
            desk.open(out.getvalue(), "a.png")
    assert not list(tmp_path.iterdir()) and desk.open(out.getvalue(), "a.png")["size"] == photo().size


def test_wrong_requests_get_a_sentence(server):
    asked = dict(photo=server.upload(photo())["photo"], strokes=[], grain="normal", closed=False)
    hints = [[dict(id=i, points=[p])] for i, p in ((0, [1, 1]), (300, [1, 1]), (1, [190, 1]), (1, [-9, 1]))]
    twice = [dict(id=i, points=[[9, 9]]) for i in (1, 2)]
    for change, words in ((dict(photo="../../etc/passwd"), "only the last 4 photos"),
                          (dict(grain="many"), "--grain is"),
                          *((dict(strokes=strokes), "a hint is") for strokes in hints),
                          (dict(strokes=twice), "a hint is wholly under later ones")):
        status, reply = server.get("POST", "/cut", json.dumps(asked | change).encode())
        assert status == 400 and words in json.loads(reply)["error"], change


def test_only_the_photos_used_last_are_at_hand(server):
    first = server.open(photo())["photo"]
    for seed in range(4):
        server.open(photo((9, 6), seed))
    status, reply = server.get("POST", "/wait", json.dumps(dict(photo=first, version=0)).encode())
    assert status == 400 and "open this one again" in json.loads(reply)["error"]
    kept = server.open(photo())["photo"]
    for seed in range(4):
        server.open(photo((9, 6), seed))
        server.ask("/wait", photo=kept, version=-1)


def test_the_photo_of_the_command_line_stays_at_hand(ckpt, tmp_path):
    photo().save(tmp_path / "a.png")
    server = Server(tmp_path / "a.png", "--ckpt", ckpt)
    for seed in range(5):
        server.open(photo((9, 6), seed))
    server.ask("/wait", photo=server.config["first"]["photo"], version=-1)
    server.stop()


def test_photos_without_a_result_are_sampled_first_the_newest_of_them_before_others(monkeypatch, tmp_path):
    desk, seen = page.Desk.__new__(page.Desk), []
    desk.news, desk.photos = threading.Condition(), {}
    for name, result in (("a", "some"), ("b", None), ("c", None), ("d", "some")):
        desk.photos[name] = page.Photo(Path(name), (9, 6), None, [], result=result)

    def sample(photo, strokes):
        photo.done = strokes
        seen.append(photo.file.name)
        if len(seen) == 4:
            raise SystemExit

    monkeypatch.setattr(desk, "sample", sample, raising=False)
    with pytest.raises(SystemExit):
        desk.work()
    assert seen == ["c", "b", "d", "a"]


def test_control_c_ends_it_in_the_middle_of_sampling_and_nothing_is_left(tmp_path, monkeypatch):
    """SIGTERM, too; two programs at once."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    photo((300, 200)).save(tmp_path / "a.png")
    with ThreadPoolExecutor() as pool:
        started = pool.map(lambda _: Server(tmp_path / "a.png", "--ckpt", SHIPPED, alone=True), range(2))
    for server, how in zip(started, (signal.SIGINT, signal.SIGTERM)):
        assert server.config["first"]["name"] == "a.png"
        folder, = tmp_path.glob(f"bitseg-*/{server.config['first']['photo']}")
        assert len(list(folder.parent.iterdir())) == 1
        assert server.stop(how) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.jpg"], "nowhere.jpg: no such file"), (["README.md"], "README.md: not a readable image"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt: no such file"), (["--device", "cuda:99"], "try --device cpu"),
    (["--port", "{port}"], "--port {port}: address already in use; choose another"),
    (["--port", "70000"], "--port is from 0 to 65535, not 70000")])
def test_wrong_use_gets_one_sentence(server, ckpt, monkeypatch, capsys, arguments, words):
    arguments, words = [one.format(port=server.port) for one in arguments], words.format(port=server.port)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(page.ThreadingHTTPServer, "serve_forever", lambda server: page.fail("it serves"))
    with pytest.raises(SystemExit, match="2"):
        page.main(["--no_browser", "--device", "cpu", "--ckpt", str(ckpt), *arguments])
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


# ---- in the browser


def opened(browser, server, folder, image=None, size=(1280, 800), name="a.png"):
    """A tab with a photo, all its samples there."""
    (image or photo()).save(folder / name)
    tab = browser.tab(server.url, size)
    tab.choose_file(folder / name)
    tab.settle()
    return tab


@in_browser
def test_mouse(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    tab.js("grain('coarse')")
    tab.click(0.2, 0.2)
    tab.click(0.8, 0.7)
    tab.settle()
    assert tab.label(0.2, 0.2) != tab.label(0.8, 0.7)
    tab.click(0.2, 0.9)
    tab.settle()
    assert len({tab.label(0.2, 0.2), tab.label(0.8, 0.7), tab.label(0.2, 0.9)}) == 3
    tab.key("z", control=True)
    tab.click(0.8, 0.7)  # on its dot: it is the last one now
    tab.click(0.2, 0.9, shift=True)
    tab.settle()
    assert tab.js("state.strokes.map(s => s.id)") == [1, 2, 2]
    assert tab.label(0.2, 0.2) != tab.label(0.8, 0.7) == tab.label(0.2, 0.9)
    tab.drag((0.4, 0.1), (0.45, 0.3), (0.5, 0.5))
    tab.settle()
    assert tab.label(0.4, 0.1) == tab.label(0.45, 0.3) == tab.label(0.5, 0.5)
    assert tab.label(0.4, 0.1) not in (tab.label(0.2, 0.2), tab.label(0.8, 0.7))
    tab.click(0.45, 0.3, "right")
    tab.wait("state.strokes.length === 3")
    tab.settle()
    tab.mouse("mouseMoved", 0.8, 0.7)
    segment, tip = tab.label(0.8, 0.7) + 1, tab.js("$('tip').textContent")
    assert re.fullmatch(rf"segment {segment}: [\d.]+ % of the photo, confidence [01]\.\d\d", tip)
    tab.wait("$('status').textContent.includes('with 3 hints, 8 samples')")


@in_browser
def test_samples_uncertainty_grain_and_outlines(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    picture = "canvas.toDataURL()"
    seen = {tab.js(picture)}
    for text in ("sample 3", "disagree"):
        tab.js(f"[...$('tabs').children].find(button => button.innerText.trim() === '{text}').click()")
        seen.add(tab.js(picture))
    assert len(seen) == 3
    tab.js("$('tabs').firstChild.click()")
    assert tab.js(picture) in seen
    for control, value in (("opacity", 0), ("opacity", 90)):
        tab.js(f"$('{control}').value = {value}; $('{control}').oninput()")
        seen.add(tab.js(picture))
    tab.js("$('outlines').click()")
    seen.add(tab.js(picture))
    assert len(seen) == 6
    counts = []
    for step in ("$('grain').value = 4; $('grain').oninput({ target: $('grain') })",
                 "document.querySelector('[data-grain=fine]').click()",
                 "document.querySelector('[data-grain=coarse]').click()"):
        tab.js(step)
        tab.settle()
        counts.append(tab.js("state.maps.a.area.size"))
    assert counts[0] == 4 and counts[2] < counts[1]
    assert tab.js("$('count').textContent") == f"{counts[2]} segments"


@in_browser
def test_keyboard_alone(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    for _ in range(30):
        if tab.js("document.activeElement === canvas"):
            break
        tab.key("Tab")
    assert tab.js("document.activeElement === canvas")
    tab.key("ArrowLeft")
    tab.key("Enter")
    for _ in range(10):
        tab.key("ArrowRight")
    tab.key("Enter")
    tab.key("ArrowDown", shift=True)
    for _ in range(9):
        tab.key("ArrowDown")
    assert "segment" in tab.js("$('status').textContent")
    tab.key("Enter", shift=True)
    tab.settle()
    strokes = tab.js("state.strokes")
    assert [s["id"] for s in strokes] == [1, 2, 2] and len({str(s["points"]) for s in strokes}) == 3
    tab.key("Delete")  # under the cross
    assert tab.js("state.strokes") == strokes[:2]
    tab.key("z", control=True)
    assert tab.js("state.strokes") == strokes
    tab.key("y", control=True)
    assert tab.js("state.strokes") == strokes[:2]
    while tab.js("state.strokes.length"):
        tab.key("z", control=True)
    tab.settle()
    before = tab.js("state.maps.a.area.size")
    tab.key("+")
    tab.settle()
    assert tab.js("state.maps.a.area.size") > before
    for key in "2ua":
        tab.key(key)
        assert tab.js("state.shown") == key
    tab.key("o")
    assert not tab.js("$('outlines').checked")


@in_browser
@pytest.mark.parametrize("tiles", [1, 2])
def test_what_is_saved_is_repeated_by_the_command_shown(browser, server, hinted, monkeypatch, tmp_path,
                                                        tiles):
    """In tiles, of a network that has learnt with hints."""
    server = hinted[0] if tiles > 1 else server
    shutil.rmtree(browser.folder / "saved", ignore_errors=True)
    a = "a" if tiles > 1 else "-a's $1"
    tab = opened(browser, server, tmp_path, name=f"{a}.png")
    tab.click(0.2, 0.2)
    tab.drag((0.6, 0.2), (0.7, 0.5), (0.8, 0.8))
    tab.js("$('closed').click()")
    tab.settle()
    saved, shown, first = {}, tab.js("$('command').textContent"), "!$('first').hidden"
    hash = re.search(r"_hints_(\w+)\.png", shown)[1]
    assert tab.js(first)
    tab.js("""
        const wait = setTimeout, made = URL.createObjectURL, held = new Set();
        setTimeout = (act, time) => wait(act, time / 100);
        URL.createObjectURL = blob => { const href = made(blob); held.add(href); return href; };
        URL.revokeObjectURL = href => held.delete(href);""")
    for kind in ("labels", "overlay", "coco", "hints"):
        of = "" if kind == "hints" else "_n8_seed0_normal_closed"
        name = f"{a}_{kind}{of}_{hash}.{'json' if kind == 'coco' else 'png'}"
        tab.js(f"document.querySelector('[data-kind={kind}]').click()")
        tab.wait(f'$("status").textContent === "Saved {name}."')
        saved[kind] = browser.folder / "saved" / name
    while not all(path.exists() for path in saved.values()):  # the browser writes them on its own time
        time.sleep(0.02)
    assert not tab.js(first)
    tab.wait("held.size === 0")
    monkeypatch.chdir(tmp_path)
    shutil.copy(saved["hints"], tmp_path)
    command = shlex.split(tab.js("$('command').textContent"))
    assert command[:2] == ["python", "sample.py"]
    assert sample.main([*command[2:], "--device", "cpu"]) == 0
    answer = np.asarray(Image.open(f"samples/{a}/answer.png"))
    assert np.array_equal(np.asarray(Image.open(saved["labels"])), answer) and len(np.unique(answer)) == 2
    assert json.loads(saved["coco"].read_text())["images"][0]["file_name"] == f"{a}.png"
    tab.drag((0.6, 0.2), (0.7, 0.5), (0.8, 0.7))
    assert hash not in tab.js("$('command').textContent") and tab.js(first)
    tab.key("z", control=True)
    assert tab.js("$('command').textContent") == shown and not tab.js(first)


@in_browser
def test_hints_are_back_after_a_reload_another_photo_and_a_new_start(browser, ckpt, tmp_path):
    server = Server("--ckpt", ckpt)
    tab = opened(browser, server, tmp_path)
    tab.click(0.2, 0.2)
    tab.drag((0.6, 0.2), (0.7, 0.5))
    strokes = tab.js("state.strokes")
    photo((60, 90), 2).save(tmp_path / "b.png")
    tab.choose_file(tmp_path / "b.png")
    tab.wait("state.name === 'b.png'")
    assert tab.js("state.strokes.length") == 0
    for again in ("another photo", "reload", "new start"):
        if again != "another photo":
            if again == "new start":
                server.stop()
                server = Server("--ckpt", ckpt, "--port", server.port)
            tab.call("Page.reload")
            tab.wait("document.readyState === 'complete' && !state.name")
        tab.choose_file(tmp_path / "a.png")
        tab.wait("state.name === 'a.png'")
        tab.settle()
        assert tab.js("state.strokes") == strokes and tab.js("state.last") == 2
        assert "; its hints of before are back" in tab.js("$('status').textContent")
        assert tab.label(0.2, 0.2) != tab.label(0.6, 0.2)
    tab.js("$('undo').click()")
    assert tab.js("state.strokes.length") == 0
    tab.js("$('redo').click()")
    (tmp_path / "other").mkdir()
    other = photo(seed=2)  # of one name and size
    assert other.size == photo().size
    other.save(tmp_path / "other" / "a.png")
    before = tab.js("state.photo")
    tab.choose_file(tmp_path / "other" / "a.png")
    tab.wait(f"state.photo !== '{before}'")
    assert tab.js("state.strokes.length") == 0
    server.stop()


@in_browser
def test_leaving_is_asked_about_only_where_hints_cannot_be_kept(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    leaves = "dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    tab.click(0.2, 0.2)
    assert tab.js(leaves)
    tab.js("sessionStorage.setItem('full', 'x'.repeat(5 * 2 ** 20 - sessionStorage.length - 100))")
    tab.drag(*[(x, y) for x in np.linspace(0.1, 0.9, 6) for y in (0.2, 0.8)])
    assert tab.js("state.strokes.length") == 2 and not tab.js(leaves)
    tab.js("sessionStorage.removeItem('full')")
    tab.key("z", control=True)
    assert tab.js(leaves)


@in_browser
def test_a_second_finger_draws_nothing(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)

    def touch(kind, *fingers):
        points = [dict(zip("xy", tab.place(*at)), id=number) for number, at in enumerate(fingers)]
        tab.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", (0.2, 0.2))
    touch("touchStart", (0.2, 0.2), (0.8, 0.8))
    touch("touchMove", (0.3, 0.2), (0.7, 0.8))
    touch("touchMove", (0.4, 0.2), (0.6, 0.8))
    touch("touchEnd")
    tab.wait("state.strokes.length")
    stroke, = tab.js("state.strokes")
    assert len(stroke["points"]) == 3 and all(y == 12 for _, y in stroke["points"])


@in_browser
def test_the_remove_button_takes_the_last_hint_away(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    for x in (0.2, 0.4, 0.8):
        tab.click(x, 0.2)
    tab.click(0.4, 0.2)  # on its dot
    for left in ([1, 3], [1], []):
        tab.js("$('remove').click()")
        assert tab.js("state.strokes.map(s => s.id)") == left
    tab.js("$('remove').click()")
    assert tab.js("$('status').textContent") == "There is no hint here to take away."


@in_browser
def test_closed_is_asked_for_from_two_hints_on(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    tab.js("$('closed').click()")
    for x, shift, closed in ((0.2, False, False), (0.4, True, False), (0.8, False, True)):
        tab.click(x, 0.2, shift=shift)
        assert tab.js("$('command').textContent.includes('--closed')") == tab.js("asked().closed") == closed


@in_browser
def test_fifty_quick_clicks(browser, server, tmp_path):
    """One request at a time, each with what was newest then; the last one's answer stays."""
    tab = opened(browser, server, tmp_path)
    tab.js("""
        const sent = [], real = fetch;
        let running = 0, most = 0;
        fetch = async (path, options) => {
          if (path !== "/cut") return real(path, options);
          sent.push([JSON.parse(options.body).strokes.length, state.strokes.length]);
          most = Math.max(most, ++running);
          const reply = await real(path, options);
          running--;
          return reply;
        };""")
    spots = [(x, y) for x in np.linspace(0.05, 0.95, 10) for y in np.linspace(0.1, 0.9, 5)]
    for x, y in spots:
        tab.click(x, y)
    tab.settle()
    sent, strokes = tab.js("sent"), tab.js("state.strokes")
    assert tab.js("most") == 1 and len(strokes) == 50
    assert sent[-1] == [50, 50] and all(asked == newest for asked, newest in sent)
    last = server.ask("/cut", **tab.js("asked()"))
    assert whole(last["runs"], *tab.js("state.view")).ravel().tolist() == tab.js("[...state.maps.a.labels]")
    assert len({tab.label(x, y) for x, y in spots}) == 50


@in_browser
def test_an_answer_that_comes_too_late_is_not_shown_on_the_next_photo(browser, server, tmp_path):
    tab = opened(browser, server, tmp_path)
    tab.js("""
        const real = fetch, free = [];
        fetch = async (path, options) => {
          const reply = await real(path, options);
          if (path === "/cut") await new Promise(done => free.push(done));
          return reply;
        };""")
    tab.click(0.5, 0.5)
    tab.wait("free.length === 1")
    photo((60, 90), 2).save(tmp_path / "b.png")
    tab.choose_file(tmp_path / "b.png")
    tab.wait("state.name === 'b.png' && state.samples === 8")
    tab.js("free[0]()")
    tab.wait("free.length === 2")
    assert tab.js("!state.maps.a")
    tab.js("free[1]()")
    tab.settle()
    last = server.ask("/cut", **tab.js("asked()"))
    assert whole(last["runs"], 267, VIEW).ravel().tolist() == tab.js("[...state.maps.a.labels]")
    assert tab.js("state.strokes.length") == 0


@in_browser
def test_two_tabs(browser, server, tmp_path):
    one = opened(browser, server, tmp_path)
    two = opened(browser, server, tmp_path, photo((60, 90), 2))
    one.click(0.2, 0.2)
    two.click(0.5, 0.5)
    one.click(0.8, 0.8)
    for tab, n, view in ((one, 2, [VIEW, 267]), (two, 1, [267, VIEW])):
        tab.settle()
        assert tab.js("state.strokes.length") == n and tab.js("state.view") == view
        last = server.ask("/cut", **tab.js("asked()"))
        assert whole(last["runs"], *view).ravel().tolist() == tab.js("[...state.maps.a.labels]")


@in_browser
def test_a_text_named_jpg_and_a_dropped_photo(browser, server, tmp_path):
    (tmp_path / "a.jpg").write_text("I am no image")
    tab = browser.tab(server.url)
    tab.choose_file(tmp_path / "a.jpg")
    tab.wait("$('status').classList.contains('bad')")
    assert tab.js("$('status').textContent").startswith("a.jpg: this file: not a readable image (no image ")
    out = io.BytesIO()
    photo().save(out, "PNG")
    tab.js(f"""
        const bytes = new Uint8Array({list(out.getvalue())});
        const dropped = new DataTransfer();
        dropped.items.add(new File([bytes], "<b>.png"));
        dropped.items.add(new File([bytes], "c.png"));
        $("drop").dispatchEvent(new DragEvent("drop", {{ dataTransfer: dropped, bubbles: true }}));""")
    tab.settle()
    assert tab.js("$('status').textContent").startswith("<b>.png, 90 x 60 pixels: ")
    assert "; it is the first of 2 files" in tab.js("$('status').textContent")


@in_browser
def test_another_sites_page_gets_nothing(browser, server, tmp_path):
    (tmp_path / "index.html").write_text("<p>elsewhere")
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=elsewhere.serve_forever, args=[0.01], daemon=True).start()
    tab = browser.tab(f"http://127.0.0.1:{elsewhere.server_port}/")
    sent = f"{{ method: 'POST', headers: {{ 'X-Token': '{server.config['token']}' }}, body: '{{}}' }}"
    for action, options in (("", "{}"), ("open", "{ method: 'POST', body: 'x' }"), ("wait", sent)):
        said = tab.js(f"fetch('{server.url}{action}', {options}).then(reply => reply.text(), e => e.message)")
        assert said == "Failed to fetch"
    tab.js(f"document.body.innerHTML = '<iframe src={server.url}></iframe>'")
    tab.wait("performance.getEntriesByType('resource').some(one => one.initiatorType === 'iframe')")
    frame, = tab.call("Page.getFrameTree")["frameTree"]["childFrames"]
    assert frame["frame"]["unreachableUrl"] == server.url  # what is shown there is the browser's own words
    elsewhere.shutdown()


@in_browser
def test_all_of_it_fits_the_window(browser, server, tmp_path):
    """A photo as wide as a wide window bears and one as high as it is, both of them in a narrow one, too."""
    for width, height, windows in ((90, 60, ((1280, 800), (390, 844))), (60, 90, ((390, 844), (1280, 800)))):
        tab = opened(browser, server, tmp_path, photo((width, height)), windows[0])
        tab.click(0.5, 0.5)
        tab.settle()
        for size in windows:
            tab.resize(*size)
            tab.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            box = tab.js("(b => [b.left, b.top, b.right, b.bottom])(canvas.getBoundingClientRect())")
            assert tab.js("(e => e.scrollWidth <= e.clientWidth)(document.scrollingElement)")
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
            assert width > height or box[3] - box[1] > 300
            assert tab.js("[...document.querySelectorAll('button')].every("
                          "b => b.scrollWidth <= b.clientWidth + 1)")


@in_browser
def test_a_page_whose_server_has_ended_says_so(browser, ckpt, tmp_path):
    server = Server("--ckpt", ckpt)
    tab = opened(browser, server, tmp_path)
    assert server.stop(signal.SIGTERM) == (0, "")
    tab.click(0.5, 0.5)
    tab.wait("$('status').textContent === 'page.py no longer answers'")


@in_browser
def test_news_that_got_lost_is_asked_for_again_and_a_refusal_is_final(browser, server, tmp_path):
    photo().save(tmp_path / "a.png")
    photo((60, 90)).save(tmp_path / "b.png")
    tab = browser.tab(server.url)
    tab.js("""
        const real = fetch;
        let waits = 0, to = "/wait";
        fetch = (path, options) => path !== "/wait" ? real(path, options)
          : ++waits === 1 ? Promise.reject(TypeError("Failed to fetch")) : real(to, options);""")
    tab.choose_file(tmp_path / "a.png")
    tab.wait("$('status').textContent === 'page.py no longer answers'")
    tab.settle()
    tab.wait("$('status').textContent.includes(' segments, 8 samples')")
    assert not tab.js("$('status').classList.contains('bad')")
    tab.js("to = '/nothing'")
    tab.choose_file(tmp_path / "b.png")
    tab.wait("$('status').textContent.includes('load it again')")
    waits = tab.js("waits")
    time.sleep(2.5)
    assert tab.js("waits") == waits


if __name__ == "__main__":
    shown, folder, *clicks = sys.argv[1:]
    server = Server(shown, "--ckpt", "weights/photo.pt", alone=True)
    browser = Browser(Path(tempfile.mkdtemp()))
    tab = browser.tab(server.url)
    for name in ("page.png", "page-clicks.png"):
        tab.settle()
        tab.shot(Path(folder, name))
        Image.open(Path(folder, name)).quantize(256).save(Path(folder, name), optimize=True)
        for click in clicks:  # shares of the photo's width and height; after +, with Shift
            tab.click(*map(float, click.strip("+").split(",")), shift=click.startswith("+"))
    browser.stop()
    server.stop()
    shutil.rmtree(browser.folder)
