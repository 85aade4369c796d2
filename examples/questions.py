"""Questions whose answers can be checked: sums in words, lists, words, small Python functions.

A topic draws names and numbers from a random generator; the right answer follows. `easy` questions are
for models of a million parameters, `small` ones for models that are made in seconds. What the final
answer is, and what a function must do, stands beside each question, so that a program can tell right
from wrong (check_answer.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from first_run.demo.facts import clock_words, number_words, roman


def _each(text: str) -> list[str]:
    return text.split()


NAMES = _each("Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karin Leo Mara Noah Olga Paul")
THINGS = _each(
    "apples books coins eggs flags keys lamps maps nuts pens rings shells stamps tickets"
)
PLACES = _each("box shelf basket drawer bag jar")
WORDS = _each(
    "red green blue black white stone river cloud table window garden paper silver winter summer "
    "morning bread salt sugar tea coffee horse bird fish wolf north south bridge tower road"
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        id: Of the question.
        topic: sums | lists | words | code; of easy and small ones numbers | times | romans.
        split: models (what toy models learn from) | train | valid | test.
        prompt: What is asked.
        answer: A right answer; its last line is "The answer is X." or, for code, it is a function.
        final: X; for code the tests as JSON: [[arguments, result], ...].
    """

    id: str
    topic: str
    split: str
    prompt: str
    answer: str
    final: str

    def row(self) -> dict[str, object]:
        """As it stands in a file: a chat, and what a checker must know."""
        messages = [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]
        return {
            "id": self.id, "domain": self.topic, "split": self.split, "messages": messages,
        }  # fmt: skip


MOST_TRIES = 200
"""Draws in a row that were all asked before: the topic has run out."""
Drawn = tuple[str, str, str]
"""Prompt, worked answer without its last line, final answer."""


def _worked(steps: str, final: str) -> str:
    return f"{steps}\nThe answer is {final}." if steps else f"The answer is {final}."


def number_in_words(random: Random, below: int = 2000) -> Drawn:
    """A number from 100, written out."""
    n = random.randrange(100, below)
    asked = (f"How is {n} written in words?", f"Write {n} in words.", f"Spell the number {n}.")
    return random.choice(asked), "", number_words(n)


def time_in_words(random: Random, minutes: int = 1) -> Drawn:
    """A time of day as it is said, every so many minutes."""
    hour, minute = random.randrange(24), random.randrange(0, 60, minutes)
    shown = f"{hour:02d}:{minute:02d}"
    asked = (f"How does one say {shown}?", f"What time is {shown} in words?", f"Say {shown}.")
    return random.choice(asked), "", clock_words(hour, minute)


def roman_numeral(random: Random, below: int = 2000) -> Drawn:
    """A number as the Romans wrote it."""
    n = random.randrange(1, below)
    asked = (f"Write {n} in Roman numerals.", f"What is {n} in Roman numerals?", f"{n} in Roman?")
    return random.choice(asked), "", roman(n)


def number_list(random: Random) -> Drawn:
    """Sort, largest, smallest or how many of some numbers below 100."""
    numbers = random.sample(range(10, 100), random.randrange(3, 6))
    shown = ", ".join(map(str, numbers))
    kind = random.randrange(4)
    if kind == 0:
        final = ", ".join(map(str, sorted(numbers)))
        return f"Sort these numbers from small to large: {shown}", "", final
    if kind == 1:
        return f"What is the largest of these numbers: {shown}", "", str(max(numbers))
    if kind == 2:
        return f"What is the smallest of these numbers: {shown}", "", str(min(numbers))
    return f"Write these numbers backwards: {shown}", "", ", ".join(map(str, reversed(numbers)))


def word_list(random: Random) -> Drawn:
    """Order of words."""
    words = random.sample(WORDS, random.randrange(3, 6))
    shown = " ".join(words)
    kind = random.randrange(4)
    if kind == 0:
        return f"Write these words in reverse order: {shown}", "", " ".join(reversed(words))
    if kind == 1:
        return f"Sort these words by alphabet: {shown}", "", " ".join(sorted(words))
    if kind == 2:
        place = random.randrange(len(words))
        ordinal = ("first", "second", "third", "fourth", "fifth")[place]
        return f"What is the {ordinal} of these words: {shown}", "", words[place]
    return f"Leave out the first of these words: {shown}", "", " ".join(words[1:])


