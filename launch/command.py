"""Shared by all commands: the run file, --json and pages, errors in one line, what comes next."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

from launch.json_lines import json_text
from launch.process import set_torch_defaults
from launch.signals import stopped_in_one_line
from launch.work import Part, chosen_sources, parse_shards, parse_worker, step_task
from store_schema.config import RunConfig, load_run
from store_schema.errors import ConfigError, LogitfuseError, Stopped, StorageError
from store_schema.yaml_file import read_yaml

logger = logging.getLogger(__name__)


class StageGroup(click.Group):
    """A click group that prints errors, also of usage, in one line and exits with their code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        code: object = None
        set_torch_defaults()
        if os.environ.get("NO_COLOR"):
            kwargs = {"color": False} | kwargs
        try:
            with stopped_in_one_line():
                code = super().main(*args, **kwargs | {"standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            name = error.ctx.command_path if error.ctx else self.name
            message = " ".join(error.format_message().split())
            print(f"error: {message} See {name} --help.", file=sys.stderr)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            print(f"error: {error.format_message()}", file=sys.stderr)
            sys.exit(LogitfuseError.exit_code)
        except (LogitfuseError, Stopped) as error:
            print(f"error: {error.line()}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:  # standard output: errors of other files are StorageErrors
            print(f"error: output cannot be written: {error.strerror or error}", file=sys.stderr)
            sys.exit(LogitfuseError.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


# ------------------------------------------------------------------------------- output

_STDOUT = "logitfuse.stdout"
"""Key of a context's `meta`: standard output, while --json keeps all else away from it."""


def json_option(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add --json; the command gets `as_json`.

    With --json only `echo_json` writes to stdout. What else is printed meanwhile goes to stderr.
    """

    @wraps(function)
    def command(*args: Any, as_json: bool, **options: Any) -> None:
        if not as_json:
            function(*args, as_json=False, **options)
            return
        click.get_current_context().meta[_STDOUT] = sys.stdout
        with redirect_stdout(sys.stderr):
            function(*args, as_json=True, **options)

    return click.option(
        "--json", "as_json", is_flag=True, help="JSON instead of text, one object on a line."
    )(command)


def echo_json(content: object) -> None:
    """Print one JSON value on one line of stdout, in ASCII."""
    click.echo(json_text(content), file=click.get_current_context().meta.get(_STDOUT))


def echo_pages(text: str) -> None:
    """Print long text, page by page on a terminal where it does not fit on the screen.

    The pager is PAGER, by default less, with the options of LESS, by default -FRX.
    """
    if sys.stdout.isatty():
        os.environ.setdefault("LESS", "-FRX")
        click.echo_via_pager(text.rstrip("\n"))  # which ends the last line
    else:
        click.echo(text.rstrip("\n"))


def echo_next(command: str) -> None:
    """Say on stderr which command of logitfuse comes next, with this one's run file and overrides."""
    click.echo(f"next: logitfuse {command} {run_words()}", err=True)


def echo_next_of(run: RunConfig, sources: tuple[str, ...], part: Part, command: str) -> None:
    """`echo_next` after a part of a stage's shards: `status` unless it was all of the run's."""
    whole = part == Part() and set(sources) == set(run.sources)
    echo_next(command if whole else "status")


def run_words() -> str:
    """The run file and overrides of this command line, quoted for a shell."""
    params = click.get_current_context().params
    words = [str(params["config"] or params["config_option"])]
    for override in params["overrides"]:
        words += ["--set", override]
    return shlex.join(words)


# ------------------------------------------------------------------------------- options


def cost_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add --rate and --tflops, by which costs are estimated."""
    for option in (
        click.option(
            "--tflops",
            type=click.FloatRange(min=0, min_open=True),
            default=125.0,
            show_default=True,
            help="TFLOP/s that a GPU sustains; the default is 40 % of an A100's peak in bfloat16.",
        ),
        click.option(
            "--rate",
            type=click.FloatRange(min=0),
            default=2.0,
            show_default=True,
            metavar="MONEY",
            help="Price of a GPU-hour.",
        ),
    ):
        function = option(function)
    return function


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add the run file argument and --set; the command gets `run`, a checked RunConfig."""

    @click.argument("config", metavar="CONFIG", required=False, type=click.Path(dir_okay=False))
    @click.option(
        "--config",
        "config_option",
        metavar="PATH",
        type=click.Path(dir_okay=False),
        help="Another way to give CONFIG, the run file.",
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a value of the run file, e.g. --set train.lr=2e-5.",
    )
    def command(
        config: str | None, config_option: str | None, overrides: tuple[str, ...], **options: Any
    ) -> None:
        set_up_logging()
        function(run=load_run(_one_run_file(config, config_option), overrides), **options)

    return _with_options_of(command, function)


def _one_run_file(argument: str | None, option: str | None) -> str:
    paths = [path for path in (argument, option) if path is not None]
    if len(paths) != 1:
        raise ConfigError(
            "two run files given" if paths else "no run file given",
            where="command line",
            expected="one, as CONFIG or as --config PATH",
            got=", ".join(paths) or None,
        )
    return paths[0]


def _source_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the run file's sources, for a shell that completes --source."""
    # An option that still lacks its value leaves the words unparsed.
    path = ctx.params.get("config") or ctx.params.get("config_option") or next(iter(ctx.args), None)
    try:
        sources = read_yaml(Path(str(path)), "run file").get("sources") if path else None
    except LogitfuseError:
        return []
    return [name for name in map(str, sources or ()) if name.startswith(incomplete)]


SOURCE_OPTION = click.option(
    "--source",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=_source_names,
    help="Only this source (may be repeated). Default: all.",
)


def work_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add --source, --worker, --shards, --limit and --dry-run; goes below `run_options`.

    The command gets `sources` (those named, or all of the run), `part` (which of their shards this
    process does) and `dry_run`.
    """

    @SOURCE_OPTION
    @click.option(
        "--worker",
        metavar="I/N",
        help="Every N-th shard, beginning with shard I (from 0). Default: from srun's tasks, Slurm's "
        "array task or an indexed job; else all shards.",
    )
    @click.option("--shards", metavar="A-B", help="Only these shards, such as 3-7 or 0-2,9.")
    @click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="At most N shards of each source in this run.",
    )
    @click.option(
        "--no-steal",
        is_flag=True,
        help="Keep to this worker's own shards. Default: once they are finished, go on with those that "
        "other workers have left, the last ones first.",
    )
    @click.option("--scheduler-fds", type=(int, int), hidden=True)
    @click.option("--dry-run", is_flag=True, help="Only check, and say what would be done.")
    def command(
        run: RunConfig,
        names: tuple[str, ...],
        worker: str | None,
        shards: str | None,
        limit: int | None,
        no_steal: bool,
        scheduler_fds: tuple[int, int] | None,
        **options: Any,
    ) -> None:
        named = None if shards is None else parse_shards(shards)
        part = Part(parse_worker(worker), named, limit, not no_steal, scheduler_fds)
        if worker is None and (step := step_task()).count > 1:
            click.echo(
                f"task {step.index} of {step.count} that srun started: worker {part.worker} of the "
                "shards (--worker 0/1 would do them all)",
                err=True,
            )
        function(run=run, sources=chosen_sources(run, names), part=part, **options)

    return _with_options_of(command, function)


def _with_options_of(
    command: Callable[..., None], function: Callable[..., None]
) -> Callable[..., None]:
    """`command` under the name of `function`, with the options of both."""
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(function, "__click_params__", []),
        *getattr(command, "__click_params__", []),
    ]
    return command


def set_up_logging() -> None:
    """Log warnings to stderr. The only place that installs handlers."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )


@contextmanager
def timed_stage(run: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    """Append a stage's seconds, peak memory and figures to logs/<stage>.jsonl, also when it fails.

    Yields a dict, to which the block may add figures.
    """
    from launch.summary import append_summary

    figures: dict[str, Any] = {}
    start = time.monotonic()
    try:
        yield figures
    except BaseException as error:
        figures["error"] = type(error).__name__
        raise
    finally:
        try:
            append_summary(run, stage, time.monotonic() - start, figures)
        except StorageError as refused:  # must not hide the stage's result or its own error
            logger.warning("%s", refused.line())
