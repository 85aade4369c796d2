"""`store verify`: every byte under its checksum, every invariant, and the segments are the plan's.

A shard is sound when its files are those its commit names, every chunk matches its checksum, the
decoded arrays keep every invariant of the layout and the commit's digest, and, where the plan is
known, its segments are the plan's own: rows, fingerprint, and tokens whose bytes are the very text
(of a generated store: answers to each of its prompts, whose tokens end where it says).
One damaged shard does not stop the others from being looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import (
    CorruptionError,
    LogitfuseError,
    MismatchError,
    SchemaVersionError,
    StorageError,
)
from store_schema.manifest import Commit
from store_schema.plan.plan import Plan
from store_schema.store.answers import TEXT_ARRAYS
from store_schema.store.guards import RESTORE
from store_schema.store.reader import MANIFEST_FILE
from store_tools.against_plan import COMPARED, Speller, compare_with_plan
from store_tools.answers import ANSWERS_SETTING, compare_answers
from store_tools.leftovers import Leftover, find_leftovers
from store_tools.places import SoundReader, StorePlace, planned_shard
from store_tools.shard_work import for_each_shard


@dataclass(slots=True)
class StoreReport:
    """What was found in one store.

    Args:
        name: What people call it.
        sound: Shards without a fault.
        damaged: Shards that `store repair` can take back, and why.
        broken: Faults of the store as a whole and of its plan: repair does not mend these.
        missing: Shards of the plan that are not there; None where nobody knows how many there are.
        compared: Whether shards were compared with a plan.
        leftovers: Data of attempts without a commit, and temporary files.
        reader: The store as it stood when it was opened; None where it cannot be.
    """

    name: str
    sound: list[int] = field(default_factory=list)
    damaged: dict[int, LogitfuseError] = field(default_factory=dict)
    broken: list[LogitfuseError] = field(default_factory=list)
    missing: list[int] | None = None
    compared: bool = False
    leftovers: list[Leftover] = field(default_factory=list)
    reader: SoundReader | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all that is there is sound; shards may be missing."""
        return not self.damaged and not self.broken


def verify_store(
    place: StorePlace, *, jobs: int | None = None, stop: StopFlag | None = None
) -> StoreReport:
    """Look at every byte of a store.

    Args:
        place: Which.
        jobs: Shards at a time; None takes one for each processor.
        stop: Asked between shards.

    Raises:
        StorageError: The disk or object store refused: that is not damage.
        Stopped: `stop` was asked.
    """
    report = StoreReport(place.name)
    try:
        reader = place.open()
    except StorageError:
        raise
    except LogitfuseError as error:
        report.broken.append(error)
        return report
    report.reader = reader
    plan = _plan_of(place, reader, report)
    _sort_faults(reader, report)
    if _open_tables(reader, report):
        _look_at_shards(reader, plan, report, jobs, stop)
    report.missing = _missing(reader, plan, report)
    report.leftovers = find_leftovers(reader)
    return report


def shard_of(key: str) -> int:
    """Shard of a commit's key."""
    return int(key.removeprefix("commits/").removesuffix(".json"))


def _sort_faults(reader: SoundReader, report: StoreReport) -> None:
    """Tell commits that are damaged from faults that taking a commit back would make worse."""
    foreign = [f for f in reader.faults.values() if isinstance(f, MismatchError)]
    if foreign and not reader.commits:
        report.broken.append(
            MismatchError(
                f"none of the commits belongs to the manifest ({len(foreign)} are another's)",
                where=f"{reader.location.url}/{MANIFEST_FILE}",
                expected=foreign[0].got,
                got=foreign[0].expected,
                hint=RESTORE,
            )
        )
    for key, fault in reader.faults.items():
        if isinstance(fault, SchemaVersionError):
            report.broken.append(fault)
        elif reader.commits or fault not in foreign:
            report.damaged[shard_of(key)] = fault


