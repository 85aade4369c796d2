"""`logitfuse` in this process, as a user sees it."""

from __future__ import annotations

from collections.abc import Mapping

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
