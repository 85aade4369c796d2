"""Warping: distances, and the banded path against the whole table."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.papers.dtw import BAND_BYTES, edit_distance, match_segments
from store_schema.text.tokenizer import SegmentTokenizer
from tests import papers_reference
from tests.random_source import segments
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

KINDS = ["byte_level", "unigram", "metaspace_bpe"]
SAMPLES = [text for texts in SAMPLE_TEXTS.values() for text in texts]
EVERYWHERE = 1 << 40

few_letters = st.text("ab ", max_size=90).map(str.encode)
any_bytes = st.binary(max_size=150)


@cache
def tokenizer(kind: str, size: int) -> SegmentTokenizer:
    return SegmentTokenizer(tiny_tokenizer(kind, SAMPLES, size), name=kind)


def cut_at(draw: st.DrawFn, length: int) -> list[int]:
    """Ends of tokens that tile `length` bytes; empty ones among them."""
    return sorted([*draw(st.lists(st.integers(0, length), max_size=25)), length])


def matched(text: bytes, source: list[int], target: list[int], width: int) -> list[tuple[int, int]]:
    """First and last source token beside each target token of one segment."""
    first, last = match_segments(
        (np.array([0, len(source)]), np.array([0, len(target)])),
        np.array(source, np.int64), np.array(target, np.int64),
        np.frombuffer(text, np.uint8), np.array([0, len(text)]), width,
    )  # fmt: skip
    return list(zip(first.tolist(), last.tolist(), strict=True))


def plain(text: bytes, source: list[int], target: list[int]) -> list[tuple[int, int]]:
    path = papers_reference.full_path(
        papers_reference.pieces(text, source), papers_reference.pieces(text, target)
    )
    return [
        (min(i for i, k in path if k == j), max(i for i, k in path if k == j))
        for j in range(len(target))
    ]


@given(a=st.one_of(few_letters, any_bytes), b=st.one_of(few_letters, any_bytes))
def test_the_edit_distance_is_that_of_the_definition(a: bytes, b: bytes) -> None:
    """On both sides of the 64 bytes that one word takes."""
    table = np.zeros(256, np.uint64)
    padded = (np.frombuffer(b"x" + a, np.uint8), np.frombuffer(b"yy" + b, np.uint8))
    found = edit_distance(table, padded[0], 1, len(a) + 1, padded[1], 2, len(b) + 2)
    assert found == papers_reference.edit_distance(a, b)
    assert not table.any()


def test_the_edit_distance_around_one_word() -> None:
    table = np.zeros(256, np.uint64)
    for m, n in itertools.product([0, 1, 63, 64, 65, 130], repeat=2):
        a, b = (b"abcde" * 26)[:m], (b"bcadea" * 26)[:n]
        sides = (np.frombuffer(a + b"!", np.uint8), np.frombuffer(b + b"?", np.uint8))
        found = edit_distance(table, sides[0], 0, m, sides[1], 0, n)
        assert found == papers_reference.edit_distance(a, b), (m, n)


@given(data=st.data(), text=st.one_of(few_letters, st.text(max_size=40).map(str.encode)))
def test_without_a_band_the_path_is_that_of_the_whole_table(data, text: bytes) -> None:
    source, target = cut_at(data.draw, len(text)), cut_at(data.draw, len(text))
    assert matched(text, source, target, EVERYWHERE) == plain(text, source, target)


@given(data=st.data(), text=few_letters, width=st.integers(0, 12))
def test_the_banded_path_is_the_whole_one_where_that_lies_inside(data, text, width) -> None:
    source, target = cut_at(data.draw, len(text)), cut_at(data.draw, len(text))
    path = papers_reference.full_path(
        papers_reference.pieces(text, source), papers_reference.pieces(text, target)
    )
    found = matched(text, source, target, width)
    if papers_reference.in_band(path, source, target, width):
        assert found == plain(text, source, target)
    # In any case a path: from the first pair to the last, without a gap.
    assert found[0][0] == 0
    assert found[-1][1] == len(source) - 1
    for (_, last), (first, _) in itertools.pairwise(found):
        assert first - last in (0, 1)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_on_text_the_band_leaves_nothing_out(source: str, target: str) -> None:
    """But where one side has a token for a long run and the other has none."""
    a, b = tokenizer(source, 420), tokenizer(target, 520)
    pairs = zip(a.encode(segments(SAMPLES)), b.encode(segments(SAMPLES)), strict=True)
    for text, (left, right) in zip(SAMPLES, pairs, strict=True):
        if " " * 50 in text:
            continue
        ends = (left.byte_ends.tolist(), right.byte_ends.tolist())
        whole = plain(text.encode(), *ends)
        assert matched(text.encode(), *ends, BAND_BYTES) == whole


def test_segments_do_not_touch_each_other() -> None:
    texts = [b"one two", b"", b"three", b"x"]
    source, target = [[3, 7], [], [1, 5], [1]], [[4, 7], [], [5], [0, 1]]
    first, last = match_segments(
        (np.array([0, 2, 2, 4, 5]), np.array([0, 2, 2, 3, 5])),
        np.concatenate(source).astype(np.int64), np.concatenate(target).astype(np.int64),
        np.frombuffer(b"".join(texts), np.uint8), np.array([0, 7, 7, 12, 13]), BAND_BYTES,
    )  # fmt: skip
    expected, row = [], 0
    for text, a, b in zip(texts, source, target, strict=True):
        expected += [(x + row, y + row) for x, y in plain(text, a, b)]
        row += len(a)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == expected


def test_a_segment_without_tokens_on_one_side_matches_nothing() -> None:
    assert matched(b"", [], [0], BAND_BYTES) == [(-1, -1)]
    assert matched(b"", [0], [], BAND_BYTES) == []
    assert matched(b"a", [1], [1], BAND_BYTES) == [(0, 0)]
