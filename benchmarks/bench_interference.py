"""`make bench-interference`: does fusing make anything worse than training without the sources?

The study is benchmarks/interference.yaml: plain training (the control), ours, and what papers
published, on published models, on the demo, and on demos with a source spoiled. What is left of each
training (its scores and its record, some kilobytes) lies in benchmarks/kept/interference, from where a
machine that has not trained it takes it: all of it is days of work. A training is known by its recipe,
not by the code: remove what is kept to measure another version.

    python -m benchmarks.bench_interference --settings demo,spoiled-source --seeds 1
    python -m benchmarks.bench_interference --quick      # one seed, three steps a training

Processes with other --seeds or --settings may run beside each other. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.interference_figures import (
    CONTROL,
    DEMO,
    OURS,
    REAL_TOKENS,
    all_figures,
    at_rate,
)
from benchmarks.interference_steps import step_ratios
from fuse_eval.study.config import StudyConfig, load_study
from fuse_eval.study.figures import MEAN, Change, changes, setting_record
from fuse_eval.study.grid import Cell, Place, Recipe, checked_places
from fuse_eval.study.records import best_of
from fuse_eval.study.results import SeedResult, seed_result
from fuse_eval.study.tables import settings_grid, text_table
from fuse_eval.study.text import StudyText
from fuse_eval.study.work import make_data, run_place
from launch.signals import StopFlag, stop_on_signals
from launch.work import Worker
from store_schema.errors import LogitfuseError, Stopped

STUDY = Path(__file__).with_name("interference.yaml")
QUICK = {"train.max_steps": 3, "train.eval_every": 2}


def quick_study(study: StudyConfig, out: Path) -> StudyConfig:
    """The same with three steps a training and one seed, in a folder of its own."""
    settings = {
        name: setting
        if setting.like
        else setting.model_copy(
            update={
                "set": setting.set | QUICK,
                "seeds": setting.seeds[:1],
                "tune": setting.tune[:2],
            }
        )
        for name, setting in study.settings.items()
    }
    return study.model_copy(
        update={"settings": settings, "study_dir": str(out), "results_dir": str(out / "kept")}
    )


def measure(
    study: StudyConfig, places: Sequence[Place], stop: StopFlag, *, rounds: int, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train what is not trained, and give all figures.

    Args:
        study: The study.
        places: Settings and seeds.
        stop: Checked between trainings.
        rounds: Of step times; 0 measures none.
        steps: Of each training whose steps are timed.

    Returns:
        Figures of the goals, and of each setting as in study.json.
    """
    seeds: dict[str, list[SeedResult]] = {}
    at_rates: dict[str, dict[str, Change]] = {}
    for place in places:
        title = f"{place.setting}, seed {place.seed}"
        make_data(study, place, stop)
        for done in run_place(study, place, Worker(), stop):
            score = "" if done.bpb is None else f": {done.bpb:.4f} bits per byte (valid)"
            click.echo(f"{title}, {done.title}{score}", err=True)
        seen = seed_result(study, place)
        if seen is not None:
            seeds.setdefault(place.setting, []).append(seen)
            if place.setting in REAL_TOKENS:
                at_rates[place.setting] = rate_changes(study, place, seen)
    settings = {name: setting_record(study, name, found) for name, found in seeds.items()}
    timed = next((place for place in places if place.setting == DEMO), None)
    ratios: tuple[float | None, float | None] = (None, None)
    if timed is not None and rounds:
        ratios = step_ratios(study, timed, rounds, steps)
    return all_figures(study, settings, seeds, at_rates, ratios), settings


def rate_changes(study: StudyConfig, place: Place, seen: SeedResult) -> dict[str, Change]:
    """Change of the mean at each rate, ours and the control each at its best number of passes."""
    text = StudyText(place.data.run, study.split, place.data.text_file)
    cells = {name: Cell(study, place, name) for name in (OURS, CONTROL)}
    rates = sorted({tuning["train.lr"] for tuning in study.setting(place.setting).tune})
    found = {}
    for rate in rates:
        best = {name: best_of(_at(cell, rate)) for name, cell in cells.items()}
        nats = {name: text.nats(one[0].results) for name, one in best.items() if one is not None}
        if len(nats) == 2:
            both = at_rate(seen, nats[OURS], nats[CONTROL])
            found[f"{rate:g}"] = changes([both], OURS, CONTROL, study)[MEAN]
    return found


