"""`make example-chat`: dialogues in two shapes, read whole, and answers that end, counted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ask_chat
import chat_engines
import make_chat
import pytest
import torch
from ask_chat import ask_all, counted, is_right, side_by_side, table, whole
from chat_engines import cut_at, most_tokens, turn_end
from chat_topics import TOPICS, WORDINGS
from click.testing import CliRunner
from make_chat import SHAPES, SHARES, Dialogue, dialogues, openai_messages, prompts
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.command import ok
from tests.extract_runs import write_run
from tests.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def made() -> list[Dialogue]:
    return dialogues(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    done = CliRunner().invoke(make_chat.main, ["--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert "200 dialogues" in done.output
    return folder


def questions(dialogue: Dialogue) -> list[str]:
    return [m["content"] for m in openai_messages(dialogue) if m["role"] == "user"]


def test_a_seed_gives_the_same_files_in_every_process(tmp_path: Path, files: Path) -> None:
    subprocess.run(
        [sys.executable, str(EXAMPLES / "make_chat.py"), "--out", str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
    )
    for name in (*SHAPES, "prompts"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (files / f"{name}.jsonl").read_bytes()
    assert dialogues(1) != dialogues(0)


def test_no_question_is_asked_twice(made: list[Dialogue]) -> None:
    asked = [question for dialogue in made for question in questions(dialogue)]
    assert len(set(asked)) == len(asked)
    assert Counter(d.split for d in made) == {"train": 150, "valid": 20, "test": 30}


@pytest.mark.parametrize("split", SHARES)
def test_each_split_has_all_kinds_of_turns(made: list[Dialogue], split: str) -> None:
    of_split = [dialogue for dialogue in made if dialogue.split == split]
    messages = [message for dialogue in of_split for message in openai_messages(dialogue)]
    assert {m["role"] for m in messages} == {"system", "user", "assistant", "tool"}
    assert {d.domain for d in of_split} == set(TOPICS)
    assert {d.shape for d in of_split} == set(SHAPES)
    calling = [m for m in messages if m.get("tool_calls")]
    assert calling
    assert all(m["content"] is None for m in calling)
    thinking = [m for m in messages if m.get("reasoning_content")]
    assert any(m in calling for m in thinking)
    assert any(m not in calling for m in thinking)
    assert {len(questions(d)) for d in of_split} == {1, 2}


def test_answers_hold_what_they_must_and_say_what_the_tool_gave(made: list[Dialogue]) -> None:
    for dialogue in made:
        for topic, exchange, _ in dialogue.exchanges:
            assert is_right(exchange.answer, exchange.drawn.facts), exchange
            assert (topic.tool is None) == (not exchange.drawn.call)
            if topic.tool is not None:
                wanted = topic.tool["function"]["parameters"]["required"]
                assert list(exchange.drawn.call) == wanted


def test_every_wording_can_be_said() -> None:
    named = {topic.name for topics in TOPICS.values() for topic in topics}
    assert named == set(WORDINGS) - {"system", "words"}
    many = dialogues(0, 1200)
    for topics in TOPICS.values():
        for topic in topics:
            said = [e for d in many for t, e, _ in d.exchanges if t.name == topic.name]
            starts = {e.answer.split("{")[0][:12] for e in said}
            assert len(starts) >= 3, topic.name
            assert not any("{" in e.question + e.answer + e.thought for e in said)


def test_both_shapes_are_read_whole(tmp_path: Path, files: Path, tiny_models: Any) -> None:
    inputs = [{"path": str(files / f"{shape}.jsonl")} for shape in SHAPES]
    path = write_run(tmp_path, tiny_models, corpus={"inputs": inputs})
    ok("corpus", "build", path)
    [report] = tmp_path.glob("**/corpus.json")
    record = json.loads(report.read_text())
    assert record.get("unread", {}) == {}
    assert record["dropped"] == {}
    shapes = {entry["name"]: entry["shapes"] for entry in record["inputs"]}
    assert sum(shape["messages"] for shape in shapes.values()) == 200
    assert record["num_documents"] == sum(len(d.exchanges) for d in dialogues(0))
    calls = sum(bool(e.drawn.call) for d in dialogues(0) for _, e, _ in d.exchanges)
    assert record["notes"] == {"tool calls, read and not trained on": calls}


def test_prompts_are_the_held_out_chats_before_their_last_answer(
    files: Path, made: list[Dialogue]
) -> None:
    lines = (files / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == list(prompts(made))
    held_out = {dialogue.id: dialogue for dialogue in made if dialogue.split == "test"}
    assert [row["id"] for row in rows] == list(held_out)
    for row in rows:
        last = row["messages"][-1]
        assert last["role"] in ("user", "tool")
        assert is_right(row["answer"], row["facts"])
        assert all(isinstance(message["content"], str) for message in row["messages"])
        assert (last["role"] == "tool") == bool(row["tools"])


def test_an_answer_is_cut_at_the_end_of_its_turn() -> None:
    assert cut_at([5, 6, 2, 2], 2) == ([5, 6], True)
    assert cut_at([2], 2) == ([], True)
    assert cut_at([5, 6], 2) == ([5, 6], False)
    assert cut_at([5, 6, 2], None) == ([5, 6, 2], False)


def test_the_end_of_a_turn_is_the_first_special_token_behind_it() -> None:
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.chat_template = TEMPLATE
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.chat_template = TEMPLATE.replace("</s>", " <s></s>")
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.chat_template = TEMPLATE.replace("</s>", "")
    assert turn_end(tokenizer) is None


def always(folder: Path, token: str) -> Path:
    """A chat model whose every next token is this one."""
    tokenizer = tiny_tokenizer("byte_level")
    tokenizer.chat_template = TEMPLATE
    tiny_model(folder, "llama", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_prompts(files: Path) -> Path:
    lines = (files / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    path = files / "few.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def asked_of(tmp_path: Path, engine: str, few_prompts: Path) -> None:
    """A model that ends at once, and one that never does."""
    folders = {"ends": always(tmp_path / "ends", "</s>"), "goes on": always(tmp_path / "on", "e")}
    figures = ask_all(folders, [engine], few_prompts)
    assert [(f["asked"], f["ended"]) for f in figures.values()] == [(6, 6), (6, 0)]
    rows = [json.loads(line) for line in few_prompts.read_text(encoding="utf-8").splitlines()]
    most = most_tokens(rows, PreTrainedTokenizerFast.from_pretrained(tmp_path / "on"))
    ended, on = (f["engines"][engine] for f in figures.values())
    assert {answer["num_tokens"] for answer in ended["answers"]} == {0}
    assert {answer["num_tokens"] for answer in on["answers"]} == {most}
    assert {answer["text"] for answer in on["answers"]} == {"e" * most}


def test_transformers_answers_are_counted(
    tmp_path: Path, few_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which is quicker."""

    def ask(engine: str, folder: Path, prompts: Path) -> dict[str, Any]:
        out = folder / "answers.json"
        done = CliRunner().invoke(chat_engines.main, [engine, *map(str, (folder, prompts, out))])
        assert done.exit_code == 0, done.output
        return dict(json.loads(out.read_text()))

    monkeypatch.setattr(ask_chat, "ask", ask)
    asked_of(tmp_path, "transformers", few_prompts)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_are_counted(tmp_path: Path, few_prompts: Path) -> None:
    asked_of(tmp_path, "vllm", few_prompts)


def test_figures_of_answers() -> None:
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "2?"}], "answer": "2", "facts": ["2"]},
        {"id": "b", "messages": [{"role": "user", "content": "3?"}], "answer": "3", "facts": ["3"]},
    ]
    answers = [
        {"id": "a", "text": "It is 2.", "token_ids": [1, 2, 3], "ended": True},
        {"id": "b", "text": "It is 2, it is 2", "token_ids": [1] * 9, "ended": False},
    ]
    found = counted({"answers": answers}, rows)
    assert {name: found[name] for name in ("asked", "ended", "right", "mean_tokens")} == {
        "asked": 2,
        "ended": 1,
        "right": 1,
        "mean_tokens": 6.0,
    }
    figures = {"fused": whole({"transformers": found, "vllm": found})}
    assert (figures["fused"]["asked"], figures["fused"]["ended"]) == (4, 2)
    assert table(figures).splitlines()[1].split() == ["fused", "transformers", "1/2", "1/2", "6.0"]
    shown = side_by_side(figures, rows)
    assert "b: 3?" in shown
    assert "It is 2, it is 2 [did not end]" in shown
