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
"""Who speaks, by the names that published chats have for it, in lower case."""
CALLING = ("function_call", "tool_call")
"""Speakers whose text is the call of a tool, as JSON."""

RowFormat = Literal[
    "auto", "text", "messages", "pair", "alpaca", "dolly", "orca", "query", "qa", "preference"
]
"""Names of the shapes of a row; docs/extraction.md has an example of each."""


class ChatInput(StrictModel):
    """What the named shapes of a row and of a message do not know of this input."""

    format: RowFormat = "auto"
    """Shape of a row. auto: of each row the first whose columns are there; the report says which."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Who speaks, by the name that the data has for it: {customer: user, agent: assistant, act:
    function_call}."""
    role_key: str | None = Field(default=None, min_length=1)
    """Field of a message that says who speaks. None: role, from, speaker or sender."""
    content_key: str | None = Field(default=None, min_length=1)
    """Field of a message that holds what is said. None: content, value, text, parts or message."""
    thought_key: str | None = Field(default=None, min_length=1)
    """Field of a message that holds the reasoning before it. None: reasoning_content, thinking or
    reasoning."""

    @field_validator("roles")
    @classmethod
    def _somebody(cls, given: dict[str, str]) -> dict[str, str]:
        unknown = sorted(
            {word for word in given.values() if word.lower() not in (*ROLES, *CALLING)}
        )
        if unknown:
            known = ", ".join((*SAME_WORDS, CALLING[0]))
            raise ValueError(f"nobody is called {', '.join(unknown)}: one of {known}")
        return given
