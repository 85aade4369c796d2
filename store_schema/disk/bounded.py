"""Read files that may be damaged or hostile, up to a maximal length."""

from __future__ import annotations

import os
import stat

from store_schema.disk.location import Location
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import CorruptionError, MissingError


def read_bounded(location: Location, key: str, limit: int) -> bytes | None:
    """A file of at most `limit` bytes; None when it is not there.

    Args:
        location: Folder or object storage.
        key: The file.
        limit: Bytes. Of a longer file the first `limit` + 1 bytes are returned.

    Raises:
        CorruptionError: Not a regular file.
        StorageError: The disk or object store refused.
    """
    if location.path is None:
        try:
            return location.read_bytes(key, limit + 1)
        except MissingError:
            return None
    path = location.path / key
    with storage_errors(str(path)):
        try:
            # Opening a pipe waits for a writer without O_NONBLOCK.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CorruptionError("not a regular file", where=path)
            # `read` allocates the whole size that it is called with, so no more than the file has.
            return file.read(min(limit, os.fstat(descriptor).st_size) + 1)


def read_record(location: Location, key: str, limit: int, hint: str) -> bytes | None:
    """A JSON record of at most `limit` bytes; None when it is not there.

    Raises:
        CorruptionError: It is longer.
    """
    data = read_bounded(location, key, limit)
    if data is not None and len(data) > limit:
        raise CorruptionError(
            "file is too long",
            where=f"{location.url}/{key}",
            expected=f"at most {limit} bytes",
            got="more",
            hint=hint,
        )
    return data
