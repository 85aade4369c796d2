"""The mapped methods: their tables on a few tokens by hand, whole shards against the plain reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.papers import mapped
from align.papers.entry_maps import EntryMap, Table, Vocabularies
from align.papers.mapped import MappedAligner
from store_schema.errors import MismatchError
from store_schema.layout import Arrays, Origin, check_shard, row_sums
from tests.mapped_reference import Place, byte_prefix_row, mapped_row, places
from tests.random_source import segments
from tests.test_align_mined import KINDS, odd_texts, position, read, tokenizer

# ---- tables ----------------------------------------------------------------------------------------

SOURCE = [b"a", b"b", b"ab", b"abc", b"c"]
TARGET = [b"a", b"bc", b"abc", b"c", b"abcab"]
WRITTEN = {"a": [0], "bc": [1, 4], "abc": [3], "c": [4], "abcab": [3, 2]}
"""What the source makes of each target token."""
ROW = {b"a": 0.5, b"ab": 0.2, b"abc": 0.2, b"b": 0.1}


class Tokenizer(SimpleNamespace):
    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        return [WRITTEN[text] for text in texts]


def side(tokens: Sequence[bytes], eos_id: int | None = None) -> Any:
    return Tokenizer(vocabulary=SimpleNamespace(tokens=tuple(tokens)), eos_id=eos_id)


@pytest.fixture
def both() -> Vocabularies:
    return Vocabularies(side(SOURCE), side(TARGET))


def one_row(masses: Mapping[bytes, float]) -> Arrays:
    ids = [SOURCE.index(token) for token in masses]
    return {
        "token_ids": np.array(ids[:1]),
        "label_logprobs": np.log(np.array(list(masses.values()))[:1]),
        "entry_offsets": np.array([0, len(ids)]),
        "entry_ids": np.array(ids),
        "entry_logprobs": np.log(np.array(list(masses.values()))),
    }


def made(table: Table, masses: Mapping[bytes, float]) -> dict[bytes, Any]:
    row = mapped_row(table, one_row(masses), Place(0, b""))
    return {TARGET[token]: pytest.approx(mass) for token, mass in row.items()}


def test_tokens_of_the_same_bytes(both: Vocabularies) -> None:
    assert made(both.shared, ROW) == {b"a": 0.5, b"abc": 0.2}


def test_tokens_with_most_weight_on_their_first_part(both: Vocabularies) -> None:
    # "bc" is b (2/3) and c (1/3); "abcab" is abc and ab, and abc has a token of its own bytes.
    assert made(both.hybrid, ROW) == {b"a": 0.5, b"abc": 0.2, b"bc": 0.1}


def test_mass_is_shared_among_tokens_made_of_it(both: Vocabularies) -> None:
    # abc: "abc" with 1 and "abcab" with 2/3; ab: "abcab" alone; b: "bc" alone.
    expected = {b"a": 0.5, b"bc": 0.1, b"abc": 0.2 * 0.6, b"abcab": 0.2 * 0.4 + 0.2}
    assert made(both.projection, ROW) == expected


def test_the_longest_token_that_is_a_prefix(both: Vocabularies) -> None:
    masses = {b"ab": 0.4, b"abc": 0.4, b"c": 0.2}
    assert made(both.prefixes, masses) == {b"a": 0.4, b"abc": 0.4, b"c": 0.2}
    # Inside: what agrees with "a" and goes on. No target token begins with b alone.
    inside = byte_prefix_row(both, one_row(ROW), Place(0, b"a"))
    assert {TARGET[token]: mass for token, mass in inside.items()} == {b"bc": pytest.approx(0.5)}
    assert byte_prefix_row(both, one_row({b"b": 1.0}), Place(0, b"a")) == {}


def test_the_end_is_the_end() -> None:
    sides = Vocabularies(side([*SOURCE, b""], 5), side([b"", *TARGET], 0))
    for table in (sides.shared, sides.hybrid, sides.projection, sides.prefixes):
        assert table[5] == [(0, 1.0)]
    entries = EntryMap.of(sides.shared, 6)
    assert entries.offsets.tolist() == [0, 1, 1, 1, 2, 3, 4]
    assert entries.targets.tolist() == [1, 3, 4, 0]


def test_places() -> None:
    source = SimpleNamespace(byte_ends=np.array([3, 4]))
    target = SimpleNamespace(byte_ends=np.array([1, 3, 4, 5]))
    found = list(places(source, target, b"abcab"))  # type: ignore[arg-type]
    assert found == [Place(0, b""), Place(0, b"a"), Place(1, b""), None]


# ---- shards ----------------------------------------------------------------------------------------

METHODS = ["gold", "h_kl", "p_kl", "byte_prefix"]
TABLES = dict(zip(METHODS, ["shared", "hybrid", "projection", "prefixes"], strict=True))


def aligner(method: str, kinds: tuple[str, str], max_entries: int = 1000) -> MappedAligner:
    sides = Vocabularies(tokenizer(kinds[0]), tokenizer(kinds[1], 1))
    table = EntryMap.of(getattr(sides, TABLES[method]), sides.source.vocab_size)
    return MappedAligner(table, sides, max_entries, inside=method == "byte_prefix")


@pytest.mark.parametrize("method", METHODS)
@given(
    texts=st.lists(odd_texts, min_size=1, max_size=4),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    seed=st.integers(0, 9),
)
def test_a_shard_is_its_rows_read_plainly(method: str, texts: Any, kinds: Any, seed: int) -> None:
    source, data, target = read(texts, *kinds, seed=seed)
    found = aligner(method, kinds)
    arrays = found.align(source, data, target)
    vocab_size = tokenizer(kinds[1], 1).vocab_size
    check_shard("aligned", arrays, vocab_size=vocab_size, where="test")
    sides = found.vocabularies
    own = sides.source.encode(segments(texts))
    row = 0
    for d, (text, here, there) in enumerate(zip(data, own, target, strict=True)):
        first = int(source["token_offsets"][d])
        for j, place in enumerate(places(here, there, text)):
            expected: dict[int, float] = {}
            if place is not None:
                at = Place(first + place.row, place.read)
                if method == "byte_prefix":
                    expected = byte_prefix_row(sides, source, at)
                else:
                    expected = mapped_row(getattr(sides, TABLES[method]), source, at)
            got = position(arrays, row)
            assert got == pytest.approx({t: m for t, m in expected.items() if m > 0}, rel=1e-5)
            label = float(arrays["label_logprobs"][row])
            mass = expected.get(int(there.token_ids[j]), 0.0)
            assert (0.0 if np.isnan(label) else np.exp(label)) == pytest.approx(mass, rel=1e-5)
            if expected and place is not None:
                origin = Origin.INSIDE if place.read else Origin.BOUNDARY
                assert arrays["origin"][row] == origin
            else:
                assert arrays["origin"][row] == Origin.NONE
            row += 1
    assert row == len(arrays["token_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_are_kept_and_the_label_always(method: str) -> None:
    texts = ["def f(a, b):\n    return a + b\n", "one two three, one two four"]
    source, data, target = read(texts, "byte_level", "byte_level", seed=3)
    whole = aligner(method, ("byte_level", "byte_level")).align(source, data, target)
    few = aligner(method, ("byte_level", "byte_level"), 3).align(source, data, target)
    assert np.diff(few["entry_offsets"]).max() == 3
    np.testing.assert_array_equal(few["label_logprobs"], whole["label_logprobs"])
    for row, label in enumerate(few["token_ids"].tolist()):
        best = dict(list(position(whole, row).items())[:3])
        if label in position(whole, row) and label not in best:
            best.pop(list(best)[-1])
            best[label] = position(whole, row)[label]
        assert position(few, row) == best
    mass = np.exp(few["entry_logprobs"].astype(float))
    np.testing.assert_allclose(
        row_sums(mass, few["entry_offsets"]) + few["tail_mass"], 1.0, atol=1e-5
    )


def test_parts_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, data, target = read(["some words and 1234"] * 3, "unigram", "metaspace_bpe")
    made = aligner("byte_prefix", ("unigram", "metaspace_bpe"))
    whole = made.align(source, data, target)
    monkeypatch.setattr(mapped, "_PAIRS", 7)
    for name, array in made.align(source, data, target).items():
        np.testing.assert_array_equal(array, whole[name])


def test_tokens_of_another_text_are_refused() -> None:
    source, data, target = read(["one two"], "unigram", "byte_level")
    with pytest.raises(MismatchError, match="do not end with its text"):
        aligner("gold", ("unigram", "byte_level")).align(source, [data[0] + b"x"], target)


def test_ids_outside_the_table_are_refused() -> None:
    source, data, target = read(["one two"], "unigram", "byte_level")
    source["entry_ids"][0] = 1 << 20
    with pytest.raises(MismatchError, match="token outside the vocabulary map"):
        aligner("gold", ("unigram", "byte_level")).align(source, data, target)


def test_rows_that_are_not_known_have_no_entries() -> None:
    source, data, target = read(["one two"], "byte_level", "byte_level", bos=False)
    arrays = aligner("gold", ("byte_level", "byte_level")).align(source, data, target)
    assert arrays["entry_offsets"][1] == 0
    assert arrays["tail_mass"][0] == 1
    assert arrays["origin"][0] == Origin.NONE
