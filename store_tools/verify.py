"""`store verify`: checks checksums, the layout's invariants, and that segments are the plan's.

A shard is sound when its files are those that its commit names, every chunk matches its checksum, the
decoded arrays satisfy every invariant of the layout and the commit's digest, and, if the plan is known,
its segments are the plan's: rows, fingerprint, and tokens whose bytes are the text (in a generated
store: answers to each of its prompts, with byte ends that fit the tokens). A damaged shard does not
stop the check of the others. `--quick` reads commits and one listing, and no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.encoding.encoding import stored_specs
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
from store_schema.store.guards import REPAIR, RESTORE, check_commit
from store_schema.store.reader import MANIFEST_FILE
from store_tools.against_plan import COMPARED, FlatVocabulary, compare_with_plan
from store_tools.answers import ANSWERS_SETTING, compare_answers
from store_tools.leftovers import Leftover, find_leftovers, list_files
from store_tools.places import StorePlace, TolerantReader, planned_shard
from store_tools.shard_work import for_each_shard


@dataclass(slots=True)
class StoreReport:
    """Result of verifying one store.

    Args:
        name: The store's name in messages.
        sound: Shards without a fault.
        damaged: Shards that `store repair` can uncommit, and their faults.
        broken: Faults of the store as a whole and of its plan, which repair cannot correct.
        missing: Shards of the plan that are not there; None if the number of shards is not known.
        compared: Whether shards were compared with a plan.
        leftovers: Data of attempts without a commit, and temporary files.
        reader: The store as it was when it was opened; None if it cannot be opened.
        quick: Whether no data was read.
    """

    name: str
    sound: list[int] = field(default_factory=list)
    damaged: dict[int, LogitfuseError] = field(default_factory=dict)
    broken: list[LogitfuseError] = field(default_factory=list)
    missing: list[int] | None = None
    compared: bool = False
    leftovers: list[Leftover] = field(default_factory=list)
    reader: TolerantReader | None = None
    quick: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged; shards may be missing."""
        return not self.damaged and not self.broken


def verify_store(
    place: StorePlace,
    *,
    jobs: int | None = None,
    stop: StopFlag | None = None,
    quick: bool = False,
) -> StoreReport:
    """Check every byte of a store, or quickly its commits and the sizes of its files.

    Args:
        place: The store.
        jobs: Shards at a time; None takes one for each processor.
        stop: Checked between shards.
        quick: Read no data: one listing says which files are there, and how large they are.

    Raises:
        StorageError: Disk or object store cannot be read, which is not damage.
        Stopped: `stop` was set.
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
    report.quick = quick
    if _open_tables(reader, report):
        if quick:
            _check_sizes(reader, plan, report)
        else:
            _check_shards(reader, plan, report, jobs, stop)
    report.missing = _missing(reader, plan, report)
    report.leftovers = find_leftovers(reader)
    return report


def shard_of(key: str) -> int:
    """Shard of a commit's key."""
    return int(key.removeprefix("commits/").removesuffix(".json"))


def _sort_faults(reader: TolerantReader, report: StoreReport) -> None:
    """Sort faults of commits into damaged shards, and faults that uncommitting would make worse."""
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


def _plan_of(place: StorePlace, reader: TolerantReader, report: StoreReport) -> Plan | None:
    """The store's plan, None if there is none to compare with."""
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


def _require_number(reader: TolerantReader, plan: Plan) -> None:
    num_shards = reader.manifest.num_shards
    if num_shards is not None and num_shards > len(
        plan.shards
    ):  # a plan may grow after a store was begun
        raise MismatchError(
            "manifest and plan differ in the number of shards",
            where=reader.location.url,
            expected=f"at most {len(plan.shards)}",
            got=num_shards,
        )


