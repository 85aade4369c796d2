"""Sealed records, fingerprints, errors and the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from store_schema import SCHEMA_VERSION
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import (
    ConfigError,
    CorruptionError,
    MissingError,
    OneLine,
    SchemaVersionError,
    Stopped,
    StoppedMidway,
    StoreError,
)
from store_schema.fingerprint import (
    arrays_digest,
    bytes_digest,
    canonical_json,
    fingerprint,
    model_fingerprint,
)
from store_schema.manifest import Commit, Counts, FileRecord, Manifest, ModelIdentity
from store_schema.plan.plan import Plan, PlanRecord, ShardRecord
from tests import store_factory

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

# ------------------------------------------------------------------------------- fingerprints


@given(JSON)
def test_fingerprint_is_of_the_value_not_of_its_writing(value: Any) -> None:
    def reordered(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: reordered(part[key]) for key in reversed(part)}
        return [reordered(item) for item in part] if isinstance(part, list) else part

    try:
        first = fingerprint(value)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        return
    assert first == fingerprint(reordered(value)) == fingerprint(json.loads(canonical_json(value)))
    assert len(first) == 32


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = """if True:
        from store_schema.fingerprint import fingerprint
        print(fingerprint({'b': [1, 'é'], 'a': None}))
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {fingerprint({"a": None, "b": [1, "é"]}) + "\n"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fingerprint_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint([value])


def test_arrays_digest_sees_name_dtype_shape_and_order() -> None:
    base = {"a": np.zeros(4, "<u4"), "b": np.zeros(2, "<u4")}
    digests = {
        arrays_digest(base, ["a", "b"]),
        arrays_digest(base, ["b", "a"]),
        arrays_digest({"a": np.zeros(2, "<u4"), "b": np.zeros(4, "<u4")}, ["a", "b"]),
        arrays_digest({"a": np.zeros(4, "<i4"), "b": np.zeros(2, "<u4")}, ["a", "b"]),
        arrays_digest({"c": base["a"], "b": base["b"]}, ["c", "b"]),
    }
    assert len(digests) == 5
    sliced = {"a": np.zeros(8, "<u4")[::2], "b": base["b"]}
    assert arrays_digest(sliced, ["a", "b"]) == arrays_digest(base, ["a", "b"])
    assert arrays_digest({"a": np.zeros(0, "<u4")}, ["a"])


def _model_folder(folder: Path, weights: bytes, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_model_fingerprint(tmp_path: Path) -> None:
    one = _model_folder(tmp_path / "a", b"w" * 100, {"v": 1, "transformers_version": "4"})
    copy = _model_folder(tmp_path / "b", b"w" * 100, {"transformers_version": "5", "v": 1})
    other = _model_folder(tmp_path / "c", b"w" * 99 + b"x", {"v": 1})
    config = _model_folder(tmp_path / "d", b"w" * 100, {"v": 2})
    assert model_fingerprint(one) == model_fingerprint(copy)
    assert len({model_fingerprint(path) for path in (one, other, config)}) == 3


def test_model_fingerprint_of_a_large_file_samples_both_ends(tmp_path: Path) -> None:
    size = (17 << 20) + 5
    found = set()
    for i, place in enumerate((None, 0, size - 1)):
        weights = bytearray(size)
        if place is not None:
            weights[place] = 1
        found.add(model_fingerprint(_model_folder(tmp_path / str(i), bytes(weights), {})))
    assert len(found) == 3


# ------------------------------------------------------------------------------- seals


def test_seal_comes_back() -> None:
    manifest = store_factory.manifest("aligned")
    assert unseal(Manifest, seal(manifest), where="here") == manifest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"digest": null}',
        b'{"a": NaN, "digest": null}',
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match=r"file\.json"):
        unseal(Manifest, data, where="file.json")


@pytest.mark.parametrize(("step", "who"), [(1, "a newer"), (-1, "an earlier")])
def test_version_comes_before_everything(step: int, who: str) -> None:
    content = {"schema_version": SCHEMA_VERSION + step, "what": "ever", "digest": "of another rule"}
    with pytest.raises(SchemaVersionError) as caught:
        unseal(Manifest, json.dumps(content).encode(), where="m.json")
    expected = f"expected schema version {SCHEMA_VERSION}, got {SCHEMA_VERSION + step}"
    assert f"written by {who} logitfuse in m.json: {expected}; " in caught.value.line()


def test_sound_seal_around_a_wrong_record_is_refused() -> None:
    content = json.loads(seal(store_factory.manifest()))
    del content["digest"]
    for key, value in (("top_k", 0), ("kind", "other"), ("surprise", 1)):
        changed = content | {key: value}
        data = json.dumps(changed | {"digest": fingerprint(changed)}).encode()
        with pytest.raises(CorruptionError, match=key):
            unseal(Manifest, data, where="m.json")


