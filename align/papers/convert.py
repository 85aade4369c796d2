"""Map the rows of matched source tokens to target tokens, compiled.

Methods `mined` and `stats` share this; they differ in the vocabulary map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled
from store_schema.layout import Arrays

_SHORT_ROW = 96
"""Rows of at most so many tokens are sorted by insertion: they are nearly sorted already."""


class ConvertOptions(NamedTuple):
    """How a matched row is mapped; the defaults keep all of its probability.

    Args:
        max_entries: Entries kept at each position, at most; the rest is tail.
        one_hot: Put all mass on the label of positions without a match, as the public code does.
        renormalise: Scale the entries to a sum of 1, without tail, as the public code does.
        sum_merged: Sum source entries that map to one target token; else keep the first.
        exact_label: Give the label the real token's stored probability.
    """

    max_entries: int = 64
    one_hot: bool = False
    renormalise: bool = False
    sum_merged: bool = True
    exact_label: bool = True


LOSSLESS = ConvertOptions()


def convert_all(
    rows: npt.NDArray[np.int64],
    target_ids: npt.NDArray[np.uint32],
    source: Arrays,
    token_map: npt.NDArray[np.int32],
    target_vocab_size: int,
    options: ConvertOptions,
) -> Any:
    """Entries of all target positions.

    Args:
        rows: [N] source row that each target token is matched to, -1 for none.
        target_ids: [N] target tokens.
        source: The source store's arrays of the shard.
        token_map: [V] int32 target token of each source token, -1 for none.
        target_vocab_size: All target ids are below it.
        options: How rows are mapped.

    Returns:
        Offsets [N+1], ids [E], masses [E] float64 and the label's mass at each position [N].
    """
    with np.errstate(invalid="ignore"):
        probabilities = np.exp(source["entry_logprobs"].astype(np.float64))
        labels = np.exp(source["label_logprobs"].astype(np.float64))
    entry_offsets = source["entry_offsets"]
    matched = rows[rows >= 0]
    most = (entry_offsets[matched + 1] - entry_offsets[matched]) + 1
    room = int(np.minimum(most, options.max_entries).sum()) + len(rows) - len(matched)
    return _convert(
        rows,
        target_ids,
        (source["token_ids"], entry_offsets, source["entry_ids"], probabilities, labels),
        token_map,
        target_vocab_size,
        int(most.max(initial=1)),
        room,
        options,
    )


@compiled
def _convert(
    rows: Any,
    target_ids: Any,
    source: Any,
    token_map: Any,
    target_vocab_size: int,
    widest: int,
    room: int,
    options: Any,
) -> tuple[Any, Any, Any, Any]:
    """Entries of all positions: offsets [N+1], ids, masses (float64), label masses [N]."""
    out_offsets = np.zeros(len(rows) + 1, np.int64)
    out_ids = np.empty(room, np.uint32)
    out_mass = np.empty(room, np.float64)
    label_mass = np.zeros(len(rows), np.float64)
    scratch = np.zeros(target_vocab_size)
    touched = np.empty(widest, np.int64)
    written = 0
    for j in range(len(rows)):
        label = np.int64(target_ids[j])
        kept = 0
        if rows[j] >= 0:
            count = _gather(rows[j], label, source, token_map, options, scratch, touched)
            kept = _emit(
                count, label, options, scratch, touched, out_ids[written:], out_mass[written:],
            )  # fmt: skip
            for k in range(written, written + kept):
                if out_ids[k] == label:
                    label_mass[j] = out_mass[k]
            written += kept
        if kept == 0 and options.one_hot:
            out_ids[written] = label
            out_mass[written] = 1.0
            label_mass[j] = 1.0
            written += 1
        out_offsets[j + 1] = written
    return out_offsets, out_ids[:written].copy(), out_mass[:written].copy(), label_mass


@compiled
def _gather(
    row: int, label: int, source: Any, token_map: Any, options: Any, scratch: Any, touched: Any
) -> int:
    """Sum one row's mass by target token; returns how many tokens have mass (`touched`)."""
    ids, entry_offsets, entry_ids, probabilities, labels = source
    real = np.int64(ids[row])
    known = options.exact_label and not np.isnan(labels[row])
    count = 0
    scale = 1.0
    if known:
        non_label = 0.0
        for k in range(entry_offsets[row], entry_offsets[row + 1]):
            if np.int64(entry_ids[k]) != real:
                non_label += probabilities[k]
        if non_label > 1.0 - labels[row]:
            scale = (1.0 - labels[row]) / non_label
        if labels[row] > 0.0:
            scratch[label] = labels[row]
            touched[0] = label
            count = 1
    for k in range(entry_offsets[row], entry_offsets[row + 1]):
        token = np.int64(entry_ids[k])
        if known and token == real:
            continue
        goal = np.int64(token_map[token])
        mass = probabilities[k] * scale
        if goal < 0 or mass <= 0.0:
            continue
        if scratch[goal] == 0.0:
            touched[count] = goal
            count += 1
            scratch[goal] = mass
        elif options.sum_merged:
            scratch[goal] += mass
    return count


@compiled
def _emit(
    count: int, label: int, options: Any, scratch: Any, touched: Any, out_ids: Any, out_mass: Any
) -> int:
    """Write the tokens of most mass, ties by id, the label always among them; returns how many."""
    if count == 0:
        return 0
    _sort(touched[:count], scratch)
    kept = min(count, options.max_entries)
    if scratch[label] > 0.0:
        has_label = False
        for k in range(kept):
            has_label = has_label or touched[k] == label
        if not has_label:  # it takes the last place
            scratch[touched[kept - 1]] = 0.0
            touched[kept - 1] = label
    total = 0.0
    for k in range(kept):
        total += scratch[touched[k]]
    divisor = total if options.renormalise or total > 1.0 else 1.0
    for k in range(kept):
        out_ids[k] = touched[k]
        out_mass[k] = scratch[touched[k]] / divisor
    for k in range(count):
        scratch[touched[k]] = 0.0
    scratch[label] = 0.0
    return kept


@compiled
def _sort(tokens: Any, masses: Any) -> None:
    """Sort token ids in place by falling mass, then by id."""
    if len(tokens) > _SHORT_ROW:
        ids = np.sort(tokens)
        tokens[:] = ids[np.argsort(-masses[ids], kind="mergesort")]
        return
    for k in range(1, len(tokens)):
        token = tokens[k]
        mass = masses[token]
        place = k
        while place > 0:
            before = tokens[place - 1]
            if masses[before] > mass or (masses[before] == mass and before < token):
                break
            tokens[place] = before
            place -= 1
        tokens[place] = token
