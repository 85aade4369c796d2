"""A viewed segment as an HTML page, and as lines for a terminal.

The page is one file that loads no other; a content security policy allows only its own script, by
digest. All text is escaped, and characters that are invisible or change the text's direction are shown
by name. The text is there once for each source, cut where tokens of either side begin, with a coloured
band for each source token above it and for each target token below it.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from align.report.view import Span, Token, ViewedSegment, ViewedSource
from launch.pages.page import render, text_html
from launch.pages.parts import Tile
from launch.visible import JOINERS, quoted, visible
from store_schema.layout import Origin
from store_schema.store.segment_rows import ORIGINS, Row

# ------------------------------------------------------------------------------- the page


def page(view: ViewedSegment, position: int) -> str:
    """The page as HTML, opened at a target position."""
    segment = view.segment
    return render(
        "align.report",
        "view",
        title=visible(segment.segment_id),
        facts=[Tile(label, visible(value)) for label, value in facts(view)],
        sources=[_drawn(source, segment.text) for source in view.sources],
        data=_data(view, position),
    )


def facts(view: ViewedSegment) -> list[tuple[str, str]]:
    """Labels and values of the segment that are the same for all sources."""
    segment = view.segment
    return [
        ("domain", segment.domain),
        ("split", segment.split),
        ("row", f"{segment.index:,}"),
        ("shard", f"{view.shard:,}"),
        ("bytes", f"{len(segment.text.encode()):,}"),
        ("target tokens", f"{len(view.sources[0].positions):,}"),
    ]


def figures(source: ViewedSource) -> str:
    """The segment's figures of one source, in one line."""
    by_origin = ", ".join(f"{source.count(o):,} {o.name.lower()}" for o in reversed(Origin))
    line = (
        f"{len(source.tokens):,} source tokens, {len(source.positions):,} target positions "
        f"({by_origin}), {len(source.spans):,} spans"
    )
    bpb = source.bpb
    if bpb is None:
        return f"{line}; no byte with a known probability on both sides"
    return (
        f"{line}; aligned {bpb[0]:.3f} bits per byte, source {bpb[1]:.3f} "
        f"on the same {source.common_bytes:,} bytes"
    )


def _drawn(source: ViewedSource, text: str) -> dict[str, Any]:
    """What the template needs of a source."""
    sides = (
        _Side("source", "▾", source.tokens, source.source_names, _turns(source.tokens)),
        _Side("target", "▴", source.positions, source.target_names, _turns(source.positions)),
    )
    return {
        "name": source.name,
        "figures": figures(source),
        "pieces": [_drawn_piece(piece, sides) for piece in cut_text(text, source)],
    }


