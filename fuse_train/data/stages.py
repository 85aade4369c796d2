"""Stages of a training: each has its own order of samples.

A stage has the texts of some corpora. Each step belongs to one stage, which follows from the number of
the step alone: a checkpoint need not save it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fuse_train.data.order import SampleOrder, SampleRef, Units
from fuse_train.stages_config import StageSection
from store_schema.errors import ConfigError, InputError


class StagedOrder:
    """Samples by step, stage after stage.

    Args:
        stages: Of the run file; none is one stage of all texts with weight 1.
        corpora: From a shard to the corpus name of each segment [D]; called only if there are stages.
        shard_sizes: Segments of each shard of the split.
        batch_segments: Segments of a step.
        make_order: From number of a stage, shard sizes and units to a `SampleOrder`.
        units: As in `SampleOrder`, by shard of the split.
        used: Segments of each shard that take part; None for all.

    Raises:
        ConfigError: A stage names a corpus that the split does not have.
        InputError: Texts of inputs without a name.
    """

    def __init__(
        self,
        stages: Sequence[StageSection],
        corpora: Callable[[int], Sequence[str | None]],
        shard_sizes: Sequence[int],
        *,
        batch_segments: int,
        make_order: Callable[..., SampleOrder],
        units: Units | None = None,
        used: Sequence[npt.NDArray[np.int64]] | None = None,
    ) -> None:
        self._batch = batch_segments
        self.stages = tuple(stages)
        if not stages:
            self._starts = [0]
            if used is None:
                self._parts = [_Part.whole(make_order(0, shard_sizes, units))]
            else:
                self._parts = [_Part.of(used, units, lambda *a: make_order(0, *a))]
            return
        names = [list(corpora(shard)) for shard in range(len(shard_sizes))]
        _require_names(names, stages)
        self._parts = [
            _Part.of(_chosen(names, stage.corpora, used), units, lambda *a, n=n: make_order(n, *a))
            for n, stage in enumerate(stages)
        ]
        steps = [
            stage.steps or max(1, math.ceil(stage.epochs * len(part) / batch_segments - 1e-9))
            for stage, part in zip(stages, self._parts, strict=True)
        ]
        self._starts = [0, *np.cumsum(steps).tolist()]

    @property
    def num_steps(self) -> int | None:
        """Steps of all stages; None where there are none."""
        return self._starts[-1] if self.stages else None

    def __len__(self) -> int:
        """Samples of an epoch of the first stage."""
        return len(self._parts[0])

    def stage_at(self, step: int) -> StageSection | None:
        """The stage of a step (from 0); None where there are no stages."""
        number = self.number_at(step)
        return None if number is None else self.stages[number]

    def number_at(self, step: int) -> int | None:
        """Index of the stage of a step (from 0); None where there are no stages."""
        return self._number(step) if self.stages else None

    def samples(self, step: int) -> list[SampleRef]:
        """The samples of a step."""
        number = self._number(step)
        start = (step - self._starts[number]) * self._batch
        return self._parts[number].samples(start, self._batch)

    def _number(self, step: int) -> int:
        if not self.stages:
            return 0
        number = int(np.searchsorted(self._starts, step, side="right")) - 1
        return min(number, len(self.stages) - 1)


class _Part:
    """The order of one stage's samples, and where these are among all: shard and segments there."""

    def __init__(
        self, order: SampleOrder, places: list[tuple[int, npt.NDArray[np.int64]]] | None
    ) -> None:
        self._order, self._places = order, places

    @classmethod
    def whole(cls, order: SampleOrder) -> _Part:
        """The order of all samples."""
        return cls(order, None)

    @classmethod
    def of(
        cls,
        kept: Sequence[npt.NDArray[np.int64]],
        units: Units | None,
        make_order: Callable[..., SampleOrder],
    ) -> _Part:
        """The order of some segments of each shard."""
        places = [(shard, segments) for shard, segments in enumerate(kept) if len(segments)]

        def kept_units(at: int) -> npt.NDArray[np.int64]:
            shard, segments = places[at]
            return units(shard)[segments] if units is not None else np.arange(len(segments))

        sizes = [len(segments) for _, segments in places]
        return cls(make_order(sizes, None if units is None else kept_units), places)

    def __len__(self) -> int:
        return len(self._order)

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """`count` samples from position `start` of the stage."""
        refs = self._order.samples(start, count)
        if self._places is None:
            return refs
        return [
            SampleRef(self._places[ref.shard][0], int(self._places[ref.shard][1][ref.segment]))
            for ref in refs
        ]


def _chosen(
    names: Sequence[Sequence[str | None]],
    corpora: frozenset[str],
    used: Sequence[npt.NDArray[np.int64]] | None,
) -> list[npt.NDArray[np.int64]]:
    """Segments of each shard that are of these corpora, and used."""
    kept = [np.flatnonzero([name in corpora for name in of_shard]) for of_shard in names]
    if used is None:
        return kept
    return [np.intersect1d(of_corpora, own) for of_corpora, own in zip(kept, used, strict=True)]


def _require_names(names: Sequence[Sequence[str | None]], stages: Sequence[StageSection]) -> None:
    counts = Counter(name for of_shard in names for name in of_shard)
    if counts.get(None):
        raise InputError(
            "texts of inputs without a name, so stages have no weight for them",
            where="train.stages",
            got=f"{counts[None]:,} segments",
            hint="name each input of the run file (corpus.inputs[].corpus), then build the corpus "
            "and plan again",
        )
    known = sorted(str(name) for name in counts)
    for number, stage in enumerate(stages):
        unknown = sorted(set(stage.weights) - set(known))
        if unknown:
            raise ConfigError(
                "a stage names a corpus that the training split does not have",
                where=f"train.stages[{number}].weights",
                expected=", ".join(known),
                got=", ".join(unknown),
            )
