"""Branches in a store: each is the model's own distribution after text and entry, and none is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.engines.protocol import Branches, DenseRows, EngineSpec
from extract.engines.transformers_branches import attention_reach
from extract.engines.transformers_engine import TransformersEngine
from extract.run import run_source
from launch.work import Part
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.errors import Stopped, StoppedMidway
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import ok, refused
from tests.engine_contract import encoded_samples, spec_of
from tests.extract_runs import plan_run, write_run
from tests.tiny import tiny_tokenizer

TOLERANCE_NATS = 1e-4


def samples(spec: EngineSpec) -> list[Branches]:
    """Some entries of some segments, several at one position, the last position among them."""
    rng = np.random.default_rng(0)
    tokenizer = SegmentTokenizer.load(spec.ref, name="m")
    asked = []
    for segment in encoded_samples(tokenizer)[1:5]:
        last = len(segment.token_ids) - 1
        positions = np.sort(np.append(rng.integers(1, last, 6), [1, 1, last]))
        asked.append(Branches(segment, positions, rng.integers(3, spec.vocab_size, 9)))
    return asked


def plain_rows(spec: EngineSpec, branches: Branches) -> np.ndarray:
    """[B, V] log-probabilities after the text and each entry, each text by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.float32).eval()
    context, ids = list(branches.segment.context_ids), branches.segment.token_ids.tolist()
    rows = []
    for position, token in zip(branches.positions, branches.token_ids.tolist(), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *ids[:position], token]])).logits[0, -1]
        rows.append(torch.log_softmax(logits.double(), -1).numpy())
    return np.stack(rows)


