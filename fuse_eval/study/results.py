"""What a study has seen so far, read from what its trainings left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuse_eval.interference.blocks import Blocks
from fuse_eval.study.answers import AnswerRecord, read_answers
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.grid import Cell, Place, Recipe, cells_of
from fuse_eval.study.harness import HarnessRecord, read_harness
from fuse_eval.study.records import TrainingRecord, best_of, cell_recipes, read_record
from fuse_eval.study.text import SCORES_FILE, StudyText
from fuse_eval.summary import POOL_FILE


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One seed of a setting.

    Args:
        seed: The seed.
        blocks: The scored split; NLL by the name of the row, each at its best recipe.
        trainings: The record of each row's best recipe.
        pool: What `eval pool` says of the setting's sources; {} where it is not there.
        answers: By row; rows that were not asked are left out.
        tasks: Results of lm-evaluation-harness, likewise.
    """

    seed: int
    blocks: Blocks
    trainings: Mapping[str, TrainingRecord]
    pool: Mapping[str, Any]
    answers: Mapping[str, AnswerRecord] = field(default_factory=dict)
    tasks: Mapping[str, HarnessRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a seed of a setting is.

    Args:
        done: Trainings and scorings that are done.
        total: Of all.
        seconds: Of the trainings that are done, without evaluations.
    """

    done: int
    total: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """Of the trainings that are left, if they take as long as those that are done; None if none
        is."""
        if self.done == self.total:
            return 0.0
        return (self.total - self.done) * self.seconds / self.done if self.seconds else None


def seed_result(study: StudyConfig, place: Place) -> SeedResult | None:
    """Rows that are whole at one seed; None where not even the control is."""
    file = place.data.text_file
    if not file.is_file():
        return None
    text = StudyText(place.data.run, study.split, file)
    by_name = {cell.name: cell for cell in cells_of(study, place)}
    nats: dict[str, tuple[float, ...]] = {}
    trainings: dict[str, TrainingRecord] = {}
    folders: dict[str, Path] = {}
    answers: dict[str, AnswerRecord] = {}
    tasks: dict[str, HarnessRecord] = {}
    harness = study.setting(place.setting).harness
    for name in study.rows_of(place.setting):
        cell = by_name[name]
        if cell.row.model is not None:
            if (cell.model_results / SCORES_FILE).is_file():
                folders[name] = cell.model_results
        else:
            best = best_of(_recipes(cell, by_name))
            if best is not None:
                folders[name], trainings[name] = best[0].results, best[1]
        if name in folders:
            nats[name] = text.nats(folders[name])
            told = read_answers(folders[name])
            if told is not None:
                answers[name] = told
            done = read_harness(folders[name], harness)
            if done is not None:
                tasks[name] = done
    if study.control not in nats:
        return None
    pool = place.pool(study.results) / POOL_FILE
    content = json.loads(pool.read_text(encoding="utf-8")) if pool.is_file() else {}
    return SeedResult(place.seed, text.record.blocks(nats), trainings, content, answers, tasks)


def _recipes(cell: Cell, by_name: Mapping[str, Cell]) -> tuple[Recipe, ...]:
    return cell_recipes(cell, by_name.get(cell.row.tuned_as or "")) or ()


@dataclass(frozen=True, slots=True)
class Unit:
    """One training, or the scoring of one model that is there already.

    Args:
        number: Among those of its seed, whatever is done.
        cell: Its row.
        recipe: What is trained; None of a model, and of a row that is tuned as one that is not all
            trained yet.
    """

    number: int
    cell: Cell
    recipe: Recipe | None

    @property
    def waits(self) -> bool:
        """Whether another row has to be trained before."""
        return self.recipe is None and self.cell.row.model is None

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        if self.recipe is not None:
            return read_record(self.recipe.results) is not None
        return not self.waits and (self.cell.model_results / SCORES_FILE).is_file()


def units_of(study: StudyConfig, place: Place) -> Iterator[Unit]:
    """All of a seed, rows that are tuned as others last; what is trained meanwhile counts."""
    cells = cells_of(study, place)
    by_name = {cell.name: cell for cell in cells}
    number = 0
    for cell in cells:
        for recipe in _recipes(cell, by_name) or (None,):
            yield Unit(number, cell, recipe)
            number += 1


def progress_of(study: StudyConfig, place: Place) -> Progress:
    """How much of a seed is done; reads only what trainings leave."""
    done, total, seconds = 0, 0, 0.0
    for unit in units_of(study, place):
        total += 1
        record = None if unit.recipe is None else read_record(unit.recipe.results)
        if record is not None:
            done, seconds = done + 1, seconds + record.seconds
        else:
            done += unit.done
    return Progress(done, total, seconds)
