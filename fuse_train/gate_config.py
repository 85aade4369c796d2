"""The `fusion_gate` part of the train section: where the fusion loss counts, and how much."""

from __future__ import annotations

from typing import Literal

from store_schema.config import StrictModel


class FusionGateSection(StrictModel):
    """How much of its weight (1 - `clm_weight`) the fusion loss keeps; ground truth gets the rest."""

    kind: Literal["none", "held_out", "posterior"] = "posterior"
    """none keeps all of it everywhere. held_out keeps in each domain the weight that the sources'
    pool has in its best mixture with the target on the valid split, measured at each evaluation: it
    falls as the target learns what the sources know, and to 0 where it has overtaken them. posterior
    takes that weight as the prior, and keeps at each token the posterior probability that its label is
    the pool's and not the target's, as the target predicted it when it first read the text."""

    @property
    def measures(self) -> bool:
        """Whether evaluations measure the pool's weight in each domain."""
        return self.kind != "none"
