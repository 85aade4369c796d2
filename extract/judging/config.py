"""The section `judge` of the run file."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import JudgeOptions
from store_schema.config import SectionModel, validation_line
from store_schema.paths import PathText

Vote = Literal["majority", "mean_rank", "mean_z"]


def _judge(given: Any) -> Any:
    """Options of the kind that is named; a name alone has its defaults."""
    if isinstance(given, JudgeOptions):
        return given
    if isinstance(given, str):
        given = {"kind": given}
    if not isinstance(given, dict) or not isinstance(given.get("kind"), str):
        raise ValueError(
            "a judge is the name of its kind, or a mapping with `kind` and its options"
        )
    name = JUDGES.choice.func(given["kind"])  # type: ignore[call-arg]
    try:
        return JUDGES[name].section.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{name}: {validation_line(error)}") from error


JudgeChoice = Annotated[SerializeAsAny[JudgeOptions], BeforeValidator(_judge)]
"""A judge with its options, or the name of its kind."""


class JudgeSection(SectionModel):
    """How the best of the sources' answers are found (`logitfuse judge`)."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"scored_in"})

    judges: tuple[JudgeChoice, ...] = ()
    """What scores the answers: names of extract/judge_kinds/__init__.py, or mappings with `kind`, a
    `name` where there are two of a kind, and options of the kind."""
    vote: Vote = "majority"
    """majority: each judge votes for the answer that it scores highest. mean_rank: the least mean of
    the ranks that judges give. mean_z: the highest mean of their scores, each judge's in standard
    deviations from its mean over all answers. A tie goes to the higher likelihood under the other
    sources where `scored_in` tells it, then to the earlier source of the run file, then to its earlier
    answer."""
    drop_cut: bool = True
    """Leave out answers that were cut at `generate.max_tokens` (counted)."""
    drop_held: bool = False
    """Leave out prompts that hold their answer (counted and named in any case)."""
    min_answers: int = Field(default=1, ge=1)
    """Prompts with fewer answers to choose from are dropped (counted)."""
    scored_in: PathText | None = Field(default=None, min_length=1)
    """Folder of a run whose corpus are the answers, scored by all sources: judge likelihood needs it,
    and ties are settled by it. docs/judging.md says how it is made."""

    @model_validator(mode="after")
    def _titles_differ(self) -> Self:
        titles = [judge.title for judge in self.judges]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two judges are called {', '.join(twice)}: give each a `name`")
        return self

    def content(self) -> dict[str, Any]:
        """As `SectionModel.content` says."""
        judges = [[judge.title, judge.min_score, judge.content()] for judge in self.judges]
        return super().content() | {"judges": judges}
