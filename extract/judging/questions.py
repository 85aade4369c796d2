"""The prompts of a plan with all sources' usable answers, shard by shard."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from extract.generation.answer_documents import AnswerStore, left_out
from extract.judge_kinds.kind import Answer, Question
from extract.judging.config import JudgeSection
from extract.judging.final_answers import contains_answer
from store_schema.config import RunConfig
from store_schema.plan.plan import Plan, Segment, ShardRecord

CUT = "cut"


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """A prompt and the answers to choose from.

    Args:
        question: The prompt.
        answers: In the order of the run file's sources, then by number; not empty.
        contains_answer: Whether the prompt contains its answer.
    """

    question: Question
    answers: tuple[Answer, ...]
    contains_answer: bool


@dataclass(slots=True)
class PromptCounts:
    """Counts of prompts and answers.

    Args:
        prompts: All prompts.
        left_out: Answers left out, by source and reason.
        unanswered: Prompts without a usable answer.
        only_cut: Those of them that have an answer which was cut.
        too_few: Prompts with fewer answers than `judge.min_answers`.
        held: Ids of prompts that contain their answer.
    """

    prompts: int = 0
    left_out: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unanswered: int = 0
    only_cut: int = 0
    too_few: int = 0
    held: list[str] = field(default_factory=list)


class AnsweredPrompts:
    """The prompts of a run's plan, answered by all of its sources."""

    def __init__(self, run: RunConfig, plan: Plan, section: JudgeSection) -> None:
        """Open the answer stores of all sources.

        Raises:
            MissingError: A source has not answered all prompts.
            MismatchError: A store was made with another plan or tokenizer.
        """
        self.plan = plan
        self._section = section
        self._stores = [AnswerStore.open(run, name, plan) for name in run.sources]

    def content(self, shard: ShardRecord) -> Any:
        """Fingerprints of a shard's prompts and answers, JSON-like."""
        stores = {s.source: s.reader.commits[shard.index].content_sha256 for s in self._stores}
        return [shard.fingerprint, stores]

    def judged(self, shard: ShardRecord, counts: PromptCounts | None = None) -> list[JudgedPrompt]:
        """The prompts of a shard that are judged, with their answers.

        Args:
            shard: The plan's shard.
            counts: Prompts and answers are counted here.
        """
        counts = PromptCounts() if counts is None else counts
        segments = self.plan.segments(shard)
        questions = {s.index: question_of(s, self._references) for s in segments if s.has_prompt}
        usable: defaultdict[int, list[Answer]] = defaultdict(list)
        cut: set[int] = set()
        for store in self._stores:
            for answer, text in store.answers(shard):
                reason = left_out(text, answer.finish, keep_cut=not self._section.drop_cut)
                if reason is not None or text is None:
                    counts.left_out[store.source][reason or ""] += 1
                    cut.update([answer.row] * (reason == CUT))
                    continue
                usable[answer.row].append(
                    Answer(questions[answer.row], store.source, answer.number, text)
                )
        return list(self._judged(questions, usable, cut, counts))

    def _judged(
        self,
        questions: dict[int, Question],
        usable: dict[int, list[Answer]],
        cut: set[int],
        counts: PromptCounts,
    ) -> list[JudgedPrompt]:
        judged = []
        for row, question in questions.items():
            answers = usable.get(row, [])
            held = contains_answer(_contents(question.messages), question.reference)
            counts.prompts += 1
            if held:
                counts.held.append(question.document_id)
            if not answers:
                counts.unanswered += 1
                counts.only_cut += row in cut
            elif len(answers) < self._section.min_answers:
                counts.too_few += 1
            elif not (held and self._section.drop_held):
                judged.append(JudgedPrompt(question, tuple(answers), held))
        return judged

    @cached_property
    def _references(self) -> dict[str, str]:
        return long_references(self.plan)


def question_of(segment: Segment, references: Mapping[str, str]) -> Question:
    """The prompt of a document, with its reference answer.

    Args:
        segment: The document's first segment, which has a prompt.
        references: From `long_references`.
    """
    context = json.loads(segment.context or "{}")
    return Question(
        segment.document_id,
        {key: context[key] for key in ("prompt", "messages", "tools") if key in context},
        segment.domain,
        segment.split,
        references.get(segment.document_id, segment.text),
    )


def long_references(plan: Plan) -> dict[str, str]:
    """The whole texts of documents with a prompt and several segments, by document id."""
    parts: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for shard in plan.shards:
        for segment in plan.segments(shard):
            whole = segment.byte_start == 0 and segment.ends_document
            if segment.context is not None and not whole:
                parts[segment.document_id].append((segment.byte_start, segment.text))
    return {name: "".join(text for _, text in sorted(own)) for name, own in parts.items()}


def flat(prompts: Sequence[JudgedPrompt]) -> list[Answer]:
    """All answers to some prompts, in order."""
    return [answer for prompt in prompts for answer in prompt.answers]


def _contents(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)
