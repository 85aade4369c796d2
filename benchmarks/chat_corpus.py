"""Rows of chats read by `corpus build`, and whether each published shape gives what it must."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from extract.corpus.corpus import (
    CorpusRecord,
    build_corpus,
    corpus_location,
    iter_documents,
    read_documents,
)
from extract.corpus.documents import Document
from store_schema.config import load_run
from store_schema.errors import LogitfuseError
from store_schema.plan.plan import Segment
from tests.chat_shapes import PUBLISHED, TOOL, WITH_TOOLS

FileKind = Literal["jsonl", "parquet"]
Row = Mapping[str, Any]


def built(
    rows: Iterable[Row], *, kind: FileKind = "jsonl", **section: Any
) -> tuple[list[Document], CorpusRecord]:
    """The corpus of a file of rows, built as a run's would be.

    Args:
        rows: Columns by name.
        kind: Of file that they are written to.
        section: Other fields of the section `corpus`.

    Returns:
        Documents in order, and the record with what was not read.

    Raises:
        InputError: A row cannot be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / f"c.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        entry = {"path": str(file), "domain": "chat", "split": "train"}
        content = {
            "name": "chat",
            "run_dir": str(folder / "run"),
            "sources": {"source": {"model": "none"}},
            "target": {"model": "none"},
            "corpus": {"inputs": [entry], **section},
        }
        # A dollar in a path of a run file is no variable.
        (folder / "run.yaml").write_text(yaml.safe_dump(content).replace("$", "$$"))
        run = load_run(folder / "run.yaml")
        record, _ = build_corpus(run)
        return list(iter_documents(read_documents(corpus_location(run), record))), record


def segment_of(document: Document, index: int = 0) -> Segment:
    """A document as one segment, whole."""
    return Segment(
        index=index,
        segment_id=f"{document.document_id}#0",
        document_id=document.document_id,
        domain=document.domain,
        split=document.split,
        byte_start=0,
        byte_end=len(document.text.encode()),
        ends_document=True,
        context=document.context,
        text=document.text,
    )


def shapes_read(shapes: Mapping[str, tuple[Row, Any]] = PUBLISHED) -> dict[str, str]:
    """Of each published shape "" where a row gives the right responses behind the right contexts; else
    what is wrong. From JSON lines, and from Parquet where its columns can hold the shape.

    Args:
        shapes: Row, and its responses: (messages or prompt before it, text).
    """
    found = {}
    for name, (row, expected) in shapes.items():
        faults = []
        kinds: list[FileKind] = ["jsonl", "parquet"] if _fits_columns(row) else ["jsonl"]
        for kind in kinds:
            try:
                documents, _ = built([row], kind=kind)
            except LogitfuseError as error:
                faults.append(f"{kind}: {error.line()}")
                continue
            contexts = [json.loads(document.context or "{}") for document in documents]
            texts = [document.text for document in documents]
            before = [context.get("messages", context.get("prompt")) for context in contexts]
            if list(zip(before, texts, strict=True)) != expected:
                faults.append(f"{kind}: {before} {texts}")
            tools = [context.get("tools") for context in contexts]
            if tools != [[TOOL] if any(expected is t for t in WITH_TOOLS) else None] * len(
                documents
            ):
                faults.append(f"{kind}: tools {tools}")
        found[name] = "; ".join(faults)
    return found


def _fits_columns(row: Row) -> bool:
    """Whether Arrow has a type for every column: content that is now text, now a list, has none."""
    try:
        pa.Table.from_pylist([dict(row)])
    except pa.ArrowInvalid:
        return False
    return True
