"""The run file's section `evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from fuse_eval.answers.config import AnswersSection
from fuse_eval.harness.config import HarnessSection
from fuse_train.selectors import SELECTORS
from store_schema.config import SectionModel

PoolSelector = Annotated[str, SELECTORS.choice]


class EvaluateSection(SectionModel):
    """What is measured, on which text, and the level of the intervals."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset(
        {"batch_tokens", "device", "answers", "harness"}
    )

    split: str = Field(default="test", min_length=1)
    """Split of the plan whose segments are scored. No earlier stage has trained on it."""
    sources: bool = True
    """Whether each source is scored too; false saves loading large ones."""
    pool_selectors: tuple[PoolSelector, ...] = ("uniform", "min_ce", "avg_ce", "hedge", "asn")
    """Selectors whose pools are estimated before training, beside the run's own, with the train
    section's settings; those that learn are trained on its training split, others searched for on
    its validation split."""
    bootstrap_samples: int = Field(default=2000, ge=200, le=100_000)
    """Resamples behind each confidence interval."""
    bootstrap_unit: Literal["document", "segment"] = "document"
    """Unit of the resampling. Segments of one document are similar, so that treating them as
    independent makes intervals too narrow."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided level of the intervals."""
    batch_tokens: int = Field(default=8192, gt=0)
    """Padded tokens of one forward pass. Changes speed and memory only."""
    device: str | None = None
    """torch device by name; None takes CUDA when there is one, else the CPU."""

    answers: AnswersSection = AnswersSection()
    """How right answers are counted; no part of `eval run`."""
    harness: HarnessSection = HarnessSection()
    """Tasks of lm-evaluation-harness; no part of `eval run`."""

    def splits_needed(self) -> dict[str, str]:
        """Splits that must exist, by the option that names them."""
        return {"evaluate.split": self.split}

    @field_validator("pool_selectors")
    @classmethod
    def _each_once(cls, selectors: tuple[PoolSelector, ...]) -> tuple[PoolSelector, ...]:
        if len(set(selectors)) != len(selectors):
            raise ValueError("a selector is named twice")
        return selectors
