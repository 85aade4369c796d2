"""Groups of arrays that are encoded together, and the simplest encodings.

Here: numbers unchanged, offsets as row lengths, and nats in even steps. `encoding` has the others, and
the list of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.encoding.frequency import Ranking
from store_schema.errors import CorruptionError
from store_schema.layout import Arrays
from store_schema.presets import Encoding, Steps

UNKNOWN, INFINITE, FIRST_NATS_CODE = 0, 1, 2
"""Codes of nats: NaN; infinity; and from here on 2 + a multiple of `label_step`."""


@dataclass(frozen=True, slots=True)
class StoredSpec:
    """One array on disk.

    Args:
        name: Key in the shard's Zarr group.
        dtype: Type of its values.
        axis: Its length, as in `layout` (never "+1": offsets are stored as counts).
        delta: Whether the codec may store differences of neighbours.
    """

    name: str
    dtype: str
    axis: str
    delta: bool = False


@dataclass(frozen=True, slots=True)
class Coder:
    """What encoding and decoding need besides the arrays.

    Args:
        encoding: The store's encoding.
        ranking: [V] ids by frequency rank.
        where: Store and shard, for messages.
    """

    encoding: Encoding
    ranking: Ranking
    where: str

    @property
    def steps(self) -> Steps:
        """The encoding's steps; a TypeError for an exact store, which has none."""
        if self.encoding.steps is None:
            raise TypeError("an exact store has no steps")
        return self.encoding.steps

    def fault(self, what: str, name: str) -> CorruptionError:
        """An error that names the store, the shard and the array."""
        return CorruptionError(
            what,
            where=f"{self.where}, array {name}",
            hint="`logitfuse store repair` uncommits the shard so that a rerun writes it again",
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Arrays that are encoded together.

    Args:
        names: The arrays in the layout.
        stored: The arrays on disk.
        encode: From the arrays of the layout to those on disk.
        decode: From the arrays on disk to those of the layout.
        also: Stored arrays of other groups that decoding needs.
    """

    names: tuple[str, ...]
    stored: tuple[StoredSpec, ...]
    encode: Callable[[Arrays, Coder], Arrays]
    decode: Callable[[Arrays, Coder], Arrays]
    also: tuple[StoredSpec, ...] = ()


# ------------------------------------------------------------------------------- plain and counted


def plain(name: str, spec: StoredSpec, dtype: str | None = None) -> Group:
    """Numbers unchanged; `dtype` is their type in the layout if it is narrower than on disk."""

    def decode(stored: Arrays, coder: Coder) -> Arrays:
        array = stored[spec.name]
        if dtype is not None:
            if array.size and array.max() > np.iinfo(dtype).max:
                raise coder.fault("value out of range", spec.name)
            array = array.astype(dtype)
        return {name: array}

    return Group(
        (name,), (spec,), lambda arrays, _: {spec.name: arrays[name].astype(spec.dtype)}, decode
    )


def counted(name: str, spec: StoredSpec) -> Group:
    """Offsets, stored as the length of each row."""
    return Group(
        (name,),
        (spec,),
        lambda arrays, _: {spec.name: np.diff(arrays[name]).astype(np.uint32)},
        lambda stored, _: {name: totals(stored[spec.name])},
    )


def totals(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Offsets [D+1] from the lengths of rows [D]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


# ------------------------------------------------------------------------------- nats in even steps


def coded_logs(name: str, spec: StoredSpec) -> Group:
    """Log-probabilities of labels and spans, stored in even steps of `label_step` nats: off by half a
    step at most."""

    def encode(arrays: Arrays, coder: Coder) -> Arrays:
        nats = -arrays[name].astype(np.float64)
        known = np.isfinite(nats)
        nats_codes = np.full(len(nats), UNKNOWN, np.uint32)
        nats_codes[np.isposinf(nats)] = INFINITE
        steps = np.rint(nats[known] / coder.steps.label_step)
        nats_codes[known] = np.minimum(steps, 2**32 - 3).astype(np.uint32) + FIRST_NATS_CODE
        return {spec.name: nats_codes}

    def decode(stored: Arrays, coder: Coder) -> Arrays:
        nats_codes = stored[spec.name]
        nats = (nats_codes.astype(np.float64) - FIRST_NATS_CODE) * coder.steps.label_step
        nats[nats_codes == UNKNOWN] = np.nan
        nats[nats_codes == INFINITE] = np.inf
        return {name: (-nats).astype(np.float32)}

    return Group((name,), (spec,), encode, decode)