def _open_tables(reader: TolerantReader, report: StoreReport) -> bool:
    """Read the tables that all shards share; return whether shards can be read at all."""
    readable = True
    # Shards need the second table, which their stored ranks refer to; the first has tokens' bytes.
    for table in ("vocabulary", "ranking"):
        try:
            getattr(reader, table)
        except CorruptionError as error:
            report.broken.append(error)
            readable = readable and table != "ranking"
    return readable


def _check_shards(
    reader: TolerantReader,
    plan: Plan | None,
    report: StoreReport,
    jobs: int | None,
    stop: StopFlag | None,
) -> None:
    sizes = {shard: stored_bytes(commit) for shard, commit in reader.commits.items()}
    flat = None if plan is None or report.broken else FlatVocabulary(reader.vocabulary)
    plan_faults: dict[int, LogitfuseError] = {}

    def look(shard: int) -> LogitfuseError | None:
        try:
            reader.verify(shard)
            if plan is not None:
                _compare(reader, plan, shard, flat, plan_faults)
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


def _check_sizes(reader: TolerantReader, plan: Plan | None, report: StoreReport) -> None:
    """Check commits against layout and plan, and their files against a listing."""
    shard_at = {commit.path: shard for shard, commit in reader.commits.items()}
    found = dict.fromkeys(reader.commits, 0)
    for entry in list_files(reader.location):
        path = "/".join(entry.key.split("/", 2)[:2])
        shard = shard_at.get(path)
        if shard is None:
            continue
        record = reader.commits[shard].files.get(entry.key.removeprefix(f"{path}/"))
        if record is not None:
            found[shard] += 1
            if record.size != entry.size:
                where = f"{reader.location.url}/{entry.key}"
                report.damaged[shard] = _size_fault(where, f"{record.size:,} bytes", entry.size)
    specs = stored_specs(reader.manifest.form, reader.manifest.encoding)
    for shard, commit in reader.commits.items():
        where = f"{reader.location.url}, shard {shard}"
        try:
            check_commit(commit, reader.manifest, specs, where)
            if plan is not None:
                reader.require_shards([planned_shard(plan, shard, where)])
        except LogitfuseError as error:
            report.damaged.setdefault(shard, error)
        if found[shard] != len(commit.files):
            fault = _size_fault(where, f"{len(commit.files)} files", found[shard])
            report.damaged.setdefault(shard, fault)
    report.sound += sorted(reader.commits.keys() - report.damaged.keys())


def _size_fault(where: str, expected: str, got: int) -> CorruptionError:
    return CorruptionError(
        "files are not those of the commit", where=where, expected=expected, got=got, hint=REPAIR
    )


def stored_bytes(commit: Commit) -> int:
    """Size of a shard's files."""
    return sum(record.size for record in commit.files.values())


def _missing(reader: TolerantReader, plan: Plan | None, report: StoreReport) -> list[int] | None:
    num_shards = reader.manifest.num_shards if plan is None else len(plan.shards)
    if num_shards is None:
        return None
    there = reader.commits.keys() | {shard_of(key) for key in reader.faults}
    return [shard for shard in range(num_shards) if shard not in there]


def _compare(
    reader: TolerantReader,
    plan: Plan,
    shard: int,
    flat: FlatVocabulary | None,
    plan_faults: dict[int, LogitfuseError],
) -> None:
    """Compare one shard with the plan.

    Args:
        reader: The store.
        plan: Its plan.
        shard: A committed shard that is sound in itself.
        flat: The store's vocabulary; None, if it is damaged, skips the check of the tokens' bytes.
        plan_faults: Gets, by shard, errors of the plan's own segments.

    Raises:
        CorruptionError: The shard is not of the plan's segments.
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
        vocabulary = None if flat is None else flat.vocabulary
        per_prompt = reader.manifest.settings.get(ANSWERS_SETTING)
        compare_answers(reader.read(shard, TEXT_ARRAYS), segments, per_prompt, vocabulary, where)
    else:
        compare_with_plan(reader.read(shard, COMPARED), record, segments, flat, where)
