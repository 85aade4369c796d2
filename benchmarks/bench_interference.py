"""`make bench-interference`: does fusing make anything worse than training without the sources?

Settings: `real` (the models of `make real`), `demo`, `spoiled-domain` (the demo without its source of
prose: in that domain every source is worse than the trained control), `spoiled-source` (the demo with
a source of facts that has learned wrong ones), `real-large` (the models of `make real` on three times
the text, by two recipes; only for the gain). In each, plain training (the control), ours, MinCE, AvgCE
and Fusion-X as published, and in the demo ours without its gate, are trained: control and ours by the
same three recipes, the others by these too, on the demo by the one that was best for all of them
(`OTHERS_GRIDS`). Each is measured at the recipe that is best on valid text, document by document on the
test split.

    python -m benchmarks.bench_interference --settings demo,spoiled-source
    python -m benchmarks.bench_interference --seeds 1    # one process for each seed: each is one thread
    python -m benchmarks.bench_interference --quick      # one seed, three steps a training

Data, scores and figures of every training are kept in --out, its weights are not; a stopped run goes
on. The few kilobytes that are left of a training lie in --kept too, with the blocks of its test text,
from where a machine that has not trained it takes them: all of it is days of work. A setting that is
whole there needs neither models nor stores. A training is known by its setting and its `train`
section, not by the code: take another --out and --kept for another version. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from benchmarks import recipes
from benchmarks.interference_figures import MEAN, Seen, all_figures
from benchmarks.interference_settings import (
    CONTROL,
    DEMO_SEEDS,
    QUICK,
    REAL_TOKENS,
    Data,
    Recipe,
    Setting,
    all_settings,
)
from benchmarks.interference_steps import step_ratios
from benchmarks.interference_text import SCORES_FILE, TEXT_FILE, TestText
from fuse_eval import bpb
from fuse_eval.summary import POOL_FILE, read_json, report_location
from fuse_train.config import TrainSection
from fuse_train.machine.precision import choose_precision
from store_schema.config import load_run
from store_schema.errors import LogitfuseError
from store_schema.fingerprint import fingerprint
from store_schema.model.class_config import transformers_config

KEPT_FILES = ("recipe.json", "valid.json", SCORES_FILE)
"""What is left of a training."""
KEPT_OF_POOL = ("forecast", "alone_bpb")
STAGES = (("corpus", "build"), ("extract", "plan"), ("extract", "run"), ("align", "run"))


def write_run_files(setting: Setting, data: Data) -> None:
    """Write the run file of all sources and the setting's own."""
    data.work.mkdir(parents=True, exist_ok=True)
    for path, content in ((data.run_file, data.run), (setting.run_file(data), setting.run(data))):
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")


def make_inputs(data: Data) -> None:
    """Make models and texts; what is there is left."""
    for command in data.commands:
        subprocess.run(command, check=True, stdout=sys.stderr)


def prepare(setting: Setting, data: Data) -> None:
    """Make inputs, corpus, plan and stores, and estimate the pools; what is there is left."""
    make_inputs(data)
    for stage in STAGES if data.commands else ():
        recipes.run_module(["logitfuse", *stage, str(data.run_file)])
    recipes.run_module(["logitfuse", "eval", "pool", str(setting.run_file(data))])


def copy_kept(folder: Path, target: Path, names: Sequence[str] = KEPT_FILES) -> None:
    """Copy what is left of a training, where it is whole and not there yet."""

    def whole(place: Path) -> bool:
        return all((place / name).is_file() for name in names)

    if whole(target) or not whole(folder):
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(folder / name, target / name)


def resolve_precision(data: Data, kept: Path) -> str:
    """Precision of all trainings on the data, measured once; the target is made first."""
    path, name = data.work / "precision.txt", data.work.name
    copy_kept(kept / name, data.work, [path.name])
    if not path.is_file():
        make_inputs(data)
        config = transformers_config(load_run(data.run_file).target, of="target")
        path.write_text(choose_precision(config, bpb.device_of(None)).precision)
    copy_kept(data.work, kept / name, [path.name])
    return path.read_text()


class Place(NamedTuple):
    """Where a training goes.

    Args:
        folder: Of its data, logs and figures.
        kept: Of what is left of it.
        overrides: What it sets over the run file.
    """

    folder: Path
    kept: Path
    overrides: tuple[str, ...]


def place_of(setting: Setting, data: Data, recipe: Recipe, *, quick: bool, kept: Path) -> Place:
    """Of one recipe; settings on one data set share their control, which no source shapes."""
    precision = f"train.precision={resolve_precision(data, kept)}"
    overrides = (*recipe.overrides, precision, *(QUICK if quick else ()))
    section = load_run(setting.run_file(data), overrides).section("train", TrainSection)
    out = data.work / "trainings" / (CONTROL if recipe.method == CONTROL else setting.name)
    folder = recipes.folder_of(out, f"{recipe} {fingerprint(section.content())[:8]}")
    return Place(folder, kept / folder.relative_to(data.work.parent), overrides)


def train(setting: Setting, data: Data, text: TestText, recipe: Recipe, place: Place) -> float:
    """Train and score one recipe, unless that was done: mean valid bits per byte."""
    copy_kept(place.kept, place.folder)
    name = place.folder.name
    evaluations = recipes.trained(
        str(setting.run_file(data)),
        data.folder,
        place.folder.parent,
        name,
        place.overrides,
        text.score_final,
    )
    copy_kept(place.folder, place.kept)
    return recipes.mean(recipes.best_evaluation(evaluations)[1])


