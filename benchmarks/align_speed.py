"""Speed of method `bytes` beside the plain published FuseLLM alignment, on one core.

The plain way is our own reading (`align_fusellm.py`), with its ten entries, on the same segments in the
same run; compiled code is warmed up.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from align.chain.project import BytesAligner
from align.methods.method import Aligner
from benchmarks import align_fusellm
from benchmarks.align_pairs import (
    COUNTED_BYTES,
    MAX_ENTRIES,
    QUICK_COUNTED_BYTES,
    Bigrams,
    Pair,
    as_segments,
    cut,
    library_texts,
    trained,
)
from store_schema.layout import Arrays
from store_schema.text.tokenizer import EncodedSegment

SPEED_VOCAB_SIZE = 32_768
SPEED_TEXT_BYTES, QUICK_TEXT_BYTES = 600_000, 200_000
SPEED_TOKENS = 2_048
LONG_TOKENS, SHORT_TOKENS = 8_192, 512
ROUNDS = 5
PLAIN_SECONDS = 5.0
"""More segments are given to the plain way until it has taken so long."""
PLAIN_LIMIT_SECONDS = 300
"""Of one segment; where it is reached the ratio is a lower bound."""

Seconds = dict[str, list[float]]


def alternating(ways: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Seconds of each way in rounds of alternating order."""
    found: Seconds = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(list(ways)):
            start = time.perf_counter()
            ways[name]()
            found[name].append(time.perf_counter() - start)
    return found


@dataclass(frozen=True, slots=True)
class Work:
    """Segments with a source's rows, ready to be aligned."""

    texts: list[bytes]
    source: Arrays
    target: list[EncodedSegment]

    @classmethod
    def of(cls, pair: Pair, bigrams: Bigrams, texts: Sequence[str]) -> Work:
        """Tokenise and make rows."""
        segments = as_segments(texts)
        rows = bigrams.rows(pair.source.encode(segments))
        return cls([t.encode() for t in texts], rows, pair.target.encode(segments))

    @property
    def num_tokens(self) -> int:
        """Of the target."""
        return sum(len(e.token_ids) for e in self.target)

    def one(self, segment: int) -> Work:
        """One segment."""
        first, last = self.source["token_offsets"][segment : segment + 2]
        entries = self.source["entry_offsets"][first : last + 1]
        source = {
            name: array[entries[0] : entries[-1]]
            if name in ("entry_ids", "entry_logprobs")
            else array[first:last]
            for name, array in self.source.items()
        }
        source |= {
            "segment_ids": self.source["segment_ids"][segment : segment + 1],
            "token_offsets": np.array([0, last - first]),
            "entry_offsets": entries - entries[0],
        }
        return Work([self.texts[segment]], source, [self.target[segment]])

    def joined(self, num_segments: int) -> Work:
        """The first segments."""
        rows = int(self.source["token_offsets"][num_segments])
        entries = int(self.source["entry_offsets"][rows])
        source = {
            name: array[:entries] if name in ("entry_ids", "entry_logprobs") else array[:rows]
            for name, array in self.source.items()
        }
        source |= {
            "segment_ids": self.source["segment_ids"][:num_segments],
            "token_offsets": self.source["token_offsets"][: num_segments + 1],
            "entry_offsets": self.source["entry_offsets"][: rows + 1],
        }
        return Work(self.texts[:num_segments], source, self.target[:num_segments])


def speed_pair(folder: Path, counted_bytes: int) -> Pair:
    """Two families of 32k ids: byte-level BPE with grouped digits, SentencePiece-like BPE; and text of
    each domain for bigrams and continuations."""

    def texts() -> list[str]:
        return [t for kind in ("code", "prose") for t in library_texts(kind, 10**8)]

    source, target = (
        trained(folder, family, SPEED_VOCAB_SIZE, texts) for family in ("llama3", "llama2")
    )
    counted = [t for kind in ("code", "prose") for t in library_texts(kind, counted_bytes)]
    return Pair(source, target, as_segments(counted))


