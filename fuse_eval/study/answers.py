"""Right answers of a study's models to held-out prompts, asked once and kept."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from launch.signals import StopFlag
from store_schema import SCHEMA_VERSION
from store_schema.config import ModelRef, RunConfig, StrictModel
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal

if TYPE_CHECKING:
    from fuse_eval.answers.held_out import HeldOutPrompts

ANSWERS_FILE = "answers.json"
_AGAIN = "delete the folder, and the model is trained and scored again"


class AnswerRecord(StrictModel):
    """answers.json: one model's scores; axes P prompts."""

    schema_version: int = SCHEMA_VERSION
    document_ids: tuple[str, ...]
    domains: tuple[str, ...]
    right: tuple[float | None, ...]
    """0 (wrong, or no answer) to 1; None where the judge has no score."""


class StudyAnswers:
    """The held-out prompts of a data set.

    Args:
        run: The run of all sources.
        split: Split of the prompts.
    """

    def __init__(self, run: RunConfig, split: str) -> None:
        self._run, self._split = run, split

    @cached_property
    def _held_out(self) -> HeldOutPrompts:
        from fuse_eval.answers.held_out import HeldOutPrompts  # engines

        return HeldOutPrompts(self._run, self._split)

    def ask(self, ref: ModelRef, folder: Path, stop: StopFlag) -> None:
        """Let a model answer, and keep its scores in `folder`, unless that was done.

        Raises:
            LogitfuseError: There are no prompts, or the model cannot answer.
            Stopped: `stop` was set.
        """
        if (folder / ANSWERS_FILE).is_file():
            return
        questions = self._held_out.questions
        record = AnswerRecord(
            document_ids=tuple(question.document_id for question in questions),
            domains=tuple(question.domain for question in questions),
            right=tuple(self._held_out.right(folder.name, ref, stop)),
        )
        folder.mkdir(parents=True, exist_ok=True)
        open_location(str(folder)).write_atomic(ANSWERS_FILE, seal(record))


def read_answers(folder: Path) -> AnswerRecord | None:
    """What was kept of a model; None where it was not asked.

    Raises:
        CorruptionError: It is damaged.
    """
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return None
    return unseal(AnswerRecord, path.read_bytes(), where=str(path), hint=_AGAIN)
