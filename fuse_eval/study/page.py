"""The page of a study: one self-contained HTML file, verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from fuse_eval.page_parts import Section
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.figures import MEAN
from fuse_eval.study.tables import (
    Grid,
    answers_grid,
    gates_grid,
    pools_grid,
    settings_grid,
    tasks_grid,
    title_of_row,
)
from fuse_eval.study.verdict import notes, verdict
from launch.pages.charts import (
    Bar,
    Line,
    Range,
    bar_chart,
    interval_chart,
    line_chart,
    percent,
    significant,
)
from launch.pages.page import render
from launch.pages.parts import Cell, Row, Table, Tile, head_of

_COLOURS = ("c2", "c3", "c4", "c5", "c6", "c7")
_MOST_LINES = 6

Record = Mapping[str, Any]


def render_page(study: StudyConfig, record: Record) -> str:
    """The whole page.

    Args:
        study: The study file.
        record: Content of study.json.

    Returns:
        HTML that loads nothing.
    """
    settings = record["settings"]
    only = len(settings) == 1
    return render(
        "fuse_eval",
        "study/page",
        style="page",
        title=study.name,
        verdicts=[verdict(study, name, found) for name, found in settings.items()],
        notes=[
            note if only else f"{name}: {note[0].lower()}{note[1:]}"
            for name, found in settings.items()
            for note in notes(study, found)
        ],
        figures=[tile for name, found in settings.items() for tile in _tiles(study, name, found)],
        sections=[
            part for name, found in settings.items() for part in _sections(study, name, found)
        ],
        config=yaml.safe_dump(record["study"], sort_keys=False, allow_unicode=True),
    )


def _tiles(study: StudyConfig, name: str, found: Record) -> list[Tile]:
    own = found["rows"].get(study.ours or "")
    if own is None:
        return []
    change = own["against_control"][MEAN]
    tiles = [
        Tile(
            f"{name}: against plain training",
            percent(change["value"]),
            f"{percent(change['low'])} to {percent(change['high'])}",
        )
    ]
    if own.get("tokens_to_control") is not None:
        share = significant(own["tokens_to_control"], 2)
        tiles.append(Tile(f"{name}: tokens to the control's score", share, "of the control's"))
    return tiles


def _sections(study: StudyConfig, name: str, found: Record) -> list[Section]:
    seeds = len(found["seeds"])
    texts = [
        f"Bits per byte, mean of {seeds} seeds. Intervals are over seeds and documents."
        if seeds > 1
        else "Bits per byte of one seed. Intervals are over documents."
    ]
    panels = [
        *_change_panels(study, found),
        *_score_panels(study, found),
        *_cost_panels(study, found),
    ]
    tables = []
    for caption, grid in (
        (f"{name}: all rows", settings_grid(study, found)),
        (f"{name}: right answers to held-out prompts", answers_grid(study, found)),
        (f"{name}: tasks of lm-evaluation-harness", tasks_grid(study, found)),
    ):
        if grid:
            tables.append(_table(caption, grid, study))
    details = []
    for caption, grid in (
        (f"{name}: the aligned sources mixed at inference, not trained", pools_grid(found)),
        (f"{name}: what selectors listen to", gates_grid(study, found)),
    ):
        if grid:
            details.append(_table(caption, grid, study))
    if found.get("worst_documents"):
        details.append(_worst(found["worst_documents"]))
    sections = [Section(name, texts, tables, panels=panels)]
    if details:
        sections.append(Section(f"{name}, in detail", [], details))
    return sections


def _table(caption: str, grid: Grid, study: StudyConfig) -> Table:
    own = title_of_row(study, study.ours) if study.ours else None
    rows = []
    for group, cells in grid.groups:
        if group:
            rows.append(Row(group, [Cell("", kind="words")] * (len(grid.head) - 1), "part"))
        for first, *others in cells:
            rows.append(Row(first, list(map(_cell, others)), "own" if first == own else ""))
    return Table(caption, head_of(grid.head), rows)


def _cell(text: str) -> Cell:
    """A change with its interval below it, any other text as it is."""
    value, bracket, interval = text.partition(" (")
    return Cell(value, interval.removesuffix(")")) if bracket else Cell(text)


def _worst(documents: Sequence[Record]) -> Table:
    rows = [
        Row(
            item["document_id"],
            [
                Cell(item["domain"]),
                Cell(str(item["seed"])),
                Cell(percent(item["change"])),
                Cell(significant(item["excess_nats"])),
                Cell(item.get("text", ""), kind="words"),
            ],
        )
        for item in documents
    ]
    head = head_of(["document", "domain", "seed", "change", "nats more", "its text begins"])
    return Table("Documents that fusing makes worse by most", head, rows)


def _trained(found: Record) -> dict[str, Record]:
    return {name: row for name, row in found["rows"].items() if "valid" in row}


def _change_panels(study: StudyConfig, found: Record) -> list[tuple[str, Markup]]:
    rows = {n: r for n, r in _trained(found).items() if "against_control" in r}
    if not rows:
        return []
    panels = []
    domains = next(iter(rows.values()))["against_control"]
    for key in [MEAN, *(domain for domain in domains if domain != MEAN)]:
        ranges = [
            Range(
                name,
                row["against_control"][key]["value"],
                row["against_control"][key]["low"],
                row["against_control"][key]["high"],
                strong=name == study.ours,
            )
            for name, row in rows.items()
        ]
        chart = interval_chart(
            f"change of bits per byte, {key}",
            ranges,
            unit="change against plain training, %",
            good="better",
            bad="worse",
        )
        panels.append(
            (f"Against plain training, {'mean of domains' if key == MEAN else key}", chart)
        )
    return panels


def _score_panels(study: StudyConfig, found: Record) -> list[tuple[str, Markup]]:
    """Validation score against tokens: the control, ours, and the best of the others."""
    rows = _trained(found)
    first = [name for name in (study.ours, study.control) if name in rows]
    others = sorted((n for n in rows if n not in first), key=lambda n: rows[n]["bpb"][MEAN])
    colours = dict(zip([*first, *others], ["c0", "c1", *_COLOURS], strict=False))
    lines = []
    for name in [*first, *others][:_MOST_LINES]:
        if study.rows[name].set.get("train.pairwise") is None:
            lines.append(Line(name, colours[name], _mean_curve(rows[name]["valid"])))
    chart = line_chart(
        "validation score over training",
        lines,
        x_unit="share of the training",
        y_unit="bits per byte (valid)",
    )
    return [("Score over training, mean of seeds", chart)] if lines else []


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[tuple[float, float], ...]:
    """Mean of the seeds' curves, at the evaluations that all of them have."""
    count = min(map(len, curves))
    return tuple(
        (
            sum(curve[i][0] for curve in curves) / len(curves),
            sum(curve[i][1] for curve in curves) / len(curves),
        )
        for i in range(count)
    )


def _cost_panels(study: StudyConfig, found: Record) -> list[tuple[str, Markup]]:
    rows = _trained(found)
    bars = [
        Bar(
            name,
            row["seconds"] / 60,
            "c0" if name == study.ours else "c1" if name == study.control else "c2",
            f"{row['seconds'] / 60:.1f}",
        )
        for name, row in rows.items()
    ]
    excess = [
        Bar(
            name,
            row["interference"]["excess_nats"],
            "c0" if name == study.ours else "c2",
            significant(row["interference"]["excess_nats"]),
        )
        for name, row in rows.items()
        if "interference" in row
    ]
    panels = [("Time of a training", bar_chart("minutes of a training", bars, unit="minutes"))]
    if excess:
        title = "Interference: documents worse beyond the noise"
        panels.insert(0, (title, bar_chart("interference", excess, unit="nats above the control")))
    return panels
