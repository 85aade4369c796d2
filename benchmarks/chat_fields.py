"""`lost_silently`: does all that a chat is published with reach a model, or is it counted by name?

Each field of each row is filled with a mark of its own, one at a time, and the row is read as `corpus
build` reads it. The mark must stand in a document, or the field, or what holds it, must be among the
counts that `corpus build` prints (or the row is refused). What stands in a document's context must be
written by each model's template, or be among what `extract plan` says it leaves out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml

from extract.chat.form import Tally
from extract.config import CorpusInput, CorpusSection
from extract.corpus.documents import Document, row_documents, row_id
from extract.document_error import DocumentError
from store_schema.errors import TokenizerError
from store_schema.text.chat_template import ChatTemplate
from tests.chat_shapes import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent

FORM = frozenset({"type", "index"})
"""Fields that only say how others are to be read, and hold nothing of their own."""
LEFT_OUT = ("not read", "left out")
"""What a note says of something that goes no further."""
ENTRY = CorpusInput(path="c.jsonl", domain="chat", split="train")

Place = tuple[Any, ...]
"""Keys and places in lists, outermost first."""
Row = dict[str, Any]

_GIVEN = yaml.safe_load((ROOT / "benchmarks" / "chat_rows.yaml").read_text(encoding="utf-8"))
ROWS: dict[str, Row] = {**{name: row for name, (row, _) in PUBLISHED.items()}, **_GIVEN["rows"]}
EXTRA: list[tuple[Place, list[str]]] = [
    *(((name,), _GIVEN["columns"]) for name in PUBLISHED),
    *((tuple(place), _GIVEN["fields"][kind]) for kind, *place in _GIVEN["objects"]),
]
"""Objects of the rows, and the fields that each is given one at a time."""


class _Json:
    """Step into a string of JSON."""

    def __repr__(self) -> str:
        return "(JSON)"


JSON = _Json()


@dataclass(frozen=True, slots=True)
class Field:
    """One field of one row.

    Args:
        row: Name of the row.
        path: Keys, places in lists, and `JSON`.
    """

    row: str
    path: Place

    def __str__(self) -> str:
        return f"{self.row}: {'.'.join(map(str, self.path))}"


@dataclass(frozen=True, slots=True)
class Read:
    """A row as it was read.

    Args:
        documents: Of it.
        counts: Of what is not read, by name.
        notes: Of what is left out.
    """

    documents: list[Document]
    counts: Counter[str]
    notes: Counter[str]


def fields(rows: Mapping[str, Row] = ROWS, extra: Any = EXTRA) -> Iterator[tuple[Field, Row]]:
    """Every field with a value, and those that are put in besides.

    Args:
        rows: By name.
        extra: Objects (the name of a row and a path) and names of fields to put into each.

    Yields:
        The field, and the row with it.
    """
    for name, row in rows.items():
        for path in _leaves(row):
            if path[-1] not in FORM:
                yield Field(name, path), row
    for (name, *path), keys in extra:
        if name not in rows:
            continue
        inner = _at(rows[name], path)
        for key in keys:
            if inner.get(key) is None:
                whole = _changed(rows[name], path, lambda held, key=key: {**held, key: ""})
                yield Field(name, (*path, key)), whole


def lost_silently(
    templates: Mapping[str, ChatTemplate],
    rows: Mapping[str, Row] = ROWS,
    extra: Any = EXTRA,
) -> tuple[dict[str, str], int]:
    """Fields that go no further without a word.

    Args:
        templates: By model.
        rows: By name; each is read well as it is.
        extra: As in `fields`.

    Returns:
        Where each was lost, by field, and how many fields were filled.
    """
    lost, number = {}, 0
    for field, row in fields(rows, extra):
        number += 1
        where = _lost(field, row, f"zf{number}z", templates)
        if where:
            lost[str(field)] = where
    return lost, number


def _lost(field: Field, row: Row, mark: str, templates: Mapping[str, ChatTemplate]) -> str:
    marked = _changed(row, field.path, lambda held: f"{held}{mark}" if held else mark)
    try:
        read = _read(marked)
    except DocumentError:
        return ""  # refused, with its place
    except Exception as error:  # a fault of its own kind, to be seen
        return f"corpus build: {type(error).__name__}"
    reached = [d for d in read.documents if mark in json.dumps(astuple(d), ensure_ascii=False)]
    if not reached:
        return "" if _is_counted(field, marked, read) else "corpus build"
    if any(mark in document.text for document in reached):
        return ""
    contexts = [d.context for d in reached if d.context is not None and mark in d.context]
    if not contexts:
        return ""  # in the name of the document
    context = json.loads(contexts[-1])
    if "messages" not in context:
        return ""  # plain text, which every model reads
    return ", ".join(
        name for name, template in templates.items() if not _is_said(template, context, mark)
    )


def _read(row: Row) -> Read:
    tally = Tally()
    document_id = row_id(row, ENTRY, automatic="c/1", file_name="c", place="c:1")
    documents = row_documents(
        row,
        ENTRY,
        CorpusSection(),
        document_id=document_id,
        split="train",
        place="c:1",
        tally=tally,
    )
    notes = {note: n for note, n in tally.notes.items() if any(words in note for words in LEFT_OUT)}
    return Read(documents, Counter(tally.unread), Counter(notes))


def _is_counted(field: Field, marked: Row, read: Read) -> bool:
    """Whether a field, or something that holds it, is among the counts: without it they are less."""
    for stop in range(len(field.path), 0, -1):
        path = field.path[:stop]
        if path[-1] is JSON:
            continue
        try:
            without = _read(_removed(marked, path))
        except DocumentError:
            continue
        if isinstance(path[-1], int):
            if read.notes - without.notes:
                return True
            continue
        less = [*(read.counts - without.counts), *(read.notes - without.notes)]
        if any(
            name == path[-1] or name.endswith(f".{path[-1]}") or name in read.notes for name in less
        ):
            return True
    return False


def _is_said(template: ChatTemplate, context: Mapping[str, Any], mark: str) -> bool:
    """Whether a template writes what is marked, says that it does not, or refuses the chat."""
    try:
        around = template.around(context, where="here")
        if mark in around.before or mark in around.after:
            return True
        return any(
            template.unwritten(context, where="here")[kind] for kind in _kinds(context, mark)
        )
    except TokenizerError:
        return True


def _kinds(context: Mapping[str, Any], mark: str) -> tuple[str, ...]:
    """What `ChatTemplate.unwritten` may call the part of a context in which a mark stands."""
    place = next(path for path in _leaves(context) if mark in str(_at(context, path)))
    if place[0] == "tools":
        return ("tools", "fields of tools")
    if "tool_calls" in place:
        return ("ids of calls",) if place[-1] == "id" else ("tool calls",)
    kinds = {
        "reasoning_content": "thoughts",
        "tool_call_id": "ids of calls",
        "name": "names of speakers",
    }
    if place[-1] == "content":
        return (f"{context['messages'][place[1]]['role']} turns",)
    return (kinds.get(place[-1], str(place[-1])),)


# ------------------------------------------------------------------------------------------- places


def _leaves(value: Any, path: Place = ()) -> Iterator[Place]:
    """Paths of all values that hold no others, into strings of JSON too."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            inner = json.loads(value)
        except ValueError:
            inner = None
        if inner:
            yield from _leaves(inner, (*path, JSON))
            return
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _leaves(part, (*path, place))
    elif value is not None:
        yield path


def _at(value: Any, path: Sequence[Any]) -> Any:
    for step in path:
        value = json.loads(value) if step is JSON else value[step]
    return value


def _changed(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """The value with what stands at a path changed."""
    if not path:
        return change(value)
    step, *rest = path
    if step is JSON:
        return json.dumps(_changed(json.loads(value), rest, change))
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[step] = _changed(value[step], rest, change)
    return copy


def _removed(row: Row, path: Sequence[Any]) -> Row:
    *outer, last = path

    def without(held: Any) -> Any:
        if isinstance(held, list):
            return [*held[:last], *held[last + 1 :]]
        return {key: part for key, part in held.items() if key != last}

    found: Row = _changed(row, outer, without)
    return found
