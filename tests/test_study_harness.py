"""Tasks of lm-evaluation-harness in a study: once on each model, kept, with their errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from fuse_eval.harness.config import HarnessSection
from fuse_eval.study.harness import (
    HarnessRecord,
    StudyHarness,
    harness_file,
    read_harness,
    task_scores,
)
from launch.signals import StopFlag
from store_schema.config import ModelRef, load_run
from store_schema.errors import CorruptionError
from tests.command import ok, refused
from tests.harness_tasks import QUESTIONS, lm_eval_behind_ours, write_group, write_task
from tests.test_end_to_end import write_run
from tests.test_study import PLAIN, study_file

# ---- figures ---------------------------------------------------------------------------------------


def record(*groups: list[float]) -> HarnessRecord:
    """Scores of the examples of tasks t0, t1, ... of one group `all`."""
    both = [score for scores in groups for score in scores]

    def metric(scores: list[float]) -> dict[str, dict[str, float | bool | None]]:
        error = float(np.std(scores, ddof=1) / math.sqrt(len(scores)))
        value = float(np.mean(scores))
        return {"acc,none": {"value": value, "stderr": error, "higher_is_better": True}}

    tasks = {f"t{i}": scores for i, scores in enumerate(groups)}
    return HarnessRecord(
        version="1",
        scores={"all": metric(both), "t0": metric(groups[0])},
        examples={
            task: {"acc,none": {str(i): score for i, score in enumerate(scores)}}
            for task, scores in tasks.items()
        },
        members={"all": tuple(tasks)},
    )


def test_differences_are_of_the_same_questions_over_seeds_and_groups() -> None:
    ours = [record([1, 1, 0], [1, 0]), record([1, 0, 0], [1, 1])]
    theirs = [record([1, 0, 0], [0, 0]), record([0, 0, 1], [0, 1])]
    seeds = [{"ours": a, "control": b} for a, b in zip(ours, theirs, strict=True)]
    found = task_scores(seeds, "ours", "control")
    assert list(found) == ["all acc", "t0 acc"]
    apart = np.array([0.5, 0.5, -0.5, 1.0, 0.0])  # means of the seeds, question by question
    told = found["all acc"]
    assert told["value"] == pytest.approx(0.6)
    assert told["difference"]["value"] == pytest.approx(apart.mean())
    assert told["difference"]["stderr"] == pytest.approx(apart.std(ddof=1) / math.sqrt(5))
    errors = [one.scores["all"]["acc,none"]["stderr"] for one in ours]
    assert told["stderr"] == pytest.approx(np.mean(errors))
    assert found["t0 acc"]["difference"]["value"] == pytest.approx(apart[:3].mean())


def test_rows_that_were_not_asked_have_no_scores() -> None:
    one = record([1, 0], [1, 0])
    assert task_scores([{"ours": one}], "control", None) == {}
    assert task_scores([{"ours": one}], "ours", "control")["t0 acc"]["difference"] is None
    assert task_scores([{"ours": one}, {}], "ours", None)["t0 acc"]["value"] == 0.5


def test_other_tasks_are_other_results() -> None:
    sections = [HarnessSection(tasks=("a",)), HarnessSection(tasks=("a",), limit=3)]
    assert len({harness_file(section) for section in sections}) == 2
    same = HarnessSection(tasks=("a",), batch_size=3)
    assert harness_file(same) == harness_file(sections[0])


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Iterator[None]:
    with lm_eval_behind_ours():
        yield


@pytest.mark.filterwarnings("ignore")  # of the harness and its datasets
@pytest.mark.usefixtures("package")
def test_a_model_is_asked_once_and_its_groups_have_their_tasks(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        write_task(tmp_path, name)
    write_group(tmp_path, "inner", ["first"])
    write_group(tmp_path, "outer", ["inner", "second"])
    section = HarnessSection(tasks=("outer", "third"), include_path=str(tmp_path), limit=4)
    harness = StudyHarness(load_run(write_run(tmp_path, tiny_models)), section)
    ref, folder = ModelRef(model=str(tiny_models["code"]), dtype="float32"), tmp_path / "kept"
    harness.ask(ref, folder, StopFlag())
    found = read_harness(folder, section)
    assert found is not None
    assert list(found.scores) == ["outer", "third"]
    assert found.members["outer"] == ("first", "second")
    both = found.examples_of("outer", "acc,none")
    assert len(both) == 2 * 4
    assert found.scores["outer"]["acc,none"]["value"] == pytest.approx(sum(both.values()) / 8)
    from fuse_eval.harness import package as of_harness

    monkeypatch.setattr(of_harness, "model_results", None)  # a second call would fail
    harness.ask(ref, folder, StopFlag())
    assert read_harness(folder, section.model_copy(update={"limit": 5})) is None
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptionError, match=path.name):
        read_harness(folder, section)


@pytest.mark.filterwarnings("ignore")  # of the harness and its datasets
@pytest.mark.usefixtures("package", "quick_processes")
def test_every_model_does_the_tasks_once(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("first", "second"):
        write_task(tasks, name)
    write_group(tasks, "both", ["first", "second"])
    run = write_run(tmp_path, tiny_models)
    content = yaml.safe_load(run.read_text())
    content["train"] |= {"max_steps": 2, "eval_every": 1, "asn": {"pretrain_steps": 1}}
    run.write_text(yaml.safe_dump(content))
    harness = {"tasks": ["both"], "include_path": str(tasks), "limit": 6}
    setting = {"run": str(run), "harness": harness, "set": {"evaluate.pool_selectors": ["uniform"]}}
    rows = {"before": {"model": "target"}, "control": {"set": PLAIN}, "ours": {}}
    changed = {"settings": {"toy": setting}, "rows": rows, "interference_against": None}
    absent = setting | {"harness": harness | {"tasks": ["nothing"]}}
    file = study_file(tmp_path, run, **changed | {"settings": {"toy": absent}})
    ok("study", "run", file, "--data-only")
    assert "no such task" in refused("study", "run", file)
    assert not list((tmp_path / "results").rglob("training.json"))  # nothing was trained for it
    file = study_file(tmp_path, run, **changed)
    said = ok("study", "run", file)
    assert "tasks of lm-evaluation-harness" in said
    assert "both acc" in said
    found = json.loads((tmp_path / "results/study.json").read_text())["settings"]["toy"]["rows"]
    assert all(0 <= row["tasks"]["both acc"]["value"] <= 1 for row in found.values())
    assert found["ours"]["tasks"]["both acc"]["difference"]["examples"] == 2 * min(
        6, len(QUESTIONS)
    )
    assert "tasks of lm-evaluation-harness" in (tmp_path / "results/index.html").read_text()
    section = HarnessSection.model_validate(harness)
    kept = sorted((tmp_path / "results").rglob(harness_file(section)))
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    ok("study", "run", file)
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_a_setting_without_tasks_is_refused(tmp_path: Path) -> None:
    file = study_file(tmp_path, tmp_path / "run.yaml")
    content = yaml.safe_load(file.read_text())
    content["settings"]["toy"]["harness"] = {"limit": 3}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert "name the tasks" in refused("study", "plan", file)
