"""lm-evaluation-harness for tests, and tasks whose data lie beside them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.environments import UnavailableError, environment, packages_of

VERSION = "0.4.13"
QUESTIONS = [(f"def f{i}(a): return ", i % 2) for i in range(10)]
CHOICES = ("a", "None")


@contextmanager
def lm_eval_behind_ours() -> Iterator[None]:
    """lm-evaluation-harness behind our packages: what it needs would slow every other test's start."""
    try:
        python = environment("lm-eval", VERSION, "lm_eval")
    except UnavailableError as error:
        if os.environ.get("LOGITFUSE_REQUIRE_MERGEKIT"):
            raise
        pytest.skip(f"no lm-eval: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(packages_of(python))])
        yield


def write_task(folder: Path, name: str, **changed: Any) -> None:
    """A task of two choices with its data."""
    data = folder / f"{name}.jsonl"
    lines = [json.dumps({"question": text, "answer": answer}) for text, answer in QUESTIONS]
    data.write_text("\n".join(lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": list(CHOICES),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.5},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changed))


def write_group(folder: Path, name: str, tasks: list[str]) -> None:
    """A group of tasks with a score of its own."""
    content = {
        "group": name,
        "task": tasks,
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
