"""The `stages` part of the train section: which corpora count when, and how much."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from store_schema.config import StrictModel


class StageSection(StrictModel):
    """One stage of a training; stages follow each other in one run of the learning rate."""

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1)
    """What a text counts, by the name of its input (`corpus.inputs[].corpus`); 0, or no name here,
    leaves its corpus out."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the texts that count."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; None means as many as `epochs` takes."""
    clm_weight: float | None = Field(default=None, ge=0, le=1)
    """lambda in this stage; None takes `train.clm_weight`. ProFuser's beta is (1 - lambda) / lambda."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("no corpus has a weight above 0")
        return self

    @property
    def corpora(self) -> frozenset[str]:
        """Those that count."""
        return frozenset(name for name, weight in self.weights.items() if weight > 0)
