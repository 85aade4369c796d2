"""What a study shows, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuse_eval.study.config import StudyConfig
from fuse_eval.study.figures import MEAN, best_baseline
from fuse_eval.study.tables import shown_change, title_of_row
from launch.pages.charts import percent

Record = Mapping[str, Any]


def verdict(study: StudyConfig, name: str, record: Record) -> str:
    """Whether fusing pays in a setting, in one sentence."""
    ours = study.ours
    if ours is None:
        return f"{name}: {len(record['rows'])} rows are compared."
    if ours not in record["rows"]:
        return f"{name}: {title_of_row(study, ours)} is not trained yet."
    change = record["rows"][ours]["against_control"][MEAN]
    shown = shown_change(change)
    if change["high"] < 0:
        return f"{name}: fusing pays, {shown} bits per byte against plain training."
    if change["low"] > 0:
        return f"{name}: fusing does not pay, {shown} bits per byte against plain training."
    return f"{name}: no difference beyond the noise, {shown} bits per byte against plain training."


def notes(study: StudyConfig, record: Record) -> list[str]:
    """Further findings of a setting, a sentence each."""
    found: list[str] = []
    ours = study.ours
    if ours is None or ours not in record["rows"]:
        return found
    own = record["rows"][ours]
    domains = {d: c for d, c in own["against_control"].items() if d != MEAN}
    worst = max(domains, key=lambda domain: domains[domain]["value"])
    found.append(f"Its worst domain is {worst}: {shown_change(domains[worst])}.")
    interference = own.get("interference")
    if interference:
        found.append(
            f"{interference['documents']} of {interference['of']} documents are worse beyond the "
            f"noise, {interference['better']} score better."
        )
    best = best_baseline(study, record)
    if best is not None:
        found.append(
            f"The best baseline is {title_of_row(study, best)}: ours is at "
            f"{shown_change(record['rows'][best]['ours_against'][MEAN])} of it."
        )
    reached = own.get("tokens_to_control")
    if reached is not None:
        found.append(
            f"It needs {reached:.2f} of the control's tokens for the control's best score."
        )
    helped = sources_that_carry(study, record)
    if helped:
        words = ", ".join(f"{name} {percent(value)}" for name, value in helped.items())
        found.append(f"Without one source, against ours: {words}.")
    return found


def sources_that_carry(study: StudyConfig, record: Record) -> dict[str, float]:
    """Change of the mean when a source is left out, largest loss first: rows that are ours but for
    `without_sources`."""
    ours = study.ours
    assert ours is not None
    own = record["rows"][ours]["bpb"][MEAN]
    found = {
        name: record["rows"][name]["bpb"][MEAN] / own - 1
        for name, row in study.rows.items()
        if name in record["rows"] and row.without_sources and row.set == study.rows[ours].set
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))
