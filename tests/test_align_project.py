"""Method `bytes`: each rule by hand, and what must hold on trained tokenizers.

Random tokenizers, text and rows are in test_align_properties.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest

from align.chain.continuation import Continuation, PairCounts, first_tokens
from align.chain.first_token import PieceTable, piece_table
from align.chain.project import project
from align.chain.tail_tokens import tail_tokens
from store_schema.layout import Arrays, Origin, check_shard
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests.align_reference import Tables, vocabulary, vocabulary_map
from tests.random_source import random_source, segments
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

KINDS = ["byte_level", "unigram", "metaspace_bpe"]
PAIRS = list(itertools.product(KINDS, KINDS))
SAMPLES = [text for texts in SAMPLE_TEXTS.values() for text in texts]


def greedy_pieces(source: Vocabulary, target: Vocabulary) -> PieceTable:
    """The piece table of a target that always takes its longest token."""
    ids = {token: i for i, token in reversed(list(enumerate(target.tokens))) if token}
    longest = max(map(len, ids), default=0)
    first = []
    for token in source.tokens:
        for at in range(len(token)):
            lengths = range(min(longest, len(token) - at), 0, -1)
            found = (ids.get(token[at : at + n]) for n in lengths)
            first.append(next((i for i in found if i is not None), -1))
    table = np.asarray(first, np.int32)
    offsets = np.concatenate(([0], np.cumsum(source.lengths)))
    return PieceTable(np.frombuffer(b"".join(source.tokens), np.uint8), offsets, table, table)


def spread(weights: Mapping[int, Mapping[int, float]], size: int) -> Continuation:
    """Continuation weights {source token: {target token: weight}}."""
    counts = [len(weights.get(token, {})) for token in range(size)]
    pairs = [pair for token in range(size) for pair in weights.get(token, {}).items()]
    return Continuation(
        np.concatenate(([0], np.cumsum(counts))),
        np.array([target for target, _ in pairs], np.uint32),
        np.array([weight for _, weight in pairs], np.float64),
    )


def hand_tables(
    source: Vocabulary, target: Vocabulary, weights: Mapping[int, Mapping[int, float]] | None = None,
    *, eos: tuple[int, int] = (-1, -1), look_ahead: bool = True,
) -> Tables:  # fmt: skip
    """Tables of a target that takes its longest token; None gives all to the first token."""
    pieces = greedy_pieces(source, target)
    if weights is None:
        first = first_tokens(pieces).tolist()
        weights = {v: {y: 1.0} for v, y in enumerate(first) if y >= 0}
    going = spread(weights, len(source))
    mapping = vocabulary_map(pieces, going, target, eos=eos, look_ahead=look_ahead)
    return Tables(source, target, mapping)


def hand_segment(tokens: Sequence[int], vocabulary: Vocabulary) -> EncodedSegment:
    """A segment of the given tokens."""
    ends = np.cumsum([vocabulary.lengths[t] for t in tokens])
    return EncodedSegment((), np.array(tokens, np.uint32), ends.astype(np.uint32))


def hand_arrays(
    tokens: Sequence[int], ends: Sequence[int], rows: Sequence[Mapping[int, float] | None]
) -> Arrays:
    """A source shard of one segment; None makes a row that says nothing."""
    ordered = [sorted((r or {}).items(), key=lambda pair: (-pair[1], pair[0])) for r in rows]
    entries = [pair for row in ordered for pair in row]
    labels = [np.nan if r is None else np.log(r[t]) for r, t in zip(rows, tokens, strict=True)]
    sums = [sum(p for _, p in row) for row in ordered]
    return {
        "segment_ids": np.zeros(1, "<i8"),
        "token_offsets": np.array([0, len(tokens)], "<i8"),
        "token_ids": np.array(tokens, "<u4"),
        "byte_ends": np.array(ends, "<u4"),
        "entry_offsets": np.concatenate(([0], np.cumsum([len(r) for r in ordered]))).astype("<i8"),
        "entry_ids": np.array([v for v, _ in entries], "<u4"),
        "entry_logprobs": np.log(np.array([p for _, p in entries])).astype("<f4"),
        "tail_mass": np.clip(1 - np.array(sums), 0, 1).astype("<f4"),
        "label_logprobs": np.array(labels, "<f4"),
    }


def masses(arrays: Arrays) -> list[dict[int, float]]:
    """Entries of each position as {token: probability}."""
    found = []
    for first, stop in itertools.pairwise(arrays["entry_offsets"].tolist()):
        mass = np.exp(arrays["entry_logprobs"][first:stop].astype(float)).tolist()
        found.append(dict(zip(arrays["entry_ids"][first:stop].tolist(), mass, strict=True)))
    return found


def by_hand(
    tables: Tables, text: bytes, tokens: Sequence[int], rows: Sequence[Mapping[int, float] | None],
    target: Sequence[int],
) -> list[dict[bytes, float]]:  # fmt: skip
    """Aligned distributions of one segment, entries named by their bytes."""
    ends = hand_segment(tokens, tables.source).byte_ends
    arrays = hand_arrays(tokens, ends.tolist(), rows)
    encoded = hand_segment(target, tables.target)
    result = project(arrays, [text], [encoded], tables.mapping, max_entries=64)
    check_shard("aligned", result, vocab_size=len(tables.target), where="test")
    written = tables.target.written
    return [{written[y]: m for y, m in row.items()} for row in masses(result)]


ABC = vocabulary(b"a", b"b", b"ab", b"abc", b"c", b"bc", b"</s>", special=[6])
A, B, AB, ABC_, C, BC, EOS = range(7)


def test_entries_go_where_the_target_goes_on_and_what_is_left_is_tail() -> None:
    tables = hand_tables(ABC, ABC, {A: {A: 0.5, AB: 0.25}, AB: {AB: 1.0}, C: {C: 1.0}, B: {B: 1.0}})
    rows = [{C: 1.0}, {A: 0.4, AB: 0.1, C: 0.5}]
    _, found = by_hand(tables, b"cc", [C, C], rows, [C, C])
    assert found == pytest.approx({b"c": 0.5, b"a": 0.2, b"ab": 0.2}, abs=1e-6)


def hand_branches(
    branches: Mapping[tuple[int, int], Sequence[tuple[int, float]]],
) -> Arrays:
    """Arrays of branches {(position, entry): what follows it}, in order."""
    rows = list(branches.values())
    entries = [entry for row in rows for entry in row]
    return {
        "branch_positions": np.array([position for position, _ in branches], "<u4"),
        "branch_tokens": np.array([token for _, token in branches], "<u4"),
        "branch_entry_offsets": np.cumsum([0, *map(len, rows)]).astype("<i8"),
        "branch_entry_ids": np.array([token for token, _ in entries], "<u4"),
        "branch_entry_logprobs": np.log([p for _, p in entries]).astype("<f4"),
        "branch_tail_mass": np.array([1 - sum(p for _, p in row) for row in rows], "<f4"),
    }


def test_a_branch_settles_what_it_can_and_counts_the_rest() -> None:
    """ "a" and then "c" or "a" is "a"; then "b" it may be "ab" or "abc", as they were counted there;
    the row's tail goes where "a" went in the corpus."""
    tables = hand_tables(ABC, ABC, {A: {AB: 0.5, ABC_: 0.25}, C: {C: 1.0}})
    arrays = hand_arrays([C, C], [1, 2], [{C: 1.0}, {A: 0.4, C: 0.6}])
    arrays |= hand_branches({(1, A): [(B, 0.5), (C, 0.3), (A, 0.1)]})
    check_shard("branched", arrays, vocab_size=len(ABC), where="test")
    encoded = hand_segment([C, C], ABC)
    result = project(arrays, [b"cc"], [encoded], tables.mapping, max_entries=64)
    expected = {C: 0.6, A: 0.4 * 0.4, AB: 0.2 * 2 / 3 + 0.04 * 0.5, ABC_: 0.2 / 3 + 0.04 * 0.25}
    assert masses(result)[1] == pytest.approx(expected, abs=1e-6)


