"""Scoring published models: `extract run` beside a plain loop of transformers at the same precision.

Each model has a process of its own. There our scoring (everything from the plan to committed shards,
once the engine is ready) and the plain loop score the same segments in turn, in rounds of alternating
order. The loop is what one writes without us: batches of whole segments, padded; the model's forward,
logits in float32, `log_softmax`, `topk`, the label by `gather`. For a bf16 model with
`extract.fp32_head` its head is a float32 copy of the weight, made once; a second loop takes the
model's own bf16 logits, which tie, and is shown beside it. Memory is that of ours alone: the loop's
model is loaded after it was read.

    python -m benchmarks.real_extract gemma=models/gemma qwen=models/qwen --text 'corpus/*.txt'

The last line is one JSON object: `extract_ratio` of each model, and what it is made of.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

from extract.engines.protocol import Engine
from extract.engines.registry import open_engine
from extract.run import score
from extract.scoring.sources import CheckedSource, check_source
from extract.scoring.stage import Job
from launch.signals import StopFlag
from launch.work import Part, Worker
from launch.worklog import WorkLog
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan

MAX_TOKENS = 512
BATCH = 4
"""Segments of the loop's batches: logits of 4 x 512 tokens and 262,144 ids take 2 GiB, twice."""
TEXT_BYTES_A_TOKEN = 6
"""More than real text has, so that there is enough of it."""


