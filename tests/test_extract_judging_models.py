"""Judges that ask models: reward models, and likelihood under the other sources."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from extract.run import run_source
from launch.work import Part
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok
from tests.extract_runs import plan_run, write_run
from tests.generate_runs import CHAT_TEMPLATE
from tests.judge_runs import (
    PROMPTS,
    answered,
    authors,
    best_of,
    half_right,
    judged,
    judges,
    make_models,
    not_judged,
    reward_model,
    right,
    say,
    scores_of,
    wrong,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(tmp_path: Path, models: dict[str, Path]) -> Path:
    return answered(tmp_path, models, {"coder": half_right, "writer": right})


def reward(model: Path, **more: object) -> dict[str, object]:
    return {"kind": "reward_model", "model": str(model), "device": "cpu", **more}


def expected_reward(model: Path, messages: list[dict[str, str]]) -> float:
    """What transformers says of a chat by itself."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        return float(loaded(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("pad", [False, True])
def test_rewards_are_those_of_transformers(run: Path, tmp_path: Path, pad: bool) -> None:
    model = reward_model(tmp_path / "rm", pad=pad)
    judged(run, *judges(reward(model)))
    found = {(row.prompt, row.source): row.score for row in scores_of(run)}
    assert len(found) == 2 * len(PROMPTS)
    talk = [{"role": "user", "content": "Hi, what is 5 - 3?"}]
    plain = [{"role": "user", "content": "What is 3 + 4?"}]
    for prompt, messages, source, text in (
        ("talk/turn-0", talk, "writer", "2"),
        ("sum", plain, "writer", "7"),
        ("sum", plain, "coder", wrong("sum", 0)),
    ):
        chat = [*messages, {"role": "assistant", "content": text}]
        assert found[prompt, source] == pytest.approx(expected_reward(model, chat), abs=1e-5)
    # One by one they are the same, and that is no other judge.
    assert "nothing to do" in judged(run, *judges(reward(model, batch_tokens=1)))
    judged(run, *judges(reward(model, batch_tokens=1, name="single")))
    single = {(row.prompt, row.source): row.score for row in scores_of(run)}
    for place, score in found.items():
        assert single[place] == pytest.approx(score, abs=1e-5)
    # Another model of the same name is another judge.
    weights = load_file(model / "model.safetensors")
    save_file({n: -w if "score" in n else w for n, w in weights.items()}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert "best answers" in judged(run, *judges(reward(model, name="single")))
    for row in scores_of(run):
        assert row.score == pytest.approx(-(found[row.prompt, row.source] or 0), abs=1e-5)


def test_chats_too_long_are_counted(run: Path, tmp_path: Path) -> None:
    model = reward_model(tmp_path / "rm")
    said = judged(run, *judges(reward(model, max_tokens=45), "exact_answer"))
    assert "reward_model has no score for some answers: too long for the model" in said


def test_two_models_vote(run: Path, tmp_path: Path) -> None:
    one, two = (reward_model(tmp_path / name) for name in ("one", "two"))
    weights = load_file(two / "model.safetensors")
    save_file({n: -w if "score" in n else w for n, w in weights.items()}, two / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    # They hold the opposite of each other: every prompt is a tie.
    words = judges(reward(one, name="one"), reward(two, name="two"))
    said = judged(run, *words, "--set", "judge.vote=mean_z")
    assert "prompts settled by: order 6" in said
    assert authors(run) == ["coder"] * 6


def test_models_that_are_no_reward_models(
    run: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    def refused(model: Path | str) -> str:
        return not_judged(run, *judges(reward(Path(model))))

    assert "is a language model, not a reward model" in refused(models["coder"])
    line = refused(reward_model(tmp_path / "three", labels=3))
    assert "is a classifier, not a reward model" in line
    assert "expected one label (num_labels), got 3" in line
    headless = reward_model(tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    line = refused(headless)
    assert "lacks 1 weights" in line
    assert "score.weight" in line
    assert "has no chat template" in refused(reward_model(tmp_path / "plain", template=None))
    assert "model folder not found" in refused(tmp_path / "a" / "b" / "none")
    empty = reward_model(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    assert "has no weights" in refused(empty)
    nan = reward_model(tmp_path / "nan")
    weights = load_file(nan / "model.safetensors")
    weights["score.weight"][:] = torch.nan
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    assert "judge reward_model returns nan in answer 0 of " in refused(nan)
    same = reward_model(tmp_path / "same")
    weights = load_file(same / "model.safetensors")
    weights["score.weight"][:] = 0.0
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    assert "has the same score for all 12 answers" in refused(same)
    line = not_judged(run, *judges(reward(same, dtype="fp8")))
    assert "reward_model: dtype: must be one of auto, bfloat16" in line


def test_a_template_of_its_own(run: Path, tmp_path: Path) -> None:
    model = reward_model(tmp_path / "rm", template=None)
    (tmp_path / "rm.jinja").write_text(CHAT_TEMPLATE)
    judged(run, *judges(reward(model, template={"file": str(tmp_path / "rm.jinja")})))
    found = {(row.prompt, row.source): row.score for row in scores_of(run)}
    other = reward_model(tmp_path / "other")
    chat = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]
    assert found["sum", "writer"] == pytest.approx(expected_reward(other, chat), abs=1e-5)


# ------------------------------------------------------------------------------- likelihood


def scored(run: Path, models: dict[str, Path], folder: Path) -> Path:
    """A run whose corpus are the answers, scored by both sources."""
    folder.mkdir()
    out = folder / "answers.jsonl"
    ok("extract", "answers", run, "--out", out)
    path = plan_run(write_run(folder, models, corpus={"inputs": [{"path": str(out)}]}))
    for name in ("coder", "writer"):
        run_source(load_run(path), name, Part())
    return path


def nats_a_byte(path: Path, document: str, source: str) -> float:
    """By hand: over all tokens but the one that ends a turn."""
    run = load_run(path)
    plan = open_plan(run)
    reader = StoreReader.open(open_location(run.store_url(source)))
    nats, size = 0.0, 0
    for shard in plan.shards:
        arrays = reader.read(shard.index)
        for d, segment in enumerate(plan.segments(shard)):
            if segment.document_id == document:
                start, stop = arrays["token_offsets"][d : d + 2]
                special = reader.vocabulary.special[arrays["token_ids"][start:stop]]
                labels = arrays["label_logprobs"][start:stop][~special]
                nats += float(labels.sum(dtype=np.float64))
                size += len(segment.text.encode())
    return nats / size


def test_likelihood_under_the_other_source(
    run: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    line = not_judged(run, *judges("likelihood"))
    assert "judge.scored_in is not set" in line
    assert "logitfuse extract answers RUN --out answers.jsonl" in line
    line = not_judged(run, *judges("likelihood", scored_in=str(tmp_path / "none")))
    assert "the answers are not scored" in line
    path = scored(run, models, tmp_path / "scored")
    place = str(tmp_path / "scored/run")
    judged(run, *judges("likelihood", scored_in=place))
    assert "nothing to do" in judged(run, *judges("likelihood", scored_in=place))
    found = {(row.prompt, row.source): row.score for row in scores_of(run)}
    for (prompt, source), score in found.items():
        other = {"coder": "writer", "writer": "coder"}[source]
        expected = nats_a_byte(path, f"{prompt}/{source}/0", other)
        assert score == pytest.approx(expected, rel=1e-6)
        assert expected < 0
    # A tie of the exact answers goes to the likelier.
    judged(run, *judges("exact_answer", scored_in=place))
    best = best_of(run)
    for prompt in ("half", "far"):
        same = math.isclose(found[prompt, "coder"] or 0, found[prompt, "writer"] or 0)
        likelier = max(("coder", "writer"), key=lambda name: found[prompt, name] or 0)
        if not same:
            assert (best[prompt].author, best[prompt].settled_by) == (likelier, "likelihood")
    assert best["sum"].settled_by == "votes"
    # Other answers are not those that were scored.
    say(run, "writer", lambda document, number: f"{right(document, number)}!")
    line = not_judged(run, *judges("likelihood", scored_in=place))
    assert "was scored with another text" in line
    # One source's store is missing.
    stores = tmp_path / "scored/run/stores"
    (stores / "writer").rename(stores / "gone")
    line = not_judged(run, *judges("likelihood", scored_in=place))
    assert "writer has not scored the answers" in line


def test_answers_that_were_not_scored_are_counted(
    run: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    scored(run, models, tmp_path / "scored")
    lines = (tmp_path / "scored/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in lines} == {"coder", "writer"}
    sections = {"generate": {"answers": 2, "max_tokens": 40}}
    more = answered(tmp_path / "more", models, {"coder": half_right, "writer": right}, **sections)
    said = judged(more, *judges("likelihood", scored_in=str(tmp_path / "scored/run")))
    assert "likelihood has no score for some answers: not scored 12" in said
    said = judged(more, *judges("exact_answer", scored_in=str(tmp_path / "scored/run")))
    assert "since judge.scored_in has not all of their answers: 6" in said


def test_one_source_has_no_others(tmp_path: Path, models: dict[str, Path]) -> None:
    alone = {"coder": models["coder"], "target": models["target"]}
    path = answered(tmp_path, alone, {"coder": half_right})
    assert "the run has one source" in not_judged(path, *judges("likelihood", scored_in="x"))
    judged(path, *judges("exact_answer"))
    assert authors(path) == ["coder"] * len(PROMPTS)
