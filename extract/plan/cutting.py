"""Split all documents of a corpus into segments that fit every model, and leave out unusable ones.

Nearly all time is spent on tokenising. A document that fits is tokenised once by every model. A longer
one is tokenised as a whole only by its *lead*, the tokenizer with the most tokens by a sample; the
parts into which these tokens are split are then measured by every model (`extract.plan.segment`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from extract.config import MIN_TEXT_TOKENS
from extract.corpus.corpus import iter_documents
from extract.corpus.documents import Document
from extract.plan.segment import Cut, Encoder, Ends, Piece, UnfitCharacterError, cut_documents
from store_schema.errors import InputError, NoRowError, NoSpanError, TokenizerError
from store_schema.plan.plan import chat_of
from store_schema.text.context_reader import ReadContext
from store_schema.text.tokenizer import SegmentTokenizer

logger = logging.getLogger(__name__)

BATCH_BYTES = 1 << 22
"""Bytes of text in a batch: enough for tokenizers to use all cores."""
SAMPLE_SHARE, MAX_SAMPLE_BYTES = 16, 4096
"""A document's sample is a sixteenth of it, from its middle, at most MAX_SAMPLE_BYTES."""
SURE_BYTES_PER_TOKEN = 3
"""A document with fewer bytes per token of its budget is assumed to fit, without a sample."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A document with its context in each model.

    Args:
        row: Row in the table of documents.
        document: The document.
        around: Each model's tokens around the text.
    """

    row: int
    document: Document
    around: Sequence[ReadContext]

    @property
    def contexts(self) -> list[tuple[int, ...]]:
        """Each model's tokens before the text."""
        return [read.ids for read in self.around]

    @property
    def ends(self) -> list[int]:
        """Each model's number of tokens after the text (0 or 1)."""
        return [int(read.turn_end is not None) for read in self.around]


