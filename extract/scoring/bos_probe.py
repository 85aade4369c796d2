"""Whether a source reads text far better the other way: with the BOS token it lacks, or without it.

Rules about BOS are lost and wrong in published files, and nothing else shows it: the model is only
worse. So before a source's first shard a few of its segments are scored both ways on the same bytes.
The figures are kept beside the source's logs, shown in the report, and not taken a second time.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from launch.summary import logs_folder
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import StorageError
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

if TYPE_CHECKING:
    from extract.engines.protocol import Engine
    from extract.scoring.stage import Job

logger = logging.getLogger(__name__)

PROBE_SEGMENTS = 8
PROBE_TOKENS = 128
"""Of a segment, BOS included: enough, since without a BOS that a model wants all of them suffer."""
LEAST_TOKENS = 16
"""Shorter segments say too little."""
MUCH_BETTER = 0.95
"""Bits of the other way over those of the run's, at most, to be worth a warning. Gemma 3 270M read
without BOS has 0.73; models that were trained either way stay above 0.98."""


@dataclass(frozen=True, slots=True)
class BosFigures:
    """What a source gave.

    Args:
        tokenizer: Fingerprint of the tokenizer that read the text.
        rule: How the run reads text.
        with_bpb: Bits per byte with BOS.
        without_bpb: Of the same bytes without.
        num_segments: That were scored each way.
        num_bytes: That the figures are about.
    """

    tokenizer: str
    rule: Literal["with", "without"]
    with_bpb: float
    without_bpb: float
    num_segments: int
    num_bytes: int

    @property
    def wrong(self) -> bool:
        """Whether the other way is much better."""
        ours, other = self.with_bpb, self.without_bpb
        if self.rule == "without":
            ours, other = other, ours
        return other < MUCH_BETTER * ours

    def told(self, name: str) -> str:
        """The figures on one line."""
        return (
            f"{name} reads text {self.rule} BOS: {self.with_bpb:.2f} bits per byte with it, "
            f"{self.without_bpb:.2f} without ({self.num_segments} segments)"
        )

    def advice(self, name: str, store_url: str) -> str:
        """What to do where the rule is wrong."""
        option = "always" if self.rule == "without" else "never"
        return (
            f"the other way is much better: set `bos: {option}` under sources.{name}, delete "
            f"{store_url}, and run `extract plan` and `extract run` again (or set "
            f"`bos: {'never' if option == 'always' else 'always'}` to keep it so)"
        )


def probe_bos(engine: Engine, job: Job) -> BosFigures | None:
    """Score a few segments of a job with and without BOS, keep the figures, and warn.

    Once a source: not where something of it is committed, where the figures are kept already, in
    other workers than the first, or where the run file says `bos`.

    Args:
        engine: Loaded.
        job: Whose pending shards are about to be scored.

    Returns:
        The figures; None where there is nothing to find out.

    Raises:
        Stopped: Asked to stop.
    """
    source = job.source
    tokenizer = source.tokenizer
    if job.part.worker.index or source.spec.ref.bos != "auto":
        return None
    bos_ids = tokenizer.bos_ids or tuple(i for i in [tokenizer.bos_id] if i is not None)
    if not bos_ids or job.writer.committed():
        return None
    if read_figures(source.run, source.name, tokenizer.fingerprint) is not None:
        return None
    longest = min(PROBE_TOKENS, source.spec.longest)
    chosen = probe_segments(source.plan.segments(job.pending[0]))
    encoded = [part for part in tokenizer.encode(chosen) if len(part.token_ids) >= LEAST_TOKENS]
    if not encoded or longest < LEAST_TOKENS + len(bos_ids):
        return None
    job.check()
    figures = measured(engine, encoded, bos_ids, longest, tokenizer)
    job.check()
    _keep(figures, figures_path(source.run, source.name))
    if figures.wrong:
        advice = figures.advice(source.name, source.run.store_url(source.name))
        logger.warning("%s; %s", figures.told(source.name), advice)
    else:
        logger.info("%s", figures.told(source.name))
    return figures


def probe_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Some of plain text, one of each domain in turn."""
    by_domain: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.context is None:
            by_domain[segment.domain].append(segment)
    turns = max(map(len, by_domain.values()), default=0)
    in_turn = [found[i] for i in range(turns) for found in by_domain.values() if i < len(found)]
    return in_turn[:PROBE_SEGMENTS]


def measured(
    engine: Engine,
    encoded: Sequence[EncodedSegment],
    bos_ids: tuple[int, ...],
    longest: int,
    tokenizer: SegmentTokenizer,
) -> BosFigures:
    """Both ways over the same tokens: all but the first, of which nothing is known without BOS.

    Args:
        engine: Loaded.
        encoded: Segments of plain text.
        bos_ids: What stands before them with BOS.
        longest: Tokens of an input, BOS included.
        tokenizer: Whose rule is asked about.
    """
    room = longest - len(bos_ids)
    cut = [EncodedSegment((), part.token_ids[:room], part.byte_ends[:room]) for part in encoded]
    num_bytes = sum(int(part.byte_ends[-1]) - int(part.byte_ends[0]) for part in cut)
    bpb = []
    for context in (bos_ids, ()):
        inputs = [EncodedSegment(context, part.token_ids, part.byte_ends) for part in cut]
        nats = 0.0
        for index, rows in engine.score(inputs):
            known = len(inputs[index].token_ids) - 1
            nats -= float(rows.label_logprobs[-known:].sum(dtype=np.float64))
        bpb.append(nats / math.log(2) / max(num_bytes, 1))
    rule: Literal["with", "without"] = "with" if tokenizer.bos_ids else "without"
    return BosFigures(tokenizer.fingerprint, rule, bpb[0], bpb[1], len(cut), num_bytes)


def figures_path(run: RunConfig, name: str) -> Path:
    """Where the figures of a source are kept."""
    return logs_folder(run) / "extract" / name / "bos.json"


def read_figures(run: RunConfig, name: str, tokenizer: str) -> BosFigures | None:
    """The figures that are kept, if they are about this tokenizer; None where there are none."""
    try:
        figures = BosFigures(**json.loads(figures_path(run, name).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return figures if figures.tokenizer == tokenizer else None


def _keep(figures: BosFigures, path: Path) -> None:
    """A disk that refuses them costs a second probe, not the run."""
    try:
        open_location(path.parent).write_atomic(path.name, json.dumps(asdict(figures)).encode())
    except (OSError, StorageError) as error:
        logger.warning("%s cannot be written: %s", path, error)
