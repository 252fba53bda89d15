"""Segment images: several plausible answers for each, where they agree, and a hand on the wheel.

    python sample.py --n 8 photo.jpg                             # newest in out/, or weights/photo.pt
    python sample.py --n 4 --out masks --resume photos/ a.png    # a folder and a file; go on where it stopped
    python sample.py --grain fine photo.jpg                      # more, smaller segments; --grain 12: so many
    python sample.py --points "120,80 160,90; 30,200" photo.jpg  # two belong together, the third apart
    python sample.py --points "120,80; 30,200" --closed a.jpg    # two segments and nothing else
    python sample.py --tiles 3 crowd.jpg                         # look closer: at 3 x 3 tiles, besides
    python sample.py --init corrected.png --strength 0.4 a.jpg   # a map corrected by hand: sample around it
    torchrun --nproc_per_node 8 -- sample.py --n 4 photos/       # the images are shared among 8 GPUs

For each image a folder --out/<stem>/ (<name>_<suffix> where two have one stem), maps at the image's own size:
    labels_00.png ...  one id a pixel, coloured when looked at; 16-bit grey from 255 ids, and from 65,535
                       R + 256 G + 65,536 B; 0 is never used
    overlay_00.png ... the same over the image; the same place has the same colour in every sample
    answer.png         the joint answer: one map of all samples, as fine as --grain says; answer_overlay.png
    uncertainty.png    the share of samples that see a boundary; the entropy of the mean bits (paper, Eq. 3)
    panel.png          all of it in one picture
    segments.json      the answer's segments in COCO's format (pycocotools reads it): RLE, area, box, and
                       confidence, the chance that a person would draw it;
                       borders: [id, id, the chance that a person would part them]
--format coco_panoptic adds --out/panoptic.json and --out/panoptic/<name>.png. As a function, from Python:
segment.py.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path


def options(argv):
    """The command line as a namespace; its mistakes end in one sentence and exit status 2."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="*", help="image files or folders")
    p.add_argument("--n", type=int, default=8, help="samples for each image (%(default)s)")
    p.add_argument("--ckpt", help="checkpoint (default: the newest under out/, else weights/photo.pt)")
    p.add_argument("--out", default="samples", help="where the folders go (%(default)s)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--guidance", type=float, help="guidance weight, 0 = none: half the time (default: the "
                                                  "checkpoint's, but at most 3 where it sees hints)")
    p.add_argument("--sampler", help="ddpm or ddim (default: the checkpoint's)")
    p.add_argument("--smooth", type=float, help="share of the side that answers are averaged over, between "
                                                "the image's edges; 0 = none")
    p.add_argument("--tiles", help="2: look closer, at 2 x 2 overlapping tiles (more along a panorama), "
                                   "besides; 1: do not; auto: at as many as the size of what is found asks "
                                   "for, up to 4 x 4 (default: 2 for photos, 1 for a checkpoint without "
                                   "learnt odds, or --merge 0)")
    p.add_argument("--grain", default="normal", help="coarse, normal, fine, or how many segments "
                                                     "(%(default)s)")
    p.add_argument("--closed", action="store_true", help="every pixel belongs to one of the hints")
    p.add_argument("--merge", type=float, help="cut where the odds that people part two regions reach this: "
                                               "above 1 coarser, below finer; "
                   "0: samples as the network makes them, joined where most agree (default: the "
                   "checkpoint's)")
    p.add_argument("--least", type=int, help="regions of fewer pixels, of the network's, join a neighbour "
                                             "first (default: the checkpoint's)")
    p.add_argument("--seed", type=int, default=0, help="sample j of every image has the seed SEED + j "
                                                               "(%(default)s)")
    p.add_argument("--batch", type=int, help="samples at once (default: on a CPU 4 in bf16, else 1; on a GPU "
                                             "64, or as many as memory holds)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--threads", type=int, help="of the CPU (default: as many as are fastest just now; with "
                                               "CUDA 4)")
    p.add_argument("--resume", action="store_true", help="skip images that are done with the same settings")
    p.add_argument("--format", choices=["coco", "coco_panoptic"], default="coco",
                   help="coco: segments.json alone")
    p.add_argument("--hint", action="append", default=[],
                   help="label map: pixels of one id belong together, of different ids apart; 0 is free")
    p.add_argument("--points", action="append", default=[],
                   help='groups of clicks "x,y x,y;x,y", in pixels from the top left corner; may be repeated')
    p.add_argument("--box", action="append", default=[], help="x0,y0,x1,y1 about one segment, which "
                                                              "ends there; may be repeated")
    p.add_argument("--init", action="append", default=[], help="label map to start from; 0 is free")
    p.add_argument("--strength", type=float, default=0.4, help="how much of --init is forgotten: above 0, "
                                                               "at most 1 (%(default)s)")
    p.error = lambda message: p.exit(2, f"sample.py: {message}\n")
    end = argv.index("--") if "--" in argv else len(argv)  # argparse's own way of it does not mix
    a = p.parse_intermixed_args(argv[:end])
    a.images += argv[end + 1 :]
    return a


