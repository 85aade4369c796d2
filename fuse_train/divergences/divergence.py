"""A divergence as a training step uses it: its kind, options, temperature and TAID's share.

It comes with its slope to the target's log-probabilities at the entries,

    g_k = d D / d log q_k    with rest = 1 - sum_j exp(log q_j),

which is all that the gradient of the logits needs: dD / dz_j = [j is entry k] g_k - q_j * sum_k g_k.

Shape suffixes: R rows, M sources, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fuse_train.divergences import DIVERGENCES
from fuse_train.divergences.classes import Classes, interpolated


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence D(P_m, Q), and what is done to P_m and Q before it.

    Args:
        name: Name in the registry.
        options: Its options, from the run file.
        target_temperature: The target's logits are divided by it, and D is multiplied by its square
            so that gradients keep their size (Hinton et al. 2015, 1503.02531, section 2).
        source_share: None compares with the source; a number from 0 to 1 compares with the
            distribution that far on the way from the target to the source (TAID), see `interpolated`.
    """

    name: str = "cross_entropy"
    options: Any = None
    target_temperature: float = 1.0
    source_share: float | None = None

    @property
    def sorts(self) -> bool:
        """Whether both sides are sorted first."""
        return DIVERGENCES[self.name].sorts

    def value_and_slope(self, classes: Classes) -> tuple[torch.Tensor, torch.Tensor]:
        """D [R, M] in nats, and g [R, M, K]; the caller applies `target_temperature`."""
        if self.source_share is not None:
            classes = interpolated(classes, self.source_share)
        return DIVERGENCES[self.name].value_and_slope(classes, self.options)
