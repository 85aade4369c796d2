"""The one place that touches lm-evaluation-harness: its tasks, and one model's results."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fuse_eval import bpb
from fuse_eval.harness.config import HarnessSection
from fuse_eval.harness.figures import example_scores, metrics_of
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, ModelError
from store_schema.text.tokenizer import SegmentTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

PACKAGE = "lm-eval"
_BOOTSTRAP = 1000
"""Resamples of metrics whose standard error has no formula."""


def harness_version() -> str:
    """Version of the installed package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed",
            where="eval harness",
            hint="pip install 'logitfuse[harness]'",
        ) from error


def task_manager(section: HarnessSection) -> Any:
    """The harness's index of tasks.

    Raises:
        ConfigError: A name that is no task, or no task at all.
    """
    if not section.tasks:
        raise ConfigError(
            "no tasks given",
            where="evaluate.harness.tasks",
            hint="name some, such as --tasks gsm8k,arc_easy (`lm_eval ls tasks` lists them)",
        )
    asked, own = set(section.tasks), section.include_path
    with _quiet():
        from lm_eval.tasks import TaskManager

        # The package's own thousands take seconds to read: only where they are asked for.
        manager = TaskManager(include_path=own, include_defaults=False) if own else None
        if manager is None or not asked <= set(manager.all_tasks):
            manager = TaskManager(include_path=own)
    unknown = sorted(asked - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            "no such task",
            where="evaluate.harness.tasks",
            expected="names that `lm_eval ls tasks` lists, or of include_path",
            got=", ".join(unknown),
        )
    return manager


def model_results(
    ref: ModelRef, section: HarnessSection, manager: Any, *, name: str, device: torch.device
) -> dict[str, Any]:
    """Run all tasks on one model, which is loaded and freed again.

    Args:
        ref: The model.
        section: Tasks and options.
        manager: From `task_manager`.
        name: Of the model, for messages.
        device: Where it runs.

    Returns:
        `tasks` {task: metrics}, `groups` the same of groups, `examples` {task: {metric: {number:
        score}}}, `versions` {task: version}, `members` {group: its tasks}.

    Raises:
        ConfigError: A task needs a dataset that cannot be had, or code that may not be run.
        ModelError: The model cannot be loaded.
    """
    from fuse_train.model.models import load_model

    tokenizer = SegmentTokenizer.load(ref, name=name)
    model = load_model(ref, where=name, dtype=bpb.score_dtype(ref), device=device)
    try:
        # Written as our own reading of it, so that the harness tokenises as training did.
        with tempfile.TemporaryDirectory(prefix="logitfuse-") as folder, _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from transformers import AutoTokenizer

            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            written = AutoTokenizer.from_pretrained(folder)
            if section.chat_template and not written.chat_template:
                raise ModelError(
                    f"{name} has no chat template",
                    where=ref.model,
                    hint="set evaluate.harness.chat_template to false",
                )
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=written, batch_size=section.batch_size),
                tasks=list(section.tasks),
                task_manager=manager,
                num_fewshot=section.num_fewshot,
                limit=section.limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=section.chat_template,
                confirm_run_unsafe_code=section.run_model_code,
                log_samples=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "a task cannot be run",
            where=f"evaluate.harness.tasks on {name}",
            got=f"{type(error).__name__}: {str(error)[:300]}",
            hint="datasets come from a hub or a local path of the task; a task that runs a model's "
            "code needs run_model_code: true",
        ) from error
    finally:
        del model
        gc.collect()
    return _record(found)


def _record(found: Mapping[str, Any]) -> dict[str, Any]:
    better = found.get("higher_is_better", {})
    groups = found.get("groups") or {}
    tasks = {
        task: metrics_of(result, better.get(task, {}))
        for task, result in found["results"].items()
        if task not in groups
    }
    samples = found.get("samples") or {}
    return {
        "tasks": tasks,
        "groups": {n: metrics_of(result, better.get(n, {})) for n, result in groups.items()},
        "examples": {
            task: {metric: example_scores(samples.get(task, ()), metric) for metric in metrics}
            for task, metrics in tasks.items()
        },
        "versions": {task: str(v) for task, v in found.get("versions", {}).items()},
        "members": {
            name: _members(name, found.get("group_subtasks", {}), tasks) for name in groups
        },
    }


def _members(
    group: str, children: Mapping[str, Sequence[str]], tasks: Collection[str]
) -> list[str]:
    """Tasks of a group, those of groups within it too."""
    return [
        task
        for child in children.get(group, ())
        for task in ([child] if child in tasks else _members(child, children, tasks))
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's own lines below warnings, and its progress bars as they are."""
    before = os.environ.get("LMEVAL_LOG_LEVEL")
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LMEVAL_LOG_LEVEL"]
        else:
            os.environ["LMEVAL_LOG_LEVEL"] = before
