"""Base classes of selectors: by rule, trained, or searched for.

A selector's file is imported when a run file is read, so it imports torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from store_schema.config import StrictModel
from store_schema.paths import PathText
from store_schema.registry import Kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from fuse_train.selectors.selectors import Selector, SourceView


class SelectorKind(Kind):
    """Base of all selectors; subclass one of the three below."""

    learns: ClassVar[bool] = False
    """Whether it has parameters that gradients train."""
    searches: ClassVar[bool] = False
    """Whether its weights are searched for on the labels of the valid split."""
    hindsight: ClassVar[bool] = False
    """Whether weights of a row depend on its label or later ones, with default options."""
    needs_options: ClassVar[bool] = False
    """Whether it has options without a default; it is compared with others if the run file has them."""
    tried_without: ClassVar[bool] = False
    """Whether `eval pool` also scores its pool without each source."""

    @property
    def summary(self) -> str:
        return super().summary + " (hindsight)" * self.hindsight

    @property
    def by_rule(self) -> bool:
        """Whether `make` gives it: it is neither trained nor searched for."""
        return not (self.learns or self.searches)

    def make(self, options: Any, sources: Sequence[str]) -> Selector:
        """Make the selector, which must be one by rule.

        Args:
            options: Its options, from the run file.
            sources: Names in the run file's order.

        Raises:
            ConfigError: Options that do not fit the sources.
        """
        raise TypeError(f"selector {self.name} has to be trained or searched for")

    def needs_features(self, options: Any) -> bool:
        """Whether it reads `SourceView.features_BTMF`, which are computed only then."""
        return False

    def check(self, options: Any) -> None:
        """Refuse options that it cannot work with; called when it is chosen.

        Raises:
            ValueError: The message says what it needs.
        """


class RuleKind(SelectorKind):
    """A selector that needs no training: subclasses need only `weights`."""

    def weights(self, view: SourceView, options: Any) -> torch.Tensor:
        """Weights [B, T, M] float32, as `selectors.Selector` defines them."""
        raise NotImplementedError

    def make(self, options: Any, sources: Sequence[str]) -> Selector:
        """See `SelectorKind.make`."""
        from fuse_train.selectors.rule import RuleSelector

        return RuleSelector(self, options)


class LearnedOptions(StrictModel):
    """Options that every selector that learns has."""

    cut: Literal["threshold", "top_p", "none"] = "threshold"
    """Which sources are kept at a position: those above `threshold`, the fewest whose gates sum to
    `top_p`, or all; the best one always."""
    threshold: float = Field(default=0.005, ge=0, lt=1)
    """Sources whose gate is not above it are dropped at that position (the best one never is)."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Share of the gates that is kept by cut top_p."""
    objective: Literal["pool", "fusion", "both"] = "pool"
    """Loss that trains it: the pool's NLL of the label, the fusion loss of the target, or both."""
    lr: float = Field(default=1e-2, gt=0)
    """Its peak learning rate."""
    pretrain_steps: int = Field(default=300, ge=0)
    """Steps on the stores alone before the target is trained; 0 starts it untrained."""
    pretrain_batch_segments: int = Field(default=32, gt=0)
    """Segments of one such step."""
    start_from: PathText | None = None
    """Folder of a trained selector to start from instead of pretraining."""
    frozen: bool = False
    """Whether the selector of `start_from` is not trained further while the target is."""

    @model_validator(mode="after")
    def _frozen_is_trained(self) -> Self:
        if self.frozen and self.start_from is None:
            raise ValueError("frozen needs start_from: an untrained selector would stay so")
        return self


class LearnedKind(SelectorKind):
    """A selector that is trained: on the stores first, then beside the target."""

    learns = True
    section = LearnedOptions
    made_of: ClassVar[tuple[str, ...]] = ()
    """Fields of the train section, besides its own, that its trained weights depend on."""

    def network(self, options: Any, num_sources: int) -> Selector:
        """Make an untrained selector, such as an `asn.AdaptiveSelector`, with torch's random generator.

        Args:
            options: Its options, a subclass of `LearnedOptions`.
            num_sources: Number of sources, for selectors that are bound to them.
        """
        raise NotImplementedError


class SearchedKind(SelectorKind):
    """A selector whose weights are searched for on the labels of the valid split."""

    searches = True

    def trials(self, options: Any) -> int:
        """Most weights that are tried."""
        raise NotImplementedError

    def search(
        self,
        options: Any,
        logprobs_RM: npt.NDArray[np.float64],
        seed: int,
        on_trial: Callable[[int, float], None] | None,
    ) -> Selector:
        """Search, and return the selector with the lowest NLL.

        Args:
            options: Its options.
            logprobs_RM: Log-probabilities (nats) of labels that every source knows.
            seed: Seed of the search; the same seed gives the same result.
            on_trial: Called with the number of trials done and the lowest NLL so far, nats per row.
        """
        raise NotImplementedError
