"""A store against the model that the run file names now: content decides where the model is at hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from store_schema.config import ModelRef, RunConfig
from store_schema.disk.location import open_location
from store_schema.disk.sealed import seal
from store_schema.errors import MismatchError
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.model.models import local_copy
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader
from store_schema.store.same_source import require_same_source, source_identity
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import SegmentTokenizer
from tests.aligned_factory import make_plan

GONE = "./nowhere/model"


@pytest.fixture
def model(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return Path(shutil.copytree(tiny_models["code"], tmp_path / "models/one"))


@pytest.fixture
def made(tmp_path: Path, model: Path) -> tuple[RunConfig, Plan]:
    """A run and its plan, the store of its source begun."""
    run = RunConfig(
        name="t",
        run_dir=str(tmp_path / "run"),
        sources={"one": ModelRef(model=str(model))},
        target=ModelRef(model=str(model)),
    )
    tokenizer = SegmentTokenizer.load(run.sources["one"], name="one")
    plan = make_plan(tmp_path / "run/plan", tokenizer, shards={"train": 1}, segments_per_shard=2)
    identity = source_identity(run.sources["one"], tokenizer, folder=model)
    begin(run, plan, tokenizer, identity)
    return run, plan


def begin(
    run: RunConfig, plan: Plan, tokenizer: SegmentTokenizer, identity: ModelIdentity
) -> Manifest:
    manifest = Manifest(
        kind="source",
        source="one",
        model=identity,
        corpus_fingerprint="c",
        plan_fingerprint=plan.fingerprint,
        num_shards=1,
        top_k=4,
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )
    location = open_location(run.store_url("one"))
    return StoreWriter.open(location, manifest, tokenizer.vocabulary).manifest


def check(made: tuple[RunConfig, Plan], **changed: object) -> None:
    run, plan = made
    ref = ModelRef.model_validate(run.sources["one"].model_dump() | changed)
    reader = StoreReader.open(open_location(run.store_url("one")))
    require_same_source(run.model_copy(update={"sources": {"one": ref}}), "one", reader, plan)


def refusal(made: tuple[RunConfig, Plan], **changed: object) -> str:
    with pytest.raises(MismatchError, match="another model than the run file's source one") as told:
        check(made, **changed)
    line = told.value.line()
    assert "stores/one" in line
    assert "put the model back into the run file, or extract the new one" in line
    return line


def test_the_same_model_by_any_path(
    made: tuple[RunConfig, Plan], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(made)
    check(made, model=os.path.relpath(model))
    monkeypatch.chdir(tmp_path)
    check(made, model="models/one/")
    model.rename(tmp_path / "moved")
    check(made, model="moved")
    (tmp_path / "link").symlink_to("moved")
    check(made, model="link")


def test_other_weights_under_a_new_or_the_same_name(
    made: tuple[RunConfig, Plan], model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "models/two"))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = refusal(made, model=str(other))
    assert f"expected {other} (model " in line
    assert f"got {model} (model " in line
    shutil.copy(weights, model)
    refusal(made)


def test_another_tokenizer_of_the_same_weights(
    made: tuple[RunConfig, Plan], model: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "models/two"))
    for file in tiny_models["prose"].glob("tokenizer*"):
        shutil.copy(file, other)
    assert "tokenizer" in refusal(made, model=str(other))
    assert "bos never" in refusal(made, bos="never")
    check(made, revision="abc")  # which a folder does not have: its content is what it was


def test_a_store_whose_tokens_do_not_join_to_the_text(
    made: tuple[RunConfig, Plan], tmp_path: Path
) -> None:
    """An option of before; False was written where it was not set, and is."""
    run, _ = made
    location = open_location(run.store_url("one"))
    manifest = StoreReader.open(location).manifest
    assert manifest.model.by_offsets is False
    for given in (None, False, True):
        model = manifest.model.model_copy(update={"by_offsets": given})
        of_target = manifest.model_copy(update={"target": model})
        for changed in (manifest.model_copy(update={"model": model}), of_target):
            assert changed.model_copy(update={"target": None}).fingerprint() == (
                manifest.fingerprint()
            )
            location.write_atomic("manifest.json", seal(changed))
            if not given:
                assert StoreReader.open(location).manifest == changed
                continue
            with pytest.raises(MismatchError, match="made with `by_offsets: true`") as told:
                StoreReader.open(location)
            assert "stores/one/manifest.json" in told.value.line()


def test_a_plan_made_with_another_tokenizer(made: tuple[RunConfig, Plan], tmp_path: Path) -> None:
    run, plan = made
    record = plan.record.model_copy(update={"tokenizers": {"one": "f" * 32}})
    line = refusal((run, Plan(plan.location, record)))
    assert f"expected tokenizer {'f' * 32}" in line


@pytest.mark.parametrize("left", ["nothing", "no weights", "half the weights", "no config"])
def test_where_the_model_is_not_at_hand(
    made: tuple[RunConfig, Plan], model: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    run, _ = made
    if left == "nothing":
        shutil.rmtree(model)
    elif left == "no weights":
        (model / "model.safetensors").unlink()
    elif left == "no config":
        (model / "config.json").unlink()
    else:
        os.truncate(model / "model.safetensors", 1000)
    assert local_copy(run.sources["one"]) is None
    check(made)
    check(made, model=os.path.relpath(model))
    for changed in (
        {"model": GONE},
        {"revision": "abc"},
        {"gguf_file": "m.gguf"},
        {"bos": "never"},
    ):
        line = refusal(made, **changed)
        assert "if it is the same model at another place, run `logitfuse extract run`" in line
        assert " ".join(map(str, changed.values())) in line


def test_a_hub_model_is_looked_for_in_the_cache_alone(
    made: tuple[RunConfig, Plan], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot(name: str, *, revision: str | None, local_files_only: bool) -> str:
        assert local_files_only
        assert (name, revision) == ("some/model", "abc")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert local_copy(ModelRef(model="some/model", revision="abc")) == model
    assert local_copy(ModelRef(model="some/model", gguf_file="m.gguf")) is None


def test_going_on_under_another_path_writes_it_down(
    made: tuple[RunConfig, Plan], model: Path, tmp_path: Path
) -> None:
    run, plan = made
    before = StoreReader.open(open_location(run.store_url("one"))).manifest
    moved = model.rename(tmp_path / "moved")
    ref = ModelRef(model=str(moved))
    tokenizer = SegmentTokenizer.load(ref, name="one")
    now = begin(run, plan, tokenizer, source_identity(ref, tokenizer, folder=moved))
    assert now.model.name == str(moved)
    assert now.fingerprint() == before.fingerprint()
    shutil.rmtree(moved)
    check(made, model=str(moved))
    refusal(made)


def test_a_store_that_has_only_the_name_on_record(
    made: tuple[RunConfig, Plan], model: Path
) -> None:
    run, plan = made
    reader = StoreReader.open(open_location(run.store_url("one")))
    kept = ("name", "model_fingerprint", "tokenizer_fingerprint", "vocab_size")
    fields = json.loads(reader.manifest.model.model_dump_json(include=set(kept)))
    old = reader.manifest.model_copy(update={"model": ModelIdentity.model_validate(fields)})
    assert old.fingerprint() == reader.manifest.fingerprint()
    shutil.rmtree(model)
    reader = StoreReader(reader.location, old)
    require_same_source(run, "one", reader, plan)
    other = run.model_copy(update={"sources": {"one": ModelRef(model=GONE)}})
    with pytest.raises(MismatchError):
        require_same_source(other, "one", reader, plan)
