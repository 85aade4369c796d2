"""Judge exact_answer."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import Field, field_validator

from extract.judge_kinds.kind import Answer, JudgeContext, JudgeKind, JudgeOptions, Score, TextJudge
from store_schema.errors import ConfigError

NO_FINAL_ANSWER = "no final answer in the reference"


class ExactAnswerOptions(JudgeOptions):
    """Judge exact_answer."""

    pattern: str | None = Field(default=None, min_length=1)
    """Regular expression for the final answer in both answer and reference: the first group of its last
    match, or the whole match. None: the content of the last \\boxed{}, else the text after the last
    "####", else the last number."""
    compare: Literal["plain", "math_verify"] = "plain"
    """plain: numbers by value (1,000 is 1000.0, 1/2 is 0.5), all else as words without regard to case,
    spaces and a full stop. math_verify: if they differ by that, they are also compared as formulas
    (package math-verify)."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class ExactAnswer(JudgeKind):
    """1 if the final answer is the reference's, else 0; numbers are compared by value."""

    section = ExactAnswerOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """The version of math-verify, if it is used."""
        if options.compare == "plain":
            return None
        try:
            return version("math-verify")
        except PackageNotFoundError as error:
            raise ConfigError(
                "`compare: math_verify` needs the package math-verify",
                where="judge.judges",
                hint="pip install 'logitfuse[judge]', or compare: plain",
            ) from error

    def open(self, options: Any, context: JudgeContext) -> TextJudge:
        """As `JudgeKind.open` says."""
        from extract.judging.final_answers import final_answer, same_answer, same_formula

        def score(answer: Answer) -> Score:
            expected = final_answer(answer.question.reference, options.pattern)
            if expected is None:
                return Score(None, NO_FINAL_ANSWER)
            actual = final_answer(answer.text, options.pattern)
            if actual is None:
                return Score(0.0)
            same = same_answer(actual, expected)
            if not same and options.compare == "math_verify":
                same = same_formula(actual, expected)
            return Score(float(same))

        return TextJudge(score)
