"""Access to object stores: retries, timeouts and caches, set in one place for every path.

Transient faults are retried. botocore repeats a request on 5xx, throttling, dropped connections and
timeouts, with growing delays; s3fs repeats a read whose body is cut. By default s3fs takes file sizes
from cached listings, and its retries multiply with botocore's, up to half an hour for a dead address.
Here no listing is cached, attempts are limited, and a call ends after `CALL_DEADLINE_S`.

A put whose response was lost is sent again, which is safe: it is the same object under the same key.
Credentials come from the environment alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from store_schema.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Longest pause within a response."""

REQUEST_ATTEMPTS = 6
"""Attempts of a request, with delays of about 15 s between them in all."""

BODY_ATTEMPTS = 3
"""Attempts to read a complete response body."""

CALL_DEADLINE_S = 300.0
"""A call that takes longer fails: 20 kB/s for a file of 6 MB."""

READ_BLOCK = 4 << 20
"""Bytes that a file opened for reading fetches at a time; the default of s3fs is 50 MiB."""

CONNECTIONS = 32
"""Connections of one process to one object store, at most."""


def _options(url: str) -> dict[str, Any]:
    """Driver options for `url`."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    return {
        "use_listings_cache": False,
        # With more, every read of a whole object asks for its size first.
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


def call(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of the file system, with a timeout of `CALL_DEADLINE_S` if the driver supports
    it."""
    if filesystem.async_impl:
        options["timeout"] = CALL_DEADLINE_S
    return getattr(filesystem, method)(*args, **options)


def call_each(
    filesystem: Any, method: str, paths: Sequence[str], values: Sequence[Any] | None = None
) -> list[Any]:
    """What `method` returns or raises for each path; concurrently if the driver supports it.

    Args:
        filesystem: From `open_filesystem`.
        method: Of the file system.
        paths: Its first arguments.
        values: Its second ones, where it takes two; each may take `CALL_DEADLINE_S`.
    """
    from fsspec.asyn import sync

    calls = [(path,) for path in paths] if values is None else list(zip(paths, values, strict=True))
    if not filesystem.async_impl:
        return [_outcome(getattr(filesystem, method), call) for call in calls]

    async def gathered() -> list[Any]:
        pending = (getattr(filesystem, f"_{method}")(*call) for call in calls)
        return await asyncio.gather(*pending, return_exceptions=True)

    deadline = CALL_DEADLINE_S * (1 if values is None else max(len(calls), 1))
    return list(sync(filesystem.loop, gathered, timeout=deadline))


def _outcome(function: Any, arguments: Sequence[Any]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # returned, as `gather` does; the caller raises it
        return error
