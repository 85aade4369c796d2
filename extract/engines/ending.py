"""When a generated answer ends: the same rule for all engines, on token ids and their bytes.

Engines do not use stopping rules of their own, so an answer ends at the same place with each of them.
Stop texts are searched in bytes, since a character may be several tokens.
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
    """How answers are sampled, and what ends them.

    Args:
        section: Section `generate` of the run file.
        end_ids: Tokens that end an answer (end of sequence, end of turn) and are no text.
        tokens: Bytes of the tokenizer's tokens, by id.
    """

    section: GenerateSection
    end_ids: frozenset[int]
    tokens: tuple[bytes, ...]

    @cached_property
    def stop(self) -> tuple[bytes, ...]:
        """The stop texts as UTF-8 bytes."""
        return tuple(text.encode() for text in self.section.stop)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each token of an answer, by id."""
        return tuple(0 if i in self.end_ids else len(token) for i, token in enumerate(self.tokens))


class GrowingAnswer:
    """The tokens of one answer while it is generated."""

    def __init__(self, rules: AnswerRules) -> None:
        self._rules = rules
        self._overlap = max(map(len, rules.stop), default=0) - 1
        self._tail = b""
        self._has_bytes = False
        self.token_ids: list[int] = []

    def add(self, token_id: int) -> Finish | None:
        """Add the next token.

        Returns:
            How the answer ends with it; None if it continues.

        Raises:
            ModelError: The tokenizer has no such id.
        """
        rules = self._rules
        if token_id >= len(rules.tokens):
            raise ModelError(
                "the engine generated an id that the tokenizer does not have",
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

    These are the tokenizer's end of sequence and `eos_token_id` of generation_config.json, which for
    chat models has the end of a turn too, or of config.json if there is no such file.

    Args:
        folder: The model's folder.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids; empty where only its length ends an answer.

    Raises:
        ModelError: A file is damaged, or its `eos_token_id` is no id.
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
    listed: Collection[object] = value if isinstance(value, list) else [value]
    if value is None:
        return []
    ids = [i for i in listed if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    if len(ids) != len(listed):
        raise ModelError(
            "eos_token_id is neither an id nor a list of ids", where=where, got=repr(value)[:160]
        )
    return ids