@dataclass(frozen=True, slots=True)
class _Side:
    """The tokens of one side as they are drawn.

    Args:
        name: "source" or "target".
        sign: Sign for a token without bytes.
        rows: The rows, one for each token.
        names: Tokens by id.
        turns: Colour of each token, 0 or 1.
    """

    name: str
    sign: str
    rows: Sequence[Row]
    names: Mapping[int, Token]
    turns: Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the text, of whole characters, in which no token of either side begins but at its
    start.

    Args:
        start: First byte.
        end: One past the last byte; equal to `start` for the piece after the text.
        text: Its characters.
        tokens: For source and target: (index, bytes in the piece) of each token that is in it.
        marks: For source and target: indices of tokens without bytes directly before it.
    """

    start: int
    end: int
    text: str
    tokens: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    marks: tuple[list[int], list[int]]


def cut_text(text: str, source: ViewedSource) -> list[Piece]:
    """Cut a text where tokens begin; a character with a token boundary inside is a piece of its own.

    Args:
        text: The segment's text.
        source: The segment's tokens and positions.

    Returns:
        Pieces that join to the text, and a last one without text for tokens after it.
    """
    sides = (source.tokens, source.positions)
    pieces = _whole_characters(text, {row.start for rows in sides for row in rows})
    starts = [piece.start for piece in pieces]
    for side, rows in enumerate(sides):
        for i, row in enumerate(rows):
            if row.start == row.end:
                pieces[bisect_left(starts, row.start)].marks[side].append(i)
                continue
            at = bisect_right(starts, row.start, hi=len(starts) - 1) - 1
            while pieces[at].text and pieces[at].start < row.end:
                piece = pieces[at]
                length = min(row.end, piece.end) - max(row.start, piece.start)
                piece.tokens[side].append((i, length))
                at += 1
    return pieces


def _whole_characters(text: str, cuts: Collection[int]) -> list[Piece]:
    """The text cut at byte offsets, but never inside a cluster (`clusters`)."""
    pieces: list[Piece] = []
    end, alone = 0, True
    for cluster in clusters(text):
        start, end = end, end + len(cluster.encode())
        split = any(byte in cuts for byte in range(start + 1, end))
        if alone or split or start in cuts:
            pieces.append(Piece(start, end, cluster, ([], []), ([], [])))
        else:
            pieces[-1] = replace(pieces[-1], end=end, text=pieces[-1].text + cluster)
        alone = split
    return [*pieces, Piece(end, end, "", ([], []), ([], []))]


def clusters(text: str) -> list[str]:
    """The text as grapheme clusters: characters with their combining marks, modifiers and joiners."""
    parts: list[str] = []
    for c in text:
        joins = bool(parts) and parts[-1][0].isprintable() and parts[-1][0] != " "
        if joins and _joins(parts[-1], c):
            parts[-1] += c
        else:
            parts.append(c)
    return parts


def _joins(before: str, c: str) -> bool:
    if unicodedata.category(c) in ("Mn", "Mc", "Me") or c in JOINERS:
        return True
    if "\U0001f3fb" <= c <= "\U0001f3ff":  # skin tones
        return True
    if "\U0001f1e6" <= c <= "\U0001f1ff":  # two letters make a flag
        return len(before) == 1 and "\U0001f1e6" <= before <= "\U0001f1ff"
    return before[-1] == "\u200d" and unicodedata.category(c) == "So"


def _drawn_piece(piece: Piece, sides: Sequence[_Side]) -> dict[str, Any]:
    """A piece as the template needs it, with its bands, and the marks of tokens without bytes."""
    marks = [
        {"side": s.name, "sign": s.sign, "index": i, "name": shown(s.names[s.rows[i].token_id])}
        for s, indices in zip(sides, piece.marks, strict=True)
        for i in indices
    ]
    if not piece.text:
        return {"marks": marks, "text": ""}
    # A combining mark without its base character is shown on a dotted circle.
    base = "\u25cc" if unicodedata.category(piece.text[0]) in ("Mn", "Mc", "Me") else ""
    classes, styles = ["p"], []
    for side, inside in zip(sides, piece.tokens, strict=True):
        letter = side.name[0]
        if len(inside) == 1:
            classes.append(f"{letter}{side.turns[inside[0][0]]}")
        else:
            styles.append(f"--{letter}i:{_stripes(side, inside)}")
    return {
        "marks": marks,
        "text": base + text_html(piece.text),
        "start": piece.start,
        "classes": " ".join(classes),
        "style": ";".join(styles),
    }


def _turns(rows: Sequence[Row]) -> list[int]:
    """Colour 0 or 1 of each token, alternating over tokens that have bytes."""
    return [(seen - 1) % 2 for seen in accumulate(int(row.end > row.start) for row in rows)]


def _stripes(side: _Side, inside: Sequence[tuple[int, int]]) -> str:
    """CSS of the band of a character that several tokens share, each with its part of the bytes."""
    total, done, stops = sum(length for _, length in inside), 0, []
    for index, length in inside:
        begin, done = 100 * done // total, done + length
        colour = f"var(--{side.name[0]}{side.turns[index]})"
        stops.append(f"{colour} {begin}% {100 * done // total}%")
    return f"linear-gradient(to right,{','.join(stops)})"


def _data(view: ViewedSegment, position: int) -> dict[str, Any]:
    """The data that the page's script shows, by source."""
    text = view.segment.text.encode()
    return {
        "position": position,
        "origins": [ORIGINS[origin] for origin in Origin],
        "sources": [
            {
                "name": source.name,
                "source": [_row(row) for row in source.tokens],
                "target": [_row(row) for row in source.positions],
                "origin": [int(origin) for origin in source.origins],
                "span": list(source.span_of),
                "spans": [_span(span, text) for span in source.spans],
                "names": [
                    {i: shown(token) for i, token in names.items()}
                    for names in (source.source_names, source.target_names)
                ],
            }
            for source in view.sources
        ],
    }


def _row(row: Row) -> list[Any]:
    return [
        row.start,
        row.end,
        row.token_id,
        _number(row.logprob),
        round(row.tail_mass, 6),
        [[token, max(round(logprob, 4), -999.0)] for token, logprob in row.entries],
        row.left_out,
        round(row.left_out_mass, 6),
    ]


def _span(span: Span, text: bytes) -> list[Any]:
    known = [_number(span.source_nats), _number(span.aligned_nats)]
    return [span.start, span.end, *known, quoted(text[span.start : span.end])]


def _number(nats: float | None) -> float | None:
    """None where not known; infinity, which JSON does not have, as a large number."""
    return None if nats is None else max(min(round(nats, 4), 9999.0), -9999.0)


def shown(token: Token) -> str:
    """A token as text: in quotes, a special one by its name without quotes."""
    return visible(token.written) if token.special else quoted(token.written)
