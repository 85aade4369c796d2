"""Exponential weights on the log-loss of earlier tokens, with fixed share for sources that switch.

With rate 1 the weights are a Bayes mixture's: the pool's probability of a segment is the prior mean of
the sources' (share 0), or of all sequences of sources that switch with probability `share` before each
row (a hidden Markov model). So the regret against the best source of a segment is at most log M nats,
and against the best sequence with k switches in T rows at most
log M + k log(M - 1) + k log(1/share) - (T - k - 1) log(1 - share).

Shape suffixes: S share rates, B segments, T rows, M sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PROBABILITY_FLOOR = -1000.0
"""Nats. Lower log-probabilities of a label (such as -inf) are raised to this in every pool."""


def log_weights(
    past_logprobs_BTM: torch.Tensor,
    *,
    rate: float = 1.0,
    shares: Sequence[float] = (0.0,),
    prior_BM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-weights of every row, one pass over the rows, vectorised over the rest.

    In plain lines, with v the weights before row i, l_m the log-probability that source m gave the
    label before row i, and a the share:

        v_m <- v_m exp(rate * l_m) / sum_j v_j exp(rate * l_j)
        v_m <- (1 - a) v_m + a / (M - 1) * (1 - v_m)

    With a prior, v begins as it, and the second line moves weight to it. With b = min(1, a M / (M - 1))
    it is the same line where the prior is equal weights:

        v_m <- (1 - b) v_m + b * prior_m

    A source without a probability for that label sleeps: it is scored as the mixture of those that have
    one, so its weight stays as it is. Where none has one, only the second line applies.

    Args:
        past_logprobs_BTM: Nats; row i holds the label of row i - 1. NaN where not known, and in row 0.
        rate: eta.
        shares: One or more switching rates, 0 to 1.
        prior_BM: Weights before the first row, positive, of sum 1. None: equal ones.

    Returns:
        [S, B, T, M] float64, logsumexp over M is 0. Row i depends on rows up to i of the input alone.

    Source: Herbster & Warmuth 1998 (Tracking the best expert), fixed share; Freund et al. 1997 for
    sleeping experts.
    """
    past_BTM = past_logprobs_BTM.detach().double()
    num_segments, num_rows, num_sources = past_BTM.shape
    share_S11 = past_BTM.new_tensor(list(shares))[:, None, None]
    known_BTM = ~past_BTM.isnan()
    some_BT1 = known_BTM.any(-1, keepdim=True)
    gain_BTM = rate * torch.where(known_BTM, past_BTM, 0.0).clamp(min=PROBABILITY_FLOOR)
    all_known_T = known_BTM.all(-1).all(0).tolist()
    none_known_T = (~some_BT1).all(-1).all(0).tolist()
    shared = bool((share_S11 > 0).any()) and num_sources > 1
    if prior_BM is None:
        uniform = -torch.tensor(float(max(num_sources, 1)), dtype=torch.float64).log()
        state_SBM = past_BTM.new_full((len(shares), num_segments, num_sources), float(uniform))
    else:
        state_SBM = prior_BM.double().log().expand(len(shares), -1, -1)
    out_SBTM = past_BTM.new_empty((len(shares), num_segments, num_rows, num_sources))
    for row in range(num_rows):
        if not none_known_T[row]:
            gain_SBM = gain_BTM[None, :, row]
            if not all_known_T[row]:
                gain_SBM = _with_sleepers(state_SBM, gain_SBM, known_BTM[:, row], some_BT1[:, row])
            state_SBM = (state_SBM + gain_SBM).log_softmax(-1)
        if shared and row:
            state_SBM = _after_share(state_SBM, share_S11, prior_BM)
        out_SBTM[:, :, row] = state_SBM
    return out_SBTM


def _with_sleepers(
    state_SBM: torch.Tensor, gain_SBM: torch.Tensor, known_BM: torch.Tensor, some_B1: torch.Tensor
) -> torch.Tensor:
    """Gains, where sources that do not know the label gain what the mixture of the others does."""
    awake_SBM = state_SBM.masked_fill(~known_BM & some_B1, float("-inf"))
    mixed_SB1 = (awake_SBM + gain_SBM).logsumexp(-1, True) - awake_SBM.logsumexp(-1, True)
    return torch.where(known_BM, gain_SBM, torch.where(some_B1, mixed_SB1, 0.0))


def _after_share(
    state_SBM: torch.Tensor, share_S11: torch.Tensor, prior_BM: torch.Tensor | None
) -> torch.Tensor:
    """Move `share` of each source's weight to the others, equally or as the prior says."""
    weight_SBM = state_SBM.exp()
    num_sources = state_SBM.shape[-1]
    if prior_BM is None:
        to_others_SBM = share_S11 / (num_sources - 1) * (1 - weight_SBM)
        moved_SBM = (1 - share_S11) * weight_SBM + to_others_SBM
    else:
        part_S11 = (share_S11 * num_sources / (num_sources - 1)).clamp(max=1)
        moved_SBM = (1 - part_S11) * weight_SBM + part_S11 * prior_BM
    # Without a share the log-weights stay what they were: exp would lose those below e^-745.
    return torch.where(share_S11 > 0, moved_SBM.clamp(min=1e-300).log(), state_SBM)


def past_of(label_logprobs_BTM: torch.Tensor) -> torch.Tensor:
    """Log-probabilities shifted by one row: row i holds those of row i - 1's label, row 0 NaN."""
    first_B1M = torch.full_like(label_logprobs_BTM[:, :1], float("nan"))
    return torch.cat([first_B1M, label_logprobs_BTM[:, :-1]], 1)
