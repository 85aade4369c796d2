"""The corpus cut for several tokenizers: who reads what, how often, and what is left out."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.real_plan import plan_speed, read_texts
from extract.corpus.collected import DOCUMENT_SCHEMA
from extract.corpus.documents import Document
from extract.plan.cutting import cut_corpus, leads
from store_schema.errors import TokenizerError
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import SegmentTokenizer
from tests.tiny import SAMPLE_TEXTS, tiny_model, tiny_tokenizer

CODE, PROSE = ("".join(SAMPLE_TEXTS[domain]) * 6 for domain in ("code", "prose"))
MARK = "a ▁ mark"
"""U+2581 is SentencePiece's own word mark: a Unigram tokenizer reads it as a space."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SegmentTokenizer]:
    """One that knows code, one that knows prose: each takes more tokens of the other's text."""
    made = {
        "code": tiny_tokenizer("byte_level", SAMPLE_TEXTS["code"], 380),
        "prose": tiny_tokenizer("unigram", SAMPLE_TEXTS["prose"], 460),
    }
    return {name: SegmentTokenizer(hf, name=name) for name, hf in made.items()}


def table_of(*texts: str) -> pa.Table:
    documents = [Document(f"d{i}", "d", "train", None, text) for i, text in enumerate(texts)]
    columns = zip(*map(astuple, documents), strict=True)
    return pa.table([list(column) for column in columns], schema=DOCUMENT_SCHEMA)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that each tokenizer reads from now on, by its name."""
    read: Counter[str] = Counter()
    for method in ("read_texts", "encode_text"):
        original = getattr(SegmentTokenizer, method)

        def counted(self, texts, *rest, method=method, original=original):
            # read_texts asks encode_text itself.
            if method == "read_texts" or sys._getframe(1).f_code.co_name != "_read_texts":
                read[self.name] += sum(len(text.encode()) for text in texts)
            return original(self, texts, *rest)

        monkeypatch.setattr(SegmentTokenizer, method, counted)
    return read


def test_the_lead_is_who_takes_most_tokens(tokenizers: dict[str, SegmentTokenizer]) -> None:
    texts = [CODE.encode(), PROSE.encode(), b"short"]
    found = leads(texts, [[64, 64]] * 3, tokenizers.values())
    assert found == [1, 0, None]
    # Budgets count: a chat template may take most of one model's.
    assert leads(texts, [[9, 200], [200, 9], [9, 9]], tokenizers.values()) == [0, 1, None]
    assert leads(texts, [[10_000, 10_000]] * 3, tokenizers.values()) == [None] * 3
    assert leads([], [], tokenizers.values()) == []


def test_a_long_document_is_read_whole_by_its_lead_alone(
    tokenizers: dict[str, SegmentTokenizer], bytes_read: Counter[str]
) -> None:
    cut = cut_corpus(table_of(CODE, "a short one"), tokenizers, 64, drop_unreadable=False)
    size = len(CODE)
    assert bytes_read["code"] < 1.2 * size  # its parts, and a sample
    assert 2 * size <= bytes_read["prose"] < 2.3 * size
    assert [document[-1].end for document in cut.cuts] == [size, len("a short one")]
    assert max(n for c in cut.cuts[0] for n in c.num_tokens) <= 64


def test_text_that_cannot_be_read_costs_no_second_reading_of_the_rest(
    tokenizers: dict[str, SegmentTokenizer], bytes_read: Counter[str]
) -> None:
    good = ["One. ", "Two two. ", "Three."]
    cut_corpus(table_of(*good), tokenizers, 64, drop_unreadable=True)
    assert set(bytes_read.values()) == {sum(map(len, good))}


def test_what_is_dropped_changes_nothing_else(tokenizers: dict[str, SegmentTokenizer]) -> None:
    good = [CODE, "short", PROSE]
    texts = [CODE, MARK, "short", CODE + MARK + CODE, PROSE, MARK]
    with pytest.raises(TokenizerError, match=r"document d[135] from byte 0, tokenizer of prose"):
        cut_corpus(table_of(*texts), tokenizers, 64, drop_unreadable=False)
    cut = cut_corpus(table_of(*texts), tokenizers, 64, drop_unreadable=True)
    assert cut.rows == [0, 2, 4]
    assert cut.dropped == {"tokenizer_changes_text": 3}
    alone = cut_corpus(table_of(*good), tokenizers, 64, drop_unreadable=False)
    assert cut.cuts == alone.cuts
    assert cut.context_tokens == alone.context_tokens


def test_a_chats_turns_are_read_once() -> None:
    """What the plan says of tokens read: a pass over the last turn serves all."""
    hf = tiny_tokenizer("byte_level")
    hf.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    hf.eos_token = "<|end|>"
    tokenizer = SegmentTokenizer(hf, name="m")
    said = [
        {"role": role, "content": f"{role} says {i}."}
        for i in range(6)
        for role in ("user", "assistant")
    ]
    turns = [
        Document(
            f"c/turn-{i}",
            "d",
            "train",
            json.dumps({"messages": said[: 2 * i + 1]}),
            said[2 * i + 1]["content"],
        )
        for i in range(6)
    ]
    other = Document("p", "d", "train", None, "plain text")
    columns = zip(*map(astuple, [*turns, other, turns[0]]), strict=True)
    table = pa.table([list(column) for column in columns], schema=DOCUMENT_SCHEMA)
    cut = cut_corpus(table, {"m": tokenizer}, 512, drop_unreadable=False)
    last, first = (
        tokenizer.encode([Segment(0, "s", "s", "d", "train", 0, 1, True, t.context, t.text)])[0]
        for t in (turns[-1], turns[0])
    )
    texts = sum(c.num_tokens[0] for document in cut.cuts for c in document)
    [plain] = tokenizer.encode_text(["plain text"])
    read = len(last.input_ids) + len(first.input_ids) + len(plain)
    assert texts + cut.context_tokens["m"] == read


def test_a_template_that_ends_no_turn_is_told() -> None:
    turn = {"messages": [{"role": "user", "content": "Why?"}]}
    documents = [
        Document("d0", "d", "train", json.dumps(turn), "Because."),
        Document("d1", "d", "train", json.dumps(turn | {"goes_on": True}), "Because."),
        Document("d2", "d", "train", None, "Plain text."),
    ]
    columns = zip(*map(astuple, documents), strict=True)
    table = pa.table([list(column) for column in columns], schema=DOCUMENT_SCHEMA)
    found = {}
    for name, end in (("ending", "{{ eos_token }}"), ("endless", "")):
        hf = tiny_tokenizer("byte_level")
        hf.chat_template = (
            "{% for m in messages %}{{ m.role }}:\n{{ m.content }}" + end + "\n{% endfor %}"
        )
        found[name] = SegmentTokenizer(hf, name=name)
    cut = cut_corpus(table, found, 64, drop_unreadable=False)
    assert cut.unwritten["endless"] == {"ends of turns": 1}
    assert not cut.unwritten["ending"]


def test_tokens_without_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny_tokenizer()
    rows = len(hf)
    hf.add_tokens(["[A]", "[B]", "[C]", "[D]"])
    tokenizer = SegmentTokenizer(hf, name="padded")
    tokenizer.limit_vocabulary(rows)
    with caplog.at_level(logging.WARNING, "extract"):
        cut_corpus(table_of("text"), {"padded": tokenizer}, 64, drop_unreadable=False)
    [line] = caplog.messages
    assert "padded: the model has no row for 4" in line
    assert "([A], [B], [C], ...)" in line
    assert "another model" not in line
    tokenizer.limit_vocabulary(300)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "extract"):
        cut_corpus(table_of("a"), {"padded": tokenizer}, 64, drop_unreadable=False)
    [line] = caplog.messages
    assert line.endswith("; it seems to be another model's")


def test_the_benchmark_measures_the_real_thing(tmp_path: Path) -> None:
    folders = {"a": tiny_model(tmp_path / "a"), "b": tiny_model(tmp_path / "b")}
    (tmp_path / "a.txt").write_text(CODE)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    texts = read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert texts == [CODE, "one", "two"]
    speed = plan_speed(folders, texts, max_tokens=64, rounds=1)
    assert speed.plan_tokens_per_s > 0
    assert speed.segments > 3
    assert speed.size_bytes == len(CODE) + 6
