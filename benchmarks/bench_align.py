"""`make bench-align`: speed of alignment, and what is left of a source's knowledge after it.

Speed: method `bytes` beside the plain published FuseLLM alignment (our own reading,
`align_fusellm.py`, its ten entries) on the same segments in the same run, one core, compiled code
warmed up. Knowledge: coverage between all families of the tokenizer zoo; on a real model's rows the
mass that is kept and, the real test, what the aligned distributions score on the text in the
target's tokens against the source's own score of the same bytes. A position where a method gives its
label nothing is charged the row's tail, at least `LEAST_TAIL`, spread evenly over the ids that are no
entries; the share of such positions stands beside the score.

    python benchmarks/bench_align.py --quick     # speed, linearity and pools on little text
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what is measured

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import align_fusellm
import click
import numpy as np
import numpy.typing as npt
from align_pairs import (
    MAX_ENTRIES,
    PRIOR,
    Bigrams,
    Pair,
    as_segments,
    cut,
    family_tokenizer,
    library_texts,
    readable,
    real_shards,
    site_texts,
    stored_run,
    text_of,
    trained,
)
from store_model import make_model

from align.continuation import PairCounts, first_tokens
from align.first_token import piece_table
from align.method import Aligner, BytesAligner
from align.mined_vocabulary import NearestTokens
from align.project import VocabularyMap
from align.trie import TargetTrie
from fuse_eval.common_bytes import common_starts, counted_from
from store_schema.errors import LogitfuseError
from store_schema.layout import Arrays, Origin
from store_schema.plan import Segment
from store_schema.tokenizer import EncodedSegment, SegmentTokenizer
from tests.tokenizer_zoo import FAMILIES

SPEED_VOCAB_SIZE = 32_768
SPEED_TEXT_BYTES, QUICK_TEXT_BYTES = 600_000, 200_000
SPEED_TOKENS = 2_048
LONG_TOKENS, SHORT_TOKENS = 8_192, 512
ROUNDS = 5
PLAIN_SECONDS = 5.0
"""More segments are given to the plain way until it has taken so long."""
PLAIN_LIMIT_SECONDS = 300
"""Of one segment; where it is reached the ratio is a lower bound."""
FAMILY_VOCAB_SIZE = 4_096
FAMILY_TRAINING_BYTES = 400_000
KINDS = ("prose", "code", "cjk", "emoji")
COVERAGE_BYTES = 24_000
MODEL_TARGETS = {
    "gpt2": 8_192, "llama3": 6_000, "qwen": 3_000, "llama2": 8_192, "mistral": 4_096,
    "gemma": 6_000, "unigram": 5_000, "tiktoken": 2_048, "neox": 4_096,
}  # fmt: skip
QUICK_TARGETS = ("llama3", "llama2", "unigram")
TOP_K = 32
REAL_TEXT_BYTES, QUICK_REAL_BYTES = 210_000, 40_000
COUNTED_BYTES, QUICK_COUNTED_BYTES = 3_000_000, 500_000
LEAST_TAIL = 1e-4
LARGE = {"qwen": 151_643, "llama3": 128_000}
"""Source and target of the vocabulary maps."""
LARGE_TEXT_BYTES = 90_000_000
MEMORY_SHARDS = (4, 16)
MEMORY_SEGMENT_TOKENS, MEMORY_SHARD_SEGMENTS = 1_024, 32

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


# ---- speed ------------------------------------------------------------------------------------------


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
    aligner: Aligner, work: Work, nearest: NearestTokens, pair: Pair
) -> dict[str, float | bool]:
    """Seconds of the plain way over ours, on the same segments."""
    tokens = enumerate(nearest.token_map.tolist())
    mapping = {token: goal for token, goal in tokens if goal >= 0}
    plain, used, cut_off = 0.0, 0, False
    while used < len(work.texts) and (used == 0 or plain < PLAIN_SECONDS) and not cut_off:
        arguments = plain_arguments(work.one(used))
        start = time.perf_counter()
        with time_limit(PLAIN_LIMIT_SECONDS) as limit:
            align_fusellm.align_plain(*arguments, mapping)
        plain += time.perf_counter() - start
        cut_off = limit.reached
        used += 1
    ours = work.joined(used)
    seconds = alternating({"ours": partial(run, aligner, ours)}, 2 * ROUNDS)["ours"]
    return {
        "speedup": plain / statistics.median(seconds),
        "plain_tokens_per_s": ours.num_tokens / plain,
        "segments": used,
        "tokens": ours.num_tokens,
        "plain_seconds": plain,
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


# ---- coverage ---------------------------------------------------------------------------------------


def family_texts() -> list[str]:
    """What the families' tokenizers are trained on."""
    return [text_of(kind, FAMILY_TRAINING_BYTES, held_out=False) for kind in KINDS]


