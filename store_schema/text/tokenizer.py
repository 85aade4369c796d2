"""The tokenizer of one model, as every stage uses it: from segments to tokens and their byte ends."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from store_schema.config import BosRule, ModelRef, TemplateSettings
from store_schema.errors import NoRowError, TokenizerError
from store_schema.fingerprint import canonical_json, canonical_list, fingerprint_of
from store_schema.model.class_config import model_rows
from store_schema.model.models import resolve_tokenizer
from store_schema.plan.plan import Segment
from store_schema.text.chat_template import ChatTemplate
from store_schema.text.context_reader import ContextReader
from store_schema.text.encoded import EncodedSegment as EncodedSegment
from store_schema.text.piece_bytes import vocabulary_of
from store_schema.text.space_prefix import TextTokens, read_without_space
from store_schema.text.tokenizer_class import Tokens, around_a_text
from store_schema.text.tokenizer_files import (
    TOKENIZER_FILE,
    files_signature,
    without_collector,
)
from store_schema.text.tokenizer_save import make_faithful, write_start
from store_schema.text.tokenizer_source import (
    FolderSource,
    ObjectSource,
    Source,
    converted,
    text_rules,
)
from store_schema.text.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

_MOST_BEYOND = 0.05
"""Largest share of a tokenizer's tokens that a published model has no row for."""

_OPEN: WeakValueDictionary[Any, SegmentTokenizer] = WeakValueDictionary()
"""Tokenizers in use in this process, by folder, files and settings."""


