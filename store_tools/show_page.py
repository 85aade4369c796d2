"""A segment as an HTML page: its text, each token coloured by its probability, with the most probable
tokens below. An answer has no colours, since its probabilities are not stored.

The page is one file that loads nothing and runs nothing. All text is escaped; invisible characters and
those that would reorder the line are shown as escapes.
"""

from __future__ import annotations

import codecs
import math
from typing import Any

from markupsafe import Markup

from launch.pages.page import render, text_html
from launch.pages.parts import Tile
from launch.visible import JOINERS, quoted, visible
from store_schema.store.segment_rows import ORIGINS
from store_tools.show import Position, ShownSegment
from store_tools.show_text import ending, share

LEVELS = (0.5, 0.1, 0.02, 0.002, 0.0001)
"""Bounds of probability between the colours; less probable tokens have stronger colours."""

KEPT = JOINERS + "\u00a0\u202f\u3000"
INSIDE_CHARACTER = "◦"
"""Shown for a token that ends inside a character; the token that completes it shows the character."""
_INSIDE = Markup('<i class="e">{}</i>').format(INSIDE_CHARACTER)


def page(shown: ShownSegment) -> str:
    """The whole page."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    last = len(shown.positions) - 1
    turns = () if shown.answer is None else shown.answer.prompt  # read, never scored
    return render(
        "store_tools",
        "show",
        title=visible(shown.title),
        store=visible(f"{shown.store} · {shown.kind} store of {shown.source}"),
        facts=[Tile(label, visible(value)) for label, value in _facts(shown)],
        answer=shown.answer is not None,
        levels=LEVELS,
        prompt=[(visible(role), text_html(text, kept=KEPT, dots=False)) for role, text in turns],
        tokens=[
            _token(shown, position, decoder.decode(position.data, final=position.index == last))
            for position in shown.positions
        ],
        footer=_footer(shown),
    )


def _facts(shown: ShownSegment) -> list[tuple[str, str]]:
    facts = []
    if shown.segment is not None:
        facts = [("domain", shown.segment.domain), ("split", shown.segment.split)]
    if shown.answer is not None:
        facts += [("of answers", f"{shown.answer.count:,}"), ("ended", ending(shown.answer.finish))]
    facts += [
        ("row", f"{shown.row:,}"),
        ("bytes", f"{shown.num_bytes:,}"),
        ("positions", f"{len(shown.positions):,}"),
    ]
    if shown.answer is None:
        facts += [
            ("bits per byte", "–" if shown.bpb is None else f"{shown.bpb:.3f}"),
            ("kept mass", "–" if shown.kept_mass is None else f"{shown.kept_mass:.1%}"),
        ]
    return facts


def _footer(shown: ShownSegment) -> str:
    text = f"{INSIDE_CHARACTER} stands for a token that ends inside a character."
    if shown.answer is not None:
        return f"The prompt was read, not written. {text}"
    text = (
        "Row i is the distribution of token i, given the tokens before it. Tail: probability outside "
        f"the stored entries. {text}"
    )
    if shown.kind == "aligned":
        text += " Tokens are the target's, distributions the source's, converted."
    return text


def level(logprob: float | None) -> str:
    """Class of a token's colour."""
    if logprob is None:
        return "ku"
    return f"k{sum(math.exp(logprob) < bound for bound in LEVELS)}"


def _token(shown: ShownSegment, position: Position, text: str) -> dict[str, Any]:
    """Values of a token for the template.

    Args:
        shown: The segment.
        position: The token.
        text: The characters that it completes.
    """
    inside = bool(position.data) and not text
    facts = [f"{position.index + 1} of {len(shown.positions)}"]
    if shown.answer is not None:
        facts.append(f"id {position.token_id}")
    else:
        facts += _probability(position)
    if position.origin is not None:
        facts.append(ORIGINS[position.origin])
    facts += [
        f"after {quoted(branch.written)}: {quoted(branch.best[0].written)} "
        f"{share(branch.best[0].logprob)}"
        for branch in position.branches
        if branch.best
    ]
    return {
        "level": level(position.logprob) if shown.answer is None else "k0",
        "seen": _INSIDE if inside else text_html(text, kept=KEPT, dots=False),
        "name": visible(position.name),
        "quoted": quoted(position.data or position.name),
        "facts": facts,
        "best": [
            {
                "stands": item.token_id == position.token_id,
                "percent": f"{100 * math.exp(item.logprob):.0f}",
                "quoted": quoted(item.written),
                "share": share(item.logprob),
            }
            for item in position.best
        ],
    }


def _probability(position: Position) -> list[str]:
    tail = f"tail {position.tail_mass:.3f}"
    if position.logprob is None:
        return ["probability not known", tail]
    return [f"probability {share(position.logprob)}", f"{position.logprob:.3f} nats", tail]
