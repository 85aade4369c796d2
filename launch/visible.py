"""Text of unknown origin made fit to be seen, with nothing hidden and nothing that a terminal or page
obeys, and tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence

JOINERS = "\u200c\u200d"
"""Invisible, but Persian, Hindi and emoji are not read right without them."""


def visible(text: str | bytes, *, keep: str = "", backslash: str = "\\\\") -> str:
    r"""What cannot be seen becomes an escape like Python's: \n, \x00, \u202e.

    Args:
        text: Bytes are read as UTF-8; those that are none become \xff.
        keep: Characters left as they are.
        backslash: What stands for a backslash of the text; doubled unless told otherwise.
    """
    data = text if isinstance(text, bytes) else text.encode(errors="backslashreplace")
    return "".join(
        c if c in keep or c.isprintable() else c.encode("unicode_escape").decode()
        for c in _decoded(data, backslash)
    )


def _decoded(data: bytes, backslash: str) -> str:
    """UTF-8, a backslash of the text told from one that stands for a broken byte."""
    return backslash.join(part.decode(errors="backslashreplace") for part in data.split(b"\\"))


def width(text: str) -> int:
    """Columns that a terminal gives to printable text."""
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
    """Text in at most `columns` columns, with an ellipsis where something was left out."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for character in text:
        used += _width(character)
        if used > columns - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def padded(text: str, columns: int) -> str:
    """Text cut or filled with spaces to exactly `columns` columns."""
    text = cut(text, columns)
    return text + " " * (columns - width(text))


def quoted(data: bytes) -> str:
    """A token as a terminal shows it: in quotes, so that spaces are seen."""
    text = visible(data).replace('"', '\\"')
    # A mark that joins the character before it would join the quote.
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
        left: Columns that stand to the left; the others stand to the right.
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
