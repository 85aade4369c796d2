"""Text of unknown origin with invisible and control characters escaped, and tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence

JOINERS = "\u200c\u200d"
"""Invisible, but needed for Persian, Hindi and emoji."""


def visible(text: str | bytes, *, keep: str = "", backslash: str = "\\\\") -> str:
    r"""The text with characters that are not printable as Python's escapes: \n, \x00, \u202e.

    Args:
        text: Bytes are decoded as UTF-8; invalid ones become \xff.
        keep: Characters left as they are.
        backslash: Replaces a backslash of the text, so that escapes are unambiguous.
    """
    data = text if isinstance(text, bytes) else text.encode(errors="backslashreplace")
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode()
        for c in _decoded(data, backslash)
    )


def _decoded(data: bytes, backslash: str) -> str:
    """Decode UTF-8, with `backslash` for the text's backslashes, not for those of invalid bytes."""
    return backslash.join(part.decode(errors="backslashreplace") for part in data.split(b"\\"))


def width(text: str) -> int:
    """Number of terminal columns of printable text."""
    return sum(map(_width, text))


def _width(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    if "\u1160" <= character <= "\u11ff":  # vowels and finals join the consonant before them
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """Text in at most `columns` columns, with an ellipsis at the end if it was cut."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for character in text:
        used += _width(character)
        if used > columns - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def quoted(data: bytes) -> str:
    """A token escaped and in quotes, so that spaces are visible."""
    text = visible(data).replace('"', '\\"')
    # A combining mark would combine with the quote.
    if text and unicodedata.category(text[0]) in ("Mn", "Mc", "Me"):
        text = "\u25cc" + text
    return f'"{text}"'


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, left: Collection[int] = (0,)
) -> list[str]:
    """Lines of a table whose columns are as wide as they must be.

    Args:
        head: Titles of the columns.
        rows: Cells: text as it is, numbers with separators of thousands.
        left: Indices of columns that are left-aligned; the others are right-aligned.
    """
    lines = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    sides = [column in left for column in range(len(head))]
    return ["  ".join(map(_filled, line, widths, sides)).rstrip() for line in lines]


def _filled(cell: str, columns: int, left: bool) -> str:
    space = " " * (columns - width(cell))
    return cell + space if left else space + cell


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
