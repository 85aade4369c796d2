"""How much a store keeps: which entries, and how finely. The section `store` of the run file.

Entries: a position keeps its best entries until they hold `top_p` of the mass, at least
`min_entries`, and every entry of probability `floor` or more; never more than the engine's top_k.
What is left is tail mass. A floor is the best use of a byte: leaving out an entry costs total
variation of about its probability, whichever position it stands at.

Log-probabilities: kept in steps that are even in the square root of the probability, because the KL
divergence that a step of d nats costs is p d^2 / 24, so each entry then costs the same. A step never
grows past `max_step` nats.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from store_schema.config import SectionModel, StrictModel

Preset = Literal["exact", "fine", "compact", "tiny"]

TailPolicy = Literal["bucket", "drop", "renormalise"]
"""Of mass outside the entries: a class of its own, ignored, or spread over the entries."""


class Selection(StrictModel):
    """Which entries a position keeps."""

    top_p: float = Field(default=1.0, ge=0, le=1)
    """Mass at which entries stop, the one that reaches it included; 1 keeps all, 0 leaves it to
    the other two."""
    min_entries: int = Field(default=1, ge=1)
    """Best entries that are always kept."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """Entries of this probability or more are always kept; 0 leaves it to the other two."""

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever left out."""
        return self.top_p == 1


class Steps(StrictModel):
    """How finely log-probabilities are kept."""

    step: float = Field(ge=1e-4, le=0.5)
    """Nats between neighbours at probability 1; grows as 1 / sqrt(p)."""
    max_step: float = Field(ge=1e-4, le=0.5)
    """Nats between neighbours at most: no entry is off by more."""
    label_step: float = Field(ge=1e-6, le=0.5)
    """Nats between neighbours of the label's own log-probability: half of it is the error."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.max_step < self.step:
            raise ValueError("max_step must not be smaller than step")
        return self


class Encoding(StrictModel):
    """What a store keeps of each position; part of its manifest."""

    selection: Selection = Selection()
    steps: Steps | None = None
    """None keeps float32 as it is."""


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
"""Every entry that is left out has a probability below the floor; every one that is kept is off by
at most min(max_step, step / sqrt(p)) nats, p the smaller of what it was and what it is read as."""


class StoreSection(SectionModel):
    """How stores are encoded, source stores and aligned ones alike."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    preset: Preset = "fine"
    """exact: all entries, float32. fine, compact, tiny: fewer bytes, see docs/store.md."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Instead of the preset's, like the fields below: mass at which entries stop."""
    min_entries: int | None = Field(default=None, ge=1)
    """Best entries that are always kept."""
    floor: float | None = Field(default=None, ge=0, lt=1)
    """Probability from which an entry is always kept."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        given = self.floor is not None or self.min_entries is not None
        if given and self.encoding().selection.keeps_all:
            raise ValueError(
                "floor and min_entries leave nothing out while top_p is 1, which keeps all "
                "(preset exact): give a smaller top_p, 0 to go by the floor alone"
            )
        return self

    def encoding(self, estimator: str = "topk") -> Encoding:
        """The preset with what was given put over it.

        Args:
            estimator: Of the store. A sampled one keeps every entry: leaving some out is a bias.
        """
        preset = PRESETS[self.preset]
        given = {
            name: value
            for name in ("top_p", "min_entries", "floor")
            if (value := getattr(self, name)) is not None
        }
        selection = preset.selection.model_copy(update=given)
        if estimator == "sampled":
            selection = Selection()
        return preset.model_copy(update={"selection": selection})
