"""A segment, or a list of them, for a terminal."""

from __future__ import annotations

import math

import click

from launch.quantities import share_text
from launch.visible import cut, padded, quoted, visible, width
from store_schema.layout import Finish
from store_tools.show import Listed, Position, ShownAnswer, ShownSegment

_TOKEN_COLUMNS = 20
_GAP = "  "


def share(logprob: float) -> str:
    """A probability, from its logarithm, as short text."""
    return share_text(math.exp(logprob))


def heading(shown: ShownSegment) -> str:
    """Names and figures of the segment, in one line."""
    segment = shown.segment
    facts = [f"row {shown.row}", f"shard {shown.shard}"]
    if segment is not None:
        facts += [f"domain {visible(segment.domain)}", f"split {visible(segment.split)}"]
    if shown.answer is not None:
        facts.append(f"{shown.answer.count} answers, this one ended: {ending(shown.answer.finish)}")
    size = f"{shown.num_bytes} bytes, {len(shown.positions)} positions"
    if shown.answer is None:
        bpb = "no label known" if shown.bpb is None else f"{shown.bpb:.3f} bits per byte"
        size = f"{size}, {bpb}"
    return f"{visible(shown.store)}, segment {visible(shown.title)} ({', '.join(facts)}): {size}"


def ending(finish: Finish) -> str:
    """How an answer ended, in words."""
    return finish.name.lower().replace("_", " ")


def _prompt_lines(answer: ShownAnswer) -> list[str]:
    """The prompt in grey."""
    lines = []
    for role, text in answer.prompt:
        first, *rest = map(visible, text.split("\n"))
        lines += [f"{visible(role)}: {first}", *(f"  {line}" for line in rest)]
    return [click.style(line, fg="bright_black") for line in lines] + [""] * bool(lines)


def segment_text(shown: ShownSegment, columns: int) -> str:
    """The segment as a table, a row for each position, for a terminal of `columns` columns."""
    tokens = [quoted(position.data or position.name) for position in shown.positions]
    token_columns = min(max(map(width, [*tokens, "token"])), _TOKEN_COLUMNS)
    if shown.answer is not None:
        lines = [heading(shown), "", *_prompt_lines(shown.answer)]
        lines.append(f"{'':>5} {padded('token', token_columns)} {'id':>8}")
        for position, token in zip(shown.positions, tokens, strict=True):
            begun = f"{position.index:>5} {padded(token, token_columns)}"
            lines.append(f"{begun} {position.token_id:>8}")
        return "\n".join(lines)
    head = f"{'':>5} {padded('token', token_columns)} {'nats':>8} {'prob':>7} {'tail':>6}"
    if shown.kind == "aligned":
        head += f" {'origin':<8}"
    room = max(columns - width(head) - len(_GAP), 24)
    lines = [heading(shown), ""]
    lines.append(f"{head}{_GAP}most probable, * is the text's own token")
    for position, token in zip(shown.positions, tokens, strict=True):
        label = position.logprob
        known = f"{'-':>8} {'-':>7}" if label is None else f"{label:>8.3f} {share(label):>7}"
        line = f"{position.index:>5} {padded(token, token_columns)} {known}"
        line += f" {position.tail_mass:>6.3f}"
        if position.origin is not None:
            line += f" {position.origin.name.lower():<8}"
        best = _wrapped(position, room)
        lines.append(f"{line}{_GAP}{best[0]}")
        lines += [f"{'':<{width(head)}}{_GAP}{more}" for more in best[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(position: Position, room: int) -> list[str]:
    """The most probable tokens in lines of at most `room` columns."""
    if not position.best:
        return ["nothing known"]
    lines: list[str] = []
    for item in position.best:
        mark = "*" if item.token_id == position.token_id else ""
        text = f"{mark}{cut(quoted(item.written), room - 8)} {share(item.logprob)}"
        if lines and width(lines[-1]) + len(_GAP) + width(text) <= room:
            lines[-1] += _GAP + text
        else:
            lines.append(text)
    return lines


def list_text(listed: list[Listed], columns: int) -> str:
    """Segments or answers to choose from, one per line."""
    lines = ["first segments; give --segment one of these ids or rows:"]
    if listed and listed[0].answer is not None:
        lines = ["first answers; give --segment one of these ids or rows, and --answer its number:"]
    for item in listed:
        name, domain = "", ""
        if item.segment is not None:
            name, domain = visible(item.segment.segment_id), visible(item.segment.domain)
        begun = f"{item.row:>7}  {padded(name, 28)} {padded(domain, 12)} {len(item.text):>7} B  "
        if item.answer is not None:
            begun += f"{item.answer.number:>4} {ending(item.answer.finish):<16}"
        lines.append(begun + cut(visible(item.text[:400]), max(columns - width(begun), 20)))
    return "\n".join(lines)
