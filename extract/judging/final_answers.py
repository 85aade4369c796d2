"""Find the final answer in a text, and compare two final answers. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from importlib import import_module

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_MINUS = "-\u2212"
_SIGN = r"(?:(?<![\w.)])[-+\u2212])?(?<![\w.])"
# A sign belongs to a number unless it stands between two: 5-3 ends in 3.
NUMBER = re.compile(rf"{_SIGN}{_DECIMAL}(?:\s*/\s*{_DIGITS})?")
_MIXED = re.compile(rf"{_SIGN}\d{{1,3}}[ \t]+(\d{{1,3}})[ \t]*/[ \t]*(\d{{1,3}})(?![\w/]|[.,]\d)")
_BRACES = re.compile(r"\\boxed\s*\{|(?<!\\)[{}]")
_MARK = re.compile(r"####[ \t]*([^\n]*)")
_STATED = re.compile(r"(?i)\banswer(?: is|:|=)[ \t]*([^\n]+)")
_FRACTION = re.compile(r"\\[dt]?frac(?:\s*\{([^{}]+)\}\s*\{([^{}]+)\}|\s*(\d)\s*(\d))")
_ONE_CHARACTER = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right)\b")
MAX_DIGITS = 400
"""Longer numbers are compared as words, since arithmetic on them could take too long."""
LEAST_CONTAINED = 8
"""Least characters of a reference that is searched in its prompt: shorter ones occur by chance."""


def final_answer(text: str, pattern: str | None = None) -> str | None:
    r"""The final answer in a text.

    Args:
        text: The whole text.
        pattern: Regular expression: the first group of its last match, or the whole match. None:
            the last \boxed{}, else the text after the last "####", else the last number.

    Returns:
        The final answer; None where there is none.
    """
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return None
        last = matches[-1]
        return ((last[1] if last.re.groups else last[0]) or "").strip() or None
    marked = _boxed(text) or _last(_MARK, text)
    if marked:
        return marked
    numbers = _numbers(_plain(text))
    return numbers[-1] if numbers else None


def stated_answer(text: str) -> str | None:
    r"""The answer that a text states in \boxed{}, or after "####", "answer is" or "answer:"."""
    return _boxed(text) or _last(_MARK, text) or _last(_STATED, text)


def contains_answer(prompt: str, reference: str) -> bool:
    """Whether a prompt contains its answer: the whole reference, or states its final answer."""
    needle, hay = _words(reference), _words(prompt)
    if len(needle) >= LEAST_CONTAINED and re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", hay):
        return True
    stated, expected = stated_answer(prompt), final_answer(reference)
    return stated is not None and expected is not None and same_answer(stated, expected)


def same_answer(actual: str, expected: str) -> bool:
    """Whether two final answers are the same: numbers by value, all else by words.

    A number with words ("42 apples") is the same as the number alone.
    """
    (one, alone), (other, other_alone) = _number(actual), _number(expected)
    if one is not None and other is not None and (alone or other_alone):
        return one == other
    return _words(actual) == _words(expected)


def same_formula(actual: str, expected: str) -> bool:
    """Whether two final answers are the same formula, by math-verify; two plain numbers, of which it
    misreads some (10 1/2), are compared by value."""
    (one, alone), (other, other_alone) = _number(actual), _number(expected)
    if alone and other_alone:
        return one == other
    module = import_module("math_verify")
    gold, answer = (module.parse(f"${text.strip('$ ')}$") for text in (expected, actual))
    return bool(gold and answer and module.verify(gold, answer))


def _boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{}, in linear time."""
    open_braces: list[int | None] = []
    last = (-1, -1)
    for match in _BRACES.finditer(text):
        if match[0].endswith("{"):
            open_braces.append(match.end() if len(match[0]) > 1 else None)
        elif open_braces:
            begin = open_braces.pop()
            if begin is not None:
                last = max(last, (begin, match.start()))
    return text[slice(*last)].strip() or None if last[0] >= 0 else None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = pattern.findall(text)
    return matches[-1].strip() or None if matches else None


def _number(text: str) -> tuple[Fraction | None, bool]:
    """The only number in a final answer (None for none or several), and whether it is the whole
    answer."""
    plain = _plain(text).strip(" \t\n$*%\\€£").rstrip(". ")
    numbers = _numbers(plain)
    if len(numbers) != 1:
        return None, False
    return _value(numbers[0]), numbers[0].strip() == plain


def _plain(text: str) -> str:
    """A text without commands of LaTeX around numbers, and with fractions as 1/2."""

    def fraction(found: re.Match[str]) -> str:
        return f" {found[1] or found[3]}/{found[2] or found[4]}"

    def one_character(found: re.Match[str]) -> str:
        return " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/")

    text = _FRACTION.sub(fraction, _LATEX_SPACE.sub("", text))
    return _ONE_CHARACTER.sub(one_character, _TEXT.sub(r" \1 ", text))


def _numbers(text: str) -> list[str]:
    """All numbers, in order; one such as 3 1/2 is one number."""
    found, end = [], 0
    for mixed in _MIXED.finditer(text):
        if int(mixed[1]) < int(mixed[2]):
            found += [*NUMBER.findall(text, end, mixed.start()), mixed[0]]
            end = mixed.end()
    return found + NUMBER.findall(text, end)


def _value(written: str) -> Fraction | None:
    if len(written) > MAX_DIGITS:
        return None
    mixed = _MIXED.fullmatch(written)
    if mixed is not None:
        whole = _value(written[: mixed.start(1)].rstrip())
        part = Fraction(int(mixed[1]), int(mixed[2]))
        return None if whole is None else whole + (part if written[0] not in _MINUS else -part)
    numerator, _, denominator = written.replace(",", "").replace("\u2212", "-").partition("/")
    try:
        value = Fraction(Decimal(numerator.strip()))
        return value / Fraction(Decimal(denominator.strip())) if denominator else value
    except (InvalidOperation, ZeroDivisionError):
        return None


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .$*")