def speed_text(size_bytes: int) -> str:
    """Text that neither tokenizers' maps nor bigrams were counted on, code and prose."""
    parts = (library_texts(kind, size_bytes // 2, held_out=True) for kind in ("code", "prose"))
    text = "\n".join(t for part in parts for t in part)
    return text * math.ceil(size_bytes / len(text.encode()))


def measure_speed(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Tokens a second, linearity, and the plain way's time."""
    pair = speed_pair(folder, QUICK_COUNTED_BYTES if quick else COUNTED_BYTES)
    bigrams = Bigrams.of(pair.source.encode(pair.training), pair.source.vocab_size)
    mapping = pair.bytes_map()
    aligner = BytesAligner(mapping, MAX_ENTRIES)
    text = speed_text(QUICK_TEXT_BYTES if quick else SPEED_TEXT_BYTES)
    work = {
        size: Work.of(pair, bigrams, cut(text, pair.target, size))
        for size in (SHORT_TOKENS, 1_024, SPEED_TOKENS, LONG_TOKENS)
    }
    start = time.perf_counter()
    run(aligner, work[SHORT_TOKENS].one(0))
    compile_seconds = time.perf_counter() - start
    measured = (SHORT_TOKENS, SPEED_TOKENS, LONG_TOKENS)
    ways = {str(size): partial(run, aligner, work[size]) for size in measured}
    seconds = alternating(ways, ROUNDS)
    per_token = {
        size: statistics.median(seconds[str(size)]) / work[size].num_tokens for size in measured
    }
    rates = [work[SPEED_TOKENS].num_tokens / s for s in seconds[str(SPEED_TOKENS)]]
    entries = len(work[SPEED_TOKENS].source["entry_ids"])
    found = {
        "tokens_per_s": 1 / per_token[SPEED_TOKENS],
        "tokens_per_s_rounds": [min(rates), max(rates)],
        "entries_per_position": entries / len(work[SPEED_TOKENS].source["token_ids"]),
        "vocab_sizes": [pair.source.vocab_size, pair.target.vocab_size],
        "compile_seconds": compile_seconds,
        "linearity": per_token[LONG_TOKENS] / per_token[SHORT_TOKENS],
        "microseconds_per_token": {str(size): s * 1e6 for size, s in per_token.items()},
    }
    sizes = (SHORT_TOKENS,) if quick else (SHORT_TOKENS, 1_024, SPEED_TOKENS)
    nearest = pair.nearest()
    found["fusellm"] = {
        str(size): against_plain(aligner, work[size], nearest, pair) for size in sizes
    }
    return found


def run(aligner: Aligner, work: Work) -> Arrays:
    """One call."""
    return aligner.align(work.source, work.texts, work.target)


def against_plain(
    aligner: Aligner, work: Work, nearest: npt.NDArray[np.int32], pair: Pair
) -> dict[str, float | bool | None]:
    """Seconds of the plain way over ours, on the same segments.

    What of the plain way's time goes into edit distances is found by working out the same ones again
    right after each segment, so that nothing is added to what is compared; the rest is the table of
    the warping, the way back and the rows.
    """
    tokens = enumerate(nearest.tolist())
    mapping = {token: goal for token, goal in tokens if goal >= 0}
    plain, distances, used, cut_off = 0.0, 0.0, 0, False
    while used < len(work.texts) and (used == 0 or plain < PLAIN_SECONDS) and not cut_off:
        arguments = plain_arguments(work.one(used))
        start = time.perf_counter()
        with time_limit(PLAIN_LIMIT_SECONDS) as limit:
            align_fusellm.align_plain(*arguments, mapping=mapping)
        plain += time.perf_counter() - start
        cut_off = limit.reached
        if not cut_off:
            start = time.perf_counter()
            align_fusellm.pair_distances(arguments[1], arguments[3])
            distances += time.perf_counter() - start
        used += 1
    ours = work.joined(used)
    seconds = alternating({"ours": partial(run, aligner, ours)}, 2 * ROUNDS)["ours"]
    return {
        "speedup": plain / statistics.median(seconds),
        "plain_tokens_per_s": ours.num_tokens / plain,
        "segments": used,
        "tokens": ours.num_tokens,
        "plain_seconds": plain,
        "plain_distance_seconds": None if cut_off else distances,
        "plain_warping_seconds": None if cut_off else plain - distances,
        "cut_off": cut_off,
    }


def plain_arguments(work: Work) -> tuple[Any, ...]:
    """A segment as `align_plain` takes it, made outside of its time."""
    text, source = work.texts[0], work.source
    offsets = source["entry_offsets"].tolist()
    entries = list(
        zip(source["entry_ids"].tolist(), source["entry_logprobs"].tolist(), strict=True)
    )
    rows = [entries[a : min(b, a + align_fusellm.TOP_K)] for a, b in zip(offsets, offsets[1:])]  # noqa: B905, RUF007
    return (
        source["token_ids"].tolist(),
        token_texts(text, source["byte_ends"]),
        work.target[0].token_ids.tolist(),
        token_texts(text, work.target[0].byte_ends),
        rows,
    )


def token_texts(text: bytes, ends: npt.NDArray[Any]) -> list[bytes]:
    """Bytes of each token."""
    stops = ends.tolist()
    return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


@dataclass
class Limit:
    """Whether a block was cut off."""

    reached: bool = False


@contextmanager
def time_limit(seconds: int) -> Iterator[Limit]:
    """Leave the block after so many seconds (main thread, plain Python)."""
    limit = Limit()

    def leave(_: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, leave)
    signal.alarm(seconds)
    try:
        yield limit
    except TimeoutError:
        limit.reached = True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def show_speed(found: dict[str, Any]) -> None:
    """For people."""
    low, high = found["tokens_per_s_rounds"]
    sizes = " x ".join(f"{size:,}" for size in found["vocab_sizes"])
    print(
        f"method bytes, one core, {sizes} ids, {found['entries_per_position']:.0f} entries: "
        f"{found['tokens_per_s']:,.0f} target tokens/s at {SPEED_TOKENS:,} (rounds {low:,.0f} to "
        f"{high:,.0f}); first call {found['compile_seconds']:.1f} s"
    )
    each = ", ".join(f"{size} {us:.2f}" for size, us in found["microseconds_per_token"].items())
    print(f"microseconds a token by segment length: {each}; linearity {found['linearity']:.3f}")
    for size, one in found["fusellm"].items():
        limit = f" (cut off at {PLAIN_LIMIT_SECONDS} s: at least)" if one["cut_off"] else ""
        parts = ""
        if not one["cut_off"]:
            parts = (
                f": edit distances {one['plain_distance_seconds']:.1f}, "
                f"warping and rows {one['plain_warping_seconds']:.1f}"
            )
        print(
            f"plain FuseLLM at {size}: {one['plain_tokens_per_s']:,.0f} tokens/s ({one['segments']} "
            f"segments, {one['plain_seconds']:.1f} s{parts}); "
            f"ours {one['speedup']:,.0f} times as fast{limit}"
        )
