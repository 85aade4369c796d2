"""An explained segment as text for a terminal, and as one JSON object."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

from fuse_train.explain.positions import Position, TopToken
from fuse_train.explain.segment import Explained
from launch.quantities import share_text
from launch.visible import cut, quoted, table, visible, width

_TOKEN_COLUMNS = 18
_AHEAD = (("{+", "+}", "green"), ("[-", "-]", "red"))
"""Marks of tokens more probable under the pool than under the target, and the reverse."""


def as_json(explained: Explained) -> dict[str, Any]:
    """One object; `positions` has one array for each figure, with one element for each token."""
    rows = explained.positions
    segment = explained.segment
    return {
        "segment": segment.segment_id,
        "document": segment.document_id,
        "row": segment.index,
        "shard": explained.shard,
        "domain": segment.domain,
        "split": segment.split,
        "text": segment.text,
        "model": explained.model,
        "model_folder": explained.model_folder,
        "selector": explained.selector,
        "hindsight": explained.hindsight,
        "clm_weight": explained.clm_weight,
        "fusion_share": explained.fusion_share,
        "fusion_share_from": explained.share_from,
        "first_reading": explained.first_reading,
        "sources": list(explained.sources),
        "positions": {
            "token_ids": [p.token_id for p in rows],
            "tokens": [_plain(p.data) for p in rows],
            "byte_starts": [p.start for p in rows],
            "byte_ends": [p.end for p in rows],
            "begins_span": [p.begins for p in rows],
            "target_nats": [p.target_nats for p in rows],
            "pool_nats": [p.pool_nats for p in rows],
            "weights": [list(p.weights) for p in rows],
            "fusion_weights": [p.fusion_weight for p in rows],
            **_top_arrays("target", [p.target_top for p in rows]),
            **_top_arrays("pool", [p.pool_top for p in rows]),
        },
    }


def _top_arrays(name: str, top: Sequence[tuple[TopToken, ...]]) -> dict[str, list[list[Any]]]:
    return {
        f"{name}_top_ids": [[one.token_id for one in row] for row in top],
        f"{name}_top_tokens": [[_plain(one.data) for one in row] for row in top],
        f"{name}_top_probabilities": [[one.probability for one in row] for row in top],
    }


def _plain(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


# ------------------------------------------------------------------------------- for a terminal


def explained_text(explained: Explained, columns: int, *, top: int | None) -> str:
    """Heading, the text with the positions that are listed, and the list.

    Args:
        explained: The segment.
        columns: Width of the terminal in characters.
        top: List only so many positions, where target and pool differ most; None lists all, in order.
    """
    lines = [*_heading(explained), ""]
    listed: Sequence[Position] = explained.positions
    if top is not None:
        listed = explained.most_different(top)
        fused = sum(p.fused for p in explained.positions)
        lines += [
            marked_text(explained.segment.text, listed),
            "",
            f"the {len(listed)} of {fused} fused positions where target and pool differ most "
            "({+the pool is ahead+}, [-the target is ahead-]):",
        ]
    titles = ("pos", "token", "target", "pool", "ahead", "fusion")
    head, *figures = table(titles, map(_figures, listed), left=(1,))
    lines.append(f"{head}  weights")
    for line, position in zip(figures, listed, strict=True):
        lines += _position_lines(f"{line}  ", position, explained.sources, columns)
    lines += [
        "",
        "target, pool: NLL of the token, nats; ahead: target - pool; fusion: weight of the fusion loss",
        "there, the rest is ground truth; below, the most probable tokens, * is the text's own token",
    ]
    if any(not p.begins for p in listed):
        lines.append(
            "(inside): a source is inside one of its tokens, whose NLL is at its first byte"
        )
    return "\n".join(line.rstrip() for line in lines)


def _heading(explained: Explained) -> list[str]:
    segment = explained.segment
    size = len(segment.text.encode())
    known = [p for p in explained.positions if p.fused and p.ahead_nats is not None]
    hindsight = ", whose weights saw the labels (hindsight)" if explained.hindsight else ""
    weights = [p.fusion_weight for p in explained.positions if p.fused]
    lines = [
        f"segment {visible(segment.segment_id)} (row {segment.index}, shard {explained.shard}, domain "
        f"{visible(segment.domain)}, split {visible(segment.split)}): {size:,} bytes, "
        f"{len(explained.positions):,} positions, {sum(p.fused for p in explained.positions):,} fused",
        f"target: {visible(explained.model)}",
        f"pool: selector {visible(explained.selector)}{hindsight}, over {', '.join(explained.sources)}",
        f"fusion loss: mean weight {math.fsum(weights) / max(len(weights), 1):.3f} of at most "
        f"{1 - explained.clm_weight:g}; pool's weight in domain {visible(segment.domain)}: "
        f"{explained.fusion_share:.3f} ({visible(explained.share_from)})",
    ]
    if known:
        target, pool = (
            math.fsum(getattr(p, name) for p in known) / len(known)
            for name in ("target_nats", "pool_nats")
        )
        lines.append(
            f"mean NLL where both are known, nats a position: target {target:.3f}, pool {pool:.3f}"
        )
    return lines


def _figures(position: Position) -> list[str]:
    return [
        str(position.index),
        cut(quoted(position.data), _TOKEN_COLUMNS),
        _nats(position.target_nats),
        _nats(position.pool_nats),
        _nats(position.ahead_nats, "+"),
        f"{position.fusion_weight:.3f}",
    ]


def _position_lines(
    line: str, position: Position, sources: Sequence[str], columns: int
) -> list[str]:
    """The figures of a position, and below them what target and pool expected."""
    pairs = sorted(zip(position.weights, sources, strict=True), key=lambda pair: -pair[0])
    weights = "  ".join(f"{visible(name)} {weight:.2f}" for weight, name in pairs if weight > 0)
    if not position.begins:
        weights += "  (inside)"
    lines = [line + (cut(weights, max(columns - width(line), 24)) or "no source")]
    for name, top in (("target", position.target_top), ("pool", position.pool_top)):
        if top:
            lines.append(_top_line(name, top, position.token_id, columns))
    return lines


def _top_line(name: str, top: tuple[TopToken, ...], label: int, columns: int) -> str:
    line = f"        {name:<6}"
    room = max((columns - width(line)) // len(top) - 12, 8)
    for one in top:
        mark = "*" if one.token_id == label else " "
        line += f"  {mark}{cut(quoted(one.data), room)} {share_text(one.probability)}"
    return line


def _nats(nats: float | None, sign: str = "") -> str:
    return "-" if nats is None else f"{nats:{sign}.3f}"


def marked_text(text: str, positions: Iterable[Position]) -> str:
    """The text with some tokens marked; a character that a token has a part of is marked whole."""
    data, done, parts = text.encode(), 0, []
    for position in sorted(positions, key=lambda p: p.start):
        start, end = _whole_characters(data, position.start, position.end)
        if start < done or start == end:
            continue
        opened, closed, colour = _AHEAD[(position.ahead_nats or 0.0) < 0]
        parts += [
            visible(data[done:start], keep="\n\t", backslash="\\"),
            click.style(opened + visible(data[start:end], backslash="\\") + closed, fg=colour),
        ]
        done = end
    return "".join([*parts, visible(data[done:], keep="\n\t", backslash="\\")])


def _whole_characters(data: bytes, start: int, end: int) -> tuple[int, int]:
    """The bytes of the characters that a token has a part of."""
    while start and start < len(data) and data[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    return start, end
