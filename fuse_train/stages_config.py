"""The `stages` part of the train section: the corpora's weights in each part of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from store_schema.config import RunConfig, StrictModel
from store_schema.errors import ConfigError


class StageSection(StrictModel):
    """One stage of a training; the learning rate has one schedule over all stages."""

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1)
    """Weight of a corpus's rows in the loss, by name (`corpus.inputs[].corpus`); 0, or no entry, leaves
    the corpus out."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the texts with a weight above 0."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; None means as many as `epochs` takes."""
    clm_weight: float | None = Field(default=None, ge=0, le=1)
    """lambda in this stage; None takes `train.clm_weight`. ProFuser's beta is (1 - lambda) / lambda."""

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("no corpus has a weight above 0")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs != 1.0:
            raise ValueError("epochs and steps of a stage: give one of them")
        return self

    @property
    def corpora(self) -> frozenset[str]:
        """Corpora with a weight above 0."""
        return frozenset(name for name, weight in self.weights.items() if weight > 0)


def check_stages(run: RunConfig, stages: Sequence[StageSection]) -> None:
    """Refuse stages with names that no input of the run file has; those of `data_dir` are not known.

    Raises:
        ConfigError: A stage has a weight for such a name.
    """
    inputs = getattr(run.sections.get("corpus"), "inputs", ())
    if run.data_dir is not None or not inputs:
        return
    known = {entry.corpus for entry in inputs} - {None}
    for number, stage in enumerate(stages):
        unknown = sorted(set(stage.weights) - known)
        if unknown:
            raise ConfigError(
                "a stage names a corpus that no input has",
                where=f"train.stages[{number}].weights",
                expected=", ".join(sorted(known)) or "inputs with a name",
                got=", ".join(unknown),
                hint="name inputs by corpus.inputs[].corpus before the corpus is built",
            )
