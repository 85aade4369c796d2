"""The first rows of each input: how they are read, what they become, and what would be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from extract.chat.shapes import shape_of
from extract.config import CorpusInput, CorpusSection
from extract.corpus.inputs import JSONL_ENDINGS, InputFile, input_files, packed_as
from extract.corpus.sample import Sample, Sampler
from store_schema.errors import InputError
from store_schema.paths import written_path

MOST_ROWS = 1000
"""Rows of an input that are read."""
_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
_ENDINGS = (*JSONL_ENDINGS, ".json", ".parquet", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class DataFacts:
    """An input as its first rows show it.

    Args:
        entry: Its entry in the run file.
        format: "jsonl", "parquet", "text" or "datasets".
        packed: Compression format; None for none.
        files: Number of its files.
        size_bytes: Bytes of its files.
        rows_read: Rows that were looked at.
        rows: Rows of all files.
        exact: Whether `rows` is exact; else it goes by bytes.
        shapes: Rows looked at, by shape.
        columns: Columns that were read.
        keys: Fields of a message, for chats.
        documents: Documents that the rows looked at become.
        text_bytes: UTF-8 bytes of their text, without contexts.
        train_share: Share of these bytes in split train.
        splits: Documents by split.
        has_split: Whether every row names its split.
        left_out: Rows of other splits, by split.
        dropped: Rows that cannot be used, by reason.
        examples: The first error line of each reason.
        unread: Values that are not used, by column or field.
        notes: Parts of chats that are left out or changed, by description.
        found: Settings that were chosen for the rows, as short clauses.
    """

    entry: CorpusInput
    format: str
    packed: str | None
    files: int
    size_bytes: int
    rows_read: int
    rows: int
    exact: bool
    shapes: dict[str, int]
    columns: tuple[str, ...]
    keys: tuple[str, ...]
    documents: int
    text_bytes: int
    train_share: float
    splits: dict[str, int]
    has_split: bool
    left_out: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, str]
    unread: dict[str, int]
    notes: dict[str, int]
    found: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Rows of the input over those looked at."""
        return self.rows / max(self.rows_read, 1)

    @property
    def has_chats(self) -> bool:
        """Whether any row is not plain text."""
        return bool(self.shapes.keys() - {"text"})


def look_at_data(
    paths: Sequence[str], *, seed: int = 0, most_rows: int = MOST_ROWS
) -> tuple[list[DataFacts], list[Sample]]:
    """Read the first rows of each input.

    Args:
        paths: Files, globs or folders.
        seed: The run's seed, which assigns splits.
        most_rows: Rows of each input, at most.

    Raises:
        InputError: There is no such file, it cannot be read, or no row of it can be used.
        ConfigError: The format of a file is not known.
    """
    found = chain.from_iterable(map(_inputs_of, paths))
    entries = [CorpusInput(path=written_path(path)) for path in found]
    return look_at_inputs(entries, CorpusSection(), seed=seed, most_rows=most_rows)


def look_at_inputs(
    entries: Iterable[CorpusInput], section: CorpusSection, *, seed: int, most_rows: int = MOST_ROWS
) -> tuple[list[DataFacts], list[Sample]]:
    """Read the first rows of each input of a run file.

    Args:
        entries: The inputs.
        section: How their rows become documents.
        seed: The run's seed, which assigns splits.
        most_rows: Rows of each input, at most.

    Raises:
        InputError: There is no such file, it cannot be read, or no row of it can be used.
        ConfigError: The format of a file is not known.
    """
    sampler = Sampler(section, seed)
    facts, samples = [], []
    for entry in entries:
        files = input_files(entry)
        sample = sampler.sample(files, entry, most_rows)
        found = _facts(sample, files)
        if not found.documents:
            raise _unusable(str(entry.path), found)
        facts.append(found)
        samples.append(sample)
    return facts, samples


def _unusable(path: str, found: DataFacts) -> InputError:
    reasons = ", ".join(f"{name} {number:,}" for name, number in found.dropped.items())
    other = ", ".join(f"{name} {number:,}" for name, number in found.left_out.items())
    return InputError(
        f"none of the first {found.rows_read:,} rows can be used",
        where=path,
        expected="text, messages, or prompt and response, of split train, valid or test",
        got="; ".join(filter(None, [reasons, f"other splits {other}" if other else ""]))
        or "no row",
        hint=next(iter(found.examples.values()), None),
    )


def _inputs_of(path: str) -> list[str]:
    """A path as it goes into the run file: of a folder of files a glob for each ending in it."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / mark).is_file() for mark in _MARKS):
        return [path]
    names = [file.name.lower() for file in folder.rglob("*") if file.is_file()]
    endings = [e for e in _ENDINGS if any(name.endswith(e) for name in names)]
    if not endings:
        raise InputError(
            "folder has no file that can be read",
            where=path,
            expected=f"files that end in {', '.join(_ENDINGS)}, or a saved dataset",
        )
    return [f"{path.rstrip('/')}/**/*{ending}" for ending in endings]


def _facts(sample: Sample, files: Sequence[InputFile]) -> DataFacts:
    collected, rows = sample.collected, sample.rows
    number, exact = rows.estimated()
    documents: Counter[str] = Counter()
    for (split, _), count in collected.documents.items():
        documents[split] += count
    by_split: Counter[str] = Counter()
    for (split, _), size in collected.size_bytes.items():
        by_split[split] += size
    shapes: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for tally in collected.tallies.values():
        shapes.update(tally.shapes)
        unread.update(tally.unread)
        notes.update(tally.notes)
    columns, keys = _columns(sample)
    return DataFacts(
        entry=sample.entry,
        format=files[0].format,
        packed=packed_as(files[0].path) if files[0].format == "jsonl" else None,
        files=len(files),
        size_bytes=sum(_size(file) for file in files),
        rows_read=rows.number,
        rows=round(number),
        exact=exact,
        shapes=dict(shapes.most_common()),
        columns=columns,
        keys=keys,
        documents=sum(collected.documents.values()),
        text_bytes=by_split.total(),
        train_share=by_split["train"] / max(by_split.total(), 1),
        splits=dict(documents.most_common()),
        has_split=all(record.get("split") is not None for record in rows.records),
        left_out=dict(collected.left_out.most_common()),
        dropped=dict(collected.dropped.most_common()),
        examples=dict(collected.examples),
        unread=dict(unread.most_common()),
        notes={what: count for what, count in notes.most_common() if count},
        found=sample.found,
    )


def _size(file: InputFile) -> int:
    if file.format == "datasets":
        return sum(part.stat().st_size for part in file.path.rglob("*") if part.is_file())
    return file.path.stat().st_size


def _columns(sample: Sample) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns that rows are read from, and fields of a message of the first chat."""
    columns: dict[str, None] = {}
    keys: dict[str, None] = {}
    for record in sample.rows.records:
        found = shape_of(record, sample.entry)
        if found is None:
            continue
        for name in found[1]:
            columns[name] = None
            keys |= dict.fromkeys(_message_keys(record[name]))
    return tuple(columns), tuple(keys)


def _message_keys(value: Any) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [key for message in value if isinstance(message, dict) for key in message]
    return []
