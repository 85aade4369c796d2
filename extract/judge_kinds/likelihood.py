"""Judge likelihood."""

from __future__ import annotations

from typing import Any

from extract.judge_kinds.kind import Answer, JudgeContext, JudgeKind, JudgeOptions, Score, TextJudge
from store_schema.errors import ConfigError


class Likelihood(JudgeKind):
    """Mean log-probability per byte under the other sources: how much they agree with the answer."""

    section = JudgeOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """Digest of the stores that it reads."""
        if len(context.run.sources) < 2:
            raise ConfigError(
                "judge likelihood needs other sources than the author, but the run has one source",
                where="judge.judges",
                expected="two sources or more",
            )
        return context.likelihoods().digest

    def open(self, options: Any, context: JudgeContext) -> TextJudge:
        """As `JudgeKind.open` says."""
        likelihoods = context.likelihoods()

        def score(answer: Answer) -> Score:
            value = likelihoods.by_other_sources(answer)
            return Score(value, None if value is not None else "not scored")

        return TextJudge(score)
