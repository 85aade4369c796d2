"""`corpus build`: from inputs to documents.parquet and, written last, corpus.json.

Everything is checked before anything is written, so a bad document leaves an earlier corpus unchanged.
All texts are in memory once, as Arrow arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from extract.chat.form import Tally
from extract.config import CorpusInput, CorpusSection, UnicodeForm
from extract.corpus.collected import (
    DOCUMENT_SCHEMA,
    Collected,
    checked_documents,
    document_bytes,
)
from extract.corpus.documents import Document
from extract.corpus.inputs import InputFile, content_digest, input_files, packed_as
from extract.corpus.normal_form import NormalForm
from extract.corpus.splits import require_splits
from store_schema import SCHEMA_VERSION, __version__
from store_schema.config import RunConfig, StrictModel
from store_schema.disk.location import Location, open_location
from store_schema.disk.parquet import ParquetFile
from store_schema.disk.sealed import seal, unseal
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import (
    ConfigError,
    CorruptionError,
    InputError,
    LogitfuseError,
    MissingError,
)
from store_schema.fingerprint import bytes_digest, fingerprint
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import plan_location

CORPUS_FILE = "corpus.json"
DOCUMENTS_FILE = "documents.parquet"
BATCH_DOCUMENTS = 4096


class InputRecord(StrictModel):
    """An input file that was read."""

    name: str
    sha256: str
    documents: int = Field(ge=0)
    """Number of documents from it."""
    packed: str | None = None
    """Compression format; None for none."""
    shapes: dict[str, int] = Field(default_factory=dict)
    """Number of rows by shape (`extract.chat.shapes`)."""


class CorpusRecord(StrictModel):
    """corpus.json."""

    schema_version: int = SCHEMA_VERSION
    request_fingerprint: str
    """Of the inputs' content, the section and the seed; the same request gives the same corpus."""
    corpus_fingerprint: str
    """Of all documents, in order."""
    num_documents: int = Field(ge=0)
    documents: dict[str, dict[str, int]]
    """Number of documents by split and domain."""
    size_bytes: dict[str, dict[str, int]]
    """UTF-8 bytes of text by split and domain."""
    taken_as: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Number of documents whose split was renamed (`corpus.split_names`), by split and former name."""
    left_out: dict[str, int]
    """Number of rows of splits that the run does not use, by split."""
    dropped: dict[str, int]
    """Number of documents that could not be used, by reason."""
    unread: dict[str, int] = Field(default_factory=dict)
    """Number of values that are not used, by column or by field of a message."""
    notes: dict[str, int] = Field(default_factory=dict)
    """Number of other things in chats that are left out or changed, by description."""
    unicode: UnicodeForm = "keep"
    """What was done with documents that are not in Unicode's composed normal form (NFC)."""
    not_nfc: int | None = Field(default=None, ge=0)
    """Number of such documents; None in corpora of earlier versions."""
    nfc_readers: tuple[str, ...] = ()
    """Models whose tokenizer normalises to NFC, if `corpus.unicode` was left open."""
    inputs: tuple[InputRecord, ...]
    created_by: str = f"logitfuse {__version__}"


def later_splits(run: RunConfig, record: CorpusRecord) -> list[str]:
    """`require_splits` for a corpus, and a line for each split that lacks domains which it needs."""
    where = corpus_location(run).url
    lines = require_splits(run, record.documents, where=where, left_out=record.left_out)
    domains = {domain for counts in record.documents.values() for domain in counts}
    for section in run.sections.values():
        split = section.split_of_all_domains()
        lacking = sorted(domains - record.documents.get(split, {}).keys()) if split else []
        if split in record.documents and lacking:
            lines.append(
                f"no text of {', '.join(lacking)} in split {split}: training needs every domain there, "
                "or --allow-partial"
            )
    return lines


def corpus_location(run: RunConfig) -> Location:
    """Folder or URL of a run's corpus."""
    return open_location(run.data_folder).child("corpus")


def build_corpus(run: RunConfig) -> tuple[CorpusRecord, bool]:
    """Build the corpus of a run, unless it is complete.

    Args:
        run: The run file.

    Returns:
        The record, and whether the corpus was built.

    Raises:
        InputError: An input or document cannot be used, or a split is missing that a section of
            the run file needs; nothing was written.
    """
    section = run.section("corpus", CorpusSection)
    if not section.inputs:
        raise ConfigError("no inputs", where="corpus.inputs", hint="name at least one file")
    files = [(entry, file) for entry in section.inputs for file in input_files(entry)]
    digests = [content_digest(file) for _, file in files]
    request = _request_fingerprint(run, section, files, digests)
    location = corpus_location(run)
    form = NormalForm(run)
    if location.exists(CORPUS_FILE):
        record = open_corpus(location)
        same = record.request_fingerprint == request
        if same and form.is_met(record.unicode, record.not_nfc):
            later_splits(run, record)
            return record, False
    collected = _collect(section, files, run.seed, form)
    inputs = tuple(
        InputRecord(
            name=file.name,
            sha256=digest,
            documents=collected.by_file[i],
            packed=packed_as(file.path),
            shapes=dict(collected.tallies[i].shapes),
        )
        for i, ((_, file), digest) in enumerate(zip(files, digests, strict=True))
    )
    tally = Tally.of(collected.tallies.values())
    record = CorpusRecord(
        request_fingerprint=request,
        corpus_fingerprint=collected.digest.hexdigest()[:32],
        num_documents=sum(collected.documents.values()),
        documents=_nested(collected.documents),
        size_bytes=_nested(collected.size_bytes),
        taken_as=_nested(collected.taken_as),
        left_out=dict(sorted(collected.left_out.items())),
        dropped=dict(sorted(collected.dropped.items())),
        unread=dict(tally.unread.most_common()),
        notes={what: number for what, number in tally.notes.items() if number},
        **form.record(),
        inputs=inputs,
    )
    later_splits(run, record)
    _write(location, record, collected.batches, run.resolved())
    return record, True


