"""Where things are kept: a local folder or an object-store URL, behind the same few calls.

Keys are relative, '/'-separated. `write_atomic` is the only way a file that others look for comes
into being: on disk a temporary file, fsync and rename; in an object store one put, which is atomic
there. What must be found is found by its key (`exists`, `read_many`), never by a listing, which an
object store may give late. Credentials come from the environment, never from a config or URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from store_schema.disk import remote
from store_schema.errors import ConfigError, MissingError, StorageError

_CLIENT_LIBRARIES = {
    "botocore",
    "aiobotocore",
    "aiohttp",
    "s3fs",
    "gcsfs",
    "adlfs",
    "google",
    "http",
}
"""Object-store clients whose errors are not OSErrors."""

_KEYS_AT_ONCE = 1024
"""Keys of one round of `read_many`: bounds memory and what a deadline spans."""
_SYNC_THREADS = 16


@contextmanager
def storage_errors(where: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what disks and object stores raise into a StorageError that names the place.

    Args:
        where: File or folder, for the message.
        writing: Whether a thing not found is the bucket or folder that was to be written to.
    """
    remotely = "://" in where
    try:
        yield
    except FileNotFoundError as error:
        if writing:
            hint = "make the bucket first" if remotely else "check the path, then rerun"
            raise StorageError("no such place", where=where, got=error, hint=hint) from error
        raise MissingError("file not found", where=where, hint="run the stage before") from error
    except OSError as error:
        hint = "check the path and its permissions, then rerun"
        if remotely:
            hint = "check its address and the credentials in the environment, then rerun"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free space and rerun: what was published stands"
        got = error.strerror or str(error) or type(error).__name__
        raise StorageError("storage refused", where=where, got=got, hint=hint) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENT_LIBRARIES:
            raise
        raise StorageError(
            "object store refused",
            where=where,
            got=f"{type(error).__name__}: {error}",
            hint="check its address and the credentials in the environment, then rerun",
        ) from error


