"""Pointers of git-lfs: a few lines of text in place of a file whose content was never fetched.

Readers of model files raise misleading errors for them, or read them as text; so they are detected by
their first bytes.
"""

from __future__ import annotations

from pathlib import Path

from store_schema.errors import ModelError

POINTER_HEAD = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a pointer, which no model file or archive has."""

FETCH = "fetch the whole folder again (with git: `git lfs pull`)"
"""Hint of messages on a model folder that has a pointer."""


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
        pointer = is_pointer(path)
    except OSError as error:
        raise ModelError("file cannot be read", where=path, got=error.strerror) from error
    if pointer:
        raise ModelError(
            "file is a pointer of git-lfs, its content was not fetched", where=path, hint=FETCH
        )
