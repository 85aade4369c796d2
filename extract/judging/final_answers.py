"""The final answer in a text, and whether two of them are the same. Pure functions."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from importlib import import_module

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
# A sign belongs to a number unless it stands between two: 5-3 ends in 3.
NUMBER = re.compile(rf"(?:(?<![\w.)])[-+\u2212])?(?<![\w.]){_DECIMAL}(?:\s*/\s*{_DIGITS})?")
_BRACES = re.compile(r"\\boxed\s*\{|(?<!\\)[{}]")
_MARK = re.compile(r"####[ \t]*([^\n]*)")
_SAID = re.compile(r"(?i)\banswer(?: is|:|=)[ \t]*([^\n]+)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right)\b")
MAX_DIGITS = 400
"""Longer numbers are compared as words: arithmetic on what a model wrote must end."""
LEAST_HELD = 8
"""Characters of a reference that is looked for in its prompt: shorter ones stand there by chance."""


def final_answer(text: str, pattern: str | None = None) -> str | None:
    r"""What a text gives as its final answer.

    Args:
        text: All of it.
        pattern: Regular expression: the first group of its last match, or the whole match. None:
            the last \boxed{}, else behind the last "####", else the last number.

    Returns:
        None where there is none.
    """
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        last = found[-1]
        return ((last[1] if last.re.groups else last[0]) or "").strip() or None
    marked = _boxed(text) or _last(_MARK, text)
    if marked:
        return marked
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def stated_answer(text: str) -> str | None:
    r"""What a text calls its answer: in \boxed{}, behind "####", or behind "answer is" or "answer:"."""
    return _boxed(text) or _last(_MARK, text) or _last(_SAID, text)


def holds_answer(prompt: str, reference: str) -> bool:
    """Whether a prompt holds its answer: the whole reference, or its final answer called an answer."""
    needle, hay = _words(reference), _words(prompt)
    if len(needle) >= LEAST_HELD and re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", hay):
        return True
    stated, expected = stated_answer(prompt), final_answer(reference)
    return stated is not None and expected is not None and same_answer(stated, expected)


def same_answer(given: str, expected: str) -> bool:
    """Whether two final answers are the same: numbers by value, all else by its words.

    A number beside words ("42 apples") is the same as the number alone.
    """
    (one, alone), (other, other_alone) = _number(given), _number(expected)
    if one is not None and other is not None and (alone or other_alone):
        return one == other
    return _words(given) == _words(expected)


def same_formula(given: str, expected: str) -> bool:
    """Whether math-verify holds two final answers for the same formula."""
    module = import_module("math_verify")
    gold, answer = (module.parse(f"${text.strip('$ ')}$") for text in (expected, given))
    return bool(gold and answer and module.verify(gold, answer))


def _boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} that is closed. Read once: a model may repeat itself."""
    open_braces: list[int | None] = []
    last = (-1, -1)
    for found in _BRACES.finditer(text):
        if found[0].endswith("{"):
            open_braces.append(found.end() if len(found[0]) > 1 else None)
        elif open_braces:
            begin = open_braces.pop()
            if begin is not None:
                last = max(last, (begin, found.start()))
    return text[slice(*last)].strip() or None if last[0] >= 0 else None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].strip() or None if found else None


def _number(text: str) -> tuple[Fraction | None, bool]:
    """The one number in a final answer, and whether nothing else is said; None where there is none or
    several."""
    plain = _TEXT.sub(r" \1 ", _FRACTION.sub(r"\1/\2", _LATEX_SPACE.sub("", text)))
    plain = plain.strip(" \t\n$*%\\€£").rstrip(". ")
    found = NUMBER.findall(plain)
    if len(found) != 1:
        return None, False
    return _value(found[0]), found[0].strip() == plain


def _value(written: str) -> Fraction | None:
    if len(written) > MAX_DIGITS:
        return None
    numerator, _, denominator = written.replace(",", "").replace("\u2212", "-").partition("/")
    try:
        value = Fraction(Decimal(numerator.strip()))
        return value / Fraction(Decimal(denominator.strip())) if denominator else value
    except (InvalidOperation, ZeroDivisionError):
        return None


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .$*")
