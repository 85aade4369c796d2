"""The recipe of a merge: method, weights, seed, dtype, and the method's own options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fuse_train.merge import MERGES
from fuse_train.merge.kind import MergeKind
from store_schema.config import ModelRef, StrictModel
from store_schema.errors import ConfigError
from store_schema.validation import validation_line


class MergeSettings(StrictModel):
    """A recipe; options of a method are in a further field with the method's name."""

    method: Annotated[str, MERGES.choice]
    """Name of the method."""
    weights: tuple[float, ...] | None = Field(default=None, min_length=1)
    """One for each model, in their order; None takes 1 for each."""
    dtype: str = "auto"
    """dtype of the merged weights; 'auto' keeps the base's, tensor by tensor (the first model's, if the
    method has no base)."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of methods that drop entries at random."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        try:
            return ModelRef(model="-", dtype=dtype).dtype
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

    @property
    def kind(self) -> MergeKind:
        """The method."""
        return MERGES[self.method]

    @property
    def options(self) -> Any:
        """The method's own options; None where it has none."""
        return getattr(self, self.kind.field) if self.kind.section is not None else None

    def weights_of(self, num_models: int) -> tuple[float, ...]:
        """A weight for each model, from the recipe or the method's default."""
        return self.weights or (self.kind.default_weight,) * num_models

    def content(self) -> dict[str, Any]:
        """What shapes the merged weights, for fingerprints and the model card."""
        left_out = MERGES.left_out(self.method)
        if not self.kind.draws:
            left_out.add("seed")
        if not self.kind.weighted:
            left_out.add("weights")
        return self.model_dump(mode="json", exclude=left_out)

    def require_models(self, num_models: int, *, with_base: bool) -> None:
        """Refuse models that the method cannot merge.

        Args:
            num_models: Without the base.
            with_base: Whether there is one.

        Raises:
            ConfigError: Wrong number of models, a base missing or not used, weights that do not fit.
        """
        kind, where = self.kind, f"merge by {self.method}"
        if kind.needs_base and not with_base:
            raise ConfigError(
                "the method merges differences from a base", where=where, expected="--base FOLDER"
            )
        if with_base and not kind.needs_base:
            raise ConfigError(
                "the method has no base", where=where, hint="give all models without --base"
            )
        most = num_models if kind.most is None else kind.most
        if not kind.fewest <= num_models <= most:
            bound = str(kind.fewest) if kind.fewest == kind.most else f"{kind.fewest} or more"
            raise ConfigError(
                "the method needs another number of models",
                where=where,
                expected=bound + (" beside the base" if kind.needs_base else ""),
                got=num_models,
            )
        if self.weights is not None and not kind.weighted:
            raise ConfigError("the method takes no weights", where=where, got=list(self.weights))
        if self.weights is not None and len(self.weights) != num_models:
            raise ConfigError(
                "weights do not fit the models",
                where=where,
                expected=f"{num_models}, one for each model",
                got=len(self.weights),
            )
        try:
            kind.check(self.options, self.weights_of(num_models))
        except ValueError as error:
            raise ConfigError("recipe refused", where=where, got=str(error)) from error


def parse_recipe(fields: dict[str, Any]) -> MergeSettings:
    """Validate a recipe.

    Args:
        fields: Fields of `MergeSettings`, and options under the names of methods.

    Raises:
        ConfigError: A field is unknown or its value refused.
    """
    try:
        return MERGES.with_options(MergeSettings).model_validate(fields)
    except ValidationError as error:
        raise ConfigError("recipe refused", where="merge", got=validation_line(error)) from error