def test_after_an_entry_that_the_text_goes_on_from_its_branch_is_the_next_row() -> None:
    """The source reads "c" "bc", the target "c" "b" "c": the entry "b" is no longer lost."""
    target = vocabulary(b"a", b"b", b"c")
    tables = hand_tables(ABC, target)
    arrays = hand_arrays([C, BC], [1, 3], [{C: 1.0}, {BC: 0.5, B: 0.25, A: 0.25}])
    encoded = hand_segment([2, 1, 2], target)
    alone = project(arrays, [b"cbc"], [encoded], tables.mapping, max_entries=64)
    assert masses(alone)[2] == pytest.approx({2: 2 / 3}, abs=1e-6)
    arrays |= hand_branches({(1, B): [(A, 0.6), (C, 0.4)]})
    result = project(arrays, [b"cbc"], [encoded], tables.mapping, max_entries=64)
    assert masses(result)[1] == masses(alone)[1] == pytest.approx({1: 0.75, 0: 0.25}, abs=1e-6)
    assert masses(result)[2] == pytest.approx({2: 2 / 3 + 0.4 / 3, 0: 0.6 / 3}, abs=1e-6)


def test_less_than_one_in_a_hundred_thousand_is_spread_no_further() -> None:
    tables = hand_tables(ABC, ABC, {A: {A: 0.99, AB: 1e-3, B: 5e-5}, C: {C: 1.0}})
    _, found = by_hand(tables, b"cc", [C, C], [{C: 1.0}, {A: 0.1, C: 0.9}], [C, C])
    assert found == pytest.approx({b"c": 0.9, b"a": 0.099, b"ab": 1e-4}, rel=1e-4)


