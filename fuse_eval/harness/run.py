"""`eval harness`: scores of all models of a run on tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuse_eval import bpb
from fuse_eval.config import EvaluateSection
from fuse_eval.findings import BEFORE, CONTROL, FUSED
from fuse_eval.harness.config import HarnessSection
from fuse_eval.harness.figures import paired_difference
from fuse_eval.harness.package import harness_version, model_results, task_manager
from fuse_eval.run import StageResult, models_to_score
from fuse_eval.summary import HARNESS_FILE, read_json, report_location, write_json
from fuse_train.model.identity import identity
from launch.signals import StopFlag
from store_schema import __version__
from store_schema.config import ModelRef, RunConfig
from store_schema.fingerprint import bytes_digest, fingerprint

PAIRS = ((FUSED, CONTROL), (FUSED, BEFORE))


def run_harness(run: RunConfig, section: HarnessSection, stop: StopFlag) -> StageResult:
    """Run the tasks on every model of the evaluation, one in memory at a time.

    Each model's results are kept when they are whole, so a stopped evaluation goes on with the next.

    Args:
        run: The run.
        section: Tasks and options, `evaluate.harness` or with those of the command line.
        stop: Checked between models.

    Raises:
        MissingError: The fused model or the control is not trained yet.
        ConfigError: The harness is not installed, a task is not known, or cannot be run.
        ModelError: A model cannot be loaded, or has no chat template where one is asked for.
        Stopped: On a signal; results of models that are finished are kept.
    """
    evaluate = run.section("evaluate", EvaluateSection)
    by = {"harness": harness_version(), "by": __version__, "section": section.shaping}
    by["tasks"] = _own_tasks(section)
    models = {name: ref for name, (ref, _) in models_to_score(run, evaluate).items()}
    requests = {name: fingerprint([identity(ref), by]) for name, ref in models.items()}
    request = fingerprint(requests)
    report = report_location(run)
    before = read_json(report, HARNESS_FILE)
    if before is not None and before.get("fingerprint") == request:
        return StageResult(before, fresh=False)
    manager = task_manager(section)
    found: dict[str, dict[str, Any]] = {}
    for name, ref in models.items():
        stop.check()
        found[name] = _of_model(run, name, ref, requests[name], section, manager, evaluate)
        stop.progressed = True
    content = {"fingerprint": request, "version": by["harness"]} | _content(found, section)
    write_json(report, HARNESS_FILE, content)
    return StageResult(content, fresh=True)


def _own_tasks(section: HarnessSection) -> dict[str, str]:
    """Digests of the task files that are not the package's."""
    if section.include_path is None:
        return {}
    folder = Path(section.include_path)
    return {
        str(path.relative_to(folder)): bytes_digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".yaml", ".py")
    }


def _of_model(
    run: RunConfig,
    name: str,
    ref: ModelRef,
    request: str,
    section: HarnessSection,
    manager: Any,
    evaluate: EvaluateSection,
) -> dict[str, Any]:
    """Results of a model: kept ones if they are of the same request."""
    report, key = report_location(run), f"harness/{name}.json"
    kept = read_json(report, key)
    if kept is not None and kept.get("fingerprint") == request:
        return kept
    device = bpb.device_of(evaluate.device)
    results = model_results(ref, section, manager, name=name, device=device)
    record = {"fingerprint": request, "model": name} | results
    write_json(report, key, record)
    return record


def _content(found: dict[str, dict[str, Any]], section: HarnessSection) -> dict[str, Any]:
    """The content of harness.json but its fingerprint."""
    first = next(iter(found.values()))
    rows = [name for name in section.tasks if name in first["groups"] or name in first["tasks"]]
    scores = {
        name: {row: {**record["groups"], **record["tasks"]}[row] for row in rows}
        for name, record in found.items()
    }
    return {
        "tasks": rows,
        "limit": section.limit,
        "num_fewshot": section.num_fewshot,
        "versions": first["versions"],
        "scores": scores,
        "all_tasks": {name: record["tasks"] for name, record in found.items()},
        "differences": [
            _difference(found, model, against)
            for model, against in PAIRS
            if model in found and against in found
        ],
    }


def _difference(found: dict[str, dict[str, Any]], model: str, against: str) -> dict[str, Any]:
    """Paired differences of all tasks and metrics that score each example."""
    ours, theirs = (found[name]["examples"] for name in (model, against))
    tasks: dict[str, dict[str, Any]] = {}
    for task, metrics in ours.items():
        for metric, scores in metrics.items():
            apart = paired_difference(scores, theirs[task][metric])
            if apart is not None:
                tasks.setdefault(task, {})[metric] = apart
    return {"model": model, "against": against, "tasks": tasks}
