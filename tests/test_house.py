"""The house: which rooms there are, which enters which, and that nobody walks in a circle.

A room is a top-level file, or one of the folders sources/, answers/ and kernels/ as a whole. An arrow leads
from a room to one that it imports, imports inside functions included. A room's floor is one above the highest
room that it enters.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*.py"), *(p for folder in ("sources", "answers", "kernels")
                               for p in ROOT.glob(f"{folder}/*.py"))]


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path):
    """The full names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def arrows_of(files):
    """{room: the rooms that it enters}."""
    rooms = {room(path) for path in files}
    arrows = {name: set() for name in rooms}
    for path in files:
        arrows[room(path)] |= {name.split(".")[0] for name in imports(path)} & rooms - {room(path)}
    return arrows


def floors_of(arrows):
    """{room: its floor, from 1}. Raises ValueError where rooms enter each other in a circle."""
    floors = {}
    while len(floors) < len(arrows):
        ready = [name for name in arrows if name not in floors and arrows[name] <= floors.keys()]
        if not ready:
            raise ValueError(f"a circle among {', '.join(sorted(arrows.keys() - floors.keys()))}")
        floors |= {name: 1 + max((floors[other] for other in arrows[name]), default=0) for name in ready}
    return floors


def test_rooms_floors_and_arrows():
    arrows = arrows_of(FILES)
    floors = floors_of(arrows)
    count = sum(map(len, arrows.values()))
    longest = max((len(line), f"{path.relative_to(ROOT)}:{n}") for path in FILES
                  for n, line in enumerate(path.read_text().splitlines(), 1))
    print(f"\n{len(floors)} rooms, {max(floors.values())} floors, {count} arrows, "
          f"longest line {longest[0]} ({longest[1]})")
    for name in sorted(floors, key=lambda name: (floors[name], name)):
        print(f"  {floors[name]} {name:<12} -> {', '.join(sorted(arrows[name])) or '-'}")
    assert len(floors) <= 16 and max(floors.values()) <= 6 and count <= 45
    assert longest[0] <= 110


def test_what_has_to_stay_short():
    for name, most in (("README.md", 200), ("page.py", 250), ("page.html", 400)):
        assert len((ROOT / name).read_text().splitlines()) <= most, name


def test_a_circle_is_found():
    try:
        floors_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    except ValueError as e:
        assert str(e) == "a circle among a, b, c"
    else:
        raise AssertionError("no circle was found")


def test_who_may_enter_which_room():
    for path in FILES:
        name, entered = room(path), {other for other in imports(path) if other.startswith("sources.")}
        if name not in ("data", "sources"):  # all others may read files, and no more
            assert all(other.startswith("sources.formats") for other in entered), path
        if name in ("engine", "frame", "data", "sources", "kernels"):
            assert not any(other.split(".")[0] == "answers" for other in imports(path)), path


def test_segmenting_loads_no_downloader_and_no_painter():
    code = ("import sys; import answers.segment; "
            "print(*(getattr(m, '__file__', '') for m in sys.modules.values()), sep='\\n')")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout
    loaded = [path for path in FILES if str(path) in out.splitlines()]
    assert ROOT / "answers" / "segment.py" in loaded
    assert not {room(path) for path in loaded} & {"sources", "data", "train", "eval", "sample"}
    # torch itself has it
    assert not any(name.split(".")[0] == "urllib" for path in loaded for name in imports(path))
