"""The process that runs the function of judge python: a line of JSON in, a line of JSON out.

It is run by its path and imports nothing of this project, so the function has the process to itself.

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
"""The process ends by itself so much later than its parent would end it, in case that has died."""


def _load(place: str) -> Callable[[dict[str, Any]], Any]:
    module, _, name = place.rpartition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("judge_function", module)
        if spec is None or spec.loader is None or not Path(module).is_file():
            raise FileNotFoundError(f"no file {module}")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules["judge_function"] = loaded
        spec.loader.exec_module(loaded)
    else:
        # At the end, so that files in this folder do not hide installed packages.
        sys.path.append(os.getcwd())
        loaded = importlib.import_module(module)
    function: Callable[[dict[str, Any]], Any] = getattr(loaded, name)
    if not callable(function):
        raise TypeError(f"{place} is not a function")
    return function


def _digest(function: Callable[..., Any]) -> str | None:
    """SHA-256 of the file that has the function; None for a compiled one."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # compiled
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _answer(function: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        score = function(arguments)
        if score is None:
            return {"failed": "none"}
        return {"score": float(score)}
    except MemoryError as error:
        return {"failed": "memory", "error": _message(error)}
    except BaseException as error:  # the function may raise anything, SystemExit too
        return {"failed": "raised", "error": _message(error)}


def main() -> None:
    """Load the function, report that it is ready, and score until the input ends."""
    place, memory, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # The function itself gets no standard input and output.
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Allocated memory only: mapped files and libraries are not counted.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        function = _load(place)
        reply({"ready": True, "digest": _digest(function)})
    except BaseException as error:  # a module may raise anything too
        reply({"ready": False, "error": _message(error)})
        return
    with open(os.devnull, "w") as trace:
        for line in requests:
            faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=trace)
            answer = _answer(function, json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            reply(answer)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
