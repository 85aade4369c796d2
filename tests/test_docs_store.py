"""The standalone reader of docs/store.md does what it says, without any of our code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from store_schema.disk.location import open_location
from store_schema.layout import Kind
from store_schema.presets import PRESETS, Preset
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from tests import store_factory

DOCS = Path(__file__).resolve().parent.parent / "docs/store.md"
VOCAB = 300
TEXT_ROWS = ("token_counts", "token_ranks", "token_bytes", "answer_index", "finish")
"""On disk, of a generated store."""


def _script(folder: Path) -> Path:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "ids_by_rank.npy" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 31
    assert set(re.findall(r"^import (.*)$", code, re.MULTILINE)) == {
        "json, pathlib, sys",
        "numpy as np, zarr",
    }
    path = folder / "reader.py"
    path.write_text(code)
    return path


@pytest.mark.filterwarnings("ignore:Numcodecs codecs:zarr.errors.ZarrUserWarning")
def test_the_table_says_how_answers_lie_on_disk(tmp_path: Path) -> None:
    writer = StoreWriter.open(
        open_location(tmp_path),
        store_factory.manifest("generated", vocab_size=VOCAB),
        store_factory.vocabulary(),
        count_tokens=lambda: np.random.default_rng(0).integers(0, 9, VOCAB),
    )
    arrays = store_factory.arrays("generated", (9, 0, 30), vocab_size=VOCAB)
    path = tmp_path / writer.write(store_factory.shard_record(), arrays).path
    assert {p.parent.name for p in path.glob("*/zarr.json")} == {"segment_ids", *TEXT_ROWS}
    read = {name: zarr.open_array(path / name, mode="r")[:] for name in TEXT_ROWS}
    ours = StoreReader.open(writer.location).read(0)
    for name in ("answer_index", "finish"):
        np.testing.assert_array_equal(read[name], ours[name])
    np.testing.assert_array_equal(read["token_counts"], np.diff(ours["token_offsets"]))
    ids_by_rank = np.load(tmp_path / "ids_by_rank.npy")
    np.testing.assert_array_equal(ids_by_rank[read["token_ranks"]], ours["token_ids"])
    ends = [np.cumsum(part) for part in np.split(read["token_bytes"], ours["token_offsets"][1:-1])]
    np.testing.assert_array_equal(np.concatenate(ends), ours["byte_ends"])
    table = DOCS.read_text(encoding="utf-8")
    assert all(f"{name} |" in table or f"{name}," in table for name in TEXT_ROWS)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("source", "exact"),
        ("source", "fine"),
        ("source", "tiny"),
        ("aligned", "compact"),
    ],
)
def test_standalone_reader_reads_what_ours_reads(
    tmp_path: Path, kind: Kind, preset: Preset
) -> None:
    writer = StoreWriter.open(
        open_location(tmp_path / "store"),
        store_factory.manifest(kind, vocab_size=VOCAB, top_k=30, encoding=PRESETS[preset]),
        store_factory.vocabulary(),
        count_tokens=lambda: np.random.default_rng(0).integers(0, 9, VOCAB),
    )
    arrays = store_factory.arrays(kind, (9, 0, 30), top_k=30, vocab_size=VOCAB, seed=4)
    writer.write(store_factory.shard_record(), arrays)
    ours = StoreReader.open(writer.location).read(0)
    offsets = ours["entry_offsets"]
    script = _script(tmp_path)
    checked = 0
    for position in np.flatnonzero(np.diff(offsets))[[0, 7, -1]]:
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-W",
                "ignore",
                script,
                str(tmp_path / "store"),
                "0",
                str(position),
            ],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        part = slice(offsets[position], offsets[position + 1])
        assert [int(line[0]) for line in lines] == ours["entry_ids"][part].tolist()
        found = [float(line[1]) for line in lines]
        np.testing.assert_allclose(found, ours["entry_logprobs"][part], atol=1e-4)
        checked += len(lines)
    assert checked > 10
