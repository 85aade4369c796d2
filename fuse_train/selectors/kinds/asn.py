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
    """Options of the adaptive selection network, and of the constant gate."""

    preset: Literal["fusion-x"] | None = None
    """fusion-x: the paper's network (on rewards of the segment; M -> 2M -> M -> M) with its threshold
    0.15, trained through the fusion loss; other fields override it. The paper's feedback weight is 0.5
    (`train.feedback_weight`), its lambda 0.9 (`train.clm_weight`)."""
    untrained: bool = False
    """With `preset: fusion-x`, as in its public code: the network is created again for every batch and
    never trained, so its weights are random. For comparison."""
    hidden_size: int = Field(default=32, gt=0, le=4096)
    """Width of the scorer's two hidden layers."""
    granularity: Literal["span", "position", "segment"] = "span"
    """Weights per span, which begins where no source is inside a token (with one tokenizer for all,
    every position); per position; or per segment, in hindsight."""
    features: Literal["past"] = "past"
    """Features of earlier rows only: those of the row's own distributions would leak the label. The
    only value; it stays because resolved run files and fingerprints have it."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        name = fields.get("preset")
        below = _PRESETS[name] if name in list(_PRESETS) else {}
        if fields.get("untrained"):
            below = below | {"pretrain_steps": 0}
        return {**below, **fields}

    @model_serializer(mode="wrap")
    def _without_default_untrained(self, serialize: Any) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.untrained:
            del fields["untrained"]  # keeps fingerprints from before this option existed
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
        """The paper's network reads rewards alone."""
        return options.preset is None

    def network(self, options: AsnSection, num_sources: int) -> Selector:
        """See `LearnedKind.network`."""
        from fuse_train.selectors.asn import SharedScorer
        from fuse_train.selectors.gates import RewardNetwork

        if options.preset == "fusion-x":
            return RewardNetwork(options, num_sources)
        return SharedScorer(options)
