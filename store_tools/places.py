"""The stores that a command works on: one by its folder or URL, or all of a run by the run file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from store_schema.config import RunConfig, load_run
from store_schema.disk.location import Location, open_location
from store_schema.errors import ConfigError, CorruptionError, MissingError, StoreError
from store_schema.layout import KINDS, Kind
from store_schema.manifest import Commit
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.plan.run_plan import plan_location
from store_schema.store.reader import MANIFEST_FILE, StoreReader

STAGES: dict[Kind, str] = {
    "source": "extract run",
    "generated": "extract generate",
    "aligned": "align run",
}
URLS: dict[Kind, Callable[[RunConfig, str], str]] = {
    "source": RunConfig.store_url,
    "generated": RunConfig.generated_url,
    "aligned": RunConfig.aligned_url,
}


class TolerantReader(StoreReader):
    """A reader of stores in which some commits may be damaged.

    `commits` has only those that can be read; `faults` has the errors of the others by key.
    """

    @cached_property
    def _scanned(self) -> tuple[dict[int, Commit], dict[str, StoreError]]:
        return self.scan()

    @cached_property
    def commits(self) -> dict[int, Commit]:
        """Readable commits by shard, as of the first access."""
        return self._scanned[0]

    @cached_property
    def faults(self) -> dict[str, StoreError]:
        """Errors of the other commits, by their keys."""
        return self._scanned[1]

    def fresh(self) -> TolerantReader:
        """A new reader of the same store, with its current commits."""
        return TolerantReader(self.location, self.manifest)


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A store that a command works on.

    Args:
        name: Its name in messages: "stores/code" of a run, else its folder or URL as given.
        location: Where it is.
        plan_location: Where its plan should be; None if not known.
        plan_is_given: Whether the user named the plan or the run, so that it must be there.
        run_file: The run file that names it, if the user gave one.
    """

    name: str
    location: Location
    plan_location: Location | None
    plan_is_given: bool
    run_file: str | None = None

    def open(self) -> TolerantReader:
        """Open the store.

        Raises:
            MissingError: There is none (yet).
            CorruptionError: The manifest is damaged.
        """
        return TolerantReader(self.location, StoreReader.open(self.location).manifest)

    def plan(self) -> Plan | None:
        """The plan, None if there is none to compare with.

        Raises:
            MissingError: The plan that was named is not there.
            CorruptionError: plan.json is damaged.
        """
        if self.plan_location is None:
            return None
        return (Plan.open if self.plan_is_given else Plan.find)(self.plan_location)

    def rerun(self, kind: Kind, source: str) -> str:
        """The command that writes the store's missing shards."""
        run_file = "RUN.yaml" if self.run_file is None else shlex.quote(self.run_file)
        return f"logitfuse {STAGES[kind]} {run_file} --source {shlex.quote(source)}"


def find_places(
    target: str,
    *,
    sources: Sequence[str] = (),
    kind: Kind | None = None,
    plan: str | None = None,
) -> list[StorePlace]:
    """The stores of the argument TARGET.

    Args:
        target: Folder or URL of a store, or a run file.
        sources: With a run file: only stores of these sources.
        kind: With a run file: only stores of this kind.
        plan: Folder or URL of the plan; None takes the run's, or the one beside the store.

    Raises:
        ConfigError: Options that do not go with the target.
        MissingError: There is no such store or run file.
    """
    plan_given = None if plan is None else open_location(plan)
    if "://" not in target and Path(target).is_file():
        return _run_places(target, load_run(target), sources, kind, plan_given)
    if sources or kind:
        raise ConfigError(
            "a store was given, not a run file",
            where="--source" if sources else "--kind",
            hint="leave the option out, or give the run file",
        )
    if "://" not in target and not Path(target).is_dir():
        raise MissingError("no store and no run file", where=target, hint="check the path")
    location = open_location(target)
    beside = location if plan_given else _plan_beside(location)
    return [StorePlace(target, location, plan_given or beside, plan_given is not None)]


def one_place(places: Sequence[StorePlace]) -> StorePlace:
    """The only store of `places`.

    Raises:
        ConfigError: There are several.
    """
    if len(places) > 1:
        raise ConfigError(
            "several stores, one is wanted",
            where="the run file",
            expected="--source and --kind that leave one",
            got=", ".join(place.name for place in places),
        )
    return places[0]


def _run_places(
    run_file: str,
    run: RunConfig,
    sources: Sequence[str],
    kind: Kind | None,
    plan: Location | None,
) -> list[StorePlace]:
    unknown = set(sources) - set(run.sources)
    if unknown:
        raise ConfigError(
            "no such source",
            where="--source",
            expected=", ".join(run.sources),
            got=", ".join(sorted(unknown)),
        )
    urls = [
        URLS[wanted](run, source)
        for wanted in ((kind,) if kind else KINDS)
        for source in sources or run.sources
    ]
    begun = [url for url in urls if _is_begun(open_location(url))]
    if not begun:
        raise MissingError(
            "no store yet", where=", ".join(urls), hint="run `logitfuse extract run` first"
        )
    plan = plan or plan_location(run.data_folder)
    return [
        StorePlace(
            url.removeprefix(f"{run.data_folder}/").removeprefix(f"{run.folder}/"),
            open_location(url),
            plan,
            True,
            run_file,
        )
        for url in begun
    ]


def _is_begun(location: Location) -> bool:
    """Whether any part of a store is there, so that one without its manifest is reported."""
    return location.exists(MANIFEST_FILE) or bool(location.names("commits"))


def _plan_beside(location: Location) -> Location | None:
    """Where a run keeps the plan of a store: <run>/plan for <run>/stores/<name>."""
    if "://" in location.url:
        scheme, path = location.url.split("://", 1)
        parts = path.split("/")
        return plan_location(f"{scheme}://{'/'.join(parts[:-2])}") if parts[2:] else None
    return plan_location(Path(os.path.realpath(location.url)).parent.parent)


def planned_shard(plan: Plan, shard: int, where: str) -> ShardRecord:
    """A shard's record in the plan.

    Raises:
        CorruptionError: The plan has no such shard.
    """
    if shard >= len(plan.shards):
        raise CorruptionError(
            "shard is not in the plan", where=where, expected=f"below {len(plan.shards)}", got=shard
        )
    return plan.shards[shard]
