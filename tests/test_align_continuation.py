"""First tokens and continuations: what the target begins with, and where it goes on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from align.chain.continuation import (
    LEAST_SHARE,
    MAX_TARGETS,
    Continuation,
    PairCounts,
    first_tokens,
)
from align.chain.first_token import piece_table
from align.chain.tail_tokens import PRIOR, tail_tokens
from align.chain.trie import TargetTrie
from align.counts.pair_counts import DistinctPairs
from align.papers.mined_vocabulary import nearest_tokens, written_tokens
from store_schema.text.tokenizer import SegmentTokenizer
from tests.random_source import segments
from tests.tiny import tiny_tokenizer

DIGITS = [f"{a}+{b}={a + b};" for a in range(120, 200, 3) for b in range(1, 90, 7)]


def of(kind: str, texts: list[str], size: int) -> SegmentTokenizer:
    return SegmentTokenizer(tiny_tokenizer(kind, texts, size), name=kind)


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "metaspace_bpe"])
def test_first_tokens_are_those_the_tokenizer_writes(kind: str) -> None:
    """Each piece, asked again by hand in running text."""
    source = of("byte_level", [*DIGITS, "the cat sat on the mat\n\n  there"], 330)
    target = of(kind, [*DIGITS, "the dog ran to the mast\n  here"], 380)
    table = piece_table(source.vocabulary, target)
    tokens = target.vocabulary.tokens
    for token in (" the", "the", " sat", "12", " ", "\n"):
        [ids] = source.encode_text([token])
        if len(ids) != 1:
            continue
        first = int(table.middle[table.offsets[ids[0]]])
        assert tokens[first], token
        assert token.encode().startswith(tokens[first]) or tokens[first].startswith(token.encode())


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "metaspace_bpe"])
def test_no_piece_begins_with_a_token_that_the_target_has_no_row_for(kind: str) -> None:
    """A token that someone added is met in text: the source's pieces must not fall to it."""
    source = of("byte_level", ["PAD =PAD= aPADb"] * 40, 330)
    assert {b"PAD", b" PAD"} & set(source.vocabulary.tokens)
    hf = tiny_tokenizer(kind, DIGITS, 380)
    rows = len(hf)
    hf.add_tokens(["PAD"])
    target = SegmentTokenizer(hf, name=kind)
    assert piece_table(source.vocabulary, target).start.max() >= rows
    target.limit_vocabulary(rows)
    assert target.beyond_rows == ("PAD",)
    table = piece_table(source.vocabulary, target)
    for first in (table.middle, table.start):
        assert first.min() >= 0
        assert first.max() < rows
    nearest = nearest_tokens(source.vocabulary, target.vocabulary, written=written_tokens(target))
    assert nearest.max() < rows


def test_every_byte_has_a_token() -> None:
    source = of("byte_level", DIGITS, 300)
    for kind in ("byte_level", "unigram", "metaspace_bpe"):
        table = piece_table(source.vocabulary, of(kind, DIGITS, 380))
        assert (table.middle >= 0).all()
        assert (table.start >= 0).all()


def counted(source: SegmentTokenizer, target: SegmentTokenizer, texts: list[str]) -> PairCounts:
    counts = PairCounts(source.vocab_size, target.vocab_size)
    pairs = zip(source.encode(segments(texts)), target.encode(segments(texts)), strict=True)
    for a, b in pairs:
        counts.add(
            a.token_ids, a.byte_ends.astype(np.int64), b.token_ids, b.byte_ends.astype(np.int64)
        )
    return counts


def test_mass_goes_where_the_target_went_on() -> None:
    """A source that writes digits one by one, a target that writes whole numbers."""
    source = of("byte_level", ["x"], 260)
    target = of("byte_level", DIGITS, 400)
    table = piece_table(source.vocabulary, target)
    going = counted(source, target, DIGITS).continuation(first_tokens(table), 1.0)
    one = source.encode_text(["1"])[0][0]
    row = slice(going.offsets[one], going.offsets[one + 1])
    written = {
        target.vocabulary.tokens[int(t)]: w
        for t, w in zip(going.targets[row], going.weights[row], strict=True)
    }
    longer = sum(weight for token, weight in written.items() if len(token) > 1)
    assert longer > 0.5, written
    assert sum(written.values()) <= 1 + 1e-9


