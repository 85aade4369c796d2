"""Exports stores for other tools: a Parquet, safetensors or JSONL file or a Zarr group for each shard.

Parquet has one row per position; an unknown label's log-probability is null. safetensors has the arrays
of docs/store.md as they are, with the manifest as metadata. Files are written atomically, and one that
was made from the same shard is kept. JSONL has one line per answer of a generated store; it has no
metadata, so it is always written. Generated stores have no distributions: their rows are tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from launch.command import echo_json, json_option, set_up_logging
from launch.progress import Progress
from launch.signals import StopFlag, stop_on_signals
from launch.work import parse_shards, shards_in
from store_schema.capture.params import PARAMS_FILE
from store_schema.disk.location import Location, open_location
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, MissingError
from store_schema.layout import KINDS, Arrays
from store_schema.store.answers import read_answers
from store_schema.store.reader import StoreReader
from store_schema.text.vocabulary import Vocabulary
from store_tools.copy import require_outside
from store_tools.export_distillkit import CaptureWriter
from store_tools.export_zarr import group_files, group_metadata, write_group
from store_tools.places import find_places, one_place

ROW_GROUP = 65_536
"""Positions of a Parquet row group, which readers hold in memory at once."""

_HEADER_LIMIT = 100 << 20
"""safetensors' own limit on the header's bytes."""

Metadata = dict[str, str]


def file_metadata(reader: StoreReader, shard: int) -> Metadata:
    """Metadata that identify the shard of an exported file."""
    manifest = reader.manifest.model_dump(mode="json")
    return {
        "logitfuse.manifest": json.dumps(manifest, sort_keys=True),
        "logitfuse.shard": str(shard),
        "logitfuse.content_sha256": reader.commits[shard].content_sha256,
    }


# ------------------------------------------------------------------------------- Parquet


def _rows(offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Offsets relative to the first; a row group has fewer than 2^31 entries."""
    rows: npt.NDArray[np.int32] = (offsets - offsets[0]).astype(np.int32)
    return rows


def position_tables(arrays: Arrays, tokens: pa.Array) -> Iterator[pa.Table]:
    """The positions of a shard as rows, a row group at a time.

    Args:
        arrays: From `StoreReader.read`.
        tokens: [V] binary, the bytes of every token.

    Returns:
        Tables of at most `ROW_GROUP` rows; at least one, even if it is empty.
    """
    starts = arrays["token_offsets"]
    total = len(arrays["token_ids"])
    segments = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    for first in range(0, max(total, 1), ROW_GROUP):
        part = slice(first, min(first + ROW_GROUP, total))
        here = segments[part]
        ids = arrays["token_ids"][part]
        columns: dict[str, Any] = {
            "segment_id": arrays["segment_ids"][here],
            "position": (np.arange(part.start, part.stop) - starts[here]).astype(np.uint32),
            "token_id": ids,
            # Null where the byte table ends before the id.
            "token": tokens.take(pa.array(ids, mask=ids >= len(tokens))),
            "byte_end": arrays["byte_ends"][part],
        }
        if "finish" in arrays:
            columns |= {name: arrays[name][here] for name in ("answer_index", "finish")}
        else:
            columns |= _distributions(arrays, part)
        if "branch_tokens" in arrays:
            columns |= _branches(arrays, part)
        if "origin" in arrays:
            columns |= {"origin": arrays["origin"][part], "span_index": arrays["span_index"][part]}
        yield pa.table(columns)


