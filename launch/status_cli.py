"""`logitfuse status`."""

from __future__ import annotations

import contextlib
import sys
import time

import click

from launch.command import echo_json, json_option, run_options
from store_schema.config import RunConfig


@click.command("status")
@run_options
@json_option
@click.option(
    "--workers",
    "all_workers",
    is_flag=True,
    help="List every worker. Default: only those that failed or stalled.",
)
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Show it again every SECONDS seconds, until interrupted.",
)
def status(run: RunConfig, as_json: bool, all_workers: bool, watch_s: float | None) -> None:
    """Show done, pending and failed shards of each stage, workers, speed and remaining time.

    Reads only commits and logs, so it works whether workers run or not.
    """
    from launch.status import run_status
    from launch.status_text import status_json, status_text

    def show() -> None:
        now = run_status(run)
        if as_json:
            echo_json(status_json(now))
        else:
            if watch_s is not None and sys.stdout.isatty():
                click.clear()
            click.echo(status_text(now, all_workers=all_workers))
        sys.stdout.flush()

    show()
    with contextlib.suppress(KeyboardInterrupt):
        while watch_s is not None:
            time.sleep(watch_s)
            show()
