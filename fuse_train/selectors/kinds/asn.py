"""Selector asn: the adaptive selection network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from fuse_train.selectors.kind import LearnedKind, LearnedOptions

if TYPE_CHECKING:
    from fuse_train.selectors.selectors import Selector

_PRESETS: dict[str, dict[str, Any]] = {
    "fusion-x": {
        "granularity": "segment",
        "cut": "threshold",
        "threshold": 0.15,
        "objective": "fusion",
        "lr": 1e-3,
    }
}


class AsnSection(LearnedOptions):
    """The adaptive selection network, and the constant gate: which source counts, by position."""

    preset: Literal["fusion-x"] | None = None
    """fusion-x: the paper's network (rewards of the segment in, M -> 2M -> M -> M) with its threshold
    0.15, trained through the fusion loss; fields given beside it win. Its feedback weight is 0.5
    (`train.feedback_weight`), its lambda 0.9 (`train.clm_weight`)."""
    untrained: bool = False
    """With `preset: fusion-x`, what its public code does: the network is made again for every batch and
    never trained, so its choice is a random one. To compare with."""
    hidden_size: int = Field(default=32, gt=0, le=4096)
    """Width of the scorer's two hidden layers."""
    granularity: Literal["span", "position", "segment"] = "span"
    """One choice where no source is inside a token, kept until the next such place (with one tokenizer
    for all, every position); one per position; or one per segment, in hindsight."""
    features: Literal["past"] = "past"
    """Only what happened before a row is looked at; the row's own distributions know too much."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset")
        below = _PRESETS[name] if name in list(_PRESETS) else {}
        if given.get("untrained"):
            below = below | {"pretrain_steps": 0}
        return {**below, **given}

    @model_serializer(mode="wrap")
    def _as_before_one_could_choose(self, plainly: Any) -> dict[str, Any]:
        fields: dict[str, Any] = plainly(self)
        if not self.untrained:
            del fields["untrained"]  # fingerprints of runs stay
        return fields

    @model_validator(mode="after")
    def _untrained_is_not_trained(self) -> Self:
        if self.untrained and (self.preset is None or self.pretrain_steps or self.start_from):
            raise ValueError(
                "untrained needs preset: fusion-x, pretrain_steps: 0 and no start_from"
            )
        return self


class Asn(LearnedKind):
    """Adaptive selection network, ours; `asn.preset: fusion-x` (hindsight) is the paper's."""

    section = AsnSection
    always_in_fingerprint = True
    tried_without = True
    made_of = ("hedge",)

    def needs_features(self, options: AsnSection) -> bool:
        """The paper's network looks at rewards alone."""
        return options.preset is None

    def network(self, options: AsnSection, num_sources: int) -> Selector:
        """As `LearnedKind.network` says."""
        from fuse_train.selectors.asn import SharedScorer
        from fuse_train.selectors.gates import RewardNetwork

        if options.preset == "fusion-x":
            return RewardNetwork(options, num_sources)
        return SharedScorer(options)
