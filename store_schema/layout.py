"""The table of a shard's arrays: names, dtypes, axes, meaning. Shards are checked against it when read.

Row i of every array of positions is the distribution of token i, given the tokens before it. Labels are
shifted only once, in the trainer.

Axes: D segments, N positions, E entries, S spans of one shard; an array of "D+1" has CSR offsets.

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

Arrays = dict[str, npt.NDArray[Any]]

TAIL_TOLERANCE = 1e-3
"""Largest |1 - sum(entries) - tail|, for float32 softmaxes over large vocabularies."""


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
        kinds: Kinds of stores that have it.
    """

    name: str
    dtype: str
    axis: str
    unit: str
    meaning: str
    kinds: tuple[Kind, ...] = KINDS


_SCORED: tuple[Kind, ...] = ("source", "aligned")
_GENERATED: tuple[Kind, ...] = ("generated",)
_ALIGNED: tuple[Kind, ...] = ("aligned",)

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
    ArraySpec("origin", "|u1", "N", "Origin", "where the distribution comes from", _ALIGNED),
    ArraySpec("span_offsets", "<i8", "D+1", "spans", "spans of each segment", _ALIGNED),
    ArraySpec("span_index", "<u4", "N", "spans", "span within the segment of each token", _ALIGNED),
    ArraySpec("span_byte_ends", "<u4", "S", "bytes", "end of each span in the segment", _ALIGNED),
    ArraySpec("span_logprobs", "<f4", "S", "nats", "source's log-probability of a span", _ALIGNED),
    ArraySpec("source_nats", "<f8", "D", "nats", "the source's NLL of the segment", _ALIGNED),
    ArraySpec("source_bytes", "<i8", "D", "bytes", "bytes of the segment it covers", _ALIGNED),
)


def array_specs(kind: Kind) -> tuple[ArraySpec, ...]:
    """The arrays of a store of `kind`, in layout order."""
    return tuple(spec for spec in LAYOUT if kind in spec.kinds)


def array_names(kind: Kind) -> tuple[str, ...]:
    """Names of `array_specs`."""
    return tuple(spec.name for spec in array_specs(kind))


def axis_lengths(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """Length of each axis, by letter, of those arrays that are there."""
    defining = {"D": "segment_ids", "N": "token_ids", "E": "entry_ids", "S": "span_logprobs"}
    return {axis: len(arrays[name]) for axis, name in defining.items() if name in arrays}


def check_shard(
    kind: Kind, arrays: Mapping[str, npt.NDArray[Any]], *, vocab_size: int, where: str
) -> None:
    """Check every invariant of the layout on the decoded arrays of one shard.

    Args:
        kind: Kind of the store.
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

    names = array_names(kind)
    require(set(arrays) == set(names), "arrays are not those of the layout", "*", sorted(names))
    lengths = axis_lengths(arrays)
    for spec in array_specs(kind):
        array = arrays[spec.name]
        require(array.dtype.str == spec.dtype, f"dtype {array.dtype.str}", spec.name, spec.dtype)
        length = lengths[spec.axis[0]] + (1 if spec.axis.endswith("+1") else 0)
        require(array.shape == (length,), f"shape {array.shape}", spec.name, (length,))
    all_offsets = (("token_offsets", "N"), ("entry_offsets", "E"), ("span_offsets", "S"))
    for name, axis in (pair for pair in all_offsets if pair[0] in arrays):
        array = arrays[name]
        good = array[0] == 0 and array[-1] == lengths[axis] and bool((np.diff(array) >= 0).all())
        require(good, "offsets do not rise from 0 to the end", name, f"0..{lengths[axis]}")
    for name in (name for name in ("token_ids", "entry_ids") if name in arrays):
        ids = arrays[name]
        require(not ids.size or ids.max() < vocab_size, "id out of range", name, f"< {vocab_size}")
    _check_bytes(arrays, require)
    if kind == "generated":
        _check_answers(arrays, require)
        return
    _check_probabilities(arrays, require)
    if kind == "aligned":
        _check_spans(arrays, require)
        origin = arrays["origin"]
        require(not origin.size or origin.max() <= max(Origin), "unknown origin", "origin")
        empty = np.diff(arrays["entry_offsets"]) == 0
        require(
            bool((empty | (origin != Origin.NONE)).all()), "entries without an origin", "origin"
        )


def _check_probabilities(arrays: Mapping[str, npt.NDArray[Any]], require: Any) -> None:
    logprobs = arrays["entry_logprobs"]
    require(bool((logprobs <= 0).all()), "log-probability above 0 or NaN", "entry_logprobs", "<= 0")
    labels = arrays["label_logprobs"]
    require(bool(((labels <= 0) | np.isnan(labels)).all()), "above 0", "label_logprobs", "<= 0")
    tail = arrays["tail_mass"]
    require(bool(((tail >= 0) & (tail <= 1)).all()), "outside [0, 1] or NaN", "tail_mass", "[0, 1]")
    # float32 is precise enough for the tolerance, and several times faster.
    mass, falling = row_masses(logprobs, np.exp(logprobs), arrays["entry_offsets"])
    require(falling, "entries not sorted by falling probability", "entry_logprobs")
    worst = float(np.abs(mass + tail - 1).max()) if len(tail) else 0.0
    require(
        worst <= TAIL_TOLERANCE,
        f"entries + tail differ from 1 by {worst:.2g}",
        "tail_mass",
        f"at most {TAIL_TOLERANCE}",
    )


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
