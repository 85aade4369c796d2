"""A look at the first rows of an input, before there is a run file: `logitfuse init`.

The rows become documents as in `corpus build`, by the same code; only that few of them are read.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from extract.chat.shapes import shape_of
from extract.chat.turns import is_messages
from extract.config import Columns, CorpusInput, CorpusSection
from extract.corpus.collected import Collected, checked_documents
from extract.corpus.corpus import iter_documents
from extract.corpus.documents import columns_wanted
from extract.corpus.inputs import (
    InputFile,
    Row,
    column_names,
    packed_as,
    read_rows,
    row_count,
)
from extract.corpus.normal_form import nfc_document
from extract.document_error import DocumentError

_TEXT_LIKE = (
    "content",
    "body",
    "code",
    "document",
    "passage",
    "article",
    "markdown",
    "raw_content",
)
"""Columns with the text in published data sets, where none is called "text"."""
COUNTED_BYTES = 16 << 20
"""Bytes of a file on disk whose lines are counted."""
_PACKED_RATIO = 4
"""Bytes of a compressed list, unpacked, over those on disk."""


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of an input.

    Args:
        files: Its files.
        rows: Rows of each file that was begun, by index.
        whole: Indices of files of which all rows were read.
    """

    files: Sequence[InputFile]
    rows: Mapping[int, list[Row]]
    whole: frozenset[int]

    @classmethod
    def read(cls, files: Sequence[InputFile], columns: Iterable[str], limit: int) -> FirstRows:
        """Read at most `limit` rows, file after file.

        Raises:
            InputError: A file cannot be read.
        """
        wanted, rows, whole, left = set(columns), {}, set(), limit
        for index, file in enumerate(files):
            if left == 0:
                break
            reader = read_rows(file, wanted)
            rows[index] = list(islice(reader, left))
            left -= len(rows[index])
            if next(reader, None) is None:
                whole.add(index)
        return cls(files, rows, frozenset(whole))

    @property
    def number(self) -> int:
        """Rows that were read."""
        return sum(map(len, self.rows.values()))

    @property
    def records(self) -> list[dict[str, Any]]:
        """All rows that could be read."""
        rows = (row for part in self.rows.values() for _, _, row in part)
        return [row for row in rows if not isinstance(row, DocumentError)]

    def of(self, file: InputFile, columns: Iterable[str]) -> Iterator[Row]:
        """Rows of a file again, as `read_rows` gives them."""
        yield from self.rows.get(self.files.index(file), ())

    def estimated(self) -> tuple[float, bool]:
        """Rows of all files, and whether that is exact: else it goes by bytes."""
        total, exact, known_bytes, known_rows, unread_bytes = 0.0, True, 0.0, 0.0, 0
        for index, file in enumerate(self.files):
            size = 0 if file.format == "datasets" else file.path.stat().st_size
            if index in self.whole:
                rows = float(len(self.rows[index]))
            elif (counted := row_count(file)) is not None:
                rows = counted
            elif index in self.rows:
                rows, certain = _counted(file, self.rows[index])
                exact = exact and certain
            else:
                exact, unread_bytes = False, unread_bytes + size
                continue
            total, known_rows, known_bytes = total + rows, known_rows + rows, known_bytes + size
        return total + unread_bytes * known_rows / max(known_bytes, 1.0), exact


def _counted(file: InputFile, rows: Sequence[Row]) -> tuple[float, bool]:
    """Rows of a JSON file of which the first rows were read, and whether that is exact.

    Lines of its first `COUNTED_BYTES` are counted, compressed or not; a list goes by the bytes that its
    first rows take.
    """
    size, packed = file.path.stat().st_size, packed_as(file.path)
    number = 0
    with file.path.open("rb") as raw:
        stream: Any = raw
        if packed == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        elif packed == "zstd":
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
        if stream.peek(1 << 12).lstrip()[:1] == b"[":
            texts = (json.dumps(row, ensure_ascii=False, default=str) for _, _, row in rows)
            taken = sum(len(text.encode()) + 2 for text in texts)
            whole = size if packed is None else size * _PACKED_RATIO
            return len(rows) * max(whole / taken, 1.0), False
        for line in stream:
            number += bool(line.strip())
            if number > len(rows) and raw.tell() >= COUNTED_BYTES:
                return number * size / min(raw.tell(), size), False
    return float(number), True


