"""The `fusion_gate` part of the train section: where the fusion loss counts, and how much."""

from __future__ import annotations

from typing import Literal

from store_schema.config import StrictModel


class FusionGateSection(StrictModel):
    """How much of its weight (1 - `clm_weight`) the fusion loss keeps; ground truth gets the rest."""

    kind: Literal["none", "held_out"] = "held_out"
    """none keeps all of it everywhere. held_out keeps in each domain the weight that the sources'
    pool has in its best mixture with the target on the valid split, measured at each evaluation: it
    falls as the target learns what the sources know, and to 0 where it has overtaken them."""
