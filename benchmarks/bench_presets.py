"""`make bench-presets`: the parts of the papers' recipes against each other, by right answers.

    python -m benchmarks.bench_presets               # toy chat models, three seeds
    python -m benchmarks.bench_presets --worlds real # the published ones of make real, one seed
    python -m benchmarks.bench_presets --quick       # one seed, three steps a training

Beside the trainings: merges against mergekit's own and their peak of memory (merge_figures.py), and two
tests of the suite: resuming around the border of stages, and the five presets from one line to the end.
What is left of a training, its answers and bits per byte, is kept in --kept, so a stopped run goes on.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks import recipes
from benchmarks.presets_figures import BySeed, Seen, mean_by_domain, world_figures
from benchmarks.presets_variants import (
    VARIANTS,
    World,
    override_words,
    real_world,
    toy_world,
)
from fuse_eval import bpb
from fuse_eval.answers.held_out import HeldOutPrompts
from fuse_eval.config import EvaluateSection
from fuse_eval.interference.blocks import by_segment
from fuse_train.machine.precision import choose_precision
from launch.signals import StopFlag
from store_schema.config import ModelRef, load_run
from store_schema.errors import LogitfuseError
from store_schema.fingerprint import fingerprint
from store_schema.model.class_config import transformers_config
from store_schema.plan.run_plan import open_plan

ROOT = Path(__file__).resolve().parent.parent

SEEDS = (0, 1, 2)
BEFORE = "target_before"
ASK = (
    ("corpus", "build"),
    ("extract", "plan"),
    ("extract", "run"),
    ("extract", "generate"),
    ("judge", "run"),
    ("eval", "advantage"),
)
TEACH = (("corpus", "build"), ("extract", "plan"), ("extract", "run"), ("align", "run"))
TESTS = {
    "resume_equal": (
        "tests/test_fuse_train_stages.py::test_stopped_around_the_border_of_stages_it_is_the_same"
    ),
    "presets": "tests/test_presets.py::test_one_line_and_the_way_to_the_end",
}


class HeldOut:
    """The given held-out questions of a world, asked and scored the same for all models."""

    def __init__(self, run_file: Path) -> None:
        self.run = load_run(run_file)
        plan = open_plan(self.run)
        section = self.run.section("evaluate", EvaluateSection)
        self._prompts = HeldOutPrompts(self.run)
        self._tokenizers = bpb.run_tokenizers(self.run, plan)
        segments = [s for s in bpb.split_segments(plan, section.split) if s.author is None]
        self._text = bpb.scored_text(segments, self._tokenizers)

    def seen(self, name: str, ref: ModelRef, tokenizer: str = "target") -> dict[str, Any]:
        """Right answers, their domains, and bits per byte by domain of one model."""
        right = self._prompts.right(name, ref, StopFlag())
        values = bpb.score_model(
            ref,
            self._text,
            self._tokenizers[tokenizer],
            name=name,
            batch_tokens=4096,
            device=bpb.device_of(None),
            stop=StopFlag(),
        )
        nats: dict[str, float] = {}
        sizes: dict[str, int] = {}
        per_segment = by_segment(self._text.block_ends, [n for part in values for n in part])
        for segment, cost, size in zip(
            self._text.segments, per_segment, self._text.num_bytes, strict=True
        ):
            nats[segment.domain] = nats.get(segment.domain, 0.0) + float(cost)
            sizes[segment.domain] = sizes.get(segment.domain, 0) + int(size)
        return {
            "right": [score or 0.0 for score in right],
            "domains": [question.domain for question in self._prompts.questions],
            "bpb": {d: nats[d] / 0.6931471805599453 / sizes[d] for d in sorted(nats)},
        }


def prepare(world: World) -> None:
    """Make inputs, answers and stores; what is there is left."""
    world.write_run_files()
    for script, *words in world.commands:
        command = [sys.executable, str(ROOT / "examples" / script), *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
    for stage in ASK:
        recipes.run_module(["logitfuse", *stage, str(world.ask_file)])
    _judge_again(world)
    for name in dict.fromkeys(variant.data for variant in VARIANTS.values()):
        for stage in TEACH:
            recipes.run_module(["logitfuse", *stage, str(world.folder / f"{name}.yaml")])


def _judge_again(world: World) -> None:
    """The same answers, of which only right ones are chosen."""
    folder = world.folder / "ask-right"
    for part in ("corpus", "plan", "generated"):
        if not (folder / part).is_dir():
            shutil.copytree(world.folder / "ask" / part, folder / part)
    recipes.run_module(["logitfuse", "judge", "run", str(world.ask_right_file)])


def train(world: World, name: str, held_out: HeldOut, kept: Path, *, quick: bool) -> Seen:
    """One variant at the learning rate that is best on valid text, unless that was done."""
    found = [_train_at(world, name, lr, held_out, kept, quick=quick) for lr in world.rates]
    best = min(found, key=lambda item: float(item["valid"]))
    return Seen(best["right"], best["domains"], best["bpb"], best["lr"])


def _train_at(
    world: World, name: str, lr: float, held_out: HeldOut, kept: Path, *, quick: bool
) -> dict[str, Any]:
    variant = VARIANTS[name]
    steps = 3 if quick else world.steps
    section = variant.train_section(steps, lr)
    record = kept / world.name / f"{name}-lr{lr:g}-{fingerprint(section)[:8]}.json"
    if record.is_file():
        return dict(json.loads(record.read_text()))
    # Pairs are trained once for all ways of merging them; a model merged another way is in the way.
    folder = world.folder / "trainings" / re.sub(r"^pairwise_.*", "pairwise", name) / f"lr{lr:g}"
    if name.startswith("pairwise"):
        shutil.rmtree(folder / "final", ignore_errors=True)
    data = world.folder / variant.data
    precision = choose_precision(
        transformers_config(held_out.run.target, of="target"), bpb.device_of(None)
    )
    words = [*override_words(section), "--set", f"train.precision={precision.precision}"]
    words += ["--set", f"run_dir={folder}", "--set", f"data_dir={data}"]
    recipes.run_module(["logitfuse", "train", "run", str(world.teach_file(variant)), *words])
    target = held_out.run.target
    ref = bpb.checkpoint_ref(folder / "final", target)
    found = {"lr": lr, "valid": _valid(folder)} | held_out.seen(name, ref)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found))
    if not name.startswith("pairwise") or name == list(VARIANTS)[-1]:
        shutil.rmtree(folder)
    return found


def _valid(folder: Path) -> float:
    """Best mean bits per byte on valid text, of all logs of a training: of pairs their mean."""
    logs = sorted(folder.rglob("train_steps.jsonl"))
    best = []
    for log in logs:
        lines = map(json.loads, log.read_text().splitlines())
        best.append(min(recipes.mean(line["valid_bpb"]) for line in lines if "valid_bpb" in line))
    return sum(best) / len(best)


def sources_seen(world: World, held_out: HeldOut, kept: Path) -> dict[str, Seen]:
    """The target before training and each source."""
    run = held_out.run
    models = {BEFORE: (run.target, "target")} | {n: (r, n) for n, r in run.sources.items()}
    found = {}
    for name, (ref, tokenizer) in models.items():
        record = kept / world.name / f"{name}.json"
        if not record.is_file():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(held_out.seen(name, ref, tokenizer)))
        told = json.loads(record.read_text())
        found[name] = Seen(told["right"], told["domains"], told["bpb"], 0.0)
    return found


def run_tests() -> dict[str, int]:
    """Tests passed, by what they show; 0 where one of them fails."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, place in TESTS.items():
            out = Path(temporary) / f"{name}.xml"
            words = ["-q", "-p", "no:cacheprovider", f"--junitxml={out}", place]
            done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=2)
            suite = ElementTree.parse(out).getroot().find("testsuite")
            assert suite is not None
            found[name] = int(suite.attrib["tests"]) if done.returncode == 0 else 0
    return found


