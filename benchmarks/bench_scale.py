"""`make bench-scale`: what several workers and processes cost and gain, and what the slow places take.

Parts that have a module of their own are told about there: `align` (`scale_align`), `start`
(`scale_start`), `score` (`scale_score`), `fsdp` (`scale_fsdp`), `plan` (`scale_plan`). `align` and
`start` take the run of `make demo`, `start` and `score` the models of `make real`.

Workers of the others all run on this machine. So that they scale on few cores, the time of the model is
waited for rather than computed: the model is tiny, and a worker that has scored so many tokens sleeps
for as long as a GPU would have taken for them (`TOKENS_PER_S`). All else is as always, processes,
engine, store and commits, and takes a few percent of a core for each worker.

* `ray_overhead`: time of `submit extract --ray` over that of as many workers started by hand, from the
  command to its end, both with two minutes of scoring (median of rounds; goal: at most 1.05). What Ray
  takes more, `ray_overhead_s`, are the seconds of its start, and the same for longer runs.
* `ray_equal`: share of the shards, extracted and aligned on Ray, whose content is that of a single
  process, although a node, a worker's process and an actor were killed, each in the middle of a shard,
  and later the driver (goal: 1).
* `steal_gain`: time of 4 workers of which one is four times slower than the others, over the time that
  they take with `--no-steal` (goal: at most 0.6).

    python -m benchmarks.bench_scale --parts align,ray_equal,steal_gain

The last line is one JSON object with the figures of all parts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks import scale_fsdp
from benchmarks.scale_align import align_figures
from benchmarks.scale_plan import plan_figures
from benchmarks.scale_score import score_figures
from benchmarks.scale_start import start_figures
from first_run.demo.text import SplitSizes, library_documents
from tests.ray_cluster import running_cluster
from tests.ray_runs import RayRun, contents, wait_until
from tests.tiny import tiny_model, tiny_tokenizer

TOKENS_PER_S = 200.0
SHARD_TOKENS = 1_000
DOCUMENT_CHARACTERS = 2_000
OVERHEAD_WORKERS, OVERHEAD_S = 2, 120.0
STEAL_WORKERS, SLOWER, STEAL_S = 4, 4.0, 120.0
"""`STEAL_S` is what the slow worker needs for its own shards."""
EQUAL_TOKENS = 8_000


def plan_run(folder: Path, num_tokens: float) -> Path:
    """A run file whose one source has about so many tokens to score; corpus and plan are made."""
    tokenizer = tiny_tokenizer("byte_level", bos=True)
    target = tiny_tokenizer("metaspace_bpe", vocab_size=500, bos=True)
    content = {
        "name": "bench",
        "run_dir": str(folder / "run"),
        "sources": {"bench": {"model": str(tiny_model(folder / "bench", "llama", tokenizer))}},
        "target": {"model": str(tiny_model(folder / "target", "llama", target, seed=1))},
        "corpus": {"inputs": [{"path": str(folder / "docs.jsonl")}]},
        "plan": {"max_tokens": 128, "shard_tokens": SHARD_TOKENS},
        "extract": {"engine": "transformers", "top_k": 16, "threads": 1},
    }
    with (folder / "docs.jsonl").open("w", encoding="utf-8") as file:
        for document in library_documents("prose", SplitSizes(0, 0, 0), seed=0):
            text = document.text[:DOCUMENT_CHARACTERS]
            if num_tokens <= 0:
                break
            num_tokens -= len(tokenizer(text).input_ids)
            row = {"id": document.id, "text": text, "domain": "prose", "split": "train"}
            file.write(json.dumps(row) + "\n")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    for stage in ("corpus", "build"), ("extract", "plan"):
        _logitfuse(*stage, str(path))
    return path


def _logitfuse(*words: str) -> None:
    command = [sys.executable, "-m", "logitfuse", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def by_hand(run: RayRun, count: int, *words: str, slow_file: Path | None = None) -> float:
    """Seconds that so many workers take for a run's extraction.

    Args:
        run: The run.
        count: Number of workers.
        words: Further words of their commands.
        slow_file: For the last of them, instead of the run's.
    """
    command = [sys.executable, "-P", "-m", "extract", "run-source", str(run.path)]
    start = time.monotonic()
    workers = []
    for index in range(count):
        environment = os.environ | run.environment
        if slow_file is not None and index == count - 1:
            environment |= {"SLOW_FILE": str(slow_file)}
        own = ["--source", "bench", "--worker", f"{index}/{count}", *words]
        workers.append(
            subprocess.Popen([*command, *own], env=environment, stderr=subprocess.DEVNULL)
        )
    for worker in workers:
        assert worker.wait() == 0
    return time.monotonic() - start


def on_ray(run: RayRun, count: int) -> float:
    """Seconds that so many workers on Ray take for a run's extraction."""
    start = time.monotonic()
    driver = run.submit("--only", "--workers", str(count))
    _, err = driver.communicate()
    assert driver.returncode == 0, err
    return time.monotonic() - start


