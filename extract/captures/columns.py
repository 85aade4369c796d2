"""The columns of a capture as entries: ids and log-probabilities of each position, checked.

Shapes: R rows (positions), K entries, C bytes, words or numbers of a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from store_schema.capture.distillkit import unpack_ids, unpack_legacy, unpack_logprobs
from store_schema.capture.params import AnyParams, LegacyParams, Params
from store_schema.errors import CorruptionError
from store_schema.layout import TAIL_TOLERANCE

Form = Literal["packed", "legacy", "plain"]
COLUMNS: dict[Form, tuple[str, ...]] = {
    "packed": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "plain": ("token_ids", "top_values"),
}
"""Columns besides `input_ids`, by format: the present one, the earlier one, and without compression."""

PADDING_NATS = -100.0
"""Entries at or below it have probability 0 in float32: they only fill a position up to k entries."""
MOST_ABOVE_0 = 0.1
"""Nats that a fitted curve may give a probability above 1; more is another sort of number."""
MOST_MASS = 1.5
"""Sum of a position's entries that a fitted curve may give; more is another sort of number."""

OTHER_PARAMETERS = "give the capture's own compression_config.yaml with --compression"


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of some positions.

    Args:
        ids: [R, K] int64.
        logprobs: [R, K] float64 nats, at most 0, in no certain order; -inf for no entry. Their sum is
            at most 1 (to `TAIL_TOLERANCE`).
        rescaled: Positions whose sum was above 1, and was brought to 1.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float64]
    rescaled: int


def lists(
    column: pa.Array, name: str, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A column of lists of whole numbers: all numbers joined, and [rows + 1] where each row's begin.

    Raises:
        CorruptionError: It is another sort of column.
    """
    values, offsets = _flat(column, name, where)
    if not pa.types.is_integer(values.type):
        raise _wrong_type(column, name, where, "lists of whole numbers")
    start, stop = int(offsets[0]), int(offsets[-1])
    numbers = np.asarray(values[start:stop]).astype(np.int64)
    return numbers, offsets - start


def matrices(
    batch: pa.RecordBatch,
    form: Form,
    params: AnyParams | None,
    row: int,
    part: slice,
    where: str,
) -> Entries:
    """Entries of some positions of a row.

    Args:
        batch: With the columns of the format.
        form: The format.
        params: Of the capture; None for one without compression.
        row: Of the batch.
        part: Positions of the row.
        where: File and row, for messages.

    Raises:
        CorruptionError: The columns are not as the parameters say.
    """

    def matrix(name: str, width: int | None) -> npt.NDArray[Any]:
        return _matrix(batch.column(name), name, row, part, width, where)

    if isinstance(params, Params):
        ids = unpack_ids(matrix("bytepacked_indices", params.id_bytes).astype(np.uint8), params)
        packed = matrix("compressed_logprobs", params.logprob_bytes).astype(np.uint8)
        with np.errstate(invalid="ignore", over="ignore"):
            values = unpack_logprobs(packed, params)
        if not params.delta_encoding:  # sums of falling differences fall by themselves
            exact = values[:, : params.exact_k]
            falls = ~(np.diff(exact, axis=1, prepend=np.inf) > 0)
            _require(falls, "exact log-probabilities do not fall", part.start, where)
    elif isinstance(params, LegacyParams):
        ids, values = unpack_legacy(
            matrix("packed_indices", params.id_words),
            matrix("exact_values", params.exact_k).astype(np.float64),
            matrix("coeffs", params.num_terms).astype(np.float64),
            params,
        )
    else:
        ids = matrix("token_ids", None).astype(np.int64)
        values = matrix("top_values", ids.shape[1]).astype(np.float64)
    return checked(ids, values, None if params is None else params.d, part.start, where)


def checked(
    ids: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    vocab_size: int | None,
    first: int,
    where: str,
) -> Entries:
    """Entries from what a format gives, if they are distributions.

    Args:
        ids: [R, K].
        values: [R, K] nats.
        vocab_size: All ids lie below it; None for no limit.
        first: Number of the first position, for messages.
        where: File and row, for messages.

    Raises:
        CorruptionError: They are not; names the first such position.
    """
    values = np.where(values <= PADDING_NATS, -np.inf, values)
    there = values > -np.inf
    _require(~np.isnan(values), "a log-probability is no number", first, where)
    _require(values <= MOST_ABOVE_0, "a log-probability is above 0", first, where)
    if vocab_size is not None:
        sound = (ids >= 0) & (ids < vocab_size) | ~there
        _require(sound, f"an id is not below the vocabulary's size {vocab_size}", first, where)
    own = np.where(there, ids, -1 - np.arange(ids.shape[1]))
    own.sort(axis=1)
    _require(np.diff(own, axis=1, prepend=-(1 << 62)) != 0, "an id is there twice", first, where)
    values = np.minimum(values, 0.0)
    mass = np.exp(values).sum(axis=1, keepdims=True)
    _require(mass <= MOST_MASS, "the entries' probabilities sum to much more than 1", first, where)
    above = mass > 1 + TAIL_TOLERANCE
    values = values - np.where(above, np.log(np.maximum(mass, 1.0)), 0.0)
    return Entries(ids, values, int(above.sum()))


def _require(sound: npt.NDArray[np.bool_], what: str, first: int, where: str) -> None:
    wrong = np.flatnonzero(~sound.all(axis=1))
    if len(wrong):
        raise CorruptionError(
            what, where=f"{where}, position {first + int(wrong[0])}", hint=OTHER_PARAMETERS
        )


def _flat(column: pa.Array, name: str, where: str) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """The values of a column of lists, and [rows + 1] where each row's begin among them."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise _wrong_type(column, name, where, "lists")
    if column.null_count or column.values.null_count:
        raise CorruptionError(f"null in column {name}", where=where)
    return column.values, np.asarray(column.offsets).astype(np.int64)


def _wrong_type(column: pa.Array, name: str, where: str, expected: str) -> CorruptionError:
    what = f"column {name} has another type"
    return CorruptionError(what, where=where, expected=expected, got=column.type)


def _matrix(
    column: pa.Array, name: str, row: int, part: slice, width: int | None, where: str
) -> npt.NDArray[Any]:
    """[R, C] of some positions of a row of a column with lists of lists.

    Args:
        column: One list of positions for each row.
        name: Of the column.
        row: Of the column.
        part: Positions.
        width: Numbers of each position; None for as many as the first has.
        where: For messages.
    """
    inner, rows = _flat(column, name, where)
    have = int(rows[row + 1] - rows[row])
    if part.stop > have:
        raise CorruptionError(
            f"column {name} is cut off", where=where,
            expected=f"{part.stop} positions or more for its tokens", got=have,
            hint="it has a distribution after each token, or after each but the last",
        )  # fmt: skip
    values, offsets = _flat(inner, name, where)
    bounds = offsets[int(rows[row]) + part.start : int(rows[row]) + part.stop + 1]
    widths = np.diff(bounds)
    if width is None:
        width = int(widths[0]) if len(widths) else 0
    if not (widths == width).all():
        wrong = int(np.flatnonzero(widths != width)[0])
        raise CorruptionError(
            f"column {name} does not fit the compression parameters",
            where=f"{where}, position {part.start + wrong}",
            expected=f"{width} numbers a position",
            got=int(widths[wrong]),
            hint=OTHER_PARAMETERS,
        )
    flat = np.asarray(values[int(bounds[0]) : int(bounds[-1])]) if len(widths) else np.empty(0)
    return flat.reshape(len(widths), width)
