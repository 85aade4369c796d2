"""Input files that are packed, damaged, only half there, or count their rows as others do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from extract.corpus.corpus import corpus_location, iter_documents, open_corpus, read_documents
from store_schema.config import load_run
from tests.command import ok, refused
from tests.extract_runs import write_run

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
NO_MODELS = {"code": Path("m/code"), "target": Path("m/target")}
ROWS = [
    {"id": i, "text": f"text {i} \u00e4 \u6f22", "domain": "d", "split": split}
    for i, split in enumerate(("train", "valid", "test"))
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def run_of(folder: Path, *inputs: dict[str, Any], **corpus: Any) -> Path:
    return write_run(folder, NO_MODELS, corpus={"inputs": list(inputs), **corpus})


def texts(path: Path) -> dict[str, str]:
    location = corpus_location(load_run(path))
    table = read_documents(location, open_corpus(location))
    return {d.document_id: d.text for d in iter_documents(table)}


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return packed


@pytest.mark.parametrize(
    ("name", "pack", "said"),
    [
        ("a.jsonl.zst", zstd, "1 in zstd"),
        ("a.jsonl.gz", gzip.compress, "1 in gzip"),
        ("a.jsonl", gzip.compress, "1 in gzip"),  # as some mirrors rename them
    ],
)
def test_packed_lines_are_read(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], said: str
) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    path = run_of(tmp_path, {"path": str(tmp_path / name)})
    assert said in ok("corpus", "build", path)
    assert texts(path) == {str(row["id"]): row["text"] for row in ROWS}


def test_packed_text_is_read_where_the_format_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.zst").write_bytes(zstd(b"one\r\ntext\n" * 4000))
    entry = {"path": str(tmp_path / "a.zst"), "domain": "d", "split": "train"}
    assert "format of an input is not known" in refused("corpus", "build", run_of(tmp_path, entry))
    path = run_of(tmp_path, entry | {"format": "text"})
    ok("corpus", "build", path)
    assert texts(path) == {"a.zst": "one\r\ntext\n" * 4000}


def zipped(data: bytes) -> bytes:
    path = Path("packed.zip")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.jsonl", data)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (lzma.compress, "input is compressed as xz"),
        (bz2.compress, "input is compressed as bzip2"),
        (zipped, "input is compressed as zip"),
        (lambda data: gzip.compress(data)[:-20], "EOFError"),
        (lambda data: gzip.compress(data)[:20] + b"\0" * 40, "input cannot be read"),
        (lambda data: zstd(data)[:-9], "input cannot be read"),
        (lambda data: POINTER, "input is a pointer of git-lfs"),
    ],
)
def test_what_cannot_be_unpacked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(pack(LINES * 50))
    line = refused("corpus", "build", run_of(tmp_path, {"path": "a.jsonl"}, on_bad="drop"))
    assert said in line
    assert "a.jsonl" in line


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "saved/train/data-0.arrow"])
def test_a_pointer_is_named_whatever_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(POINTER)
    given = path
    if name.endswith(".arrow"):
        given = tmp_path / "saved"
        (given / "dataset_dict.json").write_text("{}")
    line = refused("corpus", "build", run_of(tmp_path, {"path": str(given)}, on_bad="drop"))
    assert "input is a pointer of git-lfs" in line
    assert str(path) in line


def test_a_column_that_is_there_without_a_value(tmp_path: Path) -> None:
    for column, value in (("text", None), ("domain", None)):
        row = ROWS[0] | {column: value}
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        line = refused("corpus", "build", run_of(tmp_path, {"path": str(tmp_path / "a.jsonl")}))
        assert f"no value in column {column}" in line
        assert "got null" in line
        assert "a.jsonl:1" in line
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0] | {"text": None}) + "\n" + LINES.decode())
    path = run_of(tmp_path, {"path": str(tmp_path / "a.jsonl")}, on_bad="drop")
    assert "no_value 1" in ok("corpus", "build", path)
    mapped = {"path": str(tmp_path / "a.jsonl"), "columns": {"text": "body"}}
    assert "missing column body" in refused("corpus", "build", run_of(tmp_path, mapped))


def test_files_that_each_count_from_0(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    both = {"path": str(tmp_path / "[ot]*.jsonl")}
    line = refused("corpus", "build", run_of(tmp_path, both))
    assert "two documents with the id 0" in line
    assert "`ids: file`" in line
    path = run_of(tmp_path, both | {"ids": "file"})
    ok("corpus", "build", path)
    names = {f"{name}.jsonl/{i}" for name in ("one", "two") for i in range(3)}
    assert set(texts(path)) == names
    path = run_of(tmp_path, both | {"ids": "place"})
    ok("corpus", "build", path)
    assert set(texts(path)) == {f"{name}.jsonl/{i}" for name in ("one", "two") for i in (1, 2, 3)}
    mapped = both | {"ids": "place", "columns": {"id": "id"}}
    assert "ids: place does not use the id column" in refused(
        "corpus", "build", run_of(tmp_path, mapped)
    )
