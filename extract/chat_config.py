"""How the chats of an input are read: `corpus.inputs[].chat` of the run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from store_schema.config import StrictModel

RowFormat = Literal[
    "auto", "text", "messages", "pair", "alpaca", "dolly", "orca", "query", "qa", "preference"
]
"""Names of the shapes of a row; docs/extraction.md has an example of each."""


class ChatInput(StrictModel):
    """What the named shapes of a row and of a message do not know of this input."""

    format: RowFormat = "auto"
    """Shape of a row. auto: of each row the first whose columns are there; the report says which."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Who speaks, by the name that the data has for it: {customer: user, agent: assistant}."""
    role_key: str | None = Field(default=None, min_length=1)
    """Field of a message that says who speaks. None: role, from, speaker or sender."""
    content_key: str | None = Field(default=None, min_length=1)
    """Field of a message that holds what is said. None: content, value, text, parts or message."""
    thought_key: str | None = Field(default=None, min_length=1)
    """Field of a message that holds the reasoning before it. None: reasoning_content, thinking or
    reasoning."""