def test_at_the_start_of_a_text_entries_go_to_their_first_token() -> None:
    tables = hand_tables(ABC, ABC, {A: {A: 0.5, AB: 0.5}})
    [found] = by_hand(tables, b"c", [C], [{A: 0.4, C: 0.5}], [C])
    assert found == pytest.approx({b"c": 0.5, b"a": 0.4}, abs=1e-6)


def test_eos_goes_to_eos_and_other_roles_to_the_tail() -> None:
    source = vocabulary(b"<pad>", b"a", b"<eos>", special=[0, 2])
    rows = [{0: 0.25, 1: 0.5, 2: 0.25}]
    tables = hand_tables(source, ABC, eos=(2, EOS))
    assert by_hand(tables, b"a", [1], rows, [A]) == [pytest.approx({b"a": 0.5, b"</s>": 0.25})]
    tables = hand_tables(source, ABC, eos=(2, -1))
    assert by_hand(tables, b"a", [1], rows, [A]) == [pytest.approx({b"a": 0.5})]


def test_where_the_source_may_end_inside_a_label_the_target_writes_what_it_has() -> None:
    tables = hand_tables(ABC, ABC, eos=(EOS, EOS))
    found = by_hand(tables, b"ab", [A, B], [{A: 1.0}, {B: 0.5, EOS: 0.5}], [AB])
    assert found == [pytest.approx({b"ab": 0.5, b"a": 0.5})]


def test_healing_does_not_look_ahead() -> None:
    """A source that writes "ab" or "a", each with probability 1/2, gives "b" after "a" one half.

    That its token goes on past "a" is known from the text to come alone: the entry "a" must count.
    """
    target = vocabulary(b"a", b"b")
    tables = hand_tables(ABC, target)
    found = by_hand(tables, b"ab", [AB], [{A: 0.5, AB: 0.5}], [0, 1])
    assert found == [pytest.approx({b"a": 1.0}), pytest.approx({b"b": 0.5})]


def test_a_boundary_of_the_source_is_not_known_before_it_is_read() -> None:
    """Source "a" or "ab", the text is "ac": after "a" the source may still be inside "ab"."""
    target = vocabulary(b"a", b"b", b"c")
    tables = hand_tables(ABC, target)
    found = by_hand(tables, b"ac", [A, C], [{A: 0.25, AB: 0.75}, {C: 0.5, B: 0.5}], [0, 2])
    expected = [
        pytest.approx({b"a": 1.0}),
        pytest.approx({b"b": 0.75 + 0.25 * 0.5, b"c": 0.25 * 0.5}),
    ]
    assert found == expected
    rows = [{C: 1.0}, {A: 0.25, AB: 0.75}, {C: 0.5, B: 0.5}]
    assert by_hand(tables, b"cac", [C, A, C], rows, [2, 0, 2])[1:] == expected