def measure_coverage(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Share of the target's positions with information, for every ordered pair and kind of text;
    and which could not be measured, and why."""
    zoo = {
        family: family_tokenizer(folder, family, FAMILY_VOCAB_SIZE, family_texts)
        for family in FAMILIES
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
                        shares[key] = coverage_of(pair, mapping, bigrams, common)
                    else:
                        left_out[key] = "a tokenizer refuses the text"
                except LogitfuseError as error:
                    left_out[key] = error.line()
        print(f"  coverage from {source} done", file=sys.stderr, flush=True)
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
) -> float:
    """Share of positions with information, but for first ones of a source without BOS."""
    aligner = BytesAligner(mapping, MAX_ENTRIES)
    encoded = pair.source.encode(segments)
    target = pair.target.encode(segments)
    arrays = aligner.align(bigrams.rows(encoded), [s.text.encode() for s in segments], target)
    counted = np.ones(len(arrays["origin"]), bool)
    for first, one in zip(arrays["token_offsets"][:-1], encoded, strict=True):
        counted[first] = bool(one.context_ids)
    return float((arrays["origin"][counted] != Origin.NONE).mean())


# ---- pools ------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Sums of one method over one target.

    Args:
        nats: Of the aligned labels.
        own_nats: The source's own of the same bytes.
        num_bytes: Those.
        positions: The target's.
        unlabelled: Of them, with nothing on the label.
        covered: With information.
        mass: Entries of the covered, summed.
        mass_here: Entries where a source's row begins at the same byte, summed,
        held_here: and what those rows held.
    """

    nats: float = 0.0
    own_nats: float = 0.0
    num_bytes: int = 0
    positions: int = 0
    unlabelled: int = 0
    covered: int = 0
    mass: float = 0.0
    mass_here: float = 0.0
    held_here: float = 0.0

    @property
    def excess(self) -> float:
        """Relative."""
        return self.nats / self.own_nats - 1

    @property
    def mean_mass(self) -> float:
        """Of covered positions."""
        return self.mass / max(self.covered, 1)

    @property
    def kept_here(self) -> float:
        """Mass kept where both sides begin a token: like for like, however long tokens are."""
        return self.mass_here / max(self.held_here, 1e-12)

    def add(self, other: Pool) -> None:
        """Sum."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def charged_nats(arrays: Arrays, vocab_size: int) -> npt.NDArray[np.float64]:
    """[N] nats of each label; where it has no mass, of the tail spread evenly over what is no entry."""
    labels = arrays["label_logprobs"].astype(np.float64)
    tail = np.maximum(arrays["tail_mass"].astype(np.float64), LEAST_TAIL)
    others = np.maximum(vocab_size - np.diff(arrays["entry_offsets"]), 1)
    return -np.where(np.isnan(labels), np.log(tail / others), labels)


def counted_rows(encoded: Sequence[EncodedSegment], starts: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[N] rows from each segment's common start on."""
    parts = []
    for one, start in zip(encoded, starts, strict=True):
        rows = len(one.token_ids)
        left = len(counted_from(one, int(start)).token_ids)
        parts.append(np.arange(rows) >= rows - left)
    return np.concatenate(parts)


def pool_of(
    aligner: Aligner,
    source: Arrays,
    own: Sequence[EncodedSegment],
    target: Sequence[EncodedSegment],
    texts: Sequence[bytes],
    vocab_size: int,
) -> Pool:
    """One shard by one method, on the bytes that both sides have distributions of."""
    arrays = aligner.align(source, texts, target)
    # The aligned rows are the source's: what the target itself puts before a text does not matter.
    readings = [replace(e, context_ids=e.context_ids or (0,)) for e in target]
    starts = common_starts({"source": own, "target": readings})
    rows, own_rows = counted_rows(readings, starts), counted_rows(own, starts)
    labels = source["label_logprobs"].astype(np.float64)[own_rows]
    if np.isnan(labels).any():
        raise ValueError("the source does not know its own labels")
    covered = arrays["origin"] != Origin.NONE
    mass, held = (1 - side["tail_mass"].astype(np.float64) for side in (arrays, source))
    here, there = same_starts(arrays, source)
    return Pool(
        nats=float(charged_nats(arrays, vocab_size)[rows].sum()),
        own_nats=float(-labels.sum()),
        num_bytes=sum(len(t) for t in texts) - int(sum(starts)),
        positions=int(rows.sum()),
        unlabelled=int(np.isnan(arrays["label_logprobs"][rows]).sum()),
        covered=int(covered.sum()),
        mass=float(mass[covered].sum()),
        mass_here=float(mass[here].sum()),
        held_here=float(held[there].sum()),
    )


def same_starts(target: Arrays, source: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows of both sides that begin at the same byte; of rows without bytes the last."""
    keys, rows = [], []
    for arrays in (target, source):
        ends, offsets = arrays["byte_ends"].astype(np.int64), arrays["token_offsets"]
        starts = np.concatenate(([0], ends[:-1]))[: len(ends)]
        starts[offsets[:-1][np.diff(offsets) > 0]] = 0
        segment = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        found, last = np.unique((segment * (1 << 32) + starts)[::-1], return_index=True)
        keys.append(found)
        rows.append(len(ends) - 1 - last)
    _, first, second = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return rows[0][first], rows[1][second]


@dataclass
class Pools:
    """All methods on all targets."""

    held: float = 0.0
    by_target: dict[str, dict[str, Pool]] = field(default_factory=dict)

    def total(self, method: str) -> Pool:
        """Over targets."""
        total = Pool()
        for pools in self.by_target.values():
            total.add(pools[method])
        return total

    @property
    def methods(self) -> list[str]:
        """Names."""
        return list(next(iter(self.by_target.values())))


def measure_pools(folder: Path, *, quick: bool) -> Pools:
    """Every method's distributions of a real model, judged in several targets' tokens."""
    made = make_model(folder.parent / "extract-4096", vocab_size=4_096, num_steps=200)
    print(f"model of 4,096 ids: {made.bpb:.3f} bpb on held-out text", flush=True)
    size_bytes = QUICK_REAL_BYTES if quick else REAL_TEXT_BYTES
    with tempfile.TemporaryDirectory() as name:
        shards = real_shards(made, Path(name), top_k=TOP_K, text_bytes=size_bytes)
    source = SegmentTokenizer(_tokenizer(made.folder), name="bench")
    counted: list[str] = []
    limit = QUICK_COUNTED_BYTES if quick else COUNTED_BYTES
    for document in made.other_documents:
        if sum(map(len, counted)) < limit:
            counted.append(document.text)
    found = Pools()
    held = [1 - arrays["tail_mass"].astype(np.float64) for arrays, _ in shards]
    known = [np.diff(arrays["entry_offsets"]) > 0 for arrays, _ in shards]
    found.held = float(np.concatenate(held)[np.concatenate(known)].mean())
    for family in QUICK_TARGETS if quick else MODEL_TARGETS:
        target = family_tokenizer(folder, family, MODEL_TARGETS[family], model_texts)
        pair = Pair(source, target, as_segments(counted))
        aligners = pair.aligners()
        found.by_target[family] = {name: Pool() for name in aligners}
        for arrays, segments in shards:
            own, read = source.encode(segments), target.encode(segments)
            texts = [s.text.encode() for s in segments]
            for name, aligner in aligners.items():
                pool = pool_of(aligner, arrays, own, read, texts, target.vocab_size)
                found.by_target[family][name].add(pool)
        print(f"  pools for {family} done", file=sys.stderr, flush=True)
    return found


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def model_texts() -> list[str]:
    """What the model's targets are trained on."""
    return [t for kind in ("code", "prose") for t in library_texts(kind, 1_500_000)]


# ---- maps and memory --------------------------------------------------------------------------------


def measure_maps(folder: Path) -> dict[str, float]:
    """Seconds of the vocabulary maps between 152k and 128k ids."""
    made = {}
    for half, (family, vocab_size) in enumerate(LARGE.items()):

        def texts(half: int = half) -> list[str]:
            foreign = [text_of(kind, 1_500_000, held_out=False) for kind in ("cjk", "emoji")]
            return [*site_texts(LARGE_TEXT_BYTES, half), *foreign]

        made[family] = trained(folder, family, vocab_size, texts)
    source, target = made.values()
    pair = Pair(source, target, ())
    start = time.perf_counter()
    pieces = piece_table(source.vocabulary, target)
    counts = PairCounts(source.vocab_size, target.vocab_size)
    counts.continuation(first_tokens(pieces), PRIOR)
    TargetTrie.of(target.vocabulary)
    seconds = {"bytes": time.perf_counter() - start}
    start = time.perf_counter()
    pair.nearest()
    seconds["mined"] = time.perf_counter() - start
    shared = len(set(source.vocabulary.tokens) & set(target.vocabulary.tokens))
    print(
        f"vocabulary maps {source.vocab_size:,} x {target.vocab_size:,} ({shared:,} tokens in both): "
        f"bytes {seconds['bytes']:.1f} s, mined {seconds['mined']:.1f} s"
    )
    return seconds


def measure_memory(folder: Path) -> dict[str, int]:
    """Peak resident bytes of `align run` on few and on many shards of one size."""
    training = [t for kind in ("code", "prose") for t in library_texts(kind, 1_500_000)]
    source, target = (
        trained(folder, family, FAMILY_VOCAB_SIZE * 2, partial(list, training))
        for family in ("llama3", "llama2")
    )
    pair = Pair(source, target, ())
    bigrams = Bigrams.of(source.encode(as_segments(training)), source.vocab_size)
    text = "\n".join(t for kind in ("code", "prose") for t in library_texts(kind, 10**8))
    pieces = cut(text, target, MEMORY_SEGMENT_TOKENS)
    size = MEMORY_SHARD_SEGMENTS
    shards = [pieces[i : i + size] for i in range(0, len(pieces) - size + 1, size)]
    found = {}
    for count in MEMORY_SHARDS:
        with tempfile.TemporaryDirectory() as name:
            run_file = stored_run(Path(name), pair, bigrams, shards[:count])
            command = [sys.executable, __file__, "align", str(run_file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[str(count)] = int(done.stdout.splitlines()[-1])
    return found


def align_and_tell_memory(run_file: str) -> int:
    """`align run` in this process; its peak resident bytes (Linux)."""
    from align.cli import align

    try:
        align.main(["run", run_file])
    except SystemExit as ended:  # as commands do
        if ended.code:
            raise
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM in /proc/self/status")


# ---- tables -----------------------------------------------------------------------------------------


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
        print(
            f"plain FuseLLM at {size}: {one['plain_tokens_per_s']:,.0f} tokens/s ({one['segments']} "
            f"segments, {one['plain_seconds']:.1f} s); ours {one['speedup']:,.0f} times as fast{limit}"
        )


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


def show_pools(pools: Pools) -> None:
    """For people."""
    print(
        f"\n{'excess of bpb (share without label mass)':<42}"
        + "".join(f"{name:>18}" for name in pools.by_target)
        + f"{'all':>18}"
    )
    for method in pools.methods:
        cells = [*(pools.by_target[t][method] for t in pools.by_target), pools.total(method)]
        print(
            f"{method:<42}"
            + "".join(f"{p.excess:>9.2%} ({p.unlabelled / p.positions:>5.2%})" for p in cells)
        )
    print("mass kept in entries (in brackets where a token of the source begins too)")
    for method in pools.methods:
        cells = [*(pools.by_target[t][method] for t in pools.by_target), pools.total(method)]
        print(
            f"{method:<42}"
            + "".join(f"{p.mean_mass / pools.held:>9.3f} ({p.kept_here:.3f})" for p in cells)
        )
    own = pools.total("bytes")
    bpb = own.own_nats / own.num_bytes / math.log(2)
    print(f"source's own {bpb:.4f} bpb; its store holds {pools.held:.4f} of the mass in entries")


def pools_summary(pools: Pools) -> dict[str, Any]:
    """For programs."""
    return {
        "mass_kept": pools.total("bytes").mean_mass / pools.held,
        "mass_kept_by_target": {
            name: p["bytes"].mean_mass / pools.held for name, p in pools.by_target.items()
        },
        "mass_held": pools.held,
        "mass_kept_by_method": {m: pools.total(m).mean_mass / pools.held for m in pools.methods},
        "mass_kept_at_starts_by_method": {m: pools.total(m).kept_here for m in pools.methods},
        "mass_kept_at_starts": pools.total("bytes").kept_here,
        "mass_kept_at_starts_by_target": {
            name: p["bytes"].kept_here for name, p in pools.by_target.items()
        },
        "pool_bpb_excess": {m: pools.total(m).excess for m in pools.methods},
        "pool_bpb_excess_by_target": {
            name: {m: p.excess for m, p in found.items()} for name, found in pools.by_target.items()
        },
        "unlabelled": {
            m: pools.total(m).unlabelled / pools.total(m).positions for m in pools.methods
        },
    }


@click.command()
@click.option("--quick", is_flag=True, help="Speed, linearity and pools on little text.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench", show_default=True)
def main(quick: bool, out: Path) -> None:
    """Measure, print tables, and one JSON object as the last line."""
    folder = out / "align"
    speed = measure_speed(folder, quick=quick)
    show_speed(speed)
    summary: dict[str, Any] = {
        "tokens_per_s": speed["tokens_per_s"],
        "speedup_fusellm": {size: one["speedup"] for size, one in speed["fusellm"].items()},
        "linearity": speed["linearity"],
        "speed": speed,
    }
    if not quick:
        shares, left_out = measure_coverage(folder)
        show_coverage(shares, left_out)
        summary |= {"coverage": shares, "coverage_left_out": left_out}
    pools = measure_pools(folder, quick=quick)
    show_pools(pools)
    summary |= pools_summary(pools)
    if not quick:
        summary["vocab_map_seconds"] = measure_maps(folder)
        memory = measure_memory(folder)
        few, many = (memory[str(count)] for count in MEMORY_SHARDS)
        print(
            f"peak memory of align run: {few / 1e6:,.0f} MB on {MEMORY_SHARDS[0]} shards, "
            f"{many / 1e6:,.0f} MB on {MEMORY_SHARDS[1]}, ratio {many / few:.3f}"
        )
        summary |= {"peak_rss_bytes": memory, "memory_ratio": many / few}
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["align"]:
        print(align_and_tell_memory(sys.argv[2]))
    else:
        main()
