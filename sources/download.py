"""Fetch COCO: `download(home, splits, server)`; calls that broke off go on where they stopped. `data.py coco
--download` uses it."""

import errno
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm


def download(home, splits, server):
    """COCO's images and panoptic annotations into home: what is there stays, what broke off goes on."""
    for name in [f"zips/{split}2017.zip"
                 for split in splits] + ["annotations/panoptic_annotations_trainval2017.zip"]:
        file, done = home / Path(name).name, home / f".{Path(name).name}.done"
        if not done.exists():
            home.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                fetch(f"{server}/{name}", file)
            unpack_zip(file, home)
            for inner in sorted((home / "annotations").glob("panoptic_*2017.zip")):
                unpack_zip(inner, home / "annotations")
                inner.unlink()
            done.touch()
            file.unlink()


def fetch(url, file, tries=5):
    """Download url to file, going on where an earlier call or a broken connection stopped. Raises OSError."""
    part, why, total = Path(f"{file}.part"), "", -1
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                have = have if answer.status == 206 else 0  # else the server sends all of it
                total = have + int(answer.headers.get("Content-Length", -1))
                free, need = shutil.disk_usage(file.parent).free, 2 * total - have
                if free < need:
                    raise OSError(errno.ENOSPC, f"{need / 1e9:.1f} GB are needed to fetch and unpack it, "
                                                f"{free / 1e9:.1f} GB are free in {file.parent}")
                with (open(part, "ab" if have else "wb") as f,
                      tqdm(total=total, initial=have, desc=file.name, unit="B", unit_scale=True,
                           leave=False) as bar):
                    while chunk := answer.read(2**20):
                        f.write(chunk)
                        bar.update(len(chunk))
            why = f"{part.stat().st_size} of {total} bytes came"
        except urllib.error.HTTPError as e:
            if e.code == 416:  # nothing more: complete, or another file
                total = int(e.headers.get("Content-Range", "*/0").rpartition("/")[2])
                if total != have:
                    part.unlink()
            elif e.code < 500:
                raise OSError(f"{url}: {e}") from None
            why = e
        except (OSError, HTTPException) as e:
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise OSError(f"{url}: {e.strerror}; what came is kept, "
                              f"run the same command again to go on") from None
            why = e
        if part.exists() and part.stat().st_size == total:
            os.replace(part, file)
            return
        time.sleep(2**attempt / 8)
    raise OSError(f"{url} could not be fetched ({why}); what came is kept, run the same command again to go "
                  f"on")


def unpack_zip(file, folder):
    """Unpack a zip file, but for what is there in full; its checksums are checked. Raises OSError."""
    try:
        with zipfile.ZipFile(file) as z:
            for member in tqdm(z.infolist(), f"unpacking {file.name}", unit="file", leave=False):
                there, junk = folder / member.filename, member.filename.startswith("__MACOSX")
                if not junk and not (there.is_file() and there.stat().st_size == member.file_size):
                    z.extract(member, folder)
    except (zipfile.BadZipFile, zlib.error) as e:
        file.unlink()
        raise OSError(f"{file} was damaged and is deleted ({e}): run the same command again to fetch it "
                      f"anew") from None
