"""Make the questions of the papers' examples: prompts with given answers that a program can check.

    python examples/make_questions.py --out runs/questions/inputs --seed 0

Output::

    given.jsonl    id, domain (sums | lists | words | code), split, messages
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import click
from questions import TOPICS, Question, by_split, questions, with_mistakes

from first_run.demo.make import publish


def write_questions(found: list[Question], path: Path) -> None:
    """One JSON object a line."""
    rows = (json.dumps(question.row(), ensure_ascii=False) for question in found)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


@click.command(help="Make the questions of the papers' examples.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/questions/inputs"),
    show_default=True,
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--level", type=click.Choice(list(TOPICS)), default="full", show_default=True)
@click.option("--train", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--valid", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--test", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--mistakes",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the answers to train on that are wrong, as in data that nobody has checked.",
)
def main(
    out: Path, seed: int, level: str, train: int, valid: int, test: int, mistakes: float
) -> None:
    """Entry point; numbers are of each topic."""
    found = list(questions(level, {"test": test, "valid": valid, "train": train}, seed))
    learned = with_mistakes(by_split(found, "train"), mistakes, seed)
    found = [question for question in found if question.split != "train"] + learned
    publish(out / "given.jsonl", partial(write_questions, found))
    counts = Counter(question.split for question in found)
    said = ", ".join(f"{split} {number}" for split, number in counts.items())
    click.echo(f"{out}: {len(found)} questions ({said})")


if __name__ == "__main__":
    sys.exit(main())
