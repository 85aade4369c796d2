"""Stores of every schema version there ever was, read by this one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from store_schema import SCHEMA_VERSION
from store_schema.location import open_location
from store_schema.reader import StoreReader

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("source", "aligned")


def test_every_version_has_its_golden_stores() -> None:
    wanted = {f"v1-{kind}" for kind in KINDS}  # version 1 had one encoding
    for version in range(2, SCHEMA_VERSION + 1):
        wanted |= {f"v{version}-{kind}-{p}" for kind in KINDS for p in ("exact", "compact")}
    assert {folder.name for folder in GOLDEN.iterdir()} == wanted


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda folder: folder.name)
def test_a_golden_store_reads_as_it_was_written(folder: Path) -> None:
    reader = StoreReader.open(open_location(folder / "store"))
    assert reader.vocabulary.tokens == (b"", b"a", b"bc")
    expected = json.loads((folder / "expected.json").read_text())
    assert sorted(reader.commits) == list(range(len(expected)))
    for shard, wanted in enumerate(expected):
        reader.verify(shard)
        arrays = reader.read(shard)
        assert set(arrays) == set(wanted)
        for name, values in wanted.items():
            array = np.array([np.nan if v is None else v for v in values], arrays[name].dtype)
            # Half a unit in the last place of float32: logarithms differ between machines.
            np.testing.assert_allclose(arrays[name], array, rtol=1e-7, atol=1e-7, err_msg=name)