if __name__ == "__main__":
    options(sys.argv[1:])  # before torch, whose import takes seconds: --help and mistakes end here

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy, whose products are small here

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from answers.checkpoints import SAMPLERS, SHIPPED, Model, load_checkpoint, newest_checkpoint, set_tidy
from answers.jobs import prepare, tiles_of
from answers.pictures import colours, grid, overlaid, panel, shade, uncertainty
from answers.prompts import boxes_by_id, hint_map
from answers.segment import denoise, sampling_of, summarise
from answers.tree import GRAINS
from engine import (
    Threads,
    ahead,
    complaint,
    host_threads,
    join_processes,
    make_folder,
    pick_device,
    program,
    wait_for_all,
)
from sources.formats import IMAGE_TYPES, READING, in_words, junk, notice, read_image, read_label

fail = complaint("sample.py")
LONG = 4  # times its height, or width: of what the network looks at, more is too much
MARK = "bitseg sample.py"  # in every file written: others are never overwritten


# ------------------------------------------------------------------------------------------------------------
# Files. All or nothing: an image's are made in a folder beside, which takes the old one's place at the end.


def save(picture, path, palette=None):
    """As PNG with our mark: a PIL image, (H, W, 3) uint8, or (H, W) ids, 8 bit with a palette, or 16 bit."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", MARK)
    if palette is not None and picture.mode == "L":
        picture.putpalette(palette.tobytes())
    picture.save(path, "PNG", pnginfo=text, compress_level=1)


def save_ids(labels, side, path):
    """Labels (H, W) from 0, places in a palette of side x side, as a PNG of ids from 1: 8 bit, 16 bit or
    three_bytes."""
    if side * side > 65535:
        return save(three_bytes(labels), path)
    kind = np.uint8 if side * side < 255 else np.uint16
    save(labels.astype(kind) + kind(1), path, np.concatenate([np.zeros((1, 3), np.uint8), colours(side)]))


def three_bytes(labels):
    """Labels (H, W) from 0 -> (H, W, 3) uint8, COCO's panoptic format: label + 1 = R + 256 G + 65536 B."""
    out = np.empty((*labels.shape, 3), np.uint8)
    for row, ids in zip(out, labels):
        ids = ids.astype(np.uint32) + 1
        row[:, 0], row[:, 1], row[:, 2] = ids & 255, ids >> 8 & 255, ids >> 16
    return out


def save_json(path, info, images, annotations, category, **more):
    content = dict(info=info, images=images, annotations=annotations,
                   categories=[dict(id=1, name="segment", supercategory="segment", **category)], **more)
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").replace(path)


def info_of(path):
    """The info in a file that sample.py wrote; less, where only its start is left. Raises ValueError for any
    other file."""
    try:
        if path.stat().st_size == 0:
            return {}
        if path.suffix == ".png":
            with Image.open(path) as picture:
                info = {"software": picture.info.get("Software")}
        else:
            text = path.read_text()
            cut = text.startswith(json.dumps({"info": {"software": MARK}})[:-2]) and not text.endswith("}")
            info = {"software": MARK} if cut else json.loads(text)["info"]
        if info["software"] == MARK:
            return info
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        pass
    raise ValueError(f"{path} was not written by sample.py and is not overwritten: move it, or choose "
                     f"another --out")


