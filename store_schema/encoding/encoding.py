"""Convert between the arrays of `layout` and the arrays on disk.

Each group of arrays has its own encoding: differences instead of running totals, frequency ranks
instead of ids, codes instead of log-probabilities. The arrays on disk are plain integers and floats in
Zarr; `docs/store.md` says how to read them without this module. Axes are those of `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.encoding import codes
from store_schema.encoding.frequency import rank_by_id
from store_schema.encoding.group import (
    Coder,
    Group,
    StoredSpec,
    coded_logs,
    counted,
    plain,
    totals,
)
from store_schema.layout import BRANCH, Arrays, Form
from store_schema.presets import Encoding


def stored_specs(form: Form, encoding: Encoding) -> tuple[StoredSpec, ...]:
    """The arrays on disk of a shard of this form."""
    return tuple(spec for group in groups(form, encoding) for spec in group.stored)


def groups(form: Form, encoding: Encoding) -> tuple[Group, ...]:
    """The groups of arrays of a shard of this form."""
    exact = encoding.steps is None
    chosen = [
        plain("segment_ids", StoredSpec("segment_ids", "<i8", "D", delta=True)),
        counted("token_offsets", _TOKEN_COUNTS),
        _TOKENS,
    ]
    if form == "generated":
        return (
            *chosen,
            plain("answer_index", StoredSpec("answer_index", "<u4", "D")),
            plain("finish", StoredSpec("finish", "<u4", "D"), dtype="|u1"),
        )
    chosen += [
        _EXACT_ENTRIES if exact else _CODED_ENTRIES,
        plain("label_logprobs", StoredSpec("label_logprobs", "<f4", "N"))
        if exact
        else coded_logs("label_logprobs", StoredSpec("label_codes", "<u4", "N")),
    ]
    if form == "branched":
        chosen += [_BRANCHES, _EXACT_BRANCH_ENTRIES if exact else _CODED_BRANCH_ENTRIES]
    if form == "aligned":
        chosen += [
            plain("origin", StoredSpec("origin", "<u4", "N"), dtype="|u1"),
            counted("span_offsets", _SPAN_COUNTS),
            _SPANS,
            plain("span_logprobs", StoredSpec("span_logprobs", "<f4", "S"))
            if exact
            else coded_logs("span_logprobs", StoredSpec("span_codes", "<u4", "S")),
            plain("source_nats", StoredSpec("source_nats", "<f8", "D")),
            plain("source_bytes", StoredSpec("source_bytes", "<i8", "D")),
        ]
    return tuple(chosen)


def encode(form: Form, arrays: Arrays, coder: Coder) -> Arrays:
    """The arrays on disk for all arrays of the layout."""
    stored: Arrays = {}
    for group in groups(form, coder.encoding):
        stored |= group.encode(arrays, coder)
    return stored


def needed_specs(
    form: Form, encoding: Encoding, names: Iterable[str] | None = None
) -> tuple[StoredSpec, ...]:
    """The arrays on disk that are needed to decode some arrays of the layout; None means all."""
    return tuple(
        dict.fromkeys(
            spec
            for group in _wanted(groups(form, encoding), names)
            for spec in (*group.stored, *group.also)
        )
    )


def decode(form: Form, stored: Arrays, coder: Coder, names: Iterable[str] | None = None) -> Arrays:
    """Arrays of the layout from those on disk.

    Args:
        form: Which arrays the shard has.
        stored: At least the arrays of `needed_specs` for these names.
        coder: The store's coder.
        names: Which arrays; None decodes all.

    Raises:
        CorruptionError: Values that `encode` never writes.
    """
    wanted = None if names is None else set(names)
    decoded: Arrays = {}
    for group in _wanted(groups(form, coder.encoding), wanted):
        decoded |= group.decode(stored, coder)
    return {n: a for n, a in decoded.items() if wanted is None or n in wanted}


def _wanted(every: Iterable[Group], names: Iterable[str] | None) -> list[Group]:
    wanted = None if names is None else set(names)
    return [g for g in every if wanted is None or wanted.intersection(g.names)]


def _starts(counts: npt.NDArray[Any], length: int, coder: Coder) -> npt.NDArray[np.int64]:
    """First position (or span) of each segment that has any."""
    offsets = totals(counts)
    if offsets[-1] != length:
        raise coder.fault(
            "lengths of segments do not sum to the shard's", "token_counts, span_counts"
        )
    return offsets[:-1][counts > 0]


def _rises(values: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Differences within segments; the first of each segment as it is."""
    rises = np.diff(values.astype(np.int64), prepend=0)
    rises[starts] = values[starts]
    return rises.astype(np.uint32)


