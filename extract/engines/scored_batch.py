"""Rows of a batch on their way from the device to an engine's caller.

Shapes: R rows, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from extract.engines.protocol import DenseRows


@dataclass(frozen=True, slots=True)
class KeptRows:
    """What is kept of rows, as tensors on one device.

    Args:
        ids_RK: int32.
        logprobs_RK: float32 nats.
        label_logprobs_R: float32 nats.
    """

    ids_RK: torch.Tensor
    logprobs_RK: torch.Tensor
    label_logprobs_R: torch.Tensor

    @classmethod
    def none(cls, num_entries: int) -> Self:
        """No rows."""
        ids = torch.empty(0, num_entries, dtype=torch.int32)
        return cls(ids, torch.empty(0, num_entries), torch.empty(0))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All rows of the parts, one after the other."""
        return cls(
            torch.cat([part.ids_RK for part in parts]),
            torch.cat([part.logprobs_RK for part in parts]),
            torch.cat([part.label_logprobs_R for part in parts]),
        )

    def on_cpu(self) -> Self:
        """The same in memory that a GPU copies into by itself: complete when its stream is."""
        return type(self)(
            _on_cpu(self.ids_RK),
            _on_cpu(self.logprobs_RK),
            _on_cpu(self.label_logprobs_R),
        )


def _on_cpu(found: torch.Tensor) -> torch.Tensor:
    if not found.is_cuda:
        return found
    pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    return pinned.copy_(found, non_blocking=True)


@dataclass(slots=True)
class ScoredBatch:
    """Rows of a batch on their way to the CPU.

    Args:
        batch: Indices of its segments.
        counts: Rows of each.
        kept: Of all, on the device.
        sampled: Whether they are estimates.
    """

    batch: Sequence[int]
    counts: Sequence[int]
    kept: KeptRows
    sampled: bool
    _arrived: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        on_gpu = self.kept.label_logprobs_R.is_cuda
        self.kept = self.kept.on_cpu()
        if on_gpu:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def rows(self) -> Iterator[tuple[int, DenseRows]]:
        """Index and rows of each segment, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, logprobs = self.kept.ids_RK.numpy(), self.kept.logprobs_RK.numpy()
        labels = self.kept.label_logprobs_R.numpy()
        start = 0
        for i, count in zip(self.batch, self.counts, strict=True):
            part = slice(start, start + count)
            yield i, DenseRows(ids[part], logprobs[part], labels[part], self.sampled)
            start += count