# what a results folder holds; a copy by another name is the user's
RESULTS = re.compile(r"(answer|(answer_)?overlay|labels_\d+|overlay_\d+|uncertainty|panel|panoptic)\.png"
                     r"|segments\.(json|part)")


def is_result(path):
    """Whether sample.py wrote a file, which may be cut off or empty now."""
    try:
        info_of(path)
    except ValueError:
        return path.name == "segments.part"
    return RESULTS.fullmatch(path.name) is not None


def done(folder, info):
    """Whether this image is done with these settings. Raises ValueError if the folder holds anything else
    than its results."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link, whose place results cannot take: remove it, or "
                         f"choose another --out")
    swap(folder)
    found = info_of(folder / "segments.json")
    if found.get("digests", {}).get("image") == info["digests"]["image"]:
        found["image"] = info["image"]  # the same photo, named by another path
    if found.get("image", info["image"]) != info["image"]:
        raise ValueError(f"{folder} holds the results of {found['image']}: choose another --out")
    for path in (panoptic_png(folder), *folder.glob("*.png")):
        info_of(path)
    files = found.pop("files", None)  # before, none were listed
    if found.get("format") == "coco_panoptic":  # which has all of coco's
        found["format"] = info["format"]

    def there(name, size):
        path = panoptic_png(folder) if name == "panoptic.png" else folder / name
        return path.exists() and path.stat().st_size == size

    return found == info and bool(files) and all(there(*file) for file in files.items())


def beside(folder):
    """Where the new results of a folder are made, and where the old ones wait for their end."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def swap(folder):
    """Put complete new results in the old ones' place, also after a kill in between. Files of others stay."""
    (new, old), listed = beside(folder), panoptic_png(folder)
    if (new / "segments.json").exists():
        listed.unlink(missing_ok=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    if (folder / "panoptic.png").exists() and is_result(folder / "panoptic.png"):
        listed.parent.mkdir(exist_ok=True)
        os.replace(folder / "panoptic.png", listed)
    if old.exists():
        for path in old.iterdir():
            if not is_result(path):
                os.replace(path, folder / path.name)
        shutil.rmtree(old)


def panoptic_png(folder):
    return folder.parent / "panoptic" / f"{folder.name}.png"


def write(folder, result, info, hints=None, panoptic=False):
    """All files of one image, in place of those of before. Returns a few words about it."""
    n, joint, image = len(result.cells), result.answer, result.image
    digits, (new, _) = max(2, len(str(n - 1))), beside(folder)
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)

    def save_map(labels, side, name, over):
        save_ids(labels.numpy(), side, new / f"{name}.png")
        save(overlaid(image, labels, side), new / f"{over}.png")

    try:
        save(panel(result, hints), new / "panel.png")
        save_map(joint.labels, joint.side, "answer", "answer_overlay")
        for j, labels in enumerate(result.enlarged()):
            save_map(labels, result.side, f"labels_{j:0{digits}}", f"overlay_{j:0{digits}}")
        if rows := uncertainty(result):
            captions = [(name, *ends) for name, _, _, ends in rows]
            tiles = [shade(value / top) for _, value, top, _ in rows]
            save(grid(tiles, len(rows), 6, captions), new / "uncertainty.png")
        if panoptic:
            save(three_bytes(joint.labels.numpy()), new / "panoptic.png")
        sizes = {path.name: path.stat().st_size for path in new.iterdir()}
        about = dict(id=1, file_name=Path(info["image"]).name, width=image.width, height=image.height)
        info = {**info, "n": n, "files": sizes}
        save_json(new / "segments.json", info, [about], joint.segments, {}, borders=joint.borders)
        swap(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    mean = sum(len(cells.unique()) for cells in result.cells) / n
    return (f"{len(joint.segments)} segments; {n} samples, {mean:.1f} on average"
            + (f", ARI {result.agreement.mean():.2f} to each other" if n > 1 else ""))


def write_panoptic(out):
    """out/panoptic.json: every PNG in out/panoptic/ with its segments.json. Several processes may end with
    it."""
    listed, found = None, []
    while listed != found or listed is None:  # again if others came meanwhile
        listed, images, annotations = found, [], []
        contents = [json.loads((out / name / "segments.json").read_text()) for name in found]
        taken = Counter(content["images"][0]["file_name"] for content in contents)
        for i, (name, content) in enumerate(zip(found, contents), 1):
            keys, image = ("id", "category_id", "area", "bbox", "iscrowd"), content["images"][0]
            if taken[image["file_name"]] > 1:  # in several folders
                image = {**image, "file_name": content["info"]["image"]}
            images.append({**image, "id": i})
            annotations.append(dict(image_id=i, file_name=f"{name}.png",
                                    segments_info=[{k: s[k] for k in keys} for s in content["annotations"]]))
        save_json(out / "panoptic.json", dict(software=MARK), images, annotations,
                  dict(isthing=1, color=[0, 114, 178]))
        found = sorted(p.stem for p in (out / "panoptic").glob("*.png")
                       if info_of(out / p.stem / "segments.json").get("image"))


# ------------------------------------------------------------------------------------------------------------
# Command line


def folder_names(files, out):
    """A folder for each file, all different: the stem; else the name, with as many of its parents as it
    takes. A file whose results are in out/stem stays there, when others of that stem come."""
    stems = Counter(p.stem.casefold() for p in files)
    names = {p: p.stem for p in files if stems[p.stem.casefold()] > 1 and p.resolve() == holds(out / p.stem)}
    depth = 0
    while left := [p for p in files if p not in names]:
        parts = {p: p.resolve().parts[-depth:] for p in left}
        name = {p: "_".join(parts[p]).replace(".", "_") if depth else p.stem for p in left}
        name = {p: f"{name[p]}_{files.index(p)}" if depth > len(parts[p]) else name[p] for p in left}
        # a is A on some systems
        taken = [n.casefold() for n in ("panoptic", ".", "..", *names.values(), *name.values())]
        names.update({p: n for p, n in name.items() if taken.count(n.casefold()) == 1})
        depth += 1
    return names


def holds(folder):
    """The image, resolved, whose results a folder holds; None where it holds none."""
    with contextlib.suppress(ValueError, OSError):
        image = info_of(folder / "segments.json").get("image")
        return image and Path(image).resolve()


def find_images(names):
    """Files and folders as a list of image files; what sample.py wrote is none. Raises ValueError where there
    is none at all."""
    files = []
    for name in map(Path, names):
        if not name.is_dir():
            files.append(name)
            continue
        inside = images_in(name)
        within = [d for d in name.iterdir() if d.is_dir() and not junk(d.name) and os.access(d, os.R_OK)]
        if any(images_in(d) for d in within if not (d / "segments.json").exists()):
            notice(name, f"images in folders within it are left out: name these folders, say {name}/*/")
        elif not inside:
            notice(name, "no images in this folder")
        files += inside
    if not files:
        raise ValueError(f"{' '.join(map(str, names))}: no images found")
    return files


def images_in(folder):
    """The image files of a folder itself, sorted, but for sample.py's own."""
    ours = (folder / "segments.json").exists()
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_TYPES and not junk(p.name)
                  and not (ours and is_result(p)))


