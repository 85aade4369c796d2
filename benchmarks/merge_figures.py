"""Merges in figures: the largest error against mergekit's own, and the peak of memory.

    python -m benchmarks.merge_figures

Prints one JSON object: `merge_max_error` relative to the largest weight of a tensor, by case;
`merge_peak_over_largest_tensor` by method, beside Python and its packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from benchmarks import mergekit_merges as mergekit
from fuse_train.merge import MERGES
from fuse_train.merge.cli import merge
from tests.test_mergekit import trained
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent


def errors(root: Path) -> dict[str, float]:
    """Largest relative error by case."""
    base = tiny_model(root / "base")
    models = [trained(base, root / f"model-{seed}", seed) for seed in (1, 2, 3)]
    jobs = {name: root / f"theirs-{i}" for i, name in enumerate(mergekit.CASES)}
    configs = [
        (case.config(base, models[: case.num_models]), jobs[name])
        for name, case in mergekit.CASES.items()
    ]
    mergekit.merge_by_mergekit(configs)
    found = {}
    for i, (name, case) in enumerate(mergekit.CASES.items()):
        out = root / f"ours-{i}"
        words = [str(out), *case.words(base, models[: case.num_models])]
        done = CliRunner().invoke(merge, words, catch_exceptions=False)
        if done.exit_code != 0:
            raise SystemExit(done.output)
        found[name] = mergekit.largest_error(out, jobs[name])
    return found


def peaks(root: Path) -> dict[str, float]:
    """Growth of the peak over the largest tensor, by method."""

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "tests.merge_peak", str(root), *words]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout

    run()
    return {name: json.loads(run(name).splitlines()[-1])["ratio"] for name in MERGES.names()}


def main() -> None:
    """Entry point."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        found: dict[str, Any] = {
            "merge_max_error": errors(root / "errors"),
            "merge_peak_over_largest_tensor": peaks(root / "peaks"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