def _running(rises: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Undo `_rises`."""
    sums = np.cumsum(rises, dtype=np.int64)
    before = np.where(starts > 0, sums[starts - 1], 0)
    lengths = np.diff(np.append(starts, len(rises)))
    values: npt.NDArray[np.int64] = sums - np.repeat(before, lengths)
    return values.astype(np.uint32)


# ------------------------------------------------------------------------------- tokens and spans

_TOKEN_COUNTS = StoredSpec("token_counts", "<u4", "D")
_SPAN_COUNTS = StoredSpec("span_counts", "<u4", "D")


def _encode_tokens(arrays: Arrays, coder: Coder) -> Arrays:
    counts = np.diff(arrays["token_offsets"])
    starts = arrays["token_offsets"][:-1][counts > 0]
    return {
        "token_ranks": rank_by_id(coder.ranking)[arrays["token_ids"]],
        "token_bytes": _rises(arrays["byte_ends"], starts),
    }


def _decode_tokens(stored: Arrays, coder: Coder) -> Arrays:
    ranks = stored["token_ranks"]
    starts = _starts(stored["token_counts"], len(ranks), coder)
    return {
        "token_ids": _ids(ranks, coder, "token_ranks"),
        "byte_ends": _running(stored["token_bytes"], starts),
    }


def _ids(ranks: npt.NDArray[Any], coder: Coder, name: str) -> npt.NDArray[np.uint32]:
    if ranks.size and ranks.max() >= len(coder.ranking):
        raise coder.fault("rank out of range", name)
    ids: npt.NDArray[np.uint32] = coder.ranking[ranks]
    return ids


_TOKENS = Group(
    ("token_ids", "byte_ends"),
    (StoredSpec("token_ranks", "<u4", "N"), StoredSpec("token_bytes", "<u4", "N")),
    _encode_tokens,
    _decode_tokens,
    also=(_TOKEN_COUNTS,),
)


def _encode_spans(arrays: Arrays, _: Coder) -> Arrays:
    tokens, spans = arrays["token_offsets"], arrays["span_offsets"]
    return {
        "span_steps": _rises(arrays["span_index"], tokens[:-1][np.diff(tokens) > 0]),
        "span_bytes": _rises(arrays["span_byte_ends"], spans[:-1][np.diff(spans) > 0]),
    }


def _decode_spans(stored: Arrays, coder: Coder) -> Arrays:
    steps, sizes = stored["span_steps"], stored["span_bytes"]
    return {
        "span_index": _running(steps, _starts(stored["token_counts"], len(steps), coder)),
        "span_byte_ends": _running(sizes, _starts(stored["span_counts"], len(sizes), coder)),
    }


_SPANS = Group(
    ("span_index", "span_byte_ends"),
    (
        StoredSpec("span_steps", "<u4", "N"),
        StoredSpec("span_bytes", "<u4", "S"),
    ),
    _encode_spans,
    _decode_spans,
    also=(_TOKEN_COUNTS, _SPAN_COUNTS),
)

# ------------------------------------------------------------------------------- entries

_ENTRY_NAMES = ("entry_offsets", "entry_ids", "entry_logprobs", "tail_mass")


def _exact_entries(of: str, rows: str, entries: str) -> Group:
    """Entries and tails as they are.

    Args:
        of: Before all names: "" for entries of positions, `BRANCH` for those of branches.
        rows: Axis of the rows.
        entries: Axis of the entries.
    """

    def encode(arrays: Arrays, coder: Coder) -> Arrays:
        offsets = arrays[f"{of}entry_offsets"]
        return {
            f"{of}entry_counts": np.diff(offsets).astype(np.uint32),
            f"{of}entry_ids_coded": rank_by_id(coder.ranking)[arrays[f"{of}entry_ids"]],
            f"{of}entry_logprobs": codes.to_place_major(arrays[f"{of}entry_logprobs"], offsets),
            f"{of}tail_mass": arrays[f"{of}tail_mass"],
        }

    def decode(stored: Arrays, coder: Coder) -> Arrays:
        logprobs, ranks = stored[f"{of}entry_logprobs"], stored[f"{of}entry_ids_coded"]
        offsets = _entry_offsets(stored[f"{of}entry_counts"], len(logprobs), coder, of)
        return {
            f"{of}entry_offsets": offsets,
            f"{of}entry_ids": _ids(ranks, coder, f"{of}entry_ids_coded"),
            f"{of}entry_logprobs": codes.from_place_major(logprobs, offsets),
            f"{of}tail_mass": stored[f"{of}tail_mass"],
        }

    stored = (
        StoredSpec(f"{of}entry_counts", "<u4", rows),
        StoredSpec(f"{of}entry_ids_coded", "<u4", entries),
        StoredSpec(f"{of}entry_logprobs", "<f4", entries),
        StoredSpec(f"{of}tail_mass", "<f4", rows),
    )
    return Group(tuple(of + name for name in _ENTRY_NAMES), stored, encode, decode)


def _coded_entries(of: str, rows: str, entries: str) -> Group:
    """Entries and tails as codes (`codes`); arguments are those of `_exact_entries`."""

    def encode(arrays: Arrays, coder: Coder) -> Arrays:
        offsets = arrays[f"{of}entry_offsets"]
        entry_codes, tails = codes.encode_rows(
            arrays[f"{of}entry_logprobs"], offsets, arrays[f"{of}tail_mass"], coder.steps
        )
        ranks = rank_by_id(coder.ranking)[arrays[f"{of}entry_ids"]]
        ranks = codes.sort_ties(entry_codes, ranks, offsets)
        rises, ids = codes.pack_ids(entry_codes, ranks, offsets)
        return {
            f"{of}entry_counts": np.diff(offsets).astype(np.uint32),
            f"{of}entry_ids_coded": ids,
            f"{of}entry_rises": rises,
            f"{of}tail_codes": tails,
        }

    def decode(stored: Arrays, coder: Coder) -> Arrays:
        rises = stored[f"{of}entry_rises"]
        offsets = _entry_offsets(stored[f"{of}entry_counts"], len(rises), coder, of)
        ids, logprobs, tail, wrong = codes.decode_rows(
            rises,
            stored[f"{of}entry_ids_coded"],
            offsets,
            stored[f"{of}tail_codes"],
            coder.ranking,
            coder.steps,
        )
        if wrong >= 0:
            raise coder.fault(
                f"invalid entries at {'branch' if of else 'position'} {wrong}",
                f"{of}entry_rises, {of}entry_ids_coded or {of}tail_codes",
            )
        return {
            f"{of}entry_offsets": offsets,
            f"{of}entry_ids": ids,
            f"{of}entry_logprobs": logprobs,
            f"{of}tail_mass": tail,
        }

    stored = (
        StoredSpec(f"{of}entry_counts", "<u4", rows),
        StoredSpec(f"{of}entry_ids_coded", "<u4", entries),
        StoredSpec(f"{of}entry_rises", "<u4", entries),
        StoredSpec(f"{of}tail_codes", "<u4", rows),
    )
    return Group(tuple(of + name for name in _ENTRY_NAMES), stored, encode, decode)


def _entry_offsets(
    counts: npt.NDArray[Any], num_entries: int, coder: Coder, of: str
) -> npt.NDArray[np.int64]:
    offsets = totals(counts)
    if offsets[-1] != num_entries:
        raise coder.fault("counts do not sum to the shard's entries", f"{of}entry_counts")
    return offsets


_EXACT_ENTRIES = _exact_entries("", "N", "E")
_CODED_ENTRIES = _coded_entries("", "N", "E")

# ------------------------------------------------------------------------------- branches


def _encode_branches(arrays: Arrays, coder: Coder) -> Arrays:
    positions = arrays["branch_positions"].astype(np.int64)
    return {
        "branch_steps": np.diff(positions, prepend=0).astype(np.uint32),
        "branch_ranks": rank_by_id(coder.ranking)[arrays["branch_tokens"]],
    }


def _decode_branches(stored: Arrays, coder: Coder) -> Arrays:
    positions = np.cumsum(stored["branch_steps"], dtype=np.int64)
    if positions.size and positions[-1] > np.iinfo(np.uint32).max:
        raise coder.fault("position out of range", "branch_steps")
    return {
        "branch_positions": positions.astype(np.uint32),
        "branch_tokens": _ids(stored["branch_ranks"], coder, "branch_ranks"),
    }


_BRANCHES = Group(
    ("branch_positions", "branch_tokens"),
    (StoredSpec("branch_steps", "<u4", "B"), StoredSpec("branch_ranks", "<u4", "B")),
    _encode_branches,
    _decode_branches,
)
_EXACT_BRANCH_ENTRIES = _exact_entries(BRANCH, "B", "F")
_CODED_BRANCH_ENTRIES = _coded_entries(BRANCH, "B", "F")
