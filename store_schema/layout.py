"""The table of a shard's arrays: names, dtypes, axes, meaning. Shards are checked against it when read.

Row i of every array of positions is the distribution of token i, given the tokens before it. Labels are
shifted only once, in the trainer.

Axes: D segments, N positions, E entries, S spans, B branches, F entries of branches of one shard; an
array of "D+1" has CSR offsets.

A position without a known distribution (a first token without context; in an aligned store also
origin none) has no entries, tail mass 1 and label_logprobs NaN. NaN always means "not known".

A generated store has text and no distributions. Axis D is its answers: `segment_ids` has the segment
whose context is the prompt, and byte ends are those of the answer's own tokens, joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from store_schema.compiled import compiled
from store_schema.errors import CorruptionError

Kind = Literal["source", "generated", "aligned"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""source: distributions of the plan's text. generated: answers of a source. aligned: distributions
converted to a target's tokens."""

Form = Literal["source", "branched", "generated", "aligned"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Which arrays a shard has: those of the store's kind, or, of a source store with branches, these too.
A branch is the source's distribution after an entry that is not the real token."""

Arrays = dict[str, npt.NDArray[Any]]

BRANCH = "branch_"
"""Before the names of entry arrays: those of branches."""

TAIL_TOLERANCE = 1e-3
"""Largest |1 - sum(entries) - tail|, for float32 softmaxes over large vocabularies."""

POSITION_BYTES = 24
"""Bytes of a position without its entries: id, byte end, entry offset (8), tail mass, label."""
ENTRY_BYTES = 8
"""Bytes of an entry: id and log-probability."""


class Origin(IntEnum):
    """Where the distribution of an aligned position comes from."""

    NONE = 0
    BOUNDARY = 1
    """The target token starts where a source token starts."""
    INSIDE = 2
    """The target token starts inside a source token."""


class Finish(IntEnum):
    """How a generated answer ended."""

    STOP = 0
    """With an end-of-sequence or stop token."""
    STOP_TEXT = 1
    """With a stop string."""
    LENGTH = 2
    """Cut at the maximal number of tokens."""
    EMPTY = 3
    """With an end-of-sequence or stop token, before any byte of text."""
    PROMPT_TOO_LONG = 4
    """Not generated, because the prompt did not fit the context: no tokens."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a shard.

    Args:
        name: Key in the shard's Zarr group.
        dtype: Little-endian dtype of the decoded array.
        axis: Its length: a letter of the module's docstring, with "+1" for offsets.
        unit: Unit or kind of the values.
        meaning: Description in one line.
        forms: Forms of shards that have it.
    """

    name: str
    dtype: str
    axis: str
    unit: str
    meaning: str
    forms: tuple[Form, ...] = FORMS


_SCORED: tuple[Form, ...] = ("source", "branched", "aligned")
_BRANCHED: tuple[Form, ...] = ("branched",)
_GENERATED: tuple[Form, ...] = ("generated",)
_ALIGNED: tuple[Form, ...] = ("aligned",)

LAYOUT: tuple[ArraySpec, ...] = (
    ArraySpec("segment_ids", "<i8", "D", "index", "rows of the plan's segment table"),
    ArraySpec("answer_index", "<u4", "D", "index", "number of the prompt's answer", _GENERATED),
    ArraySpec("finish", "|u1", "D", "Finish", "how the answer ended", _GENERATED),
    ArraySpec("token_offsets", "<i8", "D+1", "positions", "positions of each segment"),
    ArraySpec("token_ids", "<u4", "N", "id", "tokens in the store's vocabulary"),
    ArraySpec("byte_ends", "<u4", "N", "bytes", "end of each token in the segment's UTF-8 bytes"),
    ArraySpec("entry_offsets", "<i8", "N+1", "entries", "entries of each position", _SCORED),
    ArraySpec("entry_ids", "<u4", "E", "id", "token ids, most probable first", _SCORED),
    ArraySpec("entry_logprobs", "<f4", "E", "nats", "log-probabilities, <= 0", _SCORED),
    ArraySpec("tail_mass", "<f4", "N", "probability", "1 - sum of the entries, in [0, 1]", _SCORED),
    ArraySpec("label_logprobs", "<f4", "N", "nats", "log-probability of the token itself", _SCORED),
    ArraySpec("branch_positions", "<u4", "B", "positions", "position of each branch", _BRANCHED),
    ArraySpec("branch_tokens", "<u4", "B", "id", "entry of that position it follows", _BRANCHED),
    ArraySpec("branch_entry_offsets", "<i8", "B+1", "entries", "entries of each branch", _BRANCHED),
    ArraySpec("branch_entry_ids", "<u4", "F", "id", "as entry_ids, after the entry", _BRANCHED),
    ArraySpec("branch_entry_logprobs", "<f4", "F", "nats", "as entry_logprobs", _BRANCHED),
    ArraySpec("branch_tail_mass", "<f4", "B", "probability", "as tail_mass", _BRANCHED),
    ArraySpec("origin", "|u1", "N", "Origin", "where the distribution comes from", _ALIGNED),
    ArraySpec("span_offsets", "<i8", "D+1", "spans", "spans of each segment", _ALIGNED),
    ArraySpec("span_index", "<u4", "N", "spans", "span within the segment of each token", _ALIGNED),
    ArraySpec("span_byte_ends", "<u4", "S", "bytes", "end of each span in the segment", _ALIGNED),
    ArraySpec("span_logprobs", "<f4", "S", "nats", "source's log-probability of a span", _ALIGNED),
    ArraySpec("source_nats", "<f8", "D", "nats", "the source's NLL of the segment", _ALIGNED),
    ArraySpec("source_bytes", "<i8", "D", "bytes", "bytes of the segment it covers", _ALIGNED),
)


def array_specs(form: Form) -> tuple[ArraySpec, ...]:
    """The arrays of a shard of this form, in layout order."""
    return tuple(spec for spec in LAYOUT if form in spec.forms)


def array_names(form: Form) -> tuple[str, ...]:
    """Names of `array_specs`."""
    return tuple(spec.name for spec in array_specs(form))


def axis_lengths(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Length of each axis, by letter, of those arrays that are there."""
    defining = {
        "D": "segment_ids",
        "N": "token_ids",
        "E": "entry_ids",
        "S": "span_logprobs",
        "B": "branch_tokens",
        "F": "branch_entry_ids",
    }
    return {axis: len(arrays[name]) for axis, name in defining.items() if name in arrays}


def check_shard(
    form: Form, arrays: Mapping[str, npt.NDArray[Any]], *, vocab_size: int, where: str
) -> None:
    """Check every invariant of the layout on the decoded arrays of one shard.

    Args:
        form: Which arrays the shard has.
        arrays: Decoded arrays by name.
        vocab_size: All ids must be below it.
        where: Store and shard, for the message.

    Raises:
        CorruptionError: An invariant does not hold; names the first and its array.
    """

    def require(holds: bool | np.bool_, what: str, name: str, expected: object = None) -> None:
        if not holds:
            raise CorruptionError(
                what, where=f"{where}, array {name}", expected=expected, hint="repair the shard"
            )

    names = array_names(form)
    require(set(arrays) == set(names), "arrays are not those of the layout", "*", sorted(names))
    lengths = axis_lengths(arrays)
    for spec in array_specs(form):
        array = arrays[spec.name]
        require(array.dtype.str == spec.dtype, f"dtype {array.dtype.str}", spec.name, spec.dtype)
        length = lengths[spec.axis[0]] + (1 if spec.axis.endswith("+1") else 0)
        require(array.shape == (length,), f"shape {array.shape}", spec.name, (length,))
    all_offsets = {"token_offsets": "N", "entry_offsets": "E", "span_offsets": "S"}
    all_offsets |= {"branch_entry_offsets": "F"}
    for name, axis in (pair for pair in all_offsets.items() if pair[0] in arrays):
        array = arrays[name]
        good = array[0] == 0 and array[-1] == lengths[axis] and bool((np.diff(array) >= 0).all())
        require(good, "offsets do not rise from 0 to the end", name, f"0..{lengths[axis]}")
    all_ids = ("token_ids", "entry_ids", "branch_tokens", "branch_entry_ids")
    for name in (name for name in all_ids if name in arrays):
        ids = arrays[name]
        require(not ids.size or ids.max() < vocab_size, "id out of range", name, f"< {vocab_size}")
    _check_bytes(arrays, require)
    if form == "generated":
        _check_answers(arrays, require)
        return
    _check_probabilities(arrays, require)
    if form == "branched":
        _check_branches(arrays, require)
    if form == "aligned":
        _check_spans(arrays, require)
        origin = arrays["origin"]
        require(not origin.size or origin.max() <= max(Origin), "unknown origin", "origin")
        empty = np.diff(arrays["entry_offsets"]) == 0
        require(
            bool((empty | (origin != Origin.NONE)).all()), "entries without an origin", "origin"
        )


def _check_probabilities(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    labels = arrays["label_logprobs"]
    require(bool(((labels <= 0) | np.isnan(labels)).all()), "above 0", "label_logprobs", "<= 0")
    _check_rows(arrays, require)


def _check_rows(arrays: Mapping[str, npt.NDArray[Any]], require: Any, of: str = "") -> None:
    """Check entries and tails of positions, or with `of` those of branches."""
    logprobs, tail = arrays[f"{of}entry_logprobs"], arrays[f"{of}tail_mass"]
    name, of_tail = f"{of}entry_logprobs", f"{of}tail_mass"
    require(bool((logprobs <= 0).all()), "log-probability above 0 or NaN", name, "<= 0")
    require(bool(((tail >= 0) & (tail <= 1)).all()), "outside [0, 1] or NaN", of_tail, "[0, 1]")
    # float32 is precise enough for the tolerance, and several times faster.
    mass, falling = row_masses(logprobs, np.exp(logprobs), arrays[f"{of}entry_offsets"])
    require(falling, "entries not sorted by falling probability", name)
    worst = float(np.abs(mass + tail - 1).max()) if len(tail) else 0.0
    require(
        worst <= TAIL_TOLERANCE,
        f"entries + tail differ from 1 by {worst:.2g}",
        of_tail,
        f"at most {TAIL_TOLERANCE}",
    )


def _check_branches(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    positions, tokens = arrays["branch_positions"], arrays["branch_tokens"]
    num_positions = len(arrays["token_ids"])
    known = not positions.size or positions.max() < num_positions
    require(known, "position that the shard does not have", "branch_positions", num_positions)
    places = positions.astype(np.int64) << 32 | tokens
    require(bool((np.diff(places) > 0).all()), "not sorted by position and token", "branch_tokens")
    real = arrays["token_ids"][positions] == tokens
    require(not real.any(), "branch after the text's own token", "branch_tokens")
    there = branch_entries(arrays) >= 0
    require(bool(there.all()), "branch after a token that is no entry", "branch_tokens")
    _check_rows(arrays, require, BRANCH)


def branch_entries(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """[B] index of the entry that each branch follows, -1 where there is none.

    Args:
        arrays: entry_offsets, entry_ids, branch_positions and branch_tokens of a shard.
    """
    found: npt.NDArray[np.int64] = _entries_of(
        arrays["entry_offsets"],
        arrays["entry_ids"],
        arrays["branch_positions"],
        arrays["branch_tokens"],
    )
    return found


@compiled
def _entries_of(offsets: Any, ids: Any, positions: Any, tokens: Any) -> Any:
    entries_B = np.full(len(positions), -1, np.int64)
    for b in range(len(positions)):
        position = np.int64(positions[b])
        for k in range(offsets[position], offsets[position + 1]):
            if ids[k] == tokens[b]:
                entries_B[b] = k
    return entries_B


def _check_answers(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    segments, answers = arrays["segment_ids"], arrays["answer_index"].astype(np.int64)
    rises = np.diff(segments)
    further = (rises > 0) | ((rises == 0) & (np.diff(answers) > 0))
    require(bool(further.all()), "answers not sorted by segment and number", "answer_index")
    finish, offsets = arrays["finish"], arrays["token_offsets"]
    require(not finish.size or finish.max() <= max(Finish), "unknown reason", "finish")
    has_tokens = np.diff(offsets) > 0
    has_bytes = has_tokens.copy()
    has_bytes[has_tokens] = arrays["byte_ends"][offsets[1:][has_tokens] - 1] > 0
    never_begun = finish == Finish.PROMPT_TOO_LONG
    require(not (has_tokens & never_begun).any(), "tokens after a prompt too long", "finish")
    with_text = (finish == Finish.STOP) | (finish == Finish.STOP_TEXT)
    require(bool(has_bytes[with_text].all()), "stopped without text, but not EMPTY", "finish")
    require(not has_bytes[finish == Finish.EMPTY].any(), "bytes of an empty answer", "finish")
    require(bool(has_tokens[finish == Finish.LENGTH].all()), "cut, but without tokens", "finish")


@compiled
def row_masses(logprobs: Any, probabilities: Any, offsets: Any) -> tuple[Any, bool]:
    """Sum of each CSR row's probabilities [N] float64, and whether the entries of all rows fall.

    Each row is summed by itself: differences of a running total would lose precision.
    """
    mass = np.zeros(len(offsets) - 1, np.float64)
    falling = True
    for row in range(len(mass)):
        total = 0.0
        first, stop = offsets[row], offsets[row + 1]
        for i in range(first, stop):
            total += probabilities[i]
        for i in range(first + 1, stop):
            falling &= logprobs[i] <= logprobs[i - 1]
        mass[row] = total
    return mass, falling


def _check_spans(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    logprobs = arrays["span_logprobs"]
    require(bool(((logprobs <= 0) | np.isnan(logprobs)).all()), "above 0", "span_logprobs", "<= 0")
    tokens, spans = arrays["token_offsets"], arrays["span_offsets"]
    index = arrays["span_index"].astype(np.int64)
    # The last span of a segment that a token may start in.
    last = np.repeat(np.diff(spans), np.diff(tokens))
    require(bool((index < last).all()), "span that the segment does not have", "span_index")
    require(_rises_within(index, tokens), "span index falls inside a segment", "span_index")
    ends = arrays["span_byte_ends"].astype(np.int64)
    require(_rises_within(ends, spans), "span ends fall inside a segment", "span_byte_ends")
    nats, covered = arrays["source_nats"], arrays["source_bytes"]
    require(bool((nats >= 0).all()), "below 0 or NaN", "source_nats", ">= 0")
    require(bool((covered >= 0).all()), "below 0", "source_bytes", ">= 0")


def _rises_within(values: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> bool:
    """Whether values never fall within any row of the CSR `offsets`."""
    inside = np.ones(len(values), bool)
    starts = offsets[:-1]
    inside[starts[starts < len(values)]] = False
    return not len(values) or bool((np.diff(values) >= 0)[inside[1:]].all())


def _check_bytes(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    ends = arrays["byte_ends"].astype(np.int64)
    rising = _rises_within(ends, arrays["token_offsets"])
    require(rising, "byte ends fall inside a segment", "byte_ends")


def row_sums(
    values: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Sums of the CSR rows of `values` [E] by `offsets` [N+1]; empty rows give 0.

    Each row is summed by itself (bincount): differences of a running total would lose precision.
    """
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.bincount(rows, weights=values, minlength=len(offsets) - 1).astype(np.float64)
