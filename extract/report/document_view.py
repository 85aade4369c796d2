"""`corpus show`: a document as each model of a run reads it, with the trained part in colour."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from extract.corpus.corpus import corpus_location, iter_documents, open_corpus, read_documents
from extract.corpus.documents import Document
from launch.visible import visible
from store_schema.config import RunConfig
from store_schema.errors import InputError, TokenizerError
from store_schema.text.tokenizer import SegmentTokenizer

STYLES = {
    "context": {"dim": True},
    "response": {"fg": "green", "bold": True},
    "end of turn": {"fg": "yellow", "bold": True},
    "not read": {"dim": True, "italic": True},
}
TRAINED = ("response", "end of turn")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a document as one model reads it.

    Args:
        kind: A key of `STYLES`.
        text: The piece as text.
        num_tokens: Tokens of the model; None for text after the response, which it does not read.
    """

    kind: str
    text: str
    num_tokens: int | None


def find_documents(run: RunConfig, document_id: str) -> list[Document]:
    """The document with an id, or all responses of the chat with that id.

    Raises:
        MissingError: There is no corpus.
        InputError: The corpus has no such document.
    """
    location = corpus_location(run)
    table = read_documents(location, open_corpus(location))
    turns = f"{document_id}/turn-"
    documents = [
        document
        for document in iter_documents(table)
        if document.document_id == document_id or document.document_id.startswith(turns)
    ]
    if not documents:
        raise InputError("no such document", where=location.url, got=document_id)
    return documents


def parts_of(document: Document, tokenizer: SegmentTokenizer) -> list[Part]:
    """The parts of a document as a model reads them, in order.

    Raises:
        TokenizerError: Its template or tokenizer refuses the document.
    """
    where = f"document {document.document_id}, tokenizer of {tokenizer.name}"
    ids, end, opens = tokenizer.contexts.read(document.context, where=where)
    context = {} if document.context is None else json.loads(document.context)
    before, after = str(context.get("prompt", "")), ""
    if "messages" in context:
        tokenizer.chat.require_span(context, document.text, where=where)
        around = tokenizer.chat.around(context, where=where)
        before, after = around.before, around.after
    [(_, ends)] = tokenizer.read_texts([document.text], [where], [opens])
    parts = [Part("context", before, len(ids)), Part("response", document.text, len(ends))]
    if end is not None:
        written = tokenizer.vocabulary.written[end].decode(errors="replace")
        parts.append(Part("end of turn", written, 1))
        after = after.partition(written)[2]
    if after:
        parts.append(Part("not read", after, None))
    return parts


def shown(documents: Iterable[Document], tokenizers: Iterable[SegmentTokenizer]) -> Iterator[str]:
    """Lines that show documents in a terminal, as each tokenizer's model reads them."""
    models = list(tokenizers)
    names = [click.style(kind, **style) for kind, style in STYLES.items()]  # type: ignore[arg-type]
    yield f"{', '.join(names)}; trained on: {' and '.join(TRAINED)}"
    for document in documents:
        yield f"\n{document.document_id}  ({document.domain}, {document.split})"
        for tokenizer in models:
            try:
                parts = parts_of(document, tokenizer)
            except TokenizerError as error:
                yield f"-- {tokenizer.name}: {error.line()}"
                continue
            counts = [f"{part.kind} {part.num_tokens:,}" for part in parts if part.num_tokens]
            yield f"-- {tokenizer.name}, tokens: {', '.join(counts)}"
            yield "".join(_styled(part) for part in parts)


def objects(
    documents: Iterable[Document], tokenizers: Iterable[SegmentTokenizer]
) -> Iterator[dict[str, Any]]:
    """For JSON, each document as each tokenizer's model reads it, or why it cannot."""
    models = list(tokenizers)
    for document in documents:
        head = {"document": document.document_id, "domain": document.domain}
        for tokenizer in models:
            shown: dict[str, Any] = head | {"split": document.split, "model": tokenizer.name}
            try:
                shown["parts"] = [asdict(part) for part in parts_of(document, tokenizer)]
            except TokenizerError as error:
                shown["error"] = error.line()
            yield shown


def _styled(part: Part) -> str:
    text = visible(part.text, keep="\n\t", backslash="\\")  # a document must not move the cursor
    return click.style(text, **STYLES[part.kind])  # type: ignore[arg-type]
