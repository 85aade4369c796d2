"""What a study has seen so far, read from what its trainings left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fuse_eval.interference.blocks import Blocks
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.grid import Cell, Recipe, cells_of
from fuse_eval.study.records import TrainingRecord, best_of, cell_recipes
from fuse_eval.study.text import SCORES_FILE, StudyText, text_file
from fuse_eval.summary import POOL_FILE, read_json, report_location


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One seed of a setting.

    Args:
        seed: The seed.
        blocks: The scored split; NLL by the name of the row, each at its best recipe.
        trainings: The record of each row's best recipe.
        pools: Pools of the aligned sources by selector, {domain: bits per byte}, on the rows that
            every source has a distribution for; the target's own under `target`.
    """

    seed: int
    blocks: Blocks
    trainings: Mapping[str, TrainingRecord]
    pools: Mapping[str, Mapping[str, float]]


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


def seed_result(study: StudyConfig, setting: str, seed: int) -> SeedResult | None:
    """Rows that are whole at one seed; None where not even the text is there, or the control."""
    cells = cells_of(study, setting, seed)
    data = cells[0].data
    if not text_file(study, data).is_file():
        return None
    text = StudyText(data.run, study.split, text_file(study, data))
    by_name = {cell.name: cell for cell in cells}
    nats: dict[str, tuple[float, ...]] = {}
    trainings: dict[str, TrainingRecord] = {}
    for name in study.rows_of(setting):
        cell = by_name[name]
        if cell.row.model is not None:
            if (cell.model_folder / SCORES_FILE).is_file():
                nats[name] = text.nats(cell.model_folder)
        else:
            best = best_of(_recipes(cell, by_name))
            if best is not None:
                nats[name] = text.nats(best[0].folder)
                trainings[name] = best[1]
    if study.control not in nats:
        return None
    pool = read_json(report_location(data.run), POOL_FILE) or {}
    pools = {**pool.get("pool_bpb", {}), "target": pool["target_bpb"]} if pool else {}
    return SeedResult(seed, text.record.blocks(nats), trainings, pools)


def _recipes(cell: Cell, by_name: Mapping[str, Cell]) -> tuple[Recipe, ...]:
    return cell_recipes(cell, by_name.get(cell.row.tuned_as or "")) or ()


def progress_of(study: StudyConfig, setting: str, seed: int) -> Progress:
    """How much of a seed is done; reads only what trainings leave."""
    cells = cells_of(study, setting, seed)
    by_name = {cell.name: cell for cell in cells}
    done, total, seconds = 0, 0, 0.0
    for cell in cells:
        if cell.row.model is not None:
            total, done = total + 1, done + (cell.model_folder / SCORES_FILE).is_file()
            continue
        recipes = _recipes(cell, by_name)
        total += len(recipes) or 1
        for recipe in recipes:
            best = best_of([recipe])
            if best is not None:
                done, seconds = done + 1, seconds + best[1].seconds
    return Progress(done, total, seconds)