@dataclass(frozen=True, slots=True)
class Sample:
    """What the first rows of an input become.

    Args:
        entry: The input with what its rows need: columns, domain, ids.
        rows: The rows.
        collected: Their documents and counts.
        found: What was set because of the rows, as short clauses.
    """

    entry: CorpusInput
    rows: FirstRows
    collected: Collected
    found: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Estimated rows of the whole input over the rows read."""
        return self.rows.estimated()[0] / max(self.rows.number, 1)


@dataclass(slots=True)
class Sampler:
    """Samples the inputs of a run, one after the other.

    Args:
        section: Section `corpus`.
        seed: The run's seed.
        places: Places of documents by their ids, over all inputs so far.
    """

    section: CorpusSection
    seed: int
    places: dict[str, str] = field(default_factory=dict)

    def sample(self, files: Sequence[InputFile], entry: CorpusInput, limit: int) -> Sample:
        """Read the first rows of an input and find the settings that they need.

        Raises:
            InputError: A file cannot be read.
        """
        rows = FirstRows.read(files, columns_wanted(entry), limit)
        found: list[str] = []
        if not self._shapes(entry, rows):
            other = _mapped(files, entry)
            if other is not None:
                entry, clause = other
                found.append(clause)
                rows = FirstRows.read(files, columns_wanted(entry), limit)
        records = rows.records
        if entry.domain is None and not all(r.get("domain") is not None for r in records):
            entry = entry.model_copy(update={"domain": _domain_of(files)})
            found.append("no column `domain` in every row: one domain for the input")
        collected = self._collected(entry, rows)
        for ids in ("file", "place"):
            if not collected.dropped["duplicate_id"] and not collected.dropped["not_text"]:
                break
            other_ids = entry.model_copy(update={"ids": ids})
            attempt = self._collected(other_ids, rows)
            if sum(attempt.dropped.values()) < sum(collected.dropped.values()):
                entry, collected = other_ids, attempt
                found = [clause for clause in found if not clause.startswith("ids")]
                found.append(f"ids repeat or are no text: ids are made from the {_IDS[ids]}")
        self.places = collected.places
        return Sample(entry, rows, collected, tuple(found))

    def _shapes(self, entry: CorpusInput, rows: FirstRows) -> bool:
        """Whether any row has a known shape."""
        records = rows.records
        return not records or any(shape_of(record, entry) is not None for record in records)

    def _collected(self, entry: CorpusInput, rows: FirstRows) -> Collected:
        section = self.section.model_copy(update={"on_bad": "drop"})
        collected = Collected(places=dict(self.places))
        files = [(entry, file) for index, file in enumerate(rows.files) if index in rows.rows]
        each = checked_documents(section, files, self.seed, collected, rows.of)
        documents = [document for _, document in each]
        if documents:
            collected.add(documents)
        return collected


_IDS = {"file": "file's name and the id", "place": "file's name and the row's number"}


def _domain_of(files: Sequence[InputFile]) -> str:
    """A name for the domain of an input without one, from its first file."""
    return files[0].path.name.split(".")[0] or "text"


def _mapped(files: Sequence[InputFile], entry: CorpusInput) -> tuple[CorpusInput, str] | None:
    """The input with its text or messages mapped, where no row has a known shape, and what was mapped;
    None where there is nothing like it."""
    first = next(iter(read_rows(files[0], column_names(files[0]))), None)
    if first is None or isinstance(first[2], DocumentError):
        return None
    record = first[2]
    chats = [name for name, value in record.items() if is_messages(value)]
    texts = [name for name, value in record.items() if isinstance(value, str)]
    texts = [name for name in texts if name not in ("id", "domain", "split")]
    likely = [name for name in texts if name.lower() in _TEXT_LIKE]
    if chats:
        columns = Columns(messages=chats[0])
    elif texts:
        longest = max(texts, key=lambda name: len(record[name]))
        columns = Columns(text=likely[0] if likely else longest)
    else:
        return None
    name = columns.messages or columns.text
    role = "messages" if chats else "text"
    others = ", ".join(n for n in record if n != name) or "none"
    clause = f"no known column: {name} is taken as the {role} (others: {others})"
    return entry.model_copy(update={"columns": columns}), clause


def first_documents(sample: Sample, limit: int, *, compose: bool) -> pa.Table:
    """The first documents of a sample, as a table like the corpus's.

    Args:
        sample: The sample; it has at least one document.
        limit: Documents, at most.
        compose: Whether text is converted to NFC (`corpus.unicode`).
    """
    table = pa.Table.from_batches(sample.collected.batches).slice(0, limit)
    if not compose:
        return table
    chosen = Collected()
    chosen.add([nfc_document(document) for document in iter_documents(table)])
    return pa.Table.from_batches(chosen.batches)
