"""The text that `make bench-interference` scores all trainings on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.interference_settings import Data
from fuse_eval import bpb
from fuse_eval.study.text import SCORES_FILE, TEXT_FILE, StudyText
from launch.signals import StopFlag
from store_schema.config import load_run

__all__ = ["SCORES_FILE", "TEXT_FILE", "TestText"]


class TestText(StudyText):
    """The test split of a data set, scored the same for all trainings on it.

    Args:
        data: Of the settings.
        kept: Where its record is kept: sources whose tokenizers are no more there are not needed then.
    """

    __test__ = False  # no test class, whatever its name begins with

    def __init__(self, data: Data, kept: Path) -> None:
        super().__init__(load_run(data.run_file), "test", kept / data.work.name / TEXT_FILE)

    def score_final(self, folder: Path) -> None:
        """Score the model in `folder`/final and keep the NLL of its blocks."""
        self.score(bpb.checkpoint_ref(folder / "final", self.run.target), folder, StopFlag())