def sum_in_words(random: Random) -> Drawn:
    """Two or three steps."""
    name, thing, place = random.choice(NAMES), random.choice(THINGS), random.choice(PLACES)
    n, each, more = random.randrange(2, 9), random.randrange(3, 13), random.randrange(2, 20)
    kind = random.randrange(3)
    if kind == 0:
        total = n * each + more
        return (
            f"{name} has {n} boxes with {each} {thing} each, and {more} {thing} in a {place}. "
            f"How many {thing} does {name} have in total?",
            f"{n} * {each} = {n * each}\n{n * each} + {more} = {total}",
            str(total),
        )
    if kind == 1:
        start = n * each + random.randrange(1, 9)
        return (
            f"{name} has {start} {thing} and gives {each} to each of {n} friends. How many {thing} "
            f"does {name} keep?",
            f"{n} * {each} = {n * each}\n{start} - {n * each} = {start - n * each}",
            str(start - n * each),
        )
    price = random.randrange(2, 9)
    paid = ((each * price) // 10 + 1) * 10
    return (
        f"{name} buys {each} {thing} at {price} euros each and pays with {paid} euros. How many euros "
        f"does {name} get back?",
        f"{each} * {price} = {each * price}\n{paid} - {each * price} = {paid - each * price}",
        str(paid - each * price),
    )


FUNCTIONS: tuple[tuple[str, str, str, str, Callable[[Random], tuple[object, ...]]], ...] = (
    ("add", "a, b", "the sum of a and b", "a + b", lambda r: (r.randrange(50), r.randrange(50))),
    ("double", "x", "x times two", "x * 2", lambda r: (r.randrange(100),)),
    ("is_even", "n", "True when n is even and False otherwise", "n % 2 == 0",
     lambda r: (r.randrange(100),)),
    ("largest", "numbers", "the largest of a list of numbers", "max(numbers)",
     lambda r: (r.sample(range(100), 4),)),
    ("total", "numbers", "the sum of a list of numbers", "sum(numbers)",
     lambda r: (r.sample(range(100), 4),)),
    ("backwards", "text", "the text backwards", "text[::-1]", lambda r: (r.choice(WORDS),)),
    ("first", "items", "the first element of a list", "items[0]",
     lambda r: (r.sample(range(100), 3),)),
    ("shout", "text", "the text in upper case", "text.upper()", lambda r: (r.choice(WORDS),)),
    ("count", "text, letter", "how often a letter occurs in a text", "text.count(letter)",
     lambda r: (r.choice(WORDS), r.choice("aeiou"))),
    ("ordered", "numbers", "the numbers of a list in ascending order", "sorted(numbers)",
     lambda r: (r.sample(range(100), 4),)),
    ("squares", "numbers", "a list with the square of each number", "[n * n for n in numbers]",
     lambda r: (r.sample(range(20), 3),)),
    ("longest", "words", "the longest word of a list", "max(words, key=len)",
     lambda r: (["a", r.choice(WORDS)],)),
    ("without", "items, item", "a list without all occurrences of an item",
     "[i for i in items if i != item]", lambda r: ([1, 2, 3, 2], r.randrange(1, 4))),
    ("last", "items", "the last element of a list", "items[-1]",
     lambda r: (r.sample(range(100), 3),)),
    ("mean", "numbers", "the mean of a list of numbers", "sum(numbers) / len(numbers)",
     lambda r: (r.sample(range(100), 4),)),
    ("evens", "numbers", "the even numbers of a list", "[n for n in numbers if n % 2 == 0]",
     lambda r: (r.sample(range(100), 5),)),
)  # fmt: skip
_ASKED = (
    "Write a Python function {name}({arguments}) that returns {what}.",
    "Define {name}({arguments}) in Python. It returns {what}.",
    "I need a Python function called {name} with the arguments {arguments}, which gives {what}.",
    "Give me {name}({arguments}), a Python function returning {what}.",
)


def python_function(random: Random) -> Drawn:
    """A function of one line, under a name that may have a number."""
    name, arguments, what, body, draw = random.choice(FUNCTIONS)
    name = f"{name}_{random.randrange(2, 100)}" if random.random() < 0.8 else name
    asked = random.choice(_ASKED).format(name=name, arguments=arguments, what=what)
    code = f"def {name}({arguments}):\n    return {body}"
    function = eval(f"lambda {arguments}: {body}")
    tests = [(given, function(*given)) for given in (draw(random) for _ in range(4))]
    return asked, f"```python\n{code}\n```", json.dumps(tests)


TOPICS: dict[str, dict[str, Callable[[Random], Drawn]]] = {
    "easy": {"numbers": number_in_words, "times": time_in_words, "romans": roman_numeral},
    "small": {
        "numbers": partial(number_in_words, below=400),
        "times": partial(time_in_words, minutes=5),
        "romans": partial(roman_numeral, below=300),
    },
    "full": {
        "sums": sum_in_words,
        "lists": number_list,
        "words": word_list,
        "code": python_function,
    },
}


def questions(level: str, sizes: Mapping[str, int], seed: int) -> Iterator[Question]:
    """Questions of each topic; none is asked twice, so no held-out one is in the text trained on.

    Args:
        level: small | easy | full.
        sizes: Questions of each topic by split, in the order in which splits are drawn; the last has
            fewer where a topic runs out.
        seed: Of everything that is drawn.
    """
    # An easy answer has several wordings.
    place = 0 if level == "full" else 2
    for topic, draw in TOPICS[level].items():
        random = Random(f"{seed}/{topic}")
        asked: set[str] = set()
        for split, size in sizes.items():
            for number in range(size):
                tries = (draw(random) for _ in range(MOST_TRIES))
                drawn = next((found for found in tries if found[place] not in asked), None)
                if drawn is None:
                    break
                asked.add(drawn[place])
                prompt, steps, final = drawn
                answer = steps if topic == "code" else _worked(steps, final)
                yield Question(f"{topic}/{split}/{number}", topic, split, prompt, answer, final)


def with_mistakes(found: Sequence[Question], share: float, seed: int) -> list[Question]:
    """The same questions, a share of them with the answer to another one of their topic and split."""
    random = Random(f"{seed}/mistakes")
    others: dict[tuple[str, str], list[Question]] = {}
    for question in found:
        others.setdefault((question.topic, question.split), []).append(question)
    mistaken = []
    for question in found:
        other = random.choice(others[question.topic, question.split])
        if random.random() < share and other.final != question.final:
            question = replace(question, answer=other.answer, final=other.final)
        mistaken.append(question)
    return mistaken


def by_split(found: Sequence[Question], split: str) -> list[Question]:
    """Those of one split."""
    return [question for question in found if question.split == split]
