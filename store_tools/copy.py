"""Copies a store to another folder or URL: shard by shard, verified, and resumable.

The order is that of a writer: the tables, the manifest, then for each shard its data and last its
commit. So an interrupted copy is a sound store with fewer shards. Every file is checked against its
commit when it is read, and by default read again at the target before the commit is written. Memory
holds one file per job, and files are some MB.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

import click
import google_crc32c

from launch.command import echo_json, json_option, set_up_logging
from launch.progress import Progress
from launch.signals import StopFlag, stop_on_signals
from store_schema.disk.bounded import read_bounded, read_record
from store_schema.disk.location import Location, open_location
from store_schema.disk.sealed import MAX_RECORD_BYTES, unseal
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, CorruptionError, MismatchError, StoreError
from store_schema.manifest import Commit, FileRecord, Manifest
from store_schema.store.guards import MAX_COMMIT_BYTES, MAX_VOCABULARY_BYTES, REPAIR, RESTORE
from store_schema.store.reader import (
    MANIFEST_FILE,
    RANKING_FILE,
    VOCABULARY_FILE,
    StoreReader,
    commit_key,
)

CONFIG_FILE = "config.yaml"
TABLES = (VOCABULARY_FILE, RANKING_FILE, CONFIG_FILE)
JOBS = 8
_DATA_FILE = re.compile(r"zarr\.json|[a-z0-9_]+/(zarr\.json|c/0)")


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did.

    Args:
        copied: Shards copied now.
        skipped: Shards that the target had already.
        size_bytes: Bytes of data copied now.
        faults: Shards of the source that cannot be copied, and why.
    """

    copied: int
    skipped: int
    size_bytes: int
    faults: tuple[StoreError, ...]


def copy_store(
    source: Location,
    target: Location,
    *,
    jobs: int = JOBS,
    verify: bool = True,
    flag: StopFlag | None = None,
) -> CopyResult:
    """Copy every committed shard that is not at `target` yet.

    Args:
        source: A store.
        target: An empty place, or an earlier copy of the same store.
        jobs: Shards at a time.
        verify: Read each file again at `target` before its shard is committed there.
        flag: Checked between files.

    Raises:
        MismatchError: `target` holds another store.
        ConfigError: `target` holds something else.
        StorageError: A file cannot be read or written; committed shards stay.
        Stopped: `flag` was set; committed shards stay.
    """
    reader = StoreReader.open(source)
    require_outside(source, target)
    commits, damaged = reader.scan()
    _copy_head(reader, target)
    done, _ = StoreReader.open(target).scan()
    pending = [
        commit
        for shard, commit in commits.items()
        if shard not in done or done[shard].content_sha256 != commit.content_sha256
    ]
    skipped = len(commits) - len(pending)
    total = _size(commits.values())
    faults, size_bytes = list(damaged.values()), 0
    label = f"copy {len(pending)} shards"
    pool = ThreadPoolExecutor(jobs)
    with Progress(label, total, unit="B", done=total - _size(pending)) as progress:
        try:
            futures = [
                pool.submit(_copy_shard, source, target, commit, verify, flag or StopFlag())
                for commit in pending
            ]
            for future in as_completed(futures):
                try:
                    size = future.result()
                except StoreError as error:  # this shard alone fails
                    faults.append(error)
                else:
                    progress.add(size)
                    size_bytes += size
        finally:
            pool.shutdown(cancel_futures=True)
    copied = len(pending) + len(damaged) - len(faults)
    return CopyResult(copied, skipped, size_bytes, tuple(faults))


def _size(commits: Iterable[Commit]) -> int:
    return sum(record.size for commit in commits for record in commit.files.values())


def _copy_head(reader: StoreReader, target: Location) -> None:
    """Copy tables and manifest, the manifest last as a writer does."""
    if target.exists(MANIFEST_FILE):
        _require_same(reader, target)
    elif strange := set(target.names("")) - {*TABLES, MANIFEST_FILE, "commits", "data"}:
        raise ConfigError(
            "the place to copy to holds something else",
            where=target.url,
            expected="an empty place or an earlier copy of the store",
            got=", ".join(sorted(strange)[:5]),
            hint="give the copy a folder of its own",
        )
    _ = reader.vocabulary  # raises when it is damaged, as the rank table does
    if reader.manifest.ranking_fingerprint is not None:
        _ = reader.ranking
    for key in TABLES:
        data = _table(reader.location, key)
        if data is not None and _table(target, key) != data:
            target.write_atomic(key, data)
    manifest = read_record(reader.location, MANIFEST_FILE, MAX_RECORD_BYTES, RESTORE) or b""
    # The manifest may have changed: a store's number of shards grows with its plan.
    if _table(target, MANIFEST_FILE) != manifest:
        target.write_atomic(MANIFEST_FILE, manifest)


