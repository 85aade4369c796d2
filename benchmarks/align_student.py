"""`make bench-align-student`: alignment judged by the student that learns from it.

A target learns the demo's facts (written numbers, dates, units, clock times) three ways, from the same
text in the same order for the same number of steps: (i) from the text alone, the CLM control;
(ii) from a specialist of other tokens, aligned by method bytes; (iii) from the same specialist
retrained on the target's own tokens, which needs no alignment (method exact). Alignment keeps

    (bpb of i - bpb of ii) / (bpb of i - bpb of iii)

of the gain, on held-out facts. Retraining on other tokens makes another model, better or worse by more
than alignment may cost, so specialists are made equally good: both are trained on the same text for the
same steps, then the better one again for fewer, until its bpb of the valid split is within 2 % of the
other's. Steps and bpb of both stand beside the result. Two pairs of tokenizers:

====== =========================================== ==============================================
demo   Unigram, digits one by one (the demo's own) byte-level BPE, digits one by one
digits byte-level BPE, digits as they were merged  byte-level BPE, digits in groups of three
====== =========================================== ==============================================

In the second a source token may end inside the number that the target writes as one token: there an
alignment can teach tokens that the target would never write.

Every stage is the command line's own (corpus, extract, align, train, eval); the models are made with
the demo's recipes. What is finished is not done again.

    python -m benchmarks.align_student --seeds 3
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import yaml

from first_run.demo.facts import fact_documents
from first_run.demo.make import DOMAINS, MODELS, SIZES, ModelSettings, publish, take
from first_run.demo.text import Document, SplitSizes, library_documents, write_jsonl

ROOT = Path(__file__).resolve().parent.parent

DOMAIN = "facts"
FACT_SIZES = SplitSizes(train=250_000, valid=40_000, test=80_000)
PASSES = 5
NATIVE = "native"
"""The specialist on the target's own tokens, and the variant that learns from it."""
ALIGNED = "aligned"
"""The specialist on its own tokens."""
EQUAL, MOST_TRIES = 0.02, 4
"""Specialists are equally good within this share of bits per byte; trainings that look for it."""
VARIANTS: dict[str, dict[str, str]] = {
    "bytes": {"method": "bytes"},
    "bytes-first_token": {"method": "bytes", "continuation": "first_token"},
    "bytes-tail": {"method": "bytes", "continuation": "tail"},
    "bytes-no_look_ahead": {"method": "bytes", "look_ahead": "false"},
    "mined": {"method": "mined"},
    "stats": {"method": "stats"},
    "gold": {"method": "gold"},
    "h_kl": {"method": "h_kl"},
    "p_kl": {"method": "p_kl"},
    "byte_prefix": {"method": "byte_prefix"},
}
"""Settings of the section `align`."""
DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name.startswith("bytes"))


@dataclass(frozen=True, slots=True)
class Rules:
    """How the two sides of a pair split text: names of rules in `first_run.demo.tokenizers`."""

    source: str
    target: str


PAIRS = {"demo": Rules("unigram", "target"), "digits": Rules("prose", "code")}


