"""What stands before a text as tokens of one model, and the token that ends a chat's turn behind it."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING

from store_schema.errors import TokenizerError

if TYPE_CHECKING:
    from store_schema.tokenizer import SegmentTokenizer


class ContextReader:
    """Contexts of segments as one model reads them.

    A context is None for plain text; else JSON, {"prompt": text}, or {"messages": [...]} as
    `ChatTemplate` takes it.
    """

    def __init__(self, tokenizer: SegmentTokenizer) -> None:
        """Of a model's tokenizer."""
        self._tokenizer = tokenizer

    def read(self, context: str | None, *, where: str) -> tuple[tuple[int, ...], int | None]:
        """Tokens that stand before a text, and the one that ends its turn.

        Args:
            context: Of the segment.
            where: Segment, for messages.

        Returns:
            The tokens before it, and the first special token that the template writes behind a
            response, with nothing but white space before it; None for no chat, where the turn goes
            on, or where there is none.

        Raises:
            TokenizerError: Messages without a chat template, or with one that refuses them or renders
                them to nothing, or not with the response once.
            NoRowError: A token of `beyond_rows` among them.
        """
        tokenizer = self._tokenizer
        parsed = {} if context is None else json.loads(context)
        ids, end = tokenizer.bos_ids, None
        if "prompt" in parsed:
            ids = (*ids, *tokenizer.encode_text([parsed["prompt"]])[0])
        elif "messages" in parsed:
            around = tokenizer.chat.around(parsed, where=where)
            ids = self._rendered(around.before, where)
            if "goes_on" not in parsed and "part" not in parsed:
                end = self._turn_end(around.after)
        tokenizer.require_rows(ids, f"what stands before the text, {where}")
        return ids, end

    def prompt(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens that a model is asked with: as in `read`, but as its template begins an answer."""
        parsed = {} if context is None else json.loads(context)
        if "messages" not in parsed:
            return self.read(context, where=where)[0]
        ids = self._rendered(self._tokenizer.chat.prompt(parsed, where=where), where)
        self._tokenizer.require_rows(ids, f"what stands before the text, {where}")
        return ids

    @cached_property
    def turn_end(self) -> int | None:
        """The token that ends the assistant's turn in any chat; None where there is none."""
        probe = json.dumps({"messages": [{"role": "user", "content": "?"}]})
        try:
            return self.read(probe, where=self._tokenizer.name)[1]
        except TokenizerError:
            return None

    def _rendered(self, written: str, where: str) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        if tokenizer.puts_space:
            written = written.removesuffix(" ")  # the text's first token brings it
        ids = tuple(tokenizer.rendered_backend.encode(written, add_special_tokens=False).ids)
        if not ids:
            raise TokenizerError("the chat template renders the messages to nothing", where=where)
        own = ids[: len(tokenizer.bos_ids)] == tokenizer.bos_ids
        return ids if own or tokenizer.bos_rule != "always" else (*tokenizer.bos_ids, *ids)

    def _turn_end(self, after: str) -> int | None:
        table = self._tokenizer.vocabulary
        for i in self._tokenizer.rendered_backend.encode(after, add_special_tokens=False).ids:
            if i >= len(table) or (not table.special[i] and table.tokens[i].strip()):
                return None
            if table.special[i]:
                return int(i)
        return None
