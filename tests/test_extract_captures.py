"""`extract import`: a capture of DistillKit becomes a source store, or is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from extract.captures.files import SCAN_ROWS, Capture
from extract.captures.matching import Index, beginnings, fingerprint_of
from store_schema.capture.bits import pack_words
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import Arrays
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from tests import captures
from tests.command import ok, refused
from tests.extract_runs import plan_run, write_run
from tests.tiny import tiny_model, tiny_tokenizer

ERROR = 1e-3
"""Nats: goal of the import."""
K = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "a": tiny_model(root / "a", tokenizer=tiny_tokenizer("byte_level")),
        "b": tiny_model(
            root / "b", tokenizer=tiny_tokenizer("metaspace_bpe", vocab_size=360, bos=True)
        ),
    }


@pytest.fixture(scope="module")
def scored(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both sources extracted: its run file."""
    folder = tmp_path_factory.mktemp("scored")
    refs = {"a": models["a"], "b": models["b"], "target": models["a"]}
    path = plan_run(write_run(folder, refs, extract={"engine": "transformers", "top_k": K}))
    ok("extract", "run", path)
    return path


def _tokens(path: Path, source: str) -> list[list[int]]:
    """Input of every segment, as the source reads it."""
    run = load_run(path)
    plan, tokenizer = open_plan(run), SegmentTokenizer.load(run.sources[source], name=source)
    return [
        part.input_ids for shard in plan.shards for part in tokenizer.encode(plan.segments(shard))
    ]


def _arrays(path: Path, source: str) -> Arrays:
    """Arrays of all shards, joined; offsets as lengths of rows."""
    reader = StoreReader.open(open_location(load_run(path).store_url(source)))
    parts = []
    for shard in sorted(reader.commits):
        arrays = reader.read(shard)
        arrays["counts"] = np.diff(arrays.pop("entry_offsets"))
        arrays["tokens"] = np.diff(arrays.pop("token_offsets"))
        parts.append(arrays)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(path: Path, source: str, *, after_last: bool = False) -> list[Any]:
    """What a capture of the text has: each segment's input, and the k best of each position."""
    arrays, rows, at, entry = _arrays(path, source), [], 0, 0
    for ids, count in zip(_tokens(path, source), arrays["tokens"], strict=True):
        before, entries = len(ids) - int(count), []
        for position in range(at, at + int(count)):
            stop = entry + int(arrays["counts"][position])
            if position > at or before:
                entries.append(
                    (arrays["entry_ids"][entry:stop].tolist(),
                     arrays["entry_logprobs"][entry:stop].tolist())
                )  # fmt: skip
            entry = stop
        at += int(count)
        assert before <= 1
        rows.append((ids, entries + entries[:1] if after_last else entries))
    return rows


def _vocab(path: Path, source: str) -> int:
    return StoreReader.open(open_location(load_run(path).store_url(source))).manifest.vocab_size


def _config(path: Path, source: str, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"d": _vocab(path, source) + 1}


ALL = captures.CONFIGS["all exact"] | {"k": K, "exact_k": K, "exact_dtype": "float32"}
FITTED = captures.BINS | {
    "k": K, "exact_k": 8, "polynomial_terms": [0, 1, "sqrt"], "delta_encoding": True,
    "residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 16}],
}  # fmt: skip


def _fresh(scored: Path, folder: Path, source: str, **sections: Any) -> Path:
    """Another run of the same plan, without the source's store."""
    shutil.copytree(scored.parent, folder, dirs_exist_ok=True)
    content = yaml.safe_load(scored.read_text())
    content["run_dir"] = f"{folder}/run"
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content | sections))
    shutil.rmtree(folder / "run/stores" / source)
    return path