# ------------------------------------------------------------------------------- constraints


SOUND: dict[type, dict[str, Any]] = {
    Manifest: store_factory.manifest().model_dump(),
    ModelIdentity: store_factory.manifest().model.model_dump(),
    FileRecord: {"size": 1, "crc32c": 2},
    Counts: {"segments": 1, "positions": 2, "entries": 3},
    Commit: {
        "shard": 0,
        "path": "data/00000-0123456789abcdef",
        "store_fingerprint": "s",
        "shard_fingerprint": "f",
        "first_segment": 0,
        "content_sha256": "c",
        "files": {},
        "counts": {"segments": 1, "positions": 2, "entries": 3},
    },
    ShardRecord: store_factory.shard_record().model_dump(),
    PlanRecord: {
        "corpus_fingerprint": "c",
        "request_fingerprint": "r",
        "tokenizers": {},
        "settings": {},
        "num_segments": 0,
        "shards": (),
    },
}


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (Manifest, "kind", "mixed"),
        (Manifest, "estimator", "sampled?"),
        (Manifest, "top_k", 0),
        (Manifest, "top_k", None),
        (Manifest, "top_p", 0.5),
        (Manifest, "logprob_codec", {}),
        (Manifest, "encoding", None),
        (Manifest, "temperature", 0.0),
        (ModelIdentity, "vocab_size", 0),
        (FileRecord, "size", -1),
        (FileRecord, "crc32c", 1 << 32),
        (FileRecord, "crc32c", -1),
        (Counts, "segments", -1),
        (Counts, "positions", -1),
        (Counts, "entries", -1),
        (Counts, "spans", -1),
        (Commit, "shard", -1),
        (Commit, "path", "data/0-0123456789abcdef"),
        (Commit, "first_segment", None),
        (Commit, "first_segment", -1),
        (ShardRecord, "index", -1),
        (ShardRecord, "start", -1),
        (ShardRecord, "stop", -1),
        (ShardRecord, "num_bytes", -1),
        (PlanRecord, "num_segments", -1),
    ],
)
def test_each_constraint_of_a_record(cls: Any, key: str, value: Any) -> None:
    cls.model_validate(SOUND[cls])
    with pytest.raises(ValidationError, match=key):
        cls.model_validate(SOUND[cls] | {key: value})


def test_a_store_of_answers_has_no_entries() -> None:
    manifest = Manifest.model_validate(SOUND[Manifest] | {"kind": "generated", "top_k": None})
    assert manifest.max_entries == 0


@pytest.mark.parametrize("cls", SOUND)
def test_records_are_strict_and_frozen(cls: Any) -> None:
    with pytest.raises(ValidationError, match="surprise"):
        cls.model_validate(SOUND[cls] | {"surprise": 1})
    record = cls.model_validate(SOUND[cls])
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, next(iter(cls.model_fields)), None)


# ------------------------------------------------------------------------------- errors


def test_error_is_one_line_with_all_its_facts() -> None:
    error = CorruptionError(
        "bad\nbyte", where="store\tX", expected=1, got="two\r\nlines", hint="do it"
    )
    assert error.line() == "bad byte in store X: expected 1, got two lines; do it"
    assert str(error) == error.line()
    assert isinstance(error, StoreError)


def test_exit_codes() -> None:
    pending: list[type[OneLine]] = [OneLine]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        assert cls.exit_code == {Stopped: 143, StoppedMidway: 75}.get(cls, 2)
        assert cls.__doc__


# ------------------------------------------------------------------------------- plan


def test_plan_comes_back(tmp_path: Path) -> None:
    texts = [["a", "b\r\nc\x00"], ["漢字", "e\u0301"], ["😀" * 40]]
    location = open_location(tmp_path)
    written = store_factory.plan(location, texts)
    plan = Plan.open(location)
    assert plan.record == written.record
    assert plan.fingerprint == written.fingerprint
    assert [[s.text for s in plan.segments(shard)] for shard in plan.shards] == texts
    assert [s.index for shard in plan.shards for s in plan.segments(shard)] == list(range(5))
    assert [(shard.start, shard.stop) for shard in plan.shards] == [(0, 2), (2, 4), (4, 5)]
    assert list(plan.splits()) == ["train"]


