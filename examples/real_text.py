"""Text of `make real`: three domains in which the sources know more than the target.

* ``german``: sentences of Indico's German translation, a document for each part of the program,
* ``javascript``: passages of Jupyter's classic notebook, CodeMirror and Django's admin pages, at most
  two of a file,
* ``maths``: the problems of CHAMP with their worked solutions, a problem each.

Guarantees: documents that belong together (a part of a program, a component, a problem) are in one
split; a held-out document shares less than a fifth of its long lines with any document of another
split, else the other one is left out; the same packages and seed give the same bytes. More training
text leaves the held-out splits as they are and holds all of the less.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from real_packages import read_members

from first_run.demo.text import Document, SplitSizes, drop_copies, rank, size_bytes
from store_schema.errors import InputError

DOMAINS = ("german", "javascript", "maths")
SIZES = {
    "german": SplitSizes(train=42_000, valid=8_000, test=10_000),
    "javascript": SplitSizes(train=48_000, valid=9_000, test=12_000),
    "maths": SplitSizes(train=36_000, valid=7_000, test=9_000),
}
"""UTF-8 bytes: about 16,000 target tokens of each for training."""
BYTES_PER_TOKEN = {"german": 2.62, "javascript": 3.30, "maths": 2.16}
"""Of the target's tokens, over all text of the domain: turns an amount of tokens into bytes."""

SMALLEST_BYTES, LARGEST_BYTES = 300, 2_800
"""Of a document: many small files rather than a few large ones."""
PASSAGE_BYTES = 1_500
"""Of a passage of code, at most."""
COMMON = 4
"""A line that stands in so many documents or more is a phrase of the house, no sign of a copy."""

_ENTRY = re.compile(r'^msgstr(?:\[0\])? ((?:".*"\n?)+)', re.MULTILINE)
_PLACE = re.compile(r"^#: (\S+?):\d+", re.MULTILINE)


def catalogue(text: str) -> Iterator[tuple[str, str]]:
    """Source file and translation of each settled entry of a gettext catalogue."""
    for block in text.split("\n\n"):
        place, entry = _PLACE.search(block), _ENTRY.search(block)
        if place is None or entry is None or "\n#, fuzzy" in f"\n{block}":
            continue
        yield place[1], "".join(map(ast.literal_eval, entry[1].strip().split("\n")))


def german(wheels: Mapping[str, Path]) -> list[tuple[str, Document]]:
    """Group and document; sentences of five words or more, each once."""
    seen: set[str] = set()
    pages: dict[str, list[str]] = defaultdict(list)
    folder = "indico/translations/de_DE/LC_MESSAGES/"
    for _, text in read_members(wheels["indico"], folder, (".po",)):
        for place, sentence in catalogue(text):
            if len(sentence.split()) >= 5 and sentence not in seen:
                seen.add(sentence)
                pages[place.rpartition("/")[0]].append(sentence.strip())
    return [
        (part, Document(f"german/{part}/{number}", text, "german"))
        for part, sentences in sorted(pages.items())
        for number, text in enumerate(_packed(sentences))
    ]


