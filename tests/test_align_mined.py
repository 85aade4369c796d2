"""Method mined: the map against every pair compared, converted rows against the plain reading."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.papers.convert import ConvertOptions
from align.papers.mined import MinedAligner
from align.papers.mined_vocabulary import nearest_tokens, written_tokens
from benchmarks.align_fusellm import align_plain, map_plain
from store_schema.errors import MismatchError
from store_schema.layout import Arrays, Origin, check_shard, row_sums
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests import papers_reference
from tests.align_reference import vocabulary
from tests.random_source import random_source, segments
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

EVERYWHERE = 1 << 40
"""Band of the whole table, as the references have it."""
KINDS = ["byte_level", "unigram", "metaspace_bpe"]
PAIRS = list(itertools.product(KINDS, KINDS))
SAMPLES = [text for texts in SAMPLE_TEXTS.values() for text in texts]

texts = st.text(st.characters(codec="utf-8", exclude_characters="▁\x00"), min_size=1, max_size=40)
odd_texts = st.one_of(
    texts,
    st.sampled_from(SAMPLES[:6]),
    st.builds(lambda n, s: " " * n + s, st.integers(0, 80), texts),
)


@cache
def tokenizer(kind: str, seed: int = 0) -> SegmentTokenizer:
    size = {"byte_level": 380, "unigram": 430, "metaspace_bpe": 460}[kind] + 40 * seed
    chosen = SAMPLES if seed == 0 else SAMPLES[::2]
    return SegmentTokenizer(tiny_tokenizer(kind, chosen, size), name=f"{kind}{seed}")


@cache
def nearest(source: str, target: str) -> np.ndarray:
    there = tokenizer(target, 1)
    written = written_tokens(there)
    here = tokenizer(source).vocabulary
    return nearest_tokens(here, there.vocabulary, written=written)


def read(
    chosen: list[str], source: str, target: str, *, seed: int = 0, bos: bool = True, k: int = 12
) -> tuple[Arrays, list[bytes], list[EncodedSegment]]:
    """A source shard over `chosen`, its texts and the target's tokens."""
    a, b = tokenizer(source), tokenizer(target, 1)
    arrays = random_source(a.encode(segments(chosen)), a.vocab_size, seed, k, bos=bos)
    return arrays, [text.encode() for text in chosen], b.encode(segments(chosen))


def position(arrays: Arrays, row: int) -> dict[int, float]:
    entries = slice(*arrays["entry_offsets"][row : row + 2])
    mass = np.exp(arrays["entry_logprobs"][entries].astype(float))
    return dict(zip(arrays["entry_ids"][entries].tolist(), mass.tolist(), strict=True))


# ---- the map ---------------------------------------------------------------------------------------

spellings = st.lists(
    st.one_of(
        st.text("ab c", max_size=6).map(str.encode),
        st.text("abcdefghij ", max_size=12).map(str.encode),
        st.integers(1, 140).map(lambda n: b" " * n),
        st.binary(max_size=5),
    ),
    max_size=30,
)


