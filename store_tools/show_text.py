"""A segment, or a list of them, for a terminal and for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import click

from launch.quantities import share_text
from launch.visible import cut, quoted, table, visible, width
from store_schema.layout import Finish
from store_tools.show import Expected, Listed, Position, ShownAnswer, ShownSegment

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
    if shown.answer is not None:
        rows = [[*_token(position), str(position.token_id)] for position in shown.positions]
        lines = table(("", "token", "id"), rows, left=(1,))
        return "\n".join([heading(shown), "", *_prompt_lines(shown.answer), *lines])
    titles = ["", "token", "nats", "prob", "tail", *["origin"] * (shown.kind == "aligned")]
    head, *figures = table(titles, map(_figures, shown.positions), left=(1, 5))
    room = max(columns - max(map(width, [head, *figures])) - len(_GAP), 24)
    beside = [
        row
        for line, position in zip(figures, shown.positions, strict=True)
        for row in zip_longest([line], _wrapped(position, room), fillvalue="")
    ]
    lines = table((head, "most probable, * is the text's own token"), beside, left=(0, 1))
    return "\n".join([heading(shown), "", *lines])


def _token(position: Position) -> list[str]:
    return [str(position.index), cut(quoted(position.data or position.name), _TOKEN_COLUMNS)]


def _figures(position: Position) -> list[str]:
    label = position.logprob
    known = ["-", "-"] if label is None else [f"{label:.3f}", share(label)]
    origin = [] if position.origin is None else [position.origin.name.lower()]
    return [*_token(position), *known, f"{position.tail_mass:.3f}", *origin]


def _wrapped(position: Position, room: int) -> list[str]:
    """The most probable tokens, and those after branches, in lines of at most `room` columns."""
    if not position.best:
        return ["nothing known"]
    lines = _in_lines(position.best, position.token_id, room)
    for branch in position.branches:
        after = f"after {cut(quoted(branch.written), room // 2)}: "
        best = _in_lines(branch.best, None, max(room - width(after), 16)) or ["nothing known"]
        lines += [after + best[0], *(" " * width(after) + line for line in best[1:])]
    return lines


def _in_lines(best: Sequence[Expected], own: int | None, room: int) -> list[str]:
    """Tokens and probabilities in lines of at most `room` columns; `own` is marked."""
    lines: list[str] = []
    for item in best:
        mark = "*" if item.token_id == own else ""
        text = f"{mark}{cut(quoted(item.written), room - 8)} {share(item.logprob)}"
        if lines and width(lines[-1]) + len(_GAP) + width(text) <= room:
            lines[-1] += _GAP + text
        else:
            lines.append(text)
    return lines


def list_text(listed: list[Listed], columns: int) -> str:
    """Segments or answers to choose from, one per line."""
    first = "first segments; give --segment one of these ids or rows:"
    titles = ["row", "segment", "domain", "bytes"]
    if listed and listed[0].answer is not None:
        first = "first answers; give --segment one of these ids or rows, and --answer its number:"
        titles += ["answer", "ended"]
    rows = []
    for item in listed:
        row = [str(item.row), "", "", str(len(item.text))]
        if item.segment is not None:
            row[1] = cut(visible(item.segment.segment_id), 28)
            row[2] = cut(visible(item.segment.domain), 12)
        if item.answer is not None:
            row += [str(item.answer.number), ending(item.answer.finish)]
        rows.append(row)
    head, *figures = table(titles, rows, left=(1, 2, 5))
    room = max(columns - max(map(width, [head, *figures])) - len(_GAP), 20)
    texts = [cut(visible(item.text[:400]), room) for item in listed]
    return "\n".join([first, *table((head, "text"), zip(figures, texts, strict=True), left=(0, 1))])


def shown_object(shown: ShownSegment) -> dict[str, Any]:
    """The segment for JSON; bytes that are not UTF-8 are escaped, natural logarithms are in nats."""
    segment, answer = shown.segment, shown.answer
    content: dict[str, Any] = {"store": shown.store, "kind": shown.kind, "source": shown.source}
    content |= {"row": shown.row, "shard": shown.shard, "bytes": shown.num_bytes, "bpb": shown.bpb}
    if segment is not None:
        content["segment"] = segment.segment_id
        content |= {"domain": segment.domain, "split": segment.split}
    if answer is not None:
        prompt = [{"role": role, "content": text} for role, text in answer.prompt]
        content["answer"] = {"number": answer.number, "count": answer.count}
        content["answer"] |= {"ended": ending(answer.finish), "prompt": prompt}
    return content | {
        "positions": [_position_object(p, is_answer=answer is not None) for p in shown.positions]
    }


def _position_object(position: Position, *, is_answer: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "token_id": position.token_id,
        "token": _plain(position.data or position.name),
    }
    if not is_answer:
        content |= {"logprob": position.logprob, "tail_mass": position.tail_mass}
        content["best"] = [_expected_object(item) for item in position.best]
    if position.origin is not None:
        content["origin"] = position.origin.name.lower()
    if position.branches:
        content["branches"] = [
            {
                "after": _plain(branch.written),
                "tail_mass": branch.tail_mass,
                "best": [_expected_object(item) for item in branch.best],
            }
            for branch in position.branches
        ]
    return content


def _expected_object(item: Expected) -> dict[str, Any]:
    return {"token_id": item.token_id, "token": _plain(item.written), "logprob": item.logprob}


def _plain(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def listed_object(item: Listed) -> dict[str, Any]:
    """A segment or answer to choose from, for JSON."""
    content: dict[str, Any] = {"row": item.row, "bytes": len(item.text), "text": _plain(item.text)}
    if item.segment is not None:
        content["segment"] = item.segment.segment_id
        content |= {"domain": item.segment.domain, "split": item.segment.split}
    if item.answer is not None:
        content |= {"answer": item.answer.number, "ended": ending(item.answer.finish)}
    return content
