"""How the chats of an input are read: `corpus.inputs[].chat` of the run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from store_schema.config import StrictModel

SAME_WORDS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot", "bard", "bing", "ai"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
ROLES = {word: role for role, words in SAME_WORDS.items() for word in words}
"""Roles by their names in published chats, in lower case."""
CALLING = ("function_call", "tool_call")
"""Names of roles whose text is a tool call, as JSON."""

RowFormat = Literal[
    "auto", "text", "messages", "pair", "alpaca", "dolly", "orca", "query", "qa", "preference"
]
"""Names of row formats; docs/extraction.md has an example of each."""


class ChatInput(StrictModel):
    """How rows and messages of an input are read, where the defaults do not fit."""

    format: RowFormat = "auto"
    """Row format. auto: for each row the first whose columns have values; the report has counts."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Roles by their names in the data, such as {customer: user, agent: assistant, act:
    function_call}."""
    role_key: str | None = Field(default=None, min_length=1)
    """Field of a message with its role. None: role, from, speaker or sender."""
    content_key: str | None = Field(default=None, min_length=1)
    """Field of a message with its content. None: content, value, text, parts or message."""
    thought_key: str | None = Field(default=None, min_length=1)
    """Field of a message with the reasoning before it. None: reasoning_content, thinking or
    reasoning."""

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, roles: dict[str, str]) -> dict[str, str]:
        unknown = sorted(
            {word for word in roles.values() if word.lower() not in (*ROLES, *CALLING)}
        )
        if unknown:
            known = ", ".join((*SAME_WORDS, CALLING[0]))
            raise ValueError(f"unknown role {', '.join(unknown)}: must be one of {known}")
        return roles
