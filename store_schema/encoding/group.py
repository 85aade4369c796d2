"""A group: arrays of the layout that are kept together on disk, and how, in its simplest forms.

Numbers as they are, offsets as the lengths of their rows, and nats in even steps; `encoding` has the
forms that take more, and says which group owns which array.
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
"""Codes of nats: NaN; infinity; multiples of `label_step` from here on."""


@dataclass(frozen=True, slots=True)
class StoredSpec:
    """One array on disk.

    Args:
        name: Key in the shard's Zarr group.
        dtype: Of its numbers.
        axis: Length, as in `layout` (never "+1": offsets are kept as counts).
        delta: Whether the codec looks for differences between neighbours.
    """

    name: str
    dtype: str
    axis: str
    delta: bool = False


@dataclass(frozen=True, slots=True)
class Coder:
    """What encoding and decoding need beside the arrays.

    Args:
        encoding: The store's.
        ranking: [V] ids by frequency rank.
        where: Store and shard, for messages.
    """

    encoding: Encoding
    ranking: Ranking
    where: str

    @property
    def steps(self) -> Steps:
        """The steps, where there are some."""
        if self.encoding.steps is None:
            raise TypeError("an exact store has no steps")
        return self.encoding.steps

    def fault(self, what: str, name: str) -> CorruptionError:
        """The error that names an array."""
        return CorruptionError(
            what,
            where=f"{self.where}, array {name}",
            hint="`logitfuse store repair` uncommits the shard so that a rerun writes it again",
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Arrays of the layout that are kept together.

    Args:
        names: In the layout.
        stored: On disk.
        encode: From the arrays of the layout to those on disk.
        decode: And back.
        also: Arrays of other groups that decoding needs.
    """

    names: tuple[str, ...]
    stored: tuple[StoredSpec, ...]
    encode: Callable[[Arrays, Coder], Arrays]
    decode: Callable[[Arrays, Coder], Arrays]
    also: tuple[StoredSpec, ...] = ()


# ------------------------------------------------------------------------------- plain and counted


def plain(name: str, spec: StoredSpec, dtype: str | None = None) -> Group:
    """Numbers as they are, in another integer width where `dtype` says so."""

    def back(stored: Arrays, coder: Coder) -> Arrays:
        array = stored[spec.name]
        if dtype is not None:
            if array.size and array.max() > np.iinfo(dtype).max:
                raise coder.fault("value out of range", spec.name)
            array = array.astype(dtype)
        return {name: array}

    return Group(
        (name,), (spec,), lambda arrays, _: {spec.name: arrays[name].astype(spec.dtype)}, back
    )


def counted(name: str, spec: StoredSpec) -> Group:
    """Offsets, kept as the length of each row."""
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
    """Log-probabilities, what rewards and bits per byte are summed from: kept as nats below 0 in even
    steps of `label_step`, off by half a step at most."""

    def there(arrays: Arrays, coder: Coder) -> Arrays:
        nats = -arrays[name].astype(np.float64)
        known = np.isfinite(nats)
        nats_codes = np.full(len(nats), UNKNOWN, np.uint32)
        nats_codes[np.isposinf(nats)] = INFINITE
        steps = np.rint(nats[known] / coder.steps.label_step)
        nats_codes[known] = np.minimum(steps, 2**32 - 3).astype(np.uint32) + FIRST_NATS_CODE
        return {spec.name: nats_codes}

    def back(stored: Arrays, coder: Coder) -> Arrays:
        nats_codes = stored[spec.name]
        nats = (nats_codes.astype(np.float64) - FIRST_NATS_CODE) * coder.steps.label_step
        nats[nats_codes == UNKNOWN] = np.nan
        nats[nats_codes == INFINITE] = np.inf
        return {name: (-nats).astype(np.float32)}

    return Group((name,), (spec,), there, back)
