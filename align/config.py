"""The `align` section of the run file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.methods import METHODS
from store_schema.config import RunConfig, SectionModel

if TYPE_CHECKING:
    MethodOptions = SectionModel
else:
    MethodOptions = METHODS.with_options(SectionModel)


class AlignSection(MethodOptions):
    """How source distributions are converted to the target's tokens.

    A method with options (align/methods/kinds/) has a field here, named like the method.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    method: Annotated[str, METHODS.choice] = "bytes"
    """A method listed in align/methods/__init__.py. bytes works with any two tokenizers."""
    continuation: Literal["statistics", "first_token", "tail"] = "statistics"
    """Method bytes: a source token may be only the beginning of a longer target token. Where does its
    mass go then? statistics: to target tokens, as often as they began with it in this corpus;
    first_token: to the target token that its bytes alone begin with; tail: to the tail."""
    continuation_prior: float = Field(default=4.0, gt=0)
    """statistics: how many occurrences the first token counts for beside those counted."""
    look_ahead: bool = True
    """Method bytes: where the target's tokenizer might have written a longer token than the text has,
    take its probability from the source's next row. Off, it is 0."""
    tail_tokens: int = Field(default=0, ge=0, le=256)
    """Method bytes: inside a source token, at most so many tokens that its row does not list take a
    part of the row's tail: those that agree with the text and are most frequent in this corpus. With
    0 all of the tail stays tail, and a listed token that alone agrees has all the mass."""
    statistics_tokens: int = Field(default=20_000_000, gt=0)
    """Target tokens of the split train that are counted, at most (`statistics`, method stats)."""
    max_entries: int = Field(default=64, gt=0)
    """Entries kept at each position, at most; the rest is tail."""

    def content(self) -> dict[str, Any]:
        """See `SectionModel.content`."""
        left_out = {*METHODS.left_out(self.method)}
        if not self.tail_tokens:
            left_out.add("tail_tokens")  # keeps fingerprints from before this option existed
        return {name: value for name, value in super().content().items() if name not in left_out}

    def finished_shards(self, run: RunConfig, source: str) -> set[int]:
        from align.prepare.checked import check_alignment  # it imports this file

        return check_alignment(run, source, keep=False).committed()
