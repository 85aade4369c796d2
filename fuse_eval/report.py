"""`logitfuse report`: summary.json and index.html from the outputs of a run's stages."""

from __future__ import annotations

import json
from typing import Any

from fuse_eval.page import render_page
from fuse_eval.summary import (
    PAGE_FILE,
    SUMMARY_FILE,
    build_summary,
    read_json,
    report_location,
    step_logs,
    write_json,
)
from launch.pages.page import template_files
from store_schema.config import RunConfig
from store_schema.fingerprint import bytes_digest, fingerprint

_VOLATILE = ("seconds", "peak_rss_bytes", "peak_rss_bytes_by_stage")
"""Every run of a stage changes these, even one with nothing to do: alone they need no new report."""


def write_report(run: RunConfig) -> tuple[str, bool]:
    """Write the report, if its content has changed.

    Returns:
        URL of the page, and whether it was written now.

    Raises:
        CorruptionError: A record of the run is damaged.
    """
    summary = build_summary(run)
    steps = step_logs(run)
    report = report_location(run)
    request = _request(summary, steps)
    before = read_json(report, SUMMARY_FILE)
    url = f"{report.url}/{PAGE_FILE}"
    if before is not None and before.get("fingerprint") == request and report.exists(PAGE_FILE):
        return url, False
    report.write_atomic(PAGE_FILE, render_page(summary, steps).encode())
    write_json(report, SUMMARY_FILE, {"fingerprint": request} | summary)
    return url, True


def _request(summary: dict[str, Any], steps: dict[str, Any]) -> str:
    stable = {key: value for key, value in summary.items() if key not in _VOLATILE}
    # Settings may hold what canonical JSON refuses (infinity), so they enter as text.
    return fingerprint(
        [
            json.dumps(stable, sort_keys=True),
            bytes_digest(json.dumps(steps).encode()),
            template_files("fuse_eval", "page"),
        ]
    )
