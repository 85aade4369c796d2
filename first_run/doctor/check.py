"""One check of `logitfuse doctor`, and how a fault of the check itself becomes a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from store_schema.errors import LogitfuseError

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of a check.

    Args:
        name: What was looked at, in a word or two.
        state: ok; warning: it works, but worse than it could; error: a stage will be refused.
        found: What was found.
        remedy: What to do about it; None where there is nothing to do.
    """

    name: str
    state: State
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Check:
    """A check without a finding."""
    return Check(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Something that works worse than it could."""
    return Check(name, "warning", found, remedy)


def error(name: str, found: str, remedy: str) -> Check:
    """Something that a stage will refuse."""
    return Check(name, "error", found, remedy)


def refusal(name: str, fault: LogitfuseError, remedy: str) -> Check:
    """The check of what a stage refuses, with the stage's own message.

    Args:
        name: What was looked at.
        fault: The stage's error.
        remedy: What to do where the error has no hint.
    """
    hint, fault.hint = fault.hint, None
    line = fault.line()
    fault.hint = hint
    return error(name, line, hint or remedy)


def outcomes(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks that `look` gives; one that cannot be made is a warning, not the end.

    Args:
        name: What is looked at.
        look: Makes the checks.
    """
    try:
        yield from look()
    except LogitfuseError as fault:
        yield refusal(name, fault, "see the message")
    except Exception as fault:  # drivers and libraries may raise anything
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
        yield warning(name, f"could not be looked at: {reason}", "look at it by hand")
