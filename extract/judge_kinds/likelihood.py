"""Judge likelihood."""

from __future__ import annotations

from typing import Any

from extract.judge_kinds.kind import Answer, JudgeContext, JudgeKind, JudgeOptions, Score, TextJudge
from store_schema.errors import ConfigError


class Likelihood(JudgeKind):
    """Mean log-probability a byte under the other sources: what all of them might have said."""

    section = JudgeOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """The stores that it reads."""
        if len(context.run.sources) < 2:
            raise ConfigError(
                "judge likelihood asks the other sources, and there is one alone",
                where="judge.judges",
                expected="two sources or more",
            )
        return context.likelihoods().digest

    def open(self, options: Any, context: JudgeContext) -> TextJudge:
        """As `JudgeKind.open` says."""
        likelihoods = context.likelihoods()

        def score(answer: Answer) -> Score:
            value = likelihoods.of_others(answer)
            return Score(value, None if value is not None else "not scored")

        return TextJudge(score)