def read_prompts(a, path):
    """The options hints and init of `prepare` from the command line's, for the image at path."""
    given, (width, height) = {}, read_image(path).size
    if a.hint or a.points or a.box:
        try:
            boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in (map(float, box.split(",")) for box in a.box)]
        except ValueError:
            raise ValueError(f"--box {' '.join(a.box)} is not of the form x0,y0,x1,y1") from None
        drawn = read_label(a.hint) if a.hint else None
        given["hints"] = hint_map(width, height, a.points, boxes, drawn)
        given["boxes"] = boxes_by_id(boxes, drawn)
    if a.init:
        given["init"] = read_label(a.init)
    return given


def grain_of(text):
    """The command line's --grain: a name of tree.GRAINS, or a number of segments. Raises ValueError."""
    if text in GRAINS:
        return text
    if text.isdecimal() and int(text[:9]):  # no image has more segments than that
        return int(text[:9])
    raise ValueError(f"--grain is {', '.join(GRAINS)}, or a number of segments, not '{text}'")


def digest(path):
    """Of a file's contents: another photo, hint or checkpoint under the same name is another task."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise ValueError(f"{path}: no ordinary file")  # reading from a pipe might never end
    try:
        found = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(2**20):
                found.update(block)
        return found.hexdigest()[:16]
    except OSError as e:
        raise ValueError(f"{path}: {(e.strerror or in_words(e)).lower()}") from None


def arguments(argv):
    """The command line -> options, checked one by one. Raises ValueError."""
    a = options(argv)
    if not a.images:
        raise ValueError("no image is named: python sample.py photo.jpg")
    a.grain = grain_of(a.grain)
    tiles_of(a.tiles)
    if a.sampler not in (None, *SAMPLERS):
        raise ValueError(f"--sampler is {' or '.join(SAMPLERS)}, not '{a.sampler}'")
    for name, least, most in (("n", 1, 10**5), ("steps", 1, 10**5), ("batch", 1, 10**5),
                              ("threads", 1, 1024), ("guidance", 0, 10**6), ("smooth", 0, 10**6),
                              ("seed", 0, 2**62)):
        value = getattr(a, name)
        if value is not None and not least <= value <= most:  # nan is not
            raise ValueError(f"--{name} must be at least {least} and at most {most}, not {value}")
    for name in ("hint", "init"):
        if (times := len(getattr(a, name))) > 1:
            raise ValueError(f"--{name} is given {times} times: one label map holds all ids")
        setattr(a, name, "".join(getattr(a, name)))
    if any(not group.strip(" ;") for group in a.points):
        raise ValueError("--points is empty: \"x,y x,y;x,y\", in pixels")
    a.points = ";".join(a.points)
    if not 0 < a.strength <= 1:
        raise ValueError(f"--strength must be above 0 and at most 1, not {a.strength}")
    return a


@dataclass
class Run:
    """One command: what all its images have in common, and how far they are."""

    options: argparse.Namespace
    model: Model
    threads: Threads
    rank: int  # of the processes that share the images; only the first prints
    files: list  # this process's images
    folders: dict  # image: where its results go
    prompts: dict  # hints and init, as `prepare` takes them
    sampling: dict  # of steps, guidance, sampler and smooth what the command line gives
    info: dict  # what every segments.json says
    digests: dict  # of the other files that the answers come from
    panoptic: bool  # whether there will be a panoptic.json
    steps: int  # of a sample
    skipped: int = 0  # images that need no sampling
    begun: int = 0  # images whose sampling has begun
    failed: list = field(default_factory=list)
    reading: deque = field(default_factory=deque)  # (job, image, its pixels, info) of what is being sampled
    bar: tqdm | None = None

    def about(self, path):
        return {**self.info, "image": str(path), "digests": {"image": digest(path), **self.digests}}

    def say(self, text):
        error = isinstance(text, Exception)
        self.failed.extend([text] if error else [])
        tqdm.write(f"sample.py: {text}" if error else text, file=sys.stderr if error else sys.stdout)


def prepare_run(a):
    """The command line's options -> Run. Raises ValueError, OSError, or RuntimeError where kernels that were
    asked for cannot be had."""
    places = {}
    for path in find_images(a.images):
        first = places.setdefault(path.resolve(), path)
        if os.path.abspath(first) != os.path.abspath(path):
            notice(path, f"it is {first} by another name, which has the results")
    files = list(places.values())
    asked = {k: getattr(a, k) for k in ("hint", "points", "box", "init") if getattr(a, k)}
    if asked and len(files) > 1:
        raise ValueError(f"--{next(iter(asked))} is for one image, not for {len(files)}")
    a.device = pick_device(a.device)
    threads = Threads(a.threads or host_threads(a.device))
    ckpt = Path(a.ckpt) if a.ckpt else newest_checkpoint()
    # before it is read: where it changes in between, --resume samples again
    digests = {"checkpoint": digest(ckpt)} if ckpt.is_file() else {}
    model, out, names = load_checkpoint(ckpt, a.device), Path(a.out), folder_names(files, Path(a.out))
    digests |= {"odds": digest(model.odds)} if model.odds.is_file() else {}
    set_tidy(model, a.least, a.merge)
    a.tiles = tiles_of(a.tiles, model)
    for given in filter(None, (a.hint, a.init)):
        if Path(given).resolve().parent == (out / names[files[0]]).resolve():
            raise ValueError(f"{given} lies where this image's results go, and would be overwritten: "
                             f"copy it elsewhere, or choose another --out")
    panoptic = (a.format == "coco_panoptic"
                or (out / "panoptic").is_dir() and (out / "panoptic.json").exists())
    if panoptic:
        info_of(out / "panoptic.json")
    make_folder(out)
    prompts = read_prompts(a, files[0]) if asked else {}
    hinted = prompts.get("hints", np.zeros(1)).any()
    if a.closed and (not hinted or prompts["hints"].max() == prompts["hints"][prompts["hints"] > 0].min()):
        raise ValueError("--closed gives every pixel to a hint: name two or more with --points, --box or "
                         "--hint")
    digests |= {k: digest(getattr(a, k)) for k in ("hint", "init") if getattr(a, k)}
    sampling = {k: v for k in ("steps", "guidance", "sampler", "smooth") if (v := getattr(a, k)) is not None}
    settings = {**sampling_of(model, hinted), **model.tidy, **sampling, "grain": a.grain, **asked,
                **({"strength": a.strength} if a.init else {}), **({"closed": True} if a.closed else {}),
                **({"tiles": a.tiles} if a.tiles != 1 else {})}
    info = dict(software=MARK, reading=READING, checkpoint=str(ckpt), step=model.step, n=a.n, seed=a.seed,
                format=a.format, **settings)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        introduce(a, model, ckpt, settings)
    if world > 1 and "MASTER_ADDR" in os.environ:
        join_processes(rank, world, "gloo", patient=True)
    return Run(a, model, threads, rank, files[rank::world], {path: out / names[path] for path in files},
               prompts, sampling, info, digests, panoptic, sampling.get("steps", model.sampling["steps"]))


def introduce(a, model, ckpt, settings):
    """Print which network samples how."""
    print(f"{ckpt}: trained on {model.dataset}, step {model.step}, {model.image_size} pixels; "
          f"{' '.join(f'{k} {v}' for k, v in settings.items())}; on {a.device}")
    if model.dataset == "shapes":
        print(f"This checkpoint has only seen synthetic shapes: in a photo it finds shapes. For photos: "
              f"--ckpt {SHIPPED.parent.name}/{SHIPPED.name}")
    if ckpt == SHIPPED and not a.ckpt:
        print("These are the weights that come with this repository, as there is no checkpoint of your "
              "own under out/.")


def fault(path, e):
    """Of one image, whatever was raised: a sentence that names it."""
    words = str(e) if type(e) is ValueError else in_words(e)
    return ValueError(words if str(path) in words else f"{path}: {words}")


def load(run, path):
    """One image, ready to be sampled and finished, or what to say instead."""
    try:
        info = run.about(path)
        if done(run.folders[path], info) and run.options.resume:
            return f"{path}: done already"
        image = read_image(path)
        job = prepare(image, run.model, **run.prompts, seed=run.options.seed, tiles=run.options.tiles)
        seen = min(min(part.size) for part in job.tiles or next(iter(job.closer), [job]))
        if seen * LONG < run.model.image_size:
            notice(path, f"its short side is seen at {seen} pixels: cut so long a picture into parts"
                         f"{', or use --tiles 2' * (run.options.tiles == 1)}")
        return job, path, image.width * image.height, info
    except Exception as e:
        return fault(path, e)


def jobs_of(run):
    """The images' jobs, read ahead; what goes wrong is said."""
    for loaded in ahead(functools.partial(load, run), run.files, 3):
        if isinstance(loaded, tuple):
            run.reading.append(loaded)
            run.begun += 1
            yield loaded[0]
        else:
            run.skipped += 1
            run.say(loaded)