def see(setting: Setting, data: Data, kept: Path, *, quick: bool = False) -> Seen:
    """Everything of a setting at one seed, made or read."""
    write_run_files(setting, data)
    places = {r: place_of(setting, data, r, quick=quick, kept=kept) for r in setting.recipes()}
    own = kept / data.work.name
    pool_file = own / "pools" / f"{setting.name}.json"
    known = [own / TEXT_FILE, pool_file]
    known += [place.kept / name for place in places.values() for name in KEPT_FILES]
    if not all(path.is_file() for path in known):
        prepare(setting, data)
    text = TestText(data, kept)
    valid: dict[Recipe, float] = {}
    nats: dict[str, tuple[float, ...]] = {}
    for recipe, place in places.items():
        valid[recipe] = train(setting, data, text, recipe, place)
        nats[str(recipe)] = text.nats(place.folder)
        click.echo(
            f"{setting.name}, seed {data.seed}, {recipe}: {valid[recipe]:.4f} bits per byte (valid)",
            err=True,
        )
    if not pool_file.is_file():
        pool = read_json(report_location(load_run(setting.run_file(data))), POOL_FILE) or {}
        pool_file.parent.mkdir(parents=True, exist_ok=True)
        pool_file.write_text(json.dumps({name: pool[name] for name in KEPT_OF_POOL}) + "\n")
    pool = json.loads(pool_file.read_text())
    forecast = {domain: found["gain"] for domain, found in pool["forecast"].items()}
    return Seen(valid, text.record.blocks(nats), pool["alone_bpb"], forecast)


def measure(
    settings: Sequence[Setting], kept: Path, *, quick: bool = False, with_steps: bool = True
) -> dict[str, Any]:
    """All figures of some settings.

    Args:
        settings: Which.
        kept: Where what is left of trainings lies, made here or elsewhere.
        quick: Three steps a training, and one round of step times.
        with_steps: Whether step times are measured too, on small models where there are some:
            there the gate's share of a step is largest.
    """
    found = {s.name: [see(s, data, kept, quick=quick) for data in s.data] for s in settings}
    ratios: tuple[float | None, float | None] = (None, None)
    if with_steps:
        timed = next((s for s in settings if s.name not in REAL_TOKENS), settings[0])
        ratios = step_ratios(timed, timed.data[0], **({"rounds": 1, "steps": 3} if quick else {}))
    spoiled = {s.name: s.spoiled for s in settings if s.spoiled is not None}
    return all_figures(found, spoiled, ratios)


def _percent(change: Mapping[str, float]) -> str:
    return f"{change['value']:+.1%} ({change['low']:+.1%} to {change['high']:+.1%})"


def settings_table(found: Mapping[str, Any]) -> str:
    """Each method against the control, for people."""
    lines = []
    for name, methods in found["settings"].items():
        others = {method: record for method, record in methods.items() if method != CONTROL}
        domains = [key for key in next(iter(others.values()))["changes"] if key != MEAN]
        lines += [
            f"{name}: bits per byte against the control's, and nats above it in documents that are "
            "worse beyond the noise, and in all that are worse",
            f"{'':<10}"
            + "".join(f"{key:>26}" for key in [*domains, MEAN])
            + f"{'excess':>10}{'of all':>10}",
        ]
        for method, record in others.items():
            cells = "".join(f"{_percent(record['changes'][key]):>26}" for key in [*domains, MEAN])
            excess = "".join(f"{nats:>10.1f}" for nats in record["excess_nats"].values())
            lines.append(f"{method:<10}{cells}{excess}")
        lines.append("")
    return "\n".join(lines)


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


def chosen(names: str, settings: Mapping[str, Setting]) -> list[Setting]:
    """Settings of a comma-separated list.

    Raises:
        UsageError: One is not known.
    """
    asked = [name.strip() for name in names.split(",")] if names else list(settings)
    for name in asked:
        if name not in settings:
            raise click.UsageError(f"no setting {name!r}: there are {', '.join(settings)}")
    return [settings[name] for name in asked]


@click.command()
@click.option("--settings", "names", default="", help="Comma-separated; all by default.")
@click.option(
    "--seeds",
    default=",".join(map(str, DEMO_SEEDS)),
    show_default=True,
    help="Of the demo's settings, comma-separated.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/interference", show_default=True
)
@click.option(
    "--kept",
    type=click.Path(path_type=Path),
    default="benchmarks/kept/interference",
    show_default=True,
    help="Figures of trainings, taken from here where they are and put here where they are not.",
)
@click.option("--quick", is_flag=True, help="Three steps a training, one seed.")
@click.option("--steps/--no-steps", default=True, help="Whether step times are measured.")
def main(names: str, seeds: str, out: Path, kept: Path, quick: bool, steps: bool) -> None:
    """Train what is not trained, and say where fusing is worse than plain training."""
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter(f"{seeds!r} are no numbers", param_hint="--seeds") from None
    try:
        asked = chosen(names, all_settings(out, numbers[:1] if quick else numbers))
        found = measure(asked, out / "kept" if quick else kept, quick=quick, with_steps=steps)
    except LogitfuseError as error:
        click.echo(f"bench-interference: {error.line()}", err=True)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:  # its own line says why
        click.echo(f"bench-interference: ended by {' '.join(map(str, error.cmd))}", err=True)
        sys.exit(abs(error.returncode))
    print(settings_table(found))
    print(goals_table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
