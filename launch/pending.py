"""The work of a run that is left, from its plan, its commits and its final folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launch.stages import Stage
from launch.summary import logs_folder, pair_folders
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import MissingError
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader

_DONE_FILE = "done.json"
"""File of a finished training in its final folder."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Work of a run that is not finished.

    Args:
        extract: Shards not extracted, by source.
        align: Shards not aligned, by source.
        train: Whether there is something to train.
        pairs: With pairwise training, sources whose pair is not trained.
    """

    extract: Mapping[str, Collection[int]]
    align: Mapping[str, Collection[int]]
    train: bool
    pairs: tuple[str, ...] = ()

    def require_extracted(self, stages: Collection[Stage], sources: Collection[str]) -> None:
        """Refuse an alignment whose source is neither extracted nor to be extracted by these stages.

        Raises:
            MissingError: The message names the source.
        """
        if "align" not in stages or "extract" in stages:
            return
        for source in sources:
            if self.extract[source] and self.align[source]:
                raise MissingError(
                    "a source is not extracted",
                    where=source,
                    got=f"{len(self.extract[source])} shards pending",
                    hint="`logitfuse submit extract` submits its extraction and what follows",
                )


def find_pending(run: RunConfig) -> Pending:
    """The work that is left.

    Raises:
        MissingError: There is no plan.
        MismatchError: A store was made from another plan.
        CorruptionError: A commit is damaged.
    """
    plan = open_plan(run)
    return Pending(
        extract={source: _pending(plan, run.store_url(source)) for source in run.sources},
        align={source: _pending(plan, run.aligned_url(source)) for source in run.sources},
        train=not _trained(run),
        pairs=tuple(
            name
            for name, folder in pair_folders(run).items()
            if not (folder / "final" / _DONE_FILE).exists()
        ),
    )


def _pending(plan: Plan, url: str) -> tuple[int, ...]:
    try:
        reader = StoreReader.open(open_location(url))
    except MissingError:
        return tuple(shard.index for shard in plan.shards)
    reader.require_plan(plan)
    committed = reader.committed(plan.shards)
    return tuple(shard.index for shard in plan.shards if shard.index not in committed)


def _trained(run: RunConfig) -> bool:
    folder = logs_folder(run).parent
    finals = [folder / "final"]
    if getattr(run.sections.get("train"), "control", True):
        finals.append(folder / "control" / "final")
    return all((final / _DONE_FILE).exists() for final in finals)
