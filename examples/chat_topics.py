"""What the dialogues of `make example-chat` are about: questions whose answers can be checked.

A topic draws numbers, names and dates from a random generator, and what is said of them is worded by
chat_topics.yaml. What a right answer must hold is written down beside it.
"""

from __future__ import annotations

import calendar
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from first_run.demo.facts import number_words, roman

WORDINGS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
_WORDS = {name: text.split() for name, text in WORDINGS["words"].items()}

CONVERSIONS = (
    ("miles", "kilometres", 1.609344), ("pounds", "kilograms", 0.45359237),
    ("inches", "centimetres", 2.54), ("feet", "metres", 0.3048), ("acres", "hectares", 0.40468564),
    ("gallons", "litres", 4.54609), ("knots", "kilometres per hour", 1.852),
    ("ounces", "grams", 28.349523), ("yards", "metres", 0.9144), ("pints", "litres", 0.56826125),
)  # fmt: skip
METRIC = (
    ("kilograms", "grams", 1000), ("metres", "centimetres", 100), ("litres", "millilitres", 1000),
    ("kilometres", "metres", 1000), ("hours", "minutes", 60), ("weeks", "days", 7),
    ("tonnes", "kilograms", 1000), ("minutes", "seconds", 60), ("dozens", "pieces", 12),
)  # fmt: skip
NOTES_CENTS = (500, 1000, 2000, 5000)
BETWEEN_TIDES_MINUTES = 745


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a topic has drawn.

    Args:
        values: That wordings are filled with.
        facts: What a right answer holds, as it is written in it.
        call: Arguments of the topic's tool; empty where it has none.
        result: What the tool gives, as JSON.
        answers: List of wordings that the answer is taken from.
    """

    values: Mapping[str, Any]
    facts: tuple[str, ...]
    call: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    answers: str = "answers"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer.

    Args:
        question: The user's.
        answer: The assistant's.
        thought: Reasoning before the answer, or before the call.
        drawn: What it is about.
    """

    question: str
    answer: str
    thought: str
    drawn: Drawn


@dataclass(frozen=True, slots=True)
class Topic:
    """A kind of exchange.

    Args:
        name: Of its wordings.
        draw: Makes what an exchange is about.
        tool: Schema as OpenAI has it; None where no tool is needed.
    """

    name: str
    draw: Callable[[Random], Drawn]
    tool: dict[str, Any] | None = None

    @property
    def tool_name(self) -> str:
        """Of the tool; empty without one."""
        return "" if self.tool is None else str(self.tool["function"]["name"])

    def exchange(self, random: Random, *, again: bool) -> Exchange:
        """Draw one; `again` where the dialogue has asked of the topic before."""
        drawn = self.draw(random)

        def said(wordings: str) -> str:
            return str(random.choice(WORDINGS[self.name][wordings]).format(**drawn.values))

        return Exchange(
            said("again" if again else "first"), said(drawn.answers), said("thoughts"), drawn
        )


def _tides(random: Random) -> Drawn:
    harbour, day = random.choice(_WORDS["harbours"]), _day(random)
    first = random.randrange(15, 11 * 60)
    a, b = _clock(first), _clock(first + BETWEEN_TIDES_MINUTES)
    x, y = random.sample([n / 10 for n in range(21, 69)], 2)
    which, height = ("first", x) if x > y else ("second", y)
    return Drawn(
        {"harbour": harbour, "day": _said(day), "a": a, "b": b, "x": x, "y": y}
        | {"which": which, "height": height},
        (a, b),
        {"harbour": harbour, "date": day.isoformat()},
        {"high": [{"time": a, "metres": x}, {"time": b, "metres": y}]},
    )


def _events(random: Random) -> Drawn:
    day, count = _day(random), random.choice((0, 1, 1, 2, 2, 3))
    starts = sorted(random.sample(range(8 * 60, 20 * 60, 15), count))
    names = [name.replace("-", " ") for name in random.sample(_WORDS["errands"], count)]
    events = [{"at": _clock(at), "what": name} for at, name in zip(starts, names, strict=True)]
    number = f"{number_words(count)} {'thing' if count == 1 else 'things'}".capitalize()
    return Drawn(
        {"day": _said(day), "Number": number}
        | {"listed": _listed([f"{event['what']} at {event['at']}" for event in events])},
        tuple(event["at"] for event in events) or ("free",),
        {"date": day.isoformat()},
        events,
        "answers" if events else "free_answers",
    )


def _convert(random: Random) -> Drawn:
    unit, to, factor = random.choice(CONVERSIONS)
    amount = random.randrange(3, 400) / random.choice((1, 2, 4))
    result = round(amount * factor, 2)
    return Drawn(
        {"amount": f"{amount:g}", "unit": unit, "to": to, "result": result, "factor": factor},
        (str(result),),
        {"value": amount, "unit": unit, "to": to},
        {"value": result, "unit": to},
    )


