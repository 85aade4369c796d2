"""Method stats: counts on warping paths and the map they give, against the plain reading."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.papers.mined_vocabulary import nearest_tokens, written_tokens
from align.papers.stats import MatchCounts, StatsAligner
from store_schema.errors import MismatchError
from store_schema.layout import Origin, check_shard, row_sums
from store_schema.text.tokenizer import SegmentTokenizer
from tests import papers_reference
from tests.align_reference import vocabulary
from tests.random_source import random_source, segments
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

EVERYWHERE = 1 << 40
KINDS = ["byte_level", "unigram", "metaspace_bpe"]
PAIRS = list(itertools.product(KINDS, KINDS))
SAMPLES = [text for texts in SAMPLE_TEXTS.values() for text in texts]
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁\x00"), min_size=1, max_size=40)


@cache
def tokenizer(kind: str, seed: int = 0) -> SegmentTokenizer:
    size = {"byte_level": 380, "unigram": 430, "metaspace_bpe": 460}[kind] + 40 * seed
    return SegmentTokenizer(tiny_tokenizer(kind, SAMPLES[:: 1 + seed], size), name=kind)


@cache
def nearest(source: str, target: str) -> np.ndarray:
    there = tokenizer(target, 1)
    here = tokenizer(source).vocabulary
    return nearest_tokens(here, there.vocabulary, written=written_tokens(there))


def counted(source: str, target: str, chosen: list[str]) -> MatchCounts:
    a, b = tokenizer(source), tokenizer(target, 1)
    counts = MatchCounts(a.vocab_size, b.vocab_size, EVERYWHERE)
    both = zip(a.encode(segments(chosen)), b.encode(segments(chosen)), strict=True)
    for text, (left, right) in zip(chosen, both, strict=True):
        counts.add(text.encode(), left.token_ids, left.byte_ends, right.token_ids, right.byte_ends)
    return counts


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(chosen=st.lists(st.one_of(texts, st.sampled_from(SAMPLES[:6])), min_size=1, max_size=3))
def test_counts_and_map_are_those_of_the_plain_reading(source, target, chosen) -> None:
    a, b = tokenizer(source), tokenizer(target, 1)
    counts = counted(source, target, chosen)
    expected, best = papers_reference.met_most(
        [text.encode() for text in chosen], a.encode(segments(chosen)),
        b.encode(segments(chosen)), (a.vocabulary, b.vocabulary),
    )  # fmt: skip
    found = zip(*(column.tolist() for column in counts.pairs()), strict=True)
    assert {(s, t): count for s, t, count in found} == dict(expected)
    fallback = nearest(source, target)
    mapping = counts.token_map(fallback, a.vocabulary, b.vocabulary)
    for token in range(a.vocab_size):
        assert mapping[token] == best.get(token, fallback[token])


def add(counts: MatchCounts, text: bytes, source: list, target: list) -> None:
    """Each side as (id, end) pairs."""
    sides = []
    for side in (source, target):
        sides += [np.array([i for i, _ in side], np.uint32), np.array([e for _, e in side])]
    counts.add(text, *sides)


def test_the_map_by_hand() -> None:
    source = vocabulary(b"cats", b"dog", b"bird", b"<s>", special=[3])
    target = vocabulary(b"s", b"cat", b"dogs", b"d", b"og", b"bird")
    fallback = np.array([1, 2, 5, -1], np.int32)
    counts = MatchCounts(4, 6)
    # Cut in two, "cats" meets both parts once: the nearer spelling takes it, not the lower id.
    add(counts, b"cats", [(0, 4)], [(1, 3), (0, 4)])
    # What was met goes before spelling: two halves that share the count, though "dogs" is nearest.
    add(counts, b"dog", [(1, 3)], [(3, 1), (4, 3)])
    mapping = counts.token_map(fallback, source, target)
    assert mapping.tolist() == [1, 4, 5, -1]
    add(counts, b"dog", [(1, 3)], [(3, 1), (4, 3)])
    add(counts, b"d", [(1, 1)], [(3, 1)])
    assert counts.token_map(fallback, source, target).tolist() == [1, 3, 5, -1]


def test_special_tokens_and_tokens_without_bytes_keep_the_map_by_spelling() -> None:
    source, target = (
        vocabulary(b"a", b"</s>", special=[1]),
        vocabulary(b"</s>", b"a", b"b", special=[0]),
    )
    counts = MatchCounts(2, 3)
    add(
        counts, b"a", [(1, 1)], [(2, 1)]
    )  # "</s>" written out in a text is text, but keeps its role
    add(counts, b"a", [(0, 1)], [(0, 0), (0, 0), (1, 1)])
    mapping = counts.token_map(np.array([1, 0], np.int32), source, target)
    assert mapping.tolist() == [1, 0]


def test_order_and_merging_do_not_matter() -> None:
    a, b = tokenizer("byte_level").vocabulary, tokenizer("unigram", 1).vocabulary
    fallback = nearest("byte_level", "unigram")
    once = counted("byte_level", "unigram", SAMPLES)
    again = counted("byte_level", "unigram", SAMPLES[::-1])
    again.distinct.counts()
    for ours, theirs in zip(once.pairs(), again.pairs(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(once.token_map(fallback, a, b), again.token_map(fallback, a, b))


def test_nothing_counted_is_the_map_by_spelling() -> None:
    a, b = tokenizer("unigram").vocabulary, tokenizer("byte_level", 1).vocabulary
    counts = MatchCounts(len(a), len(b))
    add(counts, b"", [], [])
    fallback = nearest("unigram", "byte_level")
    np.testing.assert_array_equal(counts.token_map(fallback, a, b), fallback)


def test_tokens_that_do_not_end_with_the_text_are_refused() -> None:
    with pytest.raises(MismatchError, match="do not end with its text"):
        add(MatchCounts(2, 2), b"ab", [(0, 1)], [(0, 2)])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_aligned_by_counts(source: str, target: str) -> None:
    a, b = tokenizer(source), tokenizer(target, 1)
    mapping = counted(source, target, SAMPLES).token_map(
        nearest(source, target), a.vocabulary, b.vocabulary
    )
    arrays = random_source(a.encode(segments(SAMPLES)), a.vocab_size, 1)
    encoded = b.encode(segments(SAMPLES))
    raw = [text.encode() for text in SAMPLES]
    aligner = StatsAligner(mapping, b.vocab_size, band_bytes=EVERYWHERE)
    result = aligner.align(arrays, raw, encoded)
    check_shard("aligned", result, vocab_size=b.vocab_size, where="test")
    mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
    assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6
    goals = {i: goal for i, goal in enumerate(mapping.tolist()) if goal >= 0}
    for d, text in enumerate(raw):
        if " " * 50 in SAMPLES[d]:
            continue  # slow to read plainly
        expected = papers_reference.converted(arrays, d, text, encoded[d], goals)
        first = result["token_offsets"][d]
        for j, known in enumerate(expected):
            entries = slice(*result["entry_offsets"][first + j : first + j + 2])
            masses = np.exp(result["entry_logprobs"][entries].astype(float)).tolist()
            found = dict(zip(result["entry_ids"][entries].tolist(), masses, strict=True))
            assert found == pytest.approx(known.masses, abs=2e-6)
    assert (result["origin"] != Origin.NONE).mean() > 0.2