@pytest.mark.parametrize("source", ["a", "b"])
@pytest.mark.parametrize("config", [ALL, FITTED], ids=["exact", "fitted"])
def test_the_store_is_what_the_capture_says(
    scored: Path, tmp_path: Path, source: str, config: dict[str, Any], record_property: Any
) -> None:
    rows = _rows(scored, source, after_last=config is FITTED)
    # In another order, with text after one of them and with a text that is no segment.
    rows[0] = ([*rows[0][0], 5, 6], [*rows[0][1], rows[0][1][0], rows[0][1][1], rows[0][1][2]])
    if config is FITTED:
        rows[0] = (rows[0][0], rows[0][1][: len(rows[0][0])])
    else:
        rows[0] = (rows[0][0], rows[0][1][: len(rows[0][0]) - 1])
    rows = [*rows[::-1], ([1, 2, 3], rows[1][1][:2])]
    capture = captures.write_capture(tmp_path / "capture", rows, _config(scored, source, config))
    run = _fresh(scored, tmp_path / "run2", source)
    dry = ok("extract", "import", run, "--source", source, "--capture", capture, "--dry-run")
    assert "would be written" in dry
    assert not (tmp_path / "run2/run/stores" / source).exists()
    said = ok("extract", "import", run, "--source", source, "--capture", capture)
    found, there = _arrays(run, source), _arrays(scored, source)
    for name in ("segment_ids", "tokens", "token_ids", "byte_ends", "counts"):
        np.testing.assert_array_equal(found[name], there[name], err_msg=name)
    read = {tuple(row["input_ids"]): row for row in captures.read_capture(capture)}
    worst, entry, at = 0.0, 0, 0
    for ids, count in zip(_tokens(scored, source), found["tokens"], strict=True):
        row = next(r for key, r in read.items() if key[: len(ids)] == tuple(ids))
        before = len(ids) - int(count)
        for n in range(int(count)):
            stop = entry + int(found["counts"][at + n])
            here = dict(zip(found["entry_ids"][entry:stop].tolist(),
                            found["entry_logprobs"][entry:stop].tolist(), strict=True))  # fmt: skip
            entry = stop
            place = before + n - 1
            label = found["label_logprobs"][at + n]
            if place < 0:
                assert not here
                assert np.isnan(label)
                continue
            theirs = dict(zip(row["ids"][place], row["logprobs"][place], strict=True))
            assert here.keys() == theirs.keys()
            worst = max(worst, *(abs(here[i] - min(theirs[i], 0)) for i in here))
            token = ids[before + n]
            assert here.get(token) == (None if np.isnan(label) else label)
            mass = sum(map(np.exp, here.values()))
            assert found["tail_mass"][at + n] == pytest.approx(max(1 - mass, 0), abs=1e-5)
        at += int(count)
    record_property("import_capture_max_error", float(worst))
    assert worst <= ERROR
    known = (~np.isnan(found["label_logprobs"])).mean()
    assert 0.01 < known < 1
    assert f"{known:.1%}" in said
    ok("store", "verify", run, "--source", source, "--kind", "source")
    assert "nothing to do" in ok("extract", "import", run, "--source", source, "--capture", capture)


def test_an_imported_store_is_aligned_like_any_other(scored: Path, tmp_path: Path) -> None:
    capture = captures.write_capture(
        tmp_path / "capture", _rows(scored, "b"), _config(scored, "b", ALL)
    )
    run = _fresh(scored, tmp_path / "run2", "b")
    ok("extract", "import", run, "--source", "b", "--capture", capture)
    ok("align", "run", run)
    ok("store", "verify", run, "--kind", "aligned")
    ok("align", "run", scored)
    found, there = (
        StoreReader.open(open_location(load_run(path).aligned_url("b"))) for path in (run, scored)
    )
    covered = 0
    for shard in sorted(there.commits):
        imported, whole = found.read(shard), there.read(shard)
        np.testing.assert_array_equal(imported["token_ids"], whole["token_ids"])
        # Where the source's label is not known there is nothing; elsewhere there is what was.
        here = np.diff(imported["entry_offsets"]) > 0
        assert not (here & (np.diff(whole["entry_offsets"]) == 0)).any()
        covered += int(here.sum())
    assert covered > 0