def test_a_label_of_several_source_tokens_has_their_product() -> None:
    tables = hand_tables(ABC, ABC)
    rows = [{A: 0.5, C: 0.5}, {B: 0.5, C: 0.25, A: 0.25}, {C: 0.5, A: 0.5}]
    [found] = by_hand(tables, b"abc", [A, B, C], rows, [ABC_])
    # After "a": "c" and "a" show that the target wrote "a"; after "ab", "a" that it wrote "ab".
    expected = {b"abc": 0.125, b"c": 0.5, b"a": 0.25, b"ab": 0.125}
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_entry_that_covers_the_rest_of_the_label_is_the_labels() -> None:
    tables = hand_tables(ABC, ABC)
    rows = [{A: 1.0}, {B: 0.5, BC: 0.5}, {C: 1.0}]
    [found] = by_hand(tables, b"abc", [A, B, C], rows, [ABC_])
    assert found == pytest.approx({b"abc": 1.0}, abs=1e-6)


def test_an_entry_that_ends_with_the_label_says_nothing_of_what_follows() -> None:
    tables = hand_tables(ABC, ABC)
    rows = [{A: 1.0}, {B: 0.5, BC: 0.5}, {C: 1.0}, {C: 1.0}]
    found = by_hand(tables, b"abcc", [A, B, C, C], rows, [ABC_, C])
    assert found == [pytest.approx({b"abc": 1.0}), pytest.approx({b"c": 0.5})]


def test_what_the_bytes_so_far_do_not_decide_is_tail() -> None:
    """After "a" the entry "b" may become "ab" or "abc"."""
    tables = hand_tables(ABC, ABC)
    [found] = by_hand(tables, b"abc", [A, BC], [{A: 1.0}, {B: 0.5, BC: 0.5}], [ABC_])
    assert found == pytest.approx({b"abc": 0.5}, abs=1e-6)


def test_the_word_mark_of_the_source_takes_no_byte() -> None:
    source = vocabulary(b" a", b" ab", b"b", b"a")
    tables = hand_tables(source, ABC)
    arrays = hand_arrays([0, 2], [1, 2], [{0: 0.5, 1: 0.25, 3: 0.25}, {2: 1.0}])
    encoded = hand_segment([AB], ABC)
    found = masses(project(arrays, [b"ab"], [encoded], tables.mapping, max_entries=8))
    # " ab" and " a" + "b" are the text; "a" without a mark is followed by what is not known.
    assert found == [pytest.approx({AB: 0.75, A: 0.25}, abs=1e-6)]


def test_only_the_first_token_of_a_segment_has_a_word_mark() -> None:
    """The space of " bc" is a byte of the text: "c" is what is left of it after " b"."""
    source, target = vocabulary(b" a", b" b", b" bc", b"c"), vocabulary(b"a", b" b", b"c")
    tables = hand_tables(source, target)
    arrays = hand_arrays([0, 1, 3], [1, 3, 4], [{0: 1.0}, {1: 0.5, 2: 0.5}, {3: 0.5, 0: 0.5}])
    encoded = hand_segment([0, 1, 2], target)
    found = masses(project(arrays, [b"a bc"], [encoded], tables.mapping, max_entries=8))
    assert found == [pytest.approx({0: 1.0}), pytest.approx({1: 1.0}), pytest.approx({2: 0.75})]


