"""The papers' alignment methods read slowly and plainly: lists, dictionaries, every pair compared.

Written from what `align.papers.mined` and `align.papers.stats` say, not from their code.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from store_schema.layout import Arrays, Origin
from store_schema.text.tokenizer import EncodedSegment
from store_schema.text.vocabulary import Vocabulary


@cache
def edit_distance(a: bytes, b: bytes) -> int:
    """By the definition: least of dropping, adding, changing the last byte."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
                continue
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return table[-1][-1]


def full_path(source: Sequence[bytes], target: Sequence[bytes]) -> list[tuple[int, int]]:
    """The warping path through the whole table, from the end to the beginning."""
    if not source or not target:
        return []
    costs: dict[tuple[int, int], float] = defaultdict(lambda: math.inf)
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            before = min(costs[i - 1, j - 1], costs[i - 1, j], costs[i, j - 1])
            costs[i, j] = edit_distance(a, b) + (0 if i == j == 0 else before)
    place = (len(source) - 1, len(target) - 1)
    path = [place]
    while place != (0, 0):
        i, j = place
        place = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda p: costs[p])
        path.append(place)
    return path


def pieces(text: bytes, ends: Sequence[int]) -> list[bytes]:
    """The bytes of the text that each token stands for."""
    begins = [0, *ends][: len(ends)]
    return [text[begin:end] for begin, end in zip(begins, ends, strict=True)]


def in_band(
    path: Sequence[tuple[int, int]], source: list[int], target: list[int], width: int
) -> bool:
    """Whether the tokens of each cell lie within `width` bytes of each other (ends given)."""

    def span(ends: list[int], k: int) -> tuple[int, int]:
        return (ends[k - 1] if k else 0), ends[k]

    for i, j in path:
        (a, b), (c, d) = span(source, i), span(target, j)
        if max(a - d, c - b) > width:
            return False
    return True


def spelling_order(token: bytes, other: bytes, index: int) -> tuple[int, int, int]:
    """Distance, then the longest common prefix, then the lowest id."""
    prefix = 0
    while prefix < min(len(token), len(other)) and token[prefix] == other[prefix]:
        prefix += 1
    return edit_distance(token, other), -prefix, index


def nearest(source: Vocabulary, target: Vocabulary) -> list[int]:
    """The nearest target token of each source token, twins left out; -1 for none."""
    distinct: dict[bytes, int] = {}
    for index, token in enumerate(target.tokens):
        if token:
            distinct.setdefault(token, index)
    roles = {
        written: index
        for index, written in reversed(list(enumerate(target.written)))
        if target.special[index] and written
    }
    found = []
    for index, token in enumerate(source.tokens):
        if source.special[index]:
            written = source.written[index]
            found.append(roles.get(written, -1))
        elif token in distinct:
            found.append(distinct[token])
        elif not token or not distinct:
            found.append(-1)
        else:
            found.append(min(spelling_order(token, other, i) for other, i in distinct.items())[-1])
    return found


@dataclass
class Expected:
    """One aligned position: masses by token, origin."""

    masses: dict[int, float]
    origin: int


def converted(
    arrays: Arrays,
    d: int,
    text: bytes,
    target: EncodedSegment,
    goals: Mapping[int, int],
    *,
    exact_label: bool = True,
) -> list[Expected]:
    """One segment by a map of tokens.

    Args:
        arrays: The source's.
        d: Segment.
        text: Of the segment.
        target: Its target tokens.
        goals: Source token -> target token.
        exact_label: Whether the real token has its stored probability.
    """
    rows = range(*arrays["token_offsets"][d : d + 2].tolist())
    source_ends = arrays["byte_ends"][list(rows)].tolist()
    target_ends = target.byte_ends.tolist()
    source_texts, target_texts = pieces(text, source_ends), pieces(text, target_ends)
    beside: dict[int, list[int]] = defaultdict(list)
    for i, j in full_path(source_texts, target_texts):
        beside[j].append(i)
    result = []
    for j, label in enumerate(target.token_ids.tolist()):
        expected = Expected({}, Origin.NONE)
        result.append(expected)
        if len(beside[j]) != 1:
            continue
        i = beside[j][0]
        token = int(arrays["token_ids"][rows[i]])
        if source_texts[i] != target_texts[j] and goals.get(token) != label:
            continue
        expected.masses = _row(arrays, rows[i], token, label, goals, exact_label)
        if expected.masses:
            begins = ([0, *source_ends][i], [0, *target_ends][j])
            same = begins[0] == begins[1]
            expected.origin = Origin.BOUNDARY if same else Origin.INSIDE
    return result


def _row(
    arrays: Arrays, row: int, real: int, label: int,
    goals: Mapping[int, int], exact_label: bool,
) -> dict[int, float]:  # fmt: skip
    entries = slice(*arrays["entry_offsets"][row : row + 2])
    mass = np.exp(arrays["entry_logprobs"][entries].astype(float)).tolist()
    by_token = dict(zip(arrays["entry_ids"][entries].tolist(), mass, strict=True))
    known = float(np.exp(float(arrays["label_logprobs"][row])))
    masses: dict[int, float] = defaultdict(float)
    if exact_label and not math.isnan(known):
        by_token.pop(real, None)
        others = sum(by_token.values())
        if others > 1 - known:
            by_token = {t: p * (1 - known) / others for t, p in by_token.items()}
        masses[label] += known
    for token, p in by_token.items():
        if token in goals:
            masses[goals[token]] += p
    total = max(sum(masses.values()), 1.0)
    return {token: p / total for token, p in masses.items() if p > 0}


def met_most(
    texts: Sequence[bytes],
    source: Sequence[EncodedSegment],
    target: Sequence[EncodedSegment],
    tables: tuple[Vocabulary, Vocabulary],
) -> tuple[Counter[tuple[int, int]], dict[int, int]]:
    """Counts of pairs on the paths, and the target token that each source token met most."""
    counts: Counter[tuple[int, int]] = Counter()
    for text, a, b in zip(texts, source, target, strict=True):
        left, right = pieces(text, a.byte_ends.tolist()), pieces(text, b.byte_ends.tolist())
        for i, j in full_path(left, right):
            counts[int(a.token_ids[i]), int(b.token_ids[j])] += 1
    best: dict[int, tuple[tuple[int, int, int, int], int]] = {}
    for (s, t), count in counts.items():
        if not tables[0].tokens[s] or not tables[1].tokens[t]:
            continue
        key = (-count, *spelling_order(tables[0].tokens[s], tables[1].tokens[t], t))
        if s not in best or key < best[s][0]:
            best[s] = (key, t)
    return counts, {s: t for s, (_, t) in best.items()}
