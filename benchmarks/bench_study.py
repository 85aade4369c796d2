"""`make study`: does fusing pay on the demo, against whom, and what carries it (examples/study.yaml)?

    python -m benchmarks.bench_study
    python -m benchmarks.bench_study --study mine.yaml --processes 4

Runs the study, whose table and page say all, and prints its goals as one JSON object on the last line.
A stopped study goes on; `study_seconds` is the time of all its calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fuse_eval.study.cli import RECORD_FILE
from fuse_eval.study.config import StudyConfig, load_study
from fuse_eval.study.figures import MEAN, best_baseline

ROOT = Path(__file__).resolve().parent.parent
SECONDS_FILE = "seconds.json"


def study_figures(study: StudyConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """The goals, by setting.

    Args:
        study: The study.
        record: Content of study.json.

    Returns:
        `ours_minus_control` and `ours_minus_best_baseline` (relative, with intervals and seeds; the
        best baseline is the one that ours is least better than), `interference_ratio_mince` and
        `tokens_to_control`; what a setting has no rows for is None.
    """
    ours = study.ours
    assert ours is not None
    found: dict[str, dict[str, Any]] = {
        "ours_minus_control": {},
        "ours_minus_best_baseline": {},
        "interference_ratio_mince": {},
        "tokens_to_control": {},
    }
    for setting, content in record["settings"].items():
        own = content["rows"].get(ours)
        if own is None:
            continue
        found["ours_minus_control"][setting] = own["against_control"][MEAN]
        best = best_baseline(study, content)
        found["ours_minus_best_baseline"][setting] = (
            None
            if best is None
            else {"baseline": best, **content["rows"][best]["ours_against"][MEAN]}
        )
        ratio = own.get("interference_ratio")
        found["interference_ratio_mince"][setting] = ratio and ratio["excess_nats"]
        found["tokens_to_control"][setting] = own["tokens_to_control"]
    return found


def add_seconds(folder: Path, seconds: float) -> float:
    """Add to the time that the study has taken so far; the sum."""
    path = folder / SECONDS_FILE
    before: float = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": before + seconds}))
    return before + seconds


@click.command()
@click.option("--study", "file", default="examples/study.yaml", show_default=True)
@click.option(
    "--processes", default=os.cpu_count() or 1, show_default=True, help="Trainings at a time."
)
def main(file: str, processes: int) -> None:
    """Run the study, show it, and one JSON object as the last line."""
    study = load_study(file)
    words = [sys.executable, "-m", "logitfuse", "study", "run", file, "--processes"]
    started = time.monotonic()
    done = subprocess.run([*words, str(processes)], cwd=ROOT)
    seconds = add_seconds(study.results, time.monotonic() - started)
    if done.returncode:
        sys.exit(done.returncode)
    record = json.loads((study.results / RECORD_FILE).read_text())
    print(json.dumps({**study_figures(study, record), "study_seconds": seconds}))


if __name__ == "__main__":
    main()
