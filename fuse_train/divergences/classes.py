"""What a divergence compares: source and target over the source's entries and one class for the rest.

Every divergence is computed over K + 1 classes: the entries of the source, and one bucket for all
other tokens, of mass t under the source and `rest` = 1 - sum q_k under the target.

Shape suffixes: R rows, M sources, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Classes:
    """Sources and target over the same K + 1 classes, in one floating dtype.

    Args:
        p_RMK: The sources' probabilities of the entries.
        tail_RM: Their mass outside the entries.
        q_RMK: The target's probabilities of the entries.
        logq_RMK: Their logarithms, nats.
        rest_RM: The target's mass outside the entries, above 0.
    """

    p_RMK: torch.Tensor
    tail_RM: torch.Tensor
    q_RMK: torch.Tensor
    logq_RMK: torch.Tensor
    rest_RM: torch.Tensor


def interpolated(classes: Classes, share: float) -> Classes:
    """The classes with P replaced by the normalised q^(1 - share) * p^share, held constant.

    Source: TAID (2501.16937), softmax of interpolated logits, which is this normalised geometric
    mean. Departure: over the K + 1 classes instead of the whole vocabulary, and the share is a
    function of the step (a schedule), not of earlier losses.

    A row that the source does not cover stays as it is.
    """
    logp_RMK = classes.p_RMK.log()
    weight_RMK = (1 - share) * classes.logq_RMK + share * logp_RMK
    weight_RMK = weight_RMK.masked_fill(classes.p_RMK <= 0, float("-inf"))
    tail_RM1 = classes.tail_RM[..., None]
    weight_RM1 = (1 - share) * classes.rest_RM[..., None].log() + share * tail_RM1.log()
    weight_RM1 = weight_RM1.masked_fill(tail_RM1 <= 0, float("-inf"))
    weight_RMX = torch.cat([weight_RMK, weight_RM1], -1)
    empty_RM1 = weight_RMX.isinf().all(-1, keepdim=True)
    mixed_RMX = weight_RMX.masked_fill(empty_RM1, 0.0).softmax(-1)
    p_RMX = torch.cat([classes.p_RMK, tail_RM1], -1)
    p_RMX = torch.where(empty_RM1, p_RMX, mixed_RMX)
    return Classes(
        p_RMX[..., :-1], p_RMX[..., -1], classes.q_RMK, classes.logq_RMK, classes.rest_RM
    )
