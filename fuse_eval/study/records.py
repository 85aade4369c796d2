"""What is kept of a training when its weights are gone: a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fuse_eval.study.grid import Cell, Recipe
from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import ConfigError

RECORD_FILE = "training.json"
_AGAIN = "delete it, and the training is done again"


class ValidScore(StrictModel):
    """Bits per byte by domain on the validation split after some steps."""

    step: int = Field(ge=0)
    bpb: dict[str, float]

    @property
    def mean(self) -> float:
        """Of the domains."""
        return sum(self.bpb.values()) / len(self.bpb)


class Gate(StrictModel):
    """A selector's weights in the last quarter of a training, means of its steps, by source."""

    weight: dict[str, float]
    """Mean over positions."""
    spread: dict[str, float]
    """Standard deviation over positions."""
    spread_within: dict[str, float]
    """The same within a domain, mean of the domains."""


class TrainingRecord(StrictModel):
    """training.json: one training, scored."""

    schema_version: int = SCHEMA_VERSION
    row: str
    tuning: dict[str, Any]
    valid: tuple[ValidScore, ...] = Field(min_length=1)
    """At every evaluation, the first before training. With pairwise fusion of all pairs, one after
    the other."""
    num_steps: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    """Tokens of all steps."""
    seconds: float = Field(ge=0)
    """Of all steps, without evaluations."""
    gate: Gate | None = None
    """None of plain training, of pairs, and of records from before it was kept."""

    @property
    def best(self) -> float:
        """The lowest mean on the validation split: of that evaluation are the weights."""
        return min(score.mean for score in self.valid)


def made_record(recipe: Recipe) -> TrainingRecord:
    """The record of a training that has just ended, from its step logs.

    Raises:
        ConfigError: It was never evaluated on the validation split, by which recipes are compared.
    """
    logs = sorted(recipe.folder.rglob("logs/train_steps.jsonl"))
    lines = [line for log in logs for line in _steps(log)]
    valid = [
        ValidScore(step=line["step"], bpb=line["valid_bpb"])
        for line in lines
        if line.get("valid_bpb")
    ]
    if not valid:
        raise ConfigError(
            "a training of the study was not evaluated",
            where=recipe.folder,
            expected="bits per byte on the validation split",
            hint="a study needs text in train.valid_split",
        )
    gate = made_gate(lines) if len(logs) == 1 else None
    taken = [line for line in lines if line.get("seconds") and line.get("tokens_per_s")]
    return TrainingRecord(
        row=recipe.row,
        tuning=dict(recipe.tuning),
        valid=tuple(valid),
        num_steps=max(line["step"] for line in lines),
        num_tokens=round(sum(line["tokens_per_s"] * line["seconds"] for line in taken)),
        seconds=sum(line["seconds"] for line in taken),
        gate=gate,
    )


def made_gate(lines: Sequence[Mapping[str, Any]]) -> Gate | None:
    """From a step log's lines; None where no step has weights."""
    steps = [line for line in lines if "weight_spread" in line]
    last = steps[3 * len(steps) // 4 :]
    if not last:
        return None
    sources = list(last[-1]["weights"])

    def mean(values: Iterable[float]) -> float:
        found = list(values)
        return sum(found) / len(found)

    within = {
        name: [[by[name] for by in line["weight_spread_by_domain"].values()] for line in last]
        for name in sources
    }
    return Gate(
        weight={name: mean(line["weights"][name] for line in last) for name in sources},
        spread={name: mean(line["weight_spread"][name] for line in last) for name in sources},
        spread_within={name: mean(map(mean, within[name])) for name in sources},
    )


def _steps(log: Path) -> Iterable[Mapping[str, Any]]:
    """Lines of a step log, of a step that was done twice the last one."""
    by_step: dict[int, Mapping[str, Any]] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        by_step[line["step"]] = line
    return by_step.values()


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Keep the record: the training counts as done from then on."""
    open_location(str(folder)).write_atomic(RECORD_FILE, seal(record))


def read_record(folder: Path) -> TrainingRecord | None:
    """The record of a training that was done; None where it was not.

    Raises:
        CorruptionError: It is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    return unseal(TrainingRecord, path.read_bytes(), where=str(path), hint=_AGAIN)


def best_of(recipes: Iterable[Recipe]) -> tuple[Recipe, TrainingRecord] | None:
    """The recipe that is best on the validation split; None where one is not trained yet."""
    found = [(recipe, read_record(recipe.results)) for recipe in recipes]
    done = [(recipe, record) for recipe, record in found if record is not None]
    if len(done) < len(found) or not done:
        return None
    return min(done, key=lambda pair: pair[1].best)


def cell_recipes(cell: Cell, tuned: Cell | None = None) -> tuple[Recipe, ...] | None:
    """The recipes of a row: its own, or the one that the row it is tuned as has found.

    Args:
        cell: The row at a seed.
        tuned: The row that it is tuned as.

    Returns:
        None where that row is not all trained yet.
    """
    if cell.row.tuned_as is None:
        return cell.recipes
    assert tuned is not None
    best = best_of(tuned.recipes)
    return None if best is None else (cell.recipe(best[0].tuning),)
