"""Write the golden stores of the present schema version: once per version, then never again.

    python -m tests.make_golden_store

A golden store is small and real, and read as it was written (`tests/test_store_schema_golden.py`).
`expected.json` beside it holds what its arrays were when they were written, as plain numbers. Of
version 4 those named `bare` have what is kept now; the other source and generated stores have more.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from store_schema import SCHEMA_VERSION
from store_schema.disk.location import open_location
from store_schema.layout import KINDS, Arrays
from store_schema.presets import PRESETS
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from tests import store_factory

FOLDER = Path(__file__).parent / "golden"
VOCAB_SIZE = 300
"""Small: the rank table is a file of the store."""


def plain(arrays: Arrays) -> dict[str, list[float | int | None]]:
    """Arrays as JSON numbers; NaN is null."""
    return {
        name: [None if value != value else value for value in array.tolist()]
        for name, array in arrays.items()
    }


def main() -> None:
    """Write every kind, as it is and compact, two shards each."""
    for kind, preset in itertools.product(KINDS, ("exact", "compact")):
        folder = FOLDER / f"v{SCHEMA_VERSION}-{kind}-{preset}"
        if folder.exists():
            raise SystemExit(f"{folder} is there already; golden stores are never rewritten")
        writer = StoreWriter.open(
            open_location(folder / "store"),
            store_factory.manifest(kind, vocab_size=VOCAB_SIZE, encoding=PRESETS[preset]),
            store_factory.vocabulary(),
            count_tokens=lambda: np.arange(VOCAB_SIZE) % 7,
        )
        expected = []
        for shard, rows in enumerate([(3, 0, 5), (4, 4)]):
            arrays = store_factory.arrays(kind, rows, vocab_size=VOCAB_SIZE, seed=shard)
            writer.write(store_factory.shard_record(shard), arrays, {"nats": 1.5})
            expected.append(plain(StoreReader.open(writer.location).read(shard)))
        text = json.dumps(expected, separators=(",", ":"))
        (folder / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
