"""What the gate costs in a step: short trainings with and without it take turns."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import recipes
from benchmarks.interference_figures import OURS, TODAY
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.grid import Place, recipe_of
from fuse_train.publish.done import read_done
from store_schema.errors import MissingError
from store_schema.yaml_file import set_value

ROUNDS, STEPS, WARM_STEPS = 5, 30, 3
"""Of each side, in turns; the first steps of a training are not counted."""
_SHORT: dict[str, Any] = {
    "train.eval_every": 10,
    "train.checkpoint_every": 1_000_000,
    "train.asn.pretrain_steps": 0,
    "train.trackers": [],
}


def step_ratios(
    study: StudyConfig, place: Place, rounds: int = ROUNDS, steps: int = STEPS
) -> tuple[float, float]:
    """Time of ours over that without the gate, median of the rounds' ratios: of the median step, and
    of the whole training with an evaluation every ten steps, at which the gate may work too.

    Args:
        study: The study, which has both rows.
        place: Setting and seed, whose stores are there.
        rounds: Of both sides.
        steps: Of a training.
    """
    folder = place.within(study.folder) / "steps"
    ratios = []
    for number in range(rounds):
        sides = (OURS, TODAY) if number % 2 else (TODAY, OURS)
        seconds = {side: _seconds(study, place, folder, side, steps) for side in sides}
        ratios.append([a / b for a, b in zip(seconds[OURS], seconds[TODAY], strict=True)])
    step, whole = map(statistics.median, zip(*ratios, strict=True))
    return step, whole


def _seconds(
    study: StudyConfig, place: Place, folder: Path, row: str, steps: int
) -> tuple[float, float]:
    shutil.rmtree(folder, ignore_errors=True)
    recipe = recipe_of(study, place, row, study.setting(place.setting).tune[0])
    content = dict(recipe.content) | {"run_dir": str(folder)}
    for key, value in (_SHORT | {"train.max_steps": steps}).items():
        set_value(content, key, value, where=row)
    path = replace(recipe, content=content).write()
    recipes.run_module(["fuse_train", "run", str(path)])
    lines = (folder / "logs/train_steps.jsonl").read_text().splitlines()
    record = read_done(folder / "final")
    if record is None:
        raise MissingError("no finished training", where=folder)
    shutil.rmtree(folder)
    return median_step(lines), record.seconds


def median_step(lines: Sequence[str]) -> float:
    """Median seconds of the steps in a step log, the first ones left out."""
    found = [step for step in map(json.loads, lines) if "seconds" in step]
    counted = [step["seconds"] for step in found if step["step"] > WARM_STEPS]
    return statistics.median(counted or [step["seconds"] for step in found])
