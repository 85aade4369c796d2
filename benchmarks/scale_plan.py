"""A plan of a million segments: what planning, status, opening stores and starting a training take.

A simulated corpus of 10^9 tokens: as many segments (10^6), shards (10^4) and sources (8) as it has, of
short texts, so that what is measured is the bookkeeping and not the tokenizers' speed. Every command
has a process of its own, whose seconds and peak memory are shown. Aligned stores are simulated too: one
real shard, and the commits of all others, as they would stand after alignment; of one source the files
of every shard are there, as links. Calls to an object store are counted on a store in memory.

    python -m benchmarks.scale_plan                     # about half an hour and 8 GB of disk
    python -m benchmarks.scale_plan --segments 20000    # the same in small

The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import LlamaConfig

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from store_schema.config import RunConfig, load_run
from store_schema.disk import remote
from store_schema.disk.location import Location, open_location
from store_schema.disk.sealed import seal
from store_schema.manifest import Commit, Manifest, ModelIdentity
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.same_source import source_identity
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_arrays, make_text

NUM_SOURCES = 8
SEGMENTS_PER_SHARD = 100
WORDS = 8
"""Of a text."""
DOMAINS = ("code", "prose", "facts")
TOP_K = 6
REMOTE_SHARDS = 200


def measured(*words: str) -> dict[str, float]:
    """Seconds and peak GiB of a command of logitfuse, or of this module, in a process of its own."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode:
            said.seek(0)
            raise click.ClickException(f"{' '.join(words)}: {said.read()[-2000:].decode()}")
    return {"seconds": seconds, "gib": usage.ru_maxrss / (1 << 20)}


