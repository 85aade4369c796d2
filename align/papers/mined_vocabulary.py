"""For every source token, the target token of least edit distance (MinED), exactly and fast.

Tokens are compared as bytes, word marks as the spaces they stand for. Candidates are ordered by edit
distance, then by common prefix (longest first), then by id. Target tokens with the same bytes count as
one, whose id is the first that the tokenizer writes. A source token whose bytes the target has is
mapped to that token.

The search for all others begins at target tokens of equal length and goes outwards, until the
difference in length exceeds the best distance so far. The edit distance is computed only where two
cheap lower bounds allow it: each byte value that one token has and the other lacks needs an edit; and
an edit changes at most two pairs of neighbouring bytes. Both are counted on 64-bit hashes, where a
collision can only weaken the bound. So the result is the same as comparing every pair.

Source: FuseLLM, arXiv 2401.10491, section 3.2; the public code takes the first of equally near
tokens in the order of a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from align.papers.dtw import (
    WORD_BITS,
    clear_pattern,
    edit_distance,
    pattern_distance,
    set_pattern,
)
from store_schema.compiled import compiled
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary

NO_TOKEN = -1
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_LONGEST_PREFIX = (1 << 16) - 1
_LAST_KEY = np.int64(np.iinfo(np.int64).max)
_EDGE = 256
"""Stands for the neighbour of a token's first and last byte in its pairs."""
_CHUNKS_PER_WORKER = 16


class PackedTokens(NamedTuple):
    """Distinct byte strings, shortest first, for compiled code.

    Args:
        ids: [n] int64 token id of each.
        data: [bytes] uint8, end to end.
        offsets: [n+1] int64, where each begins.
        signatures: [n, 2] uint64, hashed sets of its bytes and of its pairs of neighbouring bytes.
        by_length: [longest+2] int64, index of the first string of each length.
    """

    ids: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    signatures: npt.NDArray[np.uint64]
    by_length: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Mapping[bytes, int]) -> PackedTokens:
        """Sort by (length, id) and pack."""
        order = sorted(tokens.items(), key=lambda item: (len(item[0]), item[1]))
        data = np.frombuffer(b"".join(token for token, _ in order), np.uint8)
        lengths = np.fromiter((len(token) for token, _ in order), np.int64, len(order))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return cls(
            ids=np.fromiter((index for _, index in order), np.int64, len(order)),
            data=data,
            offsets=offsets,
            signatures=_signatures(data, offsets),
            by_length=np.searchsorted(lengths, np.arange(lengths.max(initial=0) + 2)),
        )


def nearest_tokens(
    source: Vocabulary,
    target: Vocabulary,
    *,
    written: npt.NDArray[np.bool_] | None = None,
    roles: Mapping[int, int] | None = None,
    workers: int = 1,
) -> npt.NDArray[np.int32]:
    """The nearest target token of every source token.

    Args:
        source: The source's vocabulary.
        target: The target's vocabulary.
        written: [V of the target] whether the tokenizer ever writes an id (`written_tokens`); of tokens
            with the same bytes the first such one is used. None takes the lowest id.
        roles: Special tokens of the source with the target's tokens of the same meaning, such as the
            two EOS. Other special tokens are mapped to the one of the same name, if there is one.
        workers: Threads; the result does not depend on them.

    Returns:
        [V of the source] int32 target token of each source token; -1 for none (special tokens).
    """
    nearest = np.full(len(source), NO_TOKEN, np.int32)
    named = _same_role(source, target) | dict(roles or {})
    for token, goal in named.items():
        nearest[token] = goal
    known = distinct_tokens(target, written)
    wanted: dict[bytes, list[int]] = {}
    for token, token_bytes in enumerate(source.tokens):
        if not token_bytes or token in named:
            continue
        if token_bytes in known:
            nearest[token] = known[token_bytes]
        else:
            wanted.setdefault(token_bytes, []).append(token)
    if not wanted or not known:
        return nearest
    keys = _search(list(wanted), known, workers)
    for tokens, key in zip(wanted.values(), keys.tolist(), strict=True):
        nearest[tokens] = key & 0xFFFFFFFF
    return nearest


def distinct_tokens(
    vocabulary: Vocabulary, written: npt.NDArray[np.bool_] | None = None
) -> dict[bytes, int]:
    """The distinct byte strings of a vocabulary, each with one id (see `nearest_tokens`)."""
    known: dict[bytes, int] = {}
    for index, token in enumerate(vocabulary.tokens):
        if token and (written is None or written[index]):
            known.setdefault(token, index)
    for index, token in enumerate(vocabulary.tokens):
        if token:
            known.setdefault(token, index)
    return known


def written_tokens(tokenizer: SegmentTokenizer) -> npt.NDArray[np.bool_]:
    """[V] whether the tokenizer ever writes an id, tested only for ids that share their bytes.

    Byte fallback gives many vocabularies two ids for one byte string. Such strings are tokenised at the
    beginning of a text, after a letter and after a line break; ids that occur there are written. Ids
    with bytes of their own count as written.
    """
    twins: dict[bytes, list[int]] = {}
    for index, token in enumerate(tokenizer.vocabulary.tokens):
        if token:
            twins.setdefault(token, []).append(index)
    written = np.ones(tokenizer.vocab_size, bool)
    texts = []
    for token, indices in twins.items():
        if len(indices) > 1:
            written[indices] = False
            try:
                text = token.decode()
            except UnicodeDecodeError:
                continue
            texts += [text, "a" + text, "\n" + text]
    for ids in tokenizer.encode_text(texts):
        written[[i for i in ids if i < len(written)]] = True
    return written