def merges() -> dict[str, Any]:
    """As merge_figures.py prints it; None where mergekit cannot be had."""
    script = [sys.executable, "-m", "benchmarks.merge_figures"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        click.echo(done.stderr[-2000:], err=True)
        return {"merge_max_error": None, "merge_peak_over_largest_tensor": None}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(found: Mapping[str, Any], sources: BySeed) -> str:
    """The models as they are and all variants, for people."""
    as_they_are = {name: [seen[name] for seen in sources] for name in sources[0]}
    domains = list(next(iter(as_they_are.values()))[0].by_domain)
    heads = "".join(f"{domain:>9}" for domain in (*domains, "right"))
    lines = [f"{'':<57}{heads}{'bits/byte':>11}   against plain training, points"]
    for name, seen in as_they_are.items():
        bpb = sum(one.mean_bpb for one in seen) / len(seen)
        lines.append(f"{name:<57}{_shares(mean_by_domain(seen))}{bpb:>11.4f}")
    for name, record in found["variants"].items():
        change = record.get("minus_control")
        shown = (
            f"   {change['value']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})"
            if change
            else ""
        )
        shares = _shares(record["accuracy_by_domain"])
        lines.append(f"{VARIANTS[name].says:<57}{shares}{record['bpb']:>11.4f}{shown}")
    return "\n".join(lines)


def _shares(by_domain: Mapping[str, float]) -> str:
    """Of each domain, and their mean."""
    return "".join(f"{share:>9.1%}" for share in (*by_domain.values(), recipes.mean(by_domain)))


@click.command()
@click.option("--worlds", default="toy", show_default=True, help="toy, real, or both.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/presets", show_default=True)
@click.option(
    "--kept",
    type=click.Path(path_type=Path),
    default="benchmarks/kept/presets",
    show_default=True,
    help="What is left of trainings, taken from here where it is.",
)
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True)
@click.option("--variants", default=",".join(VARIANTS), show_default=False)
@click.option("--quick", is_flag=True, help="One seed, three steps a training.")
@click.option("--tests/--no-tests", default=True, help="Merges, resuming, the five presets.")
def main(
    worlds: str, out: Path, kept: Path, seeds: str, variants: str, quick: bool, tests: bool
) -> None:
    """Train what is not trained, and compare."""
    kept = out / "kept" if quick else kept
    numbers = [0] if quick else [int(seed) for seed in seeds.split(",")]
    asked = {
        "toy": [toy_world(out, seed, scale=0.02 if quick else 1.0) for seed in numbers],
        "real": [real_world(out)],
    }
    figures: dict[str, Any] = {}
    try:
        for kind in worlds.split(","):
            by_seed, sources = [], []
            for world in asked[kind]:
                prepare(world)
                held_out = HeldOut(world.folder / "teach.yaml")
                sources.append(sources_seen(world, held_out, kept))
                by_seed.append(
                    {
                        name: train(world, name, held_out, kept, quick=quick)
                        for name in variants.split(",")
                    }
                )
                of_world = table(world_figures(by_seed[-1:]), sources[-1:])
                click.echo(f"{world.name}\n{of_world}\n", err=True)
            figures[kind] = world_figures(by_seed)
            print(f"{kind}: mean of {len(by_seed)} seeds\n{table(figures[kind], sources)}\n")
    except LogitfuseError as error:
        click.echo(f"bench-presets: {error.line()}", err=True)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:  # its own line says why
        click.echo(f"bench-presets: ended by {' '.join(map(str, error.cmd))}", err=True)
        sys.exit(abs(error.returncode))
    if tests:
        figures |= run_tests() | merges()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
