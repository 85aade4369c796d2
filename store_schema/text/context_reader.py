"""Tokens of a segment's context in one model, and the token that ends its chat turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer

from store_schema.errors import TokenizerError
from store_schema.text.chat_template import ChatTemplate
from store_schema.text.vocabulary import Vocabulary


class ReadContext(NamedTuple):
    """The tokens around a segment's text in one model."""

    ids: tuple[int, ...]
    """Tokens before the text."""
    turn_end: int | None
    """The token that ends the chat turn: the first special token that the template writes after a
    response, after white space at most. None if it is no chat, the turn continues after the segment, or
    the template writes no such token."""
    opens: bool
    """Whether the text gets the space that the tokenizer puts before every text. It does not in a chat
    whose rendered context ends with anything but a space or a special token."""


@dataclass(frozen=True)
class ContextReader:
    """Tokenises contexts of segments for one model.

    A context is None for plain text, or JSON: {"prompt": text}, or {"messages": [...]} as in
    `ChatTemplate`.

    Args:
        bos_ids: Tokens before every text (BOS, or none).
        always_bos: Whether they are put before a chat too if its template does not write them.
        puts_space: Whether the tokenizer puts a space before every text.
        vocabulary: The model's vocabulary.
        chat: Its chat template.
        backend: Tokenizer that recognises special tokens in rendered text.
        read_text: Tokenises plain text.
        require_rows: Refuses ids that the model has no row for; its second argument is for messages.
    """

    bos_ids: tuple[int, ...]
    always_bos: bool
    puts_space: bool
    vocabulary: Vocabulary
    chat: ChatTemplate
    backend: Tokenizer
    read_text: Callable[[str], Sequence[int]]
    require_rows: Callable[[Sequence[int], str], None]

    def read(self, context: str | None, *, where: str) -> ReadContext:
        """The tokens around a segment's text.

        Args:
            context: The segment's context.
            where: The segment, for messages.

        Raises:
            TokenizerError: There is no chat template, or it refuses the messages, renders nothing, or
                does not render the response exactly once.
            NoRowError: A token that the model has no row for.
        """
        parsed = {} if context is None else json.loads(context)
        ids, end, opens = self.bos_ids, None, True
        if "prompt" in parsed:
            ids = (*ids, *self.read_text(parsed["prompt"]))
        elif "messages" in parsed:
            around = self.chat.around(parsed, where=where)
            ids, opens = self._rendered(around.before, where)
            if "goes_on" not in parsed and "part" not in parsed:
                end = self._turn_end(around.after)
        self.require_rows(ids, f"the context of {where}")
        return ReadContext(ids, end, opens)

    def prompt(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens of the prompt for generation: as in `read`, but a chat is rendered with the template's
        beginning of an answer."""
        parsed = {} if context is None else json.loads(context)
        if "messages" not in parsed:
            return self.read(context, where=where).ids
        ids, _ = self._rendered(self.chat.prompt(parsed, where=where), where)
        self.require_rows(ids, f"the context of {where}")
        return ids

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends an assistant turn, found with a test chat; None where there is none."""
        probe = json.dumps({"messages": [{"role": "user", "content": "?"}]})
        try:
            return self.read(probe, where="a chat").turn_end
        except TokenizerError:
            return None

    def _rendered(self, written: str, where: str) -> tuple[tuple[int, ...], bool]:
        """Tokens of rendered text before a response, and `ReadContext.opens`, which is found by
        tokenising an "a" after it. A space at the end is left to the response's first token."""
        opens = True
        if self.puts_space:
            table = self.vocabulary
            last = [table.tokens[i] for i in self._encode(f"{written}a")[-2:] if i < len(table)]
            opens = b"".join(last).endswith(b" a")
            written = written.removesuffix(" ") if opens else written
        ids = self._encode(written)
        if not ids:
            raise TokenizerError("the chat template renders the messages to nothing", where=where)
        own = ids[: len(self.bos_ids)] == self.bos_ids
        return (ids if own or not self.always_bos else (*self.bos_ids, *ids)), opens

    def _encode(self, written: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(written, add_special_tokens=False).ids)

    def _turn_end(self, after: str) -> int | None:
        table = self.vocabulary
        for i in self.backend.encode(after, add_special_tokens=False).ids:
            if i >= len(table) or (not table.special[i] and table.tokens[i].strip()):
                return None
            if table.special[i]:
                return int(i)
        return None
