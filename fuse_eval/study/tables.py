"""Tables of a study for terminals and Markdown, from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuse_eval.harness.report import shown_score
from fuse_eval.study.config import StudyConfig
from fuse_eval.study.figures import MEAN
from launch.pages.charts import percent, significant
from launch.visible import table

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: titles of the columns, and rows of cells in groups.

    Args:
        head: Titles.
        groups: Name of each group, with its rows.
    """

    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]


def title_of_row(study: StudyConfig, row: str) -> str:
    """What a row is, in words."""
    return study.rows[row].says or row


def shown_change(change: Mapping[str, Any], digits: int = 1) -> str:
    """A change with its interval."""
    low, high = (percent(change[end], digits) for end in ("low", "high"))
    return f"{percent(change['value'], digits)} ({low} to {high})"


def settings_grid(study: StudyConfig, record: Record) -> Grid:
    """All rows of a setting: bits per byte, change against the control, what is worse, the cost."""
    rows = record["rows"]
    domains = [key for key in rows[study.control]["bpb"] if key != MEAN]
    compared = any("ours_against" in found for found in rows.values())
    ours = [f"{title_of_row(study, study.ours or '')} against it"] if compared else []
    head = [
        *("", *domains, MEAN, "against control", *ours),
        *("worst domain", "worse documents", "gap closed", "tokens to control", "minutes"),
    ]
    groups: dict[str, list[list[str]]] = {"": []}  # rows without a group come first
    for name, found in rows.items():
        groups.setdefault(study.rows[name].group, []).append(
            [
                title_of_row(study, name),
                *(significant(found["bpb"][key], 4) for key in [*domains, MEAN]),
                *_comparison(found, domains, with_ours=compared),
                f"{found['seconds'] / 60:.1f}" if "seconds" in found else "",
            ]
        )
    return Grid(head, list(groups.items()))


def _comparison(found: Record, domains: Sequence[str], *, with_ours: bool) -> list[str]:
    changes, ours = found.get("against_control"), found.get("ours_against")
    against = [shown_change(ours[MEAN]) if ours else ""] if with_ours else []
    if changes is None:
        return ["", *against, "", "", _share(found.get("gap_closed")), ""]
    worst = max(domains, key=lambda domain: changes[domain]["value"])
    interference = found.get("interference")
    return [
        shown_change(changes[MEAN]),
        *against,
        f"{percent(changes[worst]['value'])} {worst}",
        f"{interference['documents']} of {interference['of']}" if interference else "",
        _share(found.get("gap_closed")),
        _share(found.get("tokens_to_control")),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def answers_grid(study: StudyConfig, record: Record) -> Grid | None:
    """Right answers of every row that was asked; None without any."""
    asked = {name: found for name, found in record["rows"].items() if "right" in found}
    if not asked:
        return None
    domains = [key for key in next(iter(asked.values()))["right"]["share"] if key != MEAN]
    groups: dict[str, list[list[str]]] = {"": []}
    for name, found in asked.items():
        share, change = found["right"]["share"], found["right"].get("against_control")
        shown = "" if change is None else _points(change[MEAN])
        groups.setdefault(study.rows[name].group, []).append(
            [
                title_of_row(study, name),
                *(f"{100 * share[key]:.1f}" for key in [*domains, MEAN]),
                shown,
            ]
        )
    head = ["right answers, %", *domains, MEAN, "points against control"]
    return Grid(head, list(groups.items()))


def _points(change: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * change[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def tasks_grid(study: StudyConfig, record: Record) -> Grid | None:
    """Scores of every row that did tasks of lm-evaluation-harness; None without any."""
    asked = {name: found["tasks"] for name, found in record["rows"].items() if "tasks" in found}
    if not asked:
        return None
    tasks = list(next(iter(asked.values())))
    groups: dict[str, list[list[str]]] = {"": []}
    for name, found in asked.items():
        cells = [cell for task in tasks for cell in _task_cells(found.get(task))]
        groups.setdefault(study.rows[name].group, []).append([title_of_row(study, name), *cells])
    titles = [title for task in tasks for title in (task, "against control")]
    return Grid(["tasks of lm-evaluation-harness", *titles], list(groups.items()))


def _task_cells(found: Record | None) -> tuple[str, str]:
    """A score with its standard error, and the difference to the control with its interval."""
    if found is None:
        return "", ""
    apart = found["difference"]
    if apart is None:
        return shown_score(found), ""
    value, low, high = (f"{apart[key]:+.3f}" for key in ("value", "low", "high"))
    return shown_score(found), f"{value} ({low} to {high})"


def pools_grid(record: Record) -> Grid | None:
    """The aligned sources mixed at inference, by selector, beside the target; None without any."""
    pools = record.get("pools")
    if not pools:
        return None
    domains = list(next(iter(pools.values())))
    rows = [
        [name, *(significant(value, 4) for value in (*by.values(), sum(by.values()) / len(by)))]
        for name, by in ((name, {d: pools[name][d] for d in domains}) for name in pools)
    ]
    return Grid(["sources mixed at inference", *domains, MEAN], [("", rows)])


def gates_grid(study: StudyConfig, record: Record) -> Grid | None:
    """How much each row's selector listens to each source, and how much that varies; the control
    listens to none."""
    rows, gated = record["rows"], {}
    for name in rows:
        if "gate" in rows[name] and name != study.control:
            gated[name] = rows[name]["gate"]
    if not gated:
        return None
    sources = list(dict.fromkeys(source for gate in gated.values() for source in gate["weight"]))

    def cell(gate: Record, source: str) -> str:
        if source not in gate["weight"]:
            return ""
        mean, spread, within = (gate[p][source] for p in ("weight", "spread", "spread_within"))
        return f"{mean:.2f} (±{spread:.2f}, ±{within:.2f})"

    lines = [
        [title_of_row(study, name), *(cell(gate, source) for source in sources)]
        for name, gate in gated.items()
    ]
    head = "weights at the end, mean (± over positions, ± within a domain)"
    return Grid([head, *sources], [("", lines)])


def text_table(grid: Grid) -> str:
    """For a terminal."""
    rows: list[Sequence[str]] = []
    for name, cells in grid.groups:
        if name:
            rows.append([f"{name}:", *[""] * (len(grid.head) - 1)])
        rows += [[f"  {first}" if name else first, *others] for first, *others in cells]
    return "\n".join(_plain(line) for line in table(grid.head, rows))


def markdown_table(grid: Grid) -> str:
    """For a document."""
    lines = [_row(grid.head), _row(["---", *["---:"] * (len(grid.head) - 1)])]
    for name, cells in grid.groups:
        if name:
            lines.append(_row([f"**{name}**", *[""] * (len(grid.head) - 1)]))
        lines += [_row(row) for row in cells]
    return "\n".join(map(_plain, lines))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("−", "-")
