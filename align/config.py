"""The `align` section of the run file."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from store_schema.config import SectionModel


class AlignSection(SectionModel):
    """How source distributions are carried into the target's tokens."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    method: Literal["bytes", "exact"] = "bytes"
    """bytes: any two tokenizers. exact: source and target share one vocabulary (checked)."""
    continuation: Literal["statistics", "first_token"] = "statistics"
    """Where the mass of a source token goes that ends where the target might write on: spread by how
    the target's tokenizer went on in this corpus, or all to the token it would begin with alone."""
    continuation_prior: float = Field(default=4.0, gt=0)
    """Weight of the first token beside the counts of `statistics`, in occurrences."""
    statistics_tokens: int = Field(default=20_000_000, gt=0)
    """Target tokens of the first split that `statistics` counts, at most."""
    max_entries: int = Field(default=64, gt=0)
    """Entries kept at each position, at most; the rest is tail."""
