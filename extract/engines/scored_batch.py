"""Copy the rows of a batch from the device to the CPU while the device continues.

Shapes: R rows, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from extract.engines.protocol import DenseRows

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""ids [R, K] int32, their log-probabilities [R, K] and those of the labels [R] float32, in nats."""


def no_rows(num_entries: int) -> Tensors:
    """Empty tensors, for a batch without rows."""
    ids = torch.empty(0, num_entries, dtype=torch.int32)
    return ids, torch.empty(0, num_entries), torch.empty(0)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is complete when the GPU's stream is; a CPU tensor itself."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass(slots=True)
class ScoredBatch:
    """Rows of a batch that are being copied to the CPU.

    Args:
        batch: Indices of its segments.
        counts: Number of rows of each segment.
        kept: The rows of all segments, on the device.
        sampled: Whether they are estimates of whole distributions.
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
        """Index and rows of each segment; waits for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, logprobs, labels = (kept.numpy() for kept in self.kept)
        start = 0
        for i, count in zip(self.batch, self.counts, strict=True):
            part = slice(start, start + count)
            yield i, DenseRows(ids[part], logprobs[part], labels[part], self.sampled)
            start += count
