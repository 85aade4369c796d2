"""The section `judge` of the run file."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import JudgeOptions
from store_schema.config import SectionModel
from store_schema.paths import PathText
from store_schema.validation import validation_line

Vote = Literal["majority", "mean_rank", "mean_z"]


def _judge(value: Any) -> Any:
    """Parse a judge: a mapping, or the name of a kind for its default options."""
    if isinstance(value, JudgeOptions):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError(
            "a judge must be the name of a kind, or a mapping with `kind` and its options"
        )
    name = JUDGES.choice.func(value["kind"])  # type: ignore[call-arg]
    section = JUDGES[name].section
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {validation_line(error, section)}") from error


JudgeChoice = Annotated[SerializeAsAny[JudgeOptions], BeforeValidator(_judge)]
"""A judge with its options, or the name of its kind."""


class JudgeSection(SectionModel):
    """How the best of the sources' answers are chosen (`logitfuse judge`)."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"scored_in"})

    judges: tuple[JudgeChoice, ...] = ()
    """The judges: names listed in extract/judge_kinds/__init__.py, or mappings with `kind`, options of
    the kind, and a `name` if there are two of one kind."""
    vote: Vote = "majority"
    """majority: each judge votes for the answer that it scores highest. mean_rank: the lowest mean of
    the judges' ranks. mean_z: the highest mean of scores, each judge's in standard deviations from its
    mean over all answers. A tie goes to the answer with the higher likelihood under the other sources
    if there is `scored_in`, then to the earlier source of the run file, then to its earlier answer."""
    drop_cut: bool = True
    """Leave out answers that were cut at `generate.max_tokens` (they are counted)."""
    drop_held: bool = False
    """Leave out prompts that contain their answer (they are counted and listed in any case)."""
    min_answers: int = Field(default=1, ge=1)
    """Prompts with fewer usable answers are dropped and counted."""
    scored_in: PathText | None = Field(default=None, min_length=1)
    """Folder of a run whose corpus is the answers, scored by all sources, for judge likelihood and for
    ties. docs/judging.md says how to make it."""

    @model_validator(mode="after")
    def _titles_differ(self) -> Self:
        titles = [judge.title for judge in self.judges]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two judges have the name {', '.join(twice)}: give each a `name`")
        return self

    def content(self) -> dict[str, Any]:
        """See `SectionModel.content`."""
        judges = [[judge.title, judge.min_score, judge.content()] for judge in self.judges]
        return super().content() | {"judges": judges}
