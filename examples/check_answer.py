"""Whether an answer to a question of questions.py is right: a function for judge `python`.

    evaluate: {answers: {judge: {kind: python, function: examples/check_answer.py:right}}}

It runs in the process of the judge, which has limits of time and memory: what models wrote is executed
there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from questions import FUNCTIONS

from first_run.demo.facts import clock_words, number_words, roman

_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_DEFINED = re.compile(r"def (\w+)\(")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CALLS = 5


def right(asked: dict[str, Any]) -> float:
    """1 where the answer is right, else 0.

    Args:
        asked: As judge `python` gives it: answer, reference, domain.
    """
    answer, reference = asked["answer"], asked["reference"]
    if asked["domain"] == "code":
        return float(same_function(answer, reference))
    expected = _words(reference.rpartition("The answer is ")[2])
    if asked["domain"] == "sums":
        numbers = _NUMBER.findall(answer.replace(",", ""))
        return float(bool(numbers) and float(numbers[-1]) == float(expected[-1]))
    lines = [words for line in answer.splitlines() if (words := _words(line))]
    return float(any(words[-len(expected) :] == expected for words in lines[-1:]))


def right_by_question(asked: dict[str, Any]) -> float:
    """1 where the answer to an easy question is right, whatever its reference says, else 0.

    Args:
        asked: As judge `python` gives it: answer, domain, messages.
    """
    question = asked["messages"][-1]["content"]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    expected = {
        "numbers": lambda: number_words(numbers[0]),
        "times": lambda: clock_words(*numbers[:2]),
        "romans": lambda: roman(numbers[0]),
    }[asked["domain"]]()
    return float(asked["answer"].strip() == f"The answer is {expected}.")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def same_function(answer: str, reference: str) -> bool:
    """Whether the function in an answer gives what the reference's gives."""
    name = _DEFINED.findall(reference)[0]
    draw = next(f[4] for f in FUNCTIONS if f[0] == re.sub(r"_\d+$", "", name))
    ours, theirs = _defined(reference, name), _defined(answer, name)
    if ours is None or theirs is None:
        return False
    random = Random(name)
    for _ in range(CALLS):
        given = draw(random)
        try:
            if theirs(*given) != ours(*given):
                return False
        except Exception:  # whatever a model's code raises
            return False
    return True


def _defined(text: str, name: str) -> Any:
    """The function of that name in a text's code; None where there is none."""
    fenced = _FENCED.findall(text)
    space: dict[str, Any] = {}
    try:
        exec("\n".join(fenced) if fenced else text, space)
    except Exception:
        return None
    found = space.get(name)
    return found if callable(found) else None
