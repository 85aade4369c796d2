"""How far a target's distribution is from a source's, on the source's entries and their tail.

Every divergence is seen over K + 1 classes: the entries of the source, and one bucket for all
other tokens, of mass t under the source and `rest` = 1 - sum q_k under the target. It comes with
its slope to the target's log-probabilities at the entries,

    g_k = d D / d log q_k    with rest = 1 - sum_j exp(log q_j),

which is all that the gradient of the logits needs: dD / dz_j = [j is entry k] g_k - q_j * sum_k g_k.
An entry that is not there has p = q = 0, log q = 0, and gets slope 0.

Shape suffixes: R rows, M sources, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuse_train.loss_config import DivergenceName

MIN_PROBABILITY = 1e-12
"""What a source holds for impossible counts as this much where its logarithm is asked for."""


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


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence D(P_m, Q), and what is done to P_m and Q before it.

    Args:
        name: See `value_and_slope`.
        jsd_beta: Weight of the source in the mixture of jsd, between 0 and 1.
        target_temperature: The target's logits are divided by it, and D is multiplied by its square
            so that gradients keep their size (Hinton et al. 2015, 1503.02531, section 2).
        source_share: None compares with the source; a number from 0 to 1 compares with the
            distribution that far on the way from the target to the source (TAID), see `interpolated`.
    """

    name: DivergenceName = "cross_entropy"
    jsd_beta: float = 0.5
    target_temperature: float = 1.0
    source_share: float | None = None

    def value_and_slope(self, classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
        """D [R, M] in nats, and g [R, M, K]; the temperature is the caller's business.

        cross_entropy: FuseLLM (2401.10491) eq. 5 with D = CE.
        kl: the same less the source's entropy: same gradient, 0 where both agree.
        reverse_kl: KL(Q, P), which seeks modes (MiniLLM, 2306.08543, here token by token).
        jsd: beta KL(P, M) + (1 - beta) KL(Q, M), M = beta P + (1 - beta) Q (GKD, 2306.13649).
        uld: sum of |p_k - q_k| over classes; with K the target's own most probable tokens it compares
            sorted distributions without a vocabulary map (ULD, 2402.12030). Departure: what is
            beyond the K most probable is one class; the paper pads the shorter vocabulary with zeros.
        """
        if self.source_share is not None:
            classes = interpolated(classes, self.source_share)
        if self.name == "cross_entropy":
            return _cross_entropy(classes)
        if self.name == "kl":
            return _kl(classes)
        if self.name == "reverse_kl":
            return _reverse_kl(classes)
        if self.name == "jsd":
            return _jsd(classes, self.jsd_beta)
        return _sorted_distance(classes)


def interpolated(classes: Classes, share: float) -> Classes:
    """The classes with P replaced by the normalised q^(1 - share) * p^share, held constant.

    Source: TAID (2501.16937), softmax of interpolated logits, which is this normalised geometric
    mean. Departure: over the K + 1 classes instead of the whole vocabulary, and the share is a
    function of the step (a schedule), not of earlier losses.

    A row on which the source says nothing stays as it is.
    """
    logp_RMK = classes.p_RMK.log()
    weight_RMK = (1 - share) * classes.logq_RMK + share * logp_RMK
    weight_RMK = weight_RMK.masked_fill(classes.p_RMK <= 0, float("-inf"))
    tail_RM1 = classes.tail_RM[..., None]
    weight_RM1 = (1 - share) * classes.rest_RM[..., None].log() + share * tail_RM1.log()
    weight_RM1 = weight_RM1.masked_fill(tail_RM1 <= 0, float("-inf"))
    weight_RMX = torch.cat([weight_RMK, weight_RM1], -1)
    silent_RM1 = weight_RMX.isinf().all(-1, keepdim=True)
    mixed_RMX = weight_RMX.masked_fill(silent_RM1, 0.0).softmax(-1)
    p_RMX = torch.cat([classes.p_RMK, tail_RM1], -1)
    p_RMX = torch.where(silent_RM1, p_RMX, mixed_RMX)
    return Classes(
        p_RMX[..., :-1], p_RMX[..., -1], classes.q_RMK, classes.logq_RMK, classes.rest_RM
    )


def _cross_entropy(c: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    value_RM = -(c.p_RMK * c.logq_RMK).sum(-1) - c.tail_RM * c.rest_RM.log()
    return value_RM, c.q_RMK * (c.tail_RM / c.rest_RM)[..., None] - c.p_RMK


def _kl(c: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    value_RM, slope_RMK = _cross_entropy(c)
    entropy_RM = -torch.xlogy(c.p_RMK, c.p_RMK).sum(-1) - torch.xlogy(c.tail_RM, c.tail_RM)
    return value_RM - entropy_RM, slope_RMK


def _reverse_kl(c: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    excess_RMK = c.logq_RMK - c.p_RMK.clamp(min=MIN_PROBABILITY).log()
    excess_RM = c.rest_RM.log() - c.tail_RM.clamp(min=MIN_PROBABILITY).log()
    value_RM = (c.q_RMK * excess_RMK).sum(-1) + c.rest_RM * excess_RM
    return value_RM, c.q_RMK * (excess_RMK - excess_RM[..., None])


def _jsd(c: Classes, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    tiny = torch.finfo(c.q_RMK.dtype).tiny
    logmix_RMK = (beta * c.p_RMK + (1 - beta) * c.q_RMK).clamp(min=tiny).log()
    logmix_RM = (beta * c.tail_RM + (1 - beta) * c.rest_RM).log()
    excess_RMK, excess_RM = c.logq_RMK - logmix_RMK, c.rest_RM.log() - logmix_RM
    of_source_RM = (torch.xlogy(c.p_RMK, c.p_RMK) - c.p_RMK * logmix_RMK).sum(-1)
    of_source_RM += torch.xlogy(c.tail_RM, c.tail_RM) - c.tail_RM * logmix_RM
    of_target_RM = (c.q_RMK * excess_RMK).sum(-1) + c.rest_RM * excess_RM
    slope_RMK = (1 - beta) * c.q_RMK * (excess_RMK - excess_RM[..., None])
    return beta * of_source_RM + (1 - beta) * of_target_RM, slope_RMK


def _sorted_distance(c: Classes) -> tuple[torch.Tensor, torch.Tensor]:
    over_RMK, over_RM = c.q_RMK - c.p_RMK, c.rest_RM - c.tail_RM
    slope_RMK = c.q_RMK * (over_RMK.sign() - over_RM.sign()[..., None])
    return over_RMK.abs().sum(-1) + over_RM.abs(), slope_RMK
