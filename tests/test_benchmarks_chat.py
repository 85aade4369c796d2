"""`make bench-chat`: spans looked at from outside, fields that are lost found, figures and goals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import bench_chat as bench
from benchmarks import chat_fields, chat_spans
from benchmarks.case_scripts import without_fault
from benchmarks.chat_corpus import shapes_read
from benchmarks.chat_fields import JSON, ROWS, lost_silently
from benchmarks.chat_models import of_run_files, of_text
from benchmarks.chat_spans import CHATS, Judged, Sharing, templates_proved, whole_over_turns
from store_schema.errors import NoSpanError
from store_schema.text.chat_template import Around, ChatTemplate
from store_schema.text.context_reader import ContextReader
from tests.chat_shapes import PUBLISHED, A, Q, said
from tests.chat_templates import LOOP, TEMPLATES, UNSOUND

FEW = {name: CHATS[name] for name in ("two turns", "thoughts", "says and calls", "echo")}


def test_a_shape_is_read_when_all_of_it_is_right() -> None:
    row, expected = PUBLISHED["sharegpt"]
    found = shapes_read(
        {
            "right": (row, expected),
            "another answer": (row, [(expected[0][0], "!"), *expected[1:]]),
            "no chat": ({"number": 1}, expected),
            "mixed columns": PUBLISHED["anthropic"],
        }
    )
    assert found["right"] == found["mixed columns"] == ""
    assert "jsonl: [[" in found["another answer"]
    assert "parquet: [[" in found["another answer"]
    assert "missing column" in found["no chat"]


# -------------------------------------------------------------------------------------------- spans


def judged(template: str, chats: Mapping[str, Any] = FEW, **settings: Any) -> dict[str, Judged]:
    return templates_proved([of_text("m", template, **settings)], chats)["m"]


def test_templates_in_words_are_proved() -> None:
    found = judged(TEMPLATES["writes thinking"])
    assert {chat: j.right for chat, j in found.items()} == {
        "two turns": 2,
        "thoughts": 2,
        "says and calls": 3,
        "echo": 2,
        "thoughts, trained on": 4,
    }
    assert not any(j.refused or j.faults for j in found.values())
    system = {"system": CHATS["system"]}
    refusing = TEMPLATES["takes no system turn"]
    assert "fold_system: true" in judged(refusing, system)["system"].refused
    assert judged(refusing, system, fold_system=True)["system"] == Judged(right=2)


@pytest.mark.parametrize("name", UNSOUND)
def test_what_has_no_span_is_refused_by_name(name: str) -> None:
    for j in judged(UNSOUND[name]).values():
        assert (j.right, j.faults) == (0, [])
        assert "/turn-0" in j.refused


def test_a_wrong_span_is_seen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TEMPLATES["plain"]
    around = ChatTemplate.around

    def moved(self: ChatTemplate, context: Any, *, where: str) -> Around:
        found = around(self, context, where=where)
        return Around(found.before.replace("<|a|>", "<|b|>"), found.after)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "around", moved)
        patch.setattr(ChatTemplate, "require_span", lambda *_, **__: None)
        [found] = judged(plain, {"one": CHATS["one turn"]}).values()
        assert found.right == 0
        assert any("the chat is" in fault for fault in found.faults)
        assert any("another response" in fault for fault in found.faults)
    with monkeypatch.context() as patch:
        patch.setattr(ContextReader, "_turn_end", lambda *_: None)
        [found] = judged(plain, {"one": CHATS["one turn"]}).values()
        assert [fault.partition(": ")[2][:23] for fault in found.faults] == [
            "the turn ends with None"
        ]
    # Refused, and nothing says which document it was.
    monkeypatch.setattr(chat_spans, "span_faults", _nameless)
    assert "without its name" in judged(plain)["echo"].faults[0]


def _nameless(*_: Any) -> list[str]:
    raise NoSpanError("no", where="somewhere")


def test_responses_that_are_missing_are_wrong() -> None:
    chat = {"messages": said(("user", Q), ("assistant", A))}
    longer = {"messages": [*chat["messages"], *said(("user", Q), ("assistant", "No."))]}
    documents, _ = chat_spans.built([{"id": "c", **chat}])
    found = chat_spans._judged(of_text("m", TEMPLATES["plain"]), documents, longer, False)
    assert found.faults == [f"responses are {[A]}"]


def test_six_turns_are_read_together_unless_history_is_rewritten() -> None:
    kept = of_text("kept", TEMPLATES["plain"])
    thinking = "{% if loop.last %}<think></think>{% endif %}"
    rewriting = of_text(
        "rewriting",
        LOOP.replace("BODY", f"<|{{{{ m.role[0] }}}}|>{thinking}{{{{ m.content }}}}<|end|>"),
    )
    found = whole_over_turns([kept, rewriting], chat_spans.long_chats(num_chats=2))
    assert not found["kept"].rewrites
    assert 1 / 3.5 - 0.05 < found["kept"].ratio < 0.3
    assert found["rewriting"] == Sharing(1.0, True)
    figures = bench.sharing_figures(found)
    assert figures["max"] == found["kept"].ratio
    assert figures["rewrites_history"] == ["rewriting"]
    [first, *_] = chat_spans.long_chats()
    assert len(first["messages"]) == 12
    assert first == chat_spans.long_chats()[0]


def test_models_of_run_files_are_those_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITFUSE_CACHE", str(tmp_path))
    assert dict(of_run_files()) == {}
    unpacked = tmp_path / "gguf" / "qwen-0123456789abcdef-auto"
    unpacked.mkdir(parents=True)
    assert dict(of_run_files(["examples/real.yaml"]))["qwen"].model == str(unpacked)


# -------------------------------------------------------------------------------------------- fields


def test_no_field_of_the_rows_is_lost() -> None:
    lost, number = lost_silently({}, extra=[])
    assert lost == {}
    assert number > 300


def test_fields_put_in_are_followed() -> None:
    rows = {"r": {"messages": said(("user", Q), ("assistant", A))}}
    extra = [(("r",), ["model", "system"]), (("r", "messages", 1), ["weight", "role"])]
    names = [str(field) for field, _ in chat_fields.fields(rows, extra)]
    assert names[-3:] == ["r: model", "r: system", "r: messages.1.weight"]
    assert lost_silently({}, rows, extra) == ({}, 7)


def test_what_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = json.dumps(ROWS["openai"]["tools"])
    rows = {"openai": ROWS["openai"] | {"source": "web", "tools": tools}}
    assert ("tools", JSON, 0, "function", "name") in [
        f.path for f, _ in chat_fields.fields(rows, [])
    ]
    assert lost_silently({}, rows, [])[0] == {}
    read = chat_fields.row_documents

    def forgetful(row: Any, *words: Any, **named: Any) -> Any:
        return read({k: v for k, v in row.items() if k != "source"}, *words, **named)

    monkeypatch.setattr(chat_fields, "row_documents", forgetful)
    assert lost_silently({}, rows, [])[0] == {"openai: source": "corpus build"}


def test_a_template_says_what_it_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        name: of_text(name, TEMPLATES[name]).ours.chat for name in ("plain", "writes thinking")
    }
    rows = {"openai": ROWS["openai"]}
    assert lost_silently(models, rows, [])[0] == {}
    monkeypatch.setattr(ChatTemplate, "unwritten", lambda *_, **__: chat_fields.Counter())
    lost, _ = lost_silently(models, rows, [])
    assert lost["openai: messages.4.reasoning_content"] == "plain"
    assert lost["openai: tools.0.function.description"] == "plain, writes thinking"
    assert "openai: messages.1.content" not in lost


# ------------------------------------------------------------------------------------------- figures


def test_cases_without_a_fault(tmp_path: Path) -> None:
    for name, script in {"good": "echo fine", "bad": "echo FAULT: no", "broken": "exit 3"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.sh").write_text(script)
    (tmp_path / "none").mkdir()
    found = without_fault(tmp_path)
    assert found == {"bad": False, "broken": False, "good": True}
    assert bench.cases_of(tmp_path) == {"cases": found}
    assert bench.cases_of(None) == {"cases": None}


def test_ends_of_turns_are_those_of_the_example(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    assert bench.ends(file) == {"ends_turn": None}
    answers = {"fused": {"ended": 57, "asked": 60}, "control": {"ended": 60, "asked": 60}}
    file.write_text(json.dumps(answers))
    assert bench.ends(file) == {"ends_turn": {"fused": 0.95, "control": 1.0}}


def test_proofs_count_templates_without_fault() -> None:
    found = {
        "good": {"one": Judged(2), "two": Judged(1, "refused by name")},
        "refusing": {"one": Judged(0, "refused")},
        "bad": {"one": Judged(1, "", ["a fault"])},
    }
    assert bench.proofs(found) == {
        "proved": 1,
        "responses": 4,
        "refused": {"good: two": "refused by name", "refusing: one": "refused"},
        "wrong": ["bad: a fault"],
    }
    lines = bench.proofs_table(found).splitlines()
    assert lines[-3].split() == ["good", "2", "1-"]
    assert lines[-1].split() == ["bad", "1!"]


def test_goals_are_met_missed_or_not_known() -> None:
    found = {
        "shapes_read": 27,
        "templates_proved": {"wrong": ["x"]},
        "whole_over_turns": {"max": 0.28},
        "ends_turn": None,
        "lost_silently": 0,
        "cases": {"a": True, "b": False},
    }
    met = {name: state for name, _, _, state in bench.goals(found)}
    assert met == {
        "shapes_read": True,
        "templates wrong": False,
        "whole_over_turns": True,
        "ends_turn": None,
        "lost_silently": True,
        "cases with a fault": False,
    }
    assert "not known" in bench.goals_table(bench.goals({}))


def test_the_last_line_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "shapes_read", lambda: {"a": "", "b": "wrong"})
    answers = str(tmp_path / "none.json")
    words = ["--part", "shapes", "--part", "ends", "--part", "cases", "--answers", answers]
    result = CliRunner().invoke(bench.main, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "shapes_read": 1,
        "shapes_wrong": {"b": "wrong"},
        "ends_turn": None,
        "cases": None,
    }
    assert CliRunner().invoke(bench.main, ["--part", "shape"]).exit_code == 2