def test_packed_rows_are_told_apart(scored: Path, tmp_path: Path) -> None:
    rows = [row for row in _rows(scored, "a", after_last=True) if row[0]]
    packs, masks = [], []
    for first in range(0, len(rows), 3):
        part = rows[first : first + 3]
        packs.append(([i for ids, _ in part for i in ids], [e for _, es in part for e in es]))
        masks.append([n for n, (ids, _) in enumerate(part, 1) for _ in ids])
        assert len(packs[-1][0]) == len(packs[-1][1])
    config = _config(scored, "a", ALL)
    capture = captures.write_capture(tmp_path / "packed", packs, config, masks=masks)
    run = _fresh(scored, tmp_path / "run2", "a")
    ok("extract", "import", run, "--source", "a", "--capture", capture)
    found, there = _arrays(run, "a"), _arrays(scored, "a")
    np.testing.assert_array_equal(found["entry_ids"], there["entry_ids"])
    np.testing.assert_array_equal(found["entry_logprobs"], there["entry_logprobs"])


def _columns(rows: list[Any], **columns: Any) -> pa.Table:
    ids = pa.array([ids for ids, _ in rows], pa.list_(pa.uint64()))
    return pa.table({"input_ids": ids} | columns)


def test_without_compression_and_in_the_earlier_format(scored: Path, tmp_path: Path) -> None:
    rows, there = _rows(scored, "a"), _arrays(scored, "a")
    plain, legacy = tmp_path / "plain", tmp_path / "legacy"
    for folder in (plain, legacy):
        folder.mkdir()
    pq.write_table(
        _columns(
            rows,
            token_ids=pa.array([[i for i, _ in es] for _, es in rows]),
            top_values=pa.array([[v for _, v in es] for _, es in rows]),
        ),
        plain / "a.parquet",
    )
    bits = captures.id_bits(_vocab(scored, "a"))
    words = [[pack_words(np.array([i]), bits)[0].tolist() for i, _ in es] for _, es in rows]
    pq.write_table(
        _columns(
            rows,
            packed_indices=pa.array(words, pa.list_(pa.list_(pa.uint64()))),
            exact_values=pa.array([[v for _, v in es] for _, es in rows]),
            coeffs=pa.array([[[] for _ in es] for _, es in rows], pa.list_(pa.list_(pa.float32()))),
        ),
        legacy / "a.parquet",
    )
    params = {"vocab_size": _vocab(scored, "a"), "k": K, "exact_k": K, "polynomial_degree": 8}
    (tmp_path / "legacy.yaml").write_text(
        yaml.safe_dump({"teacher": {"legacy_logit_compression": params}})
    )
    for folder, more in ((plain, []), (legacy, ["--compression", tmp_path / "legacy.yaml"])):
        run = _fresh(scored, tmp_path / f"run-{folder.name}", "a")
        ok("extract", "import", run, "--source", "a", "--capture", folder, *more)
        found = _arrays(run, "a")
        np.testing.assert_array_equal(found["entry_ids"], there["entry_ids"])
        np.testing.assert_array_equal(found["entry_logprobs"], there["entry_logprobs"])


# ------------------------------------------------------------------------------- refusals


