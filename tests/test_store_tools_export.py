"""`store export`: other tools read the very arrays that the reader gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from launch.command import StageGroup
from store_schema.disk.location import open_location
from store_schema.errors import MissingError
from store_schema.layout import FORMS, Arrays, Form
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_tools import export
from store_tools.export import export_command, export_store
from tests import store_factory

VOCAB = 3
ROWS = {0: (40, 0, 60), 2: (7,), 5: ()}


def _store(folder: Path, kind: Form) -> StoreReader:
    location = open_location(folder)
    manifest = store_factory.manifest(kind, vocab_size=VOCAB, top_k=2)
    writer = StoreWriter.open(location, manifest, store_factory.vocabulary())
    for shard, rows in ROWS.items():
        arrays = store_factory.arrays(kind, rows, vocab_size=VOCAB, top_k=2, seed=shard)
        writer.write(store_factory.shard_record(shard), arrays)
    return StoreReader.open(location)


@pytest.fixture(scope="module", params=FORMS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return _store(tmp_path_factory.mktemp("store"), request.param)


def _same(left: object, right: object, name: str) -> None:
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=name, strict=True)


@pytest.mark.parametrize("row_group", [65_536, 16])
def test_parquet_rows_are_the_positions(
    reader: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    monkeypatch.setattr(export, "ROW_GROUP", row_group)
    assert export_store(reader, open_location(tmp_path), "parquet") == (3, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:05d}.parquet" for i in ROWS]
    for shard in ROWS:
        arrays = reader.read(shard)
        file = pq.ParquetFile(tmp_path / f"{shard:05d}.parquet")
        table = file.read()
        total = len(arrays["token_ids"])
        assert table.num_rows == total
        assert file.num_row_groups == max(-(-total // row_group), 1)
        sizes = np.diff(arrays["token_offsets"])
        _same(table["segment_id"], np.repeat(arrays["segment_ids"], sizes), "segment_id")
        positions = [np.arange(n, dtype=np.uint32) for n in sizes]
        _same(table["position"], np.concatenate([np.empty(0, np.uint32), *positions]), "position")
        _same(table["token_id"], arrays["token_ids"], "token_id")
        assert table["token"].to_pylist() == [
            reader.vocabulary.tokens[i] for i in arrays["token_ids"]
        ]
        _same(table["byte_end"], arrays["byte_ends"], "byte_end")
        generated = reader.manifest.kind == "generated"
        for name in ("answer_index", "finish"):
            assert (name in table.column_names) == generated
            if generated:
                _same(table[name], np.repeat(arrays[name], sizes), name)
        distributions = ("tail_mass", "label_logprob", "entry_ids", "entry_logprobs")
        assert set(distributions) & set(table.column_names) == (
            set() if generated else set(distributions)
        )
        if not generated:
            _check_distributions(table, arrays)
        for name in ("origin", "span_index"):
            assert (name in table.column_names) == (reader.manifest.kind == "aligned")
            if name in table.column_names:
                _same(table[name], arrays[name], name)
        if reader.manifest.form == "branched":
            _check_branches(table, arrays)
        metadata = table.schema.metadata
        assert json.loads(metadata[b"logitfuse.manifest"])["source"] == "s"
        assert metadata[b"logitfuse.shard"] == str(shard).encode()


def _check_distributions(table: pa.Table, arrays: Arrays) -> None:
    _same(table["tail_mass"], arrays["tail_mass"], "tail_mass")
    labels = table["label_logprob"].to_pylist()
    assert [label is None for label in labels] == np.isnan(arrays["label_logprobs"]).tolist()
    _same(table["label_logprob"].to_numpy(), arrays["label_logprobs"], "label_logprob")
    for name in ("entry_ids", "entry_logprobs"):
        lists = table[name].combine_chunks()
        rows = lists.to_pylist()
        assert [len(row) for row in rows] == np.diff(arrays["entry_offsets"]).tolist()
        _same(lists.flatten(), arrays[name], name)
    assert table.schema.field("entry_ids").type == pa.list_(pa.uint32())
    assert table.schema.field("entry_logprobs").type == pa.list_(pa.float32())


def _check_branches(table: pa.Table, arrays: Arrays) -> None:
    """Every branch once, in the row of its position."""
    columns = ("branch_tokens", "branch_tail_mass", "branch_entry_ids", "branch_entry_logprobs")
    found = []
    for position, row in enumerate(
        zip(*(table[name].to_pylist() for name in columns), strict=True)
    ):
        found += [(position, *branch) for branch in zip(*row, strict=True)]
    offsets = arrays["branch_entry_offsets"].tolist()
    expected = [
        (
            int(arrays["branch_positions"][b]),
            int(arrays["branch_tokens"][b]),
            float(arrays["branch_tail_mass"][b]),
            arrays["branch_entry_ids"][offsets[b] : offsets[b + 1]].tolist(),
            arrays["branch_entry_logprobs"][offsets[b] : offsets[b + 1]].tolist(),
        )
        for b in range(len(offsets) - 1)
    ]
    assert found == expected


def test_safetensors_are_the_arrays(reader: StoreReader, tmp_path: Path) -> None:
    assert export_store(reader, open_location(tmp_path), "safetensors") == (3, 0)
    for shard in ROWS:
        path = tmp_path / f"{shard:05d}.safetensors"
        tensors, arrays = load_file(path), reader.read(shard)
        assert tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            _same(tensors[name], array, name)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        assert json.loads(metadata["logitfuse.manifest"])["kind"] == reader.manifest.kind
        assert metadata["logitfuse.shard"] == str(shard)
        assert metadata["logitfuse.content_sha256"] == reader.commits[shard].content_sha256


@pytest.mark.parametrize("form", ["parquet", "safetensors"])
def test_files_that_are_there_stay_and_others_are_written_again(
    reader: StoreReader, tmp_path: Path, form: str
) -> None:
    target = open_location(tmp_path)
    assert export_store(reader, target, form, [0, 2]) == (2, 0)
    whole = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert export_store(reader, target, form) == (1, 2)
    for name, (data, time) in whole.items():
        assert (tmp_path / name).read_bytes() == data
        assert (tmp_path / name).stat().st_mtime_ns == time
    first = tmp_path / f"00000.{form}"
    for other in (b"", b"junk" * 9, whole[first.name][0][:-5], whole[f"00002.{form}"][0]):
        first.write_bytes(other)
        assert export_store(reader, target, form) == (1, 2), other[:20]
        # safetensors keeps its metadata in no certain order.
        assert len(first.read_bytes()) == len(whole[first.name][0])
        assert export_store(reader, target, form) == (0, 3)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_to_an_object_store(reader: StoreReader) -> None:
    target = open_location("memory://exports/one")
    assert export_store(reader, target, "parquet", [0]) == (1, 0)
    assert export_store(reader, target, "parquet", [0]) == (0, 1)
    with target.open_read("00000.parquet") as file:
        assert pq.read_table(file).num_rows == 100


def test_a_shard_that_is_not_there(reader: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"1 shard\(s\) not committed \(1\)"):
        export_store(reader, open_location(tmp_path), "parquet", [0, 1])
    assert not list(tmp_path.iterdir())


def test_command(reader: StoreReader, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int | str | None:
        group = StageGroup("store", commands={"export": export_command})
        with pytest.raises(SystemExit) as caught:
            group.main(["export", *map(str, arguments)], prog_name="store")
        return caught.value.code

    url = reader.location.url
    assert run(url, tmp_path, "--shards", "0-0,2") == 0
    assert "2 files written, 0 there already" in capsys.readouterr().out
    assert run(url, tmp_path, "--format", "safetensors") == 0
    assert "3 files written" in capsys.readouterr().out
    assert run(url, tmp_path, "--shards", "0-9") == 2
    assert "not committed (1, 3, 4" in capsys.readouterr().err
    assert run(tmp_path / "none", tmp_path) == 2
    assert run(url, tmp_path, "--format", "pickle") == 2
