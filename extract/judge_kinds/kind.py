"""Base class of judges. Loaded with every run file, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import Field

from store_schema.config import RunConfig, StrictModel
from store_schema.registry import Kind


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that the sources answered.

    Args:
        document_id: Id of the document whose context is the prompt.
        context: The prompt: `prompt` (text), or `messages` and perhaps `tools`.
        domain: The document's domain.
        split: The document's split.
        reference: The document's text, the reference answer.
    """

    document_id: str
    context: dict[str, Any]
    domain: str
    split: str
    reference: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages; a prompt of plain text is a user message."""
        messages: list[dict[str, Any]] | None = self.context.get("messages")
        if messages is not None:
            return messages
        return [{"role": "user", "content": self.context["prompt"]}]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt.

    Args:
        question: The prompt.
        source: Name of the source that wrote it.
        number: Index among the source's answers to the prompt.
        text: Its text: not empty, valid Unicode.
    """

    question: Question
    source: str
    number: int
    text: str

    @property
    def document_id(self) -> str:
        """Its document id in `extract answers`."""
        return f"{self.question.document_id}/{self.source}/{self.number}"


@dataclass(frozen=True, slots=True)
class Score:
    """A judge's score of an answer; higher is better.

    Args:
        value: The score; None where the judge has none.
        failure: Why it has none, in a few words under which it is counted.
    """

    value: float | None
    failure: str | None = None


class Judge(Protocol):
    """A judge that is ready to score."""

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """Score answers, in any order.

        Yields:
            Index in `answers`, each once, and its score.
        """
        ...

    def close(self) -> None:
        """Free models and end processes."""
        ...


class JudgeOptions(StrictModel):
    """Options of every judge; each kind has a subclass with its own."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change speed or location but not scores."""

    kind: str
    """A judge listed in extract/judge_kinds/__init__.py."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Its name in tables and files. None: its kind; two judges of one kind need names."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """An answer with a lower score, or without one, is never chosen; prompts without any other answer
    are dropped and counted. None: no lower limit."""

    @property
    def title(self) -> str:
        """Its name in tables and files."""
        return self.name or self.kind

    def content(self) -> dict[str, Any]:
        """The options that determine scores, for fingerprints."""
        return self.model_dump(mode="json", exclude={"name", "min_score", *self.runtime_fields})


class AnswerLikelihoods(Protocol):
    """Log-probabilities of answers under the sources that did not write them."""

    @property
    def digest(self) -> str:
        """Digest of the stores that they are read from."""
        ...

    def by_other_sources(self, answer: Answer) -> float | None:
        """Log-probability in nats per byte, mean of all sources but the author; None where not
        known."""
        ...


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge may use besides the answers.

    Args:
        run: The run file.
        likelihoods: Opens the stores in which the answers are scored; raises MissingError, with how to
            make them, if there are none.
    """

    run: RunConfig
    likelihoods: Callable[[], AnswerLikelihoods]


class JudgeKind(Kind):
    """Base class of all judges; `section` is a subclass of `JudgeOptions`."""

    section: ClassVar[Any] = JudgeOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """Everything but the options that determines scores, such as a model's fingerprint; JSON-like.

        Called in every run, before anything heavy is loaded.

        Raises:
            LogitfuseError: The judge cannot work.
        """
        return None

    def open(self, options: Any, context: JudgeContext) -> Judge:
        """The judge, ready to score.

        Raises:
            LogitfuseError: It cannot work.
        """
        raise NotImplementedError


class TextJudge:
    """A judge that is a function of a single answer with its question."""

    def __init__(self, score: Callable[[Answer], Score]) -> None:
        """`score` is that function."""
        self._score = score

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """See `Judge.scores`."""
        return ((i, self._score(answer)) for i, answer in enumerate(answers))

    def close(self) -> None:
        """See `Judge.close`."""