def sample_each(run):
    """Yields when run.reading[0] has its samples, with an exception where it has not: of a batch that fails,
    each image is tried alone, so that what is wrong with one is not the others' end."""
    a = run.options

    def progress(i, t, xt, x_hat):
        job, path, *_ = run.reading[0]
        lacks = [len(other.lacks(a.n)) for other, *_ in run.reading]
        unread = len(run.files) - run.skipped - run.begun  # as many samples as the present one's, it seems
        each = sum(len(part.x_hat) for part in (job, *(job.tiles or []))) + lacks[0]
        left = (sum(lacks) + unread * each) * run.steps - i * len(xt)
        if run.bar is None:
            run.bar = tqdm(total=left, unit="step", mininterval=0.5, disable=run.rank > 0, leave=False)
        run.bar.total = run.bar.n + left
        run.bar.set_postfix_str(f"{path.name}: sample {each - lacks[0] + 1} of {each}", refresh=False)
        run.bar.update(len(xt))
        if words := run.threads():
            run.say(words)

    def samples_of(jobs):
        return denoise(jobs, run.model, a.n, a.batch, a.strength, progress, **run.sampling)

    jobs = jobs_of(run)
    while True:
        try:
            for _ in samples_of(jobs):
                yield None
            return
        except Exception:
            failed = len(run.reading)
        for _ in range(failed):
            job, path, *_ = run.reading[0]
            job.clear()
            try:
                next(samples_of([job]))
                yield None
            except Exception as e:
                yield fault(path, e)


