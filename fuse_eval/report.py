"""`logitfuse report`: summary.json and index.html from what a run has left behind."""

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
from launch.pages.page import looks
from store_schema.config import RunConfig
from store_schema.fingerprint import bytes_digest, fingerprint

_VOLATILE = ("seconds", "peak_rss_bytes", "peak_rss_bytes_by_stage")
"""Every run of a stage changes these, one with nothing to do too; alone they are no news."""


def write_report(run: RunConfig) -> tuple[str, bool]:
    """Write the report, if what it tells has changed.

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
    told = {key: value for key, value in summary.items() if key not in _VOLATILE}
    # Settings may hold what canonical JSON refuses (infinity), so they enter as text.
    return fingerprint(
        [
            json.dumps(told, sort_keys=True),
            bytes_digest(json.dumps(steps).encode()),
            looks("fuse_eval", "page"),
        ]
    )