def write_run(folder: Path, segments: int) -> Path:
    """Text, tokenizers and run file."""
    from first_run.demo.tokenizers import train_byte_level_bpe

    rng = np.random.default_rng(0)
    texts = {d: [make_text(d, rng, WORDS) for _ in range(1000)] for d in DOMAINS}
    models = {}
    for number, name in enumerate(["target", *(f"s{i}" for i in range(NUM_SOURCES))]):
        tokenizer = train_byte_level_bpe(
            name,
            [text for known in texts.values() for text in known],
            400 + 10 * number,
            "<s>",
            True,
            "</s>",
        )
        tokenizer.save_pretrained(folder / "models" / name)
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1
        ).save_pretrained(folder / "models" / name)
        models[name] = {"model": str(folder / "models" / name)}
    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "domain")])
    with pq.ParquetWriter(folder / "text.parquet", schema) as writer:
        for start in range(0, segments, 50_000):
            rows = range(start, min(start + 50_000, segments))
            domains = [DOMAINS[i % len(DOMAINS)] for i in rows]
            # A number makes each text another one: equal texts would be dropped.
            made = [f"{texts[d][i % 1000]} {i}" for i, d in zip(rows, domains, strict=True)]
            writer.write_table(pa.table([[f"d{i}" for i in rows], made, domains], schema=schema))
    run = {
        "name": "scale",
        "run_dir": str(folder / "run"),
        "target": models.pop("target"),
        "sources": models,
        "corpus": {"inputs": [{"path": str(folder / "text.parquet")}]},
        "plan": {"max_tokens": 256, "shard_tokens": SEGMENTS_PER_SHARD * 2 * WORDS},
        "train": {"selector": "uniform", "fusion_gate": {"kind": "none"}, "keep_best": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    return path


def write_stores(run: RunConfig, plan: Plan) -> None:
    """Aligned stores of one real shard, and the commits of the others."""
    target = SegmentTokenizer.load(run.target, name="target")
    first = plan.shards[0]
    segments = plan.segments(first)
    arrays = make_arrays(
        segments,
        target.encode(segments),
        target.vocab_size,
        good_at=DOMAINS[0],
        top_k=TOP_K,
        seed=0,
    )
    for number, (name, ref) in enumerate(run.sources.items()):
        tokenizer = SegmentTokenizer.load(ref, name=name)
        manifest = Manifest(
            kind="aligned",
            source=name,
            model=source_identity(ref, tokenizer, folder=None),
            target=ModelIdentity(
                name=run.target.model,
                model_fingerprint=None,
                tokenizer_fingerprint=target.fingerprint,
                vocab_size=target.vocab_size,
            ),
            corpus_fingerprint=plan.record.corpus_fingerprint,
            plan_fingerprint=plan.fingerprint,
            top_k=TOP_K,
            settings={},
            vocabulary_fingerprint=target.vocabulary.fingerprint,
        )
        location = open_location(run.aligned_url(name))
        done = StoreWriter.open(location, manifest, target.vocabulary).write(first, arrays)
        fill(location, done, plan, with_files=number == 0)


def fill(location: Location, done: Commit, plan: Plan, *, with_files: bool) -> None:
    """Commits of all other shards, with the content of the first."""
    folder = location.path
    if folder is None:
        raise TypeError("stores are simulated on disk")
    for shard in plan.shards[1:]:
        path = f"data/{shard.index:05d}-{shard.index:016x}"
        commit = done.model_copy(
            update={
                "shard": shard.index,
                "path": path,
                "shard_fingerprint": shard.fingerprint,
                "first_segment": shard.start,
            }
        )
        if with_files:
            shutil.copytree(folder / done.path, folder / path, copy_function=os.link)
        (folder / commit_key(shard.index)).write_bytes(seal(commit))


def start_stream(run_file: str) -> None:
    """What a training does before its first batch."""
    run = load_run(run_file)
    section = run.section("train", TrainSection)
    inputs = open_inputs(run, section)
    stream = SampleStream(inputs.samples, stream_options(run, section), inputs.domains)
    stream.step_refs(0)


def remote_calls(run: RunConfig, plan: Plan) -> dict[str, float]:
    """Calls to an object store for each shard: opening a store, and asking what is committed."""
    source = next(iter(run.sources))
    local = open_location(run.aligned_url(source))
    away = open_location("memory://scale/store")
    keys = [commit_key(shard.index) for shard in plan.shards[:REMOTE_SHARDS]]
    for key in ("manifest.json", "vocabulary.parquet", "ranking.parquet", *keys):
        if local.exists(key):
            away.write_atomic(key, local.read_bytes(key))
    calls = 0
    call, call_each = remote.call, remote.call_each

    def counted(filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(filesystem, method, *args, **options)

    def counted_each(filesystem: Any, method: str, paths: Sequence[str]) -> list[Any]:
        nonlocal calls
        calls += len(paths)
        return call_each(filesystem, method, paths)

    def of(function: Callable[[], object]) -> float:
        nonlocal calls
        calls = 0
        function()
        return calls / len(keys)

    remote.call, remote.call_each = counted, counted_each
    try:
        return {
            "open_with_commits": of(lambda: StoreReader.open(away).commits),
            "listing": of(lambda: away.names("commits")),
        }
    finally:
        remote.call, remote.call_each = call, call_each


def plan_figures(segments: int = 1_000_000, out: Path | None = None) -> dict[str, Any]:
    """Seconds and GiB of each command, and calls to an object store for a shard."""
    folder = Path(tempfile.mkdtemp(prefix="scale-plan-")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = str(write_run(folder, segments))
        figures: dict[str, Any] = {
            "corpus_build": measured("logitfuse", "corpus", "build", file),
            "extract_plan": measured("logitfuse", "extract", "plan", file),
        }
        run = load_run(file)
        plan = open_plan(run)
        write_stores(run, plan)
        store = run.aligned_url(next(iter(run.sources)))
        figures |= {
            "extract_plan_again": measured("logitfuse", "extract", "plan", file),
            "status": measured("logitfuse", "status", file),
            "store_verify_quick": measured("logitfuse", "store", "verify", store, "--quick"),
            "stream_start": measured("benchmarks.scale_plan", "--start-stream", file),
        }
        commands = list(figures.values())
        return {
            "segments": segments,
            "shards": len(plan.shards),
            "sources": NUM_SOURCES,
            "commands": figures,
            "seconds_a_source": figures["extract_plan"]["seconds"] / (NUM_SOURCES + 1),
            "peak_gib": max(command["gib"] for command in commands),
            "calls_a_shard": remote_calls(run, plan),
        }
    finally:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)


def table(figures: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{'':<22}{'seconds':>10}{'peak GiB':>10}"]
    for name, found in figures["commands"].items():
        lines.append(f"{name.replace('_', ' '):<22}{found['seconds']:>10.1f}{found['gib']:>10.2f}")
    return "\n".join(lines)


@click.command()
@click.option("--segments", default=1_000_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the run here.")
@click.option("--start-stream", "run_file", hidden=True)
def main(segments: int, out: Path | None, run_file: str | None) -> None:
    """Measure planning and everything that asks what is finished, at size."""
    if run_file is not None:
        start_stream(run_file)
        return
    figures = plan_figures(segments, out)
    print(table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
