"""`logitfuse status`."""

from __future__ import annotations

import contextlib
import sys
import time

import click

from launch.command import run_options
from store_schema.config import RunConfig


@click.command("status")
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@click.option("--workers", "all_workers", is_flag=True, help="Every worker, not only failed ones.")
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Again and again, until interrupted.",
)
def status(run: RunConfig, as_json: bool, all_workers: bool, watch_s: float | None) -> None:
    """Shards done, pending and failed of each stage, who is at work, how fast, and until when.

    Read from commits and logs alone, while workers run or when none does.
    """
    from launch.status import run_status
    from launch.status_text import status_json, status_text

    def show() -> None:
        found = run_status(run)
        if watch_s is not None and sys.stdout.isatty():
            click.clear()
        click.echo(status_json(found) if as_json else status_text(found, all_workers=all_workers))
        sys.stdout.flush()

    show()
    with contextlib.suppress(KeyboardInterrupt):
        while watch_s is not None:
            time.sleep(watch_s)
            show()
