"""Unbiased random samples of whole distributions, instead of their most probable entries.

The H most probable ids keep their exact probability. From the others, of total mass m, n ids are drawn,
and a drawn id gets count * m / n. So the expected estimate of every id is its probability, and the
estimates of a row sum to 1: there is no tail, and no bias towards probable ids.

Draws are systematic: n evenly spaced points with one random offset for each row, mapped by the inverse
of the cumulative distribution. The count of an id of probability p is then floor(n p / m) or one more,
which is the least variance of an integer with that mean; independent draws (`multinomial`, as in the
paper) have up to n p / m (1 - p / m). The random number of a row depends on the run's seed, the source
and the tokens of its segment, not on its batch.

Source: Anshumann et al. 2025, "Sparse Logit Sampling" (2503.16870). Departures: systematic draws,
the exact head.

Shapes: R rows, V ids of the tokenizer, H head entries, n draws, C blocks of BLOCK ids.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from store_schema.text.tokenizer import EncodedSegment

BLOCK = 128
"""Ids in a block. A draw first finds its block, then its id within the block, so that no cumulative sum
[R, V] is needed: float64 would take much memory, and float32 would lose rare ids."""


def segment_uniforms(
    segment: EncodedSegment, num_rows: int, *, seed: int, source: str
) -> npt.NDArray[np.float64]:
    """One random number for each row of a segment, from its tokens and not from its batch.

    Args:
        segment: The segment; segments of equal tokens get equal numbers.
        num_rows: R.
        seed: The run's seed.
        source: Name of the source: errors of different sources must be independent.

    Returns:
        [R] float64 in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}:{source}:{len(segment.context_ids)}:".encode())
    digest.update(np.array(segment.input_ids, "<u4").tobytes())
    return PhiloxStream(int.from_bytes(digest.digest()[:16], "little")).uniforms(num_rows)


class PhiloxStream:
    """Random numbers from a counter with a key in [0, 2^128); the same in all versions of numpy."""

    def __init__(self, key: int) -> None:
        self._counter = np.random.Philox(key=key)

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """The next numbers in [0, 1)."""
        # Only the raw stream is the same in all versions of numpy; Generator.random's is not.
        raw = np.asarray(self._counter.random_raw(count), np.uint64)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gumbel(self, count: int) -> npt.NDArray[np.float64]:
        """The next numbers with the standard Gumbel distribution; all finite."""
        uniforms = self.uniforms(count).clip(min=2.0**-54)  # the largest is below 1
        noise: npt.NDArray[np.float64] = -np.log(-np.log(uniforms))
        return noise


def systematic_points(uniforms_R: torch.Tensor, num_draws: int) -> torch.Tensor:
    """[R, n] float64 points in [0, 1), rising: evenly spaced, with one offset for each row."""
    return (torch.arange(num_draws, dtype=torch.float64) + uniforms_R[:, None]) / num_draws


def sampled_rows(
    logits_RV: torch.Tensor, points_Rn: torch.Tensor, *, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the softmax of each row.

    Args:
        logits_RV: float32, without the model's padding ids.
        points_Rn: [R, n] float64 in [0, 1), rising, on the CPU: arguments of the inverse cumulative
            distribution.
        head: H, the most probable entries that are kept exactly.

    Returns:
        ids [R, H + n] int64 and logprobs [R, H + n] float32, -inf where a draw repeats an earlier one;
        both on the CPU.
    """
    weights_RCB = _weights(logits_RV)
    flat_RV = weights_RCB.flatten(1)
    head_ids_RH = logits_RV.topk(min(head, logits_RV.shape[1]), dim=-1).indices
    head_RH = flat_RV.gather(1, head_ids_RH).double().cpu()
    flat_RV.scatter_(1, head_ids_RH, 0.0)
    ids_Rn, rest_R1 = _drawn(weights_RCB, points_Rn)
    total_R1 = head_RH.sum(-1, keepdim=True) + rest_R1
    share_Rn = _counts(ids_Rn).double() / ids_Rn.shape[1]
    logprobs_RK = torch.cat([head_RH, share_Rn * rest_R1], dim=1).div_(total_R1).log_()
    return torch.cat([head_ids_RH.cpu(), ids_Rn], dim=1), logprobs_RK.float()


def _weights(logits_RV: torch.Tensor) -> torch.Tensor:
    """exp(logits - the row's largest logit) [R, C, BLOCK], padded with zeros."""
    num_rows, size = logits_RV.shape
    num_blocks = -(-size // BLOCK)
    weights = logits_RV.new_zeros(num_rows, num_blocks * BLOCK)
    weights[:, :size] = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).exp_()
    return weights.view(num_rows, num_blocks, BLOCK)


def _drawn(weights_RCB: torch.Tensor, points_Rn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids at the points, rising [R, n], and the sum of each row's weights [R, 1] float64.

    Block sums are accumulated on the CPU, since a GPU's cumulative sum is not deterministic.
    """
    sums_RC = weights_RCB.sum(-1).cpu().double()
    ends_RC = sums_RC.cumsum(-1)
    total_R1 = ends_RC[:, -1:]
    block_Rn, inside_Rn = _place(ends_RC, points_Rn * total_R1)
    inside_Rn = inside_Rn / sums_RC.gather(1, block_Rn)
    row_R1 = torch.arange(len(points_Rn), device=weights_RCB.device)[:, None]
    ids_RnB = weights_RCB[row_R1, block_Rn.to(weights_RCB.device)].cpu().double()
    ends_RnB = ids_RnB.cumsum(-1)
    # The block was chosen by float32 sums, its id by a float64 sum: positions are relative to each.
    offset_Rn1, _ = _place(ends_RnB, inside_Rn[..., None] * ends_RnB[..., -1:])
    return block_Rn * BLOCK + offset_Rn1[..., 0], total_R1


def _place(ends: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first end above each point, and the point's distance from the end before.

    An id without weight never has the first end above a point, so it is never drawn.
    """
    last = ends[..., -1:]
    points = torch.minimum(points, torch.nextafter(last, torch.zeros_like(last))).contiguous()
    index = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[-1] - 1)
    before = ends.gather(-1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0.0)
    return index, points - before


def _counts(ids_Rn: torch.Tensor) -> torch.Tensor:
    """How often each id occurs in its (sorted) row, at its first place; 0 at its other places."""
    first = torch.ones_like(ids_Rn, dtype=torch.bool)
    first[:, 1:] = ids_Rn[:, 1:] != ids_Rn[:, :-1]
    group = first.cumsum(-1) - 1
    counts = torch.zeros_like(ids_Rn).scatter_add_(1, group, torch.ones_like(ids_Rn))
    return counts.gather(1, group) * first
