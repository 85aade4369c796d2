"""The checks as a table of 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from first_run.doctor.check import Check
from launch.visible import cut, visible

COLUMNS = 80
_STATE, _NAME = 9, 15
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def check_lines(check: Check) -> list[str]:
    """A check as lines: its state, its name, what was found, and below it the remedy."""
    state = click.style(f"{check.state:{_STATE}}", fg=_COLOURS[check.state])
    name = cut(visible(check.name), _NAME - 1)
    first, *rest = _wrapped(check.found) or [""]
    lines = [f"{state}{name:{_NAME}}{first}", *(" " * (_STATE + _NAME) + line for line in rest)]
    if check.remedy is not None:
        head, *more = _wrapped(f"-> {check.remedy}")
        lines += [" " * (_STATE + _NAME) + line for line in (head, *(f"   {m}" for m in more))]
    return [line.rstrip() for line in lines]


def _wrapped(text: str) -> list[str]:
    width = COLUMNS - _STATE - _NAME - 3
    return textwrap.wrap(visible(text), width, break_long_words=False, break_on_hyphens=False)


def summary(checks: Sequence[Check]) -> str:
    """The last line: how many checks there were of each state."""
    counts = Counter(check.state for check in checks)
    said = {"error": "stages will be refused", "warning": "stages work, but see the remedies"}
    worst = next((said[state] for state in ("error", "warning") if counts[state]), "all is well")
    return f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors: {worst}"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """All checks for JSON."""
    counts = Counter(check.state for check in checks)
    states = {state: counts[state] for state in ("ok", "warning", "error")}
    return {"checks": [asdict(check) for check in checks], "states": states}
