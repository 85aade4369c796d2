"""The process of a function that judges: a line of JSON in, a line of JSON out.

Run by its path, with nothing of ours imported: the function's process is the function's.

    python function_child.py module:function MEMORY_BYTES SECONDS
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRACE_S = 2.0
"""The process ends by itself so much later than its parent would end it: should that be gone."""


def _load(place: str) -> Callable[[dict[str, Any]], Any]:
    module, _, name = place.rpartition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("judge_function", module)
        if spec is None or spec.loader is None or not Path(module).is_file():
            raise FileNotFoundError(f"no file {module}")
        found = importlib.util.module_from_spec(spec)
        sys.modules["judge_function"] = found
        spec.loader.exec_module(found)
    else:
        # At the end: what is installed is not hidden by what lies about.
        sys.path.append(os.getcwd())
        found = importlib.import_module(module)
    function: Callable[[dict[str, Any]], Any] = getattr(found, name)
    if not callable(function):
        raise TypeError(f"{place} is no function")
    return function


def _digest(function: Callable[..., Any]) -> str | None:
    """SHA-256 of the file that the function stands in."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # compiled
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _answer(function: Callable[[dict[str, Any]], Any], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        given = function(asked)
        if given is None:
            return {"failed": "none"}
        return {"score": float(given)}
    except MemoryError as error:
        return {"failed": "memory", "said": _said(error)}
    except BaseException as error:  # a function may raise what it likes, SystemExit too
        return {"failed": "raised", "said": _said(error)}


def main() -> None:
    """Load the function, say so, and answer until there is nothing more to read."""
    place, memory, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # Whatever the function reads or prints is not what we read and write.
    told, tell = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What is asked for, not what is mapped: files and libraries are not counted.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    def say(answer: dict[str, Any]) -> None:
        tell.write(json.dumps(answer).encode() + b"\n")
        tell.flush()

    try:
        function = _load(place)
        say({"ready": True, "digest": _digest(function)})
    except BaseException as error:  # likewise
        say({"ready": False, "said": _said(error)})
        return
    with open(os.devnull, "w") as trace:
        for line in told:
            faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=trace)
            answer = _answer(function, json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            say(answer)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
