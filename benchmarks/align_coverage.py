"""Coverage: share of positions with information, between all families that give text back."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.chain.project import BytesAligner
from align.chain.vocabulary_map import VocabularyMap
from benchmarks.align_pairs import (
    MAX_ENTRIES,
    Bigrams,
    Pair,
    as_segments,
    family_tokenizer,
    readable,
    text_of,
)
from store_schema.errors import LogitfuseError
from store_schema.layout import Origin
from store_schema.plan.plan import Segment
from tests.tokenizer_zoo import LOSSLESS

FAMILY_VOCAB_SIZE = 4_096
FAMILY_TRAINING_BYTES = 400_000
KINDS = ("prose", "code", "cjk", "emoji")
COVERAGE_BYTES = 24_000


def family_texts() -> list[str]:
    """What the families' tokenizers are trained on."""
    return [text_of(kind, FAMILY_TRAINING_BYTES, held_out=False) for kind in KINDS]


def measure_coverage(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Share of the target's positions with information, for every ordered pair and kind of text;
    and which could not be measured, and why."""
    zoo = {
        family: family_tokenizer(folder, family, FAMILY_VOCAB_SIZE, family_texts)
        for family in LOSSLESS
    }
    size_bytes = FAMILY_TRAINING_BYTES // len(KINDS)
    training = [s.text for kind in KINDS for s in segments_of(kind, size_bytes, held_out=False)]
    known = {f: readable(tokenizer, as_segments(training)) for f, tokenizer in zoo.items()}
    judged = {kind: segments_of(kind, COVERAGE_BYTES, held_out=True) for kind in KINDS}
    asked = {
        (family, kind): readable(tokenizer, segments)
        for family, tokenizer in zoo.items()
        for kind, segments in judged.items()
    }
    shares: dict[str, float] = {}
    left_out: dict[str, str] = {}
    lost = 0
    for source in zoo:
        bigrams = Bigrams.of(zoo[source].encode(known[source]), zoo[source].vocab_size)
        for target in zoo:
            pair = Pair(zoo[source], zoo[target], both(known[source], known[target]))
            mapping = pair.bytes_map()
            for kind in KINDS:
                key = f"{source}/{target}/{kind}"
                common = both(asked[source, kind], asked[target, kind])
                try:
                    if common:
                        shares[key], outside = coverage_of(pair, mapping, bigrams, common)
                        lost += outside
                    else:
                        left_out[key] = "a tokenizer refuses the text"
                except LogitfuseError as error:
                    left_out[key] = error.line()
        print(f"  coverage from {source} done", file=sys.stderr, flush=True)
    print(f"positions without information after a source's first token: {lost}")
    return shares, left_out


def both(some: Sequence[Segment], others: Sequence[Segment]) -> list[Segment]:
    """Segments in both."""
    indices = {s.index for s in others}
    return [s for s in some if s.index in indices]


def segments_of(kind: str, size_bytes: int, *, held_out: bool) -> list[Segment]:
    """Text of a kind in segments of about a kilobyte, cut at line ends."""
    joined, current = [], ""
    for line in text_of(kind, size_bytes, held_out=held_out).splitlines(keepends=True):
        current += line
        if len(current.encode()) > 1_000:
            joined.append(current)
            current = ""
    return as_segments([*joined, current] if current else joined)


def coverage_of(
    pair: Pair, mapping: VocabularyMap, bigrams: Bigrams, segments: Sequence[Segment]
) -> tuple[float, int]:
    """Share of positions with information, but for first ones of a source without BOS.

    Also how many positions have none though they begin after that first token, of which such a source
    says nothing: all that alignment could be blamed for.
    """
    aligner = BytesAligner(mapping, MAX_ENTRIES)
    encoded = pair.source.encode(segments)
    target = pair.target.encode(segments)
    arrays = aligner.align(bigrams.rows(encoded), [s.text.encode() for s in segments], target)
    none = arrays["origin"] == Origin.NONE
    counted, unknown = np.ones(len(none), bool), np.zeros(len(none), bool)
    for first, own, other in zip(arrays["token_offsets"][:-1], encoded, target, strict=True):
        if not own.context_ids:
            counted[first] = False
            begins = np.concatenate(([0], other.byte_ends[:-1]))
            unknown[first : first + len(begins)] = begins < max(own.byte_ends[0], 1)
    return float(1 - none[counted].mean()), int((none & ~unknown).sum())


def show_coverage(shares: dict[str, float], left_out: dict[str, str]) -> None:
    """For people: worst and mean by kind, and every pair below 0.99."""
    for kind in KINDS:
        values = {k: v for k, v in shares.items() if k.endswith(f"/{kind}")}
        if values:
            worst = min(values, key=values.__getitem__)
            mean = statistics.mean(values.values())
            print(
                f"coverage on {kind}: mean {mean:.4f}, worst {values[worst]:.4f} ({worst}), "
                f"{len(values)} pairs"
            )
    goals = {"prose": 0.99, "code": 0.99, "cjk": 0.97, "emoji": 0.97}
    below = {k: v for k, v in shares.items() if v < goals[k.rsplit("/", 1)[1]]}
    for key, share in sorted(below.items(), key=lambda pair: pair[1])[:20]:
        print(f"  below its goal: {key} {share:.4f}")
    reasons = sorted(set(left_out.values()))
    print(f"  {len(below)} below their goals, {len(left_out)} not measured: {'; '.join(reasons)}")
