"""`extract.on_bad`: a segment that a source cannot score, to the end of the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import Arrays, Origin
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from tests.command import ok, refused
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run

BAD = "~"
"""The sources' embedding of this token is NaN; one document has it."""
RECORD = ("--set", "extract.on_bad=record")


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad") / "prose"
    shutil.copytree(tiny_models["prose"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    with torch.no_grad():
        model.get_input_embeddings().weight[vocabulary[BAD]] = torch.nan
    model.save_pretrained(folder)
    return {"prose": folder, "target": tiny_models["target"]}


def planned(folder: Path, models: dict[str, Path]) -> Path:
    bad = {"id": "bad", "text": f"one {BAD} and more of it", "domain": "prose", "split": "train"}
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "docs.jsonl", [*sample_documents(), bad])
    return plan_run(write_run(folder, models))


def rows(url: str, path: Path) -> dict[str, tuple[Arrays, slice]]:
    """Arrays and rows of each segment of a store, by its id."""
    reader, found = StoreReader.open(open_location(url)), {}
    for shard in open_plan(load_run(path)).shards:
        arrays = reader.read(shard.index)
        for d, segment in enumerate(open_plan(load_run(path)).segments(shard)):
            found[segment.segment_id] = arrays, slice(*arrays["token_offsets"][d : d + 2])
    return found


def test_an_error_names_the_segment_and_commits_nothing_of_its_shard(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    path = planned(tmp_path, models)
    assert "NaN from the model in segment bad#0, source prose" in refused(
        "extract", "run-source", path, "--source", "prose"
    )


def test_a_segment_with_nan_is_recorded_and_all_goes_on(
    tmp_path: Path, models: dict[str, Path], tiny_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, models)
    said = ok("extract", "run", path, *RECORD)
    assert "segments left unscored (extract.on_bad)" in said
    ok("store", "verify", path)
    run = load_run(path)
    found = rows(run.store_url("prose"), path)
    arrays, at = found["bad#0"]
    assert np.isnan(arrays["label_logprobs"][at]).all()
    assert (arrays["tail_mass"][at] == 1).all()
    assert not np.diff(arrays["entry_offsets"])[at].any()
    sound = planned(tmp_path / "sound", {**models, "prose": tiny_models["prose"]})
    ok("extract", "run", sound)
    for name, (whole, rows_of) in rows(load_run(sound).store_url("prose"), sound).items():
        if name != "bad#0":
            arrays, at = found[name]
            np.testing.assert_array_equal(
                arrays["label_logprobs"][at], whole["label_logprobs"][rows_of]
            )
    # Without the option: nothing is left to do, and later stages do not ask.
    assert "nothing to do" in ok("extract", "run", path)
    ok("align", "run", path)
    arrays, at = rows(run.aligned_url("prose"), path)["bad#0"]
    assert (arrays["origin"][at] == Origin.NONE).all()
    ok("eval", "pool", path)
    words = ("max_steps=2", "control=false", "batch_segments=4", "asn.pretrain_steps=2")
    trained = ok("train", "run", path, *(w for s in words for w in ("--set", f"train.{s}")))
    assert "step 2 of 2" in trained


def test_longer_than_the_model_can_read(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_models["prose"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    path = planned(tmp_path, {"prose": tiny_models["prose"], "target": tiny_models["target"]})
    text = path.read_text().replace(str(tiny_models["prose"]), str(folder))
    path.write_text(text)
    line = refused("extract", "run-source", path, "--source", "prose")
    assert "segments are longer than prose can read" in line
    assert "set extract.on_bad to record" in line
    said = ok("extract", "run", path, *RECORD)
    ok("store", "verify", path)
    lengths = {name: at.stop - at.start for name, (_, at) in rows_of(path).items()}
    unscored = {
        name
        for name, (arrays, at) in rows_of(path).items()
        if np.isnan(arrays["label_logprobs"][at]).all()
    }
    assert unscored == {name for name, length in lengths.items() if length > 48}
    assert 0 < len(unscored) < len(lengths)
    assert (
        f"prose: {len(unscored)} of {len(lengths)} segments left unscored (extract.on_bad)" in said
    )


def test_a_context_longer_than_positions_that_the_model_has_learned(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["prose"])
    shape = {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = "a question of many words that has no end "
    chats = [
        {"prompt": words * (4 if i == 0 else 1), "response": "yes, it is so", "split": "train"}
        for i in range(6)
    ]
    write_jsonl(tmp_path / "docs.jsonl", chats)
    columns = {"prompt": "prompt", "response": "response"}
    entry = {"path": str(tmp_path / "docs.jsonl"), "domain": "chat", "columns": columns}
    models = {"prose": folder, "target": tiny_models["target"]}
    sections = {
        "plan": {"max_tokens": 256, "shard_tokens": 256},
        "corpus": {"inputs": [entry]},
        "extract": {"engine": "transformers", "top_k": 8, "on_bad": "record"},
    }
    path = plan_run(write_run(tmp_path, models, **sections))
    said = ok("extract", "run", path)
    assert "prose: 1 of 6 segments left unscored" in said
    ok("store", "verify", path)


def test_a_bad_shard_of_another_worker_is_left_to_it(
    tmp_path: Path, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = planned(tmp_path, models)
    plan = open_plan(load_run(path))
    (bad,) = (
        shard.index
        for shard in plan.shards
        if "bad#0" in {segment.segment_id for segment in plan.segments(shard)}
    )
    command = ("extract", "run-source", path, "--source", "prose")
    ok(*command, "--worker", f"{(bad + 1) % 2}/2")
    assert "left to the worker whose shard it is: NaN from the model" in caplog.text
    done = set(StoreReader.open(open_location(load_run(path).store_url("prose"))).commits)
    assert done >= {s.index for s in plan.shards if s.index % 2 != bad % 2}
    assert "NaN from the model in segment bad#0" in refused(*command, "--worker", f"{bad % 2}/2")


def rows_of(path: Path) -> dict[str, tuple[Arrays, slice]]:
    return rows(load_run(path).store_url("prose"), path)


def test_a_model_that_can_score_nothing_is_refused_all_the_same(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = tmp_path / "nan"
    model = AutoModelForCausalLM.from_pretrained(tiny_models["prose"])
    shutil.copytree(tiny_models["prose"], folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    model.save_pretrained(folder)
    path = planned(tmp_path, {"prose": folder, "target": tiny_models["target"]})
    line = refused("extract", "run-source", path, "--source", "prose", *RECORD)
    assert "no segment of a shard can be scored" in line
    assert "NaN from the model" in line
    assert not list((tmp_path / "run").glob("stores/prose/commits/*"))
