"""What a run has of its plan, and what the next stages will make of it, told right after planning.

The stages themselves are asked, so what is called kept here is what they go on with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from extract.scoring.sources import check_source
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import LogitfuseError, MissingError, StoreError
from store_schema.model.models import local_copy
from store_schema.plan.plan import Plan
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.store.same_source import require_same_source


def store_lines(run: RunConfig, plan: Plan, *, only_refused: bool = False) -> list[str]:
    """What is there of each source for this plan, and what is to do; nothing before extraction.

    Args:
        run: The run file.
        plan: As it stands now.
        only_refused: Leave out what goes on.
    """
    lines = []
    refused: set[str] = set()
    for what, stage, url_of, goes_on in (
        ("", "extract", run.store_url, partial(_extracted, run, plan)),
        ("aligned ", "align", run.aligned_url, partial(_aligned, run)),
    ):
        # What a refused source was aligned from is in question itself.
        outlooks = {
            name: _outlook(url_of(name), plan, partial(goes_on, name))
            for name in run.sources
            if name not in refused
        }
        refused |= {name for name, (_, refusal) in outlooks.items() if refusal}
        if not any(finished or refusal for finished, refusal in outlooks.values()):
            continue
        for name, (finished, refusal) in outlooks.items():
            left = len(plan.shards) - finished
            there = f"{finished} of {len(plan.shards)} shards"
            if refusal:
                lines.append(f"{what}{name}: {there}, refused by `{stage} run`: {refusal}")
            elif not only_refused:
                kept = f"{there} kept" if finished else "nothing there"
                lines.append(f"{what}{name}: {kept}" + (f", {left} to {stage}" if left else ""))
    return lines


def _outlook(
    url: str, plan: Plan, goes_on: Callable[[], set[int] | None]
) -> tuple[int, str | None]:
    """Finished shards of a store, and the line that its stage refuses it with."""
    if not open_location(url).exists(MANIFEST_FILE):
        return 0, None
    try:
        kept = goes_on()
    except MissingError:
        kept = None  # an aligned store whose source store is elsewhere
    except LogitfuseError as error:
        return _finished(url, plan), error.line()
    return (_finished(url, plan) if kept is None else len(kept)), None


def _extracted(run: RunConfig, plan: Plan, name: str) -> set[int]:
    """Shards that `extract run` goes on with. Planning needs no weights: where they are not here, the
    model alone is compared."""
    if local_copy(run.sources[name]) is not None:
        return check_source(run, name, plan).committed()
    reader = StoreReader.open(open_location(run.store_url(name)))
    if reader.commits:
        require_same_source(run, name, reader, plan)
    return reader.committed(plan.shards)


def _aligned(run: RunConfig, name: str) -> set[int] | None:
    section = run.sections.get("align")
    return None if section is None else section.finished_shards(run, name)


def _finished(url: str, plan: Plan) -> int:
    try:
        return len(StoreReader.open(open_location(url)).committed(plan.shards))
    except StoreError:
        return 0
