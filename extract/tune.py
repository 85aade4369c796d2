"""`logitfuse store tune`: what a smaller store would lose, measured on the user's own text and model.

A sample of the plan is scored once with the whole distribution (transformers engine). Every encoding
is then tried on it, to measure the compressed bytes and the distance from the whole distribution.

Shapes: R rows, V vocabulary, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.config import ExtractSection
from extract.engine_kinds import ENGINES
from extract.engines.protocol import DenseRows, EngineSpec
from extract.engines.registry import open_engine
from extract.scoring.sources import check_source
from launch.progress import Progress
from launch.visible import table
from store_schema.config import RunConfig
from store_schema.encoding.fidelity import Fidelity, FidelitySums, measure
from store_schema.encoding.frequency import Ranking, ids_by_rank, token_counts
from store_schema.encoding.trial import engine_arrays, half_learned, joined, try_encoding
from store_schema.errors import ConfigError
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.presets import PRESETS, Encoding, Preset, StoreSection
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer

SEGMENT_ROWS = 128
"""Maximal rows taken of one segment, so that the sample covers many segments."""
FLOORS = (3e-4, 1e-3, 2e-3, 4e-3, 1e-2)


@dataclass(frozen=True, slots=True)
class Choice:
    """A possible `store` section of the run file."""

    preset: Preset
    floor: float | None = None

    @property
    def encoding(self) -> Encoding:
        """The store encoding that this section selects."""
        return StoreSection(preset=self.preset, floor=self.floor).encoding()

    def __str__(self) -> str:
        return self.preset if self.floor is None else f"{self.preset}, floor {self.floor:g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A choice with its figures.

    Args:
        choice: What was tried.
        bytes_per_position: All arrays of a shard, compressed.
        fidelity: Against the whole distribution, the tail spread evenly.
    """

    choice: Choice
    bytes_per_position: float
    fidelity: Fidelity


@dataclass(slots=True)
class _Sample:
    """Figures of the sample so far; whole distributions are dropped after each segment."""

    entries: list[Arrays] = field(default_factory=list)
    sums: dict[Choice, FidelitySums] = field(default_factory=dict)
    num_rows: int = 0


def choices() -> list[Choice]:
    """Every preset, and the compact one with other floors."""
    floors = [Choice("compact", floor) for floor in FLOORS]
    usual = PRESETS["compact"].selection.floor
    return [*(Choice(name) for name in PRESETS), *(c for c in floors if c.floor != usual)]


def tune(run: RunConfig, source: str, *, num_positions: int) -> list[Measured]:
    """Try every choice on a sample of the plan.

    Args:
        run: The run file; its `extract.top_k` is how many entries an engine would return.
        source: Name of the source.
        num_positions: Approximate rows of the sample.

    Returns:
        The figures of each of `choices`, smallest store first.

    Raises:
        ConfigError: No such source, or a sampled store, which has only one encoding.
    """
    section = run.section("extract", ExtractSection)
    if section.estimator == "sampled":
        raise ConfigError(
            "a sampled store has only one encoding: there is nothing to tune",
            where="extract.estimator",
        )
    if source not in run.sources:
        raise ConfigError(
            "no such source", where="--source", expected=", ".join(run.sources), got=source
        )
    plan = open_plan(run)
    checked = check_source(run, source, plan)
    tokenizer = checked.tokenizer
    counts = token_counts(plan, tokenizer)
    ranking = ids_by_rank(counts)
    sample = _Sample()
    segments = sample_segments(plan, tokenizer, num_positions)
    total = sum(len(segment.token_ids) for segment in segments)
    with Progress(f"tune {source}", total, unit="tok") as progress:
        for segment, dense in _whole_rows(checked.spec, segments):
            _add(sample, segment, dense, section.top_k, counts, ranking)
            progress.add(len(segment.token_ids))
    if not sample.entries:
        raise ConfigError(
            "no token of the sample has anything before it",
            where=f"--positions {num_positions}",
            hint="take more positions",
        )
    together = joined(sample.entries)
    trials = [
        Measured(
            choice,
            try_encoding(together, choice.encoding, ranking).total_bytes / sample.num_rows,
            sums.means(),
        )
        for choice, sums in sample.sums.items()
    ]
    return sorted(trials, key=lambda m: m.bytes_per_position)


