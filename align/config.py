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
    """How source distributions are carried into the target's tokens.

    Besides the fields below it has one for the options of each method that has some, by the method's
    name (align/methods/kinds/).
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset()

    method: Annotated[str, METHODS.choice] = "bytes"
    """A name of align/methods/__init__.py. bytes takes any two tokenizers."""
    continuation: Literal["statistics", "first_token", "tail"] = "statistics"
    """Method bytes: where the mass of a source token goes that ends where the target might write on:
    spread by how the target's tokenizer went on in this corpus, all to the token it would begin with
    alone, or to the tail."""
    continuation_prior: float = Field(default=4.0, gt=0)
    """Weight of the first token beside the counts of `statistics`, in occurrences."""
    look_ahead: bool = True
    """Method bytes: where the target might have written a longer token than the one that stands there,
    ask the source's next row how likely that was, instead of taking it for impossible."""
    statistics_tokens: int = Field(default=20_000_000, gt=0)
    """Target tokens of the first split that are counted, at most (`statistics`, method stats)."""
    max_entries: int = Field(default=64, gt=0)
    """Entries kept at each position, at most; the rest is tail."""

    def content(self) -> dict[str, Any]:
        """As `SectionModel.content` says."""
        left_out = METHODS.left_out(self.method)
        return {name: value for name, value in super().content().items() if name not in left_out}

    def finished_shards(self, run: RunConfig, source: str) -> set[int]:
        from align.prepare.checked import check_alignment  # which imports this file

        return check_alignment(run, source, keep=False).committed()
