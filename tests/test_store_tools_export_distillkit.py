"""`store export --format distillkit` and `--format zarr`: other programs read what the store has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
import zarr

from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import FORMS, Arrays
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from store_tools.export_distillkit import IGNORED, PADDING_LOGPROB, padded_entries
from tests import captures
from tests.command import ok, refused
from tests.extract_runs import plan_run, write_jsonl, write_run
from tests.planned_store import make_run, reader_of, store_folder
from tests.tiny import tiny_model, tiny_tokenizer

K = 12
DOCUMENTS = [
    {
        "id": "text",
        "text": "def add(a, b):\n    return a + b\n",
        "domain": "code",
        "split": "train",
    },
    {
        "id": "prompt",
        "prompt": "12345 67890, {x} Was it #7? ",
        "response": "it, then.",
        "domain": "prose",
        "split": "train",
    },
]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with source stores and aligned ones; a source with BOS, and a document with a prompt."""
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "docs.jsonl", DOCUMENTS)
    models = {
        "a": tiny_model(folder / "a", tokenizer=tiny_tokenizer("byte_level")),
        "b": tiny_model(
            folder / "b", tokenizer=tiny_tokenizer("metaspace_bpe", vocab_size=360, bos=True)
        ),
    }
    path = plan_run(
        write_run(
            folder, models | {"target": models["a"]}, extract={"engine": "transformers", "top_k": K}
        )
    )
    ok("extract", "run", path)
    ok("align", "run", path)
    return path


def _expected(path: Path, source: str, kind: str) -> list[dict[str, Any]]:
    """For each segment its tokens, and by position of these the entries that are known."""
    run = load_run(path)
    url = run.store_url(source) if kind == "source" else run.aligned_url(source)
    reader, plan = StoreReader.open(open_location(url)), open_plan(run)
    ref = run.sources[source] if kind == "source" else run.target
    tokenizer = SegmentTokenizer.load(ref, name=source)
    expected = []
    for shard in plan.shards:
        arrays, at = reader.read(shard.index), 0
        for part in tokenizer.encode(plan.segments(shard)):
            entries = {}
            for n in range(len(part.token_ids)):
                span = slice(*arrays["entry_offsets"][at + n : at + n + 2])
                place = len(part.context_ids) + n - 1
                if span.stop > span.start and place >= 0:
                    ids, logs = arrays["entry_ids"][span], arrays["entry_logprobs"][span]
                    entries[place] = dict(zip(ids.tolist(), logs.tolist(), strict=True))
            at += len(part.token_ids)
            expected.append({"ids": part.input_ids, "entries": entries})
    return expected


@pytest.mark.parametrize("kind", ["source", "aligned"])
@pytest.mark.parametrize("source", ["a", "b"])
def test_the_capture_has_what_the_store_has(
    aligned: Path, tmp_path: Path, source: str, kind: str
) -> None:
    words = [
        aligned,
        tmp_path / "out",
        "--format",
        "distillkit",
        "--source",
        source,
        "--kind",
        kind,
    ]
    assert " 0 there already" in ok("store", "export", *words)
    rows, expected = captures.read_capture(tmp_path / "out"), _expected(aligned, source, kind)
    config = yaml.safe_load((tmp_path / "out/compression_config.yaml").read_text())
    assert len(rows) == len(expected)
    prompts = 0
    for row, segment in zip(rows, expected, strict=True):
        assert row["input_ids"] == segment["ids"]
        assert len(row["logprobs"]) == len(row["labels"]) - 1 == len(segment["ids"]) - 1
        for place, (ids, logprobs) in enumerate(zip(row["ids"], row["logprobs"], strict=True)):
            assert len(set(ids)) == config["k"]
            known = segment["entries"].get(place)
            assert row["labels"][place] == (IGNORED if known is None else segment["ids"][place])
            found = {i: v for i, v in zip(ids, logprobs, strict=True) if v > PADDING_LOGPROB}
            assert found == (known or {})
        prompts += row["labels"].count(IGNORED) > 3
    assert prompts
    assert f"{len(list((tmp_path / 'out').glob('*.parquet')))} there already" in ok(
        "store", "export", *words
    )


def test_their_code_reads_it(aligned: Path, tmp_path: Path) -> None:
    package = captures.theirs()
    import torch

    out = tmp_path / "out"
    ok(
        "store",
        "export",
        aligned,
        out,
        "--format",
        "distillkit",
        "--source",
        "a",
        "--kind",
        "source",
    )
    config = yaml.safe_load((out / "compression_config.yaml").read_text())
    own = package.LogprobCompressor(
        config=package.DistributionQuantizationConfig.model_validate(config)
    )
    rows = captures.read_capture(out)
    tables = [pq.read_table(path).to_pylist() for path in sorted(out.glob("*.parquet"))]
    for row, packed in zip(rows, [row for table in tables for row in table], strict=True):
        ids, logprobs = own.decompress_to_sparse(
            {key: torch.tensor(packed[key], dtype=torch.uint8)[None]
             for key in ("compressed_logprobs", "bytepacked_indices")}
        )  # fmt: skip
        assert ids[0].tolist() == row["ids"]
        assert logprobs[0].tolist() == row["logprobs"]


