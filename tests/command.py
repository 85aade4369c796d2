"""`logitfuse` in this process, as a user sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import click
from click.testing import CliRunner, Result

from logitfuse import main


def call(*words: object, env: Mapping[str, str] | None = None) -> Result:
    """What a command does: ("extract", "plan", path) and so on."""
    result = CliRunner(env=env).invoke(main, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


def ok(*words: object, env: Mapping[str, str] | None = None) -> str:
    """Output of a command that must succeed."""
    result = call(*words, env=env)
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.stdout


def refused(*words: object) -> str:
    """The error line of a command that must fail."""
    return error_line(call(*words))


def error_line(result: Result) -> str:
    """The one error line, last on stderr, of a command that failed with exit code 2."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    return lines[-1]


def all_commands() -> dict[str, click.Context]:
    """A context for each group and command that is not hidden, by its words: "", "extract", "extract
    plan" and so on."""
    return dict(_inside(click.Context(main, info_name="logitfuse"), ()))


def _inside(context: click.Context, words: tuple[str, ...]) -> Iterator[tuple[str, click.Context]]:
    yield " ".join(words), context
    group = context.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if not command.hidden:
            inner = click.Context(command, info_name=name, parent=context)
            yield from _inside(inner, (*words, name))


def is_table(line: str) -> bool:
    """Whether a line has columns; a sentence is wrapped by the terminal."""
    return len(re.findall(r"\S {2,}\S", line)) > 1