def _packed(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined into texts of at most LARGEST_BYTES."""
    text = ""
    for line in lines:
        if text and size_bytes(text) + size_bytes(line) >= LARGEST_BYTES:
            yield text
            text = ""
        text += line + "\n"
    yield text


def javascript(wheels: Mapping[str, Path]) -> list[tuple[str, Document]]:
    """Group and document; a component of CodeMirror, or a folder of another program, is a group."""
    found = []
    for package, start in (
        ("nbclassic", "nbclassic/static/"),
        ("django", "django/contrib/admin/static/admin/js/"),
        ("django", "django/contrib/gis/static/"),
    ):
        for name, text in read_members(wheels[package], start, (".js",)):
            if _written_by_hand(name, text):
                passages = list(_passages(text.replace("\r\n", "\n")))
                for number in sorted({0, len(passages) // 2}):
                    title = f"javascript/{name}/{number}"
                    document = Document(title, passages[number], "javascript")
                    found.append((_component(name), document))
    return found


def _passages(text: str) -> Iterator[str]:
    """The text in pieces of at most PASSAGE_BYTES, cut at blank lines where there are some."""
    passage = ""
    for block in re.split(r"(?<=\n\n)", text):
        if passage and size_bytes(passage) + size_bytes(block) > PASSAGE_BYTES:
            yield passage
            passage = ""
        passage += block
    yield passage


def _written_by_hand(name: str, text: str) -> bool:
    made = (".min.", "-min.", "/MathJax/", "/dist/", "/i18n/", "/vendor/", "/build/")
    lines = text.count("\n") + 1
    return not any(mark in name for mark in made) and len(text) < 80 * lines


def _component(name: str) -> str:
    """codemirror/mode/css of nbclassic/static/components/codemirror/mode/css/css.js."""
    folders = name.split("/")[:-1]
    return "/".join(folders[:6])


def maths(wheels: Mapping[str, Path]) -> list[tuple[str, Document]]:
    """Group and document: a problem, the steps of its solution, and its answer."""
    ((_, text),) = read_members(wheels["champ"], "champ_dataset/dataset_files/", (".json",))
    found = []
    for name, problem in sorted(json.loads(text)["problems"].items()):
        steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
        written = (
            f"Problem: {problem['_text']}\n\nSolution:\n{steps}\n\nAnswer: {problem['_answer']}\n"
        )
        found.append((name, Document(f"maths/{name}", written, "maths")))
    return found


def place(
    grouped: Sequence[tuple[str, Document]], sizes: SplitSizes, seed: int
) -> tuple[list[Document], int]:
    """Deal whole groups to test, valid and train until each has its bytes; the rest is left out.

    Documents below SMALLEST_BYTES are for training alone, after all others, of groups that are not
    held out.

    Returns:
        The documents with their splits, and how many were left out because they share a fifth of
        their long lines with a held-out one.
    """
    kept = {d.id for d in drop_copies(document for _, document in grouped)}
    groups: dict[str, list[Document]] = defaultdict(list)
    short: dict[str, list[Document]] = defaultdict(list)
    for group, document in grouped:
        if document.id in kept and size_bytes(document.text) <= LARGEST_BYTES:
            is_short = size_bytes(document.text) < SMALLEST_BYTES
            (short if is_short else groups)[group].append(document)
    wanted = {"test": sizes.test, "valid": sizes.valid, "train": sizes.train}
    uses = Counter(line for ds in groups.values() for d in ds for line in _long_lines(d.text))
    held_out_lines: set[str] = set()
    held_out_groups: set[str] = set()
    placed: list[Document] = []
    num_alike = 0

    def deal(documents: Iterable[Document], split: str) -> set[str]:
        """Give documents to a split while it wants some; the lines that are theirs."""
        nonlocal num_alike
        lines: set[str] = set()
        for document in documents:
            own = {line for line in _long_lines(document.text) if uses[line] < COMMON}
            if held_out_lines and 5 * len(own & held_out_lines) >= max(1, len(own)):
                num_alike += 1
            elif wanted[split] > 0:
                placed.append(replace(document, split=split))
                wanted[split] -= size_bytes(document.text)
                lines |= own
        return lines

    for group in sorted(groups, key=lambda name: rank(seed, name)):
        split = next((name for name, left in wanted.items() if left > 0), None)
        if split is None:
            break
        lines = deal(groups[group], split)
        if split != "train":
            held_out_lines |= lines
            held_out_groups.add(group)
    if wanted["train"] > 0:
        for group in sorted(short.keys() - held_out_groups, key=lambda name: rank(seed, name)):
            deal(short[group], "train")
    return placed, num_alike


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}


def documents(
    domain: str, wheels: Mapping[str, Path], seed: int, train_tokens: int | None = None
) -> tuple[list[Document], int]:
    """All documents of a domain with their splits, and how many near copies were left out.

    Args:
        domain: One of DOMAINS.
        wheels: The packages of text.
        seed: Of the splits.
        train_tokens: About so many target tokens for training; None takes the bytes of SIZES.

    Raises:
        InputError: Fewer than SIZES has, or more than the packages hold.
    """
    read = {"german": german, "javascript": javascript, "maths": maths}[domain]
    sizes, scale = SIZES[domain], BYTES_PER_TOKEN[domain]
    if train_tokens is not None:
        wanted = round(train_tokens * scale)
        if wanted < sizes.train:
            raise InputError(
                "less training text than the default has",
                where=f"domain {domain}",
                expected=f"at least {sizes.train / scale:,.0f} target tokens",
                got=f"{train_tokens:,}",
                hint="leave --train-tokens out",
            )
        sizes = replace(sizes, train=wanted)
    placed, num_alike = place(read(wheels), sizes, seed)
    found = sum(size_bytes(d.text) for d in placed if d.split == "train")
    if train_tokens is not None and found < sizes.train:
        raise InputError(
            "the packages do not hold so much training text",
            where=f"domain {domain}",
            expected=f"at most {found / scale:,.0f} target tokens",
            got=f"{train_tokens:,}",
            hint=f"ask for at most {int(len(DOMAINS) * found / scale):,} in all",
        )
    return placed, num_alike


def smallest(documents: Sequence[Document]) -> list[Document]:
    """The smallest document of each domain and split: enough to see every stage run."""
    least: dict[tuple[str, str], Document] = {}
    for document in sorted(documents, key=lambda d: (size_bytes(d.text), d.id)):
        least.setdefault((document.domain, document.split), document)
    return [least[key] for key in sorted(least)]
