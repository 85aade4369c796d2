"""The form that chats of all published formats are read into.

It has what today's chat templates take: roles and contents, reasoning, tool calls, and the available
tools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

ASSISTANT = "assistant"
TURNS_BEHIND = "turns behind the last response, not read"
CALLS_BEHIND = "tool calls behind the last response, not read"
CALLS_READ = "tool calls, read and not trained on"
THOUGHTS_LEFT_OUT = "thoughts left out"


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of the assistant.

    Args:
        name: Name of the tool.
        arguments: Arguments by name; text if they are not a JSON object.
        call_id: Id that the tool's answer refers to.
    """

    name: str
    arguments: dict[str, Any] | str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat.

    Args:
        role: "system", "user", "assistant", "tool", or another role in the data.
        content: Text; "" where there is none.
        thought: Reasoning before the content.
        calls: Tool calls after the content.
        name: Name of the speaker, or of the tool that answers.
        call_id: Id of the call that a tool answers.
    """

    role: str
    content: str
    thought: str | None = None
    calls: tuple[Call, ...] = ()
    name: str | None = None
    call_id: str | None = None

    def message(self) -> dict[str, Any]:
        """The turn as a dict for chat templates and the corpus, without empty fields."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thought is not None:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = [_call_message(call) for call in self.calls]
        if self.name is not None:
            message["name"] = self.name
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        return message


def _call_message(call: Call) -> dict[str, Any]:
    own = {} if call.call_id is None else {"id": call.call_id}
    return {
        **own,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns in order, and the tools that the assistant may call.

    Args:
        turns: At least one.
        tools: JSON schemas in OpenAI's form: {"type": "function", "function": {...}}.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass
class Tally:
    """Counts of what is not used of the inputs, and of how rows were read.

    Args:
        unread: Rows with a value in a field that is not used; columns by name, fields of messages with
            "messages." before the name.
        notes: Counts of other things left out or changed, by description.
        shapes: Rows by shape (`extract.chat.shapes`).
    """

    unread: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """The sum of several tallies."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        self.unread.update(other.unread)
        self.notes.update(other.notes)
        self.shapes.update(other.shapes)
