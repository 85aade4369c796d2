"""Which entries the source is asked to go on from: `extract.branches` of the run file."""

from __future__ import annotations

from pydantic import Field

from store_schema.config import StrictModel


class BranchOptions(StrictModel):
    """Branches: rows of what the source would say after an entry that is not the real token."""

    per_position: float = Field(default=0.3, gt=0, le=64, allow_inf_nan=False)
    """Branches of a shard over its positions, at most. Each is one more row to compute and store."""
    min_mass: float = Field(default=0.01, gt=0, lt=1)
    """Only entries of at least this probability get a branch."""
