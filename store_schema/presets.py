"""Section `store` of the run file: which entries a store keeps, and how precisely.

Entries: a position keeps its most probable entries until their sum reaches `top_p`, at least
`min_entries`, and every entry of probability `floor` or more; never more than the engine's top_k. The
rest is tail mass. A floor gives the least error for a given size: removing an entry adds about its
probability to the total variation, at any position.

Log-probabilities: rounded to steps that are even in the square root of the probability. A step of d
nats adds p d^2 / 24 to the KL divergence, which is then the same for each entry. No step is above
`max_step` nats.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from store_schema.config import SectionModel, StrictModel

Preset = Literal["exact", "fine", "compact", "tiny"]

TailPolicy = Literal["bucket", "drop", "renormalise"]
"""How the fusion loss treats tail mass: as one class, ignored, or spread over the entries."""


class Selection(StrictModel):
    """Which entries a position keeps."""

    top_p: float = Field(default=1.0, ge=0, le=1)
    """Keep the most probable entries until their sum reaches this; 1 keeps all, 0 keeps only what the
    other two fields keep."""
    min_entries: int = Field(default=1, ge=1)
    """Most probable entries that are always kept."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """Entries of this probability or more are always kept; 0 keeps none by this rule."""

    @property
    def keeps_all(self) -> bool:
        """Whether all entries are kept."""
        return self.top_p == 1


class Steps(StrictModel):
    """Rounding of log-probabilities."""

    step: float = Field(ge=1e-4, le=0.5)
    """Nats between neighbouring values at probability 1; grows as 1 / sqrt(p)."""
    max_step: float = Field(ge=1e-4, le=0.5)
    """Nats between neighbouring values, at most: the largest error of an entry."""
    label_step: float = Field(ge=1e-6, le=0.5)
    """Nats between neighbouring values of a label's log-probability: its error is at most half of
    it."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.max_step < self.step:
            raise ValueError("max_step must not be smaller than step")
        return self


class Encoding(StrictModel):
    """What a store keeps of each position; part of its manifest."""

    selection: Selection = Selection()
    steps: Steps | None = None
    """None stores float32 without rounding."""


PRESETS: dict[Preset, Encoding] = {
    "exact": Encoding(),
    "fine": Encoding(
        selection=Selection(top_p=0.99, min_entries=8, floor=1e-4),
        steps=Steps(step=0.004, max_step=0.05, label_step=2**-10),
    ),
    "compact": Encoding(
        selection=Selection(top_p=0.0, min_entries=4, floor=1e-3),
        steps=Steps(step=0.01, max_step=0.3, label_step=2**-8),
    ),
    "tiny": Encoding(
        selection=Selection(top_p=0.0, min_entries=2, floor=4e-3),
        steps=Steps(step=0.02, max_step=0.4, label_step=2**-6),
    ),
}
"""Every removed entry has a probability below the floor. The error of every kept entry is at most
min(max_step, step / sqrt(p)) nats, p the smaller of its true and its decoded probability."""


class StoreSection(SectionModel):
    """How stores are encoded, source stores and aligned ones alike."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    preset: Preset = "fine"
    """exact: all entries, float32. fine, compact, tiny: fewer bytes, see docs/store.md."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Replaces the preset's value, like the fields below: keep entries until their sum reaches this."""
    min_entries: int | None = Field(default=None, ge=1)
    """Most probable entries that are always kept."""
    floor: float | None = Field(default=None, ge=0, lt=1)
    """Entries of this probability or more are always kept."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        limits = self.floor is not None or self.min_entries is not None
        if limits and self.encoding().selection.keeps_all:
            raise ValueError(
                "floor and min_entries have no effect while top_p is 1, which keeps all entries "
                "(preset exact): give a smaller top_p, or 0 to use the floor alone"
            )
        return self

    def encoding(self, estimator: str = "topk") -> Encoding:
        """The preset's encoding with the section's own values.

        Args:
            estimator: The store's. A sampled store keeps every entry: removing some would bias it.
        """
        preset = PRESETS[self.preset]
        own = {
            name: value
            for name in ("top_p", "min_entries", "floor")
            if (value := getattr(self, name)) is not None
        }
        selection = preset.selection.model_copy(update=own)
        if estimator == "sampled":
            selection = Selection()
        return preset.model_copy(update={"selection": selection})