def open_corpus(location: Location) -> CorpusRecord:
    """The record of a finished corpus.

    Raises:
        MissingError: There is none (yet).
        CorruptionError: corpus.json is damaged.
    """
    if not location.exists(CORPUS_FILE):
        raise MissingError(
            "no corpus", where=location.url, hint="run `logitfuse corpus build` first"
        )
    where = f"{location.url}/{CORPUS_FILE}"
    return unseal(CorpusRecord, location.read_bytes(CORPUS_FILE), where=where)


def read_documents(location: Location, record: CorpusRecord) -> pa.Table:
    """All documents as an Arrow table, checked against the record.

    Raises:
        CorruptionError: The file is damaged, or not that of corpus.json.
    """
    where = f"{location.url}/{DOCUMENTS_FILE}"
    try:
        with location.open_read(DOCUMENTS_FILE) as file:
            table = ParquetFile(file, page_checksum_verification=True).read()
        digest = hashlib.sha256()
        for document in iter_documents(table):
            digest.update(document_bytes(document))
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise CorruptionError("documents unreadable", where=where, got=str(error)[:200]) from error
    if digest.hexdigest()[:32] != record.corpus_fingerprint:
        raise CorruptionError(
            "documents are not those of corpus.json",
            where=where,
            expected=record.corpus_fingerprint,
            got=digest.hexdigest()[:32],
            hint="delete the corpus folder and build it again",
        )
    return table


def iter_documents(table: pa.Table) -> Iterator[Document]:
    """The rows of a table of documents."""
    for batch in table.to_batches(max_chunksize=BATCH_DOCUMENTS):
        for row in batch.to_pylist():
            yield Document(**row)


def _request_fingerprint(
    run: RunConfig,
    section: CorpusSection,
    files: Sequence[tuple[CorpusInput, InputFile]],
    digests: Sequence[str],
) -> str:
    """Fingerprint of names and content of the inputs, not of paths: inputs may be moved."""
    inputs = [
        [entry.content(), file.name, file.format, digest]
        for (entry, file), digest in zip(files, digests, strict=True)
    ]
    # The effect of `unicode` depends on the documents: NormalForm.is_met checks it.
    settings = section.model_dump(mode="json", exclude={"inputs", "unicode"})
    return fingerprint(["corpus", SCHEMA_VERSION, inputs, settings, run.seed])


def plan_lines(run: RunConfig, record: CorpusRecord) -> list[str]:
    """A line on what to do about a plan that was made from another corpus; [] without such a plan."""
    plan = Plan.find(plan_location(run.data_folder))
    if plan is None or plan.record.corpus_fingerprint == record.corpus_fingerprint:
        return []
    return [
        f"the plan in {plan.location.url} is of another corpus: run `logitfuse extract plan`, which "
        "keeps splits whose documents are the same and adds new ones"
    ]


def _collect(
    section: CorpusSection,
    files: Sequence[tuple[CorpusInput, InputFile]],
    seed: int,
    form: NormalForm,
) -> Collected:
    collected = Collected()
    pending: list[Document] = []
    for index, document in checked_documents(section, files, seed, collected):
        pending.append(form.of(document))
        collected.by_file[index] += 1
        if len(pending) == BATCH_DOCUMENTS:
            collected.add(pending)
            pending = []
    if pending:
        collected.add(pending)
    if not collected.batches:
        facts = f"left out {dict(collected.left_out)}, dropped {dict(collected.dropped)}"
        raise InputError(
            "no document is left", where="corpus.inputs", expected="at least one", got=facts
        )
    return collected


def document_digest(document: Document) -> str:
    """Digest of all fields of a document."""
    return bytes_digest(document_bytes(document))


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (split, domain), number in sorted(counts.items()):
        nested.setdefault(split, {})[domain] = number
    return nested


def _write(
    location: Location, record: CorpusRecord, batches: list[pa.RecordBatch], config: str
) -> None:
    location.delete(CORPUS_FILE)
    location.write_atomic("config.yaml", config.encode())
    try:
        _write_documents(location, batches)
        location.make_durable(DOCUMENTS_FILE)
    except BaseException:
        with contextlib.suppress(LogitfuseError):  # the first error is raised
            location.delete(DOCUMENTS_FILE)
        raise
    location.write_atomic(CORPUS_FILE, seal(record))


def _write_documents(location: Location, batches: list[pa.RecordBatch]) -> None:
    where = f"{location.url}/{DOCUMENTS_FILE}"
    with storage_errors(where), location.open_write(DOCUMENTS_FILE) as sink:
        with pq.ParquetWriter(
            sink, DOCUMENT_SCHEMA, compression="zstd", write_page_checksum=True
        ) as writer:
            for batch in batches:
                writer.write_batch(batch)
