"""What stands before a text as tokens of one model, and the token that ends a chat's turn behind it."""

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
    """What one model reads around a text."""

    ids: tuple[int, ...]
    """Tokens before it."""
    turn_end: int | None
    """The token that ends its turn: the first special token that the template writes behind a response,
    with nothing but white space before it; None for no chat, where the turn goes on, or where there is
    none."""
    opens: bool
    """Whether the text begins with the space that the tokenizer puts before a text by itself: not
    behind a chat that ends in something else than a space or a special token."""


@dataclass(frozen=True)
class ContextReader:
    """Contexts of segments as one model reads them.

    A context is None for plain text; else JSON, {"prompt": text}, or {"messages": [...]} as
    `ChatTemplate` takes it.

    Args:
        bos_ids: What stands before every text.
        always_bos: Whether it also stands before a chat whose template does not write it.
        puts_space: Whether the tokenizer puts a space of its own before every text.
        vocabulary: Of the model.
        chat: Its template.
        backend: Finds special tokens in what the template writes.
        read_text: Ids of plain text.
        require_rows: Refuses ids that the model has no row for; told where.
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
        """What stands before a text, and ends its turn.

        Args:
            context: Of the segment.
            where: Segment, for messages.

        Raises:
            TokenizerError: Messages without a chat template, or with one that refuses them or renders
                them to nothing, or not with the response once.
            NoRowError: A token of `beyond_rows` among them.
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
        self.require_rows(ids, f"what stands before the text, {where}")
        return ReadContext(ids, end, opens)

    def prompt(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens that a model is asked with: as in `read`, but as its template begins an answer."""
        parsed = {} if context is None else json.loads(context)
        if "messages" not in parsed:
            return self.read(context, where=where).ids
        ids, _ = self._rendered(self.chat.prompt(parsed, where=where), where)
        self.require_rows(ids, f"what stands before the text, {where}")
        return ids

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends the assistant's turn in any chat; None where there is none."""
        probe = json.dumps({"messages": [{"role": "user", "content": "?"}]})
        try:
            return self.read(probe, where="a chat").turn_end
        except TokenizerError:
            return None

    def _rendered(self, written: str, where: str) -> tuple[tuple[int, ...], bool]:
        """Tokens of what a template wrote before a text, and `ReadContext.opens`, asked of the
        tokenizer itself. A space at the end is the one that the text's first token brings."""
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
