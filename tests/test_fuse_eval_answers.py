"""`eval answers`: who answers held-out prompts right, and how sure a difference is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fuse_eval.answers.asking as asking
from extract.engines.ending import AnswerRules
from extract.engines.protocol import Answer, EngineSpec, Prompt
from fuse_eval.answers.config import AnswersSection
from fuse_eval.answers.figures import difference, mean_scores
from fuse_eval.answers.held_out import held_out_prompts
from fuse_eval.config import EvaluateSection
from store_schema.config import load_run
from store_schema.layout import Finish
from store_schema.plan.run_plan import open_plan
from tests import command
from tests.command import ok
from tests.extract_runs import plan_run
from tests.judge_runs import answered, make_models

call = partial(command.call, "eval", "answers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose models are there, though nobody trained them."""
    root = tmp_path_factory.mktemp("answers")
    models = make_models(root / "models")
    path = answered(
        root / "run", models, {}, evaluate={"split": "train"}, extract={"engine": "transformers"}
    )
    folder = Path(load_run(path).folder)
    for name in "final", "control/final":
        shutil.copytree(models["target"], folder / name)
    return path


def content(path: Path, *words: str) -> dict[str, Any]:
    result = call(path, "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Scripted:
    """An engine that writes what a test chose."""

    def __init__(self, texts: Mapping[str, str | tuple[str, Finish]]) -> None:
        self.texts = texts

    def answer(self, prompts: Sequence[Prompt], rules: AnswerRules) -> Iterator[tuple[int, Answer]]:
        ids = {token: i for i, token in reversed(list(enumerate(rules.tokens))) if len(token) == 1}
        for place in reversed(range(len(prompts))):
            asked = b"".join(rules.tokens[i] for i in prompts[place].input_ids).decode()
            text = next((self.texts[part] for part in self.texts if part in asked), "No idea.")
            text, finish = text if isinstance(text, tuple) else (text, Finish.STOP)
            written = [ids[bytes([byte])] for byte in text.encode()]
            if finish == Finish.STOP:
                written.append(min(rules.end_ids))
                finish = Finish.STOP if text else Finish.EMPTY
            yield place, Answer(np.array(written), finish)

    def close(self) -> None:
        pass


def script(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models say what stands in SAID; returns the names of those that were asked."""
    asked: list[str] = []

    def opened(spec: EngineSpec) -> Scripted:
        asked.append(spec.source)
        return Scripted(SAID.get(spec.source, {}))

    monkeypatch.setattr(asking, "open_engine", opened)
    return asked


SAID: dict[str, dict[str, Any]] = {
    "fused": {"5 - 3": "2", "3 + 4": "It is 7.", "1 / 2": "1/2", "colour": "A red thing, 1."},
    "clm_control": {
        "5 - 3": "3",
        "3 + 4": "It is 7.",
        "1 / 2": "1/2",
        "colour": ("A red thing, 1.", Finish.LENGTH),
    },
    "target_before": dict.fromkeys(("5 - 3", "3 + 4", "1 / 2", "colour", "2 + 2"), ""),
}
"""What the models say, by a part of the prompt."""


def test_right_answers_are_counted_by_domain(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = script(monkeypatch)
    found = content(trained)
    assert found["prompts"] == {"chat": 1, "sums": 4}
    assert found["scores"]["fused"] == {"chat": 1.0, "sums": 0.75}
    assert found["scores"]["clm_control"] == {"chat": 0.0, "sums": 0.75}
    assert found["scores"]["target_before"] == {"chat": 0.0, "sums": 0.0}
    assert found["mean_score"]["fused"] == pytest.approx(0.875)
    assert found["ended"]["fused"] == 1.0
    assert found["ended"]["clm_control"] == pytest.approx(0.8)
    assert found["ended"]["target_before"] == 0.0
    against = {item["against"]: item["mean"]["value"] for item in found["comparisons"]}
    assert against == {"clm_control": pytest.approx(0.5), "target_before": pytest.approx(0.875)}
    # Every model once: target, control, fused and both sources. Then nothing is left to do.
    assert len(asked) == len(set(asked)) == 5
    again = call(trained)
    assert again.exit_code == 0, again.output
    assert "complete, nothing to do" in again.stdout
    assert len(asked) == 5
    assert "87.5 %" in again.stdout
    assert "fused against CLM control: +50.0 points" in again.stdout
    # Another judge asks no model again.
    overlap = content(
        trained, "--set", 'evaluate.answers.judge={"kind": "exact_answer", "pattern": "red"}'
    )
    assert len(asked) == 5
    assert overlap["prompts"] == {"sums": 1}
    assert sum(overlap["left_out"].values()) == 4
    assert overlap["scores"]["fused"] == {"sums": 1.0}
    ok("report", trained)
    page = (Path(load_run(trained).folder) / "report/index.html").read_text()
    assert "Share of 1 held-out prompts that are answered right" in page


def test_a_limit_spreads_over_the_prompts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch)
    found = content(trained, "--set", "evaluate.answers.limit=2")
    assert found["prompts"] == {"chat": 1, "sums": 2}
    section = EvaluateSection(split="train", answers=AnswersSection(limit=2))
    plan = open_plan(load_run(trained))
    every = held_out_prompts(plan, section.model_copy(update={"answers": AnswersSection()}))
    sums = [s.document_id for s in every if s.domain == "sums"]
    taken = [s.document_id for s in held_out_prompts(plan, section)]
    assert taken == ["talk/turn-0", sums[0], sums[2]]


def test_a_stopped_run_asks_no_model_twice(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch)
    report_folder = Path(load_run(trained).folder) / "report"
    content(trained, "--set", "evaluate.answers.max_tokens=30")
    assert len(asked) == 5
    (report_folder / "answers.json").unlink()  # stopped behind the last model
    (report_folder / "answers/fused.json").unlink()
    content(trained, "--set", "evaluate.answers.max_tokens=30")
    assert asked[5:] == ["fused"]


def test_all_are_asked_alike_and_again_when_that_changes(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: dict[str, list[bytes]] = {}

    class Listening(Scripted):
        name = ""

        def answer(self, asked: Sequence[Prompt], rules: AnswerRules) -> Any:
            said = [b"".join(rules.tokens[i] for i in one.input_ids) for one in asked]
            prompts[self.name] = said
            return super().answer(asked, rules)

    def opened(spec: EngineSpec) -> Scripted:
        engine = Listening({})
        engine.name = spec.source
        return engine

    monkeypatch.setattr(asking, "open_engine", opened)
    template = trained.parent / "other.jinja"
    template.write_text("{% for m in messages %}!! {{ m.content }}{{ eos_token }}\n{% endfor %}")
    words = ("--set", f"target.template.file={template}", "--set", "evaluate.answers.max_tokens=20")
    content(trained, *words)
    assert prompts["fused"] == prompts["target_before"] == prompts["clm_control"]
    assert any(b"!! " in prompt for prompt in prompts["fused"])
    prompts.clear()
    content(trained, *words)
    assert not prompts
    final = Path(load_run(trained).folder) / "final/generation_config.json"
    before = final.read_text()
    final.write_text(json.dumps({"eos_token_id": [2, 5]}))
    try:
        content(trained, *words)
    finally:
        final.write_text(before)
    assert list(prompts) == ["fused"]


def test_prompts_that_do_not_fit_are_told(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch)
    result = call(trained, "--set", "evaluate.answers.max_tokens=5000")
    assert result.exit_code == 2
    assert "no prompt leaves target_before room for an answer" in result.stderr
    said = call(trained, "--set", "evaluate.answers.max_tokens=76")
    assert said.exit_code == 0, said.output
    assert "counted as wrong (prompt too long)" in said.stdout


def test_the_real_engine_says_what_generate_says(trained: Path) -> None:
    greedy = ("--set", "evaluate.answers.max_tokens=6", "--set", "evaluate.sources=false")
    found = content(trained, *greedy)
    assert set(found["scores"]) == {"fused", "clm_control", "target_before"}
    folder = Path(load_run(trained).folder)
    said = {
        name: json.loads((folder / f"report/answers/{name}.json").read_text())["answers"]
        for name in ("fused", "target_before")
    }
    assert said["fused"] == said["target_before"]  # the same weights
    # The same model as a source of `extract generate`.
    from tests.extract_runs import write_run

    models = {"twin": folder / "final", "target": folder / "final"}
    other = folder.parent / "twin"
    other.mkdir()
    shutil.copy(trained.parent / "docs.jsonl", other / "docs.jsonl")
    twin = write_run(
        other,
        models,
        plan={"max_tokens": 96, "shard_tokens": 16},
        generate={"max_tokens": 6, "temperature": 0.0},
        extract={"engine": "transformers"},
    )
    plan_run(twin)
    ok("extract", "generate", twin)
    ok("extract", "answers", twin, "--out", other / "answers.jsonl", "--keep-cut")
    rows = map(json.loads, (other / "answers.jsonl").read_text().split("\n")[:-1])
    written = {row["id"].removesuffix("/twin/0"): row["response"] for row in rows}
    texts = {answer["document_id"]: answer["text"] for answer in said["fused"]}
    compared = written.keys() & texts.keys()
    assert len(compared) >= 2
    assert {name: texts[name] for name in compared} == {name: written[name] for name in compared}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("evaluate.split=nowhere",), "no prompt in split nowhere"),
        (("evaluate.answers.judge=likelihood",), "does not tell whether an answer is right"),
        (("evaluate.answers.judge=exact",), "exact_answer"),
        (
            ('evaluate.answers.judge={"kind": "exact_answer", "pattern": "colourless"}',),
            "the judge has a score for no answer",
        ),
    ],
)
def test_bad_input_is_one_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    script(monkeypatch)
    result = call(trained, *(word for one in words for word in ("--set", one)))
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert len([x for x in result.stderr.splitlines() if x.startswith("error: ")]) == 1


def test_a_judge_of_no_shares_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch)
    (tmp_path / "long.py").write_text("def long(asked):\n    return len(asked['answer'])\n")
    judge = json.dumps({"kind": "python", "function": f"{tmp_path}/long.py:long"})
    result = call(trained, "--set", f"evaluate.answers.judge={judge}")
    assert result.exit_code == 2, result.output
    assert "a share from 0 (wrong) to 1 (right)" in result.stderr


def test_without_a_trained_model_it_says_what_to_run(trained: Path) -> None:
    result = call(trained, "--set", "run_dir=" + str(trained.parent / "nowhere"))
    assert result.exit_code == 2
    assert "error: " in result.stderr


def test_differences_are_paired_and_their_intervals_hold() -> None:
    rng = np.random.default_rng(3)
    domains = ["a"] * 40 + ["b"] * 10
    held, runs = 0, 200
    for number in range(runs):
        hard = rng.random(50)
        model = (rng.random(50) < 0.2 + 0.5 * hard).astype(float)
        other = (rng.random(50) < 0.1 + 0.5 * hard).astype(float)
        found = difference(model, other, domains, samples=400, confidence=0.95, seed=number)
        held += found["mean"]["low"] <= 0.1 <= found["mean"]["high"]
    assert 0.88 <= held / runs <= 1.0
    same = difference(model, model, domains, samples=200, confidence=0.95, seed=0)
    assert same["mean"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert mean_scores(np.array([1.0, 0.0, 1.0]), ["b", "b", "a"]) == {"a": 1.0, "b": 0.5}
    exact = difference(
        np.array([1.0, 0.0, 1.0]), np.zeros(3), ["b", "b", "a"], samples=200, confidence=0.9, seed=0
    )
    assert exact["mean"]["value"] == pytest.approx(0.75)
    assert exact["domains"]["a"] == {"value": 1.0, "low": 1.0, "high": 1.0}
