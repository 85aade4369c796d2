"""Harness scores as a table, as sentences, and as a section of the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuse_eval.findings import BEFORE, CONTROL, FUSED, title_of
from fuse_eval.page_parts import Panels, Section
from fuse_eval.palette import colours_of
from fuse_eval.tables import plain
from launch.pages.charts import Bar, bar_chart, significant
from launch.pages.parts import Cell, Row, Table, head_of
from launch.visible import table

TITLE = "Tasks"
Content = Mapping[str, Any]


def columns(content: Content) -> list[tuple[str, str]]:
    """Tasks and metrics in the order of the request: those that every model has."""
    scores = list(content["scores"].values())
    return [
        (task, metric)
        for task in content["tasks"]
        for metric in scores[0][task]
        if all(metric in of_model[task] for of_model in scores)
    ]


def metric_title(metric: str) -> str:
    """A metric without the filter that takes nothing away."""
    return metric.removesuffix(",none")


def shown_score(metric: Mapping[str, Any]) -> str:
    """A value with its standard error."""
    error = metric["stderr"]
    shown = significant(metric["value"], 3)
    return shown if error is None else f"{shown} ± {significant(error, 2)}"


def harness_lines(content: Content) -> list[str]:
    """Paired differences as sentences."""
    lines = []
    for item in content["differences"]:
        model, against = title_of(item["model"]), title_of(item["against"])
        for task in content["tasks"]:
            for metric, apart in item["tasks"].get(task, {}).items():
                lines.append(
                    f"{model} against {against}, {task} {metric_title(metric)}: {apart['value']:+.3f} "
                    f"({apart['low']:+.3f} to {apart['high']:+.3f}, 95 % over {apart['examples']:,} "
                    "examples)."
                )
    return lines


def harness_table(content: Content) -> str:
    """Scores of each model, tasks as rows, for a terminal."""
    models = list(content["scores"])
    rows = [
        [
            f"{task} {metric_title(metric)}",
            *(shown_score(content["scores"][model][task][metric]) for model in models),
        ]
        for task, metric in columns(content)
    ]
    limit = "" if content["limit"] is None else f", at most {content['limit']:,} examples of a task"
    title = f"lm-evaluation-harness {content['version']}{limit}"
    lines = table(["", *map(title_of, models)], rows)
    return plain("\n".join([title, *lines, "", *harness_lines(content)]))


def harness_section(content: Content) -> Section:
    """Scores as a table and bars, for the report page."""
    asked = columns(content)
    rows = [
        Row(
            title_of(model),
            [_cell(tasks[task][metric]) for task, metric in asked],
            "own" if model == FUSED else "",
        )
        for model, tasks in content["scores"].items()
    ]
    head = head_of(["model", *(f"{task} {metric_title(metric)}" for task, metric in asked)])
    caption = "Scores with their standard errors"
    sources = [name for name in content["scores"] if name not in (BEFORE, CONTROL, FUSED)]
    colours = colours_of(sources)
    panels: Panels = []
    for task, metric in asked:
        bars = [
            Bar(
                title_of(model),
                tasks[task][metric]["value"],
                colours[model],
                significant(tasks[task][metric]["value"], 3),
            )
            for model, tasks in content["scores"].items()
        ]
        title = f"{task} {metric_title(metric)}"
        panels.append((title, bar_chart(title, bars, unit=metric_title(metric))))
    text = f"Run by lm-evaluation-harness {content['version']}."
    return Section(TITLE, [text, *harness_lines(content)], [Table(caption, head, rows)], panels)


def _cell(metric: Mapping[str, Any]) -> Cell:
    error = metric["stderr"]
    note = "" if error is None else f"± {significant(error, 2)}"
    return Cell(significant(metric["value"], 3), note)
