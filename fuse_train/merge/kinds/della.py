"""Method della."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from fuse_train.merge.deltas import DeltaKind, SparseOptions

if TYPE_CHECKING:
    import torch

    from fuse_train.merge.kind import Block


class DellaSection(SparseOptions):
    """Method della."""

    epsilon: float = Field(default=0.15, ge=0)
    """The probability of being kept goes from density - epsilon (the smallest entry of a row) to
    density + epsilon (the largest). Half the paper's epsilon."""
    normalize: bool = True
    """Mean of the entries that count, not their sum."""
    rescale: bool = True
    """Divide each entry that is kept by its probability."""

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1 and not 0 < low <= high <= 1:
            raise ValueError(
                f"density {self.density} - epsilon {self.epsilon} must be above 0, their sum 1 at most"
            )
        return self


class Della(DeltaKind):
    """Mean of differences that agree in sign, entries dropped at random, small ones more often.

    Drop: in each row of n entries the one of rank r by magnitude (0 the smallest) is kept with
    probability p = density - epsilon + 2 epsilon r / (n - 1), and divided by p. Elect and merge as in
    ties. density 1 drops nothing. A tensor of one axis is one row.

    mergekit brings the kept entries to the magnitude of all instead of dividing each by its p.

    Source: Deep et al., 2024 (MagPrune).
    """

    section = DellaSection
    elects = True
    whole_rows = True
    draws = True
    paper = "arXiv 2406.11617"

    def sparse(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        if options.density == 1:
            return block.deltas()
        from fuse_train.merge.draws import uniform

        deltas_KE = block.deltas()
        for k, delta_E in enumerate(deltas_KE):
            kept_E = keep_probabilities(delta_E, block.row_length, options)
            drawn_E = uniform(
                block.name, seed=block.seed, model=k, start=block.start, count=len(delta_E)
            )
            delta_E.mul_(drawn_E < kept_E)
            if options.rescale:
                delta_E.div_(kept_E)
        return deltas_KE


def keep_probabilities(
    delta_E: torch.Tensor, row_length: int, options: DellaSection
) -> torch.Tensor:
    """Probability that each entry is kept, float32 [E]; of equal entries the first ranks lower."""
    import torch

    rows = delta_E.abs().view(-1, row_length)
    if row_length == 1:
        return torch.full_like(delta_E, options.density)
    order = rows.argsort(dim=1, stable=True)
    steps = torch.linspace(
        options.density - options.epsilon, options.density + options.epsilon, row_length
    )
    return torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows)).view(-1)