def _at(cell: Cell, rate: float) -> list[Recipe]:
    return [recipe for recipe in cell.recipes if recipe.tuning["train.lr"] == rate]


def _percent(change: Mapping[str, float]) -> str:
    return f"{change['value']:+.1%} ({change['low']:+.1%} to {change['high']:+.1%})"


def goals(found: Mapping[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """Figure, goal, what was seen, whether it is met; None where nothing was seen."""
    rows: list[tuple[str, str, str, bool | None]] = []
    for name, worst in found["worst_domain"].items():
        met = worst["value"] <= 0.003 and worst["high"] <= 0.01
        shown = f"{_percent(worst)} {worst['domain']}"
        rows.append((f"worst_domain {name}", "<= 0.3 %, high <= 1 %", shown, met))
    for tokens, rates in found["mean_gain_real"].items():
        for rate, change in rates.items():
            met = change["value"] <= -0.02 and change["high"] < 0
            rows.append((f"mean_gain_real {tokens} {rate}", "<= -2 %", _percent(change), met))
    for rival, ratio in found["interference_ratio"].items():
        rows.append(_row(f"interference_ratio {rival}", ratio, "<=", 0.25))
    for rival, ratio in found["interference_ratio_every"].items():
        rows.append(_row(f"interference_ratio_every {rival}", ratio, "", None))
    rows.append(_row("mean_gain_kept", found["mean_gain_kept"], ">=", 1.0))
    rows.append(_row("forecast_error", found["forecast_error"], "<=", 0.3))
    right, of = found["forecast_ranks_right"]
    rows.append(("forecast_ranks_right", "all", f"{right} of {of}", right == of if of else None))
    rows.append(_row("step_ratio", found["step_ratio"], "<=", 1.03))
    rows.append(_row("seconds_ratio", found["seconds_ratio"], "", None))
    for name, seeds in found["best_source_over_control"].items():
        if seeds:
            shown = ", ".join(f"{value:+.1%}" for value in seeds)
            rows.append((f"best source, {name}", "> 0 %", shown, min(seeds) > 0))
    return rows


def _row(
    name: str, value: float | None, sign: str, goal: float | None
) -> tuple[str, str, str, bool | None]:
    if value is None or goal is None:
        return name, "", "-" if value is None else f"{value:.3f}", None
    met = value <= goal if sign == "<=" else value >= goal
    return name, f"{sign} {goal:g}", f"{value:.3f}", met


def goals_table(found: Mapping[str, Any]) -> str:
    """Figures beside their goals, for people."""
    words = {True: "met", False: "missed", None: ""}
    return "\n".join(
        f"{name:<34}{goal:<24}{seen:<38}{words[met]}".rstrip()
        for name, goal, seen, met in [("figure", "goal", "seen", None), *goals(found)]
    )


@click.command()
@click.option("--settings", "names", default="", help="Comma-separated; all by default.")
@click.option("--seeds", default="", help="Comma-separated; all by default.")
@click.option("--quick", is_flag=True, help="Three steps a training, one seed, in runs/quick.")
@click.option("--steps/--no-steps", "with_steps", default=True, help="Whether steps are timed.")
def main(names: str, seeds: str, quick: bool, with_steps: bool) -> None:
    """Train what is not trained, and say where fusing is worse than plain training."""
    study = load_study(STUDY)
    if quick:
        study = quick_study(study, Path("runs/quick/interference"))
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else []
    except ValueError:
        raise click.BadParameter(f"{seeds!r} are no numbers", param_hint="--seeds") from None
    rounds, steps = (1, 3) if quick else (5, 30)
    try:
        asked = [name.strip() for name in names.split(",")] if names else []
        places = checked_places(study, asked, numbers)
        with stop_on_signals() as stop:
            found, settings = measure(
                study, places, stop, rounds=rounds if with_steps else 0, steps=steps
            )
    except (LogitfuseError, Stopped) as error:
        click.echo(f"bench-interference: {error.line()}", err=True)
        sys.exit(error.exit_code)
    for name, setting in settings.items():
        print(f"{name}\n{text_table(settings_grid(study, setting))}\n")
    print(goals_table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
