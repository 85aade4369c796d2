"""The demo's text: held-out files and facts are in no other split, and the assignment is repeatable."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from functools import cache

import pytest

from first_run.demo.facts import fact_documents
from first_run.demo.text import Document, SplitSizes, library_documents
from first_run.demo.tokenizers import train_unigram

SIZES = SplitSizes(train=20_000, valid=10_000, test=10_000)


@cache
def documents(domain: str, seed: int = 0) -> list[Document]:
    if domain == "facts":
        return fact_documents(SIZES, seed)
    return library_documents(domain, SIZES, seed)


def origin(document: Document) -> str:
    """File, or block of facts, that a document is made of."""
    return document.id.rpartition("/")[0] if document.domain == "facts" else document.id


@pytest.mark.parametrize("domain", ["code", "prose", "facts"])
def test_nothing_is_in_two_splits(domain: str) -> None:
    splits = defaultdict(set)
    texts = defaultdict(set)
    for document in documents(domain):
        splits[origin(document)].add(document.split)
        texts[document.text].add(document.split)
    assert {split for found in splits.values() for split in found} == {
        "models", "train", "valid", "test",
    }  # fmt: skip
    assert all(len(found) == 1 for found in splits.values())
    assert all(len(found) == 1 for found in texts.values())


def test_the_deal_is_a_function_of_the_seed() -> None:
    first = [(d.id, d.split, d.text) for d in documents("facts")]
    assert first == [(d.id, d.split, d.text) for d in fact_documents(SIZES, 0)]
    other = {d.id: d.split for d in documents("facts", seed=1)}
    assert any(other[name] != split for name, split, _ in first if name in other)


def test_another_process_deals_alike() -> None:
    """Python's own hash is salted per process; nothing here may depend on it."""
    code = (
        "from first_run.demo.facts import fact_documents\n"
        "from first_run.demo.text import SplitSizes\n"
        "made = fact_documents(SplitSizes(train=20_000, valid=10_000, test=10_000), 0)\n"
        "print([(d.id, d.split) for d in made[:500]])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] == f"{[(d.id, d.split) for d in documents('facts')[:500]]}\n"


def test_a_unigram_trained_again_is_the_same() -> None:
    texts = [d.text for d in documents("code") if len(d.text) < 20_000][:40]
    made = {train_unigram(texts, 2304, "</s>")._tokenizer.to_str() for _ in range(3)}
    assert len(made) == 1
