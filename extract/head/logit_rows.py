"""The log-sum-exp and the largest entries of rows of logits, in a single pass over them.

The vocabulary is divided into blocks of BLOCK ids. One pass computes each block's largest logit (peak)
and sum of exponentials; everything else works on these few numbers. So a row of 128k ids is not read
again for its top 64, which are in the 64 blocks with the largest peaks. Sums are float32 within a
block and float64 over blocks. On a GPU the pass is one kernel that `torch.compile` makes from
`block_sums`.

Shapes: R rows, V vocabulary, C blocks, B ids of a block, K entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from store_schema.model.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

BLOCK = 64
"""Near the square root of V / K for large vocabularies, where both steps of `best` take equally
long."""
CACHE_BYTES = 4 << 20
"""Bytes of logits that a CPU works on at a time, so that intermediate results stay in its cache."""

Sums = tuple[torch.Tensor, torch.Tensor]

Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""ids [R, K] int32, most probable first; their log-probabilities [R, K] and those of the labels [R]
float32, in nats."""


@dataclass(frozen=True, slots=True)
class RowSums:
    """Block peaks and log-sum-exp of rows of logits.

    Args:
        peaks_RC: float32 largest logit of each block; the last block may be shorter.
        log_total_R: float64 nats, log of the sum of exponentials.
    """

    peaks_RC: torch.Tensor
    log_total_R: torch.Tensor


def block_sums(logits_RCB: torch.Tensor) -> Sums:
    """Peak and sum of exponentials of each block; only plain operations, so that it can be compiled.

    Returns:
        [R, C] float32 each: the largest logit m, the sum of exp(x - m).
    """
    peaks_RC = logits_RCB.amax(-1)
    return peaks_RC, (logits_RCB - _finite(peaks_RC)[..., None]).exp().sum(-1)


def row_sums(logits_RV: torch.Tensor) -> RowSums:
    """Block peaks and log-sum-exp of rows of logits.

    Args:
        logits_RV: float32.

    Returns:
        Within 1e-6 of the values in float64; NaN where a row has NaN or +inf.
    """
    size = logits_RV.shape[1]
    full = size // BLOCK * BLOCK
    parts: list[Sums] = []
    for start, stop, width in ((0, full, BLOCK), (full, size, size - full)):
        if start < stop:
            shape = len(logits_RV), (stop - start) // width, width
            parts.append(_sums_of(logits_RV[:, start:stop].view(shape)))
    peaks_RC, sums_RC = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    # The sum of a block is relative to the block's own peak.
    finite_RC = _finite(peaks_RC).double()
    top_R1 = finite_RC.amax(-1, keepdim=True)
    total_R = ((finite_RC - top_R1).exp() * sums_RC).sum(-1)
    return RowSums(peaks_RC, top_R1[:, 0] + total_R.log())


def best(
    logits_RV: torch.Tensor, peaks_RC: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits of each row and their ids, the same as `torch.topk` except for ties.

    Each of the K largest is in one of the K blocks with the largest peaks: otherwise K other blocks
    would each have a logit as large. So there are only K * BLOCK candidates.

    Args:
        logits_RV: float32.
        peaks_RC: From `row_sums`.
        top_k: K, at most V.

    Returns:
        values [R, K] falling, ids [R, K] int64.
    """
    size = logits_RV.shape[1]
    num_full = size // BLOCK
    if 2 * top_k > num_full:
        top = logits_RV.topk(top_k, dim=-1)
        return top.values, top.indices
    blocks_RK = peaks_RC[:, :num_full].topk(top_k, dim=-1).indices
    full_RCB = logits_RV[:, : num_full * BLOCK].view(len(logits_RV), num_full, BLOCK)
    in_blocks = full_RCB.gather(1, blocks_RK[..., None].expand(-1, -1, BLOCK)).flatten(1)
    candidates = torch.cat([in_blocks, logits_RV[:, num_full * BLOCK :]], dim=1)
    top = candidates.topk(top_k, dim=-1)
    # The shorter last block comes after the chosen ones.
    blocks = torch.cat([blocks_RK, blocks_RK.new_full((len(blocks_RK), 1), num_full)], dim=1)
    ids_RK = blocks.gather(1, top.indices // BLOCK) * BLOCK + top.indices % BLOCK
    return top.values, ids_RK


def row_entries(logits_RV: torch.Tensor, labels_R: torch.Tensor, top_k: int) -> Entries:
    """The most probable ids of each row, and what it says of its label.

    Args:
        logits_RV: float32.
        labels_R: int64 ids.
        top_k: K, at most V.
    """
    sums = row_sums(logits_RV)
    total_R1 = sums.log_total_R[:, None]
    values_RK, ids_RK = best(logits_RV, sums.peaks_RC, top_k)
    label_R1 = logits_RV.gather(1, labels_R[:, None]) - total_R1
    return ids_RK.int(), (values_RK - total_R1).float(), label_R1[:, 0].float()


def _finite(peaks: torch.Tensor) -> torch.Tensor:
    """-inf replaced by the lowest finite number: -inf - -inf would be NaN."""
    return peaks.clamp(min=torch.finfo(torch.float32).min)


def _sums_of(blocks_RCB: torch.Tensor) -> Sums:
    if blocks_RCB.is_cuda and blocks_RCB.shape[-1] == BLOCK:
        return _fused()(blocks_RCB)
    row_bytes = blocks_RCB.shape[1] * blocks_RCB.shape[2] * blocks_RCB.element_size()
    pieces = torch.split(blocks_RCB, max(CACHE_BYTES // row_bytes, 1))
    peaks, sums = zip(*map(block_sums, pieces), strict=True)
    return torch.cat(peaks), torch.cat(sums)


@cache
def _fused() -> Callable[[torch.Tensor], Sums]:
    """`block_sums` as one compiled kernel; uncompiled, with five passes, where compiling fails."""
    chosen: Callable[[torch.Tensor], Sums] = torch.compile(block_sums, fullgraph=True)

    def run(blocks_RCB: torch.Tensor) -> Sums:
        nonlocal chosen
        try:
            return chosen(blocks_RCB)
        # A missing C compiler, Triton or ptxas raises errors of many unrelated classes.
        except Exception as error:
            if is_out_of_memory(error) or chosen is block_sums:
                raise
            first_line = str(error).strip().partition("\n")[0]
            logger.warning("log-sum-exp could not be compiled and is slower: %s", first_line[:160])
            chosen = block_sums
        return chosen(blocks_RCB)

    return run
