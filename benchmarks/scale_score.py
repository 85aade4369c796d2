"""Scoring with a large vocabulary on a CPU: the engine as it is beside the way it replaces.

Two processes load a published bf16 model each and score the same segments in turn, in rounds of
alternating order: one with the transformers engine as it is, one as it was before the fused head
(`OutputHead.logits` and `row_entries` on float32 products, 4,096 tokens at a time, freed memory given
back). Then the first takes the hidden states of some segments and compares its entries and labels with
a plain float32 head (a float32 copy of the weight, log-softmax in float64) on the same states.

    python -m benchmarks.scale_score                        # the sources of make real, after it
    python -m benchmarks.scale_score NAME=FOLDER... --text 'GLOB'

The last line is one JSON object. `score_ratio` is tokens/s over those before (goal: 2.5, of one model
of 0.2 to 0.6B with 150,000 ids or more); `score_ratio_cpu_time` the same in CPU time, which other
processes disturb less; `score_body_share` the model without its head, of the CPU time now.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.real_extract import write_run
from extract.config import BATCH_TOKENS, CorpusSection
from extract.engines import transformers_engine
from extract.engines.registry import open_engine
from extract.engines.transformers_engine import Input, TransformersEngine, longest_first
from extract.scoring.sources import check_source
from store_schema.config import load_run
from store_schema.model.models import resolve_model
from store_schema.plan.run_plan import open_plan

GOAL = 2.5
WAYS = "now", "before"
CHECKED_ROWS = 256
REAL = "examples/real.yaml"


def score_figures(
    models: Mapping[str, Path] | None = None,
    texts: Sequence[Path] | None = None,
    *,
    rounds: int = 5,
    tokens: int = 4_096,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure each model in two processes that take turns.

    Args:
        models: Folders by name. None: the sources of `make real`.
        texts: UTF-8 files, read in order. None: those of `make real`.
        rounds: In which both ways take turns, after one that is not counted.
        tokens: Scored by each in a round, about.
        threads: Of each process, which wait for one another. None: torch's default.

    Returns:
        By name of the figure, then by model; ready for JSON.
    """
    if models is None or texts is None:
        run = load_run(REAL)
        inputs = run.section("corpus", CorpusSection).inputs
        models = models or {name: resolve_model(ref) for name, ref in run.sources.items()}
        texts = texts or [Path(item.path) for item in inputs]
    found: dict[str, dict[str, Any]] = {}
    for name, folder in models.items():
        extract = {"engine": "transformers", "device": "cpu", "threads": threads}
        with tempfile.TemporaryDirectory() as place:
            run_file = write_run(name, folder, texts, tokens, extract, Path(place))
            for figure, value in _measured(run_file, name, rounds).items():
                found.setdefault(figure, {})[name] = value
    return found


