"""The text that `make bench-interference` scores all trainings on, and the record kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import click
import numpy as np

from benchmarks.interference_settings import Data
from fuse_eval import bpb
from fuse_eval.interference.blocks import Blocks, block_sizes
from launch.signals import StopFlag
from store_schema.config import StrictModel, load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.text.tokenizer import SegmentTokenizer

SCORES_FILE, TEXT_FILE = "test.json", "text.json"


class TextRecord(StrictModel):
    """text.json: the scored blocks of a test split, the same for all trainings on it."""

    request_fingerprint: str
    """Of what is scored beside the model, which is not kept."""
    plan_fingerprint: str
    segment_ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    domains: tuple[str, ...]
    starts: tuple[int, ...]
    """Byte of each segment from which it is scored."""
    block_ends: tuple[tuple[int, ...], ...]
    """Of each segment, from its start."""

    def blocks(self, nats: Mapping[str, Sequence[float]]) -> Blocks:
        """The blocks with their scores."""
        counts = [len(ends) for ends in self.block_ends]
        segment_K = np.repeat(np.arange(len(counts)), counts)
        return Blocks(
            document_ids=tuple(self.document_ids[i] for i in segment_K),
            segment_ids=tuple(self.segment_ids[i] for i in segment_K),
            domains=tuple(self.domains[i] for i in segment_K),
            numbers=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
            num_bytes=block_sizes([np.asarray(ends, np.int64) for ends in self.block_ends]),
            nats={model: np.asarray(values, np.float64) for model, values in nats.items()},
        )


class TestText:
    """The test split of a data set, scored the same for all trainings on it.

    Args:
        data: Of the settings.
        kept: Where its record is kept: sources whose tokenizers are no more there are not needed then.
    """

    __test__ = False  # no test class, whatever its name begins with

    def __init__(self, data: Data, kept: Path) -> None:
        self.run, self._file = load_run(data.run_file), kept / data.work.name / TEXT_FILE
        if not self._file.is_file():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(self._made().model_dump_json() + "\n")
        self.record = TextRecord.model_validate_json(self._file.read_text())

    def _made(self) -> TextRecord:
        plan = open_plan(self.run)
        tokenizers = bpb.run_tokenizers(self.run, plan)
        text = bpb.scored_text(bpb.split_segments(plan, "test"), tokenizers)
        return TextRecord(
            request_fingerprint=bpb.score_request(self.run.target, plan, "test", tokenizers),
            plan_fingerprint=plan.fingerprint,
            segment_ids=tuple(segment.segment_id for segment in text.segments),
            document_ids=tuple(segment.document_id for segment in text.segments),
            domains=tuple(segment.domain for segment in text.segments),
            starts=tuple(text.starts.tolist()),
            block_ends=tuple(tuple(ends.tolist()) for ends in text.block_ends),
        )

    @cached_property
    def _scored(self) -> tuple[bpb.ScoredText, SegmentTokenizer]:
        """The text itself, and how the target reads it.

        Raises:
            ClickException: The plan is not the one of the record.
        """
        plan, record = open_plan(self.run), self.record
        if plan.fingerprint != record.plan_fingerprint:
            raise click.ClickException(
                f"{self._file} is of another plan than {plan.location.url}: take another --kept"
            )
        segments = bpb.split_segments(plan, "test")
        starts = np.asarray(record.starts, np.int64)
        ends = tuple(np.asarray(one, np.int64) for one in record.block_ends)
        lengths = np.asarray([len(segment.text.encode()) for segment in segments], np.int64)
        text = bpb.ScoredText(segments, starts, lengths - starts, ends)
        return text, SegmentTokenizer.load(self.run.target, name="target")

    def score(self, folder: Path) -> None:
        """Score the model in `folder`/final and keep the NLL of its blocks."""
        text, tokenizer = self._scored
        values = bpb.score_model(
            bpb.checkpoint_ref(folder / "final", self.run.target),
            text,
            tokenizer,
            name=folder.name,
            batch_tokens=8192,
            device=bpb.device_of(None),
            stop=StopFlag(),
        )
        score = bpb.ModelScore(
            model=folder.name,
            request_fingerprint=self.record.request_fingerprint,
            nats=tuple(float(nats) for segment in values for nats in segment),
            num_bytes=tuple(block_sizes(text.block_ends).tolist()),
            seconds=0,
        )
        bpb.save_score(open_location(str(folder)), SCORES_FILE, score)

    def nats(self, folder: Path) -> tuple[float, ...]:
        """What `score` kept.

        Raises:
            ClickException: It was of other text.
        """
        request = self.record.request_fingerprint
        score = bpb.load_score(open_location(str(folder)), SCORES_FILE, request)
        if score is None:
            raise click.ClickException(f"{folder} is of other text: take another --out")
        return score.nats
