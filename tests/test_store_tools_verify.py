"""`store verify`: a sound store passes, every kind of damage is named, and none hides another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.signals import StopFlag
from store_schema.disk.location import LocalLocation
from store_schema.errors import CorruptionError, Stopped, StorageError
from store_schema.fingerprint import fingerprint
from store_schema.layout import FORMS, KINDS, Arrays, Form, Kind
from store_schema.plan.plan import Plan
from store_schema.presets import Preset
from store_schema.text.vocabulary import Vocabulary
from store_tools import verify
from store_tools.against_plan import FlatVocabulary, compare_with_plan
from store_tools.places import find_places
from store_tools.shard_work import for_each_shard
from store_tools.verify import verify_store
from tests import store_factory
from tests.planned_store import (
    VOCABULARY,
    call,
    data_file,
    flip,
    found_wrong,
    make_plan,
    make_run,
    ok,
    reader_of,
    shard_arrays,
    store_folder,
)

SPELT = ("token_ids", "byte_ends", "token_offsets")


@pytest.mark.parametrize("preset", ["exact", "compact"])
@pytest.mark.parametrize("kind", FORMS)
def test_a_sound_store_passes(tmp_path: Path, kind: Form, preset: Preset) -> None:
    make_run(tmp_path, kinds=[kind], preset=preset)
    folder = store_folder(tmp_path, kind)
    assert ok("verify", folder, "--jobs", 3) == f"{folder}: 3 shards sound, 0 damaged, 0 missing\n"


def test_a_run_file_stands_for_all_its_stores(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, kinds=KINDS)
    assert ok("verify", run_file).splitlines() == [
        "stores/s: 3 shards sound, 0 damaged, 0 missing",
        "generated/s: 3 shards sound, 0 damaged, 0 missing",
        "aligned/s: 3 shards sound, 0 damaged, 0 missing",
    ]
    assert ok("verify", run_file, "--kind", "aligned").startswith("aligned/s: 3")


def test_every_damage_is_told_with_its_place(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    flip(data_file(tmp_path, 0, "tail_mass"), 3)
    flip(data_file(tmp_path, 2, "entry_ids_coded"), 3)
    lines = found_wrong("verify", run_file).splitlines()
    assert len(lines) == 3
    for line, shard, array in zip(lines, (0, 2), ("tail_mass", "entry_ids_coded"), strict=False):
        assert f"shard {shard}, array {array}, chunk 0" in line
        assert "store repair" in line
    assert lines[-1] == "stores/s: 1 shards sound, 2 damaged, 0 missing"


@pytest.mark.parametrize("kind", ["branched", "aligned"])
def test_every_file_of_the_data_is_looked_at(tmp_path: Path, kind: Form) -> None:
    """One flip in each file of a shard, all in one run: the others never hide one."""
    make_run(tmp_path, kinds=[kind])
    folder = store_folder(tmp_path, kind)
    files = sorted(reader_of(tmp_path, kind).commits[1].files)
    top = folder / reader_of(tmp_path, kind).commits[1].path
    (place,) = find_places(str(folder))
    found = 0
    for name in files:
        flip(top / name, (top / name).stat().st_size // 2)
        report = verify_store(place, jobs=1)
        found += list(report.damaged) == [1] and name.split("/")[0] in report.damaged[1].line()
        flip(top / name, (top / name).stat().st_size // 2)
    assert found == len(files) > 20
    assert verify_store(place).is_whole


@pytest.mark.parametrize("kind", KINDS)
def test_quick_finds_lost_and_cut_files_without_reading_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    run_file = make_run(tmp_path, kinds=[kind])
    monkeypatch.setattr("store_schema.store.reader.CommittedShard.read", None)
    name = ok("verify", run_file, "--quick").split(":")[0]
    folder = store_folder(tmp_path, kind)
    commits = reader_of(tmp_path, kind).commits
    lost, cut = (sorted((folder / commits[shard].path).rglob("c/0")) for shard in (0, 2))
    lost[-1].unlink()
    cut[0].write_bytes(cut[0].read_bytes()[:-1])
    lines = found_wrong("verify", run_file, "--quick").splitlines()
    assert "shard 0" in lines[0]
    assert f"{len(commits[0].files)} files, got {len(commits[0].files) - 1}" in lines[0]
    assert str(cut[0].relative_to(folder)) in lines[1]
    assert lines[2] == f"{name}: 1 shards sound, 2 damaged, 0 missing, data not read (--quick)"


def test_quick_compares_commits_with_the_plan(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    folder = store_folder(tmp_path)
    commit = json.loads((folder / "commits/00001.json").read_text())
    (folder / "commits/00001.json").write_text(json.dumps(commit | {"first_segment": 0}))
    assert "commits/00001.json" in found_wrong("verify", run_file, "--quick")
    assert "missing shards: 0-1" in found_wrong(
        "verify", make_run(tmp_path / "b", leave_out=[0, 1]), "--quick"
    )


def test_a_damaged_commit_does_not_hide_the_others(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    (store_folder(tmp_path) / "commits/00001.json").write_text("{not json")
    flip(data_file_without_commit(tmp_path, 2), 3)
    *damage, last = found_wrong("verify", run_file).splitlines()
    assert "commits/00001.json" in damage[0]
    assert "shard 2" in damage[1]
    assert last == "stores/s: 1 shards sound, 2 damaged, 0 missing"


def data_file_without_commit(folder: Path, shard: int) -> Path:
    """A data file of a shard where not every commit can be read."""
    (path,) = (store_folder(folder) / "data").glob(f"{shard:05d}-*/tail_mass/c/0")
    return path


def test_missing_shards_fail_unless_allowed(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, leave_out=[0, 1])
    output = found_wrong("verify", run_file)
    assert output.splitlines() == [
        "missing shards: 0-1",
        "stores/s: 1 shards sound, 0 damaged, 2 missing",
    ]
    assert ok("verify", run_file, "--allow-missing") == output
    flip(data_file(tmp_path, 2, "tail_mass"))
    found_wrong("verify", run_file, "--allow-missing")


def _other_rows(arrays: Arrays) -> None:
    arrays["segment_ids"] = arrays["segment_ids"][::-1].copy()


def _other_bytes(arrays: Arrays) -> None:
    arrays["token_ids"] = arrays["token_ids"].copy()
    arrays["token_ids"][4] += 1


def _short_text(arrays: Arrays) -> None:
    last = int(arrays["token_offsets"][1]) - 1
    arrays["byte_ends"][last] -= 1


def _other_ends(arrays: Arrays) -> None:
    arrays["byte_ends"] = arrays["byte_ends"].copy()
    arrays["byte_ends"][2] += 1


@pytest.mark.parametrize(
    ("change", "array"),
    [
        (_other_rows, "array segment_ids"),
        (_other_bytes, "array token_ids"),
        (_short_text, "array byte_ends"),
        (_other_ends, "array byte_ends"),
    ],
)
def test_positions_that_are_not_the_plans(
    tmp_path: Path, change: Callable[[Arrays], None], array: str
) -> None:
    """Every checksum is right: only the plan tells."""
    run_file = make_run(tmp_path, change={1: change})
    damage, last = found_wrong("verify", run_file).splitlines()
    assert "shard 1" in damage
    assert array in damage
    assert last == "stores/s: 2 shards sound, 1 damaged, 0 missing"
    bare = tmp_path / "elsewhere"
    store_folder(tmp_path).rename(bare)
    assert "not compared with a plan" in ok("verify", bare)
    found_wrong("verify", bare, "--plan", tmp_path / "run/plan")


def test_a_text_that_is_not_covered_is_found_without_the_vocabulary(tmp_path: Path) -> None:
    make_run(tmp_path)
    plan = Plan.open(LocalLocation(str(tmp_path / "run/plan")))
    record = plan.shards[1]
    segments, arrays = plan.segments(record), shard_arrays(plan, 1)
    compare_with_plan(arrays, record, segments, None, "here")
    _short_text(arrays)
    with pytest.raises(CorruptionError, match="tokens do not cover"):
        compare_with_plan(arrays, record, segments, None, "here")


def test_a_space_of_the_tokenizers_own_takes_no_bytes(tmp_path: Path) -> None:
    """SentencePiece's dummy prefix: the quick look says no, the closer one yes."""
    table = Vocabulary((b" a", b"b", b"<s>"), np.array([False, False, True]))
    (segment,) = store_factory.segments(["ab<s>"])
    record = store_factory.shard_record().model_copy(update={"stop": 1})
    arrays = {
        "segment_ids": np.array([0]),
        "token_offsets": np.array([0, 3]),
        "token_ids": np.array([0, 1, 2], np.uint32),
        "byte_ends": np.array([1, 2, 5], np.uint32),
    }
    texts = [segment.text.encode()]
    assert not FlatVocabulary(table).writes(*(arrays[name] for name in SPELT), texts)
    compare_with_plan(arrays, record, [segment], FlatVocabulary(table), "here")
    arrays["byte_ends"] = np.array([1, 3, 5], np.uint32)
    with pytest.raises(CorruptionError, match="byte ends are not those of the tokens"):
        compare_with_plan(arrays, record, [segment], FlatVocabulary(table), "here")


