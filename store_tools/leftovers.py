"""What lies in a store and no reader reads: data of attempts without a commit, cut temporary files.

`store gc` removes it. A worker at work has written data that no commit names yet, so an attempt is
left alone until its newest file is older than an age that no shard takes to write. A commit is looked
for by its key after the data was listed and once more before the data is removed.
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
from store_schema.disk.location import LocalLocation, Location
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, CorruptionError, MissingError
from store_schema.store.reader import StoreReader, commit_key
from store_tools.places import SoundReader, StorePlace

_ATTEMPT = re.compile(r"data/((\d{5,})-[0-9a-f]{16})(?:/.*)?")
_TEMPORARY = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{32}\.tmp")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
"""What drivers call the moment a file was written."""

_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as a listing has it.

    Args:
        key: Relative to the store.
        size: Bytes.
        written: Seconds since 1970; None where the store does not say.
    """

    key: str
    size: int
    written: float | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """An attempt's folder without a commit, or a temporary file.

    Args:
        key: Relative to the store.
        shard: Of an attempt; None for a temporary file.
        size: Bytes.
        written: When its newest file was written; None where one is not known.
    """

    key: str
    shard: int | None
    size: int
    written: float | None

    def older_than(self, seconds: float, now: float) -> bool:
        """Whether nothing was written to it for so long; no if that is not known."""
        return self.written is not None and now - self.written >= seconds


def list_files(location: Location) -> Iterator[FileEntry]:
    """Every file of a store, hidden ones too."""
    with storage_errors(location.url):
        if isinstance(location, LocalLocation):
            yield from _local_files(location)
            return
        filesystem, root = remote.open_filesystem(location.url)
        filesystem.invalidate_cache()
        for path, info in remote.call(filesystem, "find", root, detail=True).items():
            key = path.removeprefix(root).lstrip("/")
            yield FileEntry(key, int(info.get("size") or 0), _written(info))


def _local_files(location: LocalLocation) -> Iterator[FileEntry]:
    for folder, subfolders, names in os.walk(location.path, onerror=_unless_gone):
        # An attempt that was killed at once may be an empty folder.
        empty = [] if subfolders or names else [""]
        for name in names + empty:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except FileNotFoundError:  # a worker renamed or removed it meanwhile
                continue
            key = path.relative_to(location.path).as_posix()
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


def find_leftovers(reader: SoundReader, *, strict: bool = False) -> list[Leftover]:
    """What no commit names, in order of keys. Commits are read after the files are listed.

    Args:
        reader: The store.
        strict: Refuse where a commit cannot be read.

    Raises:
        CorruptionError: A commit cannot be read, so its data is not known from garbage.
        StorageError: The disk or object store refused.
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
        removed: Old enough.
        kept: Too young: a worker may be at it.
    """

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]


def collect(place: StorePlace, *, older_than_s: float, dry_run: bool) -> Collected:
    """Remove leftovers that are older than `older_than_s` seconds.

    Raises:
        CorruptionError: A commit cannot be read, so its data is not known from garbage.
        StorageError: The disk or object store refused.
    """
    reader = place.open()
    old: list[Leftover] = []
    young: list[Leftover] = []
    now = time.time()
    for item in find_leftovers(reader, strict=True):
        (old if item.older_than(older_than_s, now) else young).append(item)
    removed = [item for item in old if dry_run or _remove(reader, item)]
    return Collected(tuple(removed), tuple(young))


def _require_readable(reader: SoundReader) -> None:
    for key, fault in reader.faults.items():
        raise CorruptionError(
            "nothing removed: what a damaged commit names is not known",
            where=f"{reader.location.url}/{key}",
            got=fault.what,
            hint="run `logitfuse store repair` first",
        ) from fault


def _remove(reader: StoreReader, item: Leftover) -> bool:
    """Delete one leftover unless its shard's commit, as it stands now, names it."""
    if item.shard is not None and _names(reader.location, item.shard, item.key):
        return False
    reader.location.delete(item.key)
    return True


def _names(location: Location, shard: int, path: str) -> bool:
    """Whether the commit of a shard speaks of a folder, whatever else is wrong with it."""
    try:
        return path.encode() in location.read_bytes(commit_key(shard))
    except MissingError:
        return False


def parse_age(text: str) -> float:
    """Seconds from "24h", "30m", "2d", "90s" or "0".

    Raises:
        ConfigError: Written otherwise.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text) or re.fullmatch(r"(0)()", text)
    if match is None:
        raise ConfigError(
            "age refused", where="--older-than", expected="such as 24h, 30m, 2d or 0", got=text
        )
    return float(match[1]) * _AGE_UNITS.get(match[2], 1)
