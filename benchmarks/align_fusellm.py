"""FuseLLM's alignment as published, to compare with: a plain reading of paper and behaviour.

Our own pure Python: a table of every source token against every target token with an edit distance
in each cell, walked back from its corner; then one dictionary per target token. One gift: distances
of pairs already met are remembered, which the public code does not do. The differences from the
public code are those of our method `mined` as published: bytes in place of the tokenizer's alphabet,
and a row that is of its own token (the rows given decide that).

Source: arXiv 2401.10491, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TOP_K = 10
Row = Sequence[tuple[int, float]]
"""(token, logit) of one position, best first."""


def edit_distance(a: bytes, b: bytes) -> int:
    """Levenshtein distance, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(corner + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def warping_path(source: Sequence[bytes], target: Sequence[bytes]) -> list[list[int]]:
    """Source tokens that stand with each target token on the cheapest path; [] without tokens."""
    if not source or not target:
        return [[] for _ in target]
    known: dict[tuple[bytes, bytes], int] = {}
    infinite = math.inf
    table = [[infinite] * (len(target) + 1) for _ in range(len(source) + 1)]
    table[0][0] = 0
    for i, a in enumerate(source):
        above, row = table[i], table[i + 1]
        for j, b in enumerate(target):
            cost = known.get((a, b))
            if cost is None:
                cost = known[a, b] = edit_distance(a, b)
            row[j + 1] = cost + min(above[j + 1], row[j], above[j])
    beside: list[list[int]] = [[] for _ in target]
    i, j = len(source), len(target)
    while True:
        beside[j - 1].append(i - 1)
        if i == 1 and j == 1:
            break
        options = (table[i - 1][j - 1], table[i - 1][j], table[i][j - 1])
        step = options.index(min(options))
        i -= step != 2
        j -= step != 1
    return [rows[::-1] for rows in beside]


def pair_distances(
    source: Sequence[bytes], target: Sequence[bytes]
) -> dict[tuple[bytes, bytes], int]:
    """The distances that `warping_path` works out on its way, each once."""
    return {(a, b): edit_distance(a, b) for a in set(source) for b in set(target)}


def align_plain(
    source_ids: Sequence[int],
    source_texts: Sequence[bytes],
    target_ids: Sequence[int],
    target_texts: Sequence[bytes],
    rows: Sequence[Row],
    mapping: Mapping[int, int],
) -> list[dict[int, float]]:
    """Distributions of one segment's target tokens, as {token: probability}.

    Args:
        source_ids: Tokens of the source.
        source_texts: Their bytes in the text.
        target_ids: Tokens of the target.
        target_texts: Their bytes in the text.
        rows: One per source token; the ten best are used.
        mapping: Source token -> target token of least edit distance.
    """
    result = []
    for j, beside in enumerate(warping_path(source_texts, target_texts)):
        logits: dict[int, float] = {}
        if len(beside) == 1:
            i = beside[0]
            if source_texts[i] == target_texts[j] or mapping.get(source_ids[i]) == target_ids[j]:
                for token, logit in rows[i][:TOP_K]:
                    goal = mapping.get(token)
                    if goal is not None and goal not in logits:
                        logits[goal] = logit
        result.append(_softmax(logits or {target_ids[j]: 1.0}))
    return result


def map_plain(source: Mapping[int, bytes], target: Mapping[int, bytes]) -> dict[int, int]:
    """Source token -> target token of least edit distance, every pair compared, first found kept."""
    known: dict[bytes, int] = {}
    for index, token in target.items():
        known.setdefault(token, index)
    mapping = {}
    for index, token in source.items():
        if token in known:
            mapping[index] = known[token]
        else:
            mapping[index] = min(target, key=lambda i, token=token: edit_distance(token, target[i]))
    return mapping


def _softmax(logits: Mapping[int, float]) -> dict[int, float]:
    most = max(logits.values())
    weights = {token: math.exp(logit - most) for token, logit in logits.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}
