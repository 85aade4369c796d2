"""Train one run's target by several recipes, on one extraction: what each setting is worth.

    python -m benchmarks.recipes --config examples/real.yaml --data runs/real --recipe fused: \
        --recipe 'fused 1e-4:lr=1e-4' --recipe 'control 1e-4:lr=1e-4,selector=uniform,clm_weight=1'

A recipe is NAME:KEY=VALUE,KEY=VALUE with keys of the `train` section (`selector=uniform,clm_weight=1`
is training on ground truth alone, as the control does). All see the same tokens in the same order. A
recipe that was trained before is read and not trained again, one that was stopped goes on. Scores are
on the valid split, at the best of the evaluations. Prints a table for people and, as its last line,
one JSON object for programs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Score = dict[str, float]


def recipe_of(text: str) -> tuple[str, list[str]]:
    """Name and overrides of NAME:KEY=VALUE,KEY=VALUE."""
    name, _, settings = text.partition(":")
    return name.strip(), [f"train.{s.strip()}" for s in settings.split(",") if s.strip()]


def trained(
    config: str,
    data: Path,
    out: Path,
    name: str,
    overrides: Sequence[str],
    finish: Callable[[Path], None] = lambda folder: None,
) -> list[tuple[int, Score]]:
    """Valid bits per byte by domain at each evaluation of one recipe: (step, scores).

    Args:
        config: The run file.
        data: Folder of the run whose corpus, plan and stores are used.
        out: A folder for each recipe is made in it.
        name: Of the recipe.
        overrides: What it sets.
        finish: Called with the recipe's folder while the trained model still stands in `final/`.
    """
    folder = folder_of(out, name)
    recipe, scores = folder / "recipe.json", folder / "valid.json"
    if recipe.exists() and json.loads(recipe.read_text()) != list(overrides):
        raise click.ClickException(f"{folder} is of another recipe: give this one another name")
    if not scores.exists():
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps(overrides))
        words = ["fuse_train", "run", config]
        for setting in (f"run_dir={folder}", f"data_dir={data}", "train.control=false", *overrides):
            words += ["--set", setting]
        run_module(words)
        lines = map(json.loads, (folder / "logs/train_steps.jsonl").read_text().splitlines())
        found = [(line["step"], line["valid_bpb"]) for line in lines if "valid_bpb" in line]
        finish(folder)
        scores.with_suffix(".part").write_text(json.dumps(found))
        scores.with_suffix(".part").replace(scores)
    for left in "checkpoints", "final":  # of no use here, and large
        shutil.rmtree(folder / left, ignore_errors=True)
    return [(step, score) for step, score in json.loads(scores.read_text())]


def folder_of(out: Path, name: str) -> Path:
    """Where a recipe is trained."""
    return out / re.sub(r"[^\w.-]+", "-", name)


def run_module(words: Sequence[str]) -> None:
    """Run a module's command in a process of its own; its table goes nowhere."""
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)


def best_evaluation(evaluations: Sequence[tuple[int, Score]]) -> tuple[int, Score]:
    """The one whose weights a training keeps."""
    return min(evaluations, key=lambda found: mean(found[1]))


def mean(score: Score) -> float:
    """Mean of the domains."""
    return sum(score.values()) / len(score)


@click.command()
@click.option("--config", default="examples/real.yaml", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default="runs/real", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/real-recipes", show_default=True
)
@click.option("--recipe", "recipes", multiple=True, required=True, help="NAME:KEY=VALUE,KEY=VALUE")
def main(config: str, data: Path, out: Path, recipes: tuple[str, ...]) -> None:
    """Compare recipes."""
    results: dict[str, Any] = {}
    for name, overrides in map(recipe_of, recipes):
        evaluations = trained(config, data, out, name, overrides)
        step, best = best_evaluation(evaluations)
        results[name] = {"before": evaluations[0][1], "best_step": step, "valid_bpb": best}
        if len(results) == 1:
            print(f"{'recipe':<32}" + "".join(f"{d:>12}" for d in sorted(best)) + f"{'mean':>9}")
        cells = "".join(f"{best[d]:>12.4f}" for d in sorted(best))
        print(f"{name:<32}{cells}{mean(best):>9.4f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