ONE_LARGE = threading.Lock()  # of photos above 20 megapixels one is finished at a time


def finish(run, job, path, pixels, info):
    """Write the results of one image. Returns what to say of it."""
    a, folder = run.options, run.folders[path]
    try:
        with ONE_LARGE if pixels > 2e7 else nullcontext():
            # read again: several do not fit into memory
            result = summarise(job, read_image(path), run.model, a.grain, a.closed)
            info = {**info, **({"unfinished": True} if job.lacks(a.n) else {})}  # --resume samples it again
            words = write(folder, result, info, job.hints, a.format == "coco_panoptic")
        return f"{path} -> {folder / 'panel.png'} ({words})"
    except OSError as e:
        return ValueError(f"{path}: nothing is written to {folder} ({in_words(e)}): what was there stays")
    except Exception as e:
        return fault(path, e)


def sample_all(run):
    """Read, sample and write all images, which overlap. Returns the KeyboardInterrupt that ended it, or
    None."""
    stopped, writing = None, deque()
    with ThreadPoolExecutor(2) as writers:
        try:
            for error in sample_each(run):
                job, *about = run.reading.popleft()
                if error:
                    run.say(error)
                if job.x_hat:  # all samples, or what there is
                    writing.append(writers.submit(finish, run, job, *about))
                while len(writing) > 4:
                    run.say(writing.popleft().result())
            if run.bar is not None:
                run.bar.set_postfix_str("writing")
        except KeyboardInterrupt as e:
            stopped = e
            tqdm.write("sample.py: stopping: what is sampled is written", file=sys.stderr)
            writing.extend(writers.submit(finish, run, job, *about) for job, *about in run.reading
                           if job.x_hat)
        for written in writing:
            run.say(written.result())
    if run.bar is not None:
        run.bar.close()
    return stopped


@program("sample.py", "the same command with --resume goes on")
def main(argv=None):
    try:
        run = prepare_run(arguments(list(sys.argv[1:] if argv is None else argv)))
    except (ValueError, OSError, RuntimeError) as e:
        fail(e)
    stopped = sample_all(run)
    # torchrun ends all processes as soon as one has failed
    if wait_for_all() and run.panoptic:
        out = Path(run.options.out)
        try:
            write_panoptic(out)
        except (OSError, ValueError, KeyError, TypeError) as e:
            run.say(ValueError(f"{out / 'panoptic.json'} is not written ({in_words(e)})"))
    wait_for_all()  # for panoptic.json, too
    if stopped:
        raise stopped
    if run.failed and len(run.files) > 1:
        print(f"sample.py: {len(run.failed)} of {len(run.files)} images failed", file=sys.stderr)
    return 2 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
