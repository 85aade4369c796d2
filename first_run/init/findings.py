"""Everything that `logitfuse init` finds, and what it costs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from extract.config import ExtractSection
from extract.estimate.costs import (
    ALIGNED_TOKENS_PER_S,
    Assumed,
    SourceCost,
    TrainCost,
    likely_bytes,
    source_cost,
    train_cost,
)
from extract.estimate.data import DataFacts, look_at_data
from extract.estimate.models import ModelFacts, look_at_model
from first_run.init.tokenizers import TARGET, TokenizerFacts, look_at_tokenizers, method_for
from first_run.init.tokens import TokenEstimate, estimate_tokens
from first_run.init.wanted import Wanted
from launch.quantities import size_text
from store_schema.presets import Preset

LARGE = 1_000_000_000
"""Parameters from which on a target is trained with small steps, and activations computed again."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What the run takes.

    Args:
        sources: Scoring, one for each source.
        aligned_bytes: All aligned stores.
        aligned_cpu_hours: Aligning them, on two cores.
        corpus_bytes: Corpus and plan.
        train: Training of the target and its control.
        disk_free_bytes: Free where the run's folder will be; None for an object store.
    """

    sources: tuple[SourceCost, ...]
    aligned_bytes: float
    aligned_cpu_hours: float
    corpus_bytes: float
    train: TrainCost
    disk_free_bytes: int | None

    @property
    def disk_bytes(self) -> float:
        """Everything on disk at the end."""
        stores = sum(source.bytes for source in self.sources)
        return stores + self.aligned_bytes + self.corpus_bytes + self.train.bytes

    @property
    def gpu_hours(self) -> float | None:
        """Scoring and training; None where a model's size is not known."""
        hours = [*(source.gpu_hours for source in self.sources), self.train.gpu_hours]
        known = [part for part in hours if part is not None]
        return sum(known) if len(known) == len(hours) else None


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found.

    Args:
        wanted: What was asked for.
        models: Sources in their order, then the target.
        tokenizers: By model.
        data: The inputs.
        tokens: Estimate of tokens.
        costs: Estimate of everything else.
        assumed: What the costs go by.
        method: `align.method`.
    """

    wanted: Wanted
    models: tuple[ModelFacts, ...]
    tokenizers: Mapping[str, TokenizerFacts]
    data: tuple[DataFacts, ...]
    tokens: TokenEstimate
    costs: Costs
    assumed: Assumed
    method: str

    @property
    def target(self) -> ModelFacts:
        """The target."""
        return self.models[-1]

    @property
    def is_large(self) -> bool:
        """Whether the target is so large that memory decides; also if its size is not known."""
        return self.target.parameters is None or self.target.parameters >= LARGE

    @property
    def has_chats(self) -> bool:
        """Whether any input has chats."""
        return any(facts.has_chats for facts in self.data)

    def warnings(self) -> list[str]:
        """What to mend before the stages run, a line each."""
        lines = [f"{m.name}: {m.problem}" for m in self.models if m.problem]
        lines += [f"{t.name}: {t.problem}" for t in self.tokenizers.values() if t.problem]
        lines += [f"{m.name}: {note}" for m in self.models for note in m.notes]
        lines += [f"{t.name}: {note}" for t in self.tokenizers.values() for note in t.notes]
        for facts in self.tokenizers.values():
            if self.has_chats and facts.tokenizer is not None and not facts.has_template:
                lines.append(
                    f"{facts.name} has no chat template, but the data has chats: write one (Jinja) "
                    f"and name it beside the model, `template: {{file: chat.jinja}}`"
                )
        lines += self._drops()
        need, free = self.costs.disk_bytes, self.costs.disk_free_bytes
        if free is not None and need > free:
            trains = self.costs.train.bytes > need / 2
            less = "train.save_total_limit: 1" if trains else "a smaller --preset (compact, tiny)"
            lines.append(
                f"the run needs about {size_text(need)} on disk, {size_text(free)} are free: give "
                f"another --run-dir, {less}, or free space"
            )
        return lines

    def _drops(self) -> list[str]:
        """Lines on what of the data would be left out."""
        lines = []
        for facts in self.data:
            path, seen = facts.entry.path, f"of the first {facts.rows_read:,} rows"
            for reason, number in facts.dropped.items():
                lines.append(
                    f"{path}: {number:,} {seen} dropped ({reason}): {facts.examples[reason]}"
                )
            for split, number in facts.left_out.items():
                lines.append(f"{path}: {number:,} {seen} left out, split {split} (corpus.splits)")
        splits = {split for facts in self.data for split in facts.splits}
        missing = [split for split in ("train", "valid", "test") if split not in splits]
        if missing and all(facts.has_split or facts.exact for facts in self.data):
            lines.append(
                f"no text of split {', '.join(missing)} in the rows looked at: training needs train "
                "and valid, evaluation test; give more data, or `split:` to one of the inputs"
            )
        for reason, number in self.tokens.dropped.items():
            lines.append(
                f"{number:,} of {self.tokens.documents:,} documents dropped by the plan: {reason}"
            )
        for name, kinds in self.tokens.unwritten.items():
            shown = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
            seen = f"in {self.tokens.documents:,} documents"
            lines.append(f"the chat template of {name} leaves out, {seen}: {shown}")
        return lines


def find_out(wanted: Wanted, assumed: Assumed) -> Findings:
    """Look at models, tokenizers and data.

    Raises:
        LogitfuseError: A local model or an input cannot be used.
    """
    refs = {**wanted.sources, TARGET: wanted.target}
    models = tuple(look_at_model(name, ref) for name, ref in refs.items())
    data, samples = look_at_data(wanted.data)
    tokenizers = look_at_tokenizers(models)
    contexts = [model.context for model in models if model.context is not None]
    tokens = estimate_tokens(data, samples, tokenizers, contexts)
    costs = _costs(wanted, models, data, tokens, assumed)
    method = method_for(tokenizers)
    return Findings(wanted, models, tokenizers, tuple(data), tokens, costs, assumed, method)


def _costs(
    wanted: Wanted,
    models: Sequence[ModelFacts],
    data: Sequence[DataFacts],
    tokens: TokenEstimate,
    assumed: Assumed,
) -> Costs:
    *sources, target = models
    entries = ExtractSection().max_entries
    preset: Preset = wanted.preset
    scored = tuple(
        source_cost(
            model.name,
            (tokens.positions[model.name], tokens.read[model.name]),
            model.active,
            entries=entries,
            preset=preset,
            tflops=assumed.tflops,
        )
        for model in sources
    )
    aligned = likely_bytes(tokens.positions[TARGET], entries, preset) * len(sources)
    seconds = tokens.positions[TARGET] * len(sources) / ALIGNED_TOKENS_PER_S
    text = sum(facts.text_bytes * facts.scale for facts in data)
    large = target.parameters is None or target.parameters >= LARGE
    trained = train_cost(
        target.parameters, target.active, tokens.train,
        epochs=1.0, recompute=large, tflops=assumed.tflops,
    )  # fmt: skip
    return Costs(scored, aligned, seconds / 3600, 2 * text, trained, free_bytes(wanted.run_dir))


def free_bytes(folder: str) -> int | None:
    """Free bytes of the disk that a folder is on, or will be; None for an object store."""
    if "://" in folder:
        return None
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
