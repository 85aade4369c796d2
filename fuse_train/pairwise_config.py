"""The `pairwise` part of the train section: one training for each pair of models, then a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fuse_train.merge import MERGES
from fuse_train.merge.recipe import MergeSettings
from store_schema.config import StrictModel

if TYPE_CHECKING:
    MergeRecipe = MergeSettings
else:
    MergeRecipe = MERGES.with_options(MergeSettings)


class PairwiseSection(StrictModel):
    """FuseChat's recipe: the pivot is fused with each other source alone; the models are merged."""

    pivot: str = Field(min_length=1)
    """The source that is in every pair: the target itself (`base: target` under `sources`)."""
    merge: MergeRecipe = MergeRecipe(method="sce")
    """How the trained models become one, as `logitfuse merge` does; the target is the base."""