class SegmentTokenizer:
    """Tokenizer of one model.

    Ids and bytes are those of tokenizer.json. The text of a segment is tokenised apart from its
    context, so that it starts at a token boundary in every model. Special tokens written out in the
    text are tokenised as text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        bos: BosRule = "auto",
        template: TemplateSettings | None = None,
    ) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: A tokenizer with a `tokenizers` backend, which is copied.
            name: Name of the model, for messages.
            bos: See `ModelRef`.
            template: See `ModelRef`; None for its defaults.

        Raises:
            TokenizerError: It has no `tokenizers` backend, the bytes of its pieces are not known, or
                `bos` needs a token that it does not have.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(
                "tokenizer has no fast backend",
                where=name,
                got=type(tokenizer).__name__,
                hint="save it as tokenizer.json first",
            )
        settings = template or TemplateSettings()
        self._begin(ObjectSource(tokenizer), name=name, bos=bos, template=settings)

    @classmethod
    def load(cls, ref: ModelRef, *, name: str) -> SegmentTokenizer:
        """Load the tokenizer of `ref`, or return it if it is in use and its files are unchanged.

        Args:
            ref: The model in the run file.
            name: Name of the model, for messages.

        Raises:
            ModelError: The model has no tokenizer, or it cannot be loaded.
            TokenizerError: See the constructor.
        """
        folder = resolve_tokenizer(ref, name=name)
        asked = (ref.bos, ref.trust_remote_code, ref.template.model_dump_json())
        key = (folder.resolve(), files_signature(folder), asked)
        known = _OPEN.get(key)
        if known is None:
            source: Source
            if (folder / TOKENIZER_FILE).exists():
                source = FolderSource(folder, name=name, trust_remote_code=ref.trust_remote_code)
            else:
                source = converted(folder, ref, name=name)
            known = cls.__new__(cls)
            with without_collector():
                known._begin(source, name=name, bos=ref.bos, template=ref.template)
            known.limit_vocabulary(model_rows(ref))
            _OPEN[key] = known
        if known.name == name:
            return known
        other = copy.copy(known)
        other.name = name
        return other

    def _begin(
        self, source: Source, *, name: str, bos: BosRule, template: TemplateSettings
    ) -> None:
        self.name = name
        self.bos_rule = bos
        self._source = source
        self._settings = template
        self._around = around_a_text(source.whole)
        self.bos_ids: tuple[int, ...] = tuple(index for _, index in self._start())
        """Tokens before every text: BOS, or none."""
        self.beyond_rows: tuple[str, ...] = ()
        """Tokens that the model has no row for: not in the vocabulary, and refused in a text."""
        self.vocabulary: Vocabulary = vocabulary_of(source.whole, where=name)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The model's chat template, with the run file's settings."""
        return ChatTemplate(self.roles, self._settings)

    @property
    def roles(self) -> Any:
        """The transformers tokenizer, for names of special tokens and the chat template; not for
        ids."""
        return self._source.roles

    def limit_vocabulary(self, rows: int | None) -> None:
        """Remove ids that the model has no row for from the vocabulary.

        Published tokenizers have such ids (an image token, an added padding token). They are in no
        store and no alignment; a text with one of them is refused.

        Args:
            rows: Rows of the model; None if not known. More rows than ids are padding.
        """
        size = len(self.vocabulary)
        if rows is not None and rows < size:
            written = (self._source.whole.id_to_token(i) for i in range(rows, size))
            self.beyond_rows = tuple(token for token in written if token is not None)
            self.vocabulary = self.vocabulary.first(rows)

    def require_rows(self, ids: Sequence[int], where: str) -> None:
        """Refuse ids that the model has no row for.

        Raises:
            NoRowError: There is such an id; names the first.
        """
        if not self.beyond_rows or not ids or max(ids) < self.vocab_size:
            return
        reached = next(i for i in ids if i >= self.vocab_size)
        hint = "remove it from the text, or leave such documents out with `corpus.on_bad: drop`"
        if self.is_of_other_model:
            hint = (
                f"{len(self.beyond_rows):,} of the tokenizer's tokens have no row, so it seems to be "
                "another model's: put the model's own tokenizer files into its folder"
            )
        raise NoRowError(
            "the model has no row for a token of the text",
            where=where,
            expected=f"ids below {self.vocab_size}, the rows of the model",
            got=f"token id {reached}, {self._source.whole.id_to_token(reached)!r}",
            hint=hint,
        )

    @property
    def is_of_other_model(self) -> bool:
        """Whether so many tokens have no row that the tokenizer must be another model's."""
        beyond = len(self.beyond_rows)
        return beyond > _MOST_BEYOND * (self.vocab_size + beyond)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of everything that determines ids, bytes and the tokens before a text."""
        template = self.chat.text
        # False in place of a removed option, so that existing stores keep their fingerprints.
        options: list[Any] = [list(self.bos_ids), self.bos_rule == "always", False]
        if template is not None and self.puts_space:  # older stores had a space before all answers
            options.append("no space behind a line's end")
        settings = self._settings.model_dump(mode="json", exclude={"file"}, exclude_defaults=True)
        if template is not None and settings:  # nothing by default, as in older stores
            options.append(settings)
        return self._fingerprint_with(canonical_json(template), canonical_json(options))

    @property
    def rules_fingerprint(self) -> str:
        """Fingerprint of everything that determines ids and bytes of a text without its context."""
        return self._fingerprint_with()

    def _fingerprint_with(self, *more: bytes) -> str:
        with without_collector():
            return fingerprint_of(canonical_list([*text_rules(self._source), *more]))

    def warn_of_class(self) -> None:
        """Log a warning if AutoTokenizer tokenises differently than this tokenizer."""
        class_name, differences = self._source.differences(self._start())
        if differences:
            _log.warning(
                "tokenizer of %s: transformers (%s) tokenises %s differently than %s and the run's BOS "
                "rule, which are used here",
                self.name, class_name, ", ".join(differences), TOKENIZER_FILE,
            )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer so that AutoTokenizer tokenises as here, with the same BOS rule.

        Args:
            folder: The model's folder; its config.json, if there is one, influences which class
                AutoTokenizer chooses.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._source.save(folder)
        own, end = self._around
        if self._start() != own:
            write_start(folder, self._start(), end)
        make_faithful(folder)
        if self._settings.file is not None:
            (folder / "chat_template.jinja").write_text(self.chat.text, encoding="utf-8")

    def _start(self) -> Tokens:
        """Tokens before a text: by the run file's `bos`, else tokenizer_config.json, else
        tokenizer.json."""
        own, _ = self._around
        wanted = {"always": True, "never": False}.get(self.bos_rule, self._source.adds_bos)
        if wanted is None or wanted == bool(own):
            return own
        if self.bos_rule == "never":
            return ()
        # A missing token must not be looked up as "None", which is a piece of many vocabularies.
        token = getattr(self.roles, "bos_token", None)
        index = None if token is None else self._source.whole.token_to_id(str(token))
        bos = () if index is None else ((str(token), index),)
        if not wanted:
            return () if own == bos else own
        if not bos and self.bos_rule == "always":
            raise TokenizerError(
                "the tokenizer has no BOS token to put before a text",
                where=self.name,
                expected="a `bos_token` for `bos: always`",
                got="none" if token is None else f"{str(token)!r}, which it does not have",
                hint="remove the option, or name a `bos_token` in its tokenizer_config.json",
            )
        return bos

    def warn_of_missing_bos(self) -> None:
        """Log a warning if the model's files ask for BOS before a text but have no such token."""
        if self.bos_rule == "auto" and self._source.adds_bos and not self.bos_ids:
            _log.warning(
                "tokenizer of %s: its files say `add_bos_token: true` but name no `bos_token` that it "
                "has: nothing is put before a text",
                self.name,
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids: all ids that the model can read are below it."""
        return len(self.vocabulary)

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token; None where there is none."""
        return self._id_of(getattr(self.roles, "eos_token", None))

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-sequence token, whether or not it is put before texts; None for none."""
        return self._id_of(getattr(self.roles, "bos_token", None))

    def _id_of(self, token: object) -> int | None:
        index = None if token is None else self._source.whole.token_to_id(str(token))
        return None if index is None or index >= self.vocab_size else int(index)

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, without special tokens; special tokens in the text are text.

        Unlike `read_texts` it checks nothing.
        """
        batch = self._source.text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def read_texts(
        self, texts: Sequence[str], where: Sequence[str], opens: Sequence[bool] | None = None
    ) -> list[TextTokens]:
        """Ids of plain texts and byte ends of their tokens, checked.

        Args:
            texts: The texts.
            where: Document or segment of each, for messages.
            opens: `ReadContext.opens` of each; None where no text has a context.

        Returns:
            Ids, and the byte after each token [N] uint32, of each text.

        Raises:
            TokenizerError: Tokens do not join to a text.
            NoRowError: A text has a token that the model has no row for.
        """
        if opens is None or all(opens) or not self.puts_space:
            return self._read_texts(texts, where)
        return read_without_space(texts, where, opens, self._read_texts)

    def _read_texts(self, texts: Sequence[str], where: Sequence[str]) -> list[TextTokens]:
        read_ids = self.encode_text(texts)
        for ids, place in zip(read_ids, where, strict=True):
            self.require_rows(ids, place)
        return [
            (ids, self.vocabulary.byte_ends(ids, text.encode(), where=place))
            for ids, text, place in zip(read_ids, texts, where, strict=True)
        ]

    def token_ends(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Byte ends of the tokens of plain texts, checked: see `read_texts`."""
        where = [f"text, tokenizer of {self.name}"] * len(texts)
        return [ends for _, ends in self.read_texts(texts, where)]

    def encode(self, segments: Sequence[Segment]) -> list[EncodedSegment]:
        """Tokens of segments, with the token that ends a chat turn after its last segment.

        Raises:
            TokenizerError: Tokens of a segment do not join to its text, or a chat has no template.
        """
        encoded = []
        places = [f"segment {s.segment_id}, tokenizer of {self.name}" for s in segments]
        pairs = zip(segments, places, strict=True)
        around = [self.contexts.read(s.context, where=where) for s, where in pairs]
        read = self.read_texts([s.text for s in segments], places, [a.opens for a in around])
        for segment, (ids, ends), reads in zip(segments, read, around, strict=True):
            ends_turn = reads.turn_end is not None and segment.ends_document
            if reads.turn_end is not None and ends_turn:
                ids, ends = [*ids, reads.turn_end], np.append(ends, ends[-1])
            encoded.append(EncodedSegment(reads.ids, np.asarray(ids, np.uint32), ends, ends_turn))
        return encoded

    @cached_property
    def contexts(self) -> ContextReader:
        """Tokenises the contexts of segments."""
        return ContextReader(
            self.bos_ids, self.bos_rule == "always", self.puts_space, self.vocabulary, self.chat,
            self._source.whole, lambda text: self.encode_text([text])[0], self.require_rows,
        )  # fmt: skip

    def context_ids(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens before a text: see `ContextReader.read`."""
        return self.contexts.read(context, where=where).ids

    @cached_property
    def puts_space(self) -> bool:
        """Whether it puts a space before every text (SentencePiece's dummy prefix)."""
        [ids] = self.encode_text(["a"])
        return b"".join([self.vocabulary.tokens[i] for i in ids]) == b" a"
