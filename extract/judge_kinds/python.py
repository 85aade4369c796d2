"""Judge python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from extract.judge_kinds.kind import Answer, JudgeContext, JudgeKind, JudgeOptions, Score


class PythonOptions(JudgeOptions):
    """Judge python."""

    function: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """Such as module:function, or folder/file.py:function. It gets a dict with prompt or messages,
    answer, reference, domain, split, source and id, and returns a number, higher for a better answer,
    or None."""
    seconds: float = Field(default=10.0, gt=0, le=86_400)
    """Time limit for an answer; its process is then ended, and the answer counted as failed."""
    memory_mib: int = Field(default=2048, ge=64)
    """MiB that its process may allocate; more raises a MemoryError in it, and is counted as failed."""


class Python(JudgeKind):
    """A Python function of your own, run in another process with limits of time and memory."""

    section = PythonOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """Digest of the function's file."""
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
            arguments = {
                **question.context,
                "answer": answer.text,
                "reference": question.reference,
                "domain": question.domain,
                "split": question.split,
                "source": answer.source,
                "id": question.document_id,
            }
            yield i, self._process.score(arguments)

    def close(self) -> None:
        """See `Judge.close`."""
        self._process.close()
