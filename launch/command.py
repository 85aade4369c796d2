"""What every stage's command line shares: the run file argument, overrides, errors in one line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from store_schema.config import RunConfig, load_run
from store_schema.errors import LogitfuseError, StorageError

logger = logging.getLogger(__name__)


class StageGroup(click.Group):
    """A click group that tells LogitfuseErrors in one line and exits with their code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            super().main(*args, **kwargs)
        except LogitfuseError as error:
            print(f"error: {error.line()}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:  # files of ours raise StorageError: this is standard output
            print(f"error: output cannot be written: {error.strerror or error}", file=sys.stderr)
            sys.exit(LogitfuseError.exit_code)
        sys.exit(0)


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the run file argument and --set; the command receives `run`, a checked RunConfig."""

    @click.argument("config", type=click.Path(dir_okay=False))
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Put a value over the run file, e.g. --set train.lr=2e-5.",
    )
    def command(config: str, overrides: tuple[str, ...], **options: Any) -> None:
        set_up_logging()
        run = load_run(config, overrides)
        function(run=run, **options)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(function, "__click_params__", []),
        *getattr(command, "__click_params__", []),
    ]
    return command


def set_up_logging() -> None:
    """Handlers live only here: our loggers say INFO on stderr, libraries only warnings."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )


@contextmanager
def timed_stage(run: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    """Note what a stage cost in logs/<stage>.jsonl, also when it fails.

    The block may add figures to the dict it is given; seconds and peak memory are added here.
    """
    from launch.summary import append_summary

    figures: dict[str, Any] = {}
    start = time.monotonic()
    try:
        yield figures
    except BaseException as error:
        figures["error"] = type(error).__name__
        try:
            append_summary(run, stage, time.monotonic() - start, figures)
        except StorageError as second:  # the stage's own error is the one to tell
            logger.warning("%s", second.line())
        raise
    append_summary(run, stage, time.monotonic() - start, figures)