def test_the_word_mark_of_the_target_takes_no_byte() -> None:
    """The walk through the target's vocabulary begins with the mark too."""
    target = vocabulary(b"a", b"b", b" a", b" ab", b"ac", b"c")
    tables = hand_tables(ABC, target)
    start = np.array([2, 1, 3, 1, 3, 1, 1, 5, 1, 5], np.int32)  # by bytes of ABC's tokens
    mapping = tables.mapping._replace(pieces=tables.mapping.pieces._replace(start=start))
    arrays = hand_arrays([A, B], [1, 2], [{A: 0.5, AB: 0.5}, {B: 0.5, C: 0.5}])
    encoded = EncodedSegment((), np.array([3], np.uint32), np.array([2], np.uint32))
    found = masses(project(arrays, [b"ab"], [encoded], mapping, max_entries=8))
    assert found == [pytest.approx({3: 0.75, 2: 0.25}, abs=1e-6)]


def test_a_lone_word_mark_of_the_target_leaves_the_source_where_it_stands() -> None:
    target = vocabulary(b" ", b"a", b"b", b"c")
    tables = hand_tables(ABC, target)
    start = np.zeros_like(tables.mapping.pieces.start)
    mapping = tables.mapping._replace(pieces=tables.mapping.pieces._replace(start=start))
    arrays = hand_arrays([A, B], [1, 2], [{A: 0.5, C: 0.25, AB: 0.25}, {B: 1.0}])
    encoded = EncodedSegment((), np.array([0, 1, 2], np.uint32), np.array([0, 1, 2], np.uint32))
    result = project(arrays, [b"ab"], [encoded], mapping, max_entries=8)
    expected = [{0: 1.0}, {1: 0.75, 3: 0.25}, {2: 1.0}]
    assert masses(result) == [pytest.approx(row, abs=1e-6) for row in expected]
    assert result["origin"].tolist() == [Origin.BOUNDARY, Origin.INSIDE, Origin.BOUNDARY]


def test_the_source_is_taken_up_inside_a_token_after_a_row_that_says_nothing() -> None:
    """The source's first row is not known; the target's first token ends inside the second."""
    target = vocabulary(b"aa", b"b", b"c")
    tables = hand_tables(ABC, target)
    rows = [None, {AB: 0.3, A: 0.1, ABC_: 0.2, C: 0.4}]
    found = by_hand(tables, b"aab", [A, AB], rows, [0, 1])
    assert found == [{}, pytest.approx({b"b": 0.5 / 0.6}, abs=1e-6)]


def test_the_source_is_taken_up_where_a_token_begins_after_a_row_that_says_nothing() -> None:
    found = by_hand(hand_tables(ABC, ABC), b"ab", [A, B], [None, {B: 0.5, C: 0.5}], [A, B])
    assert found == [{}, pytest.approx({b"b": 0.5, b"c": 0.5}, abs=1e-6)]


def test_entries_that_leave_the_label_no_room_are_scaled() -> None:
    tables = hand_tables(ABC, ABC)
    arrays = hand_arrays([A], [1], [{A: 0.5, B: 0.25, C: 0.25}])
    arrays["label_logprobs"] = np.log(np.array([0.75], "<f4"))
    result = project(arrays, [b"a"], [hand_segment([A], ABC)], tables.mapping, max_entries=8)
    expected = {A: 0.75, B: 0.125, C: 0.125}
    assert masses(result) == [pytest.approx(expected, abs=1e-6)]


def test_entries_of_a_later_row_are_scaled_too() -> None:
    tables = hand_tables(ABC, ABC)
    arrays = hand_arrays([A, B], [1, 2], [{A: 1.0}, {B: 0.5, A: 0.25, C: 0.25}])
    arrays["label_logprobs"] = np.log(np.array([1.0, 0.75], "<f4"))
    result = project(arrays, [b"ab"], [hand_segment([AB], ABC)], tables.mapping, max_entries=8)
    assert masses(result) == [pytest.approx({AB: 0.75, A: 0.25}, abs=1e-6)]


def test_ties_are_cut_by_id_and_the_label_stays() -> None:
    tables = hand_tables(ABC, ABC)
    arrays = hand_arrays([C], [1], [{A: 0.3, B: 0.3, AB: 0.3, C: 0.1}])
    encoded = hand_segment([C], ABC)
    for limit, expected in ((1, [C]), (2, [A, C]), (3, [A, B, C]), (4, [A, B, AB, C])):
        result = project(arrays, [b"c"], [encoded], tables.mapping, max_entries=limit)
        assert result["entry_ids"].tolist() == expected
        kept = 0.1 + 0.3 * (limit - 1)
        assert result["tail_mass"] == pytest.approx([1 - kept], abs=1e-6)


