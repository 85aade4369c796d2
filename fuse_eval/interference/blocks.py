"""blocks.parquet: NLL of every block of the evaluated text under every model.

A document's blocks give the noise of two models' difference on it. The file also allows comparing runs
document by document without their models. evaluation.json, written after it, has its digest.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store_schema import SCHEMA_VERSION
from store_schema.disk.location import Location
from store_schema.disk.parquet import read_parquet
from store_schema.disk.sealed import require_schema
from store_schema.errors import CorruptionError, MissingError
from store_schema.fingerprint import bytes_digest
from store_schema.plan.plan import Segment

BLOCKS_FILE = "blocks.parquet"
_MAX_BYTES = 1 << 32
_AGAIN = "delete it and rerun `logitfuse eval run`"

Floats = npt.NDArray[np.float64]
Ends = Sequence[npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a split, segment by segment in plan order.

    Args:
        document_ids: [K] document of each block.
        segment_ids: [K] its segment.
        domains: [K] its domain.
        numbers: [K] int32 number within the segment, from 0.
        num_bytes: [K] int64 bytes; 0 for the only block of a segment without scored bytes.
        nats: Model to [K] NLL over those bytes.
    """

    document_ids: tuple[str, ...]
    segment_ids: tuple[str, ...]
    domains: tuple[str, ...]
    numbers: npt.NDArray[np.int32]
    num_bytes: npt.NDArray[np.int64]
    nats: dict[str, Floats]


def text_blocks(
    segments: Sequence[Segment], ends: Ends, nats: Mapping[str, Sequence[float]]
) -> Blocks:
    """Join the blocks of a split with their scores.

    Args:
        segments: [D] scored segments.
        ends: [D] ends of each one's blocks.
        nats: Model to [K] nats of all blocks, segment by segment.
    """
    counts = [len(one) for one in ends]
    repeated = [segment for segment, n in zip(segments, counts, strict=True) for _ in range(n)]
    return Blocks(
        document_ids=tuple(s.document_id for s in repeated),
        segment_ids=tuple(s.segment_id for s in repeated),
        domains=tuple(s.domain for s in repeated),
        numbers=np.fromiter(chain.from_iterable(map(range, counts)), np.int32, sum(counts)),
        num_bytes=block_sizes(ends),
        nats={model: np.asarray(values, np.float64) for model, values in nats.items()},
    )


def block_sizes(ends: Ends) -> npt.NDArray[np.int64]:
    """[K] bytes of all blocks, segment by segment."""
    return np.concatenate([np.diff(one, prepend=0) for one in ends])


def by_segment(ends: Ends, nats: Sequence[float]) -> Floats:
    """[D] nats of each segment from the nats of all blocks."""
    counts = [len(one) for one in ends]
    starts = np.cumsum([0, *counts[:-1]])
    return np.add.reduceat(np.asarray(nats, np.float64), starts)


def write_blocks(location: Location, blocks: Blocks) -> dict[str, Any]:
    """Write blocks.parquet.

    Returns:
        Record of the file for evaluation.json: its schema version, rows and SHA-256.
    """
    table = pa.table(
        [
            pa.array(blocks.document_ids, pa.string()),
            pa.array(blocks.segment_ids, pa.string()),
            pa.array(blocks.domains, pa.string()),
            pa.array(blocks.numbers, pa.int32()),
            pa.array(blocks.num_bytes, pa.int64()),
            *(pa.array(values, pa.float64()) for values in blocks.nats.values()),
        ],
        schema=_schema(list(blocks.nats)),
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    location.write_atomic(BLOCKS_FILE, buffer.getvalue())
    return {
        "schema_version": SCHEMA_VERSION,
        "rows": len(table),
        "digest": bytes_digest(buffer.getvalue()),
    }


def read_blocks(location: Location, evaluation: Mapping[str, Any]) -> Blocks:
    """Read blocks.parquet.

    Args:
        location: Folder report/ of a run.
        evaluation: Its evaluation.json.

    Raises:
        MissingError: The file is not there, or evaluation.json is from before it was written.
        SchemaVersionError: A newer or an earlier logitfuse wrote it.
        CorruptionError: It is not the file that evaluation.json was made with.
    """
    where = f"{location.url}/{BLOCKS_FILE}"
    record = evaluation.get("blocks")
    if not isinstance(record, dict) or not location.exists(BLOCKS_FILE):
        raise MissingError(
            "no NLL of single blocks", where=where, hint="run `logitfuse eval run` to write it"
        )
    require_schema(record.get("schema_version"), where=where, hint=_AGAIN)
    data = location.read_bytes(BLOCKS_FILE)
    if bytes_digest(data) != record["digest"]:
        raise CorruptionError(
            "not the file that evaluation.json was made with",
            where=where,
            expected=f"SHA-256 {record['digest']}",
            got=bytes_digest(data),
            hint=_AGAIN,
        )
    models = list(evaluation["bpb"])
    table = read_parquet(
        data,
        _schema(models),
        max_rows=record["rows"],
        max_bytes=_MAX_BYTES,
        where=where,
        hint=_AGAIN,
    )
    return Blocks(
        document_ids=tuple(table["document_id"].to_pylist()),
        segment_ids=tuple(table["segment_id"].to_pylist()),
        domains=tuple(table["domain"].to_pylist()),
        numbers=table["block"].to_numpy(),
        num_bytes=table["bytes"].to_numpy(),
        nats={model: table[f"nats_{model}"].to_numpy() for model in models},
    )


def _schema(models: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [
            ("document_id", pa.string()),
            ("segment_id", pa.string()),
            ("domain", pa.string()),
            ("block", pa.int32()),
            ("bytes", pa.int64()),
            *((f"nats_{model}", pa.float64()) for model in models),
        ],
        metadata={"logitfuse_schema_version": str(SCHEMA_VERSION)},
    )
