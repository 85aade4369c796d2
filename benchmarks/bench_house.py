"""`make bench-house`: how large the house is, and how quickly it is checked.

    python -m benchmarks.bench_house                     # what can be counted, in a minute
    python -m benchmarks.bench_house --tests             # and all tests, with their coverage
    python -m benchmarks.bench_house --before d672268    # and alignment beside that commit's

Counted are the packages' own files, as tests/test_layers.py knows them. `align_speed_ratio` is tokens a
second of alignment over an older commit's, which is checked out beside and measured in turns. The last
line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tests import test_layers as layers

ROOT = Path(__file__).resolve().parent.parent

GOALS: dict[str, tuple[str, float]] = {
    "product_lines": ("<=", 27_500),
    "largest_folder_files": ("<=", 15),
    "largest_flat_folder_files": ("<=", 20),
    "largest_file_lines": ("<=", 400),
    "import_circles": ("<=", 0),
    "test_seconds": ("<=", 840),
    "coverage": (">=", 0.92),
    "align_speed_ratio": (">=", 0.98),
}
KINDS = ("selector", "engine", "method", "divergence")
ROUNDS = 3
CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
"""As `make tests` sets them."""


def sizes() -> dict[str, int]:
    """Lines, files and circles of the packages."""
    paths = [*layers._files(), ROOT / "logitfuse.py"]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    folders = Counter(path.parent.relative_to(ROOT) for path in layers._files())
    deep = [count for folder, count in folders.items() if folder.parts[0] in layers.ORDER]
    flat = [count for folder, count in folders.items() if folder.parts[0] not in layers.ORDER]
    return {
        "product_lines": sum(lines.values()),
        "largest_folder_files": max(deep),
        "largest_flat_folder_files": max(flat),
        "largest_file_lines": max(lines.values()),
        "import_circles": int(bool(layers._circle(layers._graph(ROOT, layers.MAY_IMPORT)))),
    }


def lines_by_package() -> dict[str, int]:
    """Lines of each package."""
    found: Counter[str] = Counter()
    for path in layers._files():
        package = path.relative_to(ROOT).parts[0]
        found[package] += len(path.read_text(encoding="utf-8").splitlines())
    return dict(found)


def files_to_add() -> dict[str, int | None]:
    """Files that change beside the new one, by kind: one, the registry, where the tests that add one of
    each so pass; None where they do not."""
    words = [sys.executable, "-m", "pytest", "-q", "tests/test_docs_extending.py"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | CALM, stdout=sys.stderr, check=False)
    return dict.fromkeys(KINDS, 1 if done.returncode == 0 else None)


def tests() -> dict[str, float]:
    """Seconds of `make tests` as it is, then the share of the packages' lines that tests run, by a
    second pass under coverage, which takes longer."""
    start = time.monotonic()
    words = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    _pytest(*words)
    seconds = time.monotonic() - start
    packages = [f"--cov={package}" for package in layers.MAY_IMPORT]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.xml"
        _pytest(*words, *packages, "--cov-report", f"xml:{report}")
        rate = ElementTree.parse(report).getroot().attrib["line-rate"]
    return {"test_seconds": seconds, "coverage": float(rate)}


def _pytest(*words: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *words]
    subprocess.run(command, cwd=ROOT, env=os.environ | CALM, stdout=sys.stderr, check=True)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A commit's files in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def align_speed_ratio(commit: str) -> float:
    """Tokens a second of alignment over those of a commit, median of some rounds in turns."""
    with checked_out(commit) as before, tempfile.TemporaryDirectory() as folder:
        outs = {ROOT: Path(folder) / "new", before: Path(folder) / "old"}
        ratios = []
        for number in range(ROUNDS):
            sides = (ROOT, before) if number % 2 else (before, ROOT)
            rate = {side: _tokens_per_s(side, outs[side]) for side in sides}
            ratios.append(rate[ROOT] / rate[before])
    return statistics.median(ratios)


_MEASURE = """\
import json, sys
from pathlib import Path
from benchmarks.align_speed import measure_speed
print(json.dumps(measure_speed(Path(sys.argv[1]), quick=True)["tokens_per_s"]))
"""


def _tokens_per_s(tree: Path, out: Path) -> float:
    """One measurement by the tree's own code; its tokenizers and machine code stay in `out`."""
    out.mkdir(exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": f"{tree}:{tree}/benchmarks",
        "NUMBA_CACHE_DIR": f"{out}/compiled",
    }
    words = [sys.executable, "-c", _MEASURE, str(out)]
    done = subprocess.run(
        words, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def table(found: Mapping[str, Any]) -> str:
    """Figures beside their goals, for people."""
    rows = [f"{'figure':<28}{'goal':>12}{'seen':>14}"]
    for name, (sign, goal) in GOALS.items():
        value = found.get(name)
        seen = "not measured" if value is None else f"{value:,.3f}".rstrip("0").rstrip(".")
        met = value is None or (value <= goal if sign == "<=" else value >= goal)
        rows.append(f"{name:<28}{f'{sign} {goal:,}':>12}{seen:>14}{'' if met else '  missed'}")
    rows.append("")
    rows += [
        f"  {package:<26}{lines:>26,} lines" for package, lines in found["lines_by_room"].items()
    ]
    return "\n".join(rows)


@click.command()
@click.option("--tests", "with_tests", is_flag=True, help="Run all tests, twice.")
@click.option("--before", help="Commit whose alignment is measured beside ours.")
def main(with_tests: bool, before: str | None) -> None:
    """Print a table, and one JSON object as the last line."""
    found: dict[str, Any] = {**sizes(), "lines_by_room": lines_by_package()}
    found["files_to_add"] = files_to_add()
    found |= tests() if with_tests else {"test_seconds": None, "coverage": None}
    found["align_speed_ratio"] = None if before is None else align_speed_ratio(before)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