def test_look_ahead_takes_what_would_have_made_the_label_longer() -> None:
    """The target writes "ab" where "b" follows: that it wrote "a" says that none did."""
    target = vocabulary(b"a", b"b", b"ab", b"x", b"c")
    weights = {A: {0: 0.5, 2: 0.5}, B: {1: 1.0}, C: {4: 1.0}}
    rows = [{C: 1.0}, {A: 1.0}, {B: 0.75, C: 0.25}]
    tables = hand_tables(ABC, target, weights)
    found = by_hand(tables, b"cac", [C, A, C], rows, [4, 0, 4])[1:]
    assert found == [pytest.approx({b"a": 0.25, b"ab": 0.75}), pytest.approx({b"c": 1.0})]
    tables = hand_tables(ABC, target, weights, look_ahead=False)
    found = by_hand(tables, b"cac", [C, A, C], rows, [4, 0, 4])[1:]
    assert found == [pytest.approx({b"a": 1.0}), pytest.approx({b"c": 0.25, b"b": 0.75})]


def test_look_ahead_keeps_as_much_of_the_tail_as_of_the_entries() -> None:
    """Half of the entries say that the target wrote "a": so may half of what is no entry."""
    target = vocabulary(b"a", b"b", b"ab", b"x", b"c")
    tables = hand_tables(ABC, target, {A: {0: 0.5, 2: 0.5}, B: {1: 1.0}, C: {4: 1.0}})
    rows = [{C: 1.0}, {A: 1.0}, {B: 0.25, A: 0.25, C: 0.25}]
    found = by_hand(tables, b"cac", [C, A, C], rows, [4, 0, 4])[1:]
    assert found == [
        pytest.approx({b"a": 0.25 + 0.25 + 0.125, b"ab": 0.25}),
        pytest.approx({b"c": 0.4, b"a": 0.2, b"ab": 0.2}),
    ]


@cache
def tokenizer(kind: str, seed: int = 0) -> SegmentTokenizer:
    """A tokenizer of `kind`; seed 1 is another vocabulary of it."""
    size = {"byte_level": 380, "unigram": 430, "metaspace_bpe": 460}[kind] + 40 * seed
    chosen = SAMPLES if seed == 0 else SAMPLES[::2]
    return SegmentTokenizer(tiny_tokenizer(kind, chosen, size), name=f"{kind}{seed}")


def trained_tables(
    a: SegmentTokenizer, b: SegmentTokenizer, texts: Sequence[str], *, prior: float = 4.0,
    look_ahead: bool = True,
) -> Tables:  # fmt: skip
    """Tables of two tokenizers, continuations counted on `texts`."""
    pieces = piece_table(a.vocabulary, b)
    counts = PairCounts(a.vocab_size, b.vocab_size)
    for left, right in zip(
        a.encode(segments(list(texts))), b.encode(segments(list(texts))), strict=True
    ):
        ends = left.byte_ends.astype(np.int64), right.byte_ends.astype(np.int64)
        counts.add(left.token_ids, ends[0], right.token_ids, ends[1])
    going = counts.continuation(first_tokens(pieces), prior)
    eos = (
        -1 if a.eos_id is None else a.eos_id,
        -1 if b.eos_id is None else b.eos_id,
    )
    tail = tail_tokens(counts.distinct, a.vocabulary.lengths, b.vocabulary.lengths, 5)
    mapping = vocabulary_map(pieces, going, b.vocabulary, eos=eos, look_ahead=look_ahead, tail=tail)
    return Tables(a.vocabulary, b.vocabulary, mapping)


@cache
def pair(source: str, target: str) -> Tables:
    return trained_tables(tokenizer(source), tokenizer(target, 1), SAMPLES)


