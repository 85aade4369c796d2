"""Documents and counts while inputs are read, for `corpus build` and for a look at the first rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields

import pyarrow as pa

from extract.chat.form import Tally
from extract.config import CorpusInput, CorpusSection
from extract.corpus.documents import (
    Document,
    columns_text,
    columns_wanted,
    row_documents,
    row_id,
    row_split,
)
from extract.corpus.inputs import InputFile, Row, column_names, read_rows, unread_columns
from extract.document_error import DocumentError
from store_schema.fingerprint import canonical_json

DOCUMENT_SCHEMA = pa.schema([(item.name, pa.string()) for item in fields(Document)])


@dataclass
class Collected:
    """Documents and counts while the inputs are read."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    documents: Counter[tuple[str, str]] = field(default_factory=Counter)
    size_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    taken_as: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_file: Counter[int] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    """The first dropped row's error line, by reason."""

    def add(self, documents: Sequence[Document]) -> None:
        """Add documents, in order."""
        columns = list(zip(*map(astuple, documents), strict=True))
        self.batches.append(pa.record_batch([list(c) for c in columns], schema=DOCUMENT_SCHEMA))
        for document in documents:
            self.digest.update(document_bytes(document))
            key = (document.split, document.domain)
            self.documents[key] += 1
            self.size_bytes[key] += len(document.text.encode())


def checked_documents(
    section: CorpusSection,
    files: Sequence[tuple[CorpusInput, InputFile]],
    seed: int,
    collected: Collected,
    rows_of: Callable[[InputFile, Iterable[str]], Iterator[Row]] = read_rows,
) -> Iterator[tuple[int, Document]]:
    """Usable documents with the index of their file. A bad one is counted, or raises an error.

    Args:
        section: Section `corpus` of the run file.
        files: Files, each with its input.
        seed: The run's seed.
        collected: Counts what is left out and dropped.
        rows_of: Reads a file's rows.
    """
    for index, (entry, file) in enumerate(files):
        wanted = columns_wanted(entry)
        whole = collected.tallies[index] = Tally()
        for place, automatic, row in rows_of(file, wanted):
            tally = Tally()
            try:
                if isinstance(row, DocumentError):
                    raise row
                document_id = row_id(
                    row, entry, automatic=automatic, file_name=file.name, place=place
                )
                named = row_split(row, entry, section, doc=document_id, seed=seed)
                split = section.split_name(named)
                if split not in section.wanted_splits:
                    collected.left_out[split] += 1
                    continue
                documents = row_documents(
                    row, entry, section, document_id=document_id, split=split, place=place,
                    tally=tally,
                )  # fmt: skip
                _require_new_ids(documents, place, collected.places)
                if split != named:
                    collected.taken_as[split, named] += len(documents)
            except DocumentError as error:
                told = error.reason != "missing_column" or error.reason in collected.examples
                if not told and (names := column_names(file)):
                    error.got = columns_text(names)  # also those that are not read
                if section.on_bad == "error":
                    raise
                collected.dropped[error.reason] += 1
                collected.examples.setdefault(error.reason, error.line())
                continue
            whole.add(tally)
            for document in documents:
                yield index, document
        whole.unread.update(unread_columns(file, wanted))


def _require_new_ids(documents: Iterable[Document], place: str, places: dict[str, str]) -> None:
    for document in documents:
        if document.document_id in places:
            raise DocumentError(
                f"two documents with the id {document.document_id}",
                reason="duplicate_id",
                where=place,
                got=f"the same id in {places[document.document_id]}",
                hint="map another column under columns: id, or set `ids: file` for the inputs, which "
                "puts the file's name before each id, or `ids: place`, which uses row numbers",
            )
    places.update((document.document_id, place) for document in documents)


def document_bytes(document: Document) -> bytes:
    """All fields as one line of JSON, for digests."""
    return canonical_json(document.values()) + b"\n"
