"""How object stores are spoken to: retries, timeouts and caches, defined once for every path.

Faults that pass are not errors. botocore tries a request again on 5xx, throttling, dropped connections
and timeouts, waiting longer each time; s3fs tries again when an answer's body is cut. Left to itself
s3fs reads file sizes from cached listings and may multiply its tries with botocore's for half an hour
on a dead address: here no listing is kept, tries are counted, and a call ends after `CALL_DEADLINE_S`.

A put whose answer was lost is sent again: it is the same object under the same key, so nothing is
harmed. Credentials come from the environment alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from zarr.storage import FsspecStore

from store_schema.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Longest silence within an answer."""

REQUEST_ATTEMPTS = 6
"""Tries of a request; about 15 s of waiting between them in all."""

BODY_ATTEMPTS = 3
"""Tries of reading an answer whole."""

CALL_DEADLINE_S = 300.0
"""A call that has not ended by then is given up: 20 kB/s for a file of 6 MB."""

READ_BLOCK = 4 << 20
"""Bytes fetched at once by files opened for reading; s3fs would take 50 MiB."""

CONNECTIONS = 32
"""To one object store at a time, from one process."""


def _options(url: str) -> dict[str, Any]:
    """Driver options for `url`."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    return {
        "use_listings_cache": False,
        # Else every read of a whole object asks for its size first.
        "max_concurrency": 1,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS},
        },
    }


def _no_driver(url: str, error: Exception) -> ConfigError:
    return ConfigError(
        "no driver for the storage URL",
        where=url,
        got=str(error),
        hint="install its fsspec package (s3fs for s3://)",
    )


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it, without a '/' at the end.

    Raises:
        ConfigError: No driver is installed for it.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
    except (ImportError, ValueError) as error:
        raise _no_driver(url, error) from error
    filesystem.retries = BODY_ATTEMPTS
    return filesystem, path.rstrip("/")


def open_zarr_store(url: str, *, read_only: bool) -> FsspecStore:
    """The same for zarr, which wants a file system of its own event loop.

    Raises:
        ConfigError: No driver is installed for it.
    """
    try:
        store = FsspecStore.from_url(url, storage_options=_options(url), read_only=read_only)
    except (ImportError, ValueError) as error:
        raise _no_driver(url, error) from error
    store.fs.retries = BODY_ATTEMPTS
    return store


def call(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of the file system, for `CALL_DEADLINE_S` at most where the driver can."""
    if filesystem.async_impl:
        options["timeout"] = CALL_DEADLINE_S
    return getattr(filesystem, method)(*args, **options)


def call_each(filesystem: Any, method: str, paths: Sequence[str]) -> list[Any]:
    """What `method` returns or raises for each path, many at once where the driver can."""
    from fsspec.asyn import sync

    if not filesystem.async_impl:
        return [_outcome(getattr(filesystem, method), path) for path in paths]

    async def gathered() -> list[Any]:
        calls = (getattr(filesystem, f"_{method}")(path) for path in paths)
        return await asyncio.gather(*calls, return_exceptions=True)

    return list(sync(filesystem.loop, gathered, timeout=CALL_DEADLINE_S))


def _outcome(function: Any, path: str) -> Any:
    try:
        return function(path)
    except Exception as error:  # returned like gather does; the caller tells it
        return error
