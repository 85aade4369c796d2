"""Formats of input rows: which columns have a text, a chat, or a question and its answer.

Each format is an entry of `SHAPES`; a row is read by the first whose columns have values in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from extract.chat.form import ASSISTANT, TURNS_BEHIND, Chat, Turn
from extract.chat.text import clean_text
from extract.chat.turns import MessageReader, is_messages
from extract.config import Columns, CorpusInput


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a row.

    Args:
        name: Its name in `chat.format`.
        needed: Columns that must have a value, each as alternatives of which the first with one is
            read.
        beside: Columns that are read if they have a value.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    beside: tuple[str, ...] = ()

    def columns(self, record: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The needed columns of a row; None where one has no value."""
        names = [
            next((name for name in names if record.get(name) is not None), None)
            for names in self.needed
        ]
        named = tuple(name for name in names if name is not None)
        return named if len(named) == len(names) else None


MESSAGE_COLUMNS = (
    "messages", "conversations", "conversation", "contents", "dialog", "dialogue", "data",
)  # fmt: skip
_SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")
_TOOLS = ("tools", "functions")

_PROMPTS = ("prompt", "question", "instruction")

SHAPES = {
    shape.name: shape
    for shape in (
        # Before "text": Alpaca rows also have a text made of the others, for models without a template.
        Shape("alpaca", (("instruction",), ("output",)), ("input", "history", *_SYSTEM)),
        Shape("text", (("text",),)),
        Shape("messages", (MESSAGE_COLUMNS,), (*_SYSTEM, *_TOOLS, "response")),
        Shape("pair", (("prompt",), ("response", "completion")), (*_SYSTEM, *_TOOLS)),
        Shape("dolly", (("instruction",), ("response",)), ("context", *_SYSTEM)),
        Shape("orca", (("question",), ("response",)), _SYSTEM),
        Shape("query", (("query",), ("response",)), ("history", *_SYSTEM, *_TOOLS)),
        Shape("qa", (("question",), ("answer",)), _SYSTEM),
        Shape("preference", (("chosen",),), (*_PROMPTS, "input", *_SYSTEM)),
    )
}
ANY_SHAPE = "text, messages, or prompt and response"


@dataclass(frozen=True, slots=True)
class RowText:
    """The content of a row.

    Args:
        shape: Name of its shape.
        columns: Columns that were read.
        chat: The turns before `response`, or all turns if there is no `response`.
        prompt: Plain text before the response, if it is no chat.
        response: The response; None if every assistant turn of `chat` is one.
    """

    shape: str
    columns: tuple[str, ...]
    chat: Chat | None = None
    prompt: str | None = None
    response: Turn | None = None


def wanted_columns(columns: Columns) -> set[str]:
    """Names of all columns that any shape may read."""
    mapped = (columns.text, columns.messages, columns.prompt, columns.response)
    own = (columns.system, columns.tools)
    names = {name for name in (*mapped, *own) if name is not None}
    for shape in SHAPES.values():
        names |= {name for needed in shape.needed for name in needed} | set(shape.beside)
    return names


def shape_of(record: Mapping[str, Any], entry: CorpusInput) -> tuple[Shape, tuple[str, ...]] | None:
    """Shape of a row, and its needed columns; None where no shape fits.

    If the run file maps columns, only the shape that they belong to is tried.
    """
    for shape in _candidates(entry):
        columns = shape.columns(record)
        if columns is not None:
            return shape, columns
    return None


def _candidates(entry: CorpusInput) -> list[Shape]:
    """Shapes that rows of an input may have, in the order in which they are tried."""
    columns, name = entry.columns, entry.chat.format
    if columns.text is not None:
        return [Shape("text", ((columns.text,),))]
    if columns.messages is not None:
        return [Shape("messages", ((columns.messages,),), (*_SYSTEM, *_TOOLS))]
    if columns.prompt is not None and columns.response is not None:
        return [Shape("pair", ((columns.prompt,), (columns.response,)), (*_SYSTEM, *_TOOLS))]
    return list(SHAPES.values()) if name == "auto" else [SHAPES[name]]


