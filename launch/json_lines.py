"""Logs with one JSON object per line. The last line may be cut by a kill; any process may read."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line in one write, so that lines of two processes never mix.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, default=_plain).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # a kill cut the line before: do not append to it
        os.write(file, data)
    finally:
        os.close(file)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a log, oldest first, and the numbers (from 1) of lines that are cut.

    Raises:
        OSError: The file cannot be read.
    """
    objects, cut = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if line.strip():
                cut.append(number)
    return objects, cut


def json_text(content: object) -> str:
    """JSON on one line, in ASCII: control characters of quoted text cannot reach a terminal.

    Times are ISO 8601 to the second; numpy's numbers and arrays become numbers and lists, all else
    text. A number that is not finite becomes null, since JSON has no form for it.
    """
    text = json.dumps(content, default=_plain)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text


def _plain(value: object) -> object:
    """What JSON has no form for: see `json_text`."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else str(value)
