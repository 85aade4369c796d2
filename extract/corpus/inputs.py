"""Read input files of all formats as rows: a dict, with its place in the file."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from extract.config import CorpusInput
from extract.document_error import DocumentError
from store_schema.disk.parquet import ParquetFile
from store_schema.errors import ConfigError, InputError
from store_schema.model.lfs_pointer import is_pointer

JSONL_ENDINGS = tuple(
    name + packed for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")
)
UNREADABLE_ENDINGS = (
    *(".json", ".csv", ".tsv", ".gz", ".zip", ".zst", ".xz", ".bz2", ".lz4", ".7z", ".tar"),
    *(".arrow", ".bin"),
)
"""Endings of files that must not be read as plain text."""
_PACKED = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"PK\x03\x04": "zip",
}
"""Compression formats by the first bytes of a file."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file (or `datasets` folder) of an input.

    Args:
        path: Its path.
        name: Path relative to the part of the glob before its first wildcard; part of automatic ids.
        format: "jsonl", "parquet", "text" or "datasets".
    """

    path: Path
    name: str
    format: str


Row = tuple[str, str, dict[str, Any] | DocumentError]
"""Place (for messages), automatic id, and the record, or the error for a row that cannot be read."""


def input_files(entry: CorpusInput) -> list[InputFile]:
    """The files of an input, sorted by name.

    Raises:
        InputError: There is no such file.
        ConfigError: The format is not known from the name.
    """
    if "://" in entry.path:
        raise ConfigError("corpus inputs are read from disk", where="corpus.inputs", got=entry.path)
    path = Path(entry.path)
    if path.is_dir():
        return [_dataset_folder(path, entry)]
    if path.is_file():
        return [InputFile(path, path.name, _format(path, entry))]
    if not glob.has_magic(entry.path):
        raise InputError(
            "input file not found",
            where="corpus.inputs",
            got=entry.path,
            hint="paths are relative to the folder the command runs in",
        )
    paths = sorted(Path(name) for name in glob.glob(entry.path, recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise InputError("no file matches", where="corpus.inputs", got=entry.path)
    root = _fixed_part(path)
    return [
        InputFile(file, file.relative_to(root).as_posix(), _format(file, entry)) for file in files
    ]


def _fixed_part(pattern: Path) -> Path:
    parts: list[str] = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _dataset_folder(path: Path, entry: CorpusInput) -> InputFile:
    marks = ("dataset_dict.json", "dataset_info.json", "state.json")
    saved = any((path / mark).is_file() for mark in marks)
    if entry.format not in ("auto", "datasets") or not saved:
        raise InputError(
            "folder is not a saved dataset",
            where="corpus.inputs",
            expected=f"one of {', '.join(marks)} in it",
            got=path,
            hint="give files by a glob, such as folder/**/*.txt",
        )
    return InputFile(path, path.name, "datasets")


def _format(path: Path, entry: CorpusInput) -> str:
    if entry.format != "auto":
        return entry.format
    name = path.name.lower()
    if name.endswith(JSONL_ENDINGS):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".json") and _has_records(path):
        return "jsonl"
    if name.endswith(UNREADABLE_ENDINGS):
        raise ConfigError(
            "format of an input is not known from its name",
            where="corpus.inputs",
            expected=".jsonl (also .gz, .zst), .json with a list, .parquet or a plain text file",
            got=path,
            hint="convert it, or set `format:`",
        )
    return "text"


def content_digest(file: InputFile) -> str:
    """SHA-256 of a file, or of all files and file names of a dataset folder."""
    digest = hashlib.sha256()
    for path in _files_of(file):
        try:
            with path.open("rb") as opened:
                whole = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise InputError("input cannot be read", where=path, got=error.strerror) from error
        digest.update(f"{path.relative_to(file.path).as_posix()}:{whole};".encode())
    return digest.hexdigest()


def read_rows(file: InputFile, columns: Iterable[str]) -> Iterator[Row]:
    """Yield all rows of a file, in order.

    Args:
        file: From `input_files`.
        columns: Columns to read; JSON lines are read with all columns.

    Raises:
        InputError: The file cannot be read.
    """
    readers = {"jsonl": _jsonl, "text": _text}
    try:
        _require_fetched(file)
        if file.format in readers:
            yield from readers[file.format](file)
        elif file.format == "parquet":
            yield from _parquet(file, set(columns))
        else:
            yield from _datasets(file, set(columns))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise InputError(
            "input cannot be read",
            where=file.path,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="the file may be damaged or truncated: fetch it again",
        ) from error


def _require_fetched(file: InputFile) -> None:
    for path in _files_of(file):
        if is_pointer(path):
            raise InputError(
                "input is a pointer of git-lfs, its content was not fetched",
                where=path,
                hint="fetch it with `git lfs pull`",
            )


def _files_of(file: InputFile) -> list[Path]:
    """The file itself, or all files of a dataset folder, in order."""
    if file.format != "datasets":
        return [file.path]
    return sorted(path for path in file.path.rglob("*") if path.is_file())


def _has_records(path: Path) -> bool:
    """Whether a .json file is a list, or has an object on each line (at least two)."""
    with path.open("rb") as opened:
        head = opened.read(1 << 20).lstrip()
    first, _, rest = head.partition(b"\n")
    return head.startswith(b"[") or (
        first.startswith(b"{") and first.rstrip().endswith(b"}") and rest.lstrip().startswith(b"{")
    )


def row_count(file: InputFile) -> int | None:
    """Number of rows of a file, where that is known without reading it; None for JSON."""
    if file.format == "text":
        return 1
    if file.format == "parquet":
        with ParquetFile(file.path) as parquet:
            return int(parquet.metadata.num_rows)
    if file.format == "datasets":
        return sum(len(dataset) for _, dataset in _dataset_parts(file))
    return None


def column_names(file: InputFile) -> list[str]:
    """Columns of a file of tables; [] for formats whose rows are read with all columns."""
    if file.format == "parquet":
        with ParquetFile(file.path) as parquet:
            return list(parquet.schema_arrow.names)
    if file.format == "datasets":
        return list(dict.fromkeys(n for _, d in _dataset_parts(file) for n in d.column_names))
    return []


def unread_columns(file: InputFile, columns: Iterable[str]) -> dict[str, int]:
    """Columns that `read_rows` does not read, with their number of rows; {} for JSON lines and text."""
    if file.format == "parquet":
        with ParquetFile(file.path) as parquet:
            names, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
        return dict.fromkeys(set(names) - set(columns), rows)
    if file.format != "datasets":
        return {}
    unread: dict[str, int] = {}
    for _, dataset in _dataset_parts(file):
        for name in set(dataset.column_names) - set(columns):
            unread[name] = unread.get(name, 0) + len(dataset)
    return unread


def _jsonl(file: InputFile) -> Iterator[Row]:
    with _unpacked(file) as stream:
        if stream.peek(1 << 12).lstrip()[:1] == b"[":
            yield from _json_array(file, stream.read())
            return
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{file.path}:{number}"
            yield place, f"{file.name}/{number}", _json_record(line, place)


def _json_array(file: InputFile, data: bytes) -> Iterator[Row]:
    """The objects of a JSON list."""
    decoder = json.JSONDecoder()
    try:
        text = data.decode("utf-8")
        at, number = _skip_space(text, text.index("[") + 1), 0
        while text[at] != "]":
            record, at = decoder.raw_decode(text, at)
            number += 1
            place = f"{file.path}, entry {number}"
            yield place, f"{file.name}/{number}", _as_record(record, place)
            at = _skip_space(text, at)
            if text[at] == ",":
                at = _skip_space(text, at + 1)
            elif text[at] != "]":
                raise ValueError(f"no comma at character {at}")
        after = len(text) - len(text[at + 1 :].lstrip(" \t\r\n"))
        if after < len(text):
            raise ValueError(f"text after the list, at character {after}: a file must be one list")
    except (ValueError, IndexError, RecursionError) as error:
        got = "the file ends inside the list" if isinstance(error, IndexError) else str(error)[:120]
        raise InputError("bad JSON", where=file.path, got=got) from error


def _skip_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def packed_as(path: Path) -> str | None:
    """Compression format of a file by its first bytes: "gzip", "zstd" or another; None for none."""
    if not path.is_file():
        return None
    with path.open("rb") as opened:
        head = opened.read(64)
    return next((name for mark, name in _PACKED.items() if head.startswith(mark)), None)


def _unpacked(file: InputFile) -> io.BufferedReader | gzip.GzipFile:
    """A file opened for reading; gzip and zstd are decompressed.

    Raises:
        InputError: It is compressed in another format.
    """
    packed = packed_as(file.path)
    if packed == "zstd":
        return io.BufferedReader(cast(Any, pa.input_stream(file.path, compression="zstd")))
    if packed == "gzip":
        return gzip.GzipFile(file.path, "rb")
    if packed is None:
        return file.path.open("rb")
    raise InputError(
        f"input is compressed as {packed}",
        where=file.path,
        expected="plain text, gzip or zstd",
        hint="decompress it first",
    )


def _json_record(line: bytes, place: str) -> dict[str, Any] | DocumentError:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        return DocumentError("bad JSON", reason="bad_json", where=place, got=str(error)[:120])
    return _as_record(record, place)


def _as_record(record: Any, place: str) -> dict[str, Any] | DocumentError:
    if not isinstance(record, dict):
        return DocumentError(
            "not a JSON object", reason="bad_json", where=place, got=type(record).__name__
        )
    return record


def _text(file: InputFile) -> Iterator[Row]:
    try:
        # In binary mode, so that line ends are kept.
        with _unpacked(file) as stream:
            record: dict[str, Any] | DocumentError = {"text": stream.read().decode("utf-8")}
    except UnicodeDecodeError as error:
        record = DocumentError(
            f"not UTF-8 at byte {error.start}", reason="bad_utf8", where=file.path, got=error.reason
        )
    yield str(file.path), file.name, record


def _parquet(file: InputFile, columns: set[str]) -> Iterator[Row]:
    with ParquetFile(file.path, page_checksum_verification=True) as parquet:
        present = [name for name in parquet.schema_arrow.names if name in columns]
        number = 0
        for batch in parquet.iter_batches(1024, columns=present):
            # A file without any of the columns still has rows, which are reported as bad.
            records = batch.to_pylist() if present else [{}] * batch.num_rows
            for record in records:
                number += 1
                yield f"{file.path}, row {number}", f"{file.name}/{number}", record


def _dataset_parts(file: InputFile) -> list[tuple[str, Any]]:
    """Splits of a saved dataset by name; the name is "" for a dataset without splits."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "a saved dataset needs the package `datasets`",
            where=file.path,
            hint="pip install datasets, or save it as Parquet",
        ) from error
    loaded = datasets.load_from_disk(str(file.path))
    return list(loaded.items()) if isinstance(loaded, dict) else [("", loaded)]


def _datasets(file: InputFile, columns: set[str]) -> Iterator[Row]:
    for split, dataset in _dataset_parts(file):
        named = bool(split)
        present = [name for name in dataset.column_names if name in columns]
        chosen = dataset.select_columns(present)
        label = f"{file.name}/{split}" if named else file.name
        for number, record in enumerate(chosen, 1):
            row = dict(record)
            if named:
                row.setdefault("split", split)
            yield f"{file.path} {split}, row {number}", f"{label}/{number}", row