def missing_columns(entry: CorpusInput) -> str:
    """The columns that a row must have, for messages."""
    shapes = _candidates(entry)
    if len(shapes) > 1:
        return ANY_SHAPE
    return " and ".join(" or ".join(names) for names in shapes[0].needed)


def read_row(
    record: Mapping[str, Any], entry: CorpusInput, shape_columns: tuple[Shape, tuple[str, ...]],
    reader: MessageReader,
) -> RowText:  # fmt: skip
    """Read the content of a row.

    Args:
        record: Values by column.
        entry: The row's input.
        shape_columns: From `shape_of`.
        reader: Reads messages.

    Raises:
        DocumentError: A value cannot be used.
    """
    shape, named = shape_columns
    beside = _Beside({name: (name, record.get(name)) for name in shape.beside})
    for names, mapped in ((_SYSTEM, entry.columns.system), (_TOOLS, entry.columns.tools)):
        if mapped is not None:
            beside.values.update(dict.fromkeys(names, (mapped, record.get(mapped))))
    read = _READERS[shape.name](record, named, beside, reader, entry)
    return RowText(shape.name, tuple(sorted({*named, *beside.used})), *read)


_Read = tuple[Chat | None, str | None, Turn | None]


@dataclass(frozen=True, slots=True)
class _Beside:
    """Optional columns of a row, and which of them were read.

    Args:
        values: Column and value, by the column's default name.
        used: Columns that were read.
    """

    values: dict[str, tuple[str, Any]]
    used: set[str] = field(default_factory=set)

    def held(self, *names: str) -> Any:
        """The first of these values that is not empty; None where all are."""
        return next(
            (self.values[n][1] for n in names if n in self.values and self.values[n][1]), None
        )

    def take(self, *names: str) -> Any:
        """The same, and note its column as read."""
        value = self.held(*names)
        if value is not None:
            columns = [self.values[name] for name in names if name in self.values]
            self.used.add(next(column for column, held in columns if held))
        return value


