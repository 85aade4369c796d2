"""`make bench-extract`: extraction beside vLLM itself and beside other ways, on real models.

Each vocabulary and number of entries has a process of its own with one vLLM engine, on which all
ways score the same segments in turn, in rounds of alternating order: vLLM's `generate` with the
results thrown away; our engine alone; ours, all that `extract run` does from the plan to committed
shards, by the tap and by the flat lists; lists of dicts converted token by token; DistillKit's way
(`extract_ways`). Figures are ratios of medians. Memory is measured in another process, so that
nothing that ran before has filled the heap. Then 4 workers with real engines are killed at random
moments and started again.

    python -m benchmarks.bench_extract --quick     # 4,096 ids, k = 128 alone, no kills
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.extract_ways import (
    dicts,
    distillkit,
    front_end_timed,
    generate,
    recipe_of,
    sampling_params,
)
from benchmarks.store_model import BenchModel, make_model
from extract.engines.registry import open_engine
from extract.run import score
from extract.scoring.sources import CheckedSource, check_source
from extract.scoring.stage import Job
from launch.signals import StopFlag
from launch.work import Part, Worker
from launch.worklog import WorkLog, read_sessions
from store_schema.config import RunConfig, load_run
from store_schema.disk.location import open_location
from store_schema.plan.plan import ShardRecord
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader

TRAINING_STEPS = 200
MAX_TOKENS = 512
SHARD_TOKENS = 8_192
ENTRIES = (16, 64, 128)
SHARDS = {4_096: 8, 32_768: 3}
"""Of a round."""
ROUNDS, SLOW_ROUNDS = 3, 2
"""The slow ways, whose goals are far off, stay out of the last round."""
TEXT_BYTES = 600_000
"""Held-out text first, then as much of what the model was trained on as is needed."""
WORKERS = 4


def write_run(made: BenchModel, folder: Path, **extract: Any) -> Path:
    """A planned run with the model as its one source and target."""
    documents = folder / "docs.jsonl"
    with documents.open("w", encoding="utf-8") as file:
        size_bytes = 0
        for document in (*made.documents, *made.other_documents):
            if size_bytes > TEXT_BYTES:
                break
            size_bytes += len(document.text.encode())
            row = {"id": document.id, "text": document.text, "domain": document.domain}
            file.write(json.dumps(row | {"split": "train"}) + "\n")
    model = {"model": str(made.folder.resolve()), "dtype": "float32"}
    content = {
        "name": "bench",
        "run_dir": str(folder / "run"),
        "sources": {"bench": model},
        "target": model,
        "corpus": {"inputs": [{"path": str(documents)}]},
        "plan": {"max_tokens": MAX_TOKENS, "shard_tokens": SHARD_TOKENS},
        "extract": {"engine": "vllm", **extract},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    for stage in ("corpus", "build"), ("extract", "plan"):
        command = [sys.executable, "-m", "logitfuse", *stage, str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


class Bench:
    """One engine and the ways that share it."""

    def __init__(self, run: RunConfig, num_shards: int, folder: Path) -> None:
        self.source: CheckedSource = check_source(run, "bench", open_plan(run))
        self.shards = self.source.plan.shards[:num_shards]
        self.folder = folder
        engine: Any = open_engine(self.source.spec)
        self.engine, self.tap = engine, engine.tap
        assert self.tap is not None, "the tap was not taken"
        self._stores = 0

    def inputs(self, shards: Sequence[ShardRecord]) -> list[list[int]]:
        """What vLLM reads of these shards."""
        plan, tokenizer = self.source.plan, self.source.tokenizer
        return [
            encoded.input_ids
            for shard in shards
            for encoded in tokenizer.encode(plan.segments(shard))
        ]

    def ours(self, shards: Sequence[ShardRecord], *, tapped: bool) -> None:
        """All that `extract run` does once its engine is ready, into a new store."""
        self.engine.tap = self.tap if tapped else None
        folder = self.folder / f"store-{self._stores}"
        self._stores += 1
        source = replace(self.source, location=open_location(folder))
        writer = source.open_store()
        log = WorkLog(source.run, "bench", source.name, Worker())
        with log.session(shards, source.name) as session:
            part = Part(limit=len(shards))
            score(self.engine, Job(source, writer, part, shards, session, StopFlag(), stop_fd=None))
        assert writer.committed() == {shard.index for shard in shards}
        shutil.rmtree(folder)

    def engine_alone(self, shards: Sequence[ShardRecord], *, tapped: bool = True) -> None:
        """The engine's rows, thrown away."""
        self.engine.tap = self.tap if tapped else None
        for shard in shards:
            encoded = self.source.tokenizer.encode(self.source.plan.segments(shard))
            for _ in self.engine.score(encoded):
                pass


