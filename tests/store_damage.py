"""Small stores to damage, and the tools of someone who damages them on purpose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from store_schema.disk.location import open_location
from store_schema.fingerprint import fingerprint
from store_schema.layout import Arrays, Form
from store_schema.manifest import Manifest
from store_schema.presets import PRESETS, Preset
from store_schema.store.reader import StoreReader, commit_key
from store_schema.store.writer import StoreWriter
from tests import store_factory

VOCAB_SIZE = 500


def manifest(kind: Form = "source", *, preset: Preset = "exact", top_k: int = 4) -> Manifest:
    """Manifest of a store with a small vocabulary."""
    made = store_factory.manifest(kind, vocab_size=VOCAB_SIZE, top_k=top_k)
    return made.model_copy(update={"encoding": PRESETS[preset]})


def writer(folder: Path, kind: Form = "source", *, preset: Preset = "exact") -> StoreWriter:
    """A writer of such a store."""
    return StoreWriter.open(
        open_location(folder), manifest(kind, preset=preset), store_factory.vocabulary()
    )


def arrays(kind: Form = "source", rows: Sequence[int] = (40, 0, 60), seed: int = 0) -> Arrays:
    """Content of a shard of it."""
    return store_factory.arrays(kind, rows, vocab_size=VOCAB_SIZE, seed=seed)


def make_store(folder: Path, kind: Form = "source", *, preset: Preset = "exact") -> Path:
    """A store of one shard."""
    writer(folder, kind, preset=preset).write(store_factory.shard_record(), arrays(kind))
    return folder


def files_of(folder: Path) -> list[Path]:
    """All files below, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def copy(source: Path, folder: Path) -> Path:
    """A copy (hard links would damage the original too)."""
    for file in files_of(source):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((source / file).read_bytes())
    return folder


def same(left: Arrays, right: Arrays) -> bool:
    """Whether two shards are equal, NaN to NaN."""
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype
        and np.array_equal(left[name], right[name], equal_nan=left[name].dtype.kind == "f")
        for name in left
    )


def read_everything(folder: Path) -> dict[int, Arrays]:
    """All that a stage may read of a store, checked."""
    reader = StoreReader.open(open_location(folder))
    assert reader.vocabulary.tokens == store_factory.vocabulary().tokens
    for shard in reader.commits:
        reader.verify(shard)
    return {shard: reader.read(shard) for shard in reader.commits}


# ------------------------------------------------------------------------------- on purpose


def checksum(data: bytes) -> int:
    """CRC-32C, as commits keep it."""
    return int(google_crc32c.value(data))


def reseal(file: Path, **changes: object) -> None:
    """Change fields of a record and make its digest right again."""
    content = json.loads(file.read_text())
    del content["digest"]
    content |= changes
    file.write_text(json.dumps(content | {"digest": fingerprint(content)}))


def replace_data(folder: Path, key: str, data: bytes) -> None:
    """Put other bytes in place of a data file of shard 0 and have the commit vouch for them."""
    commit = json.loads((folder / commit_key(0)).read_text())
    path = folder / commit["path"] / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    record = {"size": len(data), "crc32c": checksum(data)}
    reseal(folder / commit_key(0), files=commit["files"] | {key: record})


def change_metadata(folder: Path, key: str, **changes: object) -> None:
    """Change a zarr.json of shard 0; None takes a key away."""
    commit = json.loads((folder / commit_key(0)).read_text())
    document = json.loads((folder / commit["path"] / key).read_text()) | changes
    kept = {name: value for name, value in document.items() if value is not None}
    replace_data(folder, key, json.dumps(kept).encode())


def shard_file(chunks: Sequence[bytes], index: Any = None) -> bytes:
    """A Zarr shard with right checksums, whatever its chunks hold."""
    body, places = b"", []
    for chunk in chunks:
        summed = chunk + checksum(chunk).to_bytes(4, "little")
        places.append((len(body), len(summed)))
        body += summed
    table = np.asarray(places if index is None else index, "<u8").tobytes()
    return body + table + checksum(table).to_bytes(4, "little")