def sample_segments(
    plan: Plan, tokenizer: SegmentTokenizer, num_positions: int
) -> list[EncodedSegment]:
    """Beginnings of segments spread evenly over the plan, at most `SEGMENT_ROWS` tokens of each."""
    wanted = max(1, -(-num_positions // SEGMENT_ROWS))
    rows = np.unique(np.linspace(0, plan.record.num_segments - 1, wanted).astype(int))
    encoded = []
    for shard in plan.shards:
        indices = [int(row) - shard.start for row in rows if shard.start <= row < shard.stop]
        if indices:
            segments = plan.segments(shard)
            encoded += tokenizer.encode([segments[i] for i in indices])
    return [
        replace(
            segment,
            token_ids=segment.token_ids[:SEGMENT_ROWS],
            byte_ends=segment.byte_ends[:SEGMENT_ROWS],
        )
        for segment in encoded
    ]


def _whole_rows(
    spec: EngineSpec, segments: Sequence[EncodedSegment]
) -> Iterator[tuple[EncodedSegment, DenseRows]]:
    """Yield every segment with its rows over the whole vocabulary."""
    engine_name = next(kind.name for kind in ENGINES if kind.whole_rows)
    section = spec.section.model_copy(
        # May exceed the field's limit for large vocabularies, as it is for one segment at a time.
        update={"engine": engine_name, "top_k": spec.model_vocab_size, "batch_tokens": 1}
    )
    engine = open_engine(replace(spec, section=section))
    try:
        for index, dense in engine.score(segments):
            yield segments[index], dense
    finally:
        engine.close()


def _add(
    sample: _Sample,
    segment: EncodedSegment,
    dense: DenseRows,
    top_k: int,
    counts: npt.NDArray[np.int64],
    ranking: Ranking,
) -> None:
    """Try every choice on one segment's rows."""
    logprobs_RV = whole_logprobs(dense, len(ranking))
    if not len(logprobs_RV):
        return
    labels_R = segment.token_ids[-len(logprobs_RV) :].astype(np.int64)
    ends_R = segment.byte_ends[-len(logprobs_RV) :]
    entries = engine_arrays(logprobs_RV, labels_R, ends_R, top_k=top_k)
    sample.entries.append(entries)
    sample.num_rows += len(labels_R)
    student_RV = half_learned(logprobs_RV, counts)
    for choice in choices():
        rows = try_encoding(entries, choice.encoding, ranking).rows
        sums = measure(logprobs_RV, rows, student_logprobs_RV=student_RV)
        sample.sums[choice] = sample.sums.get(choice, FidelitySums()) + sums


def whole_logprobs(dense: DenseRows, vocab_size: int) -> npt.NDArray[np.float32]:
    """[R, V] log-probabilities by token id, renormalised over the tokenizer's ids."""
    wide = np.empty(dense.logprobs.shape, np.float64)
    np.put_along_axis(wide, dense.ids, dense.logprobs.astype(np.float64), axis=1)
    wide = wide[:, :vocab_size]
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return np.asarray(wide, np.float32)


def recommended(trials: Sequence[Measured], tolerance: float) -> Measured:
    """The smallest store whose total variation is within `tolerance` of the best one's.

    Raises:
        ConfigError: The tolerance is not from 0 to 1.
    """
    if not 0 <= tolerance <= 1:
        raise ConfigError(
            "tolerance refused", where="--tolerance", expected="0 to 1", got=tolerance
        )
    best = min(m.fidelity.total_variation for m in trials)
    return min(
        (m for m in trials if m.fidelity.total_variation <= best + tolerance),
        key=lambda m: m.bytes_per_position,
    )


def tune_table(trials: Sequence[Measured], chosen: Measured) -> str:
    """The figures as a table for a terminal."""
    head = ("store", "entries", "bytes/pos", "TV", "KL nats", "gradient angle", "norm error", "")
    rows = [
        (
            str(m.choice),
            f"{m.fidelity.entries_per_row:.1f}",
            f"{m.bytes_per_position:.1f}",
            f"{m.fidelity.total_variation:.4f}",
            f"{m.fidelity.finite_kl_nats:.4f}",
            f"{m.fidelity.gradient_angle_degrees:.2f} °",
            f"{m.fidelity.gradient_norm_error:.4f}",
            "<- recommended" if m is chosen else "",
        )
        for m in trials
    ]
    lines = table(head, rows)
    lines.append(
        "against the whole distribution, the tail spread evenly; gradient: of the fusion loss at the "
        "logits of a\nstudent half-way between token frequencies and the source; bytes of all arrays, "
        "without the 10 to\n20 kB of metadata of a shard"
    )
    lines += ["", "store:", f"  preset: {chosen.choice.preset}"]
    if chosen.choice.floor is not None:
        lines.append(f"  floor: {chosen.choice.floor:g}")
    return "\n".join(lines)


def tune_json(trials: Sequence[Measured], chosen: Measured) -> dict[str, Any]:
    """The figures for JSON."""
    lines = [
        {
            "preset": m.choice.preset,
            "floor": m.choice.floor,
            "bytes_per_position": m.bytes_per_position,
            **asdict(m.fidelity),
        }
        for m in trials
    ]
    # May be infinite, which JSON has no number for; finite_kl_nats is kept.
    for line in lines:
        line.pop("kl_nats")
    return {"choices": lines, "recommended": trials.index(chosen)}