def tokens_of(shards: Sequence[ShardRecord]) -> int:
    """Positions of shards."""
    return sum(shard.num_tokens["bench"] for shard in shards)


def measure(run_file: Path, num_shards: int, what: str) -> dict[str, Any]:
    """`speed` or `memory` of all ways on one engine."""
    run = load_run(str(run_file))
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(run, num_shards, Path(name))
        try:
            return memory(bench) if what == "memory" else speed(bench)
        finally:
            bench.engine.close()


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens a second of each way, and microseconds a token of the front end."""
    spec, shards = bench.source.spec, bench.shards
    top_k = spec.section.top_k
    parts = [bench.inputs([shard]) for shard in shards]
    inputs = [ids for part in parts for ids in part]
    llm, vllm = bench.engine.llm, bench.engine.vllm
    flat, listed = (sampling_params(vllm, top_k, flat=value) for value in (True, False))
    recipe, bits = recipe_of(top_k, spec.vocab_size)
    ways: dict[str, Callable[[], object]] = {
        # A shard a call: all at once is slower, since the results of all are held.
        "generate": lambda: [generate(llm, flat, part) for part in parts],
        "engine": lambda: bench.engine_alone(shards),
        "ours": lambda: bench.ours(shards, tapped=True),
        "ours_flat": lambda: bench.ours(shards, tapped=False),
        "dicts": lambda: [dicts(llm, listed, part) for part in parts],
        "distillkit": lambda: distillkit(llm, flat, inputs, recipe, bits, bench.folder),
    }
    bench.ours(shards[:1], tapped=True)  # warms up
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(1, ROUNDS + 1):
        print(f"  round {round_number} of {ROUNDS}", file=sys.stderr, flush=True)
        order = list(ways) if round_number % 2 else list(reversed(ways))
        for name in order:
            if round_number > SLOW_ROUNDS and name in ("dicts", "distillkit"):
                continue
            start = time.perf_counter()
            ways[name]()
            rates[name].append(tokens_of(shards) / (time.perf_counter() - start))
    found: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    pairs = zip(rates["ours"], rates["generate"], strict=True)
    found["pairs"] = [ours / own for ours, own in pairs]
    found["frontend"] = {
        "tap": front_end(bench, tapped=True),
        "flat": front_end(bench, tapped=False),
    }
    return found


def front_end(bench: Bench, *, tapped: bool) -> float:
    """Microseconds a token that the calling thread spends outside of vLLM's engine core: from its
    outputs to arrays. The thread that turns rows into entries is not in it."""
    shards = bench.shards[: max(len(bench.shards) // 2, 1)]
    with front_end_timed(bench.engine.llm.llm_engine) as spent:
        bench.engine_alone(shards, tapped=tapped)
    return spent.seconds / tokens_of(shards) * 1e6


def memory(bench: Bench) -> dict[str, int]:
    """Peak resident bytes of the engine alone, and of all of ours on a quarter of the shards and on
    all, in a process that did nothing else before but one small shard of ours."""
    bench.ours(bench.shards[:1], tapped=True)
    few = bench.shards[: max(len(bench.shards) // 4, 2)]
    return {
        "engine": peak_rss(lambda: bench.engine_alone(bench.shards)),
        "few_shards": peak_rss(lambda: bench.ours(few, tapped=True)),
        "all_shards": peak_rss(lambda: bench.ours(bench.shards, tapped=True)),
    }


def peak_rss(call: Callable[[], object]) -> int:
    """Largest resident size of this process while `call` runs, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    call()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM in /proc/self/status")


def kills(made: BenchModel, folder: Path) -> dict[str, int]:
    """4 workers killed at random moments, then started again: what was done twice?

    Returns:
        Shards in all, committed when the last worker was killed, committed shards that were done
        again, and shards begun before the kills that had to be begun again, in all and of the worker
        that lost most.
    """
    path = write_run(made, folder, top_k=64, threads=1)
    run = load_run(str(path))
    plan = open_plan(run)
    chance = random.Random(0)
    command = [sys.executable, "-P", "-m", "extract", "run-source", str(path), "--source", "bench"]

    def start() -> list[subprocess.Popen[bytes]]:
        return [
            subprocess.Popen([*command, "--worker", f"{i}/{WORKERS}"], stderr=subprocess.DEVNULL)
            for i in range(WORKERS)
        ]

    def paths() -> dict[int, str]:
        store = open_location(run.store_url("bench"))
        if not store.exists("manifest.json"):
            return {}
        return {shard: commit.path for shard, commit in StoreReader.open(store).commits.items()}

    workers = start()
    deadline = time.monotonic() + 300
    while len(paths()) < len(plan.shards) // 4:
        assert time.monotonic() < deadline, "no shard was committed"
        assert any(worker.poll() is None for worker in workers), "the workers ended"
        time.sleep(0.2)
    for worker in chance.sample(workers, len(workers)):
        time.sleep(chance.uniform(0, 2))
        worker.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.wait()
    killed = paths()
    lost = [
        len(set(session.taken) - set(killed)) for session in read_sessions(run, "extract", "bench")
    ]
    for worker in start():
        assert worker.wait() == 0
    finished = paths()
    assert set(finished) == {shard.index for shard in plan.shards}
    return {
        "shards": len(plan.shards),
        "committed_when_killed": len(killed),
        "committed_and_done_again": sum(finished[shard] != killed[shard] for shard in killed),
        "begun_again": sum(lost),
        "begun_again_by_one_worker": max(lost),
    }


