"""Stores of every schema version there ever was, read by this one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from store_schema import SCHEMA_VERSION, layout
from store_schema.disk.location import open_location
from store_schema.store.reader import StoreReader

GOLDEN = Path(__file__).parent / "golden"
KINDS = {1: ("source", "aligned"), 2: ("source", "aligned"), 3: layout.KINDS, 4: layout.KINDS}
"""By the version that had them."""


def test_every_version_has_its_golden_stores() -> None:
    assert list(KINDS) == list(range(1, SCHEMA_VERSION + 1))
    wanted = {f"v1-{kind}" for kind in KINDS[1]}  # version 1 had one encoding
    for version, kinds in list(KINDS.items())[1:]:
        wanted |= {f"v{version}-{kind}-{p}" for kind in kinds for p in ("exact", "compact")}
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


@pytest.mark.parametrize(
    ("folder", "fingerprint"),
    [
        ("v1-source", "2ba75346818b6121c93a4c41fb74d5ec"),
        ("v1-aligned", "3cb14d53856f6737dc5285001592c2a6"),
        ("v2-source-exact", "14a8f3a5e16ba2bf7555287996aa8dbb"),
        ("v2-source-compact", "8b1965e98005924386f6c5be627dc451"),
        ("v2-aligned-exact", "d80cd2c57f91f33f4be9bc9c400681dc"),
        ("v2-aligned-compact", "85ecbea8741eec942c7cc5a09e0316ba"),
    ],
)
def test_a_golden_store_keeps_its_fingerprint(folder: str, fingerprint: str) -> None:
    manifest = StoreReader.open(open_location(GOLDEN / folder / "store")).manifest
    assert manifest.fingerprint() == fingerprint
    assert "extras" not in manifest.identity()
