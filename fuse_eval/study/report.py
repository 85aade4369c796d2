"""A study's record, and its text for terminals and documents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from fuse_eval.study.config import StudyConfig
from fuse_eval.study.figures import setting_record
from fuse_eval.study.grid import Place, place_of
from fuse_eval.study.results import seed_result
from fuse_eval.study.tables import (
    Grid,
    answers_grid,
    gates_grid,
    markdown_table,
    pools_grid,
    settings_grid,
    tasks_grid,
    text_table,
)
from fuse_eval.study.verdict import notes, verdict
from store_schema import SCHEMA_VERSION, __version__
from store_schema.errors import MissingError
from store_schema.plan.run_plan import open_plan

_TEXT_SHOWN = 300
"""Characters of a document's text."""


def study_record(study: StudyConfig) -> dict[str, Any]:
    """Content of study.json, from all that is done.

    Raises:
        MissingError: The control is trained in no setting yet.
    """
    settings = {}
    for name in study.settings:
        places = [place_of(study, name, seed) for seed in study.setting(name).seeds]
        seen = [seed_result(study, place) for place in places]
        there = [result for result in seen if result is not None]
        if there:
            settings[name] = setting_record(study, name, there)
            _add_texts(settings[name].get("worst_documents", []), places, study.split)
    if not settings:
        raise MissingError(
            "nothing to show yet", where=study.results, hint="`logitfuse study run` trains the rows"
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "by": __version__,
        "settings": settings,
        "study": study.model_dump(mode="json", exclude_unset=True),
    }


def _add_texts(documents: Sequence[dict[str, Any]], places: Sequence[Place], split: str) -> None:
    """Put the beginning of each document's text beside its figures, where its plan is there."""
    plans = {}
    for place in places:
        with contextlib.suppress(MissingError):
            plans[place.seed] = open_plan(place.data.run)
    for item in documents:
        plan = plans.get(item["seed"])
        if plan is not None:
            segments = (s for shard in plan.splits()[split] for s in plan.segments(shard))
            own = [s.text for s in segments if s.document_id == item["document_id"]]
            item["text"] = "".join(own)[:_TEXT_SHOWN]


def further_grids(study: StudyConfig, found: Mapping[str, Any]) -> list[Grid]:
    """The tables below a setting's first one, those that there is something for."""
    made = (
        *(answers_grid(study, found), tasks_grid(study, found)),
        *(pools_grid(found), gates_grid(study, found)),
    )
    return [grid for grid in made if grid is not None]


def text(study: StudyConfig, record: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = []
    for name, found in record["settings"].items():
        parts.append(f"{name}: bits per byte ({_of_seeds(found)})")
        parts.append(text_table(settings_grid(study, found)))
        for grid in further_grids(study, found):
            parts += ["", text_table(grid)]
        parts += ["", verdict(study, name, found), *notes(study, found), ""]
    return _plain("\n".join(parts).rstrip("\n"))


def markdown(study: StudyConfig, record: Mapping[str, Any]) -> str:
    """For a document."""
    parts = [f"# {study.name}", ""]
    for name, found in record["settings"].items():
        parts += [f"## {name}", "", verdict(study, name, found), ""]
        parts += [f"Bits per byte, {_of_seeds(found)}.", ""]
        parts.append(markdown_table(settings_grid(study, found)))
        for grid in further_grids(study, found):
            parts += ["", markdown_table(grid)]
        parts += ["", *(f"- {note}" for note in notes(study, found)), ""]
    return _plain("\n".join(parts))


def _plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("−", "-")


def _of_seeds(found: Mapping[str, Any]) -> str:
    count = len(found["seeds"])
    return "one seed" if count == 1 else f"mean of {count} seeds"
