"""Write the golden stores of the present schema version: once per version, then never again.

    python -m tests.make_golden_store

A golden store is small, real, and read by every later version (`tests/test_store_schema_golden.py`).
`expected.json` beside it holds what its arrays were when they were written, as plain numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np

from store_schema import SCHEMA_VERSION
from store_schema.layout import Arrays, Kind
from store_schema.location import open_location
from store_schema.writer import StoreWriter
from tests import store_factory

FOLDER = Path(__file__).parent / "golden"


def plain(arrays: Arrays) -> dict[str, list[float | int | None]]:
    """Arrays as JSON numbers; NaN is null."""
    return {
        name: [None if value != value else value for value in array.tolist()]
        for name, array in arrays.items()
    }


def main() -> None:
    """Write both kinds, two shards each."""
    for kind in get_args(Kind):
        folder = FOLDER / f"v{SCHEMA_VERSION}-{kind}"
        if folder.exists():
            raise SystemExit(f"{folder} is there already; golden stores are never rewritten")
        writer = StoreWriter.open(
            open_location(folder / "store"), store_factory.manifest(kind), store_factory.vocabulary()
        )
        expected = []
        for shard, rows in enumerate([(3, 0, 5), (4, 4)]):
            arrays = store_factory.arrays(kind, rows, seed=shard)
            writer.write(store_factory.shard_record(shard), arrays, {"nats": 1.5})
            expected.append(plain(arrays))
        text = json.dumps(expected, separators=(",", ":"))
        (folder / "expected.json").write_text(text + "\n")
        assert np.isfinite(expected[0]["tail_mass"]).all()


if __name__ == "__main__":
    main()
