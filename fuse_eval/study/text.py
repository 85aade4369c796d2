"""The text that all rows of a setting are scored on, and the record kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fuse_eval import bpb
from fuse_eval.interference.blocks import Blocks, block_sizes
from launch.signals import StopFlag
from store_schema.config import ModelRef, RunConfig, StrictModel
from store_schema.disk.location import open_location
from store_schema.errors import MismatchError
from store_schema.plan.run_plan import open_plan
from store_schema.text.tokenizer import SegmentTokenizer

SCORES_FILE = "scores.json"
_BATCH_TOKENS = 8192


class TextRecord(StrictModel):
    """The scored blocks of a split, the same for all rows."""

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


def made_record(run: RunConfig, split: str) -> TextRecord:
    """Choose the bytes and blocks of a split, from the tokenizers of all sources of a run.

    Raises:
        MissingError: Nothing is planned.
        ConfigError: The plan has no such split.
        MismatchError: A tokenizer is not the plan's.
    """
    plan = open_plan(run)
    tokenizers = bpb.run_tokenizers(run, plan)
    text = bpb.scored_text(bpb.split_segments(plan, split), tokenizers)
    return TextRecord(
        request_fingerprint=bpb.score_request(run.target, plan, split, tokenizers),
        plan_fingerprint=plan.fingerprint,
        segment_ids=tuple(segment.segment_id for segment in text.segments),
        document_ids=tuple(segment.document_id for segment in text.segments),
        domains=tuple(segment.domain for segment in text.segments),
        starts=tuple(text.starts.tolist()),
        block_ends=tuple(tuple(ends.tolist()) for ends in text.block_ends),
    )


class StudyText:
    """A split of a data set, on which any number of models are scored alike.

    Args:
        run: The run of all sources.
        split: The split.
        file: Where its record is kept. Where it is there, scores are read without models and plan.
    """

    def __init__(self, run: RunConfig, split: str, file: Path) -> None:
        self.run, self._split, self._file = run, split, file
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            record = made_record(run, split).model_dump_json()
            open_location(str(file.parent)).write_atomic(file.name, record.encode() + b"\n")
        self.record = TextRecord.model_validate_json(file.read_text())

    @cached_property
    def _scored(self) -> bpb.ScoredText:
        """The text itself.

        Raises:
            MismatchError: The plan is not the one of the record.
        """
        plan, record = open_plan(self.run), self.record
        if plan.fingerprint != record.plan_fingerprint:
            raise MismatchError(
                "scores are of another plan",
                where=self._file,
                expected=f"plan {record.plan_fingerprint}",
                got=f"plan {plan.fingerprint}",
                hint="take another folder for the study, or remove this one",
            )
        segments = bpb.split_segments(plan, self._split)
        starts = np.asarray(record.starts, np.int64)
        ends = tuple(np.asarray(one, np.int64) for one in record.block_ends)
        lengths = np.asarray([len(segment.text.encode()) for segment in segments], np.int64)
        return bpb.ScoredText(segments, starts, lengths - starts, ends)

    def score(
        self, ref: ModelRef, folder: Path, stop: StopFlag, *, tokenizer: str = "target"
    ) -> None:
        """Score a model and keep the NLL of its blocks in `folder`.

        Args:
            ref: The model.
            folder: Where the scores go.
            stop: Checked between batches.
            tokenizer: Whose tokenizer it has: a source of the run, or the target.
        """
        text = self._scored
        of = {**self.run.sources, "target": self.run.target}[tokenizer]
        values = bpb.score_model(
            ref,
            text,
            SegmentTokenizer.load(of, name=tokenizer),
            name=folder.name,
            batch_tokens=_BATCH_TOKENS,
            device=bpb.device_of(None),
            stop=stop,
        )
        score = bpb.ModelScore(
            model=folder.name,
            request_fingerprint=self.record.request_fingerprint,
            nats=tuple(float(nats) for segment in values for nats in segment),
            num_bytes=tuple(block_sizes(text.block_ends).tolist()),
            seconds=0,
        )
        folder.mkdir(parents=True, exist_ok=True)
        bpb.save_score(open_location(str(folder)), SCORES_FILE, score)

    def nats(self, folder: Path) -> tuple[float, ...]:
        """What `score` kept.

        Raises:
            MismatchError: It is of other text.
        """
        request = self.record.request_fingerprint
        score = bpb.load_score(open_location(str(folder)), SCORES_FILE, request)
        if score is None:
            raise MismatchError(
                "scores are not there or of other text",
                where=folder,
                expected=f"text {request}",
                hint="remove the folder and run the study again",
            )
        return score.nats
