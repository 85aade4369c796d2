"""Doing what a study has not done yet: the data of each setting, then every training, scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuse_eval import bpb
from fuse_eval.study.config import Row, StudyConfig
from fuse_eval.study.grid import RUN_FILE, Cell, Data, Recipe, cells_of
from fuse_eval.study.records import (
    TrainingRecord,
    cell_recipes,
    made_record,
    read_record,
    write_record,
)
from fuse_eval.study.stages import LOG_FILE, run_command
from fuse_eval.study.text import SCORES_FILE, StudyText, text_file
from launch.signals import StopFlag
from launch.work import Worker
from store_schema.config import ModelRef, RunConfig

DATA_STAGES = (("corpus", "build"), ("extract", "plan"), ("extract", "run"), ("align", "run"))
POOL_STAGE = ("eval", "pool")
DROPPED = ("checkpoints", "final", "pairs", "control")
"""Folders of a training that are removed once it is scored: large, and of no use for the comparison."""


def text_of(study: StudyConfig, data: Data) -> StudyText:
    """The text that a setting's rows are scored on.

    Raises:
        MissingError: The setting's plan is not there.
    """
    return StudyText(data.run, study.split, text_file(study, data))


def make_data(study: StudyConfig, data: Data, stop: StopFlag) -> None:
    """Make inputs, corpus, plan and stores, and estimate the pools; what is there is left."""
    run_file, log = data.write(), data.folder / LOG_FILE
    for command in data.commands:
        run_command(command, log, stop)
    for stage in (*DATA_STAGES, POOL_STAGE):
        run_command(["python", "-m", "logitfuse", *stage, str(run_file)], log, stop)
    text_of(study, data)


def align_own(recipe: Recipe, stop: StopFlag) -> None:
    """Align the stores in the recipe's way, where the setting's alignment is another."""
    if recipe.run.aligned_dir is not None:
        words = ["python", "-m", "logitfuse", "align", "run", str(recipe.folder / RUN_FILE)]
        run_command(words, recipe.folder / LOG_FILE, stop)


def train(study: StudyConfig, recipe: Recipe, text: StudyText, stop: StopFlag) -> TrainingRecord:
    """Train and score one recipe, unless that was done."""
    found = read_record(recipe.folder)
    if found is None:
        path = recipe.write()
        align_own(recipe, stop)
        words = [*study.train_with, "train", "run", str(path)]
        run_command(words, recipe.folder / LOG_FILE, stop)
        ref = bpb.checkpoint_ref(recipe.folder / "final", recipe.run.target)
        text.score(ref, recipe.folder, stop)
        found = made_record(recipe)
        write_record(recipe.folder, found)
    for name in DROPPED:
        shutil.rmtree(recipe.folder / name, ignore_errors=True)
    return found


def model_of(run: RunConfig, row: Row) -> tuple[ModelRef, str]:
    """The model of a row that is not trained, and whose tokenizer it has."""
    assert row.model is not None
    if row.model == "target":
        return run.target, "target"
    if row.model in run.sources:
        return run.sources[row.model], row.model
    return bpb.checkpoint_ref(Path(row.model), run.target), "target"


@dataclass(frozen=True, slots=True)
class Done:
    """One thing that was done now or before.

    Args:
        title: Row and recipe.
        bpb: Mean bits per byte on the validation split; None of a model that is not trained.
        seconds: That it took now.
    """

    title: str
    bpb: float | None
    seconds: float


def run_seed(
    study: StudyConfig, setting: str, seed: int, worker: Worker, stop: StopFlag
) -> Iterator[Done]:
    """Do this worker's part of one seed of a setting, row by row.

    Rows that are tuned as others come last. Those whose recipe other workers have not found yet are
    left to a later call.

    Raises:
        MissingError: The setting's data are not there.
        CommandError: A training failed.
        Stopped: On a signal; what is scored stays.
    """
    cells = cells_of(study, setting, seed)
    by_name = {cell.name: cell for cell in cells}
    data, text = cells[0].data, text_of(study, cells[0].data)
    number = 0
    for cell in cells:
        # Asked when it is its turn: the row that it is tuned as is done by then, or another's.
        recipes = cell_recipes(cell, by_name.get(cell.row.tuned_as or ""))
        for recipe in recipes or (None,):
            mine, number = number % worker.count == worker.index, number + 1
            started = time.monotonic()
            if not mine:
                continue
            if recipe is not None:
                record = train(study, recipe, text, stop)
                title = " ".join(filter(None, (cell.name, recipe.title)))
                yield Done(title, record.best, time.monotonic() - started)
            elif cell.row.model is not None:
                score_model(cell, data, text, stop)
                yield Done(cell.name, None, time.monotonic() - started)
            stop.progressed = True


def score_model(cell: Cell, data: Data, text: StudyText, stop: StopFlag) -> None:
    """Score a model that is there already, unless that was done."""
    if not (cell.model_folder / SCORES_FILE).is_file():
        ref, tokenizer = model_of(data.run, cell.row)
        text.score(ref, cell.model_folder, stop, tokenizer=tokenizer)
