"""Cutting: no byte lost, every tokenizer fits, natural breaks, nothing visible cut in two."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.plan.cutting import encoder
from extract.plan.segment import (
    BLOCK_BYTES,
    Cut,
    Encoder,
    Ends,
    Piece,
    UnfitCharacterError,
    cut_documents,
)
from store_schema.text.tokenizer import SegmentTokenizer
from tests.tiny import tiny_tokenizer

PIECES = [
    "word",
    " another",
    ". ",
    "。",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "漢字かな",
    "한국어",
    "e\u0301",
    "n\u0303\u0320",
    "😀",
    "👩‍👩‍👧‍👦",
    "👍🏽",
    "🇩🇪🇫🇷",
    "\x01\x1b",
    "\x7f\u200b\u2028",
    " " * 97,
    "a" * 60,
    "<s></s><|endoftext|>",
    "\u202eעברית",
]
TEXTS = (
    st.lists(
        st.one_of(
            st.sampled_from(PIECES),
            # The word mark itself is the one character SentencePiece cannot tell from a space.
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=8),
        ),
        min_size=1,
        max_size=40,
    )
    .map("".join)
    .filter(bool)
)


def bytes_as_tokens(pieces: list[Piece]) -> list[Ends]:
    return [np.arange(1, len(p.data) + 1, dtype=np.uint32) for p in pieces]


def words_as_tokens(pieces: list[Piece]) -> list[Ends]:
    """Alone and in a text, words are counted otherwise: a first word costs one token more."""
    found = []
    for piece in pieces:
        ends = [m.end() for m in re.finditer(rb"[^ ]+| +", piece.data)]
        found.append(np.array([0, *ends], np.uint32))
    return found


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SegmentTokenizer]:
    made = {
        "byte_level": tiny_tokenizer("byte_level"),
        "unigram": tiny_tokenizer("unigram", vocab_size=420),
        "metaspace_bpe": tiny_tokenizer("metaspace_bpe", vocab_size=500),
    }
    return {name: SegmentTokenizer(hf, name=name) for name, hf in made.items()}


def segments_of(text: str, cuts: list[Cut]) -> list[str]:
    data = text.encode()
    return [data[cut.start : cut.end].decode() for cut in cuts]


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    budget=st.integers(8, 60),
    leads=st.none() | st.tuples(*[st.none() | st.integers(0, 2)] * 3),
)
def test_segments_join_and_fit_every_tokenizer(
    tokenizers: dict[str, SegmentTokenizer],
    texts: list[str],
    budget: int,
    leads: tuple[int | None, ...] | None,
) -> None:
    encoders = [encoder(t, [f"doc{i}" for i in range(3)]) for t in tokenizers.values()]
    budgets = [[budget, budget + 1, budget + 2]] * len(texts)
    documents = cut_documents([text.encode() for text in texts], budgets, encoders, leads)
    for text, cuts in zip(texts, documents, strict=True):
        parts = segments_of(text, cuts)  # decode() refuses a cut inside a character
        assert "".join(parts) == text
        assert all(parts)
        for i, tokenizer in enumerate(tokenizers.values()):
            alone = [len(ids) for ids in tokenizer.encode_text(parts)]
            assert alone == [cut.num_tokens[i] for cut in cuts]
            assert max(alone) <= budget + i


@given(text=TEXTS, budget=st.integers(4, 40))
@settings(max_examples=200)
def test_segments_join_under_pure_encoders(text: str, budget: int) -> None:
    encoders: list[Encoder] = [bytes_as_tokens, words_as_tokens]  # type: ignore[list-item]
    cuts = cut_documents([text.encode()], [[budget, budget]], encoders)[0]
    assert "".join(segments_of(text, cuts)) == text
    assert all(max(cut.num_tokens) <= budget for cut in cuts)
    assert cuts == cut_documents([text.encode()], [[budget, budget]], encoders)[0]


def test_a_document_that_fits_its_lead_alone_is_measured_by_all() -> None:
    text = b"ab cd ef gh"
    for lead in (None, 0, 1):
        encoders: list[Encoder] = [bytes_as_tokens, words_as_tokens]  # type: ignore[list-item]
        [cuts] = cut_documents([text], [[6, 99]], encoders, [lead])
        assert [(cut.start, cut.end) for cut in cuts] == [(0, 5), (5, 11)]


def cut_bytes(text: str, budget: int) -> list[str]:
    cuts = cut_documents([text.encode()], [[budget]], [bytes_as_tokens])[0]  # type: ignore[list-item]
    return segments_of(text, cuts)


def test_natural_breaks_are_preferred() -> None:
    text = "One two three. Four five.\n\nSix seven eight.\nNine ten eleven twelve."
    assert cut_bytes(text, 35)[0] == "One two three. Four five.\n\n"
    assert cut_bytes("One two.\nThree four five six", 14)[0] == "One two.\n"
    assert cut_bytes("aaa bb cc. dd ee", 11)[0] == "aaa bb cc."
    assert cut_bytes("hello wonderful", 12) == ["hello", " wonderful"]
    assert cut_bytes("一二三。四五六", 16)[0] == "一二三。"


def test_a_fitting_document_is_one_segment() -> None:
    assert cut_bytes("One two.\n\nThree", 100) == ["One two.\n\nThree"]


def test_nothing_visible_is_cut() -> None:
    for cluster in ("e\u0301", "\r\n", "👍🏽", "👩‍👧", "🇩🇪"):
        parts = cut_bytes("x" + cluster * 8, 2 * len(cluster.encode()) + 1)
        assert "".join(parts) == "x" + cluster * 8
        # Flags alone cannot be told apart at any place of a row of flags.
        if cluster != "🇩🇪":
            assert all(part.removeprefix("x").replace(cluster, "") == "" for part in parts), parts


def test_rest_is_not_a_crumb() -> None:
    parts = cut_bytes("word " * 22, 100)
    assert min(map(len, parts)) > 30


def test_long_runs_take_linear_time() -> None:
    seconds = []
    for size in (BLOCK_BYTES, 4 * BLOCK_BYTES):
        for text in ("a" * size, " " * size, "\r\n" * (size // 2)):
            start = time.perf_counter()
            parts = cut_bytes(text, 500)
            seconds.append(time.perf_counter() - start)
            assert sum(map(len, parts)) == len(text)
    assert sum(seconds[3:]) < 12 * sum(seconds[:3]) + 1


def test_a_character_that_does_not_fit_is_named() -> None:
    with pytest.raises(UnfitCharacterError) as caught:
        cut_bytes("ab😀", 3)
    assert (caught.value.piece.start, caught.value.num_tokens) == (2, (4,))