def _measured(run_file: Path, name: str, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        sides = {way: stack.enter_context(Side(run_file, name, way)) for way in WAYS}
        took: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way in WAYS if turn % 2 else reversed(WAYS):
                spent = sides[way].ask("score")
                rate = spent["tokens"] / spent["seconds"]
                print(f"{name}, round {turn}: {way} {rate:,.0f} tokens/s", file=sys.stderr)
                if turn:
                    took[way].append(spent)
        body = sides["now"].ask("body")
        errors = sides["now"].ask("errors")

    def ratio(clock: str) -> float:
        pairs = zip(took["before"], took["now"], strict=True)
        return round(statistics.median(old[clock] / new[clock] for old, new in pairs), 3)

    def of(way: str, clock: str) -> float:
        return statistics.median(spent[clock] for spent in took[way])

    return {
        "score_ratio": ratio("seconds"),
        "score_ratio_cpu_time": ratio("cpu_seconds"),
        "score_tokens_per_s": {w: round(took[w][0]["tokens"] / of(w, "seconds"), 1) for w in WAYS},
        "score_cpu_ms_a_token": {
            w: round(1e3 * of(w, "cpu_seconds") / took[w][0]["tokens"], 3) for w in WAYS
        },
        "score_body_share": round(body["cpu_seconds"] / of("now", "cpu_seconds"), 3),
        **errors,
    }


class Side:
    """A process with a loaded model that waits for requests."""

    def __init__(self, run_file: Path, name: str, way: str) -> None:
        words = ["-m", "benchmarks.scale_score", "--child", str(run_file), name, way]
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to one request."""
        print(what, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def answer_requests(run_file: Path, name: str, way: str) -> None:
    """In the child: one line for each line of standard input."""
    if way == "before":
        for name_of_new in ("keep_freed_memory", "_fused_head"):
            setattr(transformers_engine, name_of_new, lambda *_: None)
    run = load_run(str(run_file))
    source = check_source(run, name, open_plan(run))
    segments = source.plan.segments(source.plan.shards[0])
    encoded = list(source.tokenizer.encode(segments))
    engine = open_engine(source.spec)
    assert isinstance(engine, TransformersEngine)
    if way == "before":
        engine._pieces.batch_tokens = BATCH_TOKENS
    requests = {
        "score": lambda: _timed(lambda: sum(len(rows.ids) for _, rows in engine.score(encoded))),
        "body": lambda: _timed(lambda: _bodies(engine, [Input.of(e) for e in encoded])),
        "errors": lambda: _errors(engine, [Input.of(e) for e in encoded]),
    }
    for line in sys.stdin:
        print(json.dumps(requests[line.strip()]()), flush=True)


def _timed(work: Any) -> dict[str, float]:
    start = time.perf_counter(), time.process_time()
    tokens = work()
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


@torch.inference_mode()
def _bodies(engine: TransformersEngine, inputs: list[Input]) -> int:
    """The base model alone, over the engine's batches."""
    order = longest_first([len(item.ids) for item in inputs])
    size = max(engine._pieces.batch_tokens // len(inputs[order[0]].ids), 1)
    for start in range(0, len(order), size):
        fed = [inputs[i].ids for i in order[start : start + size]]
        engine._states(fed, max(map(len, fed)))
    return sum(item.num_rows for item in inputs)


@torch.inference_mode()
def _errors(engine: TransformersEngine, inputs: list[Input]) -> dict[str, Any]:
    """Largest differences from a float32 head, in nats, on the same hidden states."""
    longest = max(inputs, key=lambda item: item.num_rows)
    few = Input(longest.segment, longest.ids[: longest.first + CHECKED_ROWS], longest.first)
    states = engine._states([few.ids], len(few.ids))
    ids_RK, logprobs_RK, labels_R = engine._kept_rows(states, [(0, few)], len(few.ids))
    weight = engine._model.get_output_embeddings().weight.float()
    plain = (states[few.first - 1 : len(few.ids) - 1].float() @ weight.t()).double()
    plain = plain.log_softmax(-1)
    own = plain.gather(1, torch.from_numpy(few.ids[few.first :])[:, None])[:, 0]
    chosen = plain.gather(1, ids_RK.long())
    best = plain.topk(ids_RK.shape[1], dim=-1).values
    return {
        "score_max_error_entries_nats": float((chosen - logprobs_RK).abs().max()),
        "score_max_error_labels_nats": float((own - labels_R).abs().max()),
        # Of the k-th best: how much less probable one is that was taken in another's place.
        "score_missed_nats": float((best - chosen).max()),
        "score_ids": int(plain.shape[1]),
        "score_fused": engine._fused is not None,
    }


@click.command()
@click.argument("models", nargs=-1, metavar="[NAME=FOLDER...]")
@click.option("--text", "patterns", multiple=True, help="Files to score; globs.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(min=64), default=4_096, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Not torch's default.")
def main(
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    rounds: int,
    tokens: int,
    threads: int | None,
) -> None:
    """Measure, print a table, and one JSON object as the last line."""
    named = {name: Path(folder) for name, _, folder in (model.partition("=") for model in models)}
    texts = [file for pattern in patterns for file in sorted(Path().glob(pattern))]
    found = score_figures(
        named or None, texts or None, rounds=rounds, tokens=tokens, threads=threads
    )
    for name, ratio in found["score_ratio"].items():
        rates = found["score_tokens_per_s"][name]
        print(
            f"{name:<12}{found['score_ids'][name]:>9,} ids  now {rates['now']:,.0f}, before "
            f"{rates['before']:,.0f} tokens/s; ratio {ratio:.2f} (goal {GOAL}), in CPU time "
            f"{found['score_ratio_cpu_time'][name]:.2f}; body "
            f"{found['score_body_share'][name]:.0%}; differs by "
            f"{found['score_max_error_entries_nats'][name]:.1e} nats"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        answer_requests(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main()