def _table(location: Location, key: str) -> bytes | None:
    """A file that all shards share; None if there is none, or only a symbolic link."""
    if location.path is not None and (location.path / key).is_symlink():
        return None
    return read_record(location, key, MAX_VOCABULARY_BYTES, RESTORE)


def _require_same(reader: StoreReader, target: Location) -> None:
    where = f"{target.url}/{MANIFEST_FILE}"
    data = read_record(target, MANIFEST_FILE, MAX_RECORD_BYTES, RESTORE) or b""
    other = unseal(Manifest, data, where=where, hint=RESTORE)
    if other.fingerprint() != reader.manifest.fingerprint():
        raise MismatchError(
            "the place to copy to holds another store",
            where=target.url,
            expected=f"store {reader.manifest.fingerprint()} ({reader.manifest.source})",
            got=f"store {other.fingerprint()} ({other.source})",
            hint="give the copy a folder of its own",
        )


def _copy_shard(
    source: Location, target: Location, commit: Commit, verify: bool, flag: StopFlag
) -> int:
    """Copy a shard's data, then its commit byte for byte; return the bytes of data."""
    key = commit_key(commit.shard)
    where = f"{source.url}, shard {commit.shard}"
    sealed = read_bounded(source, key, MAX_COMMIT_BYTES) or b""
    if unseal(Commit, sealed, where=f"{source.url}/{key}", hint=REPAIR) != commit:
        raise MismatchError("shard was written again meanwhile", where=where, hint="rerun the copy")
    for name, record in commit.files.items():
        flag.check()
        if not _DATA_FILE.fullmatch(name):
            raise CorruptionError("commit names a strange file", where=where, got=repr(name[:80]))
        path = f"{commit.path}/{name}"
        data = _checked(source, path, record, where, REPAIR)
        with storage_errors(f"{target.url}/{path}", writing=True):
            with target.open_write(path) as file:
                file.write(data)
    if verify:
        for name, record in commit.files.items():
            flag.check()
            there = f"{target.url}, shard {commit.shard}"
            _checked(target, f"{commit.path}/{name}", record, there, "rerun the copy")
    target.make_durable(commit.path)
    flag.check()
    target.write_atomic(key, sealed)
    return _size([commit])


def _checked(location: Location, key: str, record: FileRecord, where: str, hint: str) -> bytes:
    """Content of a data file, checked against its record.

    Raises:
        CorruptionError: Missing, truncated or changed; names shard and file.
    """
    data = read_bounded(location, key, record.size)
    crc = None if data is None else int(google_crc32c.value(data))
    if data is None or len(data) != record.size or crc != record.crc32c:
        raise CorruptionError(
            "file is missing" if data is None else "file is cut or changed",
            where=f"{where}, file {key.split('/', 2)[-1]}",
            expected=f"{record.size} bytes, CRC-32C {record.crc32c:08x}",
            got=None if crc is None or data is None else f"{len(data)} bytes, {crc:08x}",
            hint=hint,
        )
    return data


def require_outside(source: Location, target: Location) -> None:
    """Refuse to write a store's content into the store itself.

    Raises:
        ConfigError: `target` is `source` or inside it.
    """
    here, there = (_whole_url(location) for location in (source, target))
    if there == here or there.startswith(f"{here}/"):
        raise ConfigError(
            "the target is the store itself or inside it",
            where=target.url,
            expected=f"a place outside of {source.url}",
        )


def _whole_url(location: Location) -> str:
    if location.path is not None:
        return os.path.realpath(location.url)
    return location.url.rstrip("/")


@click.command("copy")
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option(
    "--jobs",
    type=click.IntRange(1, 128),
    default=JOBS,
    show_default=True,
    metavar="N",
    help="Shards copied at a time.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read every file again at TARGET before its shard counts as copied.",
)
@json_option
def copy_command(source: str, target: str, jobs: int, verify: bool, as_json: bool) -> None:
    """Copy the store SOURCE to TARGET, each a folder or URL such as s3://bucket/store.

    An interrupted copy is resumed. Credentials come from the environment.
    """
    set_up_logging()
    with stop_on_signals() as flag:
        result = copy_store(
            open_location(source), open_location(target), jobs=jobs, verify=verify, flag=flag
        )
    if as_json:
        echo_json(asdict(result) | {"faults": [error.line() for error in result.faults]})
    else:
        size = f"{result.size_bytes / 1e6:,.1f} MB"
        click.echo(f"{result.copied} shards copied ({size}), {result.skipped} there already")
    for error in result.faults:
        click.echo(error.line(), err=True)
    if result.faults:
        raise CorruptionError(
            f"{len(result.faults)} shards not copied",
            where=source,
            hint="repair the store (or rerun, where the line above says so), then copy again",
        )
