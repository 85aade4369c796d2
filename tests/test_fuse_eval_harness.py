"""`eval harness` with the real lm-evaluation-harness, on tasks whose data lie beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse_eval.harness.figures import example_scores, metrics_of, paired_difference
from tests import eval_run
from tests.command import ok, refused
from tests.harness_tasks import CHOICES, QUESTIONS, lm_eval_behind_ours, write_group, write_task

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and its datasets


@pytest.fixture(scope="module")
def package() -> Iterator[None]:
    with lm_eval_behind_ours():
        yield


@pytest.fixture(scope="module")
def evaluated(
    package: None,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    sample_texts: dict[str, list[str]],
) -> tuple[Path, dict[str, Any]]:
    """A run file, and what `--json` printed of two tasks in a group."""
    folder = tmp_path_factory.mktemp("harness")
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in ("first", "second", "third"):
        write_task(tasks, name)
    write_group(tasks, "both", ["first", "second"])
    run = eval_run.make_run(
        folder / "run",
        {name: tiny_models[name] for name in ("code", "target")},
        sample_texts,
        evaluate={"harness": {"include_path": str(tasks)}, "device": "cpu"},
    )
    eval_run.pretend_training(run)
    file = folder / "run/run.yaml"
    content = json.loads(ok("eval", "harness", file, "--tasks", "both,third", "--json"))
    return file, content


def choice(folder: Path, question: str) -> int:
    """Which choice a model finds more probable, by the plain sum of log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums = []
    for choice in CHOICES:
        ids = tokenizer(question + choice).input_ids
        start = len(tokenizer(question).input_ids)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
    return int(np.argmax(sums))


def test_scores_are_those_of_the_plain_way(evaluated: tuple[Path, dict[str, Any]]) -> None:
    file, content = evaluated
    assert set(content["scores"]) == {"target_before", "clm_control", "fused", "code"}
    for name, place in (("fused", "final"), ("clm_control", "control/final")):
        right = [choice(file.parent / place, text) == answer for text, answer in QUESTIONS]
        told = content["scores"][name]["third"]["acc,none"]
        assert told["value"] == pytest.approx(np.mean(right))
        assert told["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert content["tasks"] == ["both", "third"]
    assert content["versions"]["first"] == "1.5"


def test_a_group_has_its_own_score_and_differences_are_by_task(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    _, content = evaluated
    of_group = content["scores"]["fused"]["both"]["acc,none"]["value"]
    assert of_group == pytest.approx(content["scores"]["fused"]["third"]["acc,none"]["value"])
    pairs = [(item["model"], item["against"]) for item in content["differences"]]
    assert pairs == [("fused", "clm_control"), ("fused", "target_before")]
    apart = content["differences"][0]["tasks"]["first"]["acc,none"]
    scores = {
        name: tasks["third"]["acc,none"]["value"] for name, tasks in content["scores"].items()
    }
    assert apart["value"] == pytest.approx(scores["fused"] - scores["clm_control"])
    assert apart["examples"] == len(QUESTIONS)


def test_what_is_kept_is_not_run_again_and_a_limit_is_another_request(
    evaluated: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = evaluated
    report = file.parent / "report"
    shown = ok("eval", "harness", file, "--tasks", "both,third")
    assert "complete, nothing to do" in shown
    assert "third acc" in shown
    from fuse_eval.harness import run as stage

    asked: list[str] = []
    real = stage.model_results

    def noted(*given: Any, **named: Any) -> Any:
        asked.append(named["name"])
        return real(*given, **named)

    monkeypatch.setattr(stage, "model_results", noted)
    (report / "harness/fused.json").unlink()
    (report / "harness.json").unlink()
    again = ok("eval", "harness", file, "--tasks", "both,third")
    assert asked == ["fused"]
    assert again + "eval harness: complete, nothing to do\n" == shown
    limited = ok("eval", "harness", file, "--tasks", "third", "--limit", "4")
    assert len(asked) == 5
    assert "at most 4 examples" in limited
    ok("report", file)
    page = (report / "index.html").read_text()
    assert "lm-evaluation-harness" in page


def test_bad_input_is_one_line(
    evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = evaluated
    assert "no tasks given" in refused("eval", "harness", file)
    assert "got firts" in refused("eval", "harness", file, "--tasks", "first,firts")
    write_task(tmp_path, "gone", dataset_kwargs={"data_files": {"test": "/nowhere.jsonl"}})
    words = ("--set", f"evaluate.harness.include_path={tmp_path}")
    told = refused("eval", "harness", file, "--tasks", "gone", *words)
    assert "a task cannot be run" in told
    chat = ("--set", "evaluate.harness.chat_template=true")
    told = refused("eval", "harness", file, "--tasks", "first", *chat)
    assert "target_before has no chat template" in told
    from fuse_eval.harness import package as harness

    def absent(name: str) -> str:
        raise harness.PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", absent)
    told = refused("eval", "harness", file, "--tasks", "first")
    assert "pip install 'logitfuse[harness]'" in told


# --------------------------------------------------------------------------------------- pure functions


def test_metrics_are_read_with_their_errors() -> None:
    result = {
        "alias": "x", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 8.0,
        "ppl_stderr,none": "N/A", "text,none": "no number", "bad,none": math.nan,
    }  # fmt: skip
    found = metrics_of(result, {"ppl": False})
    assert found == {
        "acc,none": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
        "ppl,none": {"value": 8.0, "stderr": None, "higher_is_better": False},
    }


def test_examples_of_one_filter_are_read() -> None:
    samples = [
        {"doc_id": 0, "filter": "strict", "em": 1.0},
        {"doc_id": 0, "filter": "loose", "em": 0.0},
        {"doc_id": 1, "filter": "strict", "em": (1, 2)},
    ]
    assert example_scores(samples, "em,strict") == {"0": 1.0}
    assert example_scores(samples, "f1,strict") == {}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_a_paired_error_is_that_of_the_differences(pairs: list[tuple[bool, bool]]) -> None:
    ours = {str(i): float(a) for i, (a, _) in enumerate(pairs)}
    theirs = {str(i): float(b) for i, (_, b) in enumerate(pairs)} | {"other": 1.0}
    told = paired_difference(ours, theirs)
    assert told is not None
    apart = np.array([float(a) - float(b) for a, b in pairs])
    assert told["value"] == pytest.approx(apart.mean())
    assert told["stderr"] == pytest.approx(apart.std(ddof=1) / math.sqrt(len(pairs)))
    assert told["low"] <= told["value"] <= told["high"]
    assert paired_difference({"a": 1.0}, {"a": 1.0}) is None