def _same_role(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Special tokens of the source with the target's special token of the same name."""
    there = {
        target.written[index]: index
        for index in np.flatnonzero(target.special)[::-1].tolist()
        if target.written[index]
    }
    special = np.flatnonzero(source.special).tolist()
    return {i: there[source.written[i]] for i in special if source.written[i] in there}


def _search(wanted: list[bytes], known: Mapping[bytes, int], workers: int) -> npt.NDArray[np.int64]:
    """[len(wanted)] `spelling_key` of the nearest token."""
    tokens = PackedTokens.of({token: row for row, token in enumerate(wanted)})
    goals = PackedTokens.of(known)
    at_most = _reachable(wanted, known)
    keys = np.full(len(wanted), _LAST_KEY)
    chunks = workers * _CHUNKS_PER_WORKER

    def run(first: int) -> None:
        _find(np.arange(first, len(wanted), chunks), tokens, goals, at_most, keys)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(chunks)))
    return keys


def _reachable(wanted: list[bytes], known: Mapping[bytes, int]) -> npt.NDArray[np.int64]:
    """[len(wanted)] upper bound of the least edit distance: the bytes beyond the longest prefix or
    suffix that is a target token."""
    shortest = min(map(len, known))
    at_most = np.empty(len(wanted), np.int64)
    for row, token in enumerate(wanted):
        at_most[row] = max(len(token), shortest)
        for length in range(len(token) - 1, 0, -1):
            if token[:length] in known or token[-length:] in known:
                at_most[row] = len(token) - length
                break
    return at_most


@compiled
def _signatures(data: Any, offsets: Any) -> Any:
    signatures = np.zeros((len(offsets) - 1, 2), np.uint64)
    for row in range(len(offsets) - 1):
        before: Any = _EDGE
        for k in range(offsets[row], offsets[row + 1]):
            byte = np.int64(data[k])
            signatures[row, 0] |= _ONE << np.uint64(byte & 63)
            signatures[row, 1] |= _ONE << np.uint64(_pair(before, byte))
            before = byte
        signatures[row, 1] |= _ONE << np.uint64(_pair(before, _EDGE))
    return signatures


@compiled
def _pair(first: int, second: int) -> int:
    """Hash of two neighbouring bytes, below 64."""
    return ((first * 7919 + second * 104729) >> 3) & 63


@compiled
def _bits(word: Any) -> Any:
    """How many bits are set (compilers turn this form into one instruction)."""
    word = word - ((word >> _ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _bound(bytes_a: Any, pairs_a: Any, bytes_b: Any, pairs_b: Any) -> int:
    """A lower bound of the edit distance."""
    lacking = max(_bits(bytes_a & ~bytes_b), _bits(bytes_b & ~bytes_a))
    broken = max(_bits(pairs_a & ~pairs_b), _bits(pairs_b & ~pairs_a))
    return max(lacking, (broken + 1) // 2)


@compiled
def spelling_key(
    distance: int, a: Any, a_start: int, a_stop: int, b: Any, b_start: int, b_stop: int, index: int
) -> int:
    """One number to order candidates by: distance, then common prefix (long first), then id."""
    prefix = 0
    longest = min(a_stop - a_start, b_stop - b_start, _LONGEST_PREFIX)
    while prefix < longest and a[a_start + prefix] == b[b_start + prefix]:
        prefix += 1
    return (distance << 48) | ((_LONGEST_PREFIX - prefix) << 32) | index


@compiled
def _find(places: Any, tokens: Any, goals: Any, at_most: Any, best_keys: Any) -> None:
    """Fill best_keys with the `spelling_key` of the token nearest to each of `tokens` at `places`.

    Args:
        places: Indices into `tokens`.
        tokens: `PackedTokens`, whose ids are their rows in the last two arguments.
        goals: `PackedTokens` of the target.
        at_most: Upper bounds of the least edit distance.
        best_keys: The result.
    """
    longest = len(goals.by_length) - 2
    table = np.zeros(256, np.uint64)
    data, offsets = tokens.data, tokens.offsets
    for place in places:
        start, stop = offsets[place], offsets[place + 1]
        length = stop - start
        short = length <= WORD_BITS
        if short:
            set_pattern(table, data, start, stop)
        bound = at_most[tokens.ids[place]]
        gap = 0
        while gap <= bound and (length - gap >= 1 or length + gap <= longest):
            for sign in (-1, 1):
                other = length + sign * gap
                if 1 <= other <= longest and (gap > 0 or sign < 0):
                    bound = _scan(other, place, tokens, goals, table, bound, best_keys)
            gap += 1
        if short:
            clear_pattern(table, data, start, stop)


@compiled
def _scan(
    length: int, place: int, tokens: Any, goals: Any, table: Any, bound: int, best_keys: Any
) -> int:
    """Try the target's tokens of one length; returns the new upper bound of the least distance."""
    rows, data, offsets, signatures, _ = tokens
    ids, goal_data, goal_offsets, goal_signatures, by_length = goals
    row, start, stop = rows[place], offsets[place], offsets[place + 1]
    bytes_a, pairs_a = signatures[place, 0], signatures[place, 1]
    best = best_keys[row]
    for k in range(by_length[length], by_length[length + 1]):
        if _bound(bytes_a, pairs_a, goal_signatures[k, 0], goal_signatures[k, 1]) > bound:
            continue
        begin, end = goal_offsets[k], goal_offsets[k + 1]
        if stop - start <= WORD_BITS:
            distance = pattern_distance(table, stop - start, goal_data, begin, end)
        else:
            distance = edit_distance(table, data, start, stop, goal_data, begin, end)
        if distance > bound:
            continue
        key = spelling_key(distance, data, start, stop, goal_data, begin, end, ids[k])
        best = min(best, key)
        bound = min(bound, best >> 48)
    best_keys[row] = best
    return bound
