"""`align run` from its start to its last commit, beside an older commit's, on the same stores.

Both align copies of a finished run, in turn. Compared are tokens a second from the first shard of each
source to its last, as the workers' logs have them: what comes before is opening tokenizers and loading
machine code, which a store of millions of tokens does not notice.

    python -m benchmarks.scale_align                     # after `make demo`; beside the commit BEFORE
    python -m benchmarks.scale_align --run FILE --before COMMIT --rounds 3

The last line is one JSON object; `align_run_ratio` is now over before (goal: 3), the median of rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.bench_house import ROOT, checked_out
from launch.json_lines import read_lines
from store_schema.config import load_run
from store_schema.errors import MissingError

RUN_FILE = "examples/demo.yaml"
BEFORE = "dfb5776"
"""The commit before alignment read ahead and wrote behind."""


def align_figures(
    run_file: str | Path = RUN_FILE, before: str = BEFORE, rounds: int = 3
) -> dict[str, Any]:
    """Both ways in rounds of alternating order.

    Args:
        run_file: Of a run whose sources are extracted; its folder is read only.
        before: A commit of this repository.
        rounds: Of each; one more at the start is not counted.

    Returns:
        Ratio and tokens/s of both ways, ready for JSON.

    Raises:
        MissingError: An alignment failed.
    """
    rates: dict[str, list[float]] = {"now": [], "before": []}
    with checked_out(before) as old, tempfile.TemporaryDirectory() as name:
        trees = {"now": ROOT, "before": old}
        places = {way: _copied(Path(run_file), Path(name) / way) for way in trees}
        for number in range(rounds + 1):
            for way in trees if number % 2 else reversed(list(trees)):
                rate = _tokens_per_s(trees[way], places[way])
                print(f"round {number}, {way}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
                if number:
                    rates[way].append(rate)
    pairs = zip(rates["now"], rates["before"], strict=True)
    return {
        "align_run_ratio": round(statistics.median(now / old for now, old in pairs), 3),
        "align_run_tokens_per_s": {
            way: round(statistics.median(found)) for way, found in rates.items()
        },
        "align_before": before,
    }


def _copied(run_file: Path, folder: Path) -> Path:
    """A run file for a copy of a run's plan and source stores; models stay where they are."""
    run = load_run(run_file)
    for part in ("corpus", "plan", "stores"):
        shutil.copytree(Path(run.folder) / part, folder / part)
    content = yaml.safe_load(run_file.read_text()) | {"run_dir": str(folder)}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _tokens_per_s(tree: Path, run_file: Path) -> float:
    """One alignment by a tree's own code, from the first shard of each source on."""
    folder = run_file.parent
    for part in ("aligned", "logs"):
        shutil.rmtree(folder / part, ignore_errors=True)
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "NUMBA_CACHE_DIR": str(folder / "compiled"),
    }
    words = [sys.executable, "-P", "-m", "logitfuse", "align", "run", str(run_file)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MissingError("align run failed", where=tree, got=done.stderr[-300:])
    tokens = seconds = 0.0
    for log in folder.glob("logs/align/*/worker-*.jsonl"):
        shards = [line for line in read_lines(log)[0] if line["event"] == "shard"]
        tokens += sum(shard["tokens"] for shard in shards[1:])
        seconds += sum(shard["seconds"] for shard in shards[1:])
    if not seconds:
        raise MissingError("no source has more than one shard", where=run_file)
    return tokens / seconds


@click.command()
@click.option("--run", "run_file", default=RUN_FILE, show_default=True, help="Run file.")
@click.option("--before", default=BEFORE, show_default=True, help="Commit to compare with.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def main(run_file: str, before: str, rounds: int) -> None:
    """Measure, and print one JSON object as the last line."""
    print(json.dumps(align_figures(run_file, before, rounds)))


if __name__ == "__main__":
    main()
