"""Stores that earlier code wrote: read as they were written, or refused in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from store_schema import SCHEMA_VERSION
from store_schema.disk.location import open_location
from store_schema.errors import SchemaVersionError
from store_schema.store.reader import StoreReader
from tests.store_damage import reseal

GOLDEN = Path(__file__).parent / "golden"
READ = {
    "v4-aligned-exact": "8152ac296cb7f7a6583725580cd2848d",
    "v4-aligned-compact": "88588e9f66b070b56b4f27a004a8768b",
    "v4-bare-source-exact": "55dbc650e5edc66e23e07254addbcc83",
    "v4-bare-source-compact": "7eb7a64fa21f27fbbdca05210608dbd8",
    "v4-bare-generated": "9b82e3300607ff9a798d7fcf61fe7272",
}
"""Fingerprints of those that are read."""
REFUSED = {
    "v4-source-exact": "extra arrays",
    "v4-source-compact": "extra arrays",
    "v4-generated-exact": "distributions of answers",
    "v4-generated-compact": "distributions of answers",
}
"""What those have that is no longer supported."""


def test_every_golden_store_is_looked_at() -> None:
    assert {folder.name for folder in GOLDEN.iterdir()} == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_a_golden_store_reads_as_it_was_written(name: str) -> None:
    reader = StoreReader.open(open_location(GOLDEN / name / "store"))
    assert reader.manifest.schema_version == SCHEMA_VERSION
    assert reader.vocabulary.tokens == (b"", b"a", b"bc")
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert sorted(reader.commits) == list(range(len(expected)))
    for shard, wanted in enumerate(expected):
        reader.verify(shard)
        arrays = reader.read(shard)
        assert set(arrays) == set(wanted)
        for array_name, values in wanted.items():
            found = arrays[array_name]
            array = np.array([np.nan if v is None else v for v in values], found.dtype)
            # Half a unit in the last place of float32: logarithms differ between machines.
            np.testing.assert_allclose(found, array, rtol=1e-7, atol=1e-7, err_msg=array_name)


@pytest.mark.parametrize(("name", "fingerprint"), READ.items())
def test_a_golden_store_keeps_its_fingerprint(name: str, fingerprint: str) -> None:
    manifest = StoreReader.open(open_location(GOLDEN / name / "store")).manifest
    assert manifest.fingerprint() == fingerprint


@pytest.mark.parametrize(("name", "more"), REFUSED.items())
def test_a_store_with_more_than_is_kept_says_what_to_run_again(name: str, more: str) -> None:
    with pytest.raises(SchemaVersionError) as caught:
        StoreReader.open(open_location(GOLDEN / name / "store"))
    stage, differs = (
        ("run", "expected no extras, got extras 'entropy', 'space_mass'")
        if "source" in name
        else ("generate", "expected top_k null, got top_k 4")
    )
    assert caught.value.line() == (
        f"the store has {more}, which are no longer supported in "
        f"{GOLDEN / name / 'store/manifest.json'}: {differs}; "
        f"delete the store and run `logitfuse extract {stage}` again"
    )


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_earlier_version_is_refused_in_one_line(tmp_path: Path, version: int) -> None:
    store = shutil.copytree(GOLDEN / "v4-aligned-exact/store", tmp_path / "store")
    reseal(store / "manifest.json", schema_version=version)
    with pytest.raises(SchemaVersionError) as caught:
        StoreReader.open(open_location(store))
    assert caught.value.line() == (
        f"written by an earlier logitfuse in {store}/manifest.json: expected schema version "
        f"{SCHEMA_VERSION}, got {version}; delete the folder that it belongs to, or give the run "
        "another name, and run its stage again"
    )
