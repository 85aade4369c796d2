"""An object store as a `location.Location`, where each method is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, cast

from store_schema.disk import remote
from store_schema.disk.storage_errors import storage_errors

_KEYS_AT_ONCE = 1024
"""Keys that `read_many` reads concurrently: limits memory, and what has to fit one deadline."""


@dataclass(frozen=True, slots=True)
class RemoteLocation:
    """An fsspec URL such as s3://bucket/prefix. One put is atomic; there are no renames."""

    url: str
    path: ClassVar[None] = None

    def read_bytes(self, key: str, limit: int | None = None) -> bytes:
        filesystem, root = remote.open_filesystem(self.url)
        part = {} if limit is None else {"start": 0, "end": limit}
        with storage_errors(f"{self.url}/{key}"):
            try:
                return bytes(remote.call(filesystem, "cat_file", f"{root}/{key}", **part))
            except OSError as error:
                if part and "not satisfiable" in str(error):
                    return b""  # S3's error for a range of an empty file
                raise

    def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        filesystem, root = remote.open_filesystem(self.url)
        contents = {}
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
                    contents[key] = bytes(answer)
        return contents

    def write_atomic(self, key: str, data: bytes) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        with storage_errors(f"{self.url}/{key}", writing=True):
            remote.call(filesystem, "pipe_file", f"{root}/{key}", data)

    def write_files(self, key: str, files: Mapping[str, bytes]) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        paths = [f"{root}/{key}/{name}" for name in files]
        with storage_errors(f"{self.url}/{key}", writing=True):
            answers = remote.call_each(filesystem, "pipe_file", paths, list(files.values()))
        for name, answer in zip(files, answers, strict=True):
            if isinstance(answer, BaseException):
                with storage_errors(f"{self.url}/{key}/{name}", writing=True):
                    raise answer

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
                info = remote.call(filesystem, "info", f"{root}/{key}")
            except FileNotFoundError:
                return False
        return bool(info["type"] == "file")

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
        # Web consoles mark a folder by an empty object with the folder's name.
        return sorted(path.rsplit("/", 1)[-1] for path in paths - {folder.strip("/")})

    def delete(self, key: str) -> None:
        filesystem, root = remote.open_filesystem(self.url)
        filesystem.invalidate_cache()
        path = f"{root}/{key}"
        with storage_errors(f"{self.url}/{key}"):
            below = [name for name in remote.call(filesystem, "find", path) if name != path]
            # One by one: a bulk delete of S3 does not report which objects failed.
            for answer in remote.call_each(filesystem, "rm_file", [path, *below]):
                if isinstance(answer, BaseException) and not isinstance(answer, FileNotFoundError):
                    raise answer

    def make_durable(self, key: str) -> None:
        """Does nothing: an object is durable once its put has returned."""

    def open_read(self, key: str) -> BinaryIO:
        filesystem, root = remote.open_filesystem(self.url)
        with storage_errors(f"{self.url}/{key}"):
            opened = filesystem.open(f"{root}/{key}", "rb", block_size=remote.READ_BLOCK)
            return cast(BinaryIO, opened)

    def child(self, key: str) -> RemoteLocation:
        return RemoteLocation(f"{self.url.rstrip('/')}/{key}")