def _plan_of(place: StorePlace, reader: SoundReader, report: StoreReport) -> Plan | None:
    """The store's plan, None where there is none to compare with."""
    try:
        plan = place.plan()
        if plan is not None:
            reader.require_plan(plan)
            _require_number(reader, plan)
    except StorageError:
        raise
    except LogitfuseError as error:
        report.broken.append(error)
        return None
    report.compared = plan is not None
    return plan


def _require_number(reader: SoundReader, plan: Plan) -> None:
    found = reader.manifest.num_shards
    if found is not None and found > len(plan.shards):  # a plan may grow after a store was begun
        raise MismatchError(
            "manifest and plan differ in the number of shards",
            where=reader.location.url,
            expected=f"at most {len(plan.shards)}",
            got=found,
        )


def _open_tables(reader: SoundReader, report: StoreReport) -> bool:
    """Read what all shards share; whether they can be read at all."""
    readable = True
    # The shards' numbers are ranks in the second table; the first only says how tokens are written.
    for table in ("vocabulary", "ranking"):
        try:
            getattr(reader, table)
        except CorruptionError as error:
            report.broken.append(error)
            readable = readable and table != "ranking"
    return readable


def _look_at_shards(
    reader: SoundReader,
    plan: Plan | None,
    report: StoreReport,
    jobs: int | None,
    stop: StopFlag | None,
) -> None:
    sizes = {shard: stored_bytes(commit) for shard, commit in reader.commits.items()}
    speller = None if plan is None or report.broken else Speller(reader.vocabulary)
    plan_faults: dict[int, LogitfuseError] = {}

    def look(shard: int) -> LogitfuseError | None:
        try:
            reader.verify(shard)
            if plan is not None:
                _compare(reader, plan, shard, speller, plan_faults)
        except StorageError:
            raise
        except LogitfuseError as error:
            return error
        return None

    with Progress(f"verify {report.name}", sum(sizes.values()), unit="B") as progress:
        for shard, fault in for_each_shard(look, sorted(sizes), jobs=jobs, stop=stop):
            if fault is not None:
                report.damaged[shard] = fault
            elif shard not in plan_faults:
                report.sound.append(shard)
            progress.add(sizes[shard], note=f"{len(report.damaged)} damaged")
    report.sound.sort()
    report.broken += [plan_faults[shard] for shard in sorted(plan_faults)]


def stored_bytes(commit: Commit) -> int:
    """Size of a shard's files."""
    return sum(record.size for record in commit.files.values())


def _missing(reader: SoundReader, plan: Plan | None, report: StoreReport) -> list[int] | None:
    num_shards = reader.manifest.num_shards if plan is None else len(plan.shards)
    if num_shards is None:
        return None
    there = reader.commits.keys() | {shard_of(key) for key in reader.faults}
    return [shard for shard in range(num_shards) if shard not in there]


def _compare(
    reader: SoundReader,
    plan: Plan,
    shard: int,
    speller: Speller | None,
    plan_faults: dict[int, LogitfuseError],
) -> None:
    """Compare one shard with the plan.

    Args:
        reader: The store.
        plan: Its plan.
        shard: A committed shard that is sound in itself.
        speller: None where the vocabulary is damaged: the tokens' bytes are not compared.
        plan_faults: Takes up, by shard, that the plan's own segments are damaged.

    Raises:
        CorruptionError: It is not of the plan's segments.
    """
    where = f"{reader.location.url}, shard {shard}"
    record = planned_shard(plan, shard, where)
    reader.require_shards([record])
    try:
        segments = plan.segments(record)
    except CorruptionError as error:
        plan_faults[shard] = error
        return
    if reader.manifest.kind == "generated":
        vocabulary = None if speller is None else speller.vocabulary
        per_prompt = reader.manifest.settings.get(ANSWERS_SETTING)
        compare_answers(reader.read(shard, TEXT_ARRAYS), segments, per_prompt, vocabulary, where)
    else:
        compare_with_plan(reader.read(shard, COMPARED), record, segments, speller, where)
