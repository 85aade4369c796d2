"""Sizes and checksums of a folder's files, kept in the folder, so that damage is detected.

files.json      sealed: CRC-32C and size of every other file, by its path inside the folder
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import google_crc32c

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import CorruptionError
from store_schema.manifest import FileRecord

FILES_FILE = "files.json"
_PIECE_BYTES = 16 << 20


class FilesRecord(StrictModel):
    """files.json."""

    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileRecord]
    """By path inside the folder, with `/`."""


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file, read piece by piece."""
    checksum, size = google_crc32c.Checksum(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            checksum.update(piece)
            size += len(piece)
    return FileRecord(size=size, crc32c=int.from_bytes(checksum.digest(), "big"))


def with_checksums(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Wrap `write`, which fills a folder, to add `files.json` for all that it wrote."""

    def write_all(folder: Path) -> None:
        write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): file_record(path) for path in paths}
        (folder / FILES_FILE).write_bytes(seal(FilesRecord(files=files)))

    return write_all


def check_files(folder: Path, *, hint: str) -> None:
    """Check that every file in `files.json` is there and unchanged; other files are ignored.

    Args:
        folder: A folder filled through `with_checksums`.
        hint: What to do when it is damaged.

    Raises:
        CorruptionError: A file is gone or changed, or the record is.
        StorageError: A file cannot be written.
    """
    place = folder / FILES_FILE
    if not place.is_file():
        raise CorruptionError("no checksums", where=place, hint=hint)
    with storage_errors(str(folder)):
        record = unseal(FilesRecord, place.read_bytes(), where=str(place), hint=hint)
        for name, expected in record.files.items():
            path = folder / name
            got = file_record(path) if path.is_file() else None
            if got != expected:
                raise CorruptionError(
                    "file changed since it was written",
                    where=path,
                    expected=_shown(expected),
                    got="no file" if got is None else _shown(got),
                    hint=hint,
                )


def _shown(record: FileRecord) -> str:
    return f"{record.size} bytes, CRC-32C {record.crc32c:08x}"
