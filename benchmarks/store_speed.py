"""How fast a store is read and written, beside numpy's copy and the scoring that fills it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.store_model import BenchModel
from benchmarks.store_rows import ROW_TOKENS, BenchRows, text_tokens
from extract.config import ExtractSection
from extract.engines.protocol import engine_spec
from extract.engines.registry import open_engine
from store_schema.config import ModelRef
from store_schema.disk.location import open_location
from store_schema.encoding.trial import engine_arrays
from store_schema.layout import Arrays, array_names
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import ShardRecord
from store_schema.presets import PRESETS, Encoding, Selection
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import EncodedSegment
from store_schema.text.vocabulary import Vocabulary

ENTRIES = 25
TOP_K = 128
POSITIONS = 131_072
SCORED_SEGMENTS = 48
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Medians over interleaved rounds on one core.

    Args:
        positions_per_s: Files in the page cache to arrays of the layout.
        read_positions_per_s: The same with every invariant of the layout checked.
        ratio_copy: Time of numpy's copy of the decoded arrays over time of decoding; both allocate.
        ratio_copyto: The same, copied into arrays that are there already.
        entries: Mean entries of a position.
    """

    positions_per_s: float
    read_positions_per_s: float
    ratio_copy: float
    ratio_copyto: float
    entries: float


@dataclass(frozen=True, slots=True)
class ScoringSpeed:
    """Which engine, and its tokens per second."""

    engine: str
    tokens_per_s: float


def shard_arrays(rows: BenchRows) -> Arrays:
    """The rows again and again until they are a shard of `POSITIONS`."""
    arrays = engine_arrays(rows.logprobs_RV, rows.labels_R, rows.byte_ends_R, top_k=TOP_K)
    times = -(-POSITIONS // len(rows.labels_R))
    names = ("token_ids", "entry_ids", "entry_logprobs", "tail_mass", "label_logprobs")
    count = times * len(rows.labels_R)
    return {
        "segment_ids": np.arange(times, dtype="<i8"),
        "token_offsets": np.arange(times + 1, dtype="<i8") * len(rows.labels_R),
        "byte_ends": np.tile(arrays["byte_ends"], times),
        "entry_offsets": np.arange(count + 1, dtype="<i8") * TOP_K,
        **{name: np.tile(arrays[name], times) for name in names},
    }


def new_store(folder: Path, rows: BenchRows, encoding: Encoding) -> StoreWriter:
    """An empty store with the rows' vocabulary."""
    written = tuple(b"%d " % i for i in range(rows.vocab_size))
    vocabulary = Vocabulary(written, np.zeros(rows.vocab_size, bool))
    model = ModelIdentity(
        name="bench", model_fingerprint="b", tokenizer_fingerprint="b", vocab_size=rows.vocab_size
    )
    manifest = Manifest(
        kind="source",
        source="bench",
        model=model,
        corpus_fingerprint="b",
        plan_fingerprint="b",
        num_shards=1,
        top_k=TOP_K,
        encoding=encoding,
        vocabulary_fingerprint=vocabulary.fingerprint,
    )
    return StoreWriter.open(
        open_location(folder), manifest, vocabulary, count_tokens=lambda: rows.counts_V
    )


def shard_record(num_tokens: int) -> ShardRecord:
    """The one shard."""
    return ShardRecord(
        index=0,
        split="train",
        start=0,
        stop=1,
        num_bytes=4 * num_tokens,
        num_tokens={"bench": num_tokens},
        fingerprint="b",
    )


def decode_speed(folder: Path, rows: BenchRows) -> DecodeSpeed:
    """Write one shard of about `ENTRIES` entries a position, then read it on one core."""
    arrays = shard_arrays(rows)
    # The floor that this many entries of all are above.
    best = np.sort(arrays["entry_logprobs"].reshape(-1, TOP_K)[: len(rows.labels_R)], axis=None)
    floor = float(np.exp(best[-ENTRIES * len(rows.labels_R)]))
    encoding = PRESETS["compact"].model_copy(
        update={"selection": Selection(top_p=0, min_entries=1, floor=floor)}
    )
    count = len(arrays["token_ids"])
    writer = new_store(folder / "decode", rows, encoding)
    writer.write(shard_record(count), arrays)
    names = array_names("source")
    store = StoreReader.open(writer.location)
    decoded = store.read(0)
    there = {name: array.copy() for name, array in decoded.items()}
    with one_core():
        decode, read, copy, copyto = interleaved(
            lambda: store.read(0, names),
            lambda: store.read(0),
            lambda: {name: array.copy() for name, array in decoded.items()},
            lambda: [np.copyto(there[name], array) for name, array in decoded.items()],
        )
    entries = len(decoded["entry_ids"]) / count
    return DecodeSpeed(count / decode, count / read, copy / decode, copyto / decode, entries)


def encode_speed(rows: BenchRows) -> float:
    """Positions a second from an engine's rows (`TOP_K` of them) to a committed shard."""
    arrays = shard_arrays(rows)
    count = len(arrays["token_ids"])
    with tempfile.TemporaryDirectory() as folder:
        writer = new_store(Path(folder) / "encode", rows, PRESETS["compact"])
        writer.write(shard_record(count), arrays)
        (seconds,) = interleaved(lambda: writer.write(shard_record(count), arrays), rounds=3)
    return count / seconds


def scoring_speed(made: BenchModel, *, vllm: bool) -> ScoringSpeed:
    """Tokens a second of `extract`'s engine, in a process of its own as `extract run` has it."""
    name = "vllm" if vllm else "transformers"
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", text_tokens(made)[: SCORED_SEGMENTS * ROW_TOKENS])
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.store_speed",
                name,
                str(made.folder),
                f"{folder}/tokens.npy",
            ],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return ScoringSpeed(name, float(done.stdout.splitlines()[-1]))


def score(engine_name: Literal["vllm", "transformers"], model: Path, tokens: Path) -> float:
    """Tokens a second on rows of text, `TOP_K` entries, the engine's start apart."""
    ends = np.arange(1, ROW_TOKENS, dtype=np.uint32)
    segments = [
        EncodedSegment((int(row[0]),), row[1:].astype(np.uint32), ends)
        for row in np.load(tokens).reshape(-1, ROW_TOKENS)
    ]
    spec = engine_spec(
        "bench",
        model,
        ModelRef(model=str(model), dtype="float32"),
        ExtractSection(engine=engine_name, top_k=TOP_K),
        vocab_size=int(json.loads((model / "config.json").read_text())["vocab_size"]),
        longest=ROW_TOKENS,
        seed=0,
    )
    engine = open_engine(spec)
    try:
        list(engine.score(segments[:4]))
        start = time.perf_counter()
        count = sum(len(rows.label_logprobs) for _, rows in engine.score(segments))
        return count / (time.perf_counter() - start)
    finally:
        engine.close()


def interleaved(*calls: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each call, one after the other in every round, after a round unmeasured."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process and the threads it starts on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    print(score(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