def extract_ratios(
    models: Mapping[str, Path],
    texts: Sequence[Path],
    *,
    rounds: int = 3,
    tokens: int = 4_096,
    extract: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure each model in a process of its own.

    Args:
        models: Folders by name.
        texts: UTF-8 files, read in order.
        rounds: In which both sides take turns.
        tokens: Scored by each side in a round, about.
        extract: Fields of the run file's `extract` that differ from their defaults.

    Returns:
        By name of the figure, then by model; ready for JSON.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, folder in models.items():
        with tempfile.TemporaryDirectory() as place:
            run_file = write_run(name, folder, texts, tokens, dict(extract or {}), Path(place))
            command = [
                sys.executable,
                "-m",
                "benchmarks.real_extract",
                "--child",
                str(run_file),
                name,
                str(rounds),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for figure, value in json.loads(done.stdout.splitlines()[-1]).items():
            found.setdefault(figure, {})[name] = value
    return found


def write_run(
    name: str,
    folder: Path,
    texts: Sequence[Path],
    tokens: int,
    extract: dict[str, Any],
    place: Path,
) -> Path:
    """A planned run with the model as its one source and target."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
    text = text[: tokens * TEXT_BYTES_A_TOKEN]
    row = {"id": "text", "text": text, "domain": "text", "split": "train"}
    (place / "text.jsonl").write_text(json.dumps(row), encoding="utf-8")
    model = {"model": str(folder.resolve())}
    content = {
        "name": "bench",
        "run_dir": str(place / "run"),
        "sources": {name: model},
        "target": model,
        "corpus": {"inputs": [{"path": str(place / "text.jsonl")}]},
        "plan": {"max_tokens": MAX_TOKENS, "shard_tokens": tokens},
        "extract": extract,
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    root = str(Path(__file__).resolve().parent.parent)
    for stage in ("corpus", "build"), ("extract", "plan"):
        command = [sys.executable, "-m", "logitfuse", *stage, str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=root)
    return path


class Ours:
    """All that `extract run` does once its engine is ready, into a new store each time."""

    def __init__(self, source: CheckedSource, engine: Engine, place: Path) -> None:
        self.source, self.engine, self.place = source, engine, place
        self.shards = source.plan.shards[:1]
        self._calls = 0

    def __call__(self) -> None:
        folder = self.place / f"store-{self._calls}"
        self._calls += 1
        source = replace(self.source, location=open_location(folder))
        writer = source.open_store()
        log = WorkLog(source.run, "bench", source.name, Worker())
        with log.session(self.shards, source.name) as session:
            part = Part(limit=len(self.shards))
            job = Job(source, writer, part, self.shards, session, StopFlag(), stop_fd=None)
            score(self.engine, job)
        shutil.rmtree(folder)


class PlainLoop:
    """Forward, logits in float32, log_softmax, topk: as one writes it."""

    def __init__(self, source: CheckedSource) -> None:
        from transformers import AutoModelForCausalLM

        spec = source.spec
        self.top_k = spec.section.top_k
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, spec.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=dtype)
        self.model = self.model.to(self.device).eval()
        self.wide = self.model.get_output_embeddings().weight.float() if spec.fp32_head else None
        segments = source.plan.segments(source.plan.shards[0])
        self.inputs = [encoded.input_ids for encoded in source.tokenizer.encode(segments)]

    @torch.inference_mode()
    def __call__(self, *, own_logits: bool = False) -> float:
        """Score all segments; gives the sum of the labels' log-probabilities."""
        total = 0.0
        for start in range(0, len(self.inputs), BATCH):
            batch = self.inputs[start : start + BATCH]
            longest = max(map(len, batch))
            padded = [ids + [0] * (longest - len(ids)) for ids in batch]
            mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
            ids_BT = torch.tensor(padded, device=self.device)
            mask_BT = torch.tensor(mask, device=self.device)
            options = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
            if own_logits or self.wide is None:
                logits = self.model(**options).logits
            else:
                states = self.model.base_model(**options).last_hidden_state
                logits = states.float() @ self.wide.t()
            logprobs = logits[:, :-1].float().log_softmax(-1)
            del logits
            kept = logprobs.topk(self.top_k, dim=-1)
            labels = logprobs.gather(-1, ids_BT[:, 1:, None])[..., 0]
            kept.indices.cpu().numpy(), kept.values.cpu().numpy()
            total += float((labels * mask_BT[:, 1:]).sum())
        return total


def measure(run_file: Path, name: str, rounds: int) -> dict[str, Any]:
    """In the child: both sides in turn."""
    run = load_run(str(run_file))
    source = check_source(run, name, open_plan(run))
    tokens = source.plan.shards[0].num_tokens[name]
    engine = open_engine(source.spec)
    try:
        ours = Ours(source, engine, run_file.parent)
        ours()
        peak = peak_rss_bytes()
        loop = PlainLoop(source)
        ways: dict[str, Callable[[], object]] = {"ours": ours, "loop": loop}
        if loop.wide is not None:
            ways["loop_bf16"] = lambda: loop(own_logits=True)
        took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in list(ways) if turn % 2 else reversed(ways):
                start = time.perf_counter(), time.process_time()
                ways[way]()
                spent = time.perf_counter() - start[0], time.process_time() - start[1]
                took[way].append(spent)
                rate = tokens / spent[0]
                print(f"{name}, round {turn + 1}: {way} {rate:,.0f} tokens/s", file=sys.stderr)
        return {
            "extract_ratio": _ratio(took, "loop", 0),
            "extract_ratio_cpu_time": _ratio(took, "loop", 1),
            "extract_ratio_own_logits": _ratio(took, "loop_bf16", 0),
            "extract_ratio_own_logits_cpu_time": _ratio(took, "loop_bf16", 1),
            "extract_tokens_per_s": {
                way: round(tokens / statistics.median(t[0] for t in times), 1)
                for way, times in took.items()
            },
            "extract_engine": engine.description,
            "extract_peak_rss_bytes": peak,
            "extract_ids": source.spec.model_vocab_size,
        }
    finally:
        engine.close()


def _ratio(
    took: Mapping[str, Sequence[tuple[float, float]]], other: str, clock: int
) -> float | None:
    """Median over rounds of the other's time over ours; clock 0 is the wall's, 1 the CPUs'."""
    if other not in took:
        return None
    pairs = zip(took[other], took["ours"], strict=True)
    return round(float(np.median([theirs[clock] / ours[clock] for theirs, ours in pairs])), 3)


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM in /proc/self/status")


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("--text", "patterns", multiple=True, required=True, help="Files to score; globs.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(min=64), default=4_096, show_default=True)
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), help="Not the default.")
def main(
    models: tuple[str, ...], patterns: tuple[str, ...], rounds: int, tokens: int, engine: str | None
) -> None:
    """Measure, print a table, and one JSON object as the last line."""
    folders = {name: Path(folder) for name, _, folder in (model.partition("=") for model in models)}
    texts = [file for pattern in patterns for file in sorted(Path().glob(pattern))]
    section = {"engine": engine} if engine else {}
    found = extract_ratios(folders, texts, rounds=rounds, tokens=tokens, extract=section)
    for name in folders:
        rates = found["extract_tokens_per_s"][name]
        print(
            f"{name:<12}{found['extract_ids'][name]:>9,} ids  "
            + ", ".join(f"{way} {rate:,.0f}" for way, rate in rates.items())
            + f" tokens/s; ours / loop {found['extract_ratio'][name]:.2f}, peak "
            f"{found['extract_peak_rss_bytes'][name] / 2**30:.2f} GiB"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    else:
        main()
