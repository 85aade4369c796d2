"""How much text a setting has: from its plan, its inputs' first rows, or else the study file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from extract.config import CorpusSection, PlanSection
from extract.corpus.inputs import input_files
from extract.estimate.costs import BYTES_PER_TOKEN
from extract.estimate.data import look_at_inputs
from fuse_eval.config import EvaluateSection
from fuse_eval.study.config import ExpectedSection
from store_schema.config import RunConfig
from store_schema.errors import InputError
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import plan_location

TARGET = "target"
Basis = Literal["planned", "rows", "expected"]


@dataclass(frozen=True, slots=True)
class TextSize:
    """Tokens of a data set.

    Args:
        basis: Where it is from: the plan, the first rows of the inputs, or the study file.
        num_bytes: UTF-8 bytes of all splits.
        positions: Tokens of the text of all splits by model, the target among them.
        read: The same with contexts, which only a plan knows.
        shares: Share of each split.
        segment_tokens: Target tokens of a segment.
        prompts: Prompts in the split that models are compared on; None where that is not known.
    """

    basis: Basis
    num_bytes: float
    positions: Mapping[str, float]
    read: Mapping[str, float]
    shares: Mapping[str, float]
    segment_tokens: float
    prompts: float | None


def text_size(run: RunConfig, split: str, expected: ExpectedSection) -> TextSize | None:
    """The text of a data set; None where nothing of it is there, and nothing is expected.

    Args:
        run: The run of all sources.
        split: Split whose prompts are answered.
        expected: What the study file says.

    Raises:
        LogitfuseError: An input that is there cannot be used, or the plan is damaged.
    """
    plan = Plan.find(plan_location(run.data_folder))
    if plan is not None:
        return _planned(run, split, plan)
    inputs = run.section("corpus", CorpusSection).inputs
    try:
        there = [input_files(entry) for entry in inputs]
    except InputError:
        there = []
    if there:
        return _first_rows(run, split, expected)
    if expected.tokens is None:
        return None
    fractions = run.section("corpus", CorpusSection).split_fractions
    tokens = dict.fromkeys([*run.sources, TARGET], expected.tokens)
    return TextSize(
        "expected",
        expected.tokens * BYTES_PER_TOKEN,
        tokens,
        tokens,
        fractions,
        run.section("plan", PlanSection).max_tokens,
        expected.prompts,
    )


def _planned(run: RunConfig, split: str, plan: Plan) -> TextSize:
    shards, names = plan.shards, [*run.sources, TARGET]
    context = plan.record.settings.get("context_tokens", {})
    positions = {name: float(sum(s.num_tokens.get(name, 0) for s in shards)) for name in names}
    total = max(positions[TARGET], 1.0)
    shares: Counter[str] = Counter()
    for shard in shards:
        shares[shard.split] += shard.num_tokens[TARGET]
    prompts: Counter[str] = Counter()
    for shard in plan.splits().get(split, ()):
        for segment in plan.segments(shard):
            prompts[segment.domain] += segment.has_prompt and segment.author is None
    return TextSize(
        "planned",
        float(sum(shard.num_bytes for shard in shards)),
        positions,
        {name: count + context.get(name, 0) for name, count in positions.items()},
        {name: count / total for name, count in shares.items()},
        total / max(plan.record.num_segments, 1),
        _limited(run, prompts),
    )


def _first_rows(run: RunConfig, split: str, expected: ExpectedSection) -> TextSize:
    section = run.section("corpus", CorpusSection)
    facts, samples = look_at_inputs(section.inputs, section, seed=run.seed)
    sizes: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    for fact, sample in zip(facts, samples, strict=True):
        for (of, _), size in sample.collected.size_bytes.items():
            sizes[of] += size * fact.scale  # type: ignore[assignment]
        for (of, domain), number in sample.collected.documents.items():
            if of == split and fact.has_chats:
                prompts[domain] += number * fact.scale  # type: ignore[assignment]
    num_bytes = float(sizes.total())
    tokens = dict.fromkeys([*run.sources, TARGET], num_bytes / BYTES_PER_TOKEN)
    return TextSize(
        "rows",
        num_bytes,
        tokens,
        tokens,
        {name: size / max(num_bytes, 1.0) for name, size in sizes.items()},
        run.section("plan", PlanSection).max_tokens,
        expected.prompts or _limited(run, prompts),
    )


def _limited(run: RunConfig, prompts: Mapping[str, float]) -> float:
    """Prompts that are answered: of each domain at most `evaluate.answers.limit`."""
    limit = run.section("evaluate", EvaluateSection).answers.limit
    return sum(number if limit is None else min(number, limit) for number in prompts.values())
