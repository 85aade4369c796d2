"""Exports a store as a capture of DistillKit: Parquet files and their compression parameters.

One row is a segment: `input_ids` with its context, and a distribution after each token but the last. A
position with fewer than k entries is filled up with others of probability 0. Where no distribution is
known (inside a prompt, or where an alignment has none) `labels` is -100, which its losses leave out.

Shapes: R rows (positions), K entries, C bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from store_schema.capture.distillkit import pack_ids, pack_logprobs
from store_schema.capture.params import Params, read_params
from store_schema.config import ModelRef, load_run
from store_schema.errors import ConfigError, MismatchError
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from store_tools.places import StorePlace, planned_shard

PADDING_LOGPROB = -1000.0
"""Of entries that only fill a position up to k: probability 0 in float32, and finite."""
IGNORED = -100
"""A label that losses leave out."""
ROW_GROUP = 64
"""Segments of a Parquet row group."""
BLOCK = 8192
"""Positions that are packed at a time."""

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ("labels", pa.list_(pa.int64())),
    ]
)


class CaptureWriter:
    """Makes the files of a capture.

    Args:
        place: The store, with its plan.
        reader: The same, opened.
        params_file: Their YAML file with compression parameters; None keeps every entry of the store
            as it is.

    Raises:
        ConfigError: The store has no distributions, has no plan, or the parameters do not fit.
        MismatchError: Plan or tokenizer are not the store's.
    """

    def __init__(
        self, place: StorePlace, reader: StoreReader, params_file: Path | None = None
    ) -> None:
        manifest = reader.manifest
        if manifest.kind == "generated" or manifest.estimator != "topk":
            raise ConfigError(
                "a capture has the most probable entries of a text",
                where="--format distillkit",
                expected="a source store or an aligned one",
                got="answers" if manifest.kind == "generated" else "sampled entries",
            )
        plan = place.plan()
        if plan is None:
            raise ConfigError(
                "a capture needs the plan, for the tokens before each text",
                where=reader.location.url,
                hint="give the run file, or the plan with --plan",
            )
        reader.require_plan(plan)
        self.plan: Plan = plan
        self.reader = reader
        self.params = _params(params_file, manifest.max_entries, manifest.vocab_size)
        self.tokenizer = _tokenizer(place, reader)

    def params_yaml(self) -> bytes:
        """Their compression_config.yaml."""
        return yaml.safe_dump(self.params.model_dump(mode="json")).encode()

    def parquet_bytes(self, shard: int, arrays: Arrays, metadata: dict[str, str]) -> bytes:
        """The segments of a shard as a Parquet file.

        Raises:
            ConfigError: Positions have too few entries for the compression parameters.
            MismatchError: The shard has other segments than the plan.
        """
        sink = pa.BufferOutputStream()
        schema = _SCHEMA.with_metadata(metadata)
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for table in self._tables(shard, arrays):
                writer.write_table(table.cast(schema))
        return bytes(sink.getvalue())

    def _tables(self, shard: int, arrays: Arrays) -> Iterator[pa.Table]:
        where = f"{self.reader.location.url}, shard {shard}"
        record = planned_shard(self.plan, shard, where)
        self.reader.require_shards([record])
        contexts = [
            self.tokenizer.context_ids(s.context, where=f"segment {s.segment_id}")
            for s in self.plan.segments(record)
        ]
        for first in range(0, max(len(contexts), 1), ROW_GROUP):
            rows = [
                (np.array(contexts[d], np.int64), slice(*arrays["token_offsets"][d : d + 2]))
                for d in range(first, min(first + ROW_GROUP, len(contexts)))
            ]
            yield self._table([row for row in rows if row[1].stop > row[1].start], arrays, where)

    def _table(
        self, rows: Sequence[tuple[npt.NDArray[np.int64], slice]], arrays: Arrays, where: str
    ) -> pa.Table:
        """Segments, each with its context's tokens and its part of the shard's positions."""
        counts = np.diff(arrays["entry_offsets"])
        inputs, labels, positions = [], [], []
        for context, part in rows:
            ids = np.concatenate([context, arrays["token_ids"][part].astype(np.int64)])
            # The distribution after token j is that of the next token; -1 inside a context.
            after = np.arange(1, len(ids)) - len(context) + part.start
            after[: max(len(context) - 1, 0)] = -1
            known = (after >= 0) & (counts[np.maximum(after, 0)] > 0)
            inputs.append(ids)
            positions.append(np.where(known, after, -1))
            labels.append(np.append(np.where(known, ids[:-1], IGNORED), ids[-1:]))
        wanted = np.concatenate([np.empty(0, np.int64), *positions])
        packed = [self._packed(part, arrays, where) for part in _blocks(wanted)]
        logprobs, ids_RC = (np.concatenate(column) for column in zip(*packed, strict=True))
        lengths = [len(part) for part in positions]
        columns = [
            _lists(inputs, pa.uint64()),
            _nested(logprobs, lengths),
            _nested(ids_RC, lengths),
            _lists(labels, pa.int64()),
        ]
        return pa.Table.from_arrays(columns, schema=_SCHEMA)

    def _packed(
        self, positions_R: npt.NDArray[np.int64], arrays: Arrays, where: str
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """[R, C] bytes of log-probabilities and of ids; -1 is a position that is not known."""
        params = self.params
        ids_RK, logprobs_RK, counts_R = padded_entries(positions_R, arrays, params.k)
        short = (counts_R > 0) & (counts_R < params.k)
        if short.any() and params.exact_k < params.k:
            raise ConfigError(
                f"{int(short.sum()):,} positions have fewer entries than the compression has",
                where=where,
                expected=f"{params.k} entries each, for a curve through them",
                got=f"{int(counts_R[short].min())} at one",
                hint="leave out --compression, or give parameters with a smaller k or with "
                "exact_k equal to k",
            )
        return pack_logprobs(logprobs_RK, params), pack_ids(ids_RK, params)


def padded_entries(
    positions_R: npt.NDArray[np.int64], arrays: Arrays, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The k best entries of some positions.

    Args:
        positions_R: Positions of the shard; -1 for none.
        arrays: Of the shard.
        k: Entries of each, at most the size of the vocabulary.

    Returns:
        [R, K] ids, each once in a row; [R, K] log-probabilities, `PADDING_LOGPROB` for those that are
        no entries; [R] the number of entries.
    """
    offsets, unknown_R = arrays["entry_offsets"], positions_R < 0
    starts_R = np.where(unknown_R, 0, offsets[:-1][positions_R])
    counts_R = np.minimum(np.where(unknown_R, 0, np.diff(offsets)[positions_R]), k)
    place_K = np.arange(k)
    there_RK = place_K < counts_R[:, None]
    at_E = (starts_R[:, None] + place_K)[there_RK]
    ids_RK = np.zeros(there_RK.shape, np.int64)
    ids_RK[there_RK] = arrays["entry_ids"][at_E]
    logprobs_RK = np.full(there_RK.shape, PADDING_LOGPROB)
    logprobs_RK[there_RK] = arrays["entry_logprobs"][at_E]
    # Of the ids below k, those that are no entry come first: there are k - count of them at least.
    taken_RK = np.zeros(there_RK.shape, bool)
    rows, columns = np.nonzero(there_RK & (ids_RK < k))
    taken_RK[rows, ids_RK[rows, columns]] = True
    free_RK = np.argsort(taken_RK, axis=1, kind="stable")
    filled_RK = np.take_along_axis(free_RK, np.maximum(place_K - counts_R[:, None], 0), axis=1)
    return np.where(there_RK, ids_RK, filled_RK), logprobs_RK, counts_R


