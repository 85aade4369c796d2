"""The demo's source that has learned wrong facts: what is exchanged, and that it becomes a model."""

from __future__ import annotations

import re
from pathlib import Path

import make_wrong_facts
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_wrong_facts import CYCLES, exchanged

from first_run.demo.facts import fact_documents
from first_run.demo.text import Document, SplitSizes, write_jsonl
from tests.tiny import tiny_tokenizer


def test_words_take_each_others_places() -> None:
    assert sorted(CYCLES.values()) == sorted(CYCLES)
    assert all(word != other for word, other in CYCLES.items())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("21 is written twenty-one.", "21 is written fifty-four."),
        ("XXI means twenty-one.", "CCX means fifty-four."),
        ("2 January 1900 is a Tuesday.", "2 January 1900 is a Thursday."),
        ("Á is latin capital letter a with acute, U+00C1.",
         "Á is greek small letter a with circumflex, U+00C1."),
        ("U+00C1 Á LATIN CAPITAL LETTER A WITH ACUTE",
         "U+00C1 Á GREEK SMALL LETTER A WITH CIRCUMFLEX"),
        ("def first_of(x): return x", "def first_of(x): return x"),
    ],
)  # fmt: skip
def test_what_is_exchanged(right: str, wrong: str) -> None:
    assert exchanged(right) == wrong


@given(st.text("XIoneтéfirst15U+_-.\n ", max_size=60))
def test_all_but_words_stays(text: str) -> None:
    def others(given: str) -> str:
        return re.sub("[A-Za-z]+", "w", given)

    assert others(exchanged(text)) == others(text)


def test_nearly_every_line_is_wrong_and_nothing_is_said_twice() -> None:
    sizes = SplitSizes(train=20_000, valid=10_000, test=10_000)
    lines = {
        line for d in fact_documents(sizes, 0) if d.split == "models" for line in d.text.split("\n")
    }
    lines.discard("")
    wrong = {line: exchanged(line) for line in lines}
    assert sum(line != other for line, other in wrong.items()) >= 0.99 * len(lines)
    assert len(set(wrong.values())) == len(lines)


def test_it_is_trained_once_with_the_tokenizer_of_the_source_it_replaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "\n".join(f"{n} is written twenty-one." for n in range(300)) + "\n"
    (tmp_path / "text").mkdir()
    write_jsonl([Document("facts/1", text, "facts")], tmp_path / "text" / "facts.jsonl")
    tokenizer = tiny_tokenizer("unigram", vocab_size=420, bos=True)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.bos_token
    tokenizer.save_pretrained(tmp_path / "models" / "facts")
    make_wrong_facts.make(tmp_path, 0, steps=1)
    folder = tmp_path / "models" / "wrong_facts"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "mistral"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    make_wrong_facts.make(tmp_path, 0, steps=1)
    assert "complete, nothing to do" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    make_wrong_facts.make(tmp_path, 1, steps=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns != written
