"""`make bench-finish`: what people meet who begin, and what the tests are worth.

    python -m benchmarks.bench_finish --parts docs_blocks,mutants,import_capture
    python -m benchmarks.bench_finish --parts demo_cpu --before d672268

* `first_report`: seconds from a fresh clone to the report of `make demo`, installation included.
  Nothing is cached but what pip has, and paths of this environment are forgotten: all comes from there.
* `demo_cpu`: CPU seconds of `make demo` without the installation, over those of the commit `--before`,
  both measured one after the other from clean trees, with the packages of this environment.
* `docs_blocks`: share of the command blocks in README and docs/ that a test runs; the tests are run,
  and there is no share if one fails.
* `mutants`: share of mutants that tests kill (`benchmarks/mutants.py`), `--count` of each module.
* `import_capture`: largest difference, in nats, between a log-probability that the tests import from a
  capture of DistillKit and what the documented reader makes of the same bytes.

The first two take as long as the demo, and twice that. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import mutants
from benchmarks.bench_house import CALM, ROOT, checked_out
from benchmarks.environments import UnavailableError
from tests.docs_blocks import ELSEWHERE

GOALS: dict[str, tuple[str, float]] = {
    "first_report_seconds": ("<=", 720),
    "demo_cpu_seconds": ("<=", 0.6),
    "docs_blocks_run": (">=", 0.9),
    "mutants_killed": (">=", 0.85),
    "import_capture_max_error": ("<=", 1e-3),
}
REPORT = Path("runs/demo/report/index.html")
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
"""Of this environment, what a fresh clone must not see."""
CAPTURE_TESTS = ("test_store_schema_capture.py", "test_extract_captures.py")


class MeasureError(Exception):
    """A part could not be measured; says why."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks.

    Args:
        before: Commit whose demo is the other side.
        count: Mutants of each module.
        seed: Of their sample.
    """

    before: str | None = None
    count: int = 3
    seed: int = 0


def _environment(folder: Path, **more: str) -> dict[str, str]:
    """Without this environment's paths, and with an empty cache of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return kept | {"LOGITFUSE_CACHE": str(folder / "cache")} | more


def _demo(words: Sequence[str], tree: Path, environment: Mapping[str, str]) -> None:
    """Run make in a tree; there is a report afterwards."""
    done = subprocess.run(
        ["make", *words], cwd=tree, env=environment, stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise MeasureError(f"make {' '.join(words)}: exit code {done.returncode}")
    if not (tree / REPORT).is_file():
        raise MeasureError(f"make {' '.join(words)} wrote no {REPORT}")


def first_report(asked: Asked, root: Path = ROOT) -> dict[str, Any]:
    """From a clone of the last commit to the demo's report."""
    del asked
    with tempfile.TemporaryDirectory() as name:
        tree, start = Path(name) / "clone", time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(root), str(tree)], check=True)
        _demo(["demo"], tree, _environment(Path(name)))
        return {"first_report_seconds": time.monotonic() - start}


def demo_cpu(asked: Asked, prefix: str = sys.prefix) -> dict[str, Any]:
    """CPU seconds of the demo's stages over those of another commit.

    Args:
        asked: With `before`.
        prefix: The virtual environment whose packages both have.
    """
    if asked.before is None:
        raise MeasureError("demo_cpu needs --before COMMIT, the other side")
    seconds = {commit: _cpu_seconds(commit, prefix) for commit in (asked.before, "HEAD")}
    return {
        "demo_cpu_seconds": seconds["HEAD"] / seconds[asked.before],
        "demo_cpu_now_s": seconds["HEAD"],
        "demo_cpu_before_s": seconds[asked.before],
    }


def _cpu_seconds(commit: str, prefix: str) -> float:
    """CPU seconds of `make demo` in a commit's tree, with packages that are installed already."""
    with checked_out(commit) as tree:
        environment = _environment(tree, PYTHONPATH=str(tree))
        # The mark of an installed environment counts as old: make would install this tree into it.
        words = ["-o", f"{prefix}/.ready", "demo", f"VENV={prefix}"]
        before = _children_s()
        _demo(words, tree, environment)
        return _children_s() - before


