"""Blocks of a split: cut between tokens of every model, all nats kept, read back as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse_eval.common_bytes import block_ends, nats_by_block
from fuse_eval.interference.blocks import (
    BLOCKS_FILE,
    by_segment,
    read_blocks,
    text_blocks,
    write_blocks,
)
from store_schema import SCHEMA_VERSION
from store_schema.disk.location import Location, open_location
from store_schema.errors import CorruptionError, MissingError, SchemaVersionError
from tests import store_factory

NATS = {"fused": [1.5, 2.5, 0.0, 4.0], "clm_control": [1.0, 3.0, 0.0, 0.125], "a b": [9.0] * 4}
ENDS = (np.array([100, 230]), np.array([0]), np.array([77]))


def test_blocks_end_at_the_nearest_common_boundary() -> None:
    assert block_ends(np.array([0, 90, 140, 260]), 128).tolist() == [140, 260]
    assert block_ends(np.array([0, 120, 140, 260]), 128).tolist() == [140, 260]  # a tie
    assert block_ends(np.array([10, 20, 70]), 128).tolist() == [60]
    assert block_ends(np.array([7]), 128).tolist() == [0]
    # Two models that share no boundary inside: one block, however long.
    assert block_ends(np.array([0, 5000]), 128).tolist() == [5000]


def test_rows_go_to_the_block_they_begin_in() -> None:
    nats = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    ends = np.array([4, 4, 9, 12, 12], np.uint32)  # the second and the last have no width
    assert nats_by_block(nats, ends, np.array([4, 12])).tolist() == [1.0, 30.0]
    assert nats_by_block(nats, ends, np.array([12])).tolist() == [31.0]
    assert nats_by_block(np.empty(0), np.empty(0, np.uint32), np.array([0])).tolist() == [0.0]


@given(
    widths=st.lists(st.integers(0, 40), min_size=1, max_size=80),
    every=st.integers(1, 5),
    size=st.integers(1, 200),
)
def test_blocks_hold_every_row_once_and_are_of_nearly_one_size(
    widths: list[int], every: int, size: int
) -> None:
    ends = np.cumsum(widths)
    shared = np.unique(np.concatenate([[0], ends[::every], ends[-1:]]))
    blocks = block_ends(shared, size)
    assert set(blocks.tolist()) <= set(shared.tolist())
    assert blocks[-1] == ends[-1]
    sizes = np.diff(blocks, prepend=0)
    assert (sizes > 0).all() or (ends[-1] == 0 and sizes.tolist() == [0])
    # No block is further from what was aimed at than the gaps between boundaries make it.
    gap = np.diff(shared).max(initial=0)
    aimed = ends[-1] / max(1, round(int(ends[-1]) / size))
    assert (np.diff(blocks, prepend=0) <= aimed + gap).all()
    nats = np.random.default_rng(0).exponential(1, len(widths))
    found = nats_by_block(nats, ends.astype(np.uint32), blocks)
    assert len(found) == len(blocks)
    assert found.sum() == pytest.approx(nats.sum())


def _written(folder: Path) -> tuple[Location, dict[str, Any]]:
    location = open_location(str(folder))
    segments = store_factory.segments(["abcd", "efgh", "ijkl"])
    record = write_blocks(location, text_blocks(segments, ENDS, NATS))
    return location, {"blocks": record, "bpb": {model: {} for model in NATS}}


def test_segments_are_sums_of_their_blocks() -> None:
    assert by_segment(ENDS, NATS["fused"]).tolist() == [4.0, 0.0, 4.0]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    location, evaluation = _written(tmp_path)
    blocks = read_blocks(location, evaluation)
    segments = store_factory.segments(["abcd", "efgh", "ijkl"])
    expected = [segments[i] for i in (0, 0, 1, 2)]
    assert blocks.document_ids == tuple(s.document_id for s in expected)
    assert blocks.segment_ids == tuple(s.segment_id for s in expected)
    assert blocks.domains == tuple(s.domain for s in expected)
    assert blocks.numbers.tolist() == [0, 1, 0, 0]
    assert blocks.num_bytes.tolist() == [100, 130, 0, 77]
    assert {model: values.tolist() for model, values in blocks.nats.items()} == NATS


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    _written(tmp_path)
    table = pq.read_table(tmp_path / BLOCKS_FILE)
    assert table.column_names == [
        *("document_id", "segment_id", "domain", "block", "bytes"),
        *("nats_fused", "nats_clm_control", "nats_a b"),
    ]
    version = {b"logitfuse_schema_version": str(SCHEMA_VERSION).encode()}
    assert table.schema.metadata == version


def test_a_file_that_is_not_the_evaluations_is_refused(tmp_path: Path) -> None:
    location, evaluation = _written(tmp_path)
    file = tmp_path / BLOCKS_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptionError, match="not the file that evaluation"):
        read_blocks(location, evaluation)
    file.unlink()
    with pytest.raises(MissingError, match="logitfuse eval run"):
        read_blocks(location, evaluation)


@pytest.mark.parametrize(("step", "hint"), [(1, "upgrade logitfuse"), (-1, "run its stage again")])
def test_a_newer_or_earlier_file_is_refused(tmp_path: Path, step: int, hint: str) -> None:
    location, evaluation = _written(tmp_path)
    evaluation["blocks"]["schema_version"] = SCHEMA_VERSION + step
    with pytest.raises(SchemaVersionError, match=hint):
        read_blocks(location, evaluation)


def test_columns_of_other_models_are_refused(tmp_path: Path) -> None:
    location, evaluation = _written(tmp_path)
    evaluation["bpb"]["another"] = {}
    with pytest.raises(CorruptionError, match="other columns"):
        read_blocks(location, evaluation)
