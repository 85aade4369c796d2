"""A chat cut into responses, each with all that a template needs to write what stands before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from extract.chat.form import (
    ASSISTANT,
    CALLS_BEHIND,
    CALLS_READ,
    THOUGHTS_LEFT_OUT,
    TURNS_BEHIND,
    Chat,
    Tally,
    Turn,
)
from extract.config import Thoughts
from extract.document_error import DocumentError


@dataclass(frozen=True, slots=True)
class ResponseText:
    """One response.

    Args:
        text: That is scored and trained on.
        context: What stands before it, as `store_schema.chat_template` takes it.
        suffix: Of the document's id.
    """

    text: str
    context: dict[str, Any]
    suffix: str = ""


def response_texts(
    chat: Chat, response: Turn | None, thoughts: Thoughts, tally: Tally, where: str
) -> list[ResponseText]:
    """The responses of a chat.

    Args:
        chat: All turns, or those before `response`.
        response: The one response; None where each of the assistant's turns is one.
        thoughts: What is done with reasoning.
        tally: Where turns that make no response are counted.
        where: Document, for messages.

    Raises:
        DocumentError: There is none.
    """
    if thoughts == "drop":
        tally.notes[THOUGHTS_LEFT_OUT] += sum(t.thought is not None for t in chat.turns)
        turns = tuple(replace(turn, thought=None) for turn in chat.turns)
        chat = replace(chat, turns=turns)
        if response is not None:
            tally.notes[THOUGHTS_LEFT_OUT] += response.thought is not None
            response = replace(response, thought=None)
    if response is not None:
        read, last = chat.turns, response
        found = list(_of_turn(chat, read, response, thoughts, tally, ""))
    else:
        asked = [i for i, turn in enumerate(chat.turns) if turn.role == ASSISTANT]
        tally.notes["opening turns, read and not trained on"] += bool(asked) and asked[0] == 0
        places = [i for i in asked if i > 0 and _says(chat.turns[i], thoughts)]
        found = [
            part
            for number, i in enumerate(places)
            for part in _of_turn(
                chat, chat.turns[:i], chat.turns[i], thoughts, tally, f"/turn-{number}"
            )
        ]
        if not found:
            alone = chat.turns[0].role == ASSISTANT and bool(chat.turns[0].content)
            what = "nothing stands before the assistant's turn" if alone else "no assistant turn"
            raise DocumentError(
                what, reason="bad_messages", where=f"{where}, message 1" if alone else where
            )
        read, last = chat.turns[: places[-1]], chat.turns[places[-1]]
        tally.notes[TURNS_BEHIND] += len(chat.turns) - places[-1] - 1
    if not found:
        raise DocumentError("empty text", reason="empty_text", where=where)
    tally.notes[CALLS_READ] += sum(len(turn.calls) for turn in read)
    tally.notes[CALLS_BEHIND] += len(last.calls)
    return found


def count_left_out(response: Turn, tally: Tally) -> None:
    """Count what of a response without a chat before it goes no further: all but its text."""
    tally.notes[THOUGHTS_LEFT_OUT] += response.thought is not None
    tally.notes[CALLS_BEHIND] += len(response.calls)
    for name, value in (("name", response.name), ("tool_call_id", response.call_id)):
        if value is not None:
            tally.unread[f"messages.{name}"] += 1


def _says(turn: Turn, thoughts: Thoughts) -> bool:
    return bool(turn.content.strip()) or (thoughts == "train" and bool(turn.thought))


def _of_turn(
    chat: Chat, before: tuple[Turn, ...], turn: Turn, thoughts: Thoughts, tally: Tally, suffix: str
) -> Iterator[ResponseText]:
    """What is trained on of a turn: its content, and before it the thought where that is asked for."""
    context: dict[str, Any] = {"messages": [turn.message() for turn in before]}
    if chat.tools:
        context["tools"] = list(chat.tools)
    content = turn.content.strip()
    said = turn.message()
    beside: dict[str, Any] = {key: said[key] for key in ("name", "tool_call_id") if key in said}
    if turn.thought and thoughts == "train":
        beside_thought = {"reply": {"content": content, **beside}, "part": "reasoning_content"}
        yield ResponseText(turn.thought.strip(), context | beside_thought, f"{suffix}/thought")
    if not content:
        return
    if content != turn.content:
        tally.notes["responses without the white space around them"] += 1
    if turn.thought:
        beside["reasoning_content"] = turn.thought
    if beside:
        context["reply"] = beside
    if turn.calls:
        context["goes_on"] = True
    yield ResponseText(content, context, suffix)
