"""The one form that chats of every published shape are read into.

What a chat template of today can be given: who says what, the reasoning before it, the tools that are
called in it, and the tools that there are.
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
    """A tool that the assistant calls.

    Args:
        name: Of the tool.
        arguments: By name; text where they are no JSON object.
        call_id: That the answer refers to.
    """

    name: str
    arguments: dict[str, Any] | str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one party says at a time.

    Args:
        role: "system", "user", "assistant", "tool", or a role of the data's own.
        content: Text; "" where there is none.
        thought: Reasoning before the content.
        calls: Tools that are called, behind the content.
        name: Of the speaker, or of the tool that answers.
        call_id: Of the call that a tool answers.
    """

    role: str
    content: str
    thought: str | None = None
    calls: tuple[Call, ...] = ()
    name: str | None = None
    call_id: str | None = None

    def message(self) -> dict[str, Any]:
        """The turn as chat templates and the corpus have it; without fields that are empty."""
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
        tools: JSON schemas as OpenAI has them: {"type": "function", "function": {...}}.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass
class Tally:
    """What of the inputs goes no further, and how rows were read; all counted.

    Args:
        unread: Fields with a value that no stage looks at: columns by name, fields of messages with
            "messages." before it.
        notes: What was read otherwise than one might think, by what.
        shapes: Rows by the shape that they were read in.
    """

    unread: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """What several counted."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def add(self, other: Tally) -> None:
        """Count what another counted."""
        self.unread.update(other.unread)
        self.notes.update(other.notes)
        self.shapes.update(other.shapes)
