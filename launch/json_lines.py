"""Logs of one JSON object a line, which a kill may cut and several processes may read meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line in one write, so that lines of two processes never mix.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, default=_plain).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # a kill cut the line before: let it spoil itself alone
        os.write(file, data)
    finally:
        os.close(file)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a log, oldest first, and the numbers (from 1) of lines that are cut.

    Raises:
        OSError: The file cannot be read.
    """
    found, cut = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if line.strip():
                cut.append(number)
    return found, cut


def _plain(value: object) -> object:
    """numpy's numbers as numbers, all else as text: a log takes whatever it is given."""
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else str(value)
