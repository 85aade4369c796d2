"""What a judge is to the rest of the stage; read with the run file, so it loads nothing heavy."""

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
        document_id: Of the document whose context the prompt is.
        context: As the plan has it: `prompt`, or `messages` and perhaps `tools`.
        domain: As in the corpus.
        split: As in the corpus.
        reference: What the document says after the prompt.
    """

    document_id: str
    context: dict[str, Any]
    domain: str
    split: str
    reference: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a chat; plain text is what a user says."""
        found: list[dict[str, Any]] | None = self.context.get("messages")
        return [{"role": "user", "content": self.context["prompt"]}] if found is None else found


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt.

    Args:
        question: The prompt.
        source: Who wrote it.
        number: Which of the source's answers to the prompt.
        text: Never empty, valid Unicode.
    """

    question: Question
    source: str
    number: int
    text: str

    @property
    def document_id(self) -> str:
        """What `extract answers` calls it."""
        return f"{self.question.document_id}/{self.source}/{self.number}"


@dataclass(frozen=True, slots=True)
class Score:
    """What a judge holds of an answer; more is better.

    Args:
        value: None where the judge has none.
        failure: Why it has none, in few words that are counted.
    """

    value: float | None
    failure: str | None = None


class Judge(Protocol):
    """A judge at work."""

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """Score answers, in any order.

        Yields:
            Place among `answers`, each once, and its score.
        """
        ...

    def close(self) -> None:
        """Let go of models and processes."""
        ...


class JudgeOptions(StrictModel):
    """Options that every judge has; those of a kind are a subclass."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that change speed or place but not scores."""

    kind: str
    """A name of extract/judge_kinds/__init__.py."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """What tables and files call it. None: its kind; two of one kind need names."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """An answer that it scores lower, or has no score for, is never the best; a prompt without another
    is dropped (counted). None: the best of any will do."""

    @property
    def title(self) -> str:
        """What tables and files call it."""
        return self.name or self.kind

    def content(self) -> dict[str, Any]:
        """The options that shape scores, for fingerprints of scores."""
        return self.model_dump(mode="json", exclude={"name", "min_score", *self.runtime_fields})


class AnswerLikelihoods(Protocol):
    """How likely the sources hold each other's answers."""

    @property
    def digest(self) -> str:
        """Of the stores that it is read from."""
        ...

    def of_others(self, answer: Answer) -> float | None:
        """Nats a byte, the mean of all sources but the author; None where it is not known."""
        ...


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge may ask for.

    Args:
        run: The run file.
        likelihoods: Opens the stores in which the answers are scored; raises MissingError where there
            are none, and says how they are made.
    """

    run: RunConfig
    likelihoods: Callable[[], AnswerLikelihoods]


class JudgeKind(Kind):
    """Base of all judges. Options are a subclass of `JudgeOptions`."""

    section: ClassVar[Any] = JudgeOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """What shapes scores beside the options, such as the content of a model: JSON.

        Asked before anything heavy is loaded, and in every run.

        Raises:
            LogitfuseError: The judge cannot work.
        """
        return None

    def open(self, options: Any, context: JudgeContext) -> Judge:
        """The judge at work.

        Raises:
            LogitfuseError: It cannot work.
        """
        raise NotImplementedError


class TextJudge:
    """A judge that needs nothing but an answer and its question."""

    def __init__(self, score: Callable[[Answer], Score]) -> None:
        """`score` is all there is to it."""
        self._score = score

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """See `Judge.scores`."""
        return ((i, self._score(answer)) for i, answer in enumerate(answers))

    def close(self) -> None:
        """See `Judge.close`."""