def _text(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    return None, None, Turn(ASSISTANT, clean_text(record[named[0]], reader.where))


def _messages(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    chat = _headed(reader.chat(record[named[0]], tools=beside.take(*_TOOLS)), beside, reader)
    if chat.turns[-1].role == ASSISTANT or not beside.held("response"):
        return chat, None, None
    before, answer = _answer(beside.take("response"), reader)
    return _longer(chat, before), None, answer


def _pair(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    prompt = record[named[0]]
    before, answer = _answer(record[named[1]], reader)
    if not isinstance(prompt, str) or is_messages(prompt):
        chat = _headed(reader.chat(prompt, tools=beside.take(*_TOOLS)), beside, reader)
        return _longer(chat, before), None, answer
    system = beside.held(*_SYSTEM)
    if prompt == "" and not system and not before:
        return None, None, answer
    prompt = clean_text(prompt, f"{reader.where}, prompt")
    # A prompt with parts that only a chat can have becomes a chat.
    is_text = answer == Turn(ASSISTANT, answer.content) and not before
    if entry.prompt_as == "text" and is_text and not system and not beside.held(*_TOOLS):
        return None, prompt, answer
    return _longer(_asked_once(prompt, beside, reader), before), None, answer


def _instruction(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    asked = clean_text(record[named[0]], f"{reader.where}, {named[0]}")
    more = beside.take("input", "context")
    if more:
        asked += "\n\n" + clean_text(more, reader.where)
    before, answer = _answer(record[named[1]], reader)
    return _longer(_asked_once(asked, beside, reader), before), None, answer


def _preference(record: Any, named: Any, beside: Any, reader: MessageReader, entry: Any) -> _Read:
    chosen = record[named[0]]
    if isinstance(chosen, str) and chosen.lstrip().startswith("Human: "):
        chosen = _transcript(f"\n\n{chosen.lstrip()}")
    if isinstance(chosen, str) and not is_messages(chosen):
        if beside.held(*_PROMPTS) is None:
            raise reader.bad(f"no {', '.join(_PROMPTS)} before the chosen answer", "none of them")
        asked = clean_text(beside.take(*_PROMPTS), f"{reader.where}, prompt")
        more = beside.take("input")
        if more:
            asked += "\n\n" + clean_text(more, f"{reader.where}, input")
        return _asked_once(asked, beside, reader), None, _answer(chosen, reader)[1]
    chat = reader.chat(chosen)
    prompt = beside.held("prompt")
    whole = any(turn.role == "user" for turn in chat.turns)
    if prompt is None or whole:
        if whole and prompt is not None and _begins(chat, prompt, reader):
            beside.take("prompt")
        return _headed(chat, beside, reader), None, None
    prompt = beside.take("prompt")
    before, answer = _last_answer(chat.turns, reader)
    if isinstance(prompt, str) and not is_messages(prompt):
        asked_once = _asked_once(clean_text(prompt, reader.where), beside, reader)
        return _longer(asked_once, before), None, answer
    return _longer(_headed(reader.chat(prompt), beside, reader), before), None, answer


def _begins(chat: Chat, prompt: Any, reader: MessageReader) -> bool:
    """Whether the texts of a prompt (text or messages) are all among the contents of a chat."""
    if isinstance(prompt, str) and not is_messages(prompt):
        texts = [prompt]
    else:
        texts = [turn.content for turn in reader.chat(prompt).turns]
    return {text.strip() for text in texts} <= {turn.content.strip() for turn in chat.turns}


def _transcript(text: str) -> list[dict[str, str]]:
    """Messages of a chat that is written as one text, as in HH-RLHF."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


_READERS: dict[str, Any] = {
    "text": _text,
    "messages": _messages,
    "pair": _pair,
    "preference": _preference,
    **dict.fromkeys(("alpaca", "dolly", "orca", "query", "qa"), _instruction),
}


def _asked_once(asked: str, beside: _Beside, reader: MessageReader) -> Chat:
    """A chat of one question, after the turns of the history column if there is one."""
    history = beside.take("history")
    before = () if history is None else reader.chat(history).turns
    chat = Chat((*before, Turn("user", asked)), reader.tools(beside.take(*_TOOLS)))
    return _headed(chat, beside, reader)


def _headed(chat: Chat, beside: _Beside, reader: MessageReader) -> Chat:
    """The chat with the system turn of the system column, unless it has one."""
    held, first = beside.held(*_SYSTEM), chat.turns[0]
    if held is None or (first.role == "system" and first.content != held):
        return chat
    beside.take(*_SYSTEM)
    where = f"{reader.where}, system"
    system = reader.text(held, where)
    if first.role == "system" or not system:
        return chat
    return replace(chat, turns=(Turn("system", clean_text(system, where)), *chat.turns))


def _longer(chat: Chat, turns: tuple[Turn, ...]) -> Chat:
    """The chat with further turns; a system turn at their beginning goes to the front of a chat without
    one."""
    if turns and turns[0].role == "system" and chat.turns[0].role != "system":
        return replace(chat, turns=(turns[0], *chat.turns, *turns[1:]))
    return replace(chat, turns=(*chat.turns, *turns))


def _answer(response: Any, reader: MessageReader) -> tuple[tuple[Turn, ...], Turn]:
    """From a text or a list of messages: the turns before the assistant's last, and that turn."""
    if isinstance(response, str) and not is_messages(response):
        return (), Turn(ASSISTANT, clean_text(response, reader.where))
    return _last_answer(reader.chat(response).turns, reader)


def _last_answer(turns: tuple[Turn, ...], reader: MessageReader) -> tuple[tuple[Turn, ...], Turn]:
    """The turns before the assistant's last one (such as tool calls), and that turn."""
    places = [i for i, turn in enumerate(turns) if turn.role == ASSISTANT]
    if not places or any(turn.role == "user" for turn in turns):
        raise reader.bad(
            "the response has no assistant turn, or a user turn", f"{len(turns)} messages"
        )
    reader.tally.notes[TURNS_BEHIND] += len(turns) - places[-1] - 1
    return turns[: places[-1]], turns[places[-1]]
