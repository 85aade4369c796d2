"""Where things are kept: a local folder or an object-store URL, behind the same few calls.

Keys are relative, '/'-separated. `write_atomic` is the only way a file that others look for comes
into being: on disk a temporary file, fsync and rename; in an object store one put, which is atomic
there. Credentials come from the environment through fsspec, never from a config.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from store_schema.errors import ConfigError, MissingError, StorageError

_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "google"}
"""Object-store clients whose errors are not OSErrors."""


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what disks and object stores raise into a StorageError that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError("file not found", where=where, hint="run the stage before") from error
    except OSError as error:
        hint = "free space and rerun: only the shard in hand is lost"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            hint = "check the path and its permissions, then rerun"
        raise StorageError(
            "storage refused", where=where, got=error.strerror or str(error), hint=hint
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENT_LIBRARIES:
            raise
        raise StorageError(
            "object store refused",
            where=where,
            got=f"{type(error).__name__}: {error}",
            hint="check its address and the credentials in the environment, then rerun",
        ) from error


class Location(Protocol):
    """A folder-like place. All keys are relative to it."""

    @property
    def url(self) -> str: ...

    def read_bytes(self, key: str) -> bytes: ...

    def write_atomic(self, key: str, data: bytes) -> None: ...

    def open_write(self, key: str) -> BinaryIO:
        """A file to stream into. Not atomic: for files that a later record makes valid."""
        ...

    def exists(self, key: str) -> bool: ...

    def names(self, prefix: str) -> list[str]:
        """Names directly under `prefix`, sorted; [] when there is none."""
        ...

    def delete(self, key: str) -> None:
        """Remove a file or a whole folder; nothing happens when it is not there."""
        ...

    def make_durable(self, key: str) -> None:
        """Return when all below `key` would survive a power cut."""
        ...

    def open_read(self, key: str) -> BinaryIO:
        """The file opened for reading in any order."""
        ...

    def child(self, key: str) -> Location: ...

    def zarr_store(self, key: str, *, read_only: bool) -> Store: ...


@dataclass(frozen=True, slots=True)
class LocalLocation:
    """A folder on a POSIX file system."""

    url: str

    @property
    def path(self) -> Path:
        return Path(self.url)

    def read_bytes(self, key: str) -> bytes:
        with storage_errors(str(self.path / key)):
            return (self.path / key).read_bytes()

    def write_atomic(self, key: str, data: bytes) -> None:
        final = self.path / key
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        with storage_errors(str(final)):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(final)
                _sync(final.parent)  # the rename itself
            finally:
                temporary.unlink(missing_ok=True)

    def open_write(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key)):
            (self.path / key).parent.mkdir(parents=True, exist_ok=True)
            return (self.path / key).open("wb")

    def exists(self, key: str) -> bool:
        return (self.path / key).exists()

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
            for path in [*top.rglob("*"), top, top.parent]:
                _sync(path)

    def open_read(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key)):
            return (self.path / key).open("rb")

    def child(self, key: str) -> Location:
        return LocalLocation(str(self.path / key))

    def zarr_store(self, key: str, *, read_only: bool) -> Store:
        return LocalStore(self.path / key, read_only=read_only)


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class RemoteLocation:
    """An fsspec URL such as s3://bucket/prefix. One put is atomic; there are no renames."""

    url: str

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "no driver for the storage URL",
                where=self.url,
                got=str(error),
                hint="install its fsspec package (s3fs for s3://)",
            ) from error
        return filesystem, path.rstrip("/")

    def read_bytes(self, key: str) -> bytes:
        filesystem, root = self._filesystem()
        with storage_errors(f"{self.url}/{key}"):
            return bytes(filesystem.cat_file(f"{root}/{key}"))

    def write_atomic(self, key: str, data: bytes) -> None:
        filesystem, root = self._filesystem()
        with storage_errors(f"{self.url}/{key}"):
            filesystem.pipe_file(f"{root}/{key}", data)

    def open_write(self, key: str) -> BinaryIO:
        filesystem, root = self._filesystem()
        with storage_errors(f"{self.url}/{key}"):
            return cast(BinaryIO, filesystem.open(f"{root}/{key}", "wb"))

    def exists(self, key: str) -> bool:
        filesystem, root = self._filesystem()
        filesystem.invalidate_cache()
        with storage_errors(f"{self.url}/{key}"):
            return bool(filesystem.exists(f"{root}/{key}"))

    def names(self, prefix: str) -> list[str]:
        filesystem, root = self._filesystem()
        filesystem.invalidate_cache()
        with storage_errors(f"{self.url}/{prefix}"):
            try:
                names = filesystem.ls(f"{root}/{prefix}", detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in names)

    def delete(self, key: str) -> None:
        filesystem, root = self._filesystem()
        with storage_errors(f"{self.url}/{key}"):
            if filesystem.exists(f"{root}/{key}"):
                filesystem.rm(f"{root}/{key}", recursive=True)

    def make_durable(self, key: str) -> None:
        """A put that was answered is durable."""

    def open_read(self, key: str) -> BinaryIO:
        filesystem, root = self._filesystem()
        with storage_errors(f"{self.url}/{key}"):
            return cast(BinaryIO, filesystem.open(f"{root}/{key}", "rb"))

    def child(self, key: str) -> Location:
        return RemoteLocation(f"{self.url.rstrip('/')}/{key}")

    def zarr_store(self, key: str, *, read_only: bool) -> Store:
        return FsspecStore.from_url(f"{self.url.rstrip('/')}/{key}", read_only=read_only)


def open_location(url: str | Path) -> Location:
    """A Location for a path or URL ('file://' is a path)."""
    text = str(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        return RemoteLocation(text.rstrip("/"))
    return LocalLocation(text)
