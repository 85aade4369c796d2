"""How the functions that run at every position are compiled, and where their machine code is kept.

Numba keeps machine code beside a function and renews it when that function's own file changes. Code
of a function that it calls is part of it, though, so a change in one file could leave stale code in
another's. Here the place is named by a digest of all files of the rooms concerned, sub-folders too: a
change anywhere starts again.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import config, njit

_NAME = "compiled-"


def compiled(function: Callable[..., Any]) -> Any:
    """Compile without Python objects, at the first call; other threads run meanwhile."""
    return _compile(function)


def bare(function: Callable[..., Any]) -> Any:
    """The same for functions that allocate nothing and give arrays to nobody who keeps them.

    Without Numba's own runtime they count no references, which otherwise takes a third of the time of
    a call with many arrays: each is an atomic operation. Whoever calls them holds the arrays.
    """
    return _compile(function, _nrt=False)


def compiled_fast(function: Callable[..., Any]) -> Any:
    """The same as `compiled`, where sums may be taken in another order."""
    return _compile(function, fastmath={"reassoc", "contract"})


def _compile(function: Callable[..., Any], **flags: Any) -> Any:
    folder = _cache_folder(_room_of(Path(inspect.getfile(function)).parent))
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder or before)
    try:
        return njit(cache=folder is not None, nogil=True, **flags)(function)
    finally:
        config.CACHE_DIR = before


def _room_of(folder: Path) -> Path:
    """The top package that a folder belongs to; the folder itself where it is none."""
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


def _sources(room: Path) -> list[Path]:
    """Files of a room; of a folder that is no package, those directly in it."""
    is_package = (room / "__init__.py").exists()
    return sorted(room.rglob("*.py") if is_package else room.glob("*.py"))


@cache
def _cache_folder(room: Path) -> Path | None:
    """Where machine code of a room's functions lies; None where nothing can be written."""
    digest = hashlib.sha256()
    for folder in sorted({room, Path(__file__).parent}):
        for path in _sources(folder):
            digest.update(path.read_bytes())
    name = _NAME + digest.hexdigest()[:16]
    for parent in (room / "__pycache__", Path.home() / ".cache" / "logitfuse" / room.name):
        try:
            (parent / name).mkdir(parents=True, exist_ok=True)
            (parent / name / "writable").touch()
        except OSError:
            continue
        for other in parent.glob(f"{_NAME}*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)
        return parent / name
    return None
