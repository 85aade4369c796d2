"""From an input row to documents: find its columns, split chats into responses, check texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from extract.chat.form import Tally
from extract.chat.responses import count_left_out, response_texts
from extract.chat.shapes import ANY_SHAPE, missing_columns, read_row, shape_of, wanted_columns
from extract.chat.text import clean_text
from extract.chat.turns import MessageReader
from extract.config import CorpusInput, CorpusSection
from extract.document_error import DocumentError


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Args:
        document_id: Unique in the corpus.
        domain: Kind of text; results are grouped by it.
        split: "train", "valid", "test" or another one of the corpus.
        context: None, or JSON of the prompt or messages before the text, which is not scored.
        text: The text that is scored and trained on: not empty, without NUL, valid Unicode.
        author: Name of the source that wrote it as an answer, else None.
        corpus: Name of its input, None where that has no name.
    """

    document_id: str
    domain: str
    split: str
    context: str | None
    text: str
    author: str | None = None
    corpus: str | None = None

    def values(self) -> list[str | None]:
        """All fields, for digests; author and corpus, which earlier versions lacked, only if set."""
        since = [self.author, self.corpus] if self.author or self.corpus else []
        return [self.document_id, self.domain, self.split, self.context, self.text, *since]


MOST_COLUMNS = 24
"""Shown in a message, at most."""
_AS_GIVEN = ("tools", "tool_calls")
"""Fields of which templates render the JSON, so that its order is kept."""


def context_json(context: Mapping[str, Any]) -> str:
    """`Document.context` of a prompt or messages: JSON with keys in alphabetical order, except in tool
    schemas and calls, which keep the data's order."""
    return json.dumps(_ordered(context), ensure_ascii=False)


def _ordered(value: Any, field: str = "") -> Any:
    if field in _AS_GIVEN:
        return value
    if isinstance(value, Mapping):
        return {name: _ordered(value[name], name) for name in sorted(value)}
    return [_ordered(part) for part in value] if isinstance(value, list) else value


def columns_wanted(entry: CorpusInput) -> set[str]:
    """Names of all columns that `row_documents` may read."""
    roles = ("id", "domain", "split")
    named = {getattr(entry.columns, role) or role for role in roles}
    author = {entry.columns.author} if entry.columns.author else set()
    return named | author | wanted_columns(entry.columns)


def _own_columns(entry: CorpusInput) -> set[str]:
    """The columns of id, domain, split and author, where they are used."""
    constants = {"id": entry.ids == "place", "domain": entry.domain, "split": entry.split}
    own = {getattr(entry.columns, role) or role for role, set_ in constants.items() if not set_}
    return own | {entry.columns.author} if entry.columns.author else own


def row_split(
    record: Mapping[str, Any], entry: CorpusInput, corpus: CorpusSection, *, doc: str, seed: int
) -> str:
    """Split of a row, not yet renamed: the input's constant, its column, or by `assign_split`."""
    if entry.split is not None:
        return entry.split
    mapped = entry.columns.split
    value = record.get(mapped or "split")
    if value is None:
        if mapped is not None:
            raise _missing(mapped, doc, record)
        return assign_split(doc, corpus.split_fractions, seed)
    return clean_text(value, f"{doc}, column {mapped or 'split'}")


def assign_split(document_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """Split of a document by a hash of its id alone, so that it does not depend on other documents.

    Args:
        document_id: The document's id.
        fractions: Share of each split; they sum to 1.
        seed: The run's seed.
    """
    digest = hashlib.sha256(f"split:{seed}:{document_id}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    names = sorted(fractions)
    for name in names:
        point -= fractions[name]
        if point < 0:
            return name
    return names[-1]


def row_id(
    record: Mapping[str, Any], entry: CorpusInput, *, automatic: str, file_name: str, place: str
) -> str:
    """Id of a row, by the input's `ids`: its column, file name and column, or file name and row."""
    if entry.ids == "place":
        return automatic
    mapped = entry.columns.id
    value = record.get(mapped or "id")
    if value is None:
        if mapped is not None:
            raise _missing(mapped, place, record)
        return automatic
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    own = clean_text(value, f"{place}, column {mapped or 'id'}")
    return f"{file_name}/{own}" if entry.ids == "file" else own


def row_documents(
    record: Mapping[str, Any],
    entry: CorpusInput,
    corpus: CorpusSection,
    *,
    document_id: str,
    split: str,
    place: str,
    tally: Tally,
) -> list[Document]:
    """The documents of a row: one, or one for each response of a chat.

    Args:
        record: Values by column.
        entry: The row's input.
        corpus: Section `corpus` of the run file.
        document_id: From `row_id`.
        split: The split of all its documents.
        place: File and line, for messages.
        tally: Counts what is not used.

    Raises:
        DocumentError: A column is missing, or its value cannot be used.
    """
    where = f"document {document_id} ({place})"
    domain = entry.domain or _domain(record, entry, where)
    author = _author(record, entry, where)
    shape_columns = shape_of(record, entry)
    if shape_columns is None:
        raise _missing(missing_columns(entry), where, record)
    row = read_row(record, entry, shape_columns, MessageReader(entry.chat, tally, where))
    tally.shapes[row.shape] += 1
    used = _own_columns(entry) | set(row.columns)
    tally.unread.update(
        name
        for name, value in record.items()
        if name not in used and value not in (None, "", [], {})
    )

    def document(text: Any, context: Any = None, suffix: str = "") -> Document:
        return Document(
            document_id + suffix,
            domain,
            split,
            None if context is None else context_json(context),
            clean_text(text, where + suffix),
            author,
            entry.corpus,
        )

    if row.chat is None:
        text = ""
        if row.response is not None:
            text = row.response.content
            count_left_out(row.response, tally)
        return [document(text, None if row.prompt is None else {"prompt": row.prompt})]
    return [
        document(response.text, response.context, response.suffix)
        for response in response_texts(row.chat, row.response, corpus.thoughts, tally, where)
    ]


def _author(record: Mapping[str, Any], entry: CorpusInput, where: str) -> str | None:
    name = entry.columns.author
    if name is None:
        return None
    value = record.get(name)
    if value is None:
        raise _missing(name, where, record)
    return clean_text(value, f"{where}, column {name}")


def _domain(record: Mapping[str, Any], entry: CorpusInput, where: str) -> str:
    name = entry.columns.domain or "domain"
    value = record.get(name)
    if value is None and name in record:
        raise _missing(name, where, record)
    if value is None:
        raise DocumentError(
            f"missing column {name}",
            reason="missing_column",
            where=where,
            got=columns_text(record),
            hint="map it, or give the input a constant `domain:`",
        )
    return clean_text(value, f"{where}, column {name}")


def _missing(name: str, where: str, record: Mapping[str, Any]) -> DocumentError:
    empty = [column for column in name.split(" and ") if column in record]
    empty += [role for role in ("text", "messages", "prompt", "response") if role in record] * (
        name == ANY_SHAPE
    )
    if empty:
        return DocumentError(
            f"no value in column {' and '.join(empty)}",
            reason="no_value",
            where=where,
            expected="text",
            got="null",
            hint="leave such rows out with `corpus.on_bad: drop`, which counts them",
        )
    return DocumentError(
        f"missing column {name}",
        reason="missing_column",
        where=where,
        got=columns_text(record),
        hint="map it under `columns:`",
    )


def columns_text(names: Iterable[str]) -> str:
    """Columns for a message, in order."""
    shown = sorted(map(str, names))
    more = ", ..." if len(shown) > MOST_COLUMNS else ""
    return f"columns {', '.join(shown[:MOST_COLUMNS]) or '(none)'}{more}"
