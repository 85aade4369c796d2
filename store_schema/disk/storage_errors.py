"""Turn the exceptions of disks and object stores into errors that name the file or folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from store_schema.errors import MissingError, StorageError

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


@contextmanager
def storage_errors(where: str, *, writing: bool = False) -> Iterator[None]:
    """Turn exceptions of disks and object stores into StorageError or MissingError.

    Args:
        where: File or folder, for the message.
        writing: Whether something is written: "not found" then means its bucket or folder.

    Raises:
        MissingError: A file that was to be read does not exist.
        StorageError: Any other fault.
    """
    remotely = "://" in where
    try:
        yield
    except FileNotFoundError as error:
        if writing:
            hint = "make the bucket first" if remotely else "check the path, then rerun"
            raise StorageError("no such folder", where=where, got=error, hint=hint) from error
        raise MissingError(
            "file not found", where=where, hint="run the stage that writes it first"
        ) from error
    except OSError as error:
        hint = "check the path and its permissions, then rerun"
        if remotely:
            hint = "check its address and the credentials in the environment, then rerun"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free space and rerun: finished files are kept"
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
