"""Split a chat into responses, each with its context for the chat template."""

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
        text: Its text, which is scored and trained on.
        context: Its context, see `store_schema.text.chat_template.ChatTemplate`.
        suffix: End of the document's id.
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
        response: The only response; None if every assistant turn is one.
        thoughts: What is done with reasoning.
        tally: Counts what is not trained on.
        where: The document, for messages.

    Raises:
        DocumentError: There is no response.
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
        responses = list(_of_turn(chat, read, response, thoughts, tally, ""))
    else:
        own = [i for i, turn in enumerate(chat.turns) if turn.role == ASSISTANT]
        tally.notes["opening turns, read and not trained on"] += bool(own) and own[0] == 0
        places = [i for i in own if i > 0 and _has_text(chat.turns[i], thoughts)]
        responses = [
            part
            for number, i in enumerate(places)
            for part in _of_turn(
                chat, chat.turns[:i], chat.turns[i], thoughts, tally, f"/turn-{number}"
            )
        ]
        if not responses:
            alone = chat.turns[0].role == ASSISTANT and bool(chat.turns[0].content)
            what = "no turn before the assistant's" if alone else "no assistant turn"
            raise DocumentError(
                what, reason="bad_messages", where=f"{where}, message 1" if alone else where
            )
        read, last = chat.turns[: places[-1]], chat.turns[places[-1]]
        tally.notes[TURNS_BEHIND] += len(chat.turns) - places[-1] - 1
    if not responses:
        raise DocumentError("empty text", reason="empty_text", where=where)
    tally.notes[CALLS_READ] += sum(len(turn.calls) for turn in read)
    tally.notes[CALLS_BEHIND] += len(last.calls)
    return responses


def count_left_out(response: Turn, tally: Tally) -> None:
    """Count everything but the text of a response without a chat before it: it is not used."""
    tally.notes[THOUGHTS_LEFT_OUT] += response.thought is not None
    tally.notes[CALLS_BEHIND] += len(response.calls)
    for name, value in (("name", response.name), ("tool_call_id", response.call_id)):
        if value is not None:
            tally.unread[f"messages.{name}"] += 1


def _has_text(turn: Turn, thoughts: Thoughts) -> bool:
    """Whether a turn has text to train on."""
    return bool(turn.content.strip()) or (thoughts == "train" and bool(turn.thought))


def _of_turn(
    chat: Chat, before: tuple[Turn, ...], turn: Turn, thoughts: Thoughts, tally: Tally, suffix: str
) -> Iterator[ResponseText]:
    """The responses of one turn: its content, and before it its thought if thoughts are trained on."""
    context: dict[str, Any] = {"messages": [turn.message() for turn in before]}
    if chat.tools:
        context["tools"] = list(chat.tools)
    content = turn.content.strip()
    message = turn.message()
    beside: dict[str, Any] = {k: message[k] for k in ("name", "tool_call_id") if k in message}
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
