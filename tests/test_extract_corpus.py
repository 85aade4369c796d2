"""Corpus building: every format and mapping, and every bad input in one line with nothing written."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.corpus.corpus import (
    build_corpus,
    corpus_location,
    iter_documents,
    open_corpus,
    read_documents,
)
from extract.corpus.documents import Document, assign_split
from store_schema.config import load_run
from store_schema.errors import ConfigError, CorruptionError, InputError
from tests.command import call, ok, refused
from tests.extract_runs import files_of, sample_documents, write_jsonl, write_run

NO_MODELS = {name: Path("none") for name in ("code", "target")}


def build(tmp_path: Path, *inputs: dict[str, Any], **options: Any) -> list[Document]:
    path = write_run(tmp_path, NO_MODELS, corpus={"inputs": list(inputs), **options})
    run = load_run(path)
    record, changed = build_corpus(run)
    assert changed
    documents = list(iter_documents(read_documents(corpus_location(run), record)))
    assert len(documents) == record.num_documents
    return documents


def test_jsonl_with_defaults(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", sample_documents())
    documents = build(tmp_path, {"path": str(tmp_path / "docs.jsonl")})
    assert [d.text for d in documents] == [d["text"] for d in sample_documents()]
    assert {(d.domain, d.split) for d in documents} >= {("code", "train"), ("odd", "test")}
    assert all(d.context is None for d in documents)


def test_gzip_mapping_and_constants(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"nr": 7, "body": "x y", "part": "valid"}\n\n')
    columns = {"id": "nr", "text": "body", "split": "part"}
    entry = {"path": str(tmp_path / "a.jsonl.gz"), "columns": columns, "domain": "law"}
    assert build(tmp_path, entry) == [Document("7", "law", "valid", None, "x y")]


def test_parquet_reads_only_named_columns(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"], "text": ["x", "y"], "blob": [b"\0", b"\1"]})
    pq.write_table(table, tmp_path / "a.parquet")
    documents = build(
        tmp_path, {"path": str(tmp_path / "a.parquet"), "domain": "d", "split": "train"}
    )
    assert [(d.document_id, d.text) for d in documents] == [("a", "x"), ("b", "y")]


def test_plain_text_keeps_every_byte(tmp_path: Path) -> None:
    (tmp_path / "text" / "sub").mkdir(parents=True)
    (tmp_path / "text" / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "text" / "sub" / "a.md").write_text("# four")
    entry = {"path": str(tmp_path / "text/**/*"), "domain": "d", "split": "train"}
    documents = build(tmp_path, entry)
    assert [d.document_id for d in documents] == ["b.txt", "sub/a.md"]
    assert documents[0].text.encode() == b"\xef\xbb\xbfone\r\ntwo\rthree\n"


def test_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')

    class Rows(list):  # type: ignore[type-arg]
        column_names = ("id", "text", "domain", "other")

        def select_columns(self, names: list[str]) -> Rows:
            return Rows({name: row[name] for name in names} for row in self)

    class Fake:
        @staticmethod
        def load_from_disk(path: str) -> dict[str, Rows]:
            return {"train": Rows([{"id": "a", "text": "x", "domain": "d", "other": 1}])}

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert build(tmp_path, {"path": str(folder)}) == [Document("a", "d", "train", None, "x")]


def test_saved_dataset_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        build(tmp_path, {"path": str(tmp_path)})


def test_each_assistant_turn_is_a_document(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell."},
    ]
    write_jsonl(tmp_path / "c.jsonl", [{"id": "c", "messages": messages, "domain": "chat"}])
    documents = build(tmp_path, {"path": str(tmp_path / "c.jsonl"), "split": "train"})
    assert [d.document_id for d in documents] == ["c/turn-0", "c/turn-1"]
    assert [d.text for d in documents] == ["Hello!", "Farewell."]
    assert [json.loads(d.context or "")["messages"] for d in documents] == [
        messages[:2],
        messages[:4],
    ]


@pytest.mark.parametrize(
    ("prompt_as", "context"),
    [
        ("text", {"prompt": "2+2="}),
        ("chat", {"messages": [{"role": "user", "content": "2+2="}]}),
    ],
)
def test_prompt_and_response(tmp_path: Path, prompt_as: str, context: dict[str, Any]) -> None:
    rows = [{"id": 1, "prompt": "2+2=", "response": "4"}, {"id": 2, "prompt": "", "response": "x"}]
    write_jsonl(tmp_path / "p.jsonl", rows)
    documents = build(
        tmp_path,
        {
            "path": str(tmp_path / "p.jsonl"),
            "domain": "sums",
            "split": "train",
            "prompt_as": prompt_as,
        },
    )
    assert [d.text for d in documents] == ["4", "x"]
    assert json.loads(documents[0].context or "") == context
    assert documents[1].context is None


def test_splits_are_assigned_by_id_alone() -> None:
    shares = {"valid": 0.1, "train": 0.8, "test": 0.1}
    assigned = {f"doc{i}": assign_split(f"doc{i}", shares, 0) for i in range(3000)}
    counts = Counter(assigned.values())
    for name, share in shares.items():
        assert abs(counts[name] / 3000 - share) < 0.03
    assert assigned["doc7"] == assign_split("doc7", dict(reversed(shares.items())), 0)
    assert any(assign_split(name, shares, 1) != split for name, split in assigned.items())


def test_other_splits_are_left_out_and_counted(tmp_path: Path) -> None:
    documents = [*sample_documents(), {"id": "m", "text": "x", "domain": "d", "split": "models"}]
    write_jsonl(tmp_path / "docs.jsonl", documents)
    run = load_run(write_run(tmp_path, NO_MODELS))
    record, _ = build_corpus(run)
    assert record.left_out == {"models": 1}
    assert sum(sum(d.values()) for d in record.documents.values()) == len(documents) - 1


def test_same_request_is_a_no_op_and_moves_are_the_same(tmp_path: Path) -> None:
    path = write_run(tmp_path, NO_MODELS)
    first = ok("corpus", "build", path)
    assert "train" in first
    before = files_of(tmp_path / "run")
    assert ok("corpus", "build", path) == "corpus complete, nothing to do\n"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "docs.jsonl").rename(moved / "docs.jsonl")
    override = f"corpus.inputs=[{{path: {moved / 'docs.jsonl'}}}]"
    assert "nothing to do" in ok("corpus", "build", path, "--set", override)
    assert files_of(tmp_path / "run") == before


def test_changed_input_rebuilds_and_says_what_becomes_of_the_plan(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    path = write_run(tmp_path, tiny_models)
    ok("corpus", "build", path)
    write_jsonl(tmp_path / "docs.jsonl", sample_documents(repeat=1))
    assert "extract plan" not in ok("corpus", "build", path)
    ok("extract", "plan", path)
    assert "another corpus" not in ok("corpus", "build", path)
    write_jsonl(tmp_path / "docs.jsonl", sample_documents(repeat=2))
    for _ in range(2):  # as long as it is so
        said = ok("corpus", "build", path).splitlines()[-1]
        assert "is of another corpus: run `logitfuse extract plan`" in said


def test_corrupt_documents_are_found(tmp_path: Path) -> None:
    path = write_run(tmp_path, NO_MODELS)
    ok("corpus", "build", path)
    location = corpus_location(load_run(path))
    record = open_corpus(location)
    documents = read_documents(location, record)
    file = tmp_path / "run" / "corpus" / "documents.parquet"
    sound = file.read_bytes()
    found = 0
    places = range(0, len(sound), max(len(sound) // 60, 1))
    for place in places:
        data = bytearray(sound)
        data[place] ^= 0x10
        file.write_bytes(data)
        try:
            # Some bytes of a Parquet file say nothing: then all documents are as they were.
            assert read_documents(location, record).equals(documents)
        except CorruptionError:
            found += 1
    assert found > 5


GOOD = {"id": "a", "text": "fine", "domain": "d", "split": "train"}
CHAT = {"id": "c", "domain": "d", "split": "train"}
BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "duplicate_id": ([GOOD, GOOD | {"text": "other"}], "two documents with the id a"),
    "empty_text": ([GOOD | {"text": ""}], "empty text in document a"),
    "nul": ([GOOD | {"text": "ab\0c"}], "NUL at character 2 in document a"),
    "surrogate": ([GOOD | {"text": "abc\ud800d"}], "lone surrogate at character 3 in document a"),
    "missing_column": ([{"id": "a", "domain": "d", "split": "train"}], "missing column text"),
    "missing_column ": ([{"id": "a", "text": "x", "split": "train"}], "missing column domain"),
    "not_text": ([GOOD | {"text": 7}], "expected text, got int"),
    "bad_messages": ([CHAT | {"messages": [{"role": "user", "content": "x"}]}], "no assistant"),
    "bad_messages ": ([CHAT | {"messages": ["x"]}], "not a list of objects"),
    "bad_messages  ": (
        [CHAT | {"messages": [{"role": "assistant", "content": "x"}]}],
        "no turn before the assistant's",
    ),
    "bad_messages   ": (
        [CHAT | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        "content of a message is not text",
    ),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_end_in_one_line_or_are_dropped_and_counted(tmp_path: Path, reason: str) -> None:
    rows, message = BAD_ROWS[reason]
    write_jsonl(tmp_path / "docs.jsonl", [GOOD | {"id": "first"}, *rows])
    path = write_run(tmp_path, NO_MODELS)
    line = refused("corpus", "build", path)
    assert message in line
    assert "docs.jsonl:" in line
    assert not files_of(tmp_path / "run")
    assert reason.strip() in ok("corpus", "build", path, "--set", "corpus.on_bad=drop")
    record = open_corpus(corpus_location(load_run(path)))
    assert record.dropped == {reason.strip(): 1}


def test_duplicate_names_both_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [GOOD])
    inputs = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("one", "two")]
    path = write_run(tmp_path, NO_MODELS, corpus={"inputs": inputs})
    line = refused("corpus", "build", path)
    assert "one.jsonl:1" in line
    assert "two.jsonl:1" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"\n', "bad JSON in"),
        (b"[1]\n", "not a JSON object"),
        (b'{"id": "\xff"}\n', "bad JSON in"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "docs.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + content)
    line = refused("corpus", "build", write_run(tmp_path, NO_MODELS))
    assert message in line
    assert "docs.jsonl:2" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "input file not found"),
        ("*.jsonl.gz", None, "no file matches"),
        ("a.json", b"{}", "format of an input is not known"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.parquet", b"PAR1", "input cannot be read"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "input cannot be read"),
        ("", None, "folder is not a saved dataset"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    entry = {"path": str(tmp_path / name), "domain": "d", "split": "train"}
    path = write_run(tmp_path, NO_MODELS, corpus={"inputs": [entry]})
    assert message in refused("corpus", "build", path)
    assert not files_of(tmp_path / "run")


def test_bad_input_leaves_an_earlier_corpus_alone(tmp_path: Path) -> None:
    path = write_run(tmp_path, NO_MODELS)
    ok("corpus", "build", path)
    before = files_of(tmp_path / "run")
    write_jsonl(tmp_path / "docs.jsonl", [GOOD, GOOD])
    refused("corpus", "build", path)
    assert files_of(tmp_path / "run") == before


def test_mapped_column_must_be_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", [GOOD])
    for role in ("id", "text", "domain", "split"):
        entry = {"path": str(tmp_path / "docs.jsonl"), "columns": {role: "other"}}
        path = write_run(tmp_path, NO_MODELS, corpus={"inputs": [entry]})
        assert "missing column other" in refused("corpus", "build", path)


def test_a_missing_column_is_told_with_those_that_are_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD | {"writer": "a"}]), tmp_path / "docs.parquet")
    entry = {"path": str(tmp_path / "docs.parquet"), "columns": {"author": "author"}}
    path = write_run(tmp_path, NO_MODELS, corpus={"inputs": [entry]})
    assert "got columns domain, id, split, text, writer;" in refused("corpus", "build", path)


def test_no_documents_left(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", [GOOD | {"split": "models"}])
    with pytest.raises(InputError, match="no document is left"):
        build_corpus(load_run(write_run(tmp_path, NO_MODELS)))
    with pytest.raises(ConfigError, match="no inputs"):
        build_corpus(load_run(write_run(tmp_path, NO_MODELS, corpus={})))


def test_unknown_key_is_one_line(tmp_path: Path) -> None:
    path = write_run(tmp_path, NO_MODELS, corpus={"input": []})
    assert "unknown key" in refused("corpus", "build", path)
    assert call("corpus", "build", "gone.yaml").exit_code == 2
