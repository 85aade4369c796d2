"""A segment as a page: its text, each token coloured by its probability, what was expected below. Of an
answer its tokens, whose probabilities are not kept.

The page is one file that loads nothing and runs nothing; every byte of text is escaped, and what
cannot be seen or would reorder the line is written out.
"""

from __future__ import annotations

import codecs
import math
from html import escape
from importlib.resources import files
from string import Template

from launch.visible import JOINERS, quoted, visible
from store_schema.layout import Origin
from store_tools.show import Position, ShownSegment
from store_tools.show_text import ending, share

LEVELS = (0.5, 0.1, 0.02, 0.002, 0.0001)
"""A token is coloured the stronger the fewer of these its probability reaches."""

SEEN = {"\n": "↵", "\t": "→", "\r": "␍"}
"""White space that is marked; the first two keep their effect, too."""

KEPT = JOINERS + "\u00a0\u202f\u3000"
INSIDE_CHARACTER = "◦"
"""Stands for a token that ends inside a character; the token that ends it shows it."""

ORIGINS = {
    Origin.NONE: "nothing known here",
    Origin.BOUNDARY: "starts where a source token starts",
    Origin.INSIDE: "starts inside a source token",
}


def page(shown: ShownSegment) -> str:
    """The whole page."""
    folder = files("store_tools")
    template = Template(folder.joinpath("show.html").read_text(encoding="utf-8"))
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    last = len(shown.positions) - 1
    tokens = [
        _token(shown, position, decoder.decode(position.data, final=position.index == last))
        for position in shown.positions
    ]
    return template.substitute(
        title=escape(visible(shown.title)),
        store=escape(visible(f"{shown.store} · {shown.kind} store of {shown.source}")),
        css=folder.joinpath("show.css").read_text(encoding="utf-8"),
        tiles="".join(_tile(label, value) for label, value in _facts(shown)),
        help=_help(shown),
        legend="" if shown.answer is not None else _legend(),
        prompt=_prompt(shown),
        text="".join(tokens),
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


def _prompt(shown: ShownSegment) -> str:
    """What stands before an answer: read, never scored."""
    turns = () if shown.answer is None else shown.answer.prompt
    return "".join(
        f'<div class="text prompt" dir="auto" lang="und"><b>{escape(visible(role))}</b>\n'
        f"{_escaped(text)}</div>"
        for role, text in turns
    )


def _tile(label: str, value: str) -> str:
    return f"<div><dt>{label}</dt><dd>{escape(visible(value))}</dd></div>"


def _help(shown: ShownSegment) -> str:
    what = "what the model expected there is" if shown.answer is None else "its bytes and id are"
    return f"Point at a token, tap it or reach it with Tab: {what} shown at the bottom."


def _legend() -> str:
    names = [f"≥ {100 * bound:g}%" for bound in LEVELS]
    keys = [f'<span class="k{i}">{name}</span>' for i, name in enumerate(names)]
    keys.append(f'<span class="k{len(LEVELS)}">less</span><span class="ku">not known</span>')
    return (
        '<div class="legend" aria-label="Colours: probability of the token that stands there">\n'
        '<span class="soft">probability of the token</span>\n'
        f'<span class="keys">{"".join(keys)}</span>\n</div>\n'
    )


def _footer(shown: ShownSegment) -> str:
    text = f"{INSIDE_CHARACTER} stands for a token that ends inside a character."
    if shown.answer is not None:
        return f"The prompt was read, not written. {text}"
    text = (
        "Row i is the distribution of token i, given the tokens before it. Tail: probability outside "
        f"the stored entries. {text}"
    )
    if shown.kind == "aligned":
        text += " Tokens are the target's, distributions the source's, carried over."
    return text


def level(logprob: float | None) -> str:
    """Class of a token's colour."""
    if logprob is None:
        return "ku"
    return f"k{sum(math.exp(logprob) < bound for bound in LEVELS)}"


def _token(shown: ShownSegment, position: Position, text: str) -> str:
    """One token with its panel.

    Args:
        shown: The segment.
        position: The token.
        text: The characters that it completes.
    """
    seen = _escaped(text) if text or not position.data else f'<i class="e">{INSIDE_CHARACTER}</i>'
    if position.name:
        seen += f'<i class="e">{escape(visible(position.name))}</i>'
    kind = level(position.logprob) if shown.answer is None else "k0"
    return f'<span class="t {kind}" tabindex="0">{seen}{_panel(shown, position)}</span>'


def _escaped(text: str) -> str:
    parts = []
    for character in text:
        if character in SEEN:
            effect = "" if character == "\r" else character
            parts.append(f'<i class="e">{SEEN[character]}</i>{effect}')
        elif character in KEPT or character.isprintable():
            parts.append(escape(character))
        else:
            parts.append(f'<i class="e">{visible(character)}</i>')
    return "".join(parts)


def _probability(position: Position) -> list[str]:
    tail = f"tail {position.tail_mass:.3f}"
    if position.logprob is None:
        return ["probability not known", tail]
    return [f"probability {share(position.logprob)}", f"{position.logprob:.3f} nats", tail]


def _panel(shown: ShownSegment, position: Position) -> str:
    facts = [f"{position.index + 1} of {len(shown.positions)}"]
    if shown.answer is not None:
        facts.append(f"id {position.token_id}")
    else:
        facts += _probability(position)
    if position.origin is not None:
        facts.append(ORIGINS[position.origin])
    rows = []
    for item in position.best:
        stands = " l" if item.token_id == position.token_id else ""
        columns = f"{100 * math.exp(item.logprob):.0f}%"
        rows.append(
            f'<span class="r{stands}" style="--w:{columns}"><bdi>{escape(quoted(item.written))}</bdi>'
            f"<span>{escape(share(item.logprob))}</span></span>"
        )
    return (
        f'<span class="x"><b><bdi>{escape(quoted(position.data or position.name))}</bdi></b>'
        f'<span class="n">{escape(" · ".join(facts))}</span>{"".join(rows)}</span>'
    )
