"""Files in a store that no reader reads: data of attempts without a commit, and temporary files.

`store gc` removes them. A running worker has written data that no commit names yet, so an attempt is
kept until its newest file is older than any shard takes to write. Commits are read after the data is
listed, and once more before the data is removed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from store_schema.disk import remote
from store_schema.disk.location import Location
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, CorruptionError, MissingError
from store_schema.store.reader import StoreReader, commit_key
from store_tools.places import StorePlace, TolerantReader

_ATTEMPT = re.compile(r"data/((\d{5,})-[0-9a-f]{16})(?:/.*)?")
_TEMPORARY = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{32}\.tmp")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Names that drivers have for the time when a file was written."""

_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a listing.

    Args:
        key: Path relative to the store.
        size: Bytes.
        written: Time of writing, seconds since 1970; None if the object store does not say.
    """

    key: str
    size: int
    written: float | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """An attempt's folder without a commit, or a temporary file.

    Args:
        key: Path relative to the store.
        shard: Shard of an attempt; None for a temporary file.
        size: Bytes.
        written: When its newest file was written; None if not known of all files.
    """

    key: str
    shard: int | None
    size: int
    written: float | None

    def older_than(self, seconds: float, now: float) -> bool:
        """Whether nothing was written to it for `seconds`; False if that is not known."""
        return self.written is not None and now - self.written >= seconds


def list_files(location: Location) -> Iterator[FileEntry]:
    """Every file of a store, hidden ones too."""
    with storage_errors(location.url):
        if location.path is not None:
            yield from _local_files(location.path)
            return
        filesystem, root = remote.open_filesystem(location.url)
        filesystem.invalidate_cache()
        for path, info in remote.call(filesystem, "find", root, detail=True).items():
            key = path.removeprefix(root).lstrip("/")
            yield FileEntry(key, int(info.get("size") or 0), _written(info))


def _local_files(root: Path) -> Iterator[FileEntry]:
    for folder, subfolders, names in os.walk(root, onerror=_unless_gone):
        # An attempt that was killed early may be an empty folder.
        empty = [] if subfolders or names else [""]
        for name in names + empty:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except FileNotFoundError:  # a worker renamed or removed it meanwhile
                continue
            key = path.relative_to(root).as_posix()
            yield FileEntry(key, status.st_size, status.st_mtime)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _written(info: dict[str, object]) -> float | None:
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None


def find_leftovers(reader: TolerantReader, *, strict: bool = False) -> list[Leftover]:
    """Files that no commit names, in order of keys. Commits are read after the files are listed.

    Args:
        reader: The store.
        strict: Raise if a commit cannot be read.

    Raises:
        CorruptionError: A commit cannot be read, so that its data may look like a leftover.
        StorageError: Disk or object store cannot be read.
    """
    groups: dict[str, list[FileEntry]] = {}
    for entry in list_files(reader.location):
        match = _ATTEMPT.fullmatch(entry.key)
        if match:
            groups.setdefault(f"data/{match[1]}", []).append(entry)
        elif _TEMPORARY.fullmatch(entry.key):
            groups[entry.key] = [entry]
    now = reader.fresh()
    if strict:
        _require_readable(now)
    committed = {commit.path for commit in now.commits.values()}
    return [_leftover(key, files) for key, files in sorted(groups.items()) if key not in committed]


def _leftover(key: str, files: list[FileEntry]) -> Leftover:
    times = [entry.written for entry in files]
    match = _ATTEMPT.fullmatch(files[0].key)
    return Leftover(
        key,
        None if match is None else int(match[2]),
        sum(entry.size for entry in files),
        None if None in times else max(time for time in times if time is not None),
    )


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc did to one store, or would do.

    Args:
        removed: Leftovers that are old enough.
        kept: Leftovers that are too young: a worker may still write to them.
    """

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]


def collect(place: StorePlace, *, older_than_s: float, dry_run: bool) -> Collected:
    """Remove leftovers that are older than `older_than_s` seconds.

    Raises:
        CorruptionError: A commit cannot be read, so that its data may look like a leftover.
        StorageError: Disk or object store cannot be read or written.
    """
    reader = place.open()
    old: list[Leftover] = []
    young: list[Leftover] = []
    now = time.time()
    for item in find_leftovers(reader, strict=True):
        (old if item.older_than(older_than_s, now) else young).append(item)
    removed = [item for item in old if dry_run or _remove(reader, item)]
    return Collected(tuple(removed), tuple(young))


def _require_readable(reader: TolerantReader) -> None:
    for key, fault in reader.faults.items():
        raise CorruptionError(
            "nothing removed: what a damaged commit names is not known",
            where=f"{reader.location.url}/{key}",
            got=fault.what,
            hint="run `logitfuse store repair` first",
        ) from fault


def _remove(reader: StoreReader, item: Leftover) -> bool:
    """Delete one leftover unless the current commit of its shard names it."""
    if item.shard is not None and _names(reader.location, item.shard, item.key):
        return False
    reader.location.delete(item.key)
    return True


def _names(location: Location, shard: int, path: str) -> bool:
    """Whether the commit of a shard contains the path, even if it is damaged."""
    try:
        return path.encode() in location.read_bytes(commit_key(shard))
    except MissingError:
        return False


def parse_age(text: str) -> float:
    """Seconds from text such as "24h", "30m", "2d", "90s" or "0".

    Raises:
        ConfigError: Not of this form.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text) or re.fullmatch(r"(0)()", text)
    if match is None:
        raise ConfigError(
            "age refused", where="--older-than", expected="such as 24h, 30m, 2d or 0", got=text
        )
    return float(match[1]) * _AGE_UNITS.get(match[2], 1)