def test_every_field_of_a_segment_is_in_the_fingerprint(tmp_path: Path) -> None:
    from dataclasses import replace

    from store_schema.plan.plan import SEGMENT_SCHEMA, shard_fingerprint

    segment = store_factory.segments(["text"])[0]
    base = shard_fingerprint([segment])
    for name in SEGMENT_SCHEMA.names:
        value = getattr(segment, name)
        other = not value if isinstance(value, bool) else 99 if isinstance(value, int) else "other"
        assert shard_fingerprint([replace(segment, **{name: other})]) != base, name
    assert shard_fingerprint([replace(segment, index=7)]) == base


def test_a_plan_of_before_authors_and_corpora_reads_as_it_did(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from store_schema.plan.columns import segment_columns

    location = open_location(tmp_path)
    plan = store_factory.plan(location, [["alpha beta", "gamma"], ["delta"] * 3])
    path = tmp_path / "segments.parquet"
    table = pq.read_table(path)
    assert table.column_names[-2:] == ["author", "corpus"]
    earlier = table.drop_columns(["author", "corpus"])
    with pq.ParquetWriter(path, earlier.schema) as writer:
        for shard in plan.shards:
            size = shard.stop - shard.start
            writer.write_table(earlier.slice(shard.start, size), row_group_size=size)
    opened = Plan.open(location)
    segments = [segment for shard in opened.shards for segment in opened.segments(shard)]
    assert [s.text for s in segments] == ["alpha beta", "gamma", *["delta"] * 3]
    assert {(s.author, s.corpus) for s in segments} == {(None, None)}
    columns = segment_columns(opened, ["corpus", "domain"]).to_pydict()
    assert columns == {"corpus": [None] * 5, "domain": [s.domain for s in segments]}
    with pq.ParquetWriter(path, earlier.drop_columns(["text"]).schema) as writer:
        writer.write_table(earlier.drop_columns(["text"]))
    with pytest.raises(CorruptionError, match="text"):
        opened.segments(opened.shards[0])


def _everything(location: Any) -> Any:
    plan = Plan.open(location)
    return plan.record, [plan.segments(shard) for shard in plan.shards]


def test_flipped_byte_in_the_plan_never_gives_other_segments(tmp_path: Path) -> None:
    location = open_location(tmp_path)
    store_factory.plan(location, [["alpha beta", "gamma"], ["delta"] * 3])
    sound = _everything(location)
    rng = np.random.default_rng(0)
    found = {"plan.json": 0, "segments.parquet": 0}
    for name in found:
        whole = (tmp_path / name).read_bytes()
        places = rng.choice(len(whole), 250, replace=False).tolist()
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(0, 8))
            (tmp_path / name).write_bytes(damaged)
            try:
                read = _everything(location)
            except StoreError as error:
                found[name] += name in error.line()
                continue
            # Parquet has bytes that say nothing (its own statistics and version strings).
            assert read == sound, (name, place)
        (tmp_path / name).write_bytes(whole)
    assert found["plan.json"] == 250
    assert found["segments.parquet"] > 100


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_plan_is_refused(tmp_path: Path, keep: int) -> None:
    location = open_location(tmp_path)
    store_factory.plan(location, [["alpha"]])
    whole = (tmp_path / "segments.parquet").read_bytes()
    (tmp_path / "segments.parquet").write_bytes(whole[:keep])
    with pytest.raises(CorruptionError, match=r"segments\.parquet, shard 0"):
        _everything(location)


def test_segments_of_another_plan_are_refused(tmp_path: Path) -> None:
    location = open_location(tmp_path)
    store_factory.plan(location, [["alpha"]])
    other = open_location(tmp_path / "other")
    store_factory.plan(other, [["alphb"]])
    location.write_atomic("segments.parquet", other.read_bytes("segments.parquet"))
    with pytest.raises(CorruptionError, match="not those of the plan"):
        _everything(location)


def test_no_plan_and_half_a_plan(tmp_path: Path) -> None:
    location = open_location(tmp_path)
    with pytest.raises(MissingError, match="logitfuse extract plan"):
        Plan.open(location)
    store_factory.plan(location, [["alpha"]])

    def dies() -> Any:
        yield store_factory.segments(["beta"]), {"target": 1}
        raise ConfigError("stopped half-way")

    from store_schema.plan.plan import write_plan

    with pytest.raises(ConfigError, match="stopped half-way"):
        write_plan(
            location,
            dies(),
            corpus_fingerprint="c",
            request_fingerprint="r",
            tokenizers={},
            settings={},
        )
    # The old record went first: half-written segments are never taken for a plan.
    with pytest.raises(MissingError):
        Plan.open(location)


def test_digest_of_bytes() -> None:
    assert bytes_digest(b"") == bytes_digest(memoryview(b""))
    assert bytes_digest(b"a") != bytes_digest(b"b")