@pytest.fixture
def case(scored: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run without the source's store, and a good capture of it."""
    capture = captures.write_capture(
        tmp_path / "capture", _rows(scored, "a"), _config(scored, "a", ALL)
    )
    return _fresh(scored, tmp_path / "run2", "a"), capture


def _line(run: Path, capture: Path, *more: object, source: str = "a") -> str:
    line = refused("extract", "import", run, "--source", source, "--capture", capture, *more)
    assert not list((run.parent / "run/stores" / source).glob("commits/*"))
    return line


def _change(capture: Path, **values: Any) -> None:
    path = capture / "compression_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_another_vocabulary(case: tuple[Path, Path]) -> None:
    run, capture = case
    for d in (200, 100_000):
        _change(capture, d=d)
        line = _line(run, capture)
        assert "another vocabulary" in line
        assert f"got {d}" in line


def test_another_tokenizer(scored: Path, tmp_path: Path) -> None:
    rows = _rows(scored, "a")
    capture = captures.write_capture(tmp_path / "capture", rows, _config(scored, "b", ALL))
    run = _fresh(scored, tmp_path / "run2", "b")
    line = _line(run, capture, source="b")
    assert "segments are not in the capture" in line
    assert "none for" in line


def test_other_compression_parameters(case: tuple[Path, Path]) -> None:
    run, capture = case
    _change(capture, k=K - 1, exact_k=K - 1)
    assert "does not fit the compression parameters" in _line(run, capture)
    _change(capture, k=K, exact_k=K, exact_dtype="float16")
    line = _line(run, capture)
    assert f"expected {2 * K} numbers a position, got {4 * K}" in line
    (capture / "compression_config.yaml").unlink()
    assert "compression parameters are not known" in _line(run, capture)


def test_differences_that_are_read_as_values(scored: Path, tmp_path: Path) -> None:
    """Parameters of as many bytes are found out where the numbers cannot be falling probabilities."""
    config = _config(scored, "a", ALL | {"delta_encoding": True})
    capture = captures.write_capture(tmp_path / "capture", _rows(scored, "a"), config)
    _change(capture, delta_encoding=False)
    line = _line(_fresh(scored, tmp_path / "run2", "a"), capture)
    assert "exact log-probabilities do not fall" in line
    assert "compression_config.yaml" in line


def test_missing_columns(case: tuple[Path, Path]) -> None:
    run, capture = case
    path = capture / "data_0.parquet"
    pq.write_table(pq.read_table(path).drop_columns("bytepacked_indices"), path)
    line = _line(run, capture)
    assert "not a capture of DistillKit" in line
    assert "data_0.parquet" in line
    assert "bytepacked_indices" in line


@pytest.mark.parametrize("keep", [0, 3, -9])
def test_a_file_that_is_cut_off(case: tuple[Path, Path], keep: int) -> None:
    run, capture = case
    path = capture / "data_1.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    line = _line(run, capture)
    assert "not a sound Parquet file" in line
    assert "data_1.parquet" in line


def _rewrite(path: Path, column: str, change: Any) -> None:
    table = pq.read_table(path)
    at = table.column_names.index(column)
    values = change(table[column].to_pylist())
    pq.write_table(table.set_column(at, column, pa.array(values, table.schema.types[at])), path)


def test_rows_and_bytes_that_are_cut_off(case: tuple[Path, Path]) -> None:
    run, capture = case
    path = capture / "data_0.parquet"
    whole = path.read_bytes()
    _rewrite(path, "compressed_logprobs", lambda rows: [row[:-2] for row in rows])
    assert "column compressed_logprobs is cut off" in _line(run, capture)
    path.write_bytes(whole)
    _rewrite(path, "bytepacked_indices", lambda rows: [[p[:-1] for p in row] for row in rows])
    assert "column bytepacked_indices does not fit" in _line(run, capture)
    path.write_bytes(whole)
    _rewrite(path, "compressed_logprobs", lambda rows: [None, *rows[1:]])
    assert "null in column compressed_logprobs" in _line(run, capture)
    path.write_bytes(whole)
    _rewrite(path, "bytepacked_indices", lambda rows: [[[0] * len(p) for p in r] for r in rows])
    assert "an id is there twice" in _line(run, capture)


def test_numbers_that_are_no_distribution(scored: Path, tmp_path: Path) -> None:
    for name, change, message in (
        ("logits", lambda v: [x + 9 for x in v], "a log-probability is above 0"),
        ("mass", lambda v: [-0.1] * len(v), "sum to much more than 1"),
        ("nan", lambda v: [float("nan"), *v[1:]], "no number"),
    ):
        rows = [(ids, [(i, change(v)) for i, v in es]) for ids, es in _rows(scored, "a")]
        folder = tmp_path / name
        capture = captures.write_capture(folder / "capture", rows, _config(scored, "a", ALL))
        line = _line(_fresh(scored, folder / "run2", "a"), capture)
        assert message in line
        assert "position" in line


def test_a_curve_that_gives_a_little_too_much_is_brought_to_1(scored: Path, tmp_path: Path) -> None:
    rows = [
        (ids, [(i, [x + 0.02 for x in v[:1]] + v[1:]) for i, v in es])
        for ids, es in _rows(scored, "a")
    ]
    full = [
        (ids, [(i, (np.array(v) - np.log(np.exp(v).sum()) + 0.05).clip(max=0).tolist())
               for i, v in es]) for ids, es in rows
    ]  # fmt: skip
    capture = captures.write_capture(tmp_path / "capture", full, _config(scored, "a", ALL))
    run = _fresh(scored, tmp_path / "run2", "a")
    said = ok("extract", "import", run, "--source", "a", "--capture", capture)
    assert "above 1 in sum, brought to 1" in said
    ok("store", "verify", run, "--source", "a", "--kind", "source")


def test_segments_that_are_missing_can_be_recorded(scored: Path, tmp_path: Path) -> None:
    rows = _rows(scored, "a")
    alone = [
        i for i, (ids, _) in enumerate(rows)
        if not any(other[: len(ids)] == ids for n, (other, _) in enumerate(rows) if n != i)
    ]  # fmt: skip
    gone = alone[0]
    rest = [*rows[:gone], *rows[gone + 1 :]]
    lost = slice(sum(len(ids) for ids, _ in rows[:gone]), sum(len(i) for i, _ in rows[: gone + 1]))
    capture = captures.write_capture(tmp_path / "capture", rest, _config(scored, "a", ALL))
    run = _fresh(scored, tmp_path / "run2", "a")
    assert f"1 of {len(rows)} segments are not in the capture" in _line(run, capture)
    content = yaml.safe_load(run.read_text())
    content["extract"]["on_bad"] = "record"
    run.write_text(yaml.safe_dump(content))
    said = ok("extract", "import", run, "--source", "a", "--capture", capture)
    assert f"{len(rows) - 1} of {len(rows)} segments" in said
    found = _arrays(run, "a")
    assert not found["counts"][lost].any()
    assert (found["tail_mass"][lost] == 1).all()


def test_options_that_a_capture_cannot_serve(case: tuple[Path, Path], tmp_path: Path) -> None:
    run, capture = case
    assert "no capture" in _line(run, tmp_path / "none")
    assert "a capture is of one model" in refused("extract", "import", run, "--capture", capture)
    content = yaml.safe_load(run.read_text())
    content["extract"] |= {"branches": {"per_position": 0.3}}
    run.write_text(yaml.safe_dump(content))
    assert "extract.branches" in _line(run, capture)


def test_another_capture_does_not_continue_a_store(case: tuple[Path, Path], tmp_path: Path) -> None:
    run, capture = case
    ok("extract", "import", run, "--source", "a", "--capture", capture, "--limit", 1)
    other = shutil.copytree(capture, tmp_path / "other")
    (other / "data_0.parquet").rename(other / "data_9.parquet")
    line = refused("extract", "import", run, "--source", "a", "--capture", other)
    assert "settings.capture" in line
    copied = shutil.copytree(capture, tmp_path / "copied")
    ok("extract", "import", run, "--source", "a", "--capture", copied)
    assert "settings.engine" in refused("extract", "run", run, "--source", "a")


# ------------------------------------------------------------------------------- matching


def test_a_beginning_is_known_by_its_tokens_and_their_order() -> None:
    texts = [[1, 2, 3], [1, 2], [2, 1], [1], [0, 1], [1, 0], [1, 2, 3, 0]]
    prints = [fingerprint_of(text) for text in texts]
    assert len(set(prints)) == len(texts)
    joined = np.array([7, 1, 2, 3, 0, 1, 2])
    starts = np.array([0, 1, 1, 1, 1, 5, 5])
    found = beginnings(joined, starts).tolist()
    expected = [[7], [1], [1, 2], [1, 2, 3], [1, 2, 3, 0], [1], [1, 2]]
    assert found == [fingerprint_of(text) for text in expected]


def test_every_text_of_a_long_capture_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 9, int(n)).tolist() for n in rng.integers(1, 5, SCAN_ROWS + 40)]
    empty: Any = pa.array([[[0] * 4] * len(r) for r in rows], pa.list_(pa.list_(pa.uint8())))
    table = _columns([(r, []) for r in rows], compressed_logprobs=empty, bytepacked_indices=empty)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=SCAN_ROWS + 7)
    params = captures.CONFIGS["all exact"] | {"d": 16, "k": 1, "exact_k": 1}
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(params))
    capture = Capture.open(tmp_path)
    index = Index(np.unique(np.array([fingerprint_of(r) for r in rows], np.uint64)))
    for batch in capture.tokens():
        index.add(batch)
    assert index.missing() == 0
    size = SCAN_ROWS + 7
    for text in rows:
        place = index.place(fingerprint_of(text))
        assert place is not None
        assert rows[place.group * size + place.row][: len(text)] == text
    assert index.place(fingerprint_of([11, 12])) is None
