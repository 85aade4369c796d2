"""Doing what a study has not done yet: the data of each setting, then every training, scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuse_eval import bpb
from fuse_eval.study.answers import StudyAnswers
from fuse_eval.study.config import Row, StudyConfig
from fuse_eval.study.grid import RUN_FILE, Cell, Data, Place, Recipe, pool_run
from fuse_eval.study.harness import StudyHarness
from fuse_eval.study.records import (
    TrainingRecord,
    made_record,
    read_record,
    write_record,
)
from fuse_eval.study.results import progress_of, units_of
from fuse_eval.study.stages import LOG_FILE, one_at_a_time, run_command
from fuse_eval.study.text import SCORES_FILE, StudyText
from fuse_eval.summary import POOL_FILE, REPORT_FOLDER
from fuse_train.machine.precision import PRECISION_FILE
from launch.signals import StopFlag
from launch.work import Worker
from store_schema.config import ModelRef, RunConfig

LOGITFUSE = ("python", "-m", "logitfuse")
STAGES = (("corpus", "build"), ("extract", "plan"), ("extract", "run"), ("align", "run"))
DROPPED = ("checkpoints", "final", "pairs", "control")
"""Folders of a training that are removed once it is scored: large, and of no use for the comparison."""


def make_data(study: StudyConfig, place: Place, stop: StopFlag) -> None:
    """Make inputs, corpus, plan and stores, and estimate the pools; what is there is left.

    Nothing is made where all that is read later is kept.
    """
    data, kept = place.data, place.pool(study.results) / POOL_FILE
    progress = progress_of(study, place)
    if kept.is_file() and data.text_file.is_file() and progress.done == progress.total:
        return
    run_file, log = data.write(), data.folder / LOG_FILE
    for command in data.commands:
        run_command(command, log, stop)
    for stage in STAGES:
        run_command([*LOGITFUSE, *stage, str(run_file)], log, stop)
    StudyText(data.run, study.split, data.text_file)
    if not kept.is_file():
        run, folder = pool_run(study, place), place.pool(study.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_FILE).write_text(run.resolved(), encoding="utf-8")
        run_command([*LOGITFUSE, "eval", "pool", str(folder / RUN_FILE)], log, stop)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / REPORT_FOLDER / POOL_FILE, kept)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What all models of a data set are scored on.

    Args:
        text: Bits per byte of it.
        answers: Prompts that are answered; None where the setting asks for none.
        harness: Tasks of lm-evaluation-harness; None likewise.
    """

    text: StudyText
    answers: StudyAnswers | None
    harness: StudyHarness | None

    @classmethod
    def of(cls, study: StudyConfig, place: Place) -> Scoring:
        """Of a seed of a setting."""
        run, split = place.data.run, study.split
        asked = study.setting(place.setting)
        return cls(
            StudyText(run, split, place.data.text_file),
            StudyAnswers(run, split) if asked.answers else None,
            None if asked.harness is None else StudyHarness(run, asked.harness),
        )

    def require_tasks(self) -> None:
        """Refuse tasks that cannot be run, before something is trained for them.

        Raises:
            ConfigError: The harness is not installed, or a task is not known.
        """
        if self.harness is not None:
            _ = self.harness.manager

    def score(self, ref: ModelRef, folder: Path, stop: StopFlag, tokenizer: str = "target") -> None:
        """Score a model, and let it answer; what is kept in `folder` is not done again."""
        if not (folder / SCORES_FILE).is_file():
            self.text.score(ref, folder, stop, tokenizer=tokenizer)
        if self.answers is not None:
            self.answers.ask(ref, folder, stop)
        if self.harness is not None:
            self.harness.ask(ref, folder, stop)


def train(
    study: StudyConfig, data: Data, recipe: Recipe, scoring: Scoring, stop: StopFlag
) -> TrainingRecord:
    """Train and score one recipe, unless that was done."""
    found = read_record(recipe.results)
    if found is not None and not recipe.folder.is_dir():
        return found  # kept results need nothing else
    with one_at_a_time(recipe.folder, stop):
        found = read_record(recipe.results)
        if found is None:
            scoring.require_tasks()
            _train(study, data, recipe, stop)
            ref = bpb.checkpoint_ref(recipe.folder / "final", recipe.run.target)
            scoring.score(ref, recipe.results, stop)
            found = made_record(recipe)
            write_record(recipe.results, found)
        for name in DROPPED:
            shutil.rmtree(recipe.folder / name, ignore_errors=True)
    return found


def _train(study: StudyConfig, data: Data, recipe: Recipe, stop: StopFlag) -> None:
    path, log = recipe.write(), recipe.folder / LOG_FILE
    # Measured once: trainings that are compared have one precision.
    measured = data.text_file.with_suffix(f".{PRECISION_FILE}")
    if measured.is_file():
        shutil.copyfile(measured, recipe.folder / PRECISION_FILE)
    if recipe.run.aligned_dir is not None:
        run_command([*LOGITFUSE, "align", "run", str(path)], log, stop)
    run_command([*study.train_with, "train", "run", str(path)], log, stop)
    if (recipe.folder / PRECISION_FILE).is_file() and not measured.is_file():
        shutil.copyfile(recipe.folder / PRECISION_FILE, measured)


def model_of(run: RunConfig, row: Row) -> tuple[ModelRef, str]:
    """The model of a row that is not trained, and whose tokenizer it has."""
    assert row.model is not None
    if row.model == "target":
        return run.target, "target"
    if row.model in run.sources:
        return run.sources[row.model], row.model
    return bpb.checkpoint_ref(Path(row.model), run.target), "target"


def score_model(cell: Cell, scoring: Scoring, stop: StopFlag) -> None:
    """Score a model that is there already, unless that was done."""
    ref, tokenizer = model_of(cell.place.data.run, cell.row)
    scoring.score(ref, cell.model_results, stop, tokenizer)


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


def run_place(study: StudyConfig, place: Place, worker: Worker, stop: StopFlag) -> Iterator[Done]:
    """Do this worker's part of one seed of a setting, row by row.

    Rows that are tuned as others come last. Those whose recipe other workers have not found yet are
    left to a later call.

    Raises:
        MissingError: The setting's data are not there.
        CommandError: A training failed.
        Stopped: On a signal; what is scored stays.
    """
    scoring = Scoring.of(study, place)
    # One after the other: the row that one is tuned as is done by then, or another's.
    for unit in units_of(study, place):
        if unit.number % worker.count != worker.index:
            continue
        started, cell, recipe = time.monotonic(), unit.cell, unit.recipe
        if recipe is not None:
            record = train(study, place.data, recipe, scoring, stop)
            title = " ".join(filter(None, (cell.name, recipe.title)))
            yield Done(title, record.best, time.monotonic() - started)
        elif cell.row.model is not None:
            score_model(cell, scoring, stop)
            yield Done(cell.name, None, time.monotonic() - started)
        stop.progressed = True
