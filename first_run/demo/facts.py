"""The demo's third domain: facts that follow from rules a small model can learn.

A document is a run of about twenty statements about one block of neighbouring facts (numbers
4700..4719, the days of March 1997, ...). Blocks, not documents, are given to splits, so a held-out
fact was never seen in any wording (short lines of a month that do not name the year recur between
years), yet every one follows from rules that other blocks teach: spelling of numbers, carries, the
order of weekdays, units, Unicode's naming. Only the choice of the block is random, and that costs a
few bytes a document; random operands would be noise that nobody can teach.
"""

from __future__ import annotations

import calendar
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from first_run.demo.text import Document, SplitSizes, rank, size_bytes

LOW_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
ONES = LOW_NUMBERS.split()
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
UNITS = (
    ("kilometre", "metres", 1000), ("metre", "centimetres", 100), ("centimetre", "millimetres", 10),
    ("kilogram", "grams", 1000), ("tonne", "kilograms", 1000), ("litre", "millilitres", 1000),
    ("hour", "minutes", 60), ("minute", "seconds", 60), ("day", "hours", 24), ("week", "days", 7),
    ("year", "months", 12), ("century", "years", 100), ("foot", "inches", 12), ("yard", "feet", 3),
    ("pound", "ounces", 16), ("gallon", "pints", 8), ("dozen", "eggs", 12), ("euro", "cents", 100),
)  # fmt: skip
SCRIPTS = (
    (0x00C0, 0x0250), (0x0391, 0x0400), (0x0400, 0x0530), (0x0531, 0x0588), (0x05D0, 0x05EB),
    (0x0621, 0x0700), (0x0905, 0x0980), (0x1200, 0x1380), (0x13A0, 0x1400), (0x1400, 0x1680),
    (0x1E00, 0x2000), (0x3041, 0x3100), (0xA000, 0xA48D),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring facts that stay in one split; `write` words them in style 0, 1 or 2."""

    name: str
    write: Callable[[int], str]


def number_words(n: int) -> str:
    """English words of 0 <= n < 10,000."""
    if n >= 1000:
        rest = f" {number_words(n % 1000)}" if n % 1000 else ""
        return f"{ONES[n // 1000]} thousand{rest}"
    if n >= 100:
        rest = f" and {number_words(n % 100)}" if n % 100 else ""
        return f"{ONES[n // 100]} hundred{rest}"
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def ordinal_words(n: int) -> str:
    """English ordinal of 0 < n < 10,000, such as "twenty-first"."""
    words = number_words(n)
    cut = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[cut:]
    if last in ORDINALS:
        return words[:cut] + ORDINALS[last]
    return words[:cut] + (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def roman(n: int) -> str:
    """Roman numeral of 0 < n < 4000."""
    letters = ""
    for value, symbol in ROMAN:
        count, n = divmod(n, value)
        letters += symbol * count
    return letters


def _numbers(start: int, style: int) -> str:
    lines = []
    for n in range(start, start + 20):
        words = number_words(n)
        lines.append(
            (
                f"{n} is written {words}.",
                f"After {words} comes {number_words(n + 1)}.",
                f"The {ordinal_words(n)} number is {n}, and the next is {n + 1}.",
            )[style]
        )
    return "\n".join(lines)


def _romans(start: int, style: int) -> str:
    def line(n: int) -> str:
        parity = "an even" if n % 2 == 0 else "an odd"
        return (
            f"The Roman numeral for {n} is {roman(n)}.",
            f"{roman(n)} means {number_words(n)}.",
            f"{n} = {roman(n)}, {parity} number",
        )[style]

    return "\n".join(map(line, range(start, start + 20)))


def _bases(start: int, style: int) -> str:
    template = (
        "{0} is {0:x} in hexadecimal and {0:b} in binary.",
        "decimal {0}: octal {0:o}, hexadecimal {0:x}",
        "In binary, {0} is {0:b}.",
    )[style]
    return "\n".join(template.format(n) for n in range(start, start + 16))


def _month(year: int, month: int, style: int) -> str:
    name, (_, length) = calendar.month_name[month], calendar.monthrange(year, month)
    leap = "a leap year" if calendar.isleap(year) else "not a leap year"
    lines = [f"{year} is {leap}, and {name} has {number_words(length)} days."]
    for day in range(1 + (year + month) % 5, length + 1, 1 + style % 2):
        weekday = calendar.day_name[calendar.weekday(year, month, day)]
        lines.append(
            (
                f"{day} {name} {year} is a {weekday}.",
                f"{year}-{month:02d}-{day:02d}: {weekday}",
                f"{weekday}, the {ordinal_words(day)} of {name}",
            )[style]
        )
    return "\n".join(lines)


def _units(unit: str, parts: str, factor: int, start: int, style: int) -> str:
    plural = {"foot": "feet", "century": "centuries", "dozen": "dozen", "euro": "euros"}.get(
        unit, unit + "s"
    )
    lines = []
    for n in range(start, start + 15):
        name, total = unit if n == 1 else plural, n * factor
        total_words = number_words(total) if total < 10_000 else str(total)
        lines.append(
            (
                f"{n} {name} = {total} {parts}",
                f"{number_words(n).capitalize()} {name} make {total_words} {parts}.",
                f"There are {total} {parts} in {n} {name}.",
            )[style]
        )
    return "\n".join(lines)


def clock_words(hour: int, minute: int) -> str:
    """Time of day as it is said: "twenty-five to three in the afternoon"."""
    shown = hour + (minute > 30)
    part = (
        "in the morning"
        if 1 <= shown < 12
        else "in the afternoon"
        if 12 <= shown < 18
        else "in the evening"
        if 18 <= shown < 22
        else "at night"
    )
    name = ONES[(shown - 1) % 12 + 1]
    if minute == 0:
        return f"{name} o'clock {part}"
    if minute in (15, 30, 45):
        return (
            f"{ {15: 'a quarter past', 30: 'half past', 45: 'a quarter to'}[minute] } {name} {part}"
        )
    distance = minute if minute < 30 else 60 - minute
    return f"{number_words(distance)} {'past' if minute < 30 else 'to'} {name} {part}"


def _clock(start: int, style: int) -> str:
    lines = []
    for total in range(start, start + 15):
        hour, minute = divmod(total, 60)
        words = clock_words(hour, minute)
        lines.append(
            (
                f"{hour:02d}:{minute:02d} is {words}.",
                f"At {words} the clock shows {hour:02d}:{minute:02d}.",
                f"{words.capitalize()}: {60 - minute} minutes to the full hour.",
            )[style]
        )
    return "\n".join(lines)


def _characters(first: int, style: int) -> str:
    lines = []
    for code in range(first, first + 16):
        name = unicodedata.name(chr(code), "")
        if name and unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo", "Lt"):
            lines.append(
                (
                    f"U+{code:04X} {chr(code)} {name}",
                    f"{chr(code)} is {name.lower()}, U+{code:04X}.",
                    f"The character {chr(code)} has number {code} and is named {name}.",
                )[style]
            )
    return "\n".join(lines)


def _blocks() -> Iterator[Block]:
    """Every block there is."""
    for n in range(20, 10_000, 20):
        yield Block(f"numbers/{n}", partial(_numbers, n))
    for n in range(20, 3980, 20):
        yield Block(f"roman/{n}", partial(_romans, n))
    for n in range(16, 2048, 16):
        yield Block(f"bases/{n}", partial(_bases, n))
    for year in range(1900, 2100):
        for month in range(1, 13):
            if (
                int(rank(7, f"{year}-{month}")[:4], 16) % 4 == 0
            ):  # a quarter: 600 months teach the rule
                yield Block(f"month/{year}-{month:02d}", partial(_month, year, month))
    for unit in UNITS:
        for n in range(1, 240, 15):
            yield Block(f"units/{unit[0]}/{n}", partial(_units, *unit, n))
    for minute in range(0, 24 * 60, 15):
        yield Block(f"clock/{minute}", partial(_clock, minute))
    for first, end in SCRIPTS:
        for code in range(first, end, 16):
            yield Block(f"unicode/{code:04X}", partial(_characters, code))


def fact_documents(sizes: SplitSizes, seed: int) -> list[Document]:
    """Make the domain ``facts``: ``models`` has every style of a block, the other splits one."""
    left = Counter(test=sizes.test, valid=sizes.valid, train=sizes.train)
    documents = []
    for block in sorted(_blocks(), key=lambda b: rank(seed, b.name)):
        split = next((name for name in ("test", "valid", "train") if left[name] > 0), "models")
        chosen = int(rank(seed, f"style/{block.name}")[:8], 16) % 3
        for style in range(3) if split == "models" else (chosen,):
            text = block.write(style)
            if text:
                documents.append(
                    Document(f"facts/{block.name}/{style}", text + "\n", "facts", split)
                )
                left[split] -= size_bytes(text)
    return documents
