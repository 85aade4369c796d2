"""Pointers of git-lfs: a few lines of text that stand where a file's content was never fetched.

Whatever the file is called, its readers raise over a pointer what their formats raise over noise, or
take it for text; looking at the first bytes says what is wrong.
"""

from __future__ import annotations

from pathlib import Path

from store_schema.errors import ModelError

POINTER_HEAD = b"version https://git-lfs.github.com/spec/"
"""What a pointer begins with, and no model file or packed file does."""

FETCH = "fetch the whole folder again (with git: `git lfs pull`)"
"""What to do about a model folder that has one."""


def is_pointer(path: Path) -> bool:
    """Whether a file is only a pointer.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(POINTER_HEAD)) == POINTER_HEAD


def require_no_pointer(path: Path) -> None:
    """Refuse a file of a model that is only a pointer to its content.

    Raises:
        ModelError: It is one, or cannot be read.
    """
    try:
        found = is_pointer(path)
    except OSError as error:
        raise ModelError("file cannot be read", where=path, got=error.strerror) from error
    if found:
        raise ModelError(
            "file is a pointer of git-lfs, its content was not fetched", where=path, hint=FETCH
        )