def test_weights_by_hand() -> None:
    counts = PairCounts(3, 4)
    ends = np.array([1, 2, 3, 4])
    ids = np.array([0, 1, 1, 2], np.uint32)
    counts.add(ids, ends, np.array([0, 2, 3, 3], np.uint32), ends)
    going = counts.continuation(np.array([-1, 2, 3], np.int32), 2.0)
    # token 1: seen with 2 and with 3, prior 2 on token 2; token 2: seen with 3, prior 2 on 3
    assert going.offsets.tolist() == [0, 0, 2, 3]
    assert going.targets.tolist() == [2, 3, 3]
    assert going.weights == pytest.approx([3 / 4, 1 / 4, 1.0])


def test_the_kept_targets_are_the_heaviest_and_the_rest_is_tail() -> None:
    counts = PairCounts(1, 100)
    for target in range(1, 81):
        for _ in range(target):
            counts.add(
                np.array([0, 0], np.uint32), np.array([1, 2]),
                np.array([0, target], np.uint32), np.array([1, 2]),
            )  # fmt: skip
    going = counts.continuation(np.array([-1], np.int32), 1.0)
    assert going.targets.tolist() == list(range(80, 80 - MAX_TARGETS, -1))
    assert going.weights.sum() == pytest.approx(
        sum(range(81 - MAX_TARGETS, 81)) / sum(range(1, 81))
    )


def test_small_shares_are_tail_but_never_the_heaviest() -> None:
    counts = PairCounts(2, 400)
    seen = {0: {1: 990, 2: 12, 3: 9}, 1: dict.fromkeys(range(4, 304), 1)}
    for token, targets in seen.items():
        for target, count in targets.items():
            for _ in range(count):
                counts.add(
                    np.array([0, token], np.uint32), np.array([1, 2]),
                    np.array([0, target], np.uint32), np.array([1, 2]),
                )  # fmt: skip
    going = counts.continuation(np.array([-1, -1], np.int32), 1.0)
    kept = [going.targets[a:b].tolist() for a, b in itertools.pairwise(going.offsets.tolist())]
    assert kept[1] == [4]
    first = going.weights[: going.offsets[1]]
    assert kept[0] == [1, 2]
    assert first.tolist() == pytest.approx([990 / 1011, 12 / 1011])
    assert 9 / 1011 < LEAST_SHARE < 12 / 1011


def test_order_of_counting_does_not_matter() -> None:
    source, target = of("byte_level", DIGITS, 300), of("unigram", DIGITS, 360)
    first = first_tokens(piece_table(source.vocabulary, target))
    a = counted(source, target, DIGITS).continuation(first, 4.0)
    b = counted(source, target, DIGITS[::-1]).continuation(first, 4.0)
    np.testing.assert_array_equal(a.targets, b.targets)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_tail_keeps_what_is_sure_and_nothing_else() -> None:
    going = Continuation(
        np.array([0, 1, 3, 3, 4]), np.array([7, 1, 2, 5], np.uint32), np.array([0.9, 0.5, 0.4, 1.0])
    )
    sure = going.only_certain()
    assert sure.offsets.tolist() == [0, 1, 1, 1, 2]
    assert sure.targets.tolist() == [7, 5]
    assert sure.weights.tolist() == [0.9, 1.0]


def test_every_token_has_a_node_of_the_trie() -> None:
    vocabulary = of("byte_level", [*DIGITS, "the cat sat on the mat"], 330).vocabulary
    trie = TargetTrie.of(vocabulary)
    by_bytes = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    assert set(trie.longest[trie.is_token].tolist()) == set(by_bytes.values())
    assert np.count_nonzero(trie.is_token) == len(by_bytes)


def test_shares_of_tail_tokens_are_of_all_pairs_and_those_unseen() -> None:
    pairs = DistinctPairs(4)
    pairs.note(np.array([1, 1, 2, 2, 2]), np.array([0, 0, 0, 3, 3]))
    source_lengths, target_lengths = np.array([1, 3, 2, 0]), np.array([1, 1, 1, 2])
    found = tail_tokens(pairs, source_lengths, target_lengths, 8)
    whole = 5 + 3 * PRIOR  # pairs, and a prior for each source token that has bytes
    assert found.tokens.tolist() == [
        1,
        2,
    ]  # both longer than target token 0, the more frequent first
    np.testing.assert_allclose(found.shares, [2 / whole, 1 / whole])
    assert found.offsets.tolist() == [0, 2, 2, 2, 2]
    np.testing.assert_allclose(found.of_source, [0, 2 / whole, 3 / whole, 0])
    # One row lists token 1, and its real token is 2; the other lists none, and its real token is 1.
    ids, listed = np.array([2, 1]), np.array([1])
    scales = found.scales(np.array([0.4, 0.3]), ids, np.array([0, 1, 1]), listed)
    np.testing.assert_allclose(scales, [0.4 / (1 - 5 / whole), 0.3 / (1 - 2 / whole)])
