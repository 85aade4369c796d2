"""Tasks of lm-evaluation-harness in a study: run once on each model, kept, and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fuse_eval import bpb
from fuse_eval.config import EvaluateSection
from fuse_eval.harness.config import HarnessSection
from fuse_eval.harness.figures import paired_difference
from launch.signals import StopFlag
from store_schema import SCHEMA_VERSION
from store_schema.config import ModelRef, RunConfig, StrictModel
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal
from store_schema.fingerprint import fingerprint

_AGAIN = "delete the folder, and the model is trained and scored again"


class HarnessRecord(StrictModel):
    """harness-*.json: one model's results in the tasks of a setting."""

    schema_version: int = SCHEMA_VERSION
    version: str
    """Of lm-evaluation-harness."""
    scores: dict[str, dict[str, dict[str, float | bool | None]]]
    """{task or group: {metric: {value, stderr, higher_is_better}}}, of what was asked for."""
    examples: dict[str, dict[str, dict[str, float]]]
    """{task: {metric: {number of the example: score}}}, of all tasks, those of groups too."""
    members: dict[str, tuple[str, ...]]
    """Tasks of each group."""

    def examples_of(self, name: str, metric: str) -> dict[str, float]:
        """Score of each example of a task, or of all tasks of a group."""
        if name not in self.members:
            return self.examples.get(name, {}).get(metric, {})
        return {
            f"{task} {number}": score
            for task in self.members[name]
            for number, score in self.examples.get(task, {}).get(metric, {}).items()
        }


def harness_file(section: HarnessSection) -> str:
    """Name of the file that keeps a model's results; other tasks or limits have another one."""
    return f"harness-{fingerprint(section.shaping)[:8]}.json"


class StudyHarness:
    """The tasks of a setting.

    Args:
        run: The run of all sources.
        section: Tasks and options.
    """

    def __init__(self, run: RunConfig, section: HarnessSection) -> None:
        self._run, self._section = run, section

    @cached_property
    def manager(self) -> Any:
        """The harness's index of tasks.

        Raises:
            ConfigError: The harness is not installed, or a task is not known.
        """
        from fuse_eval.harness.package import harness_version, task_manager

        harness_version()
        return task_manager(self._section)

    def ask(self, ref: ModelRef, folder: Path, stop: StopFlag) -> None:
        """Run the tasks on a model, and keep its results in `folder`, unless that was done.

        Raises:
            LogitfuseError: The harness is not installed, or a task cannot be run.
            Stopped: `stop` was set.
        """
        name = harness_file(self._section)
        if (folder / name).is_file():
            return
        stop.check()
        from fuse_eval.harness.package import harness_version, model_results

        device = bpb.device_of(self._run.section("evaluate", EvaluateSection).device)
        found = model_results(ref, self._section, self.manager, name=folder.name, device=device)
        every = {**found["groups"], **found["tasks"]}
        record = HarnessRecord(
            version=harness_version(),
            scores={task: every[task] for task in self._section.tasks if task in every},
            examples=found["examples"],
            members={group: tuple(tasks) for group, tasks in found["members"].items()},
        )
        folder.mkdir(parents=True, exist_ok=True)
        open_location(str(folder)).write_atomic(name, seal(record))


def read_harness(folder: Path, section: HarnessSection | None) -> HarnessRecord | None:
    """What was kept of a model; None where it was not asked.

    Raises:
        CorruptionError: It is damaged.
    """
    path = folder / harness_file(section) if section is not None else None
    if path is None or not path.is_file():
        return None
    return unseal(HarnessRecord, path.read_bytes(), where=str(path), hint=_AGAIN)


def task_scores(
    seeds: Sequence[Mapping[str, HarnessRecord]], row: str, against: str | None
) -> dict[str, dict[str, Any]]:
    """A row's scores, mean of the seeds, and their differences to another row's.

    Seeds answer the same questions. So the error of a mean is that of the questions (mean of the
    seeds' own), and a difference is of each question's mean score over the seeds.

    Args:
        seeds: Of each seed the results by row; seeds without the row's are left out.
        row: The row.
        against: Another one; None leaves the comparison out.

    Returns:
        {"task metric": {value, stderr, difference}}; `difference` as `paired_difference`, None
        without one. {} where the row was never asked.
    """
    asked = [by_row for by_row in seeds if row in by_row]
    if not asked:
        return {}
    both = [by_row for by_row in asked if against in by_row]
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in asked[0][row].scores.items():
        for metric in metrics:
            kept = [by_row[row].scores[task][metric] for by_row in asked]
            errors = [one["stderr"] for one in kept]
            known = [float(error) for error in errors if error is not None]
            apart = None
            if against is not None and both:
                ours, theirs = (
                    _mean_examples([by_row[name].examples_of(task, metric) for by_row in both])
                    for name in (row, against)
                )
                apart = paired_difference(ours, theirs)
            found[f"{task} {metric.removesuffix(',none')}"] = {
                "value": sum(float(one["value"] or 0.0) for one in kept) / len(kept),
                "stderr": sum(known) / len(known) if len(known) == len(errors) else None,
                "difference": apart,
            }
    return found


def _mean_examples(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean score of each example that all seeds have."""
    common = set(seeds[0]).intersection(*seeds[1:])
    return {number: sum(one[number] for one in seeds) / len(seeds) for number in common}
