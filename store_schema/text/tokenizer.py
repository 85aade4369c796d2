"""One tokenizer of a run, as every stage uses it: segments in, proved tokens and byte ends out."""

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
from store_schema.fingerprint import fingerprint
from store_schema.model.models import model_rows, resolve_tokenizer
from store_schema.plan.plan import Segment
from store_schema.text.behind import TextTokens, read_behind
from store_schema.text.chat_template import ChatTemplate
from store_schema.text.context_reader import ContextReader
from store_schema.text.encoded import EncodedSegment as EncodedSegment
from store_schema.text.piece_bytes import vocabulary_of
from store_schema.text.specials import specials_out_of_reach
from store_schema.text.tokenizer_class import Tokens, around_a_text
from store_schema.text.tokenizer_files import TOKENIZER_FILE, files_signature
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
"""Share of a tokenizer's tokens that published models have no row for, at the very most."""

_OPEN: WeakValueDictionary[Any, SegmentTokenizer] = WeakValueDictionary()
"""Tokenizers in use in this process by what they were read from."""


class SegmentTokenizer:
    """Tokenizer of one model.

    Ids and bytes are those of tokenizer.json. The text of a segment is tokenised by itself, so that
    it starts at a token boundary for every model whatever stands before it; a space that the tokenizer
    puts before a text is there where it would put one. Special tokens written out in the text are text.
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
            tokenizer: With a `tokenizers` backend, which is copied.
            name: Of the model, for messages.
            bos: As in `ModelRef`.
            template: As in `ModelRef`; None for its defaults.

        Raises:
            TokenizerError: It has no `tokenizers` backend, its bytes are not known, or `bos` asks for
                a token that it does not have.
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
        """Load the tokenizer of `ref`; one that is in use and unchanged is not read again.

        Args:
            ref: Folder or hub name.
            name: Of the model, for messages.

        Raises:
            ModelError: The folder or hub name has no tokenizer that loads.
            TokenizerError: As for the constructor.
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
            known._begin(source, name=name, bos=ref.bos, template=ref.template)
            known.end_at(model_rows(ref))
            _OPEN[key] = known
        if known.name == name:
            return known
        other = copy.copy(known)
        other.name = name
        return other

    def _begin(
        self, source: Source, *, name: str, bos: BosRule, template: TemplateSettings
    ) -> None:
        backend = source.open()
        self.name = name
        self.bos_rule = bos
        self._source = source
        self._settings = template
        self._around = around_a_text(backend)
        self._whole = backend
        self.bos_ids: tuple[int, ...] = tuple(index for _, index in self._start())
        """What stands before every text."""
        self.beyond_rows: tuple[str, ...] = ()
        """Tokens that the model has no row for: in no table, and refused where a text has them."""
        self.vocabulary: Vocabulary = vocabulary_of(backend, where=name)
        is_bpe = type(backend.model).__name__ == "BPE"
        self._text = backend if is_bpe else specials_out_of_reach(backend)
        self._text.post_processor = None
        self._text.encode_special_tokens = True

    @cached_property
    def rendered_backend(self) -> Tokenizer:
        """Finds special tokens in a rendered chat; a run of plain text never needs it."""
        return self._source.open() if self._whole is self._text else self._whole

    @cached_property
    def chat(self) -> ChatTemplate:
        """The model's chat template, asked as the run file says."""
        return ChatTemplate(self.roles, self._settings)

    @property
    def roles(self) -> Any:
        """transformers' object, for special tokens by role and chat template; not for ids."""
        return self._source.roles

    def end_at(self, rows: int | None) -> None:
        """End the vocabulary where the model's rows end: ids beyond are no tokens of the model.

        Published tokenizers have such ids (an image token, a padding token that someone added). All
        that goes by the vocabulary, stores and alignment too, never sees them; a text that reaches
        one is refused, with the token's name.

        Args:
            rows: Of the model; None where they are not known. More rows than ids are padding.
        """
        size = len(self.vocabulary)
        if rows is not None and rows < size:
            written = (self._whole.id_to_token(i) for i in range(rows, size))
            self.beyond_rows = tuple(token for token in written if token is not None)
            self.vocabulary = self.vocabulary.first(rows)

    def require_rows(self, ids: Sequence[int], where: str) -> None:
        """Refuse ids that the model has no row for.

        Raises:
            NoRowError: Names the first.
        """
        if not self.beyond_rows or not ids or max(ids) < self.vocab_size:
            return
        reached = next(i for i in ids if i >= self.vocab_size)
        hint = "take it out of the text, or leave such documents out with `corpus.on_bad: drop`"
        if self.seems_anothers:
            hint = (
                f"{len(self.beyond_rows):,} of the tokenizer's tokens have no row, it seems to belong "
                "to another model: put the model's own tokenizer files into its folder"
            )
        raise NoRowError(
            "the model has no row for a token of the text",
            where=where,
            expected=f"ids below {self.vocab_size}, the rows of the model",
            got=f"token id {reached}, {self._whole.id_to_token(reached)!r}",
            hint=hint,
        )

    @property
    def seems_anothers(self) -> bool:
        """Whether so many tokens have no row that the tokenizer cannot be the model's own."""
        beyond = len(self.beyond_rows)
        return beyond > _MOST_BEYOND * (self.vocab_size + beyond)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all that decides ids, bytes and what stands before a text."""
        template = self.chat.text
        # False: nothing stands there any more; stores and plans keep their fingerprints.
        options: list[Any] = [list(self.bos_ids), self.bos_rule == "always", False]
        if template is not None and self.puts_space:  # in older stores one stood before all answers
            options.append("no space behind a line's end")
        asked = self._settings.model_dump(mode="json", exclude={"file"}, exclude_defaults=True)
        if template is not None and asked:  # nothing by default, as in older stores
            options.append(asked)
        return fingerprint([*text_rules(self._source, self._whole), template, options])

    @property
    def rules_fingerprint(self) -> str:
        """Fingerprint of what decides ids and bytes of a text, whatever stands around it."""
        return fingerprint(text_rules(self._source, self._whole))

    def warn_of_class(self) -> None:
        """Say in one line what AutoTokenizer reads otherwise in the model's folder, if anything."""
        picked, found = self._source.differences(self._start())
        if found:
            _log.warning(
                "tokenizer of %s: transformers (%s) reads %s otherwise than %s and the run's BOS rule "
                "say; the run goes by the latter",
                self.name, picked, ", ".join(found), TOKENIZER_FILE,
            )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer so that AutoTokenizer reads it as here, BOS and all.

        Args:
            folder: Of the model; its config.json, where there is one, decides what AutoTokenizer
                makes of tokenizer files.
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
        """What stands before a text: by the tokenizer's own rule, by its settings, or as asked."""
        own, _ = self._around
        wanted = {"always": True, "never": False}.get(self.bos_rule, self._source.adds_bos)
        if wanted is None or wanted == bool(own):
            return own
        if self.bos_rule == "never":
            return ()
        # None is no token, whatever its spelling is: "None" is a piece of many vocabularies.
        token = getattr(self.roles, "bos_token", None)
        index = None if token is None else self._whole.token_to_id(str(token))
        bos = () if index is None else ((str(token), index),)
        if not wanted:
            return () if own == bos else own
        if not bos and self.bos_rule == "always":
            raise TokenizerError(
                "the tokenizer has no BOS token to put before a text",
                where=self.name,
                expected="a `bos_token` for `bos: always`",
                got="none" if token is None else f"{str(token)!r}, which is no token of it",
                hint="take the option out, or name a `bos_token` in its tokenizer_config.json",
            )
        return bos

    def warn_of_missing_bos(self) -> None:
        """Say in one line that the model's files ask for BOS before a text and name no such token."""
        if self.bos_rule == "auto" and self._source.adds_bos and not self.bos_ids:
            _log.warning(
                "tokenizer of %s: its files say `add_bos_token: true` but name no `bos_token` that it "
                "has: nothing is put before a text",
                self.name,
            )

    @property
    def vocab_size(self) -> int:
        """Ids that the model can be fed are below it."""
        return len(self.vocabulary)

    @property
    def eos_id(self) -> int | None:
        """End of sequence, if any."""
        return self._id_of(getattr(self.roles, "eos_token", None))

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence, if there is one, whether or not it stands before every text."""
        return self._id_of(getattr(self.roles, "bos_token", None))

    def _id_of(self, token: object) -> int | None:
        found = None if token is None else self._whole.token_to_id(str(token))
        return None if found is None or found >= self.vocab_size else int(found)

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, no special tokens added, specials in the text taken as text.

        Not proved, and `beyond_rows` not refused: what `read_texts` gives is both.
        """
        batch = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def read_texts(
        self, texts: Sequence[str], where: Sequence[str], opens: Sequence[bool] | None = None
    ) -> list[TextTokens]:
        """Ids of plain texts as `encode_text` gives them, and the byte end of each token, proved.

        Args:
            texts: Each read whole.
            where: Document or segment of each, for messages.
            opens: `ReadContext.opens` of each; None where nothing stands before the texts.

        Raises:
            TokenizerError: Tokens do not join to a text.
            NoRowError: A text reaches a token of `beyond_rows`.
        """
        if opens is None or all(opens) or not self.puts_space:
            return self._read_texts(texts, where)
        return read_behind(texts, where, opens, self._read_texts)

    def _read_texts(self, texts: Sequence[str], where: Sequence[str]) -> list[TextTokens]:
        read_ids = self.encode_text(texts)
        for ids, place in zip(read_ids, where, strict=True):
            self.require_rows(ids, place)
        return [
            (ids, self.vocabulary.byte_ends(ids, text.encode(), where=place))
            for ids, text, place in zip(read_ids, texts, where, strict=True)
        ]

    def token_ends(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Proved byte ends of the tokens of plain texts."""
        where = [f"text, tokenizer of {self.name}"] * len(texts)
        return [ends for _, ends in self.read_texts(texts, where)]

    def encode(self, segments: Sequence[Segment]) -> list[EncodedSegment]:
        """Segments as this model reads them, the end of a chat's turn behind its response.

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
        """Reads what stands before a text."""
        return ContextReader(
            self.bos_ids, self.bos_rule == "always", self.puts_space, self.vocabulary, self.chat,
            self.rendered_backend, lambda text: self.encode_text([text])[0], self.require_rows,
        )  # fmt: skip

    def context_ids(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens that stand before a text: see `ContextReader.read`."""
        return self.contexts.read(context, where=where).ids

    @cached_property
    def puts_space(self) -> bool:
        """Whether it puts a space of its own before every text (SentencePiece's prefix)."""
        [ids] = self.encode_text(["a"])
        return b"".join([self.vocabulary.tokens[i] for i in ids]) == b" a"
