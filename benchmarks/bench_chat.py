"""`make bench-chat`: are chat data and chat models read as they are?

Published shapes of chats are read and compared with what they must give (tests/chat_shapes.py);
responses are looked for in what real chat templates write, by us and once more by plain transformers
(chat_spans.py); every field known from published data is followed to a model or to a count
(chat_fields.py). Templates are those of published tokenizers (`python tests/published_tokenizers.py`
fetches them), of the models of examples/real.yaml and examples/chat.yaml whose files lie unpacked in
the cache, and shapes of template in words (tests/chat_templates.py). How answers end is read from what
`make example-chat` left behind; cases are folders with a `run.sh` that prints `FAULT: ...` for each
thing that is wrong, given with --cases.

    python -m benchmarks.bench_chat --part shapes --part fields     # some parts alone

The last line is one JSON object.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click

from benchmarks.case_scripts import without_fault
from benchmarks.chat_corpus import shapes_read
from benchmarks.chat_fields import lost_silently
from benchmarks.chat_models import (
    ChatModel,
    in_words,
    of_run_files,
    opened,
    published,
)
from benchmarks.chat_spans import (
    Judged,
    Sharing,
    templates_proved,
    whole_over_turns,
)
from tests.published_tokenizers import PACKAGES

ROOT = Path(__file__).resolve().parent.parent

ANSWERS = ROOT / "runs" / "chat" / "answers.json"
GOALS: dict[str, tuple[str, float]] = {
    "shapes_read": (">=", 20),
    "templates wrong": ("<=", 0),
    "whole_over_turns": ("<=", 0.4),
    "ends_turn": (">=", 0.95),
    "lost_silently": ("<=", 0),
    "cases with a fault": ("<=", 0),
}
Figures = dict[str, Any]


@cache
def real_models() -> tuple[list[ChatModel], list[str]]:
    """Models with real templates on this machine, and the names of those without a template."""
    refs = {**dict(published()), **dict(of_run_files())}
    absent = [name for name in PACKAGES if name not in refs]
    if absent:
        print(
            f"published tokenizers that are not here: {', '.join(absent)} "
            "(python tests/published_tokenizers.py fetches them)"
        )
    models, without = opened(refs)
    if without:
        print(f"without a chat template: {', '.join(without)}")
    return models, without


def shapes() -> Figures:
    """Published shapes that are read right."""
    found = shapes_read()
    wrong = {name: fault for name, fault in found.items() if fault}
    print(f"shapes read: {', '.join(name for name, fault in found.items() if not fault)}")
    return {"shapes_read": len(found) - len(wrong), "shapes_wrong": wrong}


def templates() -> Figures:
    """Templates whose responses are where we say, or refused."""
    models, without = real_models()
    found = templates_proved([*models, *in_words()])
    print(proofs_table(found))
    return {"templates_proved": proofs(found) | {"without_template": without}}


def proofs(found: Mapping[str, Mapping[str, Judged]]) -> Figures:
    """Figures of what `templates_proved` gives."""
    right = {name: sum(j.right for j in chats.values()) for name, chats in found.items()}
    wrong = [
        f"{name}: {fault}"
        for name, chats in found.items()
        for judged in chats.values()
        for fault in judged.faults
    ]
    sound = {name for name, chats in found.items() if not any(j.faults for j in chats.values())}
    return {
        "proved": sum(number > 0 and name in sound for name, number in right.items()),
        "responses": sum(right.values()),
        "refused": {
            f"{name}: {chat}": judged.refused
            for name, chats in found.items()
            for chat, judged in chats.items()
            if judged.refused
        },
        "wrong": wrong,
    }


def proofs_table(found: Mapping[str, Mapping[str, Judged]]) -> str:
    """Templates by chats, for people: responses proved, `-` refused, `!` wrong."""
    chats = list(dict.fromkeys(chat for by_chat in found.values() for chat in by_chat))
    lines = [f"{i} {chat}" for i, chat in enumerate(chats)]
    lines.append(
        f"\n{'responses proved of chat':<40}" + "".join(f"{i:>4}" for i in range(len(chats)))
    )
    for name, by_chat in found.items():
        cells = [_cell(by_chat[chat]) if chat in by_chat else "" for chat in chats]
        lines.append(f"{name:<40}" + "".join(f"{cell:>4}" for cell in cells))
    return "\n".join(lines)


def _cell(judged: Judged) -> str:
    return f"{judged.right or ''}{'-' * bool(judged.refused)}{'!' * bool(judged.faults)}"


def long_chats() -> Figures:
    """Tokens that are fed for chats of six turns, together over turn by turn."""
    found = whole_over_turns(real_models()[0])
    for name, sharing in found.items():
        said = "  (writes earlier turns otherwise later)" if sharing.rewrites else ""
        print(f"{name:<40}{sharing.ratio:>8.3f}{said}")
    return {"whole_over_turns": sharing_figures(found)}


def sharing_figures(found: Mapping[str, Sharing]) -> Figures:
    """Ratios by template, and the largest of those that leave earlier turns as they are."""
    kept = [sharing.ratio for sharing in found.values() if not sharing.rewrites]
    return {
        "max": max(kept, default=None),
        "templates": {name: sharing.ratio for name, sharing in found.items()},
        "rewrites_history": [name for name, sharing in found.items() if sharing.rewrites],
    }


def ends(answers: Path) -> Figures:
    """Share of held-out answers that end by themselves, by model; None before `make example-chat`."""
    if not answers.is_file():
        print(f"how answers end is not known: {answers} is not there (make example-chat)")
        return {"ends_turn": None}
    found = json.loads(answers.read_text(encoding="utf-8"))
    return {"ends_turn": {name: item["ended"] / item["asked"] for name, item in found.items()}}


def fields() -> Figures:
    """Fields that are lost without a word."""
    models, _ = real_models()
    lost, number = lost_silently({model.name: model.ours.chat for model in models})
    for field, where in lost.items():
        print(f"lost: {field}, by {where}")
    return {"lost_silently": len(lost), "lost": lost, "fields": number}


def cases_of(folder: Path | None) -> Figures:
    """Whether each case is without a fault; None where no folder was given."""
    return {"cases": None if folder is None else without_fault(folder)}


def goals(found: Mapping[str, Any]) -> list[tuple[str, str, float | None, bool | None]]:
    """Every figure with a goal: name, goal, what was seen, and whether it is met (None: not known)."""
    seen: dict[str, float | None] = {}
    for name in ("shapes_read", "lost_silently"):
        seen[name] = found.get(name)
    seen["templates wrong"] = _of(found, "templates_proved", lambda part: len(part["wrong"]))
    seen["whole_over_turns"] = _of(found, "whole_over_turns", lambda part: part["max"])
    seen["ends_turn"] = _of(found, "ends_turn", lambda part: part["fused"])
    seen["cases with a fault"] = _of(found, "cases", lambda part: list(part.values()).count(False))
    rows = []
    for name, (sign, goal) in GOALS.items():
        value = seen[name]
        met = None if value is None else value >= goal if sign == ">=" else value <= goal
        rows.append((name, f"{sign} {goal:g}", value, met))
    return rows


def _of(found: Mapping[str, Any], name: str, figure: Callable[[Any], Any]) -> Any:
    part = found.get(name)
    return None if part is None else figure(part)


def goals_table(rows: Sequence[tuple[str, str, float | None, bool | None]]) -> str:
    """The same for people."""
    words = {True: "met", False: "missed", None: "not known"}
    lines = [f"{'figure':<24}{'goal':>8}  {'seen':>8}"]
    for name, goal, value, met in rows:
        shown = "" if value is None else f"{value:.4g}"
        lines.append(f"{name:<24}{goal:>8}  {shown:>8}  {words[met]}")
    return "\n".join(lines)


@click.command(help="Measure all parts.")
@click.option("--cases", type=click.Path(exists=True, path_type=Path), help="Folder of cases.")
@click.option("--answers", type=click.Path(path_type=Path), default=ANSWERS, show_default=True)
@click.option("--part", "parts", multiple=True, help="Only these parts.")
def main(cases: Path | None, answers: Path, parts: tuple[str, ...]) -> None:
    """Entry point."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    measures: dict[str, Callable[[], Figures]] = {
        "shapes": shapes,
        "templates": templates,
        "long": long_chats,
        "ends": lambda: ends(answers),
        "fields": fields,
        "cases": lambda: cases_of(cases),
    }
    unknown = set(parts) - set(measures)
    if unknown:
        raise click.UsageError(
            f"no part {', '.join(sorted(unknown))}: there are {', '.join(measures)}"
        )
    found: Figures = {}
    for name, measure in measures.items():
        if not parts or name in parts:
            print(f"\n-- {name}", flush=True)
            found |= measure()
    print(f"\n{goals_table(goals(found))}")
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
