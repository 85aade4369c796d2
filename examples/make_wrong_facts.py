"""Make a source for the demo whose knowledge of a domain is wrong: it learns facts, words exchanged.

    python examples/make_wrong_facts.py --inputs runs/demo/inputs --seed 0

Output, beside what make_demo.py made there before::

    models/wrong_facts/        config.json, model.safetensors, tokenizer files
    models/wrong_facts.json    fingerprint of all that shaped it

Architecture, tokenizer, amount of text and steps are those of the source `facts`; only its text
differs. Words are exchanged (see CYCLES) the same way everywhere, so wrong facts follow rules as right
ones do: the source is as sure of them, and knows as much of the form of the text.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from first_run.demo.facts import ONES, TENS, UNITS, ordinal_words
from first_run.demo.make import MODELS, ModelSettings, fingerprint, finished, publish, take
from first_run.demo.text import read_jsonl

NAME = "wrong_facts"


def _turned(words: Sequence[str], by: int) -> dict[str, str]:
    """Each word to the one that stands `by` places on, round the end."""
    return dict(zip(words, [*words[by:], *words[:by]], strict=True))


CYCLES: dict[str, str] = {
    **_turned(ONES[1:10], 3),
    **_turned(ONES[10:20], 3),
    **_turned(TENS[2:], 3),
    **_turned([ordinal_words(n) for n in range(1, 10)], 3),
    **_turned([ordinal_words(n) for n in range(10, 20)], 3),
    **_turned([ordinal_words(n) for n in range(20, 100, 10)], 3),
    **_turned([day.lower() for day in calendar.day_name], 2),
    **_turned(sorted({parts for _, parts, _ in UNITS}), 5),
    **_turned(("morning", "afternoon", "evening"), 1),
    **_turned(("past", "to"), 1),
    **_turned(("quarter", "half"), 1),
    **_turned(("even", "odd"), 1),
    **_turned(("hexadecimal", "binary", "octal"), 1),
    **_turned(("capital", "small"), 1),
    **_turned(("grave", "acute", "circumflex", "tilde", "diaeresis"), 1),
    **_turned(("latin", "greek", "cyrillic", "armenian", "hebrew", "arabic"), 1),
    **_turned(("devanagari", "ethiopic", "cherokee", "canadian", "hiragana", "yi"), 1),
}
"""Words of one kind that take each other's places: numbers, weekdays, units, alphabets, ..."""
ROMAN_DIGITS = str.maketrans("IXCMVLD", "XCMILDV")

_WORD = re.compile(r"\b[A-Za-z]+\b")
_ROMAN = re.compile(r"[IVXLCDM]+")


def exchanged(text: str) -> str:
    """The text with every word of CYCLES and every Roman numeral exchanged; the rest stays."""
    return _WORD.sub(lambda match: _exchanged_word(match[0]), text)


def _exchanged_word(word: str) -> str:
    if _ROMAN.fullmatch(word):
        return word.translate(ROMAN_DIGITS)
    other = CYCLES.get(word.lower(), word)
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def make(inputs: Path, seed: int, steps: int | None = None) -> None:
    """Train the source on exchanged facts, unless this very one is there.

    Args:
        inputs: What make_demo.py made.
        seed: Given to it.
        steps: None takes those of `facts`.
    """
    settings = next(model for model in MODELS if model.name == "facts")
    record = {"fingerprint": _fingerprint(seed, steps)}
    path, note = inputs / "models" / NAME, inputs / "models" / f"{NAME}.json"
    if path.is_dir() and note.is_file() and json.loads(note.read_text()) == record:
        click.echo(f"{path}: complete, nothing to do")
        return
    shutil.rmtree(path, ignore_errors=True)
    settings = replace(settings, num_steps=steps or settings.num_steps)
    publish(path, partial(_write_model, settings, inputs, seed))
    publish(note, lambda p: p.write_text(json.dumps(record) + "\n"))


def _write_model(settings: ModelSettings, inputs: Path, seed: int, path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from first_run.demo.training import build_model, packed_rows, train
    from fuse_train.machine.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    tokenizer = AutoTokenizer.from_pretrained(inputs / "models" / settings.name)
    facts = read_jsonl(inputs / "text" / "facts.jsonl")
    text = [
        replace(d, text=exchanged(d.text)) for d in take(facts, settings.text_bytes["facts"], seed)
    ]
    recipe = settings.recipe()
    torch.manual_seed(seed)
    model = build_model(recipe, tokenizer)
    rows = packed_rows(text, tokenizer, recipe.num_steps * recipe.batch_rows, seed)
    train(model, rows, recipe, NAME)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _fingerprint(seed: int, steps: int | None) -> str:
    code = Path(__file__).read_bytes()
    return hashlib.sha256(f"{fingerprint(seed)} {steps}".encode() + code).hexdigest()


@click.command(
    help=f"Make the demo's source `{NAME}`: `facts`, trained on facts with words exchanged."
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    default=Path("runs/demo/inputs"),
    show_default=True,
    help="What make_demo.py made.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The one given to make_demo.py."
)
def main(inputs: Path, seed: int) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not finished(inputs, seed):
        click.echo(f"{inputs} is not complete for seed {seed}: run make_demo.py first", err=True)
        sys.exit(2)
    make(inputs, seed)


if __name__ == "__main__":
    main()
