"""A study's costs as a table and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from extract.estimate.costs import (
    ALIGNED_TOKENS_PER_S,
    BYTES_PER_TOKEN,
    MOST_TOKENS_PER_S,
    Assumed,
)
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.costs.estimate import SettingCost, total
from launch.quantities import count_text, hours_text, money_text, size_text
from launch.visible import cut, table

_COLUMNS = 80
_MOST_NAMED = 8


def costs_text(study: StudyConfig, costs: Sequence[SettingCost], assumed: Assumed) -> str:
    """A table for a terminal, what is not known, and what the figures go by."""
    head = ("cost", "times", "tokens", "on disk", "GPU-hours", "money")
    rows: list[tuple[str, ...]] = []
    for cost in costs:
        rows.append((f"{cut(cost.name, 30)}:", "", "", "", "", ""))
        for part in cost.parts:
            rows.append(
                (
                    f"  {cut(part.name, 28)}",
                    f"{part.times:,}",
                    _shown(part.tokens, count_text) if part.name != "corpus and plan" else "",
                    _shown(part.bytes, size_text),
                    hours_text(part.gpu_hours),
                    money_text(part.gpu_hours, assumed.rate),
                )
            )
    size, hours = total(c.bytes for c in costs), total(c.gpu_hours for c in costs)
    shown = (_shown(size, size_text), hours_text(hours), money_text(hours, assumed.rate))
    rows.append(("all", "", "", *shown))
    lines = [*table(head, rows), *unknown_lines(costs)]
    for text in assumptions(study, costs, assumed):
        lines += textwrap.wrap(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _shown(value: float | None, text: Any) -> str:
    return "?" if value is None else str(text(value))


def unknown_lines(costs: Sequence[SettingCost]) -> list[str]:
    """One line on what is not there yet, and what tells it all the same."""
    parts = []
    for cost in costs:
        if cost.unknown:
            names = [*cost.unknown[:_MOST_NAMED], *["..."][: len(cost.unknown) > _MOST_NAMED]]
            parts.append(f"{', '.join(names)} ({cost.name})")
    if not parts:
        return []
    return [f"not known, since not there yet: {'; '.join(parts)}; `expected` of a setting tells it"]


def assumptions(study: StudyConfig, costs: Sequence[SettingCost], assumed: Assumed) -> list[str]:
    """What the costs go by, a sentence each."""
    lines = [
        f"Assumed: GPUs that sustain {assumed.tflops:g} TFLOP/s (--tflops), at most "
        f"{MOST_TOKENS_PER_S:,.0f} scored tokens/s each; {assumed.rate:g} for a GPU-hour (--rate); 2 "
        "FLOP for a parameter and token scored, 6 trained (8 with gradient checkpointing).",
        "What settings share is counted once. A row that is tuned as another counts as the recipe of "
        "most passes until the best one is known. Evaluations during a training are not counted. On "
        f"disk: stores and {study.submit.workers} training(s) at a time, without models.",
    ]
    hours = total(cost.cpu_hours for cost in costs)
    if hours is not None:
        lines.append(
            f"Alignment: about {hours:.2g} hours of two CPU cores "
            f"({ALIGNED_TOKENS_PER_S:,.0f} tokens/s)."
        )
    bases = {basis for cost in costs for basis in cost.basis}
    if "rows" in bases:
        lines.append(
            f"Text of the inputs' first rows, times their rows, at {BYTES_PER_TOKEN:g} bytes a token, "
            "without contexts; a plan has the exact tokens."
        )
    if "expected" in bases:
        lines.append("Text as the study file expects it (`expected`).")
    if any(study.setting(cost.name).answers for cost in costs):
        lines.append("Answers: all of full length, at the speed of scoring.")
    if any(study.setting(cost.name).harness for cost in costs):
        lines.append("Tasks of lm-evaluation-harness are not counted.")
    return lines


def costs_record(
    study: StudyConfig, costs: Sequence[SettingCost], assumed: Assumed
) -> dict[str, Any]:
    """The same, JSON-like."""
    hours = total(cost.gpu_hours for cost in costs)
    return {
        "settings": {
            cost.name: {
                "parts": [asdict(part) for part in cost.parts],
                **_sums(cost.bytes, cost.gpu_hours, assumed.rate),
                "align_cpu_hours": cost.cpu_hours,
                "text": list(cost.basis),
                "unknown": list(cost.unknown),
            }
            for cost in costs
        },
        **_sums(total(cost.bytes for cost in costs), hours, assumed.rate),
        "assumed": asdict(assumed),
        "assumptions": assumptions(study, costs, assumed),
    }


def _sums(size: float | None, hours: float | None, rate: float) -> dict[str, float | None]:
    money = None if hours is None else hours * rate
    return {"bytes": size, "gpu_hours": hours, "money": money}
