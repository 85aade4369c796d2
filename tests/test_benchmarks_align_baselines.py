"""Readings of other methods' maps on vocabularies of a few tokens, by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.align_baselines import BASELINES, Maps, Place, places

SOURCE = [b"a", b"b", b"ab", b"abc", b"c"]
TARGET = [b"a", b"bc", b"abc", b"c", b"abcab"]
WRITTEN = {"a": [0], "bc": [1, 4], "abc": [3], "c": [4], "abcab": [3, 2]}
"""What the source makes of each target token."""


class Tokenizer(SimpleNamespace):
    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        return [WRITTEN[text] for text in texts]


def side(tokens: Sequence[bytes]) -> Tokenizer:
    return Tokenizer(vocabulary=SimpleNamespace(tokens=tuple(tokens)))


@pytest.fixture
def maps() -> Maps:
    return Maps(side(SOURCE), side(TARGET))


def one_row(masses: Mapping[bytes, float]) -> dict[str, np.ndarray]:
    ids = [SOURCE.index(token) for token in masses]
    return {
        "entry_offsets": np.array([0, len(ids)]),
        "entry_ids": np.array(ids),
        "entry_logprobs": np.log(np.array(list(masses.values()))),
    }


def made(maps: Maps, method: str, masses: Mapping[bytes, float], read: bytes = b"") -> dict:
    row = BASELINES[method](maps, one_row(masses), 0, Place(0, read))
    return {TARGET[token]: pytest.approx(mass) for token, mass in row.items()}


ROW = {b"a": 0.5, b"ab": 0.2, b"abc": 0.2, b"b": 0.1}


def test_tokens_of_the_same_bytes(maps: Maps) -> None:
    assert made(maps, "gold", ROW) == {b"a": 0.5, b"abc": 0.2}
    assert made(maps, "gold", ROW, read=b"a") == {}


def test_tokens_with_most_weight_on_their_first_part(maps: Maps) -> None:
    # "bc" is b (2/3) and c (1/3); "abcab" is abc and ab, and abc has a token of its own bytes.
    assert made(maps, "h_kl", ROW) == {b"a": 0.5, b"abc": 0.2, b"bc": 0.1}


def test_mass_is_shared_among_tokens_made_of_it(maps: Maps) -> None:
    # abc: "abc" with 1 and "abcab" with 2/3; ab: "abcab" alone; b: "bc" alone.
    expected = {b"a": 0.5, b"bc": 0.1, b"abc": 0.2 * 0.6, b"abcab": 0.2 * 0.4 + 0.2}
    assert made(maps, "p_kl", ROW) == expected


def test_the_longest_token_that_is_a_prefix(maps: Maps) -> None:
    assert made(maps, "bpm", {b"ab": 0.4, b"abc": 0.4, b"c": 0.2}) == {
        b"a": 0.4,
        b"abc": 0.4,
        b"c": 0.2,
    }
    # Inside: what agrees with "a" and goes on. No target token begins with b alone.
    assert made(maps, "bpm", ROW, read=b"a") == {b"bc": 0.5}
    assert made(maps, "bpm", {b"b": 1.0}, read=b"a") == {}


def test_places() -> None:
    text = b"abcab"
    source = SimpleNamespace(byte_ends=np.array([3, 4]))
    target = SimpleNamespace(byte_ends=np.array([1, 3, 4, 5]))
    found = list(places(source, target, text))
    assert found == [Place(0, b""), Place(0, b"a"), Place(1, b""), None]