def _calculate(random: Random) -> Drawn:
    holder, holders, things = random.choice(_WORDS["goods"]).split("/")
    each, number = random.randrange(12, 97), random.randrange(13, 89)
    return Drawn(
        {"holder": holder, "holders": holders, "things": things}
        | {"each": each, "number": number, "result": each * number},
        (str(each * number),),
        {"expression": f"{number} * {each}"},
        {"result": each * number},
    )


def _departures(random: Random) -> Drawn:
    station, to = random.sample(_WORDS["stations"], 2)
    after = random.randrange(6 * 60, 21 * 60, 5)
    leaves, arrives = after + random.randrange(3, 50), after + random.randrange(75, 180)
    found = {
        "leaves": _clock(leaves),
        "platform": random.randrange(1, 15),
        "arrives": _clock(arrives),
    }
    return Drawn(
        {"station": station, "to": to, "after": _clock(after)} | found,
        (found["leaves"],),
        {"from": station, "to": to, "after": _clock(after)},
        found,
    )


def _product(random: Random) -> Drawn:
    a, b = random.randrange(12, 99), random.randrange(3, 10)
    tens, ones = a // 10 * 10, a % 10
    return Drawn(
        {"a": a, "b": b, "result": a * b, "tens": tens, "ones": ones}
        | {"high": tens * b, "low": ones * b},
        (str(a * b),),
    )


def _ending(random: Random) -> Drawn:
    start, lasts = random.randrange(8 * 60, 21 * 60, 5), random.randrange(35, 175, 5)
    end = _clock(start + lasts)
    return Drawn(
        {"what": random.choice(_WORDS["shows"]), "start": _clock(start), "lasts": lasts}
        | {"hours": lasts // 60, "minutes": lasts % 60, "end": end},
        (end,),
    )


def _weekday(random: Random) -> Drawn:
    today, days = random.randrange(7), random.randrange(10, 60)
    found = calendar.day_name[(today + days) % 7]
    return Drawn(
        {"name": calendar.day_name[today], "days": days, "found": found}
        | {"weeks": days // 7, "rest": days % 7},
        (found,),
    )


def _numerals(random: Random) -> Drawn:
    number = random.randrange(4, 400)
    forms = {"Roman numerals": roman(number), "words": number_words(number)}
    form = random.choice(list(forms))
    return Drawn({"number": number, "form": form, "found": forms[form]}, (forms[form],))


def _order(random: Random) -> Drawn:
    words = random.sample(_WORDS["sorted"], random.randrange(3, 6))
    ordered = sorted(words)
    return Drawn(
        {"words": ", ".join(words), "ordered": ", ".join(ordered)}
        | {"head": ordered[0], "tail": ordered[-1]},
        (", ".join(ordered),),
    )


def _change(random: Random) -> Drawn:
    number, cents = random.randrange(2, 8), random.randrange(90, 400, 10)
    cost = number * cents
    note = next(note for note in NOTES_CENTS if note > cost)
    back = f"{(note - cost) / 100:.2f}"
    return Drawn(
        {"number": number, "what": random.choice(_WORDS["cakes"]), "each": f"{cents / 100:.2f}"}
        | {"note": note // 100, "cost": f"{cost / 100:.2f}", "back": back},
        (back,),
    )


def _metric(random: Random) -> Drawn:
    unit, parts, factor = random.choice(METRIC)
    amount = random.randrange(2, 120)
    result = amount * factor
    return Drawn(
        {"amount": amount, "unit": unit, "parts": parts, "factor": factor, "result": result},
        (str(result),),
    )


def _day(random: Random) -> datetime.date:
    return datetime.date(2026, 1, 1) + datetime.timedelta(random.randrange(365))


def _said(day: datetime.date) -> str:
    return f"{day.day} {calendar.month_name[day.month]}"


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A function's schema; parameters are given with their types."""
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


_TEXT, _NUMBER = "string", "number"

TOPICS: dict[str, tuple[Topic, ...]] = {
    "tools": (
        Topic("tides", _tides, _tool("high_tides", "Tide table", harbour=_TEXT, date=_TEXT)),
        Topic("events", _events, _tool("events", "The user's calendar", date=_TEXT)),
        Topic(
            "convert",
            _convert,
            _tool("convert", "Convert units", value=_NUMBER, unit=_TEXT, to=_TEXT),
        ),
        Topic("calculate", _calculate, _tool("calculate", "Calculator", expression=_TEXT)),
        Topic(
            "departures",
            _departures,
            _tool("next_train", "Timetable", **{"from": _TEXT, "to": _TEXT, "after": _TEXT}),
        ),
    ),
    "talk": (
        Topic("product", _product),
        Topic("ending", _ending),
        Topic("weekday", _weekday),
        Topic("numerals", _numerals),
        Topic("order", _order),
        Topic("change", _change),
        Topic("metric", _metric),
    ),
}
"""By domain: with a tool to each topic, and without."""