@click.command()
@click.option("--quick", is_flag=True, help="4,096 ids and k = 128 alone.")
@click.option("--vocab-size", type=click.Choice(list(map(str, SHARDS))), help="This one alone.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench", show_default=True)
def main(quick: bool, vocab_size: str | None, out: Path) -> None:
    """Measure, print a table, and one JSON object as the last line."""
    sizes = {4_096: (128,)} if quick else dict.fromkeys(SHARDS, ENTRIES)
    if vocab_size:
        sizes = {int(vocab_size): ENTRIES}
    found: dict[str, dict[str, Any]] = {}
    killed: dict[str, int] = {}
    for size, entries in sizes.items():
        made = make_model(out / f"extract-{size}", vocab_size=size, num_steps=TRAINING_STEPS)
        print(f"model of {size:,} ids: {made.bpb:.3f} bpb on held-out text", flush=True)
        for top_k in entries:
            with tempfile.TemporaryDirectory() as name:
                run_file = write_run(made, Path(name), top_k=top_k)
                one = {what: in_child(run_file, size, what) for what in ("speed", "memory")}
            key = f"{size}/{top_k}"
            found[key] = one["speed"] | {"memory": one["memory"]}
            print(line(key, found[key]), flush=True)
        if size == min(sizes) and not quick:
            with tempfile.TemporaryDirectory() as name:
                killed = kills(made, Path(name))
    if killed:
        print(f"{WORKERS} workers killed and started again: {killed}")
    print(json.dumps(summary(found) | {"kills": killed}))


def in_child(run_file: Path, vocab_size: int, what: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_extract",
        what,
        str(run_file),
        str(SHARDS[vocab_size]),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(key: str, one: dict[str, Any]) -> str:
    """One row for people."""
    rates = ", ".join(
        f"{name} {one[name]:,.0f}"
        for name in ("generate", "engine", "ours", "ours_flat", "dicts", "distillkit")
    )
    ratio = one["ours"] / one["generate"]
    spread = f"{min(one['pairs']):.2f} to {max(one['pairs']):.2f}"
    return (
        f"{key:>9}: tokens/s {rates}\n"
        f"{'':>11}ours / generate {ratio:.3f} (rounds {spread}), / dicts "
        f"{one['ours'] / one['dicts']:.2f}, / DistillKit {one['ours'] / one['distillkit']:.2f}; "
        f"front end {one['frontend']['tap']:.1f} us tapped, {one['frontend']['flat']:.1f} us flat; "
        f"memory above the engine's {extra_bytes(one, 'all_shards') / 1e6:,.0f} MB, "
        f"{extra_bytes(one, 'few_shards') / 1e6:,.0f} MB on fewer shards"
    )


def extra_bytes(one: dict[str, Any], shards: str) -> int:
    """Peak of everything above the peak of the engine alone."""
    extra: int = one["memory"][shards] - one["memory"]["engine"]
    return extra


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For programs."""
    return {
        "throughput_ratio_generate": {k: v["ours"] / v["generate"] for k, v in found.items()},
        "throughput_ratio_generate_flat": {
            k: v["ours_flat"] / v["generate"] for k, v in found.items()
        },
        "speedup_dicts": {k: v["ours"] / v["dicts"] for k, v in found.items()},
        "speedup_distillkit": {k: v["ours"] / v["distillkit"] for k, v in found.items()},
        "frontend_us_tap": {k: v["frontend"]["tap"] for k, v in found.items()},
        "frontend_us_flat": {k: v["frontend"]["flat"] for k, v in found.items()},
        "throughput_ratio_engine": {k: v["ours"] / v["engine"] for k, v in found.items()},
        "extra_rss_bytes": {k: extra_bytes(v, "all_shards") for k, v in found.items()},
        "extra_rss_bytes_few_shards": {k: extra_bytes(v, "few_shards") for k, v in found.items()},
        "tokens_per_s": {k: v["ours"] for k, v in found.items()},
    }


if __name__ == "__main__":
    if sys.argv[1:2] in (["speed"], ["memory"]):
        print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[1])))
    else:
        main()
