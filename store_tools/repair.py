"""`store repair`: removes the commits of damaged shards, so that a rerun writes just those again.

Nothing else is touched: sound shards stay, and the data of a commit that was uncommitted stays until
`store gc` finds it old enough, or is removed at once where that is asked for. A commit that a worker
put while we looked is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launch.signals import StopFlag
from store_schema.errors import LogitfuseError, MissingError
from store_schema.manifest import Commit
from store_schema.store.reader import commit_key
from store_tools.places import SoundReader, StorePlace
from store_tools.verify import shard_of, verify_store


@dataclass(slots=True)
class RepairReport:
    """What was done to one store, or would be.

    Args:
        name: What people call it.
        taken: Shards whose commits were uncommitted, and why (None: they were named by the user).
        left: Damaged shards that a worker wrote again meanwhile.
        broken: Faults that this does not mend.
        rerun: The command that writes the shards again.
    """

    name: str
    taken: dict[int, LogitfuseError | None] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
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
    """Take back commits.

    Args:
        place: The store.
        shards: Those to take back, sound or not; () verifies the store and takes back what is
            damaged.
        delete: Remove the data of what is uncommitted, too.
        dry_run: Only say what would be done.
        jobs: Shards verified at a time.
        stop: Asked between shards.

    Raises:
        MissingError: A shard that was named has no commit.
        StorageError: The disk or object store refused.
        Stopped: `stop` was asked; nothing was uncommitted.
    """
    report = RepairReport(place.name)
    wanted: dict[int, LogitfuseError | None] = dict.fromkeys(shards)
    if shards:
        reader = place.open()
        _require_committed(reader, wanted)
    else:
        found = verify_store(place, jobs=jobs, stop=stop)
        report.broken = found.broken
        if found.reader is None or not found.damaged:
            return report
        reader, wanted = found.reader, dict(found.damaged)
    report.rerun = place.rerun(reader.manifest.kind, reader.manifest.source)
    now = reader.fresh()
    for shard, fault in wanted.items():
        if _is_rewritten(reader, now, shard):
            report.left.append(shard)
            continue
        report.taken[shard] = fault
    if not dry_run:
        _take_back(now, report.taken, delete)
    return report


def _require_committed(reader: SoundReader, shards: Iterable[int]) -> None:
    there = reader.commits.keys() | {shard_of(key) for key in reader.faults}
    absent = sorted(set(shards) - there)
    if absent:
        raise MissingError(
            f"shard(s) {', '.join(map(str, absent))} have no commit to take back",
            where=reader.location.url,
            hint="they are pending already: rerun the stage",
        )


def _is_rewritten(before: SoundReader, now: SoundReader, shard: int) -> bool:
    """Whether another commit stands than the one that was looked at."""
    old, new = before.commits.get(shard), now.commits.get(shard)
    return new is not None and (old is None or old.path != new.path)


def _take_back(reader: SoundReader, shards: Iterable[int], delete: bool) -> None:
    location = reader.location
    commits: list[Commit] = []
    for shard in shards:
        location.delete(commit_key(shard))
        if shard in reader.commits:
            commits.append(reader.commits[shard])
    if delete and commits:
        # Else a power cut could bring a commit back whose data is gone.
        location.make_durable("commits")
        for commit in commits:
            location.delete(commit.path)