def _blocks(positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [positions[i : i + BLOCK] for i in range(0, max(len(positions), 1), BLOCK)]


def _params(path: Path | None, top_k: int, vocab_size: int) -> Params:
    if path is None:
        k = min(top_k, vocab_size)
        return Params(d=max(vocab_size, 2), k=k, exact_k=k, delta_encoding=False)
    params = read_params(path)
    if not isinstance(params, Params) or params.d < vocab_size or params.k > params.d:
        raise ConfigError(
            "compression parameters that the store cannot be written with",
            where=path,
            expected=f"those of `logprob_compressor`, with d {vocab_size} or more",
            got=f"d {params.d}, k {params.k}",
        )
    return params


def _tokenizer(place: StorePlace, reader: StoreReader) -> SegmentTokenizer:
    """The tokenizer of the store's tokens, which knows the tokens before a text."""
    manifest = reader.manifest
    made = manifest.target or manifest.model
    ref = ModelRef(
        model=made.name, revision=made.revision, gguf_file=made.gguf_file, bos=made.bos or "auto"
    )
    if place.run_file is not None:
        run = load_run(place.run_file)
        ref = run.target if manifest.kind == "aligned" else run.sources[manifest.source]
    tokenizer = SegmentTokenizer.load(ref, name=manifest.source)
    if tokenizer.fingerprint != made.tokenizer_fingerprint:
        raise MismatchError(
            "another tokenizer than the store's",
            where=ref.model,
            expected=f"tokenizer {made.tokenizer_fingerprint}",
            got=f"tokenizer {tokenizer.fingerprint}",
            hint="give the run file in place of the store, with --source and --kind",
        )
    return tokenizer


def _lists(parts: Sequence[npt.NDArray[np.int64]], kind: Any) -> pa.Array:
    values = pa.array(np.concatenate([np.empty(0, np.int64), *parts])).cast(kind)
    return pa.ListArray.from_arrays(_offsets([len(part) for part in parts]), values)


def _nested(rows_RC: npt.NDArray[np.uint8], lengths: Sequence[int]) -> pa.Array:
    """A list for each segment, with a list of bytes for each of its positions."""
    bounds = np.arange(len(rows_RC) + 1, dtype=np.int64) * rows_RC.shape[1]
    inner = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(rows_RC.ravel()))
    return pa.ListArray.from_arrays(_offsets(lengths), inner)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
