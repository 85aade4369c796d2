"""The oracle of alignment against every continuation written out, and its figures by hand."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.align_oracle import (
    ELSEWHERE,
    OPEN,
    SourcePieces,
    TargetText,
    Truth,
    divergence,
    truth_at,
)
from benchmarks.align_pairs import as_segments
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.tokenizer_zoo import FAMILIES

WORDS = ["an", "ant", "nat", "nation", "national", "1", "12", "123", "1234"]
ENOUGH = 9
"""Bytes behind a position after which no tokenizer of these words changes its mind."""


def sentences(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=8)) for _ in range(number)]


class Bigram:
    """Probabilities by the last token alone: a few likely tokens of those that the words need."""

    def __init__(self, tokenizer: SegmentTokenizer, ids: Sequence[int], context: int) -> None:
        self._ids, self._context = list(ids), context
        size, needed = tokenizer.vocab_size, set(" ".join(WORDS).encode())
        rng = np.random.default_rng(0)
        usable = [bool(t) and set(t) <= needed for t in tokenizer.vocabulary.tokens]
        logits = np.where(usable, rng.normal(0, 4.0, (size, size)), -np.inf)
        logits[:, tokenizer.eos_id] = 8.0
        top = np.exp(logits - logits.max(1, keepdims=True))
        self.table = top / top.sum(1, keepdims=True)

    def rows(self, before: int, nodes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float64]:
        held = [self._context, *self._ids[:before]]
        return np.stack([self.table[(*held, *node)[-1]] for node in nodes])


@pytest.fixture(scope="module")
def pair() -> tuple[SegmentTokenizer, SegmentTokenizer]:
    texts = sentences(300, 1)
    made = [FAMILIES[name](texts, size) for name, size in (("llama3", 290), ("gpt2", 282))]
    source, target = (SegmentTokenizer(t, name=str(i)) for i, t in enumerate(made))
    return source, target


def written_out(
    rows: Bigram,
    pieces: SourcePieces,
    target: TargetText,
    text: bytes,
    own: EncodedSegment,
    row: int,
) -> dict[int, float]:
    """The same by writing every continuation out, as long as it has any mass."""
    found: defaultdict[int, float] = defaultdict(float)
    start = int(own.byte_ends[row - 1]) if row else 0
    tokens, needed = pieces.vocabulary.tokens, text[start : target.begin]
    goal = len(needed) + ENOUGH
    # The real tokens up to the position, one of the ways there: less than a share of it is left out.
    least, node = 1e-5, ()
    for token, end in zip(own.token_ids.tolist()[row:], own.byte_ends.tolist()[row:], strict=True):
        if end <= target.begin:
            least *= float(rows.rows(row, [node])[0][token])
            node = (*node, token)

    def go(node: tuple[int, ...], written: bytes, mass: float) -> None:
        final = bool(node) and node[-1] == pieces.eos_id
        if len(written) >= goal or final:
            reading = target._tokenizer.encode_text(
                [(target._before + written[len(needed) :]).decode()]
            )
            found[target._token(reading[0], at_end=final)] += mass
            return
        row_V = rows.rows(row, [node])[0]
        for token in np.flatnonzero(mass * row_V > least).tolist():
            longer = written + tokens[token]
            agrees = longer[: len(needed)] == needed[: len(longer)]
            if agrees and (token != pieces.eos_id or len(written) >= len(needed)):
                go((*node, token), longer, mass * float(row_V[token]))

    go((), b"", 1.0)
    found.pop(ELSEWHERE, None)
    total = sum(found.values())
    return {token: mass / total for token, mass in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_the_truth_is_that_of_all_continuations(
    pair: tuple[SegmentTokenizer, SegmentTokenizer], seed: int
) -> None:
    source, target = pair
    text = sentences(1, 100 + seed)[0]
    own, read = (side.encode(as_segments([text]))[0] for side in pair)
    rows = Bigram(source, own.token_ids.tolist(), source.bos_id or 0)
    pieces = SourcePieces(source.vocabulary, source.eos_id)
    starts = np.concatenate(([0], own.byte_ends[:-1])).astype(int)
    several = 0
    for position in (2, 5):
        place = TargetText(target, text.encode(), read, position)
        truth = truth_at(rows, pieces, place, text.encode(), own, remainder=1e-3, most_nodes=10**5)
        assert truth is not None
        assert truth.remainder < 2e-3
        row = max(int(np.searchsorted(starts, place.begin, side="right")) - 2, 0)
        expected = written_out(rows, pieces, place, text.encode(), own, row)
        several += sum(mass > 0.01 for mass in expected.values()) > 1
        for token in {*truth.mass, *expected}:
            seen, wanted = truth.mass.get(token, 0.0), expected.get(token, 0.0)
            assert seen == pytest.approx(wanted, abs=2 * truth.remainder + 3e-3)
    assert several


def test_what_is_settled(pair: tuple[SegmentTokenizer, SegmentTokenizer]) -> None:
    _, target = pair
    text = "an national 1234"
    read = target.encode(as_segments([text]))[0]
    place = TargetText(target, text.encode(), read, 1)
    assert place.begin == 2
    tokens = target.vocabulary.tokens

    def token(written: bytes, final: bool = False) -> bytes | int:
        found = place.tokens([(written, final)])[0]
        return found if found < 0 else tokens[found]

    assert token(b"") == OPEN
    assert token(b" nation") == OPEN  # " national" goes on from there
    assert token(b" nation", final=True) == b" nation"
    assert token(b" nation at") == b" nation"
    assert token(b"t at") == ELSEWHERE  # "ant" is a token: none ends before the t
    assert token(b" \xc3") == OPEN  # half a character
    assert token(b" \xff\xff") == ELSEWHERE
    assert place.tokens([(b"", True)]) == [target.eos_id]


def test_divergences_by_hand() -> None:
    truth = Truth(mass={3: 0.5, 4: 0.5})
    exact = divergence(truth, np.array([3, 4]), np.array([0.5, 0.5]), 10)
    assert exact == pytest.approx((0.0, 0.0), abs=1e-6)
    # Nothing known: every id has a tenth.
    nothing = divergence(truth, np.array([], int), np.array([]), 10)
    assert nothing == pytest.approx((math.log(5), 0.8))
    # Half on one of two: the other has a ninth of the tail.
    half = divergence(truth, np.array([3]), np.array([0.5]), 10)
    assert half[0] == pytest.approx(0.5 * math.log(0.5 / (0.5 / 9)))
    assert half[1] == pytest.approx(0.5 * ((0.5 - 0.5 / 9) + 8 * 0.5 / 9))