class NamedStore(WrapperStore[Store]):
    """A Zarr store whose faults are StorageErrors, so that none is ever taken for damage."""

    def __init__(self, store: Store, where: str, deadline_s: float | None = None) -> None:
        super().__init__(store)
        self._where = where
        self._deadline_s = deadline_s

    def _with_store(self, store: Store) -> NamedStore:
        return NamedStore(store, self._where, self._deadline_s)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        with storage_errors(f"{self._where}/{key}"):
            async with asyncio.timeout(self._deadline_s):
                return await self._store.get(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        with storage_errors(f"{self._where}/{key}", writing=True):
            async with asyncio.timeout(self._deadline_s):
                await self._store.set(key, value)

    async def exists(self, key: str) -> bool:
        with storage_errors(f"{self._where}/{key}"):
            async with asyncio.timeout(self._deadline_s):
                return await self._store.exists(key)


class Location(Protocol):
    """A folder-like place. All keys are relative to it."""

    @property
    def url(self) -> str: ...

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        """The file, or its first `limit` bytes: what a stranger made may be of any size."""
        ...

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The files that are there among `keys`; relies on no listing.

        Raises:
            StorageError: One could not be read; that is not taken for "not there".
        """
        ...

    def write_atomic(self, key: str, data: bytes) -> None: ...

    def open_write(self, key: str) -> BinaryIO:
        """A file to stream into. Not atomic: for files that a later record makes valid."""
        ...

    def replace(self, key: str, final: str) -> None:
        """Give a whole file another name in one step, in place of what had it."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the file is there; a folder is none."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names directly under `prefix`, sorted; [] when there is none.

        For people's tools: an object store may list a new file late.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a file or a whole folder; nothing happens when it is not there."""
        ...

    def make_durable(self, key: str) -> None:
        """Return when all below `key`, and the way to it, would survive a power cut."""
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

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        with storage_errors(str(self.path / key)):
            with (self.path / key).open("rb") as file:
                return file.read(limit)

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for key in keys:
            with contextlib.suppress(MissingError):
                found[key] = self.read_bytes(key)
        return found

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
                self._sync_way(final.parent)  # the rename itself
            finally:
                temporary.unlink(missing_ok=True)

    def open_write(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key), writing=True):
            _make_folders((self.path / key).parent)
            return (self.path / key).open("wb")

    def replace(self, key: str, final: str) -> None:
        with storage_errors(str(self.path / final), writing=True):
            (self.path / key).replace(self.path / final)
            self._sync_way((self.path / final).parent)

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
            # Side by side: the file system writes its journal once for many of them.
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                for _ in pool.map(_sync, [*top.rglob("*"), top]):
                    pass
            self._sync_way(top.parent)

    def _sync_way(self, folder: Path) -> None:
        """Make `folder` and the entries that lead to it durable, up to the location's own.

        All of them each time: another worker may have made one and not have come to syncing it.
        """
        for path in (folder, *folder.parents):
            _sync(path)
            if path == self.path.parent or self.path.parent not in path.parents:
                return

    def open_read(self, key: str) -> BinaryIO:
        with storage_errors(str(self.path / key)):
            return (self.path / key).open("rb")

    def child(self, key: str) -> Location:
        return LocalLocation(str(self.path / key))

    def zarr_store(self, key: str, *, read_only: bool) -> Store:
        return NamedStore(LocalStore(self.path / key, read_only=read_only), str(self.path / key))


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, each with a durable entry in the one that holds it."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


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

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        filesystem, root = remote.open_filesystem(self.url)
        part = {} if limit is None else {"start": 0, "end": limit}
        with storage_errors(f"{self.url}/{key}"):
            try:
                return bytes(remote.call(filesystem, "cat_file", f"{root}/{key}", **part))
            except OSError as error:
                if part and "not satisfiable" in str(error):
                    return b""  # S3's word for a range of an empty file
                raise

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        filesystem, root = remote.open_filesystem(self.url)
        found = {}
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = keys[start : start + _KEYS_AT_ONCE]
            with storage_errors(self.url):
                paths = [f"{root}/{key}" for key in part]
                answers = remote.call_each(filesystem, "cat_file", paths)
            for key, answer in zip(part, answers, strict=True):
                if isinstance(answer, BaseException) and not isinstance(answer, FileNotFoundError):
                    with storage_errors(f"{self.url}/{key}"):
                        raise answer
                if not isinstance(answer, BaseException):
                    found[key] = bytes(answer)
        return found

    def write_atomic(self, key: str, data: bytes) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        with storage_errors(f"{self.url}/{key}", writing=True):
            remote.call(filesystem, "pipe_file", f"{root}/{key}", data)

    def open_write(self, key: str) -> BinaryIO:
        filesystem, root = remote.open_filesystem(self.url)
        with storage_errors(f"{self.url}/{key}", writing=True):
            return cast(BinaryIO, filesystem.open(f"{root}/{key}", "wb"))

    def replace(self, key: str, final: str) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        filesystem.invalidate_cache()
        with storage_errors(f"{self.url}/{final}", writing=True):  # a server-side copy is one put
            remote.call(filesystem, "cp_file", f"{root}/{key}", f"{root}/{final}")
        self.delete(key)

    def exists(self, key: str) -> bool:
        filesystem, root = remote.open_filesystem(self.url)
        filesystem.invalidate_cache()
        with storage_errors(f"{self.url}/{key}"):
            try:
                found = remote.call(filesystem, "info", f"{root}/{key}")
            except FileNotFoundError:
                return False
        return bool(found["type"] == "file")

    def names(self, prefix: str) -> list[str]:
        filesystem, root = remote.open_filesystem(self.url)
        filesystem.invalidate_cache()
        folder = f"{root}/{prefix}".rstrip("/")
        with storage_errors(f"{self.url}/{prefix}"):
            try:
                listed = remote.call(filesystem, "ls", folder, detail=False)
            except FileNotFoundError:
                return []
        paths = {str(path).strip("/") for path in listed}
        # Consoles mark folders by an empty object of the folder's own name.
        return sorted(path.rsplit("/", 1)[-1] for path in paths - {folder.strip("/")})

    def delete(self, key: str) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        filesystem.invalidate_cache()
        path = f"{root}/{key}"
        with storage_errors(f"{self.url}/{key}"):
            below = [name for name in remote.call(filesystem, "find", path) if name != path]
            # One by one: a bulk delete of S3 does not say what it could not delete.
            for answer in remote.call_each(filesystem, "rm_file", [path, *below]):
                if isinstance(answer, BaseException) and not isinstance(answer, FileNotFoundError):
                    raise answer

    def make_durable(self, key: str) -> None:
        """A put that was answered is durable."""

    def open_read(self, key: str) -> BinaryIO:
        filesystem, root = remote.open_filesystem(self.url)
        with storage_errors(f"{self.url}/{key}"):
            opened = filesystem.open(f"{root}/{key}", "rb", block_size=remote.READ_BLOCK)
            return cast(BinaryIO, opened)

    def child(self, key: str) -> Location:
        return RemoteLocation(f"{self.url.rstrip('/')}/{key}")

    def zarr_store(self, key: str, *, read_only: bool) -> Store:
        url = f"{self.url.rstrip('/')}/{key}"
        store = remote.open_zarr_store(url, read_only=read_only)
        return NamedStore(store, url, remote.CALL_DEADLINE_S)


def open_location(url: str | Path) -> Location:
    """A Location for a path or URL ('file://' is a path).

    Raises:
        ConfigError: Empty, or a URL that holds credentials.
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
