"""The `loss` part of the train section: what is compared, how, and how that changes over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fuse_train.divergences import DIVERGENCES
from store_schema.config import StrictModel

if TYPE_CHECKING:
    DivergenceOptions = StrictModel
else:
    DivergenceOptions = DIVERGENCES.with_options(StrictModel)


class ScheduleSection(StrictModel):
    """Schedule of a number over the steps of a training; its first value is the number's own field."""

    kind: Literal["constant", "linear", "cosine", "hard_and_decay"]
    """hard_and_decay is linear to 1 (FuseLLM's name for it)."""
    end: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Value at the last step, for linear and cosine."""

    @model_validator(mode="after")
    def _end_fits(self) -> Self:
        if (self.end is None) == (self.kind in ("linear", "cosine")):
            raise ValueError(
                f"schedule {self.kind} "
                + ("needs an end" if self.end is None else "takes no end, it has its own")
            )
        return self


class LossSection(DivergenceOptions):
    """Options of the fusion loss; the defaults are FuseLLM's cross-entropy, the tail as a bucket.

    Besides the fields below it has one for the options of each divergence that has some, such as
    `jsd_beta` (fuse_train/divergences/).
    """

    divergence: Annotated[str, DIVERGENCES.choice] = "cross_entropy"
    """Between each source and the target: a name of fuse_train/divergences/__init__.py."""
    source_temperature: float = Field(default=1.0, gt=0, le=100)
    """Sources' probabilities are raised to 1 / source_temperature and normalized."""
    target_temperature: float = Field(default=1.0, gt=0, le=100)
    """The target's logits are divided by it in the fusion loss, which is multiplied by its square."""
    source_share: float | None = Field(default=None, ge=0, le=1)
    """TAID: compare with a distribution this far on the way from the target itself to the source; 1 is
    the source. None leaves it out."""
    source_share_schedule: ScheduleSection | None = None
    """Schedule of `source_share`, such as {kind: linear, end: 1}."""
    clm_weight_schedule: ScheduleSection | None = None
    """Schedule of lambda (`train.clm_weight`)."""
    feedback_schedule: ScheduleSection | None = None
    """Schedule of alpha (`train.feedback_weight`)."""
    threshold_schedule: ScheduleSection | None = None
    """Schedule of tau (`train.asn.threshold`)."""
    keep_share: float | None = Field(default=None, gt=0, le=1)
    """Rho-1: train on this share of a micro-batch's rows, those where the target's NLL is farthest
    above the reference's. None trains on all."""
    keep_reference: str = "pool"
    """Whose NLL is the reference: "pool" (the selector's pool), or the name of a source."""
    span_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the loss on likelihoods of common spans (ALM), added to the other losses; 0 leaves it
    out. It needs no vocabulary map, but one more pass through the head without gradients."""
    span_temperature: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    """Span probabilities are raised to 1 / span_temperature before they are compared."""

    @model_validator(mode="after")
    def _shares_stay_shares(self) -> Self:
        for name in ("source_share", "clm_weight", "threshold"):
            schedule: ScheduleSection | None = getattr(self, f"{name}_schedule")
            if schedule is not None and schedule.end is not None and schedule.end > 1:
                raise ValueError(f"{name}_schedule may not end above 1")
        if self.threshold_schedule is not None and (self.threshold_schedule.end or 0) >= 1:
            raise ValueError("threshold_schedule must end below 1")
        if self.threshold_schedule is not None and self.threshold_schedule.kind == "hard_and_decay":
            raise ValueError("threshold_schedule must end below 1, and hard_and_decay ends at 1")
        if self.source_share_schedule is not None and self.source_share is None:
            raise ValueError("source_share_schedule needs source_share, where it begins")
        return self

    @property
    def options(self) -> Any:
        """Options of the chosen divergence; None where it has none."""
        kind = DIVERGENCES[self.divergence]
        return None if kind.section is None else getattr(self, kind.field)

    @property
    def needs_labels_first(self) -> bool:
        """Whether the labels' NLLs must be known before gradients are computed."""
        return self.span_weight > 0 or self.keep_share is not None