test_their_code_reads_it = pytest.mark.filterwarnings("ignore")(test_their_code_reads_it)


def _compression(folder: Path, **values: Any) -> Path:
    path = folder / "compression.yaml"
    path.write_text(yaml.safe_dump(captures.BUDGET | {"d": 512, "k": K} | values))
    return path


def test_with_their_budget_parameters(aligned: Path, tmp_path: Path) -> None:
    words = [
        aligned,
        tmp_path / "out",
        "--format",
        "distillkit",
        "--source",
        "b",
        "--kind",
        "source",
    ]
    ok("store", "export", *words, "--compression", _compression(tmp_path))
    rows, expected = captures.read_capture(tmp_path / "out"), _expected(aligned, "b", "source")
    errors = []
    for row, segment in zip(rows, expected, strict=True):
        for place, known in segment["entries"].items():
            found = dict(zip(row["ids"][place], row["logprobs"][place], strict=True))
            assert found.keys() == known.keys()
            errors += [abs(found[i] - known[i]) for i in known]
    assert 0 < np.mean(errors) < 0.1
    # Other parameters: the files are written again.
    again = ok("store", "export", *words)
    assert " 0 there already" in again


def test_what_cannot_be_exported_is_refused(aligned: Path, tmp_path: Path) -> None:
    def line(*words: object, form: str = "distillkit", source: object = aligned) -> str:
        return refused("store", "export", source, tmp_path / "out", "--format", form, *words)

    one = ("--source", "a", "--kind", "source")
    assert "several stores" in line()
    assert "fewer entries" in line(
        "--source", "b", "--kind", "aligned",
        "--compression", _compression(tmp_path, k=40, exact_k=1),
    )  # fmt: skip
    assert "cannot be written" in line(*one, "--compression", _compression(tmp_path, d=90))
    assert "--format distillkit alone" in line(
        *one, "--compression", tmp_path / "x.yaml", form="parquet"
    )
    store = aligned.parent / "run/stores/a"
    moved = tmp_path / "alone"
    moved.symlink_to(store)
    other = refused(
        "store", "export", store, tmp_path / "out", "--format", "distillkit",
        "--plan", tmp_path / "none",
    )  # fmt: skip
    assert "no plan" in other
    answers = make_run(tmp_path / "made", kinds=["generated"])
    assert "most probable entries" in line(source=answers)


def test_a_store_by_itself_has_its_plan_beside_it(aligned: Path, tmp_path: Path) -> None:
    store = aligned.parent / "run/stores/b"
    ok("store", "export", store, tmp_path / "one", "--format", "distillkit", "--shards", 0)
    ok("store", "export", aligned, tmp_path / "two", "--format", "distillkit",
       "--source", "b", "--kind", "source", "--shards", 0)  # fmt: skip
    one, two = (tmp_path / name / "data_00000.parquet" for name in ("one", "two"))
    assert pq.read_table(one).equals(pq.read_table(two))


def test_padding_takes_ids_that_are_no_entries() -> None:
    arrays: Arrays = {
        "entry_offsets": np.array([0, 0, 3, 4]),
        "entry_ids": np.array([2, 9, 0, 1], np.uint32),
        "entry_logprobs": np.array([-1, -2, -3, -4], np.float32),
    }
    ids, logprobs, counts = padded_entries(np.array([-1, 0, 1, 2]), arrays, 4)
    assert counts.tolist() == [0, 0, 3, 1]
    assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 9, 0, 1], [1, 0, 2, 3]]
    gone = PADDING_LOGPROB
    assert logprobs[2:].tolist() == [[-1, -2, -3, gone], [-4, gone, gone, gone]]
    assert (logprobs[:2] == gone).all()


# ------------------------------------------------------------------------------- zarr


@pytest.mark.parametrize("form", FORMS)
def test_a_group_has_the_arrays(tmp_path: Path, form: Any) -> None:
    make_run(tmp_path / "made", kinds=[form])
    reader, out = reader_of(tmp_path / "made", form), tmp_path / "out"
    words = [store_folder(tmp_path / "made", form), out, "--format", "zarr"]
    ok("store", "export", *words)
    for shard in reader.commits:
        arrays, path = reader.read(shard), out / f"{shard:05d}.zarr"
        group = zarr.open_group(path, mode="r")
        assert set(group.array_keys()) == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(group[name][:], array, strict=True)
            codecs = json.loads((path / name / "zarr.json").read_text())["codecs"]
            assert [codec["name"] for codec in codecs] == (
                ["bytes", "zstd"] if array.dtype.itemsize else []
            )
        assert json.loads(group.attrs["logitfuse.manifest"])["kind"] == reader.manifest.kind
    count = len(reader.commits)
    assert f"0 files written, {count} there already" in ok("store", "export", *words)
    (out / "00000.zarr/zarr.json").unlink()
    assert f"1 files written, {count - 1} there already" in ok("store", "export", *words)
