"""The `answers` part of the section `evaluate`."""

from __future__ import annotations

from pydantic import Field

from extract.judging.config import JudgeChoice
from store_schema.config import StrictModel


class AnswersSection(StrictModel):
    """How right answers are counted (`logitfuse eval answers`)."""

    judge: JudgeChoice = Field(default="exact_answer")  # type: ignore[assignment]
    """Gives each answer a score from 0 (wrong) to 1: a judge of docs/judging.md with its options."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of an answer; None takes `generate.max_tokens`."""
    limit: int | None = Field(default=None, ge=1)
    """Most prompts of a domain, spread evenly over the split; None takes all."""
