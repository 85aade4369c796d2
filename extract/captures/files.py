"""A capture's Parquet files: which tokens they have, and the distributions of some of them.

A row is one text as tokens (`input_ids`), with a distribution after each of them: row j of the
compressed columns is what the model expected after token j. The one after the last token may
be missing. Rows that were packed have several texts, told apart by the numbers in `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from extract.captures.columns import COLUMNS, Entries, Form, lists, matrices
from store_schema.capture.params import PARAMS_FILE, AnyParams, LegacyParams, read_params
from store_schema.disk.parquet import ParquetFile
from store_schema.errors import ConfigError, CorruptionError, MissingError, StorageError
from store_schema.fingerprint import fingerprint

BATCH_ROWS = 32
"""Rows whose distributions are in memory at a time; packed rows have megabytes each."""
SCAN_ROWS = 1024
INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of some rows, without their distributions.

    Args:
        file: Index of the file.
        group: Its row group.
        first_row: Of the row group, the batch's first.
        token_ids: [N] int64 of all rows, joined.
        row_offsets: [rows + 1] int64.
        text_starts: [N] int64 index of the first token of each token's text.
    """

    file: int
    group: int
    first_row: int
    token_ids: npt.NDArray[np.int64]
    row_offsets: npt.NDArray[np.int64]
    text_starts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Distributions to read.

    Args:
        key: What the caller knows it by.
        row: Row of the row group.
        start: Token of the row at which the text begins.
        num_tokens: Tokens of the text, from its beginning.
        first: Distributions from the one after this token of the text on.
        stop: Up to the one before this token of the text.
    """

    key: int
    row: int
    start: int
    num_tokens: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What was asked for.

    Args:
        key: As wanted.
        where: File and row, for messages.
        token_ids: [num_tokens] int64.
        entries: Entries of the distributions that were wanted.
    """

    key: int
    where: str
    token_ids: npt.NDArray[np.int64]
    entries: Entries


