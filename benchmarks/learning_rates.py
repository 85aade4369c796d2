"""Train a run's fused model and its control at several learning rates, on one extraction.

    python benchmarks/learning_rates.py --config examples/demo.yaml --data runs/demo --lr 1e-3 --lr 5e-3

Both runs of a rate see the same tokens in the same order. What is chosen is chosen on the valid split.
Prints a table for people and, as its last line, one JSON object for programs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click


def trained(config: str, data: Path, out: Path, lr: str) -> dict[str, dict[str, float]]:
    """Best valid bits per byte by domain of both runs at one rate, {"fused": ..., "control": ...}."""
    folder = out / f"lr-{lr}"
    subprocess.run(
        [
            *(sys.executable, "-m", "fuse_train", "run", config),
            *("--set", f"run_dir={folder}", "--set", f"data_dir={data}"),
            *("--set", f"train.lr={lr}", "--set", f"train.control_overrides.lr={lr}"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = {}
    for label, log in (("fused", "train_steps"), ("control", "control_steps")):
        lines = (folder / "logs" / f"{log}.jsonl").read_text().splitlines()
        scores = [line["valid_bpb"] for line in map(json.loads, lines) if "valid_bpb" in line]
        found[label] = min(scores, key=lambda score: sum(score.values()) / len(score))
    return found


@click.command()
@click.option("--config", default="examples/demo.yaml", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default="runs/demo", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/demo-rates", show_default=True
)
@click.option("--lr", "rates", multiple=True, default=("1e-3", "2.5e-3", "5e-3"), show_default=True)
def main(config: str, data: Path, out: Path, rates: tuple[str, ...]) -> None:
    """Compare learning rates for the fused model and its control."""
    results = {lr: trained(config, data, out, lr) for lr in rates}
    domains = sorted(next(iter(results.values()))["fused"])
    print(f"{'lr':<8}{'run':<9}" + "".join(f"{d:>9}" for d in domains) + f"{'mean':>9}  valid bpb")
    for lr, runs in results.items():
        for label, score in runs.items():
            mean = sum(score.values()) / len(score)
            cells = "".join(f"{score[d]:>9.4f}" for d in domains)
            print(f"{lr:<8}{label:<9}{cells}{mean:>9.4f}")
    print(json.dumps({"valid_bpb": results}))


if __name__ == "__main__":
    main()
