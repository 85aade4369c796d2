"""Folders that appear complete or not at all, even if the process is killed.

A folder is filled under a hidden temporary name, flushed to disk and renamed. An existing one under the
final name is first renamed to a hidden name; if the process is killed between the two renames, `sweep`,
which runs at every start, renames it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from store_schema.disk.location import sync
from store_schema.disk.storage_errors import storage_errors


@contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Raise StorageError for disk errors, also for those of safetensors, which hides the errno."""
    with storage_errors(str(where)):
        try:
            yield
        except SafetensorError as error:
            full = "os error 28" in str(error) or "No space" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def publish_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Fill a folder under a temporary name and rename it to `final`, replacing what is there.

    Args:
        final: Path of the folder.
        write: Fills the folder that it is called with.

    Raises:
        StorageError: A file cannot be written; `final` is as it was.
    """
    temporary = _aside(final, "tmp")
    with write_errors(final):
        try:
            temporary.mkdir(parents=True)
            with _claimed(temporary):
                write(temporary)
                _flush(temporary)
                if final.exists():
                    old = _aside(final, "old")
                    final.rename(old)
                    temporary.rename(final)
                    shutil.rmtree(old)
                else:
                    temporary.rename(final)
            sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def trial_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that is deleted at the end, or by `sweep` after a kill.

    Raises:
        StorageError: A file cannot be written.
    """
    temporary = _aside(final, "tmp")
    with write_errors(final):
        try:
            temporary.mkdir(parents=True)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Remove a folder; a kill midway leaves nothing under its name."""
    doomed = _aside(folder, "tmp")
    with storage_errors(str(folder)):
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Restore folders that a killed process had renamed, and delete what it left incomplete."""
    if not folder.is_dir():
        return
    with storage_errors(str(folder)):
        for path in folder.glob(".*.old"):
            final = folder / path.name[1:].rsplit(".", 2)[0]
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)
        for path in folder.glob(".*.tmp"):
            if path.is_dir():  # a file is one that `write_atomic` was killed at
                shutil.rmtree(path)


def sweep_beside(final: Path) -> None:
    """`sweep` for one folder alone, where other programs may use the parent: touches only what a killed
    `publish_folder` left, and nothing that another process is filling now.

    Raises:
        StorageError: A file cannot be written.
    """
    if not final.parent.is_dir():
        return
    left = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{32}}\.(tmp|old)")
    with storage_errors(str(final.parent)):
        for path in [path for path in final.parent.iterdir() if left.fullmatch(path.name)]:
            if path.suffix == ".old" and not final.exists():
                path.rename(final)
                continue
            try:
                with _claimed(path) as free:
                    if free:
                        shutil.rmtree(path)
            except FileNotFoundError:  # it was published meanwhile
                continue


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Lock the folder for the block; False if another process holds it. Always True on a file system
    without locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        yield free
    finally:
        os.close(descriptor)


def _aside(final: Path, ending: str) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.{ending}")


def _flush(folder: Path) -> None:
    """Flush files and their names to disk before the rename."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
