"""`store repair`: removes the commits of damaged shards, so that a rerun writes just those again.

Nothing else is changed: sound shards stay, and the data of an uncommitted shard stays until `store gc`
removes it, or is removed at once with `delete`. A commit that a worker wrote during the check stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launch.signals import StopFlag
from store_schema.errors import LogitfuseError, MissingError
from store_schema.manifest import Commit
from store_schema.store.reader import commit_key
from store_tools.places import StorePlace, TolerantReader
from store_tools.verify import shard_of, verify_store


@dataclass(slots=True)
class RepairReport:
    """What was done to one store, or would be.

    Args:
        name: The store's name in messages.
        uncommitted: Shards whose commits were removed, and why (None: the user named them).
        rewritten: Damaged shards that a worker has written again meanwhile.
        broken: Faults that cannot be repaired.
        rerun: The command that writes the shards again.
    """

    name: str
    uncommitted: dict[int, LogitfuseError | None] = field(default_factory=dict)
    rewritten: list[int] = field(default_factory=list)
    broken: list[LogitfuseError] = field(default_factory=list)
    rerun: str = ""


def repair_store(
    place: StorePlace,
    *,
    shards: Sequence[int] = (),
    delete: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    stop: StopFlag | None = None,
) -> RepairReport:
    """Remove commits of shards.

    Args:
        place: The store.
        shards: Shards to uncommit, sound or not; () verifies the store and uncommits damaged shards.
        delete: Also remove the data of uncommitted shards.
        dry_run: Only report what would be done.
        jobs: Shards verified at a time.
        stop: Checked between shards.

    Raises:
        MissingError: One of `shards` has no commit.
        StorageError: Disk or object store cannot be read or written.
        Stopped: `stop` was set; nothing was uncommitted.
    """
    report = RepairReport(place.name)
    wanted: dict[int, LogitfuseError | None] = dict.fromkeys(shards)
    if shards:
        reader = place.open()
        _require_committed(reader, wanted)
    else:
        verified = verify_store(place, jobs=jobs, stop=stop)
        report.broken = verified.broken
        if verified.reader is None or not verified.damaged:
            return report
        reader, wanted = verified.reader, dict(verified.damaged)
    report.rerun = place.rerun(reader.manifest.kind, reader.manifest.source)
    now = reader.fresh()
    for shard, fault in wanted.items():
        if _is_rewritten(reader, now, shard):
            report.rewritten.append(shard)
            continue
        report.uncommitted[shard] = fault
    if not dry_run:
        _uncommit(now, report.uncommitted, delete)
    return report


def _require_committed(reader: TolerantReader, shards: Iterable[int]) -> None:
    there = reader.commits.keys() | {shard_of(key) for key in reader.faults}
    absent = sorted(set(shards) - there)
    if absent:
        raise MissingError(
            f"shard(s) {', '.join(map(str, absent))} have no commit to remove",
            where=reader.location.url,
            hint="they are pending already: rerun the stage",
        )


def _is_rewritten(before: TolerantReader, now: TolerantReader, shard: int) -> bool:
    """Whether the shard has another commit than before."""
    old, new = before.commits.get(shard), now.commits.get(shard)
    return new is not None and (old is None or old.path != new.path)


def _uncommit(reader: TolerantReader, shards: Iterable[int], delete: bool) -> None:
    location = reader.location
    commits: list[Commit] = []
    for shard in shards:
        location.delete(commit_key(shard))
        if shard in reader.commits:
            commits.append(reader.commits[shard])
    if delete and commits:
        # Else a power failure could restore a commit whose data is gone.
        location.make_durable("commits")
        for commit in commits:
            location.delete(commit.path)
