"""The loop that moves a shard's probability mass, compiled. One pass, linear in tokens and entries.

For the target token that covers bytes [b, e) of a segment, let r be the source token that covers byte
b and cut = b - start(r). With cut = 0 the row's entries are the next-token distribution as it stands.
With cut > 0 ("healing") only entries that agree with the `cut` bytes already read count, those
bytes are cut off, and the entries' share of the mass is handed to them in proportion: the tail is
taken to agree as often as the entries do, so it keeps its share. An entry that agrees but ends within
those bytes takes its part of the share to the tail: leaving it out would tell the target that the
source's token goes on, which only the text to come decides.

An entry goes to the target token that its bytes begin with (PieceTable), or is spread over the
tokens with which the target went on (continuation), what is left over being tail. The token that
really stands there is known better. Its mass p(r) goes to the label when it covers the label's
bytes; when it ends inside the label, only the share c that the source itself gives to the rest:

    c = sum of entries of row r+1 that begin with the remaining bytes, the real one apart
        + p(r+1) * (1 if r+1 covers the rest, else the same again at row r+2)

which is the chain product where source tokens tile the label. p(r) * (1 - c) is tail, never a
shorter token. Entries + tail = 1 at every position by construction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SPACE = 32
NONE, BOUNDARY, INSIDE = 0, 1, 2


@njit(cache=True, nogil=True, inline="always")
def _agrees(data: Any, base: int, length: int, text: Any, start: int, stop: int) -> bool:
    """Whether the token at data[base : base+length] begins with text[start:stop]."""
    if length < stop - start:
        return False
    for offset in range(stop - start):
        if data[base + offset] != text[start + offset]:
            return False
    return True


@njit(cache=True, nogil=True)
def _chain(
    row: int, last_row: int, end: int, text: Any, text_start: int, source: Any, pieces: Any
) -> float:
    """The share c of p(row) that goes on to cover the bytes up to `end` of the segment."""
    ends, ids, entry_offsets, entry_ids, probabilities, labels = source
    data, offsets = pieces
    if ends[row] >= end:
        return 1.0
    total = 0.0
    factor = 1.0
    start = ends[row]
    for r in range(row + 1, last_row):
        real = ids[r]
        for k in range(entry_offsets[r], entry_offsets[r + 1]):
            token = entry_ids[k]
            if token == real:
                continue
            base = offsets[token]
            length = offsets[token + 1] - base
            if _agrees(data, base, length, text, text_start + start, text_start + end):
                total += factor * probabilities[k]
        factor *= labels[r]
        if ends[r] >= end:
            return min(total + factor, 1.0)
        start = ends[r]
    return total


@njit(cache=True, nogil=True)
def _spread(
    token: int, mass: float, continuation: Any, scratch: Any, touched: Any, num_touched: int
) -> int:
    """Add `mass` of a source token to the target tokens it goes on with."""
    offsets, targets, weights = continuation
    for k in range(offsets[token], offsets[token + 1]):
        num_touched = _add(targets[k], mass * weights[k], scratch, touched, num_touched)
    return num_touched


@njit(cache=True, nogil=True, inline="always")
def _add(token: int, mass: float, scratch: Any, touched: Any, num_touched: int) -> int:
    if mass > 0.0:
        if scratch[token] == 0.0:
            touched[num_touched] = token
            num_touched += 1
        scratch[token] += mass
    return num_touched


@njit(cache=True, nogil=True)
def _gather(
    row: int,
    cut: int,
    lead: int,
    at_start: bool,
    opened_with: int,
    label: int,
    share: float,
    read_from: int,
    text: Any,
    source: Any,
    pieces: Any,
    first: Any,
    continuation: Any,
    scratch: Any,
    touched: Any,
    places: Any,
) -> int:
    """Collect one position's mass in `scratch`; `touched` lists the target tokens that have some.

    Args:
        row: Source row that covers the target token's first byte.
        cut: Bytes of that source token already read.
        lead: 1 where the source token carries a word mark that is not in the text.
        at_start: Whether the target token is the first of its segment.
        opened_with: The target's first token if it took no bytes and this one follows, else -1.
        label: The target token that really stands there.
        share: c of the real source token.
        read_from: Where in `text` the source token starts.
        places: Room for one number per entry of the row: where its piece begins, -1 to skip it.
    """
    _ends, ids, entry_offsets, entry_ids, probabilities, labels = source
    data, offsets = pieces
    middle, start = first
    real = ids[row]
    begin = entry_offsets[row]
    num_entries = entry_offsets[row + 1] - begin
    restricted = cut > 0 or opened_with >= 0
    real_mass = labels[row]
    seen = 0.0
    agreeing = 0.0
    found = False
    for k in range(num_entries):
        token = entry_ids[begin + k]
        mass = probabilities[begin + k]
        seen += mass
        places[k] = -1
        if token == real:
            found = True
            real_mass = mass
            continue
        base = offsets[token]
        length = offsets[token + 1] - base
        if lead == 1 and length > 0 and data[base] == SPACE:
            base += 1
            length -= 1
        read = min(length, cut)
        if length == 0 or not _agrees(data, base, length, text, read_from, read_from + read):
            continue
        if length <= cut:
            agreeing += mass  # it ended before this byte: what it went on with is not known
            continue
        if opened_with < 0 or start[base] == opened_with:
            places[k] = base
            agreeing += mass
    agreeing += real_mass
    if not found:
        seen += real_mass
    scale = 1.0
    if restricted:
        if agreeing <= 0.0:
            return 0
        scale = min(seen, 1.0) / agreeing
    count = _add(label, real_mass * scale * share, scratch, touched, 0)
    for k in range(num_entries):
        base = places[k]
        if base < 0:
            continue
        mass = probabilities[begin + k] * scale
        if not at_start and not restricted:
            token = entry_ids[begin + k]
            count = _spread(token, mass, continuation, scratch, touched, count)
            continue
        goal = start[base] if at_start else middle[base + cut]
        if goal >= 0:
            count = _add(goal, mass, scratch, touched, count)
    return count


@njit(cache=True, nogil=True)
def _emit(
    count: int, label: int, limit: int, scratch: Any, touched: Any, out_ids: Any, out_mass: Any
) -> int:
    """Write the heaviest `limit` tokens (the label always among them), heaviest first."""
    tokens = np.sort(touched[:count])
    masses = np.empty(count, np.float64)
    for k in range(count):
        masses[k] = scratch[tokens[k]]
        scratch[tokens[k]] = 0.0
    order = np.argsort(-masses, kind="mergesort")
    kept = 0
    has_label = False
    for k in order:
        if kept == limit:
            break
        out_ids[kept] = tokens[k]
        out_mass[kept] = masses[k]
        has_label = has_label or tokens[k] == label
        kept += 1
    if not has_label:
        for k in order[kept:]:
            if tokens[k] == label:
                out_ids[kept - 1] = label
                out_mass[kept - 1] = masses[k]
    return kept


@njit(cache=True, nogil=True)
def project_segments(
    segment_rows: Any,
    target_ids: Any,
    target_ends: Any,
    text: Any,
    text_offsets: Any,
    lead_marks: Any,
    source: Any,
    pieces: Any,
    first: Any,
    continuation: Any,
    target_vocab_size: int,
    max_entries: int,
) -> Any:
    """Project all segments of a shard.

    Args:
        segment_rows: (source token offsets [D+1], target token offsets [D+1]), int64.
        target_ids: [N] target tokens.
        target_ends: [N] int64 byte ends within the segment.
        text: [bytes] uint8, all texts end to end.
        text_offsets: [D+1] int64.
        lead_marks: [D] uint8, 1 where the source's first token carries a virtual space.
        source: (ends int64, ids, entry_offsets, entry_ids, probabilities float64, label
            probabilities float64 with NaN where unknown), all of the shard.
        pieces: (data, offsets) of the PieceTable.
        first: (middle, start) of the PieceTable.
        continuation: CSR (offsets [V+1], target ids, weights) of whole source tokens.
        target_vocab_size: Ids of the target are below it.
        max_entries: Kept at each position, at most.

    Returns:
        entry offsets [N+1], entry ids, entry masses (float64), origin [N], label probability [N]
        (NaN unknown).
    """
    source_offsets, target_offsets = segment_rows
    ends, ids, entry_offsets, entry_ids, _probabilities, _labels = source
    num_positions = len(target_ids)
    out_offsets = np.zeros(num_positions + 1, np.int64)
    out_ids = np.empty(max(len(entry_ids), 1) + max_entries, np.uint32)
    out_mass = np.empty(len(out_ids), np.float64)
    origin = np.zeros(num_positions, np.uint8)
    label_mass = np.full(num_positions, np.nan)
    scratch = np.zeros(target_vocab_size)
    touched = np.empty(target_vocab_size, np.int64)
    places = np.empty(max(np.diff(entry_offsets).max(), 1) if len(ids) else 1, np.int64)
    written = 0
    for d in range(len(source_offsets) - 1):
        row = source_offsets[d]
        last_row = source_offsets[d + 1]
        begin = 0
        for j in range(target_offsets[d], target_offsets[d + 1]):
            end = target_ends[j]
            while row < last_row and ends[row] <= begin:
                row += 1
            if row < last_row and entry_offsets[row + 1] > entry_offsets[row]:
                row_start = ends[row - 1] if row > source_offsets[d] else 0
                cut = begin - row_start
                lead = lead_marks[d] if row == source_offsets[d] else 0
                is_first = j == target_offsets[d]
                opened = -1 if is_first or begin > 0 else target_ids[target_offsets[d]]
                share = _chain(row, last_row, end, text, text_offsets[d], source, pieces)
                count = _gather(
                    row, cut, lead, is_first, opened, target_ids[j], share,
                    text_offsets[d] + row_start, text, source, pieces, first, continuation,
                    scratch, touched, places,
                )  # fmt: skip
                if count > 0:
                    if written + max_entries > len(out_ids):
                        out_ids = _grown(out_ids, written)
                        out_mass = _grown(out_mass, written)
                    label_mass[j] = scratch[target_ids[j]]
                    kept = _emit(
                        count, target_ids[j], max_entries, scratch, touched,
                        out_ids[written:], out_mass[written:],
                    )  # fmt: skip
                    written += kept
                    origin[j] = INSIDE if cut > 0 else BOUNDARY
            out_offsets[j + 1] = written
            begin = end
    return out_offsets, out_ids[:written], out_mass[:written], origin, label_mass


@njit(cache=True, nogil=True)
def _grown(array: Any, used: int) -> Any:
    """A copy with twice the room."""
    larger = np.empty(2 * len(array), array.dtype)
    larger[:used] = array[:used]
    return larger


@njit(cache=True, nogil=True)
def common_spans(segment_rows: Any, source_ends: Any, target_ends: Any, label_logprobs: Any) -> Any:
    """Spans between bytes where both a source and a target token end.

    Args:
        segment_rows: As in `project_segments`.
        source_ends: [source positions] int64.
        target_ends: [N] int64.
        label_logprobs: [source positions] float64, NaN unknown.

    Returns:
        span offsets [D+1], span index of each target token [N], byte ends [S], log-probabilities
        of spans [S] (NaN where a token's is unknown).
    """
    source_offsets, target_offsets = segment_rows
    num_segments = len(source_offsets) - 1
    span_offsets = np.zeros(num_segments + 1, np.int64)
    span_index = np.zeros(len(target_ends), np.uint32)
    span_ends = np.empty(len(target_ends), np.uint32)
    span_logprobs = np.empty(len(target_ends), np.float64)
    total = 0
    for d in range(num_segments):
        row = source_offsets[d]
        logprob = 0.0
        first_span = total
        for j in range(target_offsets[d], target_offsets[d + 1]):
            span_index[j] = total - first_span
            while row < source_offsets[d + 1] and source_ends[row] <= target_ends[j]:
                logprob += label_logprobs[row]
                row += 1
            is_common = row > source_offsets[d] and source_ends[row - 1] == target_ends[j]
            if is_common and target_ends[j] > 0:
                last = j + 1 == target_offsets[d + 1]
                if last or target_ends[j + 1] > target_ends[j]:
                    span_ends[total] = target_ends[j]
                    span_logprobs[total] = logprob
                    total += 1
                    logprob = 0.0
        span_offsets[d + 1] = total
    return span_offsets, span_index, span_ends[:total], span_logprobs[:total]
