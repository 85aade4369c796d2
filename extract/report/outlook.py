"""After planning, shows how many shards of each store are kept and which stores a stage will refuse.

This calls the checks of the stages themselves, so it agrees with what they do.
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
    """Lines on each source's finished and pending shards; none before the first extraction.

    Args:
        run: The run file.
        plan: The plan as it is now.
        only_refused: Show only stores that their stage will refuse.
    """
    lines = []
    refused: set[str] = set()
    for what, stage, url_of, kept_shards in (
        ("", "extract", run.store_url, partial(_extracted, run, plan)),
        ("aligned ", "align", run.aligned_url, partial(_aligned, run)),
    ):
        # An aligned store is not checked if its source store is refused.
        outlooks = {
            name: _outlook(url_of(name), plan, partial(kept_shards, name))
            for name in run.sources
            if name not in refused
        }
        refused |= {name for name, (_, refusal) in outlooks.items() if refusal}
        if not any(finished or refusal for finished, refusal in outlooks.values()):
            continue
        for name, (finished, refusal) in outlooks.items():
            left = len(plan.shards) - finished
            shards = f"{finished} of {len(plan.shards)} shards"
            if refusal:
                lines.append(f"{what}{name}: {shards}, refused by `{stage} run`: {refusal}")
            elif not only_refused:
                kept = f"{shards} kept" if finished else "no shards yet"
                lines.append(f"{what}{name}: {kept}" + (f", {left} to {stage}" if left else ""))
    return lines


def _outlook(
    url: str, plan: Plan, kept_shards: Callable[[], set[int] | None]
) -> tuple[int, str | None]:
    """Number of finished shards of a store, and the message with which its stage refuses it, if so."""
    if not open_location(url).exists(MANIFEST_FILE):
        return 0, None
    try:
        kept = kept_shards()
    except MissingError:
        kept = None  # an aligned store whose source store is elsewhere
    except LogitfuseError as error:
        return _finished(url, plan), error.line()
    return (_finished(url, plan) if kept is None else len(kept)), None


def _extracted(run: RunConfig, plan: Plan, name: str) -> set[int]:
    """Shards that `extract run` will keep. Where the model is not on this machine, only its identity
    is compared."""
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
