"""When an answer ends: one rule for all engines, on token ids and the bytes they join to.

Engines know tokens only, so that an answer ends in the same place whichever of them wrote it. Stop
texts are looked for in bytes: a character may lie across tokens, and nothing has to be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from extract.config import GenerateSection
from store_schema.errors import ModelError
from store_schema.layout import Finish
from store_schema.model.lfs_pointer import require_no_pointer
from store_schema.model.models import model_config
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True)
class AnswerRules:
    """How answers are drawn, and what ends them.

    Args:
        section: The run file's `generate`.
        end_ids: Tokens that end an answer: end of sequence, end of turn. They stand for no text.
        tokens: Bytes by id of the tokenizer.
    """

    section: GenerateSection
    end_ids: frozenset[int]
    tokens: tuple[bytes, ...]

    @cached_property
    def stop(self) -> tuple[bytes, ...]:
        """UTF-8 bytes that end an answer."""
        return tuple(text.encode() for text in self.section.stop)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each token of an answer, by id."""
        return tuple(0 if i in self.end_ids else len(token) for i, token in enumerate(self.tokens))


class GrowingAnswer:
    """The tokens of one answer as they come."""

    def __init__(self, rules: AnswerRules) -> None:
        self._rules = rules
        self._overlap = max(map(len, rules.stop), default=0) - 1
        self._tail = b""
        self._has_bytes = False
        self.token_ids: list[int] = []

    def add(self, token_id: int) -> Finish | None:
        """Take the next token.

        Returns:
            How the answer ended with it; None while it goes on.

        Raises:
            ModelError: The tokenizer has no such id.
        """
        rules = self._rules
        if token_id >= len(rules.tokens):
            raise ModelError(
                "the engine drew an id that the tokenizer does not have",
                expected=f"below {len(rules.tokens)}",
                got=token_id,
            )
        self.token_ids.append(token_id)
        if token_id in rules.end_ids:
            return Finish.STOP if self._has_bytes else Finish.EMPTY
        token = rules.tokens[token_id]
        self._has_bytes |= bool(token)
        if rules.stop:
            text = self._tail + token
            if any(stop in text for stop in rules.stop):
                return Finish.STOP_TEXT
            self._tail = text[len(text) - min(self._overlap, len(text)) :]
        return Finish.LENGTH if len(self.token_ids) >= rules.section.max_tokens else None


def end_ids(folder: Path, tokenizer: SegmentTokenizer) -> frozenset[int]:
    """Tokens that end an answer of a model.

    The tokenizer's end of sequence, and those of generation_config.json, which for chat models
    names the end of a turn as well; config.json's where there is no such file.

    Args:
        folder: Of the model.
        tokenizer: Of the same model.

    Returns:
        Ids of the tokenizer; empty where nothing ends an answer but its length.

    Raises:
        ModelError: A file is not what it should be.
    """
    path = folder / "generation_config.json"
    config = _json_object(path) if path.is_file() else model_config(folder)
    named = _ids(config.get("eos_token_id"), where=path if path.is_file() else folder)
    if tokenizer.eos_id is not None:
        named = [*named, tokenizer.eos_id]
    return frozenset(i for i in named if i < tokenizer.vocab_size)


def _json_object(path: Path) -> dict[str, Any]:
    require_no_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("file is unreadable", where=path, got=str(error)[:160]) from error
    if not isinstance(content, dict):
        raise ModelError("file is not a JSON object", where=path, got=type(content).__name__)
    return content


def _ids(value: object, *, where: object) -> Sequence[int]:
    found: Collection[object] = value if isinstance(value, list) else [value]
    if value is None:
        return []
    ids = [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    if len(ids) != len(found):
        raise ModelError(
            "eos_token_id is neither an id nor a list of ids", where=where, got=repr(value)[:160]
        )
    return ids