@dataclass(frozen=True)
class Trial:
    """One pair of tokenizers and one seed, in a folder of its own.

    Args:
        pair: In `PAIRS`.
        seed: Of text, weights, order.
        root: Folder of all trials.
        mini: A few steps of everything, to see that it works.
    """

    pair: str
    seed: int
    root: Path
    mini: bool

    @property
    def folder(self) -> Path:
        """Of this trial."""
        return self.root / f"{self.pair}-{self.seed}"

    @cached_property
    def documents(self) -> dict[str, list[Document]]:
        """Text of all domains: tokenizers and the target before training know a little of each."""
        found = {
            domain: library_documents(domain, SIZES[domain], self.seed)
            for domain in DOMAINS
            if domain != DOMAIN
        }
        return found | {DOMAIN: fact_documents(FACT_SIZES, self.seed)}

    def settings(self, name: str) -> ModelSettings:
        """Size and steps of one of the demo's models."""
        found = next(m for m in MODELS if m.name == name)
        return replace(found, num_steps=4) if self.mini else found

    # ---- models --------------------------------------------------------------------------------

    def make_inputs(self) -> dict[str, int]:
        """Text, target and two specialists that are equally good, each piece whole or not at all.

        Returns:
            Training steps of each specialist.
        """
        text = self.folder / "facts.jsonl"
        if not text.is_file():
            publish(text, partial(write_jsonl, self.documents[DOMAIN]))
        target = self.settings("target")
        self._model("target", target, lambda: self._tokenizer(PAIRS[self.pair].target))
        steps = dict.fromkeys((ALIGNED, NATIVE), self.settings("facts").num_steps)
        scores = {role: self._specialist(role, count) for role, count in steps.items()}
        better, worse = sorted(scores, key=scores.__getitem__)
        steps[better] = steps_to_reach(
            scores[worse], steps[better], partial(self._specialist, better)
        )
        return steps

    def specialist_folder(self, role: str, num_steps: int) -> Path:
        """Of one specialist after so many steps."""
        return self.folder / "models" / f"{role}-{num_steps}"

    def _specialist(self, role: str, num_steps: int) -> float:
        """Train one specialist unless it is there; its bits per byte of the valid split."""
        folder = self.specialist_folder(role, num_steps)
        settings = replace(self.settings("facts"), num_steps=num_steps)
        make = {
            ALIGNED: lambda: self._tokenizer(PAIRS[self.pair].source),
            NATIVE: lambda: _load_tokenizer(self.folder / "models" / "target"),
        }[role]
        self._model(folder.name, settings, make)
        path = folder / "valid_bpb.json"
        if not path.is_file():
            score = json.dumps(self._valid_bpb(folder))
            publish(path, lambda temporary: _write(temporary, score))
        found: float = json.loads(path.read_text())
        print(f"{self.folder.name} {folder.name}: {found:.4f} bpb of valid text", file=sys.stderr)
        return found

    def _valid_bpb(self, folder: Path) -> float:
        from transformers import AutoModelForCausalLM

        from first_run.demo.training import bits_per_byte

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        held_out = [d for d in self.documents[DOMAIN] if d.split == "valid"]
        return bits_per_byte(model, _load_tokenizer(folder), held_out)

    def _model(self, name: str, settings: ModelSettings, tokenizer: Callable[[], Any]) -> None:
        path = self.folder / "models" / name
        if not path.is_dir():
            publish(path, lambda temporary: self._train(settings, tokenizer(), temporary))

    def _train(self, settings: ModelSettings, tokenizer: Any, path: Path) -> None:
        import torch

        from first_run.demo.training import build_model, packed_rows, train
        from fuse_train.machine.allocator import keep_freed_memory

        keep_freed_memory()
        recipe = settings.recipe()
        text = [
            document
            for domain, limit in settings.text_bytes.items()
            for document in take(self.documents[domain], limit, self.seed)
        ]
        torch.manual_seed(self.seed)
        model = build_model(recipe, tokenizer)
        rows = packed_rows(text, tokenizer, recipe.num_steps * recipe.batch_rows, self.seed)
        train(model, rows, recipe, f"{self.folder.name} {path.name}")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    def _tokenizer(self, rule: str) -> Any:
        """Of facts first, with enough of other text that it does not fall apart into bytes."""
        from first_run.demo.tokenizers import train_byte_level_bpe, train_unigram

        texts = [
            document.text
            for domain in DOMAINS
            for document in take(
                self.documents[domain], 1_000_000 if domain == DOMAIN else 350_000, self.seed
            )
        ]
        if rule == "unigram":
            return train_unigram(texts, self.settings("facts").vocab_size, "</s>")
        vocab_size = self.settings("target").vocab_size
        return train_byte_level_bpe(rule, texts, vocab_size, "<|bos|>", True, "<|eos|>")

    # ---- stages --------------------------------------------------------------------------------

    def references(self, steps: Mapping[str, int]) -> dict[str, dict[str, str]]:
        """The specialists as a run file names them."""
        return {role: _reference(self.specialist_folder(role, n)) for role, n in steps.items()}

    def write_run(self, steps: Mapping[str, int]) -> Path:
        """The run file of all variants; they differ by `--set` alone."""
        content = {
            "name": f"student-{self.pair}",
            "run_dir": str(self.folder / "data"),
            "seed": self.seed,
            "sources": self.references(steps),
            "target": _reference(self.folder / "models/target"),
            "corpus": {
                "inputs": [{"path": str(self.folder / "facts.jsonl")}],
                "splits": ["train", "valid", "test"],
            },
            "plan": {"max_tokens": 256, "shard_tokens": 16_384},
            "extract": {"engine": "transformers", "device": "cpu", "top_k": 32},
            # As in the demo: each side has the best rate of its own.
            "train": {
                "selector": "uniform",
                "clm_weight": 0.3,
                "lr": 0.0025,
                "control_overrides": {"lr": 0.001},
                "epochs": PASSES,
                "batch_segments": 16,
                "micro_batch_segments": 16,
            }
            | ({"max_steps": 4, "eval_every": 2} if self.mini else {}),
            "evaluate": {"split": "test"},
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def score(self, variants: Sequence[str]) -> dict[str, float]:
        """Bits per byte of held-out facts: before, control, each specialist and each variant."""
        steps = self.make_inputs()
        run_file = self.write_run(steps)
        for stage in ("corpus", "build"), ("extract", "plan"), ("extract", "run"):
            stage_of(*stage, run_file)
        found: dict[str, float] = {}
        for variant in (NATIVE, *variants):
            bpb = self._variant(run_file, variant, steps)
            found[variant] = bpb["fused"]
            if variant == NATIVE:
                found |= {
                    "before": bpb["target_before"],
                    "control": bpb["clm_control"],
                    "specialist, own tokens": bpb[ALIGNED],
                    "specialist, target's tokens": bpb[NATIVE],
                    "steps, own tokens": steps[ALIGNED],
                    "steps, target's tokens": steps[NATIVE],
                }
            print(f"{self.folder.name} {variant}: {found[variant]:.4f} bpb", file=sys.stderr)
        return found

    def _variant(self, run_file: Path, variant: str, steps: Mapping[str, int]) -> dict[str, float]:
        """Align, train and evaluate one variant in its own folder, on the one extraction."""
        native = variant == NATIVE
        source = NATIVE if native else ALIGNED
        folder = self.folder / variant
        for part in ("plan", "stores"):  # committed files are never changed
            if not (folder / part).exists():
                publish(folder / part, partial(_link_tree, self.folder / "data" / part))
        align = {"method": "exact"} if native else VARIANTS[variant]
        common = {"run_dir": folder, **{f"align.{key}": value for key, value in align.items()}}
        common |= {"train.control": str(native).lower(), "evaluate.sources": str(native).lower()}
        one = json.dumps({source: self.references(steps)[source]})
        stage_of("align", "run", run_file, "--source", source, settings=common)
        stage_of("train", "run", run_file, settings=common | {"sources": one})
        # With both sources in the run file, all variants are scored on the same bytes.
        stage_of("eval", "run", run_file, settings=common)
        record = json.loads((folder / "report/evaluation.json").read_text())
        return {model: values[DOMAIN] for model, values in record["bpb"].items()}


def steps_to_reach(goal: float, longest: int, score: Callable[[int], float]) -> int:
    """Training steps, at most `longest`, after which a score that falls with them is near `goal`.

    The first try takes the score to fall with the root of the steps; once there is one on either side,
    tries lie on a line in the logarithm of the steps. `MOST_TRIES` at most.

    Args:
        goal: Bits per byte to be met within `EQUAL`.
        longest: Steps after which the score is at or below the goal.
        score: Bits per byte after so many steps of training.
    """
    tried = {longest: score(longest)}
    while abs(tried[best := _nearest(tried, goal)] / goal - 1) > EQUAL and len(tried) <= MOST_TRIES:
        above = [n for n, value in tried.items() if value > goal]
        if not above:
            fewest = min(tried)
            steps = min(round(fewest * (tried[fewest] / goal) ** 2), fewest - 1)
        else:
            low, high = max(above), min(n for n, value in tried.items() if value <= goal)
            place = (tried[low] - goal) / (tried[low] - tried[high])
            steps = round(low * (high / low) ** place)
        if steps in tried or steps < 1:
            break
        tried[steps] = score(steps)
    return best


def _nearest(tried: Mapping[int, float], goal: float) -> int:
    return min(tried, key=lambda steps: abs(tried[steps] - goal))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _reference(folder: Path) -> dict[str, str]:
    return {"model": str(folder), "dtype": "float32"}


def _load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _link_tree(source: Path, goal: Path) -> None:
    shutil.copytree(source, goal, copy_function=os.link)


def stage_of(
    group: str, command: str, *arguments: object, settings: Mapping[str, Any] = {}
) -> None:
    """One command of logitfuse, in its own process."""
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    words = [sys.executable, "-m", "logitfuse", group, command, *map(str, arguments), *given]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}")


