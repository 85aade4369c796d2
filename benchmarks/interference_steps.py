"""What the gate costs in a step: short trainings with and without it take turns."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import recipes
from benchmarks.interference_settings import METHODS, OURS, TODAY, Data, Setting
from fuse_train.publish.done import read_done
from store_schema.errors import MissingError

ROUNDS, STEPS, WARM_STEPS = 5, 30, 3
"""Of each side, in turns; the first steps of a training are not counted."""
_PLAIN = (
    *("train.control=false", "train.eval_every=10", "train.checkpoint_every=1000000"),
    *("train.asn.pretrain_steps=0", "train.trackers=[]"),
)


def step_ratios(
    setting: Setting, data: Data, rounds: int = ROUNDS, steps: int = STEPS
) -> tuple[float, float]:
    """Time of ours over that without the gate, median of the rounds' ratios: of the median step, and
    of the whole training with an evaluation every ten steps, at which the gate may work too."""
    folder = data.work / "steps"
    ratios = []
    for number in range(rounds):
        sides = (OURS, TODAY) if number % 2 else (TODAY, OURS)
        seconds = {side: _seconds(setting, data, folder, side, steps) for side in sides}
        ratios.append([a / b for a, b in zip(seconds[OURS], seconds[TODAY], strict=True)])
    step, whole = map(statistics.median, zip(*ratios, strict=True))
    return step, whole


def _seconds(
    setting: Setting, data: Data, folder: Path, method: str, steps: int
) -> tuple[float, float]:
    shutil.rmtree(folder, ignore_errors=True)
    words = ["fuse_train", "run", str(setting.run_file(data))]
    for item in (f"run_dir={folder}", f"train.max_steps={steps}", *_PLAIN, *METHODS[method]):
        words += ["--set", item]
    recipes.run_module(words)
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
