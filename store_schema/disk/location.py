"""Storage: a local folder or an object-store URL, with the same methods.

Keys are relative, '/'-separated. Every file that other processes look for is written by `write_atomic`:
on disk a temporary file, fsync and rename; in an object store one put, which is atomic. Such files
are looked up by key (`exists`, `read_many`), never by a listing, which in an object store may be out of
date. Credentials come from the environment, never from a config or URL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from store_schema.disk.remote_location import RemoteLocation
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, MissingError

_SYNC_THREADS = 16


class Location(Protocol):
    """A folder or a prefix of an object store. All keys are relative to it."""

    @property
    def url(self) -> str: ...

    @property
    def path(self) -> Path | None:
        """The folder on disk; None for an object store."""
        ...

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        """The file, or its first `limit` bytes (a file that is not trusted may have any size)."""
        ...

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Contents, by key, of those of `keys` that exist; uses no listing.

        Raises:
            StorageError: A file could not be read, for another reason than that it does not exist.
        """
        ...

    def write_atomic(self, key: str, data: bytes) -> None: ...

    def write_files(self, key: str, files: Mapping[str, bytes]) -> None:
        """Write new files below `key`, by name; afterwards they would survive a power cut. Not atomic:
        for files that count only once a later record names them.

        Raises:
            StorageError: One could not be written; others may have been, and none still is.
        """
        ...

    def open_write(self, key: str) -> BinaryIO:
        """A file to stream into. Not atomic: for files that count only once a later record names
        them."""
        ...

    def replace(self, key: str, final: str) -> None:
        """Rename a file in one step; replaces a file of the final name."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is a file of this key (False for a folder)."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names directly under `prefix`, sorted; [] where there are none.

        An object store may list new files late, so no stage relies on it; it is for reports.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a file or a folder with all its files; does nothing where there is none."""
        ...

    def make_durable(self, key: str) -> None:
        """Wait until all files below `key`, and the folders above it, would survive a power cut."""
        ...

    def open_read(self, key: str) -> BinaryIO:
        """The file, opened for reading and seeking."""
        ...

    def child(self, key: str) -> Location: ...


@dataclass(frozen=True, slots=True)
class LocalLocation:
    """A folder on a POSIX file system."""

    url: str

    @property
    def path(self) -> Path:
        return Path(self.url)

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        with storage_errors(str(self.path / key)):
            with (self.path / key).open("rb") as file:
                return file.read(limit)

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        contents = {}
        for key in keys:
            with contextlib.suppress(MissingError):
                contents[key] = self.read_bytes(key)
        return contents

    def write_atomic(self, key: str, data: bytes) -> None:
        final = self.path / key
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        with storage_errors(str(final), writing=True):
            _make_folders(final.parent)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(final)
                self._sync_folders(final.parent)  # makes the rename durable
            finally:
                temporary.unlink(missing_ok=True)

    def write_files(self, key: str, files: Mapping[str, bytes]) -> None:
        top = self.path / key
        places = {top / name: data for name, data in files.items()}
        folders = {
            folder
            for place in places
            for folder in place.parents
            if folder == top or top in folder.parents
        }
        with storage_errors(str(top), writing=True):
            for folder in sorted(folders):
                folder.mkdir(parents=True, exist_ok=True)
            # In parallel, so that the file system writes its journal once for many files.
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                for done in [pool.submit(_write_synced, *item) for item in places.items()]:
                    done.result()
                for _ in pool.map(sync, folders):
                    pass
            self._sync_folders(top.parent)

    def open_write(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key), writing=True):
            _make_folders((self.path / key).parent)
            return (self.path / key).open("wb")

    def replace(self, key: str, final: str) -> None:
        with storage_errors(str(self.path / final), writing=True):
            (self.path / key).replace(self.path / final)
            self._sync_folders((self.path / final).parent)

    def exists(self, key: str) -> bool:
        with storage_errors(str(self.path / key)):
            return (self.path / key).is_file()

    def names(self, prefix: str) -> list[str]:
        folder = self.path / prefix
        with storage_errors(str(folder)):
            if not folder.is_dir():
                return []
            return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))

    def delete(self, key: str) -> None:
        path = self.path / key
        with storage_errors(str(path)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def make_durable(self, key: str) -> None:
        top = self.path / key
        with storage_errors(str(top)):
            # In parallel, so that the file system writes its journal once for many files.
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                for _ in pool.map(sync, [*top.rglob("*"), top]):
                    pass
            self._sync_folders(top.parent)

    def _sync_folders(self, folder: Path) -> None:
        """Make `folder` and the folders above it durable, up to that of the location.

        All of them each time: another worker may have made one without having synced it yet.
        """
        for path in (folder, *folder.parents):
            sync(path)
            if path == self.path.parent or self.path.parent not in path.parents:
                return

    def open_read(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key)):
            return (self.path / key).open("rb")

    def child(self, key: str) -> Location:
        return LocalLocation(str(self.path / key))


def _make_folders(folder: Path) -> None:
    """Make a folder and its missing parents, and sync each new one's entry in its parent."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    with storage_errors(str(path), writing=True), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_location(url: str | Path) -> Location:
    """A Location for a path or URL ('file://' is a path).

    Raises:
        ConfigError: The URL is empty or has credentials in it.
    """
    text = str(url)
    if not text:
        raise ConfigError("a path or URL is empty", where="storage", hint="give a folder or URL")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalLocation(text)
    scheme, place = text.split("://", 1)
    user, at, _ = place.partition("/")[0].rpartition("@")
    if at and (":" in user or scheme in ("s3", "s3a")):
        raise ConfigError(
            "credentials in a storage URL",
            where=f"{scheme}://***@{place.removeprefix(user + at)}",
            hint="give them in the environment (AWS_ACCESS_KEY_ID and so on, or a profile)",
        )
    return RemoteLocation(text.rstrip("/"))
