"""A plan goes on: what fits stays, what does not is named, and nothing is thrown away unasked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.scoring.sources import check_source
from store_schema.config import ModelRef, load_run
from store_schema.disk.location import LocalLocation, open_location
from store_schema.errors import MismatchError, StorageError
from store_schema.plan.plan import PLAN_FILE, SEGMENTS_FILE, Plan
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.plan_tokens import plan_for
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import call, ok, refused
from tests.extract_runs import files_of, plan_run, sample_documents, write_jsonl, write_run
from tests.random_source import random_source
from tests.store_damage import reseal
from tests.tiny import tiny_tokenizer

TWO = ("code", "prose")


def plan_of(path: Path) -> Plan:
    return open_plan(load_run(path))


def fill(path: Path, name: str, **settings: Any) -> set[int]:
    """Write what is pending of a source, as `extract run` would; which shards."""
    run = load_run(path)
    source = check_source(run, name, plan_of(path))
    writer = source.open_store()
    committed = writer.committed(source.plan.shards)
    done = set()
    for shard in source.plan.shards:
        if shard.index not in committed:
            encoded = source.tokenizer.encode(source.plan.segments(shard))
            arrays = random_source(encoded, source.tokenizer.vocab_size, shard.index, k=8)
            arrays["segment_ids"] = np.arange(shard.start, shard.stop, dtype="<i8")
            writer.write(shard, arrays, {"seconds": 1.0})
            done.add(shard.index)
    return done


@pytest.fixture
def begun(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    """A run of two sources, the first of them extracted."""
    path = plan_run(write_run(tmp_path, {name: tiny_models[name] for name in (*TWO, "target")}))
    assert fill(path, "code") == {shard.index for shard in plan_of(path).shards}
    return path


def again(path: Path, models: dict[str, Path], *names: str, **sections: Any) -> Path:
    return write_run(path.parent, {name: models[name] for name in (*names, "target")}, **sections)


def test_sources_come_and_go(begun: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    before = plan_of(begun)
    stores = files_of(tmp_path / "run/stores")
    segments = (tmp_path / "run/plan" / SEGMENTS_FILE).read_bytes()
    room = {"plan": {"max_tokens": 110, "shard_tokens": 256}}  # facts takes more tokens
    said = ok("extract", "plan", again(begun, tiny_models, *TWO, "facts", **room)).splitlines()
    count = len(before.shards)
    assert f"code: {count} of {count} shards kept" in said
    assert f"facts: no shards yet, {count} to extract" in said
    grown = plan_of(begun)
    assert grown.fingerprint == before.fingerprint
    facts = SegmentTokenizer.load(load_run(begun).sources["facts"], name="facts")
    assert grown.record.tokenizers["facts"] == facts.fingerprint
    for shard in grown.shards:
        tokens = sum(len(e.token_ids) for e in facts.encode(grown.segments(shard)))
        assert shard.num_tokens["facts"] == tokens
    assert grown.record.settings["context_tokens"]["facts"] == grown.record.num_segments
    fill(begun, "facts")
    assert fill(begun, "code") == set()
    # Fewer, and the first two again: no segment is read, no store touched.
    for names in (("code",), TWO):
        ok("extract", "plan", again(begun, tiny_models, *names, **room))
        assert plan_of(begun).fingerprint == before.fingerprint
        assert "nothing to do" in ok("extract", "plan", begun)
    assert (tmp_path / "run/plan" / SEGMENTS_FILE).read_bytes() == segments
    now = files_of(tmp_path / "run/stores")
    assert {name: data for name, data in now.items() if name in stores} == stores


def refusals(said: str) -> list[str]:
    return [line for line in said.splitlines() if "refused by" in line]


def other_weights(model: Path, copy: Path) -> Path:
    shutil.copytree(model, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    return copy


def test_what_extraction_will_refuse_is_said(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    count = len(plan_of(begun).shards)
    assert not refusals(ok("extract", "plan", begun))
    changes = {
        "model_fingerprint": f"sources.code.model={other_weights(tiny_models['code'], tmp_path / 'w')}",
        "dtype": "sources.code.dtype=float64",
        "tokenizer_fingerprint": f"sources.code.model={tiny_models['prose']}",
    }
    for what, change in changes.items():
        said = ok("extract", "plan", begun, "--set", change)
        assert ("nothing to do" in said) == (what != "tokenizer_fingerprint")
        [line] = refusals(said)
        assert line.startswith(f"code: {count} of {count} shards, refused by `extract run`: ")
        assert what in line
        assert f"code: {count} of {count} shards kept" not in said
        assert line.endswith(refused("extract", "run", begun, "--set", change)[len("error: ") :])


def test_planning_needs_no_weights_to_say_it(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """As on a login node: config and tokenizer are there."""
    bare = shutil.copytree(tiny_models["code"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    said = ok("extract", "plan", begun, "--set", f"sources.code.model={bare}")
    [line] = refusals(said)
    assert "another model than the run file's source code" in line
    assert f"expected {bare}, got {tiny_models['code']};" in line


def test_what_alignment_will_refuse_is_said(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    only = again(begun, tiny_models, "code")
    count = len(plan_of(begun).shards)
    ok("extract", "plan", only)
    ok("align", "run", only)
    assert not refusals(ok("extract", "plan", only))
    other = ["--set", f"target.model={tiny_models['prose']}"]
    for change in (other, ["--set", "align.max_entries=9"]):
        said = ok("extract", "plan", only, *change)
        [line] = refusals(said)
        start = f"aligned code: {count} of {count} shards, refused by `align run`: "
        assert line.startswith(start)
        assert f"error: {line[len(start) :]}" in call("align", "run", only, *change).stderr
    # A run of its own that uses the data has its own place for another target's alignment.
    own = ["--set", f"run_dir={tmp_path / 'own'}", "--set", f"data_dir={tmp_path / 'run'}"]
    assert not refusals(ok("extract", "plan", only, *other, *own))


def documents(**splits: int) -> list[dict[str, str]]:
    """The documents of the tests, some of splits of their own beside them."""
    more = [
        {"id": f"{split}-{i}", "text": f"{split} number {i}. " * 9, "domain": "d", "split": split}
        for split, count in splits.items()
        for i in range(count)
    ]
    return [*more, *sample_documents()]  # first, so that rows of the corpus move


SPLITS = {"splits": ["train", "valid", "test", "extra"]}


def with_splits(path: Path) -> dict[str, Any]:
    return {"corpus": {"inputs": [{"path": str(path.parent / "docs.jsonl")}], **SPLITS}}


def test_a_split_is_taken_in_later(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    before = plan_of(begun)
    write_jsonl(tmp_path / "docs.jsonl", documents(extra=5))
    again(begun, tiny_models, *TWO, **with_splits(begun))
    assert "another corpus" in ok("corpus", "build", begun)
    said = ok("extract", "plan", begun)
    grown = plan_of(begun)
    count, more = len(before.shards), len(grown.shards) - len(before.shards)
    assert [shard.fingerprint for shard in grown.shards[:count]] == [
        shard.fingerprint for shard in before.shards
    ]
    assert {shard.split for shard in grown.shards[count:]} == {"extra"}
    assert f"code: {count} of {count + more} shards kept, {more} to extract" in said
    assert [s.index for shard in grown.shards for s in grown.segments(shard)] == list(
        range(grown.record.num_segments)
    )
    copied = str(tmp_path / "copy")
    for _ in range(2):
        said = call("store", "verify", begun).stdout
        assert f"{count} shards sound, 0 damaged, {more} missing" in said
        assert call("store", "copy", tmp_path / "run/stores/code", copied).output
    assert fill(begun, "code") == set(range(count, count + more))
    assert call("store", "copy", tmp_path / "run/stores/code", copied).output
    assert set(StoreReader.open(open_location(copied)).commits) == set(range(count + more))
    assert "0 missing" in ok("store", "verify", begun)
    reader = StoreReader.open(open_location(tmp_path / "run/stores/code"))
    assert reader.committed(grown.shards) == set(range(count + more))
    for shard in reader.commits:
        reader.verify(shard)
    assert not (tmp_path / "run/plan/segments.next.parquet").exists()
    # Left out again, it stays: its shards are made.
    again(begun, tiny_models, *TWO)
    plan_run(begun)
    assert plan_of(begun).fingerprint == grown.fingerprint


@pytest.mark.parametrize("key", [SEGMENTS_FILE, PLAN_FILE, "config.yaml"])
def test_a_killed_plan_goes_on_as_if_nothing_had_happened(
    begun: Path,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    before = plan_of(begun)
    write_jsonl(tmp_path / "docs.jsonl", documents(extra=5))
    again(begun, tiny_models, *TWO, **with_splits(begun))
    ok("corpus", "build", begun)

    def refuse(name: str) -> None:
        if name == key:
            raise StorageError("killed")

    with monkeypatch.context() as patch:
        replace, write = LocalLocation.replace, LocalLocation.write_atomic
        patch.setattr(LocalLocation, "replace", lambda s, a, b: (refuse(b), replace(s, a, b)))
        patch.setattr(LocalLocation, "write_atomic", lambda s, k, d: (refuse(k), write(s, k, d)))
        assert "killed" in refused("extract", "plan", begun)
    left = plan_of(begun)
    assert left.fingerprint == before.fingerprint
    for shard in left.shards:  # readers of the old plan find its segments
        left.segments(shard)
    ok("extract", "plan", begun)
    killed = {k: v for k, v in files_of(tmp_path / "run/plan").items() if k != "config.yaml"}
    for name in killed:
        (tmp_path / "run/plan" / name).unlink()
    (tmp_path / "run/plan" / PLAN_FILE).write_bytes(seal_of(before))
    assert plan_of(begun).fingerprint == before.fingerprint
    (tmp_path / "run/plan" / SEGMENTS_FILE).write_bytes(killed[SEGMENTS_FILE])
    ok("extract", "plan", begun)
    assert files_of(tmp_path / "run/plan")[PLAN_FILE] == killed[PLAN_FILE]


def seal_of(plan: Plan) -> bytes:
    from store_schema.disk.sealed import seal

    return seal(plan.record)


def test_changed_documents_are_refused_until_recut(begun: Path, tmp_path: Path) -> None:
    before = plan_of(begun)
    changed = documents()
    last = next(d for d in changed if d["split"] == "test")
    last["text"] += " and more"
    write_jsonl(tmp_path / "docs.jsonl", changed)
    ok("corpus", "build", begun)
    files = files_of(tmp_path / "run")
    line = refused("extract", "plan", begun)
    assert "documents were changed after extraction began: split test" in line
    assert "extract plan --recut" in line
    assert files_of(tmp_path / "run") == files
    said = ok("extract", "plan", begun, "--recut")
    recut = plan_of(begun)
    kept = [s.index for s in recut.shards if s in before.shards]
    assert "stores/code: " in said
    assert "shards uncommitted" in said
    assert "nothing to do" in ok("extract", "plan", begun, "--recut")
    assert {s.split for s in recut.shards if s.index in kept} >= {"train", "valid"}
    assert fill(begun, "code") == {s.index for s in recut.shards} - set(kept)


def test_shards_of_other_segments_are_never_gone_on_with(begun: Path, tmp_path: Path) -> None:
    """As after a kill between the new plan and the taking back."""
    changed = [d | {"text": d["text"] + "!"} for d in sample_documents()]
    write_jsonl(tmp_path / "docs.jsonl", changed)
    ok("corpus", "build", begun)
    from extract.plan.planning import make_plan

    make_plan(load_run(begun), recut=True)
    with pytest.raises(MismatchError, match="written from other segments"):
        fill(begun, "code")
    assert "written from other segments" in refused("extract", "run", begun, "--source", "code")
    assert "uncommitted" in ok("extract", "plan", begun, "--recut")
    assert fill(begun, "code")


def test_the_same_shard_further_down_is_another_one(begun: Path) -> None:
    plan = plan_of(begun)
    shard = plan.shards[1]
    reader = StoreReader.open(open_location(load_run(begun).store_url("code")))
    assert reader.commits[1].matches(shard)
    assert not reader.commits[1].matches(shard.model_copy(update={"start": shard.start + 1}))


def test_a_model_that_needs_more_tokens_is_named(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    small = tiny_tokenizer("byte_level", vocab_size=262)
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small/config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 600, "vocab_size": 262}'
    )
    models = tiny_models | {"small": tmp_path / "small"}
    files = files_of(tmp_path / "run")
    line = refused("extract", "plan", again(begun, models, *TWO, "small"))
    found = re.search(r"got up to small (\d+) \(segment (\S+)\)", line)
    assert found is not None
    longest, before = int(found[1]), plan_of(begun)
    assert f"set plan.max_tokens to {longest} or more, which keeps all" in line
    assert files_of(tmp_path / "run") == files
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(tmp_path / "small")), name="small")
    lengths = {
        segment.segment_id: len(encoded.input_ids)
        for shard in before.shards
        for segment, encoded in zip(
            before.segments(shard), tokenizer.encode(before.segments(shard)), strict=True
        )
    }
    assert max(lengths.values()) == lengths[found[2]] == longest > 96
    ok("extract", "plan", begun, "--set", f"plan.max_tokens={longest}")
    assert plan_of(begun).fingerprint == before.fingerprint
    # Back to fewer, without that model: every model is measured, and all fit.
    ok("extract", "plan", again(begun, models, *TWO))
    assert plan_of(begun).fingerprint == before.fingerprint
    assert plan_of(begun).record.settings["max_tokens"] == 96
    assert "too long" in refused("extract", "plan", begun, "--set", "plan.max_tokens=64")


def test_text_that_a_new_model_cannot_represent(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    words = tiny_tokenizer("wordpiece", ["plain words only"], 60)
    words.save_pretrained(tmp_path / "words")
    (tmp_path / "words/config.json").write_text('{"model_type": "llama", "vocab_size": 60}')
    models = tiny_models | {"words": tmp_path / "words"}
    line = refused("extract", "plan", again(begun, models, *TWO, "words"))
    assert "tokenizer of words" in line
    assert "segment " in line


def test_stores_of_an_earlier_version_keep_their_plan(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    reseal(tmp_path / "run/stores/code/manifest.json", schema_version=3)
    line = refused("extract", "plan", again(begun, tiny_models, *TWO, "facts"))
    assert "the plan was changed after extraction began" in line
    assert "stores/code" in line


def test_a_plan_for_another_model_counts_its_tokens_once(
    begun: Path, tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(begun)
    run = load_run(begun)
    own = SegmentTokenizer.load(run.target, name="target")
    assert plan_for(plan, "target", own) is plan
    other = SegmentTokenizer.load(run.sources["prose"], name="target")
    planned = plan_for(plan, "target", other)
    assert planned.fingerprint == plan.fingerprint
    for shard, as_source in zip(planned.shards, plan.shards, strict=True):
        assert shard.num_tokens["target"] == as_source.num_tokens["prose"]
        assert planned.segments(shard) == plan.segments(as_source)
    kept = tmp_path / "run/plan/tokens" / f"{other.fingerprint}.json"
    monkeypatch.setattr(SegmentTokenizer, "encode", None)
    assert plan_for(plan, "target", other).record == planned.record
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:-9])  # damaged: counted again
    assert plan_for(plan, "target", other).record == planned.record
    longest = json.loads(kept.read_text())["longest"]
    with pytest.raises(MismatchError, match="longer than target can read"):
        plan_for(plan, "target", other, max_positions=longest - 1)
    plan_for(plan, "target", other, max_positions=longest)
