"""The stages that a cluster runs, and the number of workers of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from store_schema.errors import ConfigError

ShardedStage = Literal["extract", "align"]
"""Stages whose shards several workers share."""
Stage = Literal[ShardedStage, "train"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Stages that can be submitted, in the order of a run."""
Scope = Literal["all", Stage]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def stages_from(stage: Stage, *, only: bool) -> tuple[Stage, ...]:
    """`stage` and those that follow, or `stage` alone."""
    first = STAGES.index(stage)
    return STAGES[first : first + 1] if only else STAGES[first:]


def split_scope(text: str) -> tuple[Scope, str]:
    """The scope of "[SCOPE:]REST", "all" if there is none, and the rest."""
    for scope in SCOPES:
        if text.startswith(f"{scope}:"):
            return scope, text.removeprefix(f"{scope}:")
    return "all", text


def parse_workers(texts: Sequence[str]) -> dict[ShardedStage, int]:
    """Worker counts from the command line, "[STAGE:]N" each, by stage.

    Raises:
        ConfigError: Not of this form.
    """
    common: dict[ShardedStage, int] = {}
    special: dict[ShardedStage, int] = {}
    for text in texts:
        scope, rest = split_scope(text)
        if not re.fullmatch(r"[1-9][0-9]{0,6}", rest) or scope == "train":
            raise ConfigError(
                "worker count refused",
                where="--workers",
                expected="N, extract:N or align:N with N from 1",
                got=text,
            )
        if scope == "all":
            common = {"extract": int(rest), "align": int(rest)}
        else:
            special[scope] = int(rest)
    return common | special