class Capture:
    """A capture, opened for reading.

    Args:
        path: Folder or file, for messages.
        files: Its Parquet files.
        params: How it was compressed; None for captures that are not.
        form: Its columns.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], params: AnyParams | None, form: Form
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self.params = params
        self.form: Form = form

    @classmethod
    def open(cls, path: Path, params_file: Path | None = None) -> Capture:
        """Open the capture in a folder, or in one file.

        Args:
            path: Its folder, with Parquet files at any depth, or one of them.
            params_file: YAML with the compression parameters; None takes the folder's own.

        Raises:
            MissingError: There is no Parquet file.
            ConfigError: The parameters are missing or are not those of the columns.
            CorruptionError: A file is damaged, or lacks a column.
        """
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise MissingError(
                "no capture", where=path, expected="a folder of Parquet files, or one of them"
            )
        names = {frozenset(_names(file)): file for file in files}
        forms = {_form_of(columns, file): file for columns, file in names.items()}
        if len(forms) > 1:
            raise ConfigError("files with different columns", where=path, got=", ".join(forms))
        [form] = forms
        beside = (path if path.is_dir() else path.parent) / PARAMS_FILE
        chosen = params_file or (beside if beside.is_file() else None)
        params = None if form == "plain" or chosen is None else read_params(chosen)
        if form != "plain" and (
            params is None or isinstance(params, LegacyParams) != (form == "legacy")
        ):
            key = "legacy_logit_compression" if form == "legacy" else "logprob_compressor"
            raise ConfigError(
                "the capture's compression parameters are not known" if params is None
                else "compression parameters of DistillKit's other format",
                where=chosen or path,
                expected=f"a YAML file with those of `{key}`, as {PARAMS_FILE} in the folder or "
                "with --compression",
            )  # fmt: skip
        return cls(path, files, params, form)

    def fingerprint(self) -> str:
        """Of the files' names and sizes: the same for a copy in another folder."""
        root = self.path if self.path.is_dir() else self.path.parent
        return fingerprint(
            [[str(file.relative_to(root)), file.stat().st_size] for file in self.files]
        )

    def num_rows(self) -> int:
        """Texts, or packs of texts."""
        return sum(_opened(file).metadata.num_rows for file in self.files)

    def tokens(self) -> Iterator[TokenBatch]:
        """The tokens of all rows, file after file."""
        for number, path in enumerate(self.files):
            with _readable(path):
                file = _opened(path)
                names = [n for n in (INPUT_IDS, ATTENTION_MASK) if n in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    row = 0
                    for batch in file.iter_batches(SCAN_ROWS, [group], names):
                        yield _token_batch(batch, number, group, row, path)
                        row += len(batch)

    def read(self, file: int, group: int, wanted: Sequence[Wanted]) -> Iterator[Piece]:
        """Distributions of one row group's texts, in the order of rows.

        Raises:
            CorruptionError: A row is not as the parameters say.
        """
        path, by_row = self.files[file], sorted(wanted, key=lambda one: one.row)
        with _readable(path):
            opened = _opened(path)
            names = [INPUT_IDS, *COLUMNS[self.form]]
            first = 0
            for batch in opened.iter_batches(BATCH_ROWS, [group], names):
                here = [one for one in by_row if first <= one.row < first + len(batch)]
                for one in here:
                    yield self._piece(batch, one, one.row - first, f"{path}, group {group}")
                first += len(batch)

    def _piece(self, batch: pa.RecordBatch, wanted: Wanted, row: int, where: str) -> Piece:
        where = f"{where}, row {wanted.row}"
        ids, offsets = lists(batch.column(INPUT_IDS), INPUT_IDS, where)
        begin = int(offsets[row]) + wanted.start
        part = slice(wanted.start + wanted.first, wanted.start + wanted.stop)
        entries = matrices(batch, self.form, self.params, row, part, where)
        return Piece(wanted.key, where, ids[begin : begin + wanted.num_tokens], entries)


def _names(path: Path) -> list[str]:
    with _readable(path):
        return list(_opened(path).schema_arrow.names)


def _opened(path: Path) -> ParquetFile:
    return ParquetFile(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of the disk and of Parquet as ours."""
    try:
        yield
    except (pa.ArrowException, ValueError) as error:
        raise CorruptionError(
            "not a sound Parquet file", where=path, got=str(error)[:200],
            hint="copy it again from where it was captured",
        ) from error  # fmt: skip
    except OSError as error:
        text = str(error)
        if error.errno is None:  # of Parquet's decoder, not of the disk
            raise CorruptionError("not a sound Parquet file", where=path, got=text[:200]) from error
        raise StorageError("cannot be read", where=path, got=text[:200]) from error


def _form_of(columns: frozenset[str], path: Path) -> Form:
    for form, names in COLUMNS.items():
        if {INPUT_IDS, *names} <= columns:
            return form
    raise CorruptionError(
        "not a capture of DistillKit",
        where=path,
        expected=f"columns {INPUT_IDS} and "
        + ", or ".join(" + ".join(n) for n in COLUMNS.values()),
        got=", ".join(sorted(columns)) or "no columns",
    )


def _token_batch(
    batch: pa.RecordBatch, file: int, group: int, first_row: int, path: Path
) -> TokenBatch:
    where = f"{path}, group {group}, rows from {first_row}"
    ids, offsets = lists(batch.column(INPUT_IDS), INPUT_IDS, where)
    begins = np.zeros(len(ids), bool)
    begins[offsets[:-1][np.diff(offsets) > 0]] = True
    if ATTENTION_MASK in batch.schema.names:
        mask, of_mask = lists(batch.column(ATTENTION_MASK), ATTENTION_MASK, where)
        if not np.array_equal(offsets, of_mask):
            raise CorruptionError(f"{ATTENTION_MASK} is not as long as {INPUT_IDS}", where=where)
        begins[1:] |= np.diff(mask) != 0
    starts: Any = np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))
    return TokenBatch(file, group, first_row, ids, offsets, starts.astype(np.int64))