@dataclass
class CutCorpus:
    """Segments of all documents that are kept, without their text.

    Args:
        rows: Row in the table of documents of each kept document.
        cuts: Segments of each kept document.
        dropped: Number of documents left out, by reason.
        context_tokens: Tokens that each model reads besides the texts', by model. A chat turn that is a
            prefix of the next turn's input is not read by itself (`store_schema.text.prefixes`).
        unwritten: Number of parts of chats that a model's template leaves out, by model and kind.
    """

    rows: list[int] = field(default_factory=list)
    cuts: list[list[Cut]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    context_tokens: Counter[str] = field(default_factory=Counter)
    unwritten: dict[str, Counter[str]] = field(default_factory=dict)


def cut_corpus(
    table: pa.Table,
    tokenizers: Mapping[str, SegmentTokenizer],
    max_tokens: int,
    *,
    drop_unreadable: bool,
) -> CutCorpus:
    """Split all documents, a few megabytes at a time.

    Args:
        table: The documents.
        tokenizers: Tokenizers by model name.
        max_tokens: Tokens of a segment with its context, at most, in every model.
        drop_unreadable: Whether a document that a tokenizer cannot represent is dropped and counted
            (`corpus.on_bad: drop`) instead of refused.

    Raises:
        TokenizerError: A tokenizer cannot represent a document; names both and the first such byte.
        InputError: A single character takes more tokens than a segment may have.
    """
    for tokenizer in tokenizers.values():
        if tokenizer.beyond_rows:
            logger.warning("%s", _rowless(tokenizer))
    cut = CutCorpus()
    batch: list[_Measured] = []
    size = 0
    for row, document in enumerate(iter_documents(table)):
        try:
            measured = _Measured(row, document, _around(document, tokenizers))
        except TokenizerError as error:
            if not drop_unreadable:
                raise
            cut.dropped[_reason(error, "chat_template_refuses")] += 1
            continue
        sizes = zip(measured.contexts, measured.ends, strict=True)
        taken = [len(context) + end for context, end in sizes]
        if max_tokens - max(taken) < MIN_TEXT_TOKENS:
            cut.dropped["context_too_long"] += 1
            continue
        _count_unwritten(measured, tokenizers, cut)
        batch.append(measured)
        size += len(document.text)
        if size >= BATCH_BYTES:
            _cut_batch(batch, tokenizers, max_tokens, cut, drop_unreadable)
            batch, size = [], 0
    if batch:
        _cut_batch(batch, tokenizers, max_tokens, cut, drop_unreadable)
    return cut


def _rowless(tokenizer: SegmentTokenizer) -> str:
    beyond = tokenizer.beyond_rows
    shown = ", ".join(beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    line = (
        f"{tokenizer.name}: the model has no row for {len(beyond):,} of its tokenizer's tokens "
        f"({shown}): documents with one of them cannot be used"
    )
    return line + ("; it seems to be another model's" if tokenizer.is_of_other_model else "")


def _reason(error: TokenizerError, otherwise: str) -> str:
    """Key under which a dropped document is counted."""
    if isinstance(error, NoSpanError):
        return "no_response_in_template"
    return "token_without_row" if isinstance(error, NoRowError) else otherwise


def _around(document: Document, tokenizers: Mapping[str, SegmentTokenizer]) -> list[ReadContext]:
    """Each model's tokens around a document; checks that its template does not change the response."""
    around = []
    context = None if document.context is None else json.loads(document.context)
    for name, tokenizer in tokenizers.items():
        where = f"document {document.document_id}, tokenizer of {name}"
        if context is not None and "messages" in context:
            tokenizer.chat.require_span(context, document.text, where=where)
        around.append(tokenizer.contexts.read(document.context, where=where))
    return around


def _count_unwritten(
    measured: _Measured, tokenizers: Mapping[str, SegmentTokenizer], cut: CutCorpus
) -> None:
    document = measured.document
    context = None if document.context is None else json.loads(document.context)
    if context is None or "messages" not in context:
        return
    ends_turn = "goes_on" not in context and "part" not in context
    for (name, tokenizer), read in zip(tokenizers.items(), measured.around, strict=True):
        left = tokenizer.chat.unwritten(context, where=f"document {document.document_id}")
        if ends_turn and read.turn_end is None:
            left["ends of turns"] += 1
        cut.unwritten.setdefault(name, Counter()).update(left)


def _cut_batch(
    batch: Sequence[_Measured],
    tokenizers: Mapping[str, SegmentTokenizer],
    max_tokens: int,
    cut: CutCorpus,
    drop_unreadable: bool,
) -> None:
    ids = [measured.document.document_id for measured in batch]
    texts = [measured.document.text.encode() for measured in batch]
    budgets = [
        [max_tokens - len(c) - end for c, end in zip(measured.contexts, measured.ends, strict=True)]
        for measured in batch
    ]
    unreadable: dict[int, TokenizerError] | None = {} if drop_unreadable else None
    encoders = [
        encoder(tokenizer, ids, unreadable, [measured.around[m].opens for measured in batch])
        for m, tokenizer in enumerate(tokenizers.values())
    ]
    try:
        cuts = cut_documents(texts, budgets, encoders, leads(texts, budgets, tokenizers.values()))
    except UnfitCharacterError as error:
        raise InputError(
            "a single character takes more tokens than a segment may have",
            where=f"document {ids[error.piece.document]}, byte {error.piece.start}",
            expected=f"at most {budgets[error.piece.document]}",
            got=dict(zip(tokenizers, error.num_tokens, strict=True)),
            hint="raise plan.max_tokens",
        ) from error
    before: _Measured | None = None
    for number, measured in enumerate(batch):
        if unreadable and number in unreadable:
            cut.dropped[_reason(unreadable[number], "tokenizer_changes_text")] += 1
            continue
        cut.rows.append(measured.row)
        *first, last = cuts[number]
        rows = tuple(n + end for n, end in zip(last.num_tokens, measured.ends, strict=True))
        shared = (
            [0] * len(tokenizers) if before is None else _shared(before, measured, cut.cuts[-1])
        )
        cut.cuts.append([*first, replace(last, num_tokens=rows)])
        for name, context, without in zip(tokenizers, measured.contexts, shared, strict=True):
            cut.context_tokens[name] += len(context) * len(cuts[number]) - without
        before = measured


def _shared(turn: _Measured, following: _Measured, cuts: Sequence[Cut]) -> list[int]:
    """Tokens of a chat turn that each model need not read, since the next turn's input begins with
    them.

    Args:
        turn: A chat turn, or any other document.
        following: The document after it.
        cuts: The turn's segments; a turn with several is read by itself.
    """
    chat = chat_of(turn.document.document_id)
    if chat is None or chat != chat_of(following.document.document_id) or len(cuts) > 1:
        return [0] * len(turn.contexts)
    shared = []
    for m, (own, theirs) in enumerate(zip(turn.contexts, following.contexts, strict=True)):
        size = len(own) + cuts[-1].num_tokens[m]
        shared.append(size if theirs[: len(own)] == own and size < len(theirs) else 0)
    return shared


def encoder(
    tokenizer: SegmentTokenizer,
    ids: Sequence[str],
    unreadable: dict[int, TokenizerError] | None = None,
    opens: Sequence[bool] | None = None,
) -> Encoder:
    """A tokenizer as `cut_documents` uses it; every piece's tokens are checked to join to it.

    Args:
        tokenizer: One model's tokenizer.
        ids: Document ids of the batch, for messages.
        unreadable: If None, the error of a piece that the tokenizer cannot represent is raised.
            Otherwise it is put here, by document, and the piece has no tokens; the document must be
            left out.
        opens: `ReadContext.opens` of each document; None where no document has a context.
    """

    def read(pieces: Sequence[Piece]) -> list[Ends]:
        where = [
            f"document {ids[piece.document]} from byte {piece.start}, tokenizer of {tokenizer.name}"
            for piece in pieces
        ]
        texts = [piece.text for piece in pieces]
        opening = None if opens is None else [opens[piece.document] for piece in pieces]
        return [ends for _, ends in tokenizer.read_texts(texts, where, opening)]

    def read_usable(pieces: Sequence[Piece]) -> list[Ends]:
        try:
            return read(pieces)
        except TokenizerError as error:
            if unreadable is None:
                raise
            if len(pieces) == 1:
                unreadable.setdefault(pieces[0].document, error)
                return [np.empty(0, np.uint32)]
        return [ends for piece in pieces for ends in read_usable([piece])]

    return read_usable


def leads(
    texts: Sequence[bytes], budgets: Sequence[Sequence[int]], tokenizers: Iterable[SegmentTokenizer]
) -> list[int | None]:
    """The lead of each document: the tokenizer that needs the most segments, by a sample.

    Args:
        texts: UTF-8 bytes of each document.
        budgets: [documents][tokenizers] tokens of a segment's text, at most.
        tokenizers: The tokenizers of all models.

    Returns:
        Index of the tokenizer; None for documents that seem to fit all budgets.
    """
    long = [
        i
        for i, (data, budget) in enumerate(zip(texts, budgets, strict=True))
        if len(data) > SURE_BYTES_PER_TOKEN * min(budget)
    ]
    samples = [_sample(texts[i]) for i in long]
    counts = zip(*(map(len, t.encode_text(samples)) for t in tokenizers), strict=True)
    lead: list[int | None] = [None] * len(texts)
    for i, sample, numbers in zip(long, samples, counts, strict=False):
        shares = [number / most for number, most in zip(numbers, budgets[i], strict=True)]
        if max(shares) * len(texts[i]) > len(sample.encode()):
            lead[i] = shares.index(max(shares))
    return lead


def _sample(data: bytes) -> str:
    """Text from the middle of a document, without characters that are cut at its ends."""
    size = min(len(data) // SAMPLE_SHARE, MAX_SAMPLE_BYTES)
    start = (len(data) - size) // 2
    return data[start : start + size].decode(errors="ignore")
