"""What a selector is to the rest of the program: by rule, trained, or searched for.

Nothing here needs torch: the file of a selector is read with the run file. Torch is imported where
weights are made.
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
    """Whether it is searched for on the labels of the valid split."""
    hindsight: ClassVar[bool] = False
    """Whether weights of a row depend on its label or later ones, with default options."""
    given: ClassVar[bool] = False
    """Whether it needs options that have no default: it is compared with others where the run file has
    them."""
    tried_without: ClassVar[bool] = False
    """Whether `eval pool` also tells what its pool would score without each source."""

    @property
    def summary(self) -> str:
        return super().summary + " (hindsight)" * self.hindsight

    def needs_features(self, options: Any) -> bool:
        """Whether it looks at `SourceView.features_BTMF`, which are not made otherwise."""
        return False

    def check(self, options: Any) -> None:
        """Refuse options that it cannot work with, when it is chosen.

        Raises:
            ValueError: Says what it needs.
        """


class RuleKind(SelectorKind):
    """A selector that needs no training: `weights` is all there is to it."""

    def weights(self, view: SourceView, options: Any) -> torch.Tensor:
        """Weights [B, T, M] float32, as `selectors.Selector` says."""
        raise NotImplementedError

    def make(self, options: Any, sources: Sequence[str]) -> Selector:
        """The selector.

        Args:
            options: Its own, of the run file.
            sources: Names in the run file's order.

        Raises:
            ConfigError: Options that do not fit the sources.
        """
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
    """What trains it: the pool's NLL of the label, the fusion loss of the target, or both."""
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate of the scorer."""
    pretrain_steps: int = Field(default=300, ge=0)
    """Steps on the stores alone before the target is trained; 0 starts it untrained."""
    pretrain_batch_segments: int = Field(default=32, gt=0)
    """Segments of one such step."""
    start_from: PathText | None = None
    """Folder of a trained selector to start from instead of pretraining."""
    frozen: bool = False
    """Whether the selector of `start_from` stays as it is while the target is trained."""

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
    """Fields of the train section, besides its own, that a trained one depends on."""

    def network(self, options: Any, num_sources: int) -> Selector:
        """An untrained one, such as an `asn.AdaptiveSelector`; torch's generator gives its weights.

        Args:
            options: Its own, a subclass of `LearnedOptions`.
            num_sources: For those that are bound to their sources.
        """
        raise NotImplementedError


class SearchedKind(SelectorKind):
    """A selector that is found by trying some on the labels of the valid split."""

    searches = True

    def trials(self, options: Any) -> int:
        """How many are tried, at most."""
        raise NotImplementedError

    def search(
        self,
        options: Any,
        logprobs_RM: npt.NDArray[np.float64],
        seed: int,
        on_trial: Callable[[int, float], None] | None,
    ) -> Selector:
        """The best that was found.

        Args:
            options: Its own.
            logprobs_RM: Nats of labels that every source knows, by source.
            seed: The same seed finds the same.
            on_trial: Told the number of trials done and the least NLL so far in nats per row.
        """
        raise NotImplementedError