def gain_kept(bpb: Mapping[str, float], variant: str) -> float:
    """Share of the native specialist's gain over the control that a variant has; NaN without one."""
    gain = bpb["control"] - bpb[NATIVE]
    return (bpb["control"] - bpb[variant]) / gain if gain > 0 else float("nan")


def summary(
    scores: Mapping[str, Sequence[Mapping[str, float]]], variants: Sequence[str]
) -> dict[str, Any]:
    """For programs: of the mean bits per byte over seeds, and each seed's by itself.

    Args:
        scores: By pair, one table for each seed.
        variants: That were trained.
    """
    mean = {
        pair: {name: statistics.mean(one[name] for one in tables) for name in tables[0]}
        for pair, tables in scores.items()
    }
    return {
        "bpb": mean,
        "gain_kept": {pair: {v: gain_kept(bpb, v) for v in variants} for pair, bpb in mean.items()},
        "gain_kept_by_seed": {
            pair: {v: [gain_kept(one, v) for one in tables] for v in variants}
            for pair, tables in scores.items()
        },
        "num_seeds": max(map(len, scores.values())),
    }


def show(found: dict[str, Any]) -> None:
    """For people."""
    for pair, bpb in found["bpb"].items():
        rules = PAIRS[pair]
        print(
            f"\npair {pair} (source {rules.source}, target {rules.target}), bpb of held-out facts"
        )
        for name, value in bpb.items():
            if name.startswith("steps"):
                print(f"  {name:<30}{value:>8.0f}")
                continue
            change = f"{value / bpb['control'] - 1:>+9.2%} to control"
            kept = found["gain_kept"][pair].get(name)
            each = ", ".join(f"{v:.0%}" for v in found["gain_kept_by_seed"][pair].get(name, ()))
            ending = "" if kept is None else f", keeps {kept:.0%} of the gain (seeds {each})"
            print(f"  {name:<30}{value:>8.4f}{change}{ending}")


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--pair", "pairs", multiple=True, type=click.Choice(list(PAIRS)), help="Default: all."
)
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)),
    default=DEFAULT_VARIANTS, show_default=True,
)  # fmt: skip
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/bench/align-student"),
    show_default=True,
)
@click.option("--mini", is_flag=True, help="A few steps of everything, to see that it works.")
def main(
    seeds: int, pairs: tuple[str, ...], variants: tuple[str, ...], out: Path, mini: bool
) -> None:
    """Train, score, print a table, and one JSON object as the last line."""
    root = (out / "mini" if mini else out).resolve()
    scores: dict[str, list[dict[str, float]]] = {}
    for pair in pairs or tuple(PAIRS):
        for seed in range(seeds):
            scores.setdefault(pair, []).append(Trial(pair, seed, root, mini).score(variants))
    found = summary(scores, variants)
    show(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