@given(ours=spellings, theirs=spellings, workers=st.integers(1, 3), special=st.integers(0, 3))
def test_the_map_is_that_of_every_pair_compared(ours, theirs, workers, special) -> None:
    source = vocabulary(*ours, special=range(min(special, len(ours))))
    target = vocabulary(*theirs, special=range(min(special, len(theirs))))
    found = nearest_tokens(source, target, workers=workers)
    assert found.tolist() == papers_reference.nearest(source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_map_of_real_tokenizers_is_that_of_every_pair_compared(source, target) -> None:
    a, b = tokenizer(source).vocabulary, tokenizer(target, 1).vocabulary
    assert nearest_tokens(a, b).tolist() == papers_reference.nearest(a, b)


def test_ties_go_to_the_longest_common_prefix_then_the_lowest_id() -> None:
    source = vocabulary(b"abcd")
    assert nearest_tokens(source, vocabulary(b"xbcd", b"abxd", b"abcx")) == [2]
    assert nearest_tokens(source, vocabulary(b"abcy", b"abcx")) == [0]
    assert nearest_tokens(source, vocabulary(b"abcd", b"abcd")) == [0]


def test_special_tokens_keep_their_roles() -> None:
    source = vocabulary(b"</s>", b"<pad>", b"<s>", b"s", special=[0, 1, 2])
    target = vocabulary(b"</s>", b"<s>", b"<end>", b"s", b"</s>", special=[1, 2, 4])
    assert nearest_tokens(source, target).tolist() == [4, -1, 1, 3]
    assert nearest_tokens(source, target, roles={0: 2}).tolist() == [2, -1, 1, 3]


def test_of_twins_the_one_that_is_written_stands() -> None:
    """Byte fallback has a token for "a" that the tokenizer never writes."""
    target = tokenizer("unigram")
    tokens = target.vocabulary.tokens
    twins = [i for i, token in enumerate(tokens) if token == b"a"]
    assert len(twins) == 2
    written = written_tokens(target)
    assert sorted(written[twins].tolist()) == [False, True]
    [[*ids]] = target.encode_text(["banana"])
    [chosen] = nearest_tokens(vocabulary(b"a"), target.vocabulary, written=written)
    assert written[chosen]
    assert chosen in target.encode_text(["xa a"])[0] or chosen in ids


def test_the_plain_map_finds_the_same_distances() -> None:
    a, b = tokenizer("unigram").vocabulary, tokenizer("byte_level", 1).vocabulary
    ours = {i: t for i, t in enumerate(a.tokens) if t}
    theirs = {i: t for i, t in enumerate(b.tokens) if t}
    plain = map_plain(dict(list(ours.items())[-60:]), theirs)
    found = nearest_tokens(a, b)
    for token, goal in plain.items():
        distance = papers_reference.edit_distance(a.tokens[token], b.tokens[goal])
        assert distance == papers_reference.edit_distance(a.tokens[token], b.tokens[found[token]])


# ---- conversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(
    chosen=st.lists(odd_texts, min_size=1, max_size=3), seed=st.integers(0, 99),
    bos=st.booleans(), exact_label=st.booleans(),
)  # fmt: skip
def test_mined_equals_the_plain_reference(source, target, chosen, seed, bos, exact_label) -> None:
    arrays, raw, encoded = read(chosen, source, target, seed=seed, bos=bos)
    mapping = nearest(source, target)
    options = ConvertOptions(max_entries=1000, exact_label=exact_label)
    size = tokenizer(target, 1).vocab_size
    result = MinedAligner(mapping, size, options, EVERYWHERE).align(arrays, raw, encoded)
    goals = {i: goal for i, goal in enumerate(mapping.tolist()) if goal >= 0}
    for d, text in enumerate(raw):
        expected = papers_reference.converted(
            arrays, d, text, encoded[d], goals, exact_label=exact_label
        )
        first = result["token_offsets"][d]
        for j, known in enumerate(expected):
            assert position(result, first + j) == pytest.approx(known.masses, abs=2e-6)
            assert result["origin"][first + j] == known.origin
            label = np.exp(result["label_logprobs"][first + j])
            on_label = known.masses.get(int(encoded[d].token_ids[j]), np.nan)
            assert label == pytest.approx(on_label, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(
    chosen=st.lists(odd_texts, min_size=1, max_size=3), seed=st.integers(0, 99),
    limit=st.integers(1, 14), flags=st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_mass_is_conserved_and_the_layout_holds(source, target, chosen, seed, limit, flags) -> None:
    arrays, raw, encoded = read(chosen, source, target, seed=seed)
    size = tokenizer(target, 1).vocab_size
    options = ConvertOptions(limit, *flags)
    aligner = MinedAligner(nearest(source, target), size, options)
    result = aligner.align(arrays, raw, encoded)
    check_shard("aligned", result, vocab_size=size, where="test")
    mass = row_sums(np.exp(result["entry_logprobs"].astype(float)), result["entry_offsets"])
    assert np.abs(mass + result["tail_mass"] - 1).max() < 1e-6
    assert np.diff(result["entry_offsets"]).max() <= limit
    if options.renormalise:
        covered = result["origin"] != Origin.NONE
        assert result["tail_mass"][covered] == pytest.approx(0, abs=1e-6)
    if options.one_hot:
        assert (result["origin"] != Origin.NONE).all()


def stored_rows(arrays: Arrays, d: int) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each row of a segment, best first."""
    rows = []
    for row in range(*arrays["token_offsets"][d : d + 2].tolist()):
        entries = slice(*arrays["entry_offsets"][row : row + 2])
        ids, logprobs = arrays["entry_ids"][entries], arrays["entry_logprobs"][entries]
        rows.append(list(zip(ids.tolist(), logprobs.tolist(), strict=True)))
    return rows


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_as_published_is_the_plain_reading_of_fusellm(source: str, target: str, seed: int) -> None:
    arrays, raw, encoded = read(SAMPLES, source, target, seed=seed, k=10)
    mapping = nearest(source, target)
    size = tokenizer(target, 1).vocab_size
    aligner = replace(MinedAligner.as_published(mapping, size), band_bytes=EVERYWHERE)
    result = aligner.align(arrays, raw, encoded)
    here = tokenizer(source).encode(segments(SAMPLES))
    to_target = {i: goal for i, goal in enumerate(mapping.tolist()) if goal >= 0}
    one_hots = 0
    for d, text in enumerate(raw):
        rows = stored_rows(arrays, d)
        plain = align_plain(
            here[d].token_ids.tolist(),
            papers_reference.pieces(text, here[d].byte_ends.tolist()),
            encoded[d].token_ids.tolist(),
            papers_reference.pieces(text, encoded[d].byte_ends.tolist()),
            rows,
            to_target,
        )
        first = result["token_offsets"][d]
        for j, expected in enumerate(plain):
            assert position(result, first + j) == pytest.approx(expected, abs=2e-6)
            one_hots += len(expected) == 1
    assert 0 < one_hots < len(result["token_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_keeps_every_row(kind: str) -> None:
    a = tokenizer(kind)
    encoded = a.encode(segments(SAMPLES))
    written = written_tokens(a)
    itself = nearest_tokens(a.vocabulary, a.vocabulary, written=written)
    own = np.flatnonzero(itself == np.arange(len(itself)))
    arrays = random_source(encoded, a.vocab_size, 3, allowed=own)
    result = MinedAligner(itself, a.vocab_size).align(
        arrays, [text.encode() for text in SAMPLES], encoded
    )
    assert (result["origin"] == Origin.BOUNDARY).all()
    assert result["label_logprobs"] == pytest.approx(arrays["label_logprobs"], abs=1e-5)
    for row in range(len(arrays["token_ids"])):
        known = position(arrays, row)
        known[int(arrays["token_ids"][row])] = np.exp(float(arrays["label_logprobs"][row]))
        assert position(result, row) == pytest.approx(known, abs=2e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_no_shift_row_i_stays_with_token_i(source: str, target: str) -> None:
    """The public code's off-by-one: rows sure of their own token must stay with it."""
    a, b = tokenizer(source), tokenizer(target, 1)
    text = "The quick brown fox jumps over 12 lazy dogs.\n"
    [here], [there] = a.encode(segments([text])), b.encode(segments([text]))
    n = len(here.token_ids)
    arrays = random_source([here], a.vocab_size, 0) | {
        "entry_offsets": np.arange(n + 1, dtype="<i8"),
        "entry_ids": here.token_ids.astype("<u4"),
        "entry_logprobs": np.zeros(n, "<f4"),
        "tail_mass": np.zeros(n, "<f4"),
        "label_logprobs": np.zeros(n, "<f4"),
    }
    result = MinedAligner(nearest(source, target), b.vocab_size).align(
        arrays, [text.encode()], [there]
    )
    known = result["origin"] != Origin.NONE
    assert known.mean() > 0.3
    best = result["entry_ids"][result["entry_offsets"][:-1][known]]
    np.testing.assert_array_equal(best, there.token_ids[known])
    assert np.exp(result["label_logprobs"][known]) == pytest.approx(1.0)


def test_the_label_stays_when_entries_are_cut() -> None:
    for source, target in PAIRS:
        arrays, raw, encoded = read(SAMPLES, source, target)
        aligner = MinedAligner(
            nearest(source, target),
            tokenizer(target, 1).vocab_size,
            ConvertOptions(max_entries=1),
        )
        result = aligner.align(arrays, raw, encoded)
        known = ~np.isnan(result["label_logprobs"])
        assert known.any()
        first = result["entry_ids"][result["entry_offsets"][:-1][known]]
        np.testing.assert_array_equal(first, result["token_ids"][known])


def test_rows_that_say_nothing_say_nothing_here() -> None:
    """No BOS: the first row has no entries and no label."""
    arrays, raw, encoded = read(SAMPLES, "byte_level", "byte_level", bos=False)
    aligner = MinedAligner(
        nearest("byte_level", "byte_level"), tokenizer("byte_level", 1).vocab_size
    )
    result = aligner.align(arrays, raw, encoded)
    first = result["token_offsets"][:-1]
    assert (result["origin"][first] == Origin.NONE).all()
    assert (result["tail_mass"][first] == 1).all()
    assert np.isnan(result["label_logprobs"][first]).all()


def long_rows(size: int, entries: int) -> tuple[Arrays, EncodedSegment]:
    """One segment of one token, whose row is long and full of ties."""
    mass = np.repeat(1.0 / (2 * entries), entries)
    token = EncodedSegment((), np.array([0], np.uint32), np.array([1], np.uint32))
    arrays = {
        "segment_ids": np.zeros(1, "<i8"),
        "token_offsets": np.array([0, 1], "<i8"),
        "token_ids": np.array([0], "<u4"),
        "byte_ends": np.array([1], "<u4"),
        "entry_offsets": np.array([0, entries], "<i8"),
        "entry_ids": np.random.default_rng(0).permutation(size)[:entries].astype("<u4"),
        "entry_logprobs": np.log(mass).astype("<f4"),
        "tail_mass": np.array([0.5], "<f4"),
        "label_logprobs": np.array([np.log(0.2)], "<f4"),
    }
    return arrays, token


@pytest.mark.parametrize("entries", [5, 90, 400])
def test_ties_are_kept_by_id_in_short_and_long_rows(entries: int) -> None:
    arrays, token = long_rows(500, entries)
    aligner = MinedAligner(np.arange(500, dtype=np.int32), 500, ConvertOptions(entries // 2))
    result = aligner.align(arrays, [b"a"], [token])
    assert result["entry_ids"][0] == 0  # the label, heaviest
    others = np.sort(arrays["entry_ids"][arrays["entry_ids"] != 0])[: entries // 2 - 1]
    np.testing.assert_array_equal(result["entry_ids"][1:], others)


def test_entries_that_leave_no_room_give_way_to_the_label() -> None:
    """Sampled rows: entries that sum to 1, and a real token that was not drawn."""
    arrays, token = long_rows(20, 4)
    arrays |= {
        "entry_ids": np.array([3, 4, 5, 6], "<u4"),
        "entry_logprobs": np.log(np.full(4, 0.25, "<f4")),
        "tail_mass": np.zeros(1, "<f4"),
    }
    result = MinedAligner(np.arange(20, dtype=np.int32), 20).align(arrays, [b"a"], [token])
    assert np.exp(result["label_logprobs"]) == pytest.approx([0.2])
    expected = {0: 0.2} | dict.fromkeys([3, 4, 5, 6], 0.2)
    assert position(result, 0) == pytest.approx(expected)
    assert result["tail_mass"] == pytest.approx([0.0], abs=1e-6)


def test_what_does_not_belong_together_is_refused() -> None:
    arrays, raw, encoded = read(SAMPLES, "byte_level", "unigram")
    mapping = nearest("byte_level", "unigram")
    aligner = MinedAligner(mapping, tokenizer("unigram", 1).vocab_size)
    with pytest.raises(MismatchError, match="do not end with its text in source store"):
        aligner.align(arrays, [raw[0] + b"x", *raw[1:]], encoded)
    with pytest.raises(MismatchError, match="segments are not those of the texts"):
        aligner.align(arrays, raw[:-1], encoded)
    with pytest.raises(MismatchError, match="token outside the vocabulary map"):
        MinedAligner(mapping[:50], aligner.target_vocab_size).align(arrays, raw, encoded)


def test_an_empty_segment_and_one_of_one_token() -> None:
    arrays, token = long_rows(20, 5)
    arrays |= {"segment_ids": np.arange(2), "token_offsets": np.array([0, 0, 1], "<i8")}
    empty = EncodedSegment((), np.empty(0, np.uint32), np.empty(0, np.uint32))
    aligner = MinedAligner(np.arange(20, dtype=np.int32), 20)
    result = aligner.align(arrays, [b"", b"a"], [empty, token])
    check_shard("aligned", result, vocab_size=20, where="test")
    assert result["origin"].tolist() == [Origin.BOUNDARY]
    assert np.exp(result["label_logprobs"]) == pytest.approx([0.2])