def aligned(
    chosen: list[str], source: str, target: str, *, bos: bool = True, max_entries: int = 64
) -> tuple[Arrays, Arrays]:
    a, b = tokenizer(source), tokenizer(target, 1)
    arrays = random_source(a.encode(segments(chosen)), a.vocab_size, 0, bos=bos)
    encoded = b.encode(segments(chosen))
    texts = [text.encode() for text in chosen]
    mapping = pair(source, target).mapping
    return arrays, project(arrays, texts, encoded, mapping, max_entries=max_entries)


def test_no_shift_row_i_stays_with_token_i() -> None:
    """The defect most common in this field: distributions one position late or early."""
    a = tokenizer("byte_level")
    text = "def add(a, b):\n    return a + b\n"
    encoded = a.encode(segments([text]))
    ids, n = encoded[0].token_ids, len(encoded[0].token_ids)
    arrays = random_source(encoded, a.vocab_size, 0) | {  # each row is certain of its own token
        "entry_offsets": np.arange(n + 1, dtype="<i8"),
        "entry_ids": ids.astype("<u4"),
        "entry_logprobs": np.zeros(n, "<f4"),
        "tail_mass": np.zeros(n, "<f4"),
        "label_logprobs": np.zeros(n, "<f4"),
    }
    for target in KINDS:
        there = tokenizer(target, 1).encode(segments([text]))
        mapping = pair("byte_level", target).mapping
        result = project(arrays, [text.encode()], there, mapping, max_entries=8)
        assert (result["origin"] != Origin.NONE).all()
        best = result["entry_ids"][result["entry_offsets"][:-1]]
        assert (best == there[0].token_ids).all()
        assert np.exp(result["label_logprobs"]) == pytest.approx(1.0)


def test_the_label_stays_when_entries_are_cut() -> None:
    for source, target in PAIRS:
        _, result = aligned(SAMPLES, source, target, max_entries=1)
        known = ~np.isnan(result["label_logprobs"])
        first = result["entry_ids"][result["entry_offsets"][:-1][known]]
        assert (first == result["token_ids"][known]).all()


def test_a_source_without_bos_says_nothing_of_the_first_token() -> None:
    _, result = aligned(SAMPLES, "byte_level", "byte_level", bos=False)
    first = result["token_offsets"][:-1]
    assert (result["origin"][first] == Origin.NONE).all()
    assert np.isnan(result["label_logprobs"][first]).all()
    assert (result["tail_mass"][first] == 1).all()


def test_spans_have_the_whole_nll_of_the_source() -> None:
    for source, target in PAIRS:
        arrays, result = aligned(SAMPLES, source, target)
        total = -arrays["label_logprobs"].astype(float).sum()
        assert -result["span_logprobs"].astype(float).sum() == pytest.approx(total, rel=1e-5)
        assert result["source_nats"].sum() == pytest.approx(total, rel=1e-6)
        assert result["source_bytes"].sum() == sum(len(t.encode()) for t in SAMPLES)
        last = result["span_offsets"][1:] - 1
        assert result["span_byte_ends"][last].tolist() == [len(t.encode()) for t in SAMPLES]


def test_nearly_every_position_has_information() -> None:
    """All but those in the first token of a source without BOS."""
    for source, target in PAIRS:
        arrays, result = aligned(SAMPLES, source, target, bos=False)
        known = result["origin"] != Origin.NONE
        for d in range(len(SAMPLES)):
            read = arrays["byte_ends"][arrays["token_offsets"][d]]
            first, stop = result["token_offsets"][d : d + 2]
            begins = np.concatenate(([0], result["byte_ends"][first : stop - 1]))
            known[first:stop] |= begins < read
            known[first] = True
        assert known.mean() > 0.99


def test_a_shard_without_segments_or_with_empty_ones_is_aligned() -> None:
    tables = hand_tables(ABC, ABC)
    nothing = hand_arrays([], [], [])
    encoded = [hand_segment([], ABC)]
    result = project(nothing, [b""], encoded, tables.mapping, max_entries=8)
    assert result["token_offsets"].tolist() == [0, 0]
    check_shard("aligned", result, vocab_size=len(ABC), where="test")
