"""Checks whether a source predicts text far better with the opposite BOS setting.

Published tokenizer files often lack the BOS rule or have a wrong one, and the only symptom is a worse
model. So before a source's first shard a few of its segments are scored with and without BOS on the
same bytes. The figures are kept beside the source's logs, shown in the report, and not measured again.
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
"""Tokens scored of a segment, BOS included: few suffice, as a missing BOS harms all of them."""
LEAST_TOKENS = 16
"""Shorter segments are not used."""
MUCH_BETTER = 0.95
"""Warn if the opposite setting has less than this share of the bits per byte. Gemma 3 270M read without
BOS has 0.73; models trained with and without it stay above 0.98."""


@dataclass(frozen=True, slots=True)
class BosFigures:
    """Bits per byte of a source with and without BOS.

    Args:
        tokenizer: Fingerprint of the tokenizer that read the text.
        rule: Whether the run reads text with BOS.
        with_bpb: Bits per byte with BOS.
        without_bpb: Bits per byte of the same bytes without BOS.
        num_segments: Segments scored in each way.
        num_bytes: Bytes that the figures cover.
    """

    tokenizer: str
    rule: Literal["with", "without"]
    with_bpb: float
    without_bpb: float
    num_segments: int
    num_bytes: int

    @property
    def wrong(self) -> bool:
        """Whether the opposite setting is much better."""
        ours, other = self.with_bpb, self.without_bpb
        if self.rule == "without":
            ours, other = other, ours
        return other < MUCH_BETTER * ours

    def describe(self, name: str) -> str:
        """The figures on one line."""
        return (
            f"{name} reads text {self.rule} BOS: {self.with_bpb:.2f} bits per byte with it, "
            f"{self.without_bpb:.2f} without ({self.num_segments} segments)"
        )

    def advice(self, name: str, store_url: str) -> str:
        """What the user can do if the rule is wrong."""
        option = "always" if self.rule == "without" else "never"
        return (
            f"the opposite is much better: set `bos: {option}` under sources.{name}, delete "
            f"{store_url}, and run `extract plan` and `extract run` again (or set "
            f"`bos: {'never' if option == 'always' else 'always'}` to keep it so)"
        )


def probe_bos(engine: Engine, job: Job) -> BosFigures | None:
    """Score a few segments of a job with and without BOS, keep the figures, and warn if needed.

    Done once for each source: not if it has commits or kept figures already, not in other workers
    than the first, and not if the run file sets `bos`.

    Args:
        engine: The loaded model.
        job: Its pending shards are about to be scored.

    Returns:
        The figures; None if nothing was measured.

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
    chosen = probe_segments(source.plan.segments(source.plan.shards[0]))
    encoded = [
        part
        for part in tokenizer.encode(chosen)
        if len(part.token_ids) >= LEAST_TOKENS and len(part.input_ids) <= source.spec.longest
    ]
    if not encoded or longest < LEAST_TOKENS + len(bos_ids):
        return None
    job.check()
    figures = measured(engine, encoded, bos_ids, longest, tokenizer)
    job.check()
    _keep(figures, figures_path(source.run, source.name))
    if figures.wrong:
        advice = figures.advice(source.name, source.run.store_url(source.name))
        logger.warning("%s; %s", figures.describe(source.name), advice)
    else:
        logger.info("%s", figures.describe(source.name))
    return figures


def probe_segments(segments: Sequence[Segment]) -> list[Segment]:
    """At most `PROBE_SEGMENTS` segments of plain text, one of each domain in turn."""
    by_domain: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.context is None:
            by_domain[segment.domain].append(segment)
    turns = max(map(len, by_domain.values()), default=0)
    in_turn = [part[i] for i in range(turns) for part in by_domain.values() if i < len(part)]
    return in_turn[:PROBE_SEGMENTS]


def measured(
    engine: Engine,
    encoded: Sequence[EncodedSegment],
    bos_ids: tuple[int, ...],
    longest: int,
    tokenizer: SegmentTokenizer,
) -> BosFigures:
    """Bits per byte with and without BOS, over all tokens but the first of each segment, which has no
    prediction without BOS.

    Args:
        engine: The loaded model.
        encoded: Segments of plain text.
        bos_ids: Token ids put before each segment for the figure with BOS.
        longest: Maximal tokens of an input, BOS included.
        tokenizer: Of the model.
    """
    most = longest - len(bos_ids)
    cut = [EncodedSegment((), part.token_ids[:most], part.byte_ends[:most]) for part in encoded]
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
    """The kept figures of a source; None if there are none for this tokenizer."""
    try:
        figures = BosFigures(**json.loads(figures_path(run, name).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return figures if figures.tokenizer == tokenizer else None


def _keep(figures: BosFigures, path: Path) -> None:
    """Write the figures; only warn if that fails, as they can be measured again."""
    try:
        open_location(path.parent).write_atomic(path.name, json.dumps(asdict(figures)).encode())
    except (OSError, StorageError) as error:
        logger.warning("%s cannot be written: %s", path, error)
