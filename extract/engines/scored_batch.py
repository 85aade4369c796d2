"""Rows of a batch on their way from the device to an engine's caller.

Shapes: R rows, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from extract.engines.protocol import DenseRows

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""On one device: ids [R, K] int32; float32 nats of them [R, K] and of the labels [R]."""


def no_rows(num_entries: int) -> Tensors:
    """Of a batch whose segments have none."""
    ids = torch.empty(0, num_entries, dtype=torch.int32)
    return ids, torch.empty(0, num_entries), torch.empty(0)


def _on_cpu(found: torch.Tensor) -> torch.Tensor:
    """The same in memory that a GPU copies into by itself: complete when its stream is."""
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
    kept: Tensors
    sampled: bool
    _arrived: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        ids_RK, logprobs_RK, labels_R = self.kept
        on_gpu = labels_R.is_cuda
        self.kept = (_on_cpu(ids_RK), _on_cpu(logprobs_RK), _on_cpu(labels_R))
        if on_gpu:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def rows(self) -> Iterator[tuple[int, DenseRows]]:
        """Index and rows of each segment, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, logprobs, labels = (kept.numpy() for kept in self.kept)
        start = 0
        for i, count in zip(self.batch, self.counts, strict=True):
            part = slice(start, start + count)
            yield i, DenseRows(ids[part], logprobs[part], labels[part], self.sampled)
            start += count
