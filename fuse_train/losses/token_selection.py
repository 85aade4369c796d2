"""Selection of rows to train on: those where the target's NLL is farthest above a reference's.

Shape suffixes: R rows with a label, M sources.
"""

from __future__ import annotations

import torch


def row_factors(nll_R: torch.Tensor, reference_R: torch.Tensor, share: float) -> torch.Tensor:
    """Factors of the rows' losses: 0 for rows left out, the same for all others, mean 1.

    Of the rows whose reference is known, the `share` with the largest excess nll - reference are
    kept. Rows without a reference are always kept.

    Args:
        nll_R: NLL of the label under the target, nats.
        reference_R: NLL of the label under the reference, nats, NaN where not known.
        share: Above 0, at most 1.

    Returns:
        [R] without gradient.

    Source: Rho-1 (2404.07965), selective language modelling. Departures: the reference is a
    source or the pool of the sources, from the store, and not a model trained for it; the share is of
    a micro-batch.
    """
    known_R = ~reference_R.isnan()
    excess_R = torch.where(known_R, nll_R - reference_R, float("-inf")).detach()
    kept_R = ~known_R
    count = max(1, round(share * int(known_R.sum()))) if bool(known_R.any()) else 0
    kept_R[excess_R.topk(count).indices] = True
    kept_R = kept_R.to(nll_R.dtype)
    return kept_R * (len(kept_R) / kept_R.sum().clamp(min=1))