def _distributions(arrays: Arrays, part: slice) -> dict[str, Any]:
    """Columns with the stored distributions of some positions."""
    offsets = arrays["entry_offsets"][part.start : part.stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    lists = pa.array(_rows(offsets))
    labels = arrays["label_logprobs"][part]
    return {
        "label_logprob": pa.array(labels, mask=np.isnan(labels)),
        "tail_mass": arrays["tail_mass"][part],
        "entry_ids": pa.ListArray.from_arrays(lists, arrays["entry_ids"][entries]),
        "entry_logprobs": pa.ListArray.from_arrays(lists, arrays["entry_logprobs"][entries]),
    }


def _branches(arrays: Arrays, part: slice) -> dict[str, Any]:
    """Columns with the branches of some positions: lists of the entries that they follow, of their own
    entries and of their tails."""
    bounds = np.searchsorted(arrays["branch_positions"], np.arange(part.start, part.stop + 1))
    here = slice(int(bounds[0]), int(bounds[-1]))
    offsets = arrays["branch_entry_offsets"][here.start : here.stop + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    by_position, by_branch = pa.array(_rows(bounds)), pa.array(_rows(offsets))

    def nested(name: str) -> pa.Array:
        rows = pa.ListArray.from_arrays(by_branch, arrays[name][entries])
        return pa.ListArray.from_arrays(by_position, rows)

    return {
        "branch_tokens": pa.ListArray.from_arrays(by_position, arrays["branch_tokens"][here]),
        "branch_tail_mass": pa.ListArray.from_arrays(by_position, arrays["branch_tail_mass"][here]),
        "branch_entry_ids": nested("branch_entry_ids"),
        "branch_entry_logprobs": nested("branch_entry_logprobs"),
    }


def parquet_bytes(arrays: Arrays, vocabulary: Vocabulary, metadata: Metadata) -> bytes:
    """A shard as a Parquet file."""
    tokens = pa.array(vocabulary.tokens, pa.binary())
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    for table in position_tables(arrays, tokens):
        schema = table.schema.with_metadata(metadata)
        writer = writer or pq.ParquetWriter(sink, schema, compression="zstd")
        writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
    if writer is not None:
        writer.close()
    return bytes(sink.getvalue())


def _parquet_metadata(location: Location, key: str) -> Metadata:
    with location.open_read(key) as file:
        metadata = pq.read_schema(file).metadata or {}
    return {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"logitfuse.")}


# ------------------------------------------------------------------------------- safetensors


def safetensors_bytes(arrays: Arrays, vocabulary: Vocabulary, metadata: Metadata) -> bytes:
    """A shard as a safetensors file.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ConfigError(
            "safetensors is not installed", where="--format", hint="pip install safetensors"
        ) from error
    return bytes(save(arrays, metadata=metadata))


def _safetensors_metadata(location: Location, key: str) -> Metadata:
    with location.open_read(key) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length <= _HEADER_LIMIT else {}
        size = file.seek(0, os.SEEK_END)
    metadata: Metadata = header.pop("__metadata__", {})
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    return metadata if size == 8 + length + max(ends, default=0) else {}


# ------------------------------------------------------------------------------- JSONL


def jsonl_bytes(arrays: Arrays, vocabulary: Vocabulary, metadata: Metadata) -> bytes:
    """The answers of a shard, one JSON object per line.

    Invalid UTF-8, as where an answer ends inside a character, becomes U+FFFD.

    Raises:
        ConfigError: The store is not a generated one.
    """
    if "finish" not in arrays:
        raise ConfigError(
            "only generated stores have answers to write",
            where="--format jsonl",
            hint="take parquet",
        )
    lines = [
        json.dumps(
            {
                "segment_id": answer.row,
                "answer_index": answer.number,
                "finish": answer.finish.name.lower(),
                "text": answer.text.decode(errors="replace"),
                "num_tokens": answer.num_tokens,
            },
            ensure_ascii=False,
        )
        for answer in read_answers(arrays, vocabulary)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _no_metadata(location: Location, key: str) -> Metadata:
    return {}


# ------------------------------------------------------------------------------- the command

FORMATS: dict[
    str, tuple[Callable[[Arrays, Vocabulary, Metadata], bytes], Callable[[Location, str], Metadata]]
] = {
    "parquet": (parquet_bytes, _parquet_metadata),
    "safetensors": (safetensors_bytes, _safetensors_metadata),
    "jsonl": (jsonl_bytes, _no_metadata),
}
"""Formats of one file a shard: how it is written, and how its metadata are read if it is there."""

GROUPS, CAPTURES = "zarr", "distillkit"
PARAMS = "logitfuse.compression"
"""Key of a capture's compression parameters in the metadata of its files."""


def file_name(form: str, shard: int) -> str:
    """Key of an exported shard."""
    return f"data_{shard:05d}.parquet" if form == CAPTURES else f"{shard:05d}.{form}"


def _is_there(location: Location, key: str, form: str, wanted: Metadata) -> bool:
    """Whether a file exists and was made from this shard, by its metadata."""
    read = _parquet_metadata if form == CAPTURES else group_metadata
    if not location.exists(f"{key}/zarr.json" if form == GROUPS else key):
        return False
    try:
        with storage_errors(f"{location.url}/{key}"):
            return (FORMATS[form][1] if form in FORMATS else read)(location, key) == wanted
    except (ValueError, LookupError, AttributeError, TypeError):  # pa.ArrowInvalid is a ValueError
        return False  # not an exported file: it is overwritten


def export_store(
    reader: StoreReader,
    target: Location,
    form: str,
    shards: Iterable[int] | None = None,
    flag: StopFlag | None = None,
    capture: CaptureWriter | None = None,
) -> tuple[int, int]:
    """Write the shards as files of another format.

    Args:
        reader: The store.
        target: Folder or URL of the files, named as in `file_name`.
        form: A name in `FORMATS`, `GROUPS` or `CAPTURES`.
        shards: Shards to export; None exports all that are committed.
        flag: Checked between shards.
        capture: Of the store, for the format `CAPTURES`.

    Returns:
        Number of files written, and of files that were there already.

    Raises:
        MissingError: One of `shards` is not committed.
        CorruptionError: A shard is damaged.
        StorageError: A file cannot be read or written.
    """
    wanted = sorted(reader.commits) if shards is None else list(shards)
    missing = [shard for shard in wanted if shard not in reader.commits]
    if missing:
        raise MissingError(
            f"{len(missing)} shard(s) not committed ({', '.join(map(str, missing[:10]))})",
            where=reader.location.url,
            hint="leave them out, or rerun the stage that writes this store",
        )
    vocabulary = reader.vocabulary
    written = 0
    if capture is not None:
        target.write_atomic(PARAMS_FILE, capture.params_yaml())
    positions = {shard: reader.commits[shard].counts.positions for shard in wanted}
    with Progress(f"export {form}", sum(positions.values()), unit="pos") as progress:
        for shard in wanted:
            if flag is not None:
                flag.check()
            key = file_name(form, shard)
            metadata = file_metadata(reader, shard)
            if capture is not None:
                metadata[PARAMS] = capture.params.model_dump_json()
            if not _is_there(target, key, form, metadata):
                arrays = reader.read(shard)
                if form == GROUPS:
                    write_group(target, key, group_files(arrays, metadata))
                elif capture is not None:
                    target.write_atomic(key, capture.parquet_bytes(shard, arrays, metadata))
                else:
                    target.write_atomic(key, FORMATS[form][0](arrays, vocabulary, metadata))
                written += 1
            progress.add(positions[shard])
    return written, len(wanted) - written


@click.command("export")
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--format",
    "form",
    type=click.Choice([*FORMATS, GROUPS, CAPTURES]),
    default="parquet",
    show_default=True,
    help="Parquet: a row per position. safetensors: the arrays as they are. jsonl: a line per "
    "answer of a generated store. zarr: a group with the arrays, for any reader of Zarr v3. "
    "distillkit: a capture for DistillKit.",
)
@click.option(
    "--compression",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With distillkit: YAML with its compression parameters. Default: every entry as float32.",
)
@click.option(
    "--source", "names", multiple=True, metavar="NAME", help="Store of a run: its source."
)
@click.option("--kind", type=click.Choice(KINDS), help="Store of a run: its kind.")
@click.option("--plan", metavar="PATH", help="With distillkit: the plan. Default: as for `verify`.")
@click.option("--shards", metavar="LIST", help="Only these shards, such as 3-7 or 0,3-7.")
@json_option
def export_command(
    source: str,
    out: str,
    form: str,
    shards: str | None,
    compression: Path | None,
    as_json: bool,
    **chosen_store: Any,
) -> None:
    """Write the store SOURCE to the folder or URL OUT, for other tools.

    SOURCE is a store's folder or URL, or a run file with --source and --kind that leave one.
    """
    set_up_logging()
    if compression is not None and form != CAPTURES:
        raise ConfigError("goes with --format distillkit alone", where="--compression")
    sources = chosen_store.pop("names")
    place = one_place(find_places(source, sources=sources, **chosen_store))
    reader = StoreReader.open(place.location)
    capture = CaptureWriter(place, reader, compression) if form == CAPTURES else None
    chosen = None if shards is None else shards_in(parse_shards(shards))
    with stop_on_signals() as flag:
        target = open_location(out)
        require_outside(reader.location, target)
        written, there = export_store(reader, target, form, chosen, flag, capture)
    if as_json:
        echo_json({"out": target.url, "written": written, "skipped": there})
    else:
        click.echo(f"{written} files written, {there} there already")
