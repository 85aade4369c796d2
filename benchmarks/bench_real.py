"""`make bench-real`: what `make real` came to, and the pipeline's speed on its published models.

Figures of quality come from what `make real` left behind; each speed is measured now, both sides of a
ratio in one run of its own script (benchmarks/real_*.py). Families are the tests of
tests/test_published_families.py; cases are folders with a `run.sh` that prints `FAULT: ...` for each
thing that is wrong, given with --cases.

    python -m benchmarks.bench_real --part extract --part train     # some parts alone
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from align.report.report import build_report
from benchmarks.case_scripts import without_fault
from extract.config import CorpusSection
from fuse_eval.findings import CONTROL, FUSED
from fuse_eval.summary import build_summary
from store_schema.config import RunConfig, load_run
from store_schema.errors import MissingError
from store_schema.model.models import resolve_model

GOALS: dict[str, tuple[str, float | str]] = {
    "pool_minus_best_source": ("<=", -0.04),
    "aligned_over_own": ("<=", 1.001),
    "coverage": (">=", 0.995),
    "tokenizer_open_ratio": ("<=", 1.6),
    "plan_tokens_per_s": (">=", 0.5),
    "extract_ratio": (">=", 1.5),
    "train_ratio": ("<=", 1.15),
    "train_memory_ratio": ("<=", 1.0),
    "seconds": ("<=", 4_500),
    "peak_rss_bytes": ("<=", 8 << 30),
}


def last_json(*words: str) -> dict[str, Any]:
    """The JSON object that a script prints last; its tables go to standard error."""
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.strip().splitlines()
    print("\n".join(lines), file=sys.stderr)
    found: dict[str, Any] = json.loads(last)
    return found


def quality(run: RunConfig) -> dict[str, Any]:
    """What the run's stages left behind.

    Raises:
        MissingError: The run has not come to its report.
    """
    summary = build_summary(run)
    comparisons = summary["evaluation"].get("comparisons", [])
    pairs = [c for c in comparisons if (c["model"], c["against"]) == (FUSED, CONTROL)]
    if not pairs or not summary["pool"]:
        raise MissingError("the run has no evaluation", where=run.folder, hint="make real first")
    found = pairs[0]
    pools, alone = summary["pool_bpb"], summary["pool"]["alone_bpb"]
    best = min(mean(by_domain) for by_domain in alone.values())
    aligned = build_report(run, list(run.sources), num_worst=0)["sources"]
    return {
        "fused_minus_control": {
            **{domain: change["value"] for domain, change in found["domains"].items()},
            "mean": [found["mean"][key] for key in ("value", "low", "high")],
        },
        "pool_minus_best_source": mean(pools["asn"]) / best - 1,
        "aligned_over_own": {
            source: item["all"]["aligned_bpb"] / item["all"]["source_bpb"]
            for source, item in aligned.items()
        },
        "coverage": summary["coverage"],
        "seconds": sum(summary["seconds"].values()),
        "peak_rss_bytes": summary["peak_rss_bytes"],
    }


def mean(by_domain: dict[str, float]) -> float:
    """Each domain with equal weight."""
    return sum(by_domain.values()) / len(by_domain)


def families() -> dict[str, int]:
    """Families that pass, are refused with a reason, and fail."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "families.xml"
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "tests/test_published_families.py"),
                f"--junitxml={written}",
            ],
            stdout=sys.stderr,
            env=os.environ | {"LOGITFUSE_REQUIRE_PUBLISHED": "1"},
        )
        cases = list(ElementTree.parse(written).iter("testcase"))
    counts = {"pass": 0, "refused": 0, "fail": 0}
    for case in cases:
        failed = case.find("failure") is not None or case.find("error") is not None
        refused = "refused" in case.attrib["name"]
        counts["fail" if failed else "refused" if refused else "pass"] += 1
    return counts


def table(found: dict[str, Any]) -> str:
    """Figures beside their goals, for people."""
    lines = [f"{'figure':<26}{'goal':>16}  seen"]
    for name, value in found.items():
        sign, goal = GOALS.get(name, ("", ""))
        values = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in values:
            label = f"{name} {key}".strip()
            shown = f"{item:,.4g}" if isinstance(item, float) else str(item)
            lines.append(f"{label:<26}{sign + ' ' + format(goal):>16}  {shown}")
    return "\n".join(lines)


def measures(run: RunConfig, cases: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by part."""
    refs = {**run.sources, "target": run.target}
    texts = [item.path for item in run.section("corpus", CorpusSection).inputs]

    def folders(*names: str) -> dict[str, str]:
        return {name: str(resolve_model(refs[name])) for name in names}

    def script(name: str, *words: str) -> dict[str, Any]:
        return last_json("-m", f"benchmarks.real_{name}", *words)

    def plan() -> dict[str, Any]:
        return script("plan", "--models", *folders(*refs).values(), "--texts", *texts)

    def extract() -> dict[str, Any]:
        named = [f"{name}={folder}" for name, folder in folders(*run.sources).items()]
        return script("extract", *named, *(word for text in texts for word in ("--text", text)))

    return {
        "quality": lambda: quality(run),
        "tokenizers": lambda: script("tokenizers", *folders(*refs).values()),
        "plan": plan,
        "extract": extract,
        "train": lambda: script("train", folders("target")["target"]),
        "families": lambda: {"families": families()},
        "cases": lambda: {"cases": without_fault(cases) if cases else {}},
    }


@click.command()
@click.option("--config", default="examples/real.yaml", show_default=True)
@click.option("--cases", type=click.Path(exists=True, path_type=Path), help="Folder of cases.")
@click.option("--part", "parts", multiple=True, help="Only these parts.")
def main(config: str, cases: Path | None, parts: tuple[str, ...]) -> None:
    """Measure all parts."""
    found: dict[str, Any] = {}
    for name, measure in measures(load_run(config), cases).items():
        if not parts or name in parts:
            found |= measure()
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