def ray_overhead(folder: Path, rounds: int) -> dict[str, Any]:
    """Ray over workers that are started by hand."""
    planned = plan_run(folder, OVERHEAD_WORKERS * OVERHEAD_S * TOKENS_PER_S)
    ways: dict[str, Callable[[RayRun, int], float]] = {"by hand": by_hand, "on Ray": on_ray}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with running_cluster() as cluster:
        for _ in range(OVERHEAD_WORKERS):
            cluster.add_node()
        for number in range(rounds):
            for name in list(ways) if number % 2 else reversed(ways):
                run = RayRun(folder / f"{number}-{name[:2]}", planned, 1 / TOKENS_PER_S)
                seconds[name].append(ways[name](run, OVERHEAD_WORKERS))
                print(f"{OVERHEAD_WORKERS} workers {name}: {seconds[name][-1]:.1f} s", flush=True)
    pairs = list(zip(seconds["on Ray"], seconds["by hand"], strict=True))
    return {
        "ray_overhead": statistics.median(ray / hand for ray, hand in pairs),
        "ray_overhead_s": statistics.median(ray - hand for ray, hand in pairs),
        "ray_seconds": seconds,
    }


def ray_equal(folder: Path, rounds: int) -> dict[str, Any]:
    """What Ray's stores are after kills, beside those of one process."""
    del rounds
    planned = plan_run(folder, EQUAL_TOKENS)
    _logitfuse("extract", "run", str(planned))
    _logitfuse("align", "run", str(planned))
    expected = contents(planned)
    run = RayRun(folder / "ray", planned)
    with running_cluster() as cluster:
        for _ in range(3):
            cluster.add_node()
        driver = run.submit("--workers", "3")
        run.kill_in_a_shard(cluster, driver)
        extracted = len(expected["/stores/bench"])
        wait_until(lambda: run.num_commits() > extracted, driver)  # alignment has begun
        driver.kill()
        driver.communicate()
        lost = run.num_commits()
        driver = run.submit()
        _, err = driver.communicate()
        assert driver.returncode == 0, err
    found = contents(run.path)
    shards = [(store, shard) for store, of_store in expected.items() for shard in of_store]
    equal = sum(found[store].get(shard) == expected[store][shard] for store, shard in shards)
    print(f"Ray with kills: {equal} of {len(shards)} shards are equal, {lost} before the last kill")
    return {"ray_equal": equal / len(shards), "ray_equal_shards": len(shards)}


def steal_gain(folder: Path, rounds: int) -> dict[str, Any]:
    """Workers that go on with a slow one's shards over workers that do not."""
    planned = plan_run(folder, STEAL_WORKERS * STEAL_S * TOKENS_PER_S / SLOWER)
    slow_file = folder / "slow"
    slow_file.write_text(str(SLOWER / TOKENS_PER_S))
    ways = {"stealing": (), "--no-steal": ("--no-steal",)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, words in ways.items():
            run = RayRun(folder / f"{number}{name}", planned, 1 / TOKENS_PER_S)
            seconds[name].append(by_hand(run, STEAL_WORKERS, *words, slow_file=slow_file))
            print(f"{STEAL_WORKERS} workers, {name}: {seconds[name][-1]:.1f} s", flush=True)
    pairs = zip(seconds["stealing"], seconds["--no-steal"], strict=True)
    return {
        "steal_gain": statistics.median(steal / keep for steal, keep in pairs),
        "steal_seconds": seconds,
    }


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "align": lambda folder, rounds: align_figures(rounds=rounds),
    "start": lambda folder, rounds: start_figures(repeats=rounds),
    "score": lambda folder, rounds: score_figures(rounds=rounds),
    "fsdp": lambda folder, rounds: scale_fsdp.measure(folder),
    "plan": lambda folder, rounds: {"plan_1e9": plan_figures(out=folder)},
    "ray_overhead": ray_overhead,
    "ray_equal": ray_equal,
    "steal_gain": steal_gain,
}


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, by commas.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Of timings.")
def main(parts: str, rounds: int) -> None:
    """Measure, and print one JSON object as the last line."""
    found: dict[str, Any] = {}
    for part in parts.split(","):
        print(f"-- {part}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            found |= PARTS[part](Path(name), rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
