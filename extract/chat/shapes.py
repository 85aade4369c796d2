"""The shapes of a row: which columns hold a text, a chat, or a question and its answer.

Each shape is one entry of `SHAPES`; a row is read in the first whose columns have a value in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extract.chat.form import ASSISTANT, Chat, Turn
from extract.chat.text import clean_text
from extract.chat.turns import MessageReader, is_messages
from extract.config import Columns, CorpusInput


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a row.

    Args:
        name: As `chat.format` names it.
        needed: Columns that must have a value; of alternatives the first that has one.
        beside: Columns that are read where they are there.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    beside: tuple[str, ...] = ()

    def columns(self, record: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The columns of a row that hold what is needed; None where one has no value."""
        found = [
            next((name for name in names if record.get(name) is not None), None)
            for names in self.needed
        ]
        named = tuple(name for name in found if name is not None)
        return named if len(named) == len(found) else None


MESSAGE_COLUMNS = (
    "messages", "conversations", "conversation", "contents", "dialog", "dialogue", "data",
)  # fmt: skip
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")

SHAPES = {
    shape.name: shape
    for shape in (
        # Beside Alpaca's columns stands a text made of them for models without a chat template.
        Shape("alpaca", (("instruction",), ("output",)), ("input", "history", *_SYSTEM)),
        Shape("text", (("text",),)),
        Shape("messages", (MESSAGE_COLUMNS,), (*_SYSTEM, *_TOOLS, "response")),
        Shape("pair", (("prompt",), ("response", "completion")), (*_SYSTEM, *_TOOLS)),
        Shape("dolly", (("instruction",), ("response",)), ("context", *_SYSTEM)),
        Shape("orca", (("question",), ("response",)), _SYSTEM),
        Shape("query", (("query",), ("response",)), ("history", *_SYSTEM, *_TOOLS)),
        Shape("qa", (("question",), ("answer",)), _SYSTEM),
        Shape("preference", (("chosen",),), ("prompt", *_SYSTEM)),
    )
}
ANY_SHAPE = "text, messages, or prompt and response"


@dataclass(frozen=True, slots=True)
class RowText:
    """What a row holds.

    Args:
        shape: Its name.
        columns: That were read.
        chat: What stands before the response; with all responses in it where there is no `response`.
        prompt: Plain text before the response, where it is no chat.
        response: None where each of the assistant's turns of `chat` is one.
    """

    shape: str
    columns: tuple[str, ...]
    chat: Chat | None = None
    prompt: str | None = None
    response: Turn | None = None


def wanted_columns(columns: Columns) -> set[str]:
    """Names of all columns that a shape may look at."""
    mapped = (columns.text, columns.messages, columns.prompt, columns.response)
    own = (columns.system, columns.tools)
    names = {name for name in (*mapped, *own) if name is not None}
    for shape in SHAPES.values():
        names |= {name for needed in shape.needed for name in needed} | set(shape.beside)
    return names


def shape_of(record: Mapping[str, Any], entry: CorpusInput) -> tuple[Shape, tuple[str, ...]] | None:
    """Shape of a row, and the columns that hold what it needs; None where it has none.

    A mapped column decides: then only the shape that it belongs to is looked for.
    """
    for shape in _asked(entry):
        found = shape.columns(record)
        if found is not None:
            return shape, found
    return None


def _asked(entry: CorpusInput) -> list[Shape]:
    columns, name = entry.columns, entry.chat.format
    if columns.text is not None:
        return [Shape("text", ((columns.text,),))]
    if columns.messages is not None:
        return [Shape("messages", ((columns.messages,),), (*_SYSTEM, *_TOOLS))]
    if columns.prompt is not None and columns.response is not None:
        return [Shape("pair", ((columns.prompt,), (columns.response,)), (*_SYSTEM, *_TOOLS))]
    return list(SHAPES.values()) if name == "auto" else [SHAPES[name]]


def missing_columns(entry: CorpusInput) -> str:
    """The columns that a row must have, in words."""
    shapes = _asked(entry)
    if len(shapes) > 1:
        return ANY_SHAPE
    return " and ".join(" or ".join(names) for names in shapes[0].needed)


