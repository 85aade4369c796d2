"""The held-out prompts of a run, and the judge of answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, NoReturn

from extract.config import GenerateSection
from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import Answer, JudgeContext, JudgeOptions, Question, Score
from extract.judging.questions import long_references, question_of
from fuse_eval.answers.asking import ModelAnswer, ask_model
from fuse_eval.config import EvaluateSection
from launch.signals import StopFlag
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ConfigError, MissingError, ModelError
from store_schema.plan.plan import Plan, Segment
from store_schema.plan.run_plan import open_plan

UNANSWERED = Score(0.0)
"""Score of a prompt without an answer: wrong, without asking the judge."""


class HeldOutPrompts:
    """The prompts of a split, answered by any number of models and judged alike.

    Args:
        run: Its `evaluate.answers` has the judge.
        split: The split; None takes `evaluate.split`.

    Raises:
        MissingError: Nothing is planned, or the split has no prompt.
        ConfigError: The judge cannot tell right from wrong.
    """

    def __init__(self, run: RunConfig, split: str | None = None) -> None:
        section = run.section("evaluate", EvaluateSection)
        plan = open_plan(run)
        self._run, self._judge = run, section.answers.judge
        self._most_tokens = most_tokens(run, section)
        if split is not None:
            section = section.model_copy(update={"split": split})
        self.prompts = held_out_prompts(plan, section)
        references = long_references(plan)
        self.questions = [question_of(segment, references) for segment in self.prompts]

    def right(self, name: str, ref: ModelRef, stop: StopFlag) -> list[float | None]:
        """The judge's score of a model's answer to each prompt.

        Returns:
            0 for a prompt without an answer, None for an answer without a score.

        Raises:
            ModelError: The model cannot answer, or a score is outside [0, 1].
            Stopped: `stop` was set.
        """
        answers = ask_model(self._run, name, ref, self.prompts, self._most_tokens, stop)
        context = JudgeContext(self._run, no_likelihoods)
        with closing(JUDGES[self._judge.kind].open(self._judge, context)) as opened:
            scores = judged(opened, self._judge, name, self.questions, answers, stop)
        return [score.value for score in scores]


def held_out_prompts(plan: Plan, section: EvaluateSection) -> list[Segment]:
    """First segments of the split that have a prompt, at most `answers.limit` of a domain.

    Answers that a source wrote (`author`) are no references and are left out.

    Raises:
        MissingError: There is no prompt.
    """
    prompts: dict[str, list[Segment]] = {}
    for shard in plan.shards:
        for segment in plan.segments(shard):
            if segment.split == section.split and segment.has_prompt and segment.author is None:
                prompts.setdefault(segment.domain, []).append(segment)
    if not prompts:
        raise MissingError(
            f"no prompt in split {section.split}",
            where=plan.location.url,
            expected="texts with a prompt before them",
            hint="inputs with prompt and response, or chats (docs/extraction.md)",
        )
    limit = section.answers.limit
    return [s for name in sorted(prompts) for s in _spread(prompts[name], limit)]


def _spread(segments: Sequence[Segment], limit: int | None) -> list[Segment]:
    if limit is None or len(segments) <= limit:
        return list(segments)
    return [segments[i * len(segments) // limit] for i in range(limit)]


def most_tokens(run: RunConfig, section: EvaluateSection) -> int:
    """Most tokens of an answer."""
    return section.answers.max_tokens or run.section("generate", GenerateSection).max_tokens


def judged(
    judge: Any,
    options: JudgeOptions,
    name: str,
    questions: Sequence[Question],
    answers: Sequence[ModelAnswer],
    stop: StopFlag,
) -> list[Score]:
    """A score for each prompt; `UNANSWERED` for prompts without an answer.

    Args:
        judge: The judge, opened.
        options: Its options.
        name: Whose answers they are.
        questions: The prompts.
        answers: An answer to each.
        stop: Checked after each score.

    Raises:
        ModelError: A score is outside [0, 1].
    """
    scores = [UNANSWERED] * len(questions)
    answered = [i for i, answer in enumerate(answers) if answer.text.strip()]
    for place, score in judge.scores(
        [Answer(questions[i], name, 0, answers[i].text) for i in answered]
    ):
        stop.check()
        if score.value is not None and not 0 <= score.value <= 1:
            raise ModelError(
                f"judge {options.title} gives {score.value:g}",
                where=f"evaluate.answers.judge, {questions[answered[place]].document_id}",
                expected="a share from 0 (wrong) to 1 (right)",
                hint="take a judge such as exact_answer, or a function that returns a share",
            )
        scores[answered[place]] = score
    return scores


def no_likelihoods() -> NoReturn:
    """Likelihoods under the other sources, which say nothing of right and wrong: refused."""
    raise ConfigError(
        "judge likelihood compares sources, and does not tell whether an answer is right",
        where="evaluate.answers.judge",
        expected=", ".join(name for name in JUDGES.names() if name != "likelihood"),
    )
