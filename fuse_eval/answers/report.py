"""Shares of right answers as a table, as sentences, and as a section of the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuse_eval.findings import BEFORE, CONTROL, FUSED, title_of
from fuse_eval.page_parts import Panels, Section
from fuse_eval.palette import colours_of
from fuse_eval.tables import plain
from launch.pages.charts import Bar, bar_chart, share_of
from launch.pages.parts import Cell, Row, Table, head_of
from launch.visible import table

TITLE = "Answers"


def points(change: Mapping[str, float]) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, low, high = (100 * change[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def answer_lines(content: Mapping[str, Any]) -> list[str]:
    """The results as sentences: comparisons, prompts left out, answers without a score."""
    lines = []
    for comparison in content["comparisons"]:
        model, against = title_of(comparison["model"]), title_of(comparison["against"])
        level = share_of(content["confidence"], 0)
        lines.append(
            f"{model} against {against}: {points(comparison['mean'])}, mean of domains, {level} "
            "interval over prompts."
        )
    lines += [
        f"Left out, {reason}: {number:,} prompts." for reason, number in content["left_out"].items()
    ]
    lines += [
        f"{title_of(name)}: {number:,} answers without a score, counted as wrong ({reason})."
        for name, reasons in content["failures"].items()
        for reason, number in reasons.items()
    ]
    return lines


def answer_table(content: Mapping[str, Any]) -> str:
    """Share of right answers of each model by domain, for a terminal."""
    domains = list(content["prompts"])
    total = sum(content["prompts"].values())
    rows = []
    for name, by_domain in content["scores"].items():
        shares = [*(by_domain[domain] for domain in domains), content["mean_score"][name]]
        rows.append([title_of(name), *map(share_of, [*shares, content["ended"][name]])])
    title = (
        f"right answers on split {content['split']}, by judge {content['judge']}: {total:,} prompts"
    )
    lines = table(["", *domains, "mean", "ended"], rows)
    return plain("\n".join([title, *lines, "", *answer_lines(content)]))


def answer_section(content: Mapping[str, Any]) -> Section:
    """Share of right answers by domain as a table and bars, for the report page."""
    domains = list(content["prompts"])
    rows = [
        Row(
            title_of(name),
            [
                *(Cell(share_of(by_domain[domain])) for domain in domains),
                Cell(share_of(content["mean_score"][name]), kind="mean"),
            ],
            "own" if name == FUSED else "",
        )
        for name, by_domain in content["scores"].items()
    ]
    total = sum(content["prompts"].values())
    caption = f"Share of {total:,} held-out prompts that are answered right"
    table = Table(caption, head_of(["model", *domains, "mean"]), rows)
    sources = [name for name in content["scores"] if name not in (BEFORE, CONTROL, FUSED)]
    colours = colours_of(sources)
    bars = [
        Bar(title_of(name), share, colours[name], share_of(share))
        for name, share in content["mean_score"].items()
    ]
    panels: Panels = [("Right answers", bar_chart("Right answers", bars, unit="share", top=1.0))]
    text = f"Each model answers with greedy decoding; judged by {content['judge']}."
    return Section(TITLE, [text, *answer_lines(content)], [table], panels)