def check_branches(engine: TransformersEngine, spec: EngineSpec) -> None:
    asked = samples(spec)
    found = dict(engine.branch(asked))
    assert sorted(found) == list(range(len(asked)))
    for i, branches in enumerate(asked):
        rows, dense = plain_rows(spec, branches), found[i]
        assert dense.ids.shape == (len(branches.positions), spec.section.top_k)
        chosen = np.take_along_axis(rows, dense.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(dense.logprobs, chosen, atol=TOLERANCE_NATS)
        best = -np.sort(-rows, axis=1)[:, : spec.section.top_k]
        np.testing.assert_allclose(-np.sort(-chosen, axis=1), best, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("name", ["code", "prose", "facts"])
@pytest.mark.parametrize("batch_tokens", [4, 4096])
def test_rows_are_those_of_separate_texts(
    tiny_models: dict[str, Path], name: str, batch_tokens: int
) -> None:
    spec = spec_of(tiny_models[name], "transformers", batch_tokens=batch_tokens)
    engine = TransformersEngine(spec)
    check_branches(engine, spec)
    assert engine._branch_states is not None
    assert engine._branch_states._together


ARCHITECTURES = {
    **{name: {} for name in ("GPT2", "OPT", "Bloom", "Mamba", "Gemma3Text", "Qwen3")},
    "Mistral": {"sliding_window": 12},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_have_them_too(tmp_path: Path, name: str) -> None:
    """Together where the mask does what it should, else one by one; never wrong."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        **ARCHITECTURES[name],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = spec_of(tmp_path, "transformers")
    engine = TransformersEngine(spec)
    check_branches(engine, spec)
    assert engine._branch_states is not None
    if name in ("GPT2", "Gemma3Text", "Qwen3"):
        assert engine._branch_states._together


def test_layers_that_see_only_so_far() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    assert attention_reach(LlamaConfig()) is None
    assert attention_reach(MistralConfig(sliding_window=7)) == 7
    assert attention_reach(Qwen2Config(sliding_window=7, use_sliding_window=False)) is None


def planned(folder: Path, models: dict[str, Path], **branches: Any) -> Path:
    extract = {"engine": "transformers", "top_k": 8, "branches": branches}
    chosen = {name: models[name] for name in ("code", "target")}
    sections = {"plan": {"max_tokens": 400, "shard_tokens": 256}, "store": {"preset": "compact"}}
    folder.mkdir(exist_ok=True)
    return plan_run(write_run(folder, chosen, extract=extract, **sections))


def store_of(path: Path) -> StoreReader:
    return StoreReader.open(open_location(load_run(path).store_url("code")))


def test_a_store_has_the_branches_of_its_entries(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, tiny_models, per_position=0.5, min_mass=0.02)
    run_source(load_run(path), "code", Part())
    run = load_run(path)
    plan, store = open_plan(run), store_of(path)
    told = {"per_position": 0.5, "min_mass": 0.02, "target": plan.record.tokenizers["target"]}
    assert store.manifest.settings["branches"] == told
    tokenizer = SegmentTokenizer.load(run.sources["code"], name="code")
    spec = spec_of(tiny_models["code"], "transformers")
    total = 0
    for shard in plan.shards:
        store.verify(shard.index)
        arrays = store.read(shard.index)
        number = len(arrays["branch_tokens"])
        assert number <= 0.5 * len(arrays["token_ids"])
        total += number
    encoded = tokenizer.encode(plan.segments(shard))
    bounds = np.searchsorted(arrays["branch_positions"], arrays["token_offsets"])
    for d, segment in enumerate(encoded):
        here = slice(bounds[d], bounds[d + 1])
        if here.start == here.stop:
            continue
        local = arrays["branch_positions"][here].astype(np.int64) - arrays["token_offsets"][d]
        branches = Branches(segment, local, arrays["branch_tokens"][here].astype(np.int64))
        for b, row in enumerate(plain_rows(spec, branches), here.start):
            entries = slice(*arrays["branch_entry_offsets"][b : b + 2])
            ids = arrays["branch_entry_ids"][entries]
            off = np.abs(np.exp(arrays["branch_entry_logprobs"][entries]) - np.exp(row[ids]))
            assert off.max() < 0.01
    assert total > 0.3 * sum(store.commits[s.index].counts.positions for s in plan.shards)
    assert sum(c.counts.branches for c in store.commits.values()) == total
    assert f'"branches": {total}' in ok("store", "stats", path, "--json")
    assert "after " in ok("store", "show", path, "--segment", 0)
    ok("store", "verify", path)
    ok("store", "copy", store.location.url, tmp_path / "copy")
    assert StoreReader.open(open_location(tmp_path / "copy")).manifest.form == "branched"


def test_killed_before_its_branches_a_shard_is_not_committed(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned(tmp_path, tiny_models, per_position=0.3)
    real, calls = TransformersEngine.branch, []

    def killed(
        self: TransformersEngine, segments: Sequence[Branches]
    ) -> Iterator[tuple[int, DenseRows]]:
        for found in real(self, segments):
            yield found
            calls.append(found)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TransformersEngine, "branch", killed)
    with pytest.raises((Stopped, StoppedMidway)):
        run_source(load_run(path), "code", Part())
    before = {shard: c.content_sha256 for shard, c in store_of(path).commits.items()}
    assert len(before) < len(open_plan(load_run(path)).shards)
    monkeypatch.setattr(TransformersEngine, "branch", real)
    run_source(load_run(path), "code", Part())
    resumed = {shard: c.content_sha256 for shard, c in store_of(path).commits.items()}
    assert resumed.items() >= before.items()
    other = planned(tmp_path / "other", tiny_models, per_position=0.3)
    run_source(load_run(other), "code", Part())
    assert {s: c.content_sha256 for s, c in store_of(other).commits.items()} == resumed


def test_the_budget_and_not_the_target_makes_another_store(
    tmp_path: Path, tiny_models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = planned(tmp_path, tiny_models, per_position=0.3)
    run_source(load_run(path), "code", Part())
    target = load_run(path).target.model
    content = path.read_text()
    assert content.count(target) == 1
    path.write_text(content.replace(target, str(tiny_models["facts"])))
    ok("extract", "plan", path)
    ok("extract", "run", path)  # all is there
    ok("align", "run", path)
    assert "chosen for another target's tokenizer" in caplog.text
    ok("store", "verify", path)
    path.write_text(path.read_text().replace("per_position: 0.3", "per_position: 0.4"))
    line = refused("extract", "run", path)
    assert "another settings.branches.per_position" in line


def test_vllm_refuses_them_in_one_line(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = planned(tmp_path, tiny_models)
    path.write_text(path.read_text().replace("engine: transformers", "engine: vllm"))
    assert "branches need engine transformers" in refused("extract", "run", path)
