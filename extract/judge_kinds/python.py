"""Judge python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from extract.judge_kinds.kind import Answer, JudgeContext, JudgeKind, JudgeOptions, Score


class PythonOptions(JudgeOptions):
    """Judge python."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"seconds", "memory_mib"})

    function: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """Such as module:function, or folder/file.py:function. It gets a dict with prompt or messages,
    answer, reference, domain, split, source and id, and returns a number, more for a better answer, or
    None."""
    seconds: float = Field(default=10.0, gt=0, le=86_400)
    """That it may take for an answer; then its process is ended, which is counted."""
    memory_mib: int = Field(default=2048, ge=64)
    """MiB that its process may ask for; what it cannot have is a MemoryError in it (counted)."""


class Python(JudgeKind):
    """A function of yours, run in a process of its own with limits of time and memory."""

    section = PythonOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """The content of the function's file."""
        from extract.judging.functions import FunctionProcess

        with FunctionProcess(options) as process:
            return process.digest

    def open(self, options: Any, context: JudgeContext) -> FunctionJudge:
        """As `JudgeKind.open` says."""
        from extract.judging.functions import FunctionProcess

        return FunctionJudge(FunctionProcess(options))


class FunctionJudge:
    """See `extract.judge_kinds.kind.Judge`."""

    def __init__(self, process: Any) -> None:
        """`process` is a `FunctionProcess`."""
        self._process = process

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """See `Judge.scores`."""
        for i, answer in enumerate(answers):
            question = answer.question
            asked = {
                **question.context,
                "answer": answer.text,
                "reference": question.reference,
                "domain": question.domain,
                "split": question.split,
                "source": answer.source,
                "id": question.document_id,
            }
            yield i, self._process.score(asked)

    def close(self) -> None:
        """See `Judge.close`."""
        self._process.close()