@given(st.lists(st.text(max_size=8), max_size=6), st.data())
def test_quick_spelling_is_the_slow_one(texts: list[str], data: st.DataObject) -> None:
    encoded = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint32) + 1
    offsets = np.cumsum([0, *map(len, encoded)])
    ends = np.concatenate([np.zeros(0), *(np.arange(len(t)) + 1 for t in encoded)])
    flat = FlatVocabulary(VOCABULARY)
    assert flat.writes(ids, ends.astype(np.uint32), offsets, encoded)
    if len(ids):
        at = data.draw(st.integers(0, len(ids) - 1))
        for array in (ids, ends):
            array[at] += 1
            assert not flat.writes(ids, ends.astype(np.uint32), offsets, encoded)
            array[at] -= 1


def test_a_shard_of_other_segments_is_found(tmp_path: Path) -> None:
    record = make_plan(tmp_path / "other").shards[1].model_copy(update={"fingerprint": "0" * 32})
    run_file = make_run(tmp_path, records={1: record})
    damage, last = found_wrong("verify", run_file).splitlines()
    assert "shard 1 was written from other segments" in damage
    assert last.endswith("2 shards sound, 1 damaged, 0 missing")


def test_a_damaged_plan_is_not_blamed_on_the_shard(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    path = tmp_path / "run/plan/segments.parquet"
    plan = Plan.open(LocalLocation(str(path.parent)))
    text = plan.segments(plan.shards[1])[0].text.encode()
    path.write_bytes(path.read_bytes().replace(text[:4], b"____", 1))
    lines = found_wrong("verify", run_file).splitlines()
    assert "segments.parquet, shard 1" in lines[0]
    assert lines[-1].startswith("stores/s: 2 shards sound, 0 damaged, 0 missing, and the store as")


def test_another_plan_is_told(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    plan = tmp_path / "run/plan/plan.json"
    content = json.loads(plan.read_text())
    for shard in content["shards"]:
        shard["fingerprint"] = "0" * 32
    del content["digest"]
    plan.write_text(json.dumps(content | {"digest": fingerprint(content)}))
    assert "store and plan do not belong together" in found_wrong("verify", run_file)
    assert "store and plan do not belong together" in found_wrong("verify", store_folder(tmp_path))


@pytest.mark.parametrize("name", ["manifest.json", "vocabulary.parquet", "ids_by_rank.npy"])
def test_damage_of_what_all_shards_share(tmp_path: Path, name: str) -> None:
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / name
    flip(path, path.stat().st_size // 2)
    output = found_wrong("verify", run_file)
    assert name in output
    assert output.splitlines()[-1].endswith("and the store as a whole has faults")
    path.unlink()
    output = found_wrong("verify", run_file)
    assert name in output or "no store" in output


def test_a_foreign_manifest_does_not_make_every_shard_damaged(tmp_path: Path) -> None:
    """Else repair would take back every commit of a store whose one wrong file is the manifest."""
    run_file = make_run(tmp_path)
    path = store_folder(tmp_path) / "manifest.json"
    content = json.loads(path.read_text()) | {"source": "another"}
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": fingerprint(content)}))
    output = found_wrong("verify", run_file)
    assert "none of the commits belongs to the manifest (3 are another's)" in output
    assert "stores/s: 0 shards sound, 0 damaged, 0 missing" in output


def test_leftovers_are_counted_and_no_error(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    attempt = store_folder(tmp_path) / "data/00001-0123456789abcdef"
    (attempt / "tail_mass/c").mkdir(parents=True)
    (attempt / "tail_mass/c/0").write_bytes(bytes(2_000_000))
    first, last = ok("verify", run_file).splitlines()
    assert first == (
        "1 folder(s) of unfinished attempts, 2.0 MB; `logitfuse store gc` removes them"
    )
    assert last.endswith("3 shards sound, 0 damaged, 0 missing")


def test_a_disk_that_refuses_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = make_run(tmp_path)

    def refuse(self: object, shard: int) -> None:
        raise StorageError("storage refused", where="disk")

    monkeypatch.setattr(verify.TolerantReader, "verify", refuse)
    result = call("verify", run_file)
    assert result.exit_code == 2
    assert "error: storage refused in disk" in result.stderr
    assert "damaged" not in result.stdout


def test_stopping_between_shards(tmp_path: Path) -> None:
    make_run(tmp_path)
    flag = StopFlag()
    flag.ask(15)
    (place,) = find_places(str(store_folder(tmp_path)))
    with pytest.raises(Stopped):
        verify_store(place, jobs=1, stop=flag)


def test_work_that_fails_drops_what_is_not_begun() -> None:
    begun = []

    def work(shard: int) -> int:
        begun.append(shard)
        if shard == 1:
            raise StorageError("full")
        time.sleep(0.005)
        return shard

    with pytest.raises(StorageError):
        list(for_each_shard(work, range(200), jobs=1))
    assert len(begun) < 200


def test_the_report_counts_like_a_slow_one(tmp_path: Path) -> None:
    """Any mix of damage and absence adds up to the plan's shards."""
    rng = np.random.default_rng(0)
    for round_ in range(6):
        folder = tmp_path / str(round_)
        fate = rng.integers(0, 3, 3)
        make_run(folder, leave_out=np.flatnonzero(fate == 0).tolist())
        for shard in np.flatnonzero(fate == 1):
            flip(data_file(folder, int(shard), "token_ranks"), 2)
        (place,) = find_places(str(store_folder(folder)))
        report = verify_store(place)
        assert report.missing == np.flatnonzero(fate == 0).tolist()
        assert sorted(report.damaged) == np.flatnonzero(fate == 1).tolist()
        assert report.sound == np.flatnonzero(fate == 2).tolist()