def _children_s() -> float:
    """CPU seconds of all processes that this one, or one of them, has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def recorded(tests: Sequence[str], name: str, root: Path = ROOT) -> list[float]:
    """What tests record (`record_property`) under a name.

    Args:
        tests: Files in tests/; they are run.
        name: Of the property.
        root: The repository.

    Raises:
        MeasureError: One of them fails, or none records it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}"]
        words += ["-o", "junit_family=xunit1"]  # which has properties of tests
        words += [f"tests/{test}" for test in tests]
        done = subprocess.run(
            words, cwd=root, env=os.environ | CALM, stdout=sys.stderr, check=False
        )
        if done.returncode:
            raise MeasureError(f"{', '.join(tests)}: exit code {done.returncode}")
        found = ElementTree.parse(report).iter("property")
        values = [float(each.attrib["value"]) for each in found if each.attrib["name"] == name]
    if not values:
        raise MeasureError(f"{', '.join(tests)}: no test records {name}")
    return values


def docs_blocks(asked: Asked) -> dict[str, Any]:
    """Share of blocks that are run, by the tests that run them."""
    del asked
    tests = ("test_docs_blocks.py", *ELSEWHERE.values())
    return {"docs_blocks_run": min(recorded(tests, "docs_blocks_run"))}


def import_capture(asked: Asked) -> dict[str, Any]:
    """Largest error of an imported log-probability, in nats."""
    del asked
    errors = recorded(CAPTURE_TESTS, "import_capture_max_error")
    return {"import_capture_max_error": max(errors), "import_capture_cases": len(errors)}


def mutants_killed(asked: Asked) -> dict[str, Any]:
    """Shares of `benchmarks.mutants`."""
    kept = mutants.Kept(mutants.KEPT)
    subjects, equivalent = mutants.read_config()
    found = mutants.measure(subjects, equivalent, count=asked.count, seed=asked.seed, kept=kept)
    print(mutants.table(found))
    return found


PARTS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "first_report": first_report,
    "demo_cpu": demo_cpu,
    "docs_blocks": docs_blocks,
    "mutants": mutants_killed,
    "import_capture": import_capture,
}


def table(found: Mapping[str, Any]) -> str:
    """Figures beside their goals, for people."""
    rows = [f"{'figure':<28}{'goal':>12}{'seen':>14}"]
    for name, (sign, goal) in GOALS.items():
        value = found.get(name)
        seen = "not measured" if value is None else f"{value:,.4g}"
        met = value is None or (value <= goal if sign == "<=" else value >= goal)
        rows.append(f"{name:<28}{f'{sign} {goal:,}':>12}{seen:>14}{'' if met else '  missed'}")
    return "\n".join(rows)


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, by commas.")
@click.option("--skip", default="", help="Which not, by commas.")
@click.option("--before", help="Commit whose demo is the other side of demo_cpu.")
@click.option("--count", type=click.IntRange(min=1), default=3, help="Mutants of each module.")
@click.option("--seed", default=0, help="Of the sample of mutants.")
def main(parts: str, skip: str, before: str | None, count: int, seed: int) -> None:
    """Measure, and print one JSON object as the last line."""
    names = [part for part in parts.split(",") if part not in skip.split(",")]
    unknown = sorted({*names, *filter(None, skip.split(","))} - set(PARTS))
    if unknown:
        raise click.ClickException(f"no part {', '.join(unknown)}: one of {', '.join(PARTS)}")
    found: dict[str, Any] = dict.fromkeys(GOALS)
    not_measured: dict[str, str] = {}
    for name in names:
        print(f"-- {name}", flush=True)
        try:
            found |= PARTS[name](Asked(before, count, seed))
        except (MeasureError, UnavailableError) as error:
            not_measured[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    print(table(found))
    print(json.dumps(found | {"not_measured": not_measured}))
    if not_measured:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
