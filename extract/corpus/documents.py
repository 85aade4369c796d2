"""A row becomes documents: columns are found, chats are cut into turns, bad text is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extract.config import CorpusInput, CorpusSection
from extract.corpus.inputs import DocumentError


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Args:
        document_id: Unique in the corpus.
        domain: What results are grouped by.
        split: "train", "valid", "test" or whatever the corpus says.
        context: None, or JSON of the prompt or messages before the text: read, never scored.
        text: What the models are scored and trained on. Never empty, no NUL, valid Unicode.
    """

    document_id: str
    domain: str
    split: str
    context: str | None
    text: str


def context_json(context: Mapping[str, Any]) -> str:
    """A prompt or messages as `Document.context` holds them."""
    return json.dumps(context, ensure_ascii=False, sort_keys=True)


def columns_wanted(entry: CorpusInput) -> set[str]:
    """Names of all columns that `row_documents` may look at."""
    roles = ("id", "text", "messages", "prompt", "response", "domain", "split")
    return {getattr(entry.columns, role) or role for role in roles}


def row_split(
    record: Mapping[str, Any], entry: CorpusInput, corpus: CorpusSection, *, doc: str, seed: int
) -> str:
    """Split of a row as it is named there: the input's constant, its column, or dealt by a seeded
    hash of its id."""
    if entry.split is not None:
        return entry.split
    mapped = entry.columns.split
    value = record.get(mapped or "split")
    if value is None:
        if mapped is not None:
            raise _missing(mapped, doc, record)
        return deal_split(doc, corpus.split_fractions, seed)
    return _clean(value, f"{doc}, column {mapped or 'split'}")


def deal_split(document_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """Split of a document by its id alone, so that it stays when other documents come or go."""
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
    """Id of a row: its column, also after the file's name, or file name and row number."""
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
    own = _clean(value, f"{place}, column {mapped or 'id'}")
    return f"{file_name}/{own}" if entry.ids == "file" else own


def row_documents(
    record: Mapping[str, Any], entry: CorpusInput, *, document_id: str, split: str, place: str
) -> list[Document]:
    """The documents of a row: one, or one for each assistant turn of a chat.

    Args:
        record: Values by column.
        entry: The input with its mapping.
        document_id: From `row_id`.
        split: From `row_split`; all turns of a chat share it.
        place: File and line, for messages.

    Raises:
        DocumentError: A column is missing, or holds what cannot be used.
    """
    where = f"document {document_id} ({place})"
    domain = entry.domain or _domain(record, entry, where)

    def document(text: Any, context: Any = None, suffix: str = "") -> Document:
        return Document(
            document_id + suffix,
            domain,
            split,
            None if context is None else context_json(context),
            _clean(text, where + suffix),
        )

    columns = entry.columns
    form = _form(record, entry, where)
    if form == "text":
        return [document(record[columns.text or "text"])]
    if form == "messages":
        messages = record[columns.messages or "messages"]
        response = record.get("response") if columns.messages is None else None
        if response is not None and not _ends_answered(messages):
            return [document(response, {"messages": _messages(messages, where)})]
        turns = _turns(messages, where)
        return [
            document(text, {"messages": before}, f"/turn-{i}")
            for i, (before, text) in enumerate(turns)
        ]
    prompt = record[columns.prompt or "prompt"]
    if prompt == "":
        return [document(record[columns.response or "response"])]
    prompt = _clean(prompt, f"{where}, prompt")
    context: dict[str, Any] = {"prompt": prompt}
    if entry.prompt_as == "chat":
        context = {"messages": [{"role": "user", "content": prompt}]}
    return [document(record[columns.response or "response"], context)]


_ANY_FORM = "text, messages, or prompt and response"


def _form(record: Mapping[str, Any], entry: CorpusInput, where: str) -> str:
    columns = entry.columns
    forms = {
        "text": [columns.text or "text"],
        "messages": [columns.messages or "messages"],
        "prompt": [columns.prompt or "prompt", columns.response or "response"],
    }
    asked = [form for form in forms if getattr(columns, form) is not None]
    for form in asked or forms:
        if all(record.get(name) is not None for name in forms[form]):
            return form
    names = [name for form in asked for name in forms[form]]
    raise _missing(" and ".join(names) or _ANY_FORM, where, record)


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
            got=f"columns {_shown(record)}",
            hint="map it, or give the input a constant `domain:`",
        )
    return _clean(value, f"{where}, column {name}")


def _ends_answered(messages: Any) -> bool:
    """Whether the assistant has the last word."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Checked messages with no fields but role and content."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DocumentError(
            "messages are not a list of objects", reason="bad_messages", where=where
        )
    found = []
    for number, message in enumerate(messages, 1):
        here = f"{where}, message {number}"
        role = _clean(message.get("role"), f"{here}, role")
        content = message.get("content")
        if not isinstance(content, str):
            raise DocumentError(
                "content of a message is not text",
                reason="bad_messages",
                where=here,
                expected="a string",
                got=type(content).__name__,
            )
        found.append({"role": role, "content": _clean(content, here) if content else content})
    if not found:
        raise DocumentError("no message", reason="bad_messages", where=where)
    return found


def _turns(messages: Any, where: str) -> list[tuple[list[dict[str, str]], str]]:
    """Each assistant turn with everything said before it."""
    found = _messages(messages, where)
    turns = [
        (found[:i], message["content"])
        for i, message in enumerate(found)
        if message["role"] == "assistant" and message["content"]
    ]
    if not turns:
        raise DocumentError("no assistant turn", reason="bad_messages", where=where)
    if not turns[0][0]:
        raise DocumentError(
            "nothing stands before the assistant's turn",
            reason="bad_messages",
            where=f"{where}, message 1",
        )
    return turns


def _missing(name: str, where: str, record: Mapping[str, Any]) -> DocumentError:
    empty = [column for column in name.split(" and ") if column in record]
    empty += [role for role in ("text", "messages", "prompt", "response") if role in record] * (
        name == _ANY_FORM
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
        got=f"columns {_shown(record)}",
        hint="map it under `columns:`",
    )


def _shown(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))[:12]) or "(none)"


def _clean(value: Any, where: str) -> str:
    """The value as text that every stage can hold and tokenise.

    Raises:
        DocumentError: Not text, empty, or with NUL or a lone surrogate; names the character.
    """
    if not isinstance(value, str):
        raise DocumentError(
            "not text", reason="not_text", where=where, expected="text", got=type(value).__name__
        )
    if not value:
        raise DocumentError("empty text", reason="empty_text", where=where)
    nul = value.find("\0")
    if nul >= 0:
        raise DocumentError(
            f"NUL at character {nul}",
            reason="nul",
            where=where,
            got=repr(value[max(nul - 8, 0) : nul + 8]),
            hint="clean the text, or drop such documents with `on_bad: drop`",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"lone surrogate at character {error.start}",
            reason="surrogate",
            where=where,
            got=ascii(value[max(error.start - 8, 0) : error.end + 8]),
            hint="clean the text, or drop such documents with `on_bad: drop`",
        ) from error
    return value