def read_row(
    record: Mapping[str, Any], entry: CorpusInput, found: tuple[Shape, tuple[str, ...]],
    reader: MessageReader,
) -> RowText:  # fmt: skip
    """What a row of a shape holds.

    Args:
        record: Values by column.
        entry: The input.
        found: From `shape_of`.
        reader: Of messages.

    Raises:
        DocumentError: A value cannot be used.
    """
    shape, named = found
    beside = {name: record[name] for name in shape.beside if record.get(name) is not None}
    for role, given in (("system", entry.columns.system), ("tools", entry.columns.tools)):
        if given is not None:
            beside[role] = record.get(given)
    read = _READERS[shape.name](record, named, beside, reader, entry)
    used = {*named, *beside, *filter(None, (entry.columns.system, entry.columns.tools))}
    return RowText(shape.name, tuple(sorted(used)), *read)


_Read = tuple[Chat | None, str | None, Turn | None]


def _text(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    return None, None, Turn(ASSISTANT, clean_text(record[named[0]], reader.where))


def _messages(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    chat = reader.chat(record[named[0]], tools=_tools(beside), system=_system(beside))
    response = beside.get("response")
    if response is None or chat.turns[-1].role == ASSISTANT:
        return chat, None, None
    return chat, None, _answer(response, reader)


def _pair(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    prompt, response = record[named[0]], record[named[1]]
    answer = _answer(response, reader)
    if not isinstance(prompt, str) or is_messages(prompt):
        return reader.chat(prompt, tools=_tools(beside), system=_system(beside)), None, answer
    system = _system(beside)
    if prompt == "" and not system:
        return None, None, answer
    prompt = clean_text(prompt, f"{reader.where}, prompt")
    if entry.prompt_as == "text" and not system:
        return None, prompt, answer
    return _asked_once(prompt, beside, reader), None, answer


def _instruction(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    asked = clean_text(record[named[0]], f"{reader.where}, {named[0]}")
    more = beside.get("input") or beside.get("context")
    if more:
        asked += "\n\n" + clean_text(more, reader.where)
    return _asked_once(asked, beside, reader), None, _answer(record[named[1]], reader)


def _preference(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    chosen, prompt = record[named[0]], beside.get("prompt")
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman: "):
        chosen = _transcript(chosen)
    if isinstance(chosen, str) and not is_messages(chosen):
        asked = clean_text(prompt, f"{reader.where}, prompt")
        return _asked_once(asked, beside, reader), None, _answer(chosen, reader)
    chat = reader.chat(chosen, system=_system(beside))
    if prompt is None or any(turn.role == "user" for turn in chat.turns):
        return chat, None, None  # the prompt is the beginning of it
    if isinstance(prompt, str) and not is_messages(prompt):
        return _asked_once(clean_text(prompt, reader.where), beside, reader), None, chat.turns[-1]
    return reader.chat(prompt, system=_system(beside)), None, chat.turns[-1]


def _transcript(text: str) -> list[dict[str, str]]:
    """Messages of a chat that is one text, as HH-RLHF has it."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    return [
        {"role": role, "content": said} for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]


_READERS: dict[str, Any] = {
    "text": _text,
    "messages": _messages,
    "pair": _pair,
    "preference": _preference,
    **dict.fromkeys(("alpaca", "dolly", "orca", "query", "qa"), _instruction),
}


def _asked_once(asked: str, beside: Mapping[str, Any], reader: MessageReader) -> Chat:
    """A chat of earlier exchanges, where there are some, and one question."""
    history = beside.get("history") or []
    before = reader.chat(history).turns if len(history) else ()
    turns = [*before, Turn("user", asked)]
    system = _system(beside)
    if system:
        turns.insert(0, Turn("system", clean_text(system, f"{reader.where}, system")))
    return Chat(tuple(turns), reader.tools(_tools(beside)))


def _answer(response: Any, reader: MessageReader) -> Turn:
    """A response that is a text or a list of one message."""
    if isinstance(response, str) and not is_messages(response):
        return Turn(ASSISTANT, clean_text(response, reader.where))
    turns = reader.chat(response).turns
    if len(turns) == 1 and turns[0].role == ASSISTANT:
        return turns[0]
    raise reader.bad("a response is not one message of the assistant's", f"{len(turns)} messages")


def _system(beside: Mapping[str, Any]) -> Any:
    return beside.get("system") or beside.get("system_prompt")


def _tools(beside: Mapping[str, Any]) -> Any:
    return beside.get("tools") or beside.get("functions")
