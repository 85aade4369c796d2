"""The plan: what it holds, that it is the same each time, and when it refuses to change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.plan.planning import TARGET, assign_to_shards, load_tokenizers, make_plan, shuffled
from extract.scoring.sources import check_source
from store_schema.config import load_run
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from tests.command import ok, refused
from tests.extract_runs import files_of, plan_run, sample_documents, write_jsonl, write_run
from tests.tiny import add_beyond_rows, tiny_model, tiny_tokenizer


@pytest.fixture
def planned(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return plan_run(write_run(tmp_path, tiny_models))


def plan_of(path: Path) -> Plan:
    return open_plan(load_run(path))


def test_segments_join_to_documents_and_fit(planned: Path) -> None:
    run = load_run(planned)
    plan = plan_of(planned)
    texts: dict[str, str] = {}
    ended = set()
    tokenizers = load_tokenizers(run)
    for shard in plan.shards:
        segments = plan.segments(shard)
        assert {s.split for s in segments} == {shard.split}
        for segment in segments:
            before = texts.get(segment.document_id, "")
            assert segment.document_id not in ended
            assert segment.byte_start == len(before.encode())
            texts[segment.document_id] = before + segment.text
            if segment.ends_document:
                ended.add(segment.document_id)
        for name, tokenizer in tokenizers.items():
            encoded = tokenizer.encode(segments)
            assert max(len(e.input_ids) for e in encoded) <= 96
            assert sum(len(e.token_ids) for e in encoded) == shard.num_tokens[name]
    assert texts == {d["id"]: d["text"] for d in sample_documents()}
    assert ended == set(texts)


def test_plan_is_the_same_each_time_and_a_no_op(planned: Path, tmp_path: Path) -> None:
    first = files_of(tmp_path / "run")
    assert ok("extract", "plan", planned) == "plan complete, nothing to do\n"
    assert "nothing to do" in ok("extract", "plan", planned, "--set", "plan.assumed_tokens_per_s=9")
    assert files_of(tmp_path / "run") == first
    again = load_run(planned, (f"run_dir={tmp_path / 'again'}",))
    ok("corpus", "build", planned, "--set", f"run_dir={again.folder}")
    plan, changed = make_plan(again)
    assert changed
    assert plan.fingerprint == plan_of(planned).fingerprint


def test_shards_mix_domains_and_have_like_sizes(planned: Path) -> None:
    train = [s for s in plan_of(planned).shards if s.split == "train"]
    sizes = [shard.num_tokens[TARGET] for shard in train]
    assert len(train) > 2
    assert max(sizes) < 2 * min(sizes)
    domains = [{s.domain for s in plan_of(planned).segments(shard)} for shard in train]
    assert max(map(len, domains)) > 1


def test_report_tells_tokens_bytes_and_hours(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = write_run(tmp_path, tiny_models)
    ok("corpus", "build", path)
    report = ok("extract", "plan", path, "--set", "plan.assumed_tokens_per_s=1000")
    plan = plan_of(path)
    tokens = sum(shard.num_tokens["code"] for shard in plan.shards)
    assert f"{tokens:,}" in report
    # The code tokenizer puts one BOS before each segment: read, but no position.
    hours = (tokens + plan.record.num_segments) / 1000 / 3600
    assert f"{hours:.3g}" in report
    assert "positions x (24 + 8 x 8 entries)" in report
    assert "hours" in report


@pytest.mark.parametrize("kind", ["stores", "generated", "aligned"])
def test_plan_can_change_until_extraction_begins(planned: Path, tmp_path: Path, kind: str) -> None:
    old = plan_of(planned).fingerprint
    ok("extract", "plan", planned, "--set", "plan.max_tokens=64")
    assert plan_of(planned).fingerprint != old
    store = tmp_path / "run" / kind / "code"
    store.mkdir(parents=True)
    (store / "manifest.json").write_text("{}")  # nobody knows which plan it is of
    before = files_of(tmp_path / "run")
    line = refused("extract", "plan", planned)
    assert "changed after extraction began" in line
    assert f"{kind}/code" in line
    assert files_of(tmp_path / "run") == before
    assert "nothing to do" in ok("extract", "plan", planned, "--set", "plan.max_tokens=64")


def test_bad_models_end_in_one_line(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    path = write_run(tmp_path, tiny_models)
    assert "no corpus" in refused("extract", "plan", path)
    ok("corpus", "build", path)
    line = refused("extract", "plan", path, "--set", "plan.max_tokens=4096")
    assert "longer than code can read" in line
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    line = refused("extract", "plan", path, "--set", f"sources.code.model={bare}")
    assert "has no tokenizer" in line
    assert "plan" not in {p.name for p in (tmp_path / "run").iterdir()}


def test_models_are_looked_at_before_the_plan(
    tmp_path: Path, tiny_models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(shutil.copytree(tiny_models["code"], tmp_path / "broken"))
    models = {"code": broken, "target": tiny_models["target"]}
    path = write_run(tmp_path, models)
    ok("corpus", "build", path)
    config = json.loads((broken / "config.json").read_text())

    def said(*options: str, **changes: object) -> str:
        (broken / "config.json").write_text(json.dumps(config | changes))
        line = refused("extract", "plan", path, *options)
        assert not (tmp_path / "run/plan").exists()
        return line

    assert "expected int, got str" in said(vocab_size="400")
    assert "expected int, got str" in said(num_attention_heads="2")
    assert "does not know the model of code" in said(model_type="llama9")
    assert "do not fit its config" in said(vocab_size=500)
    assert "no causal language model" in said(architectures=["LlamaForSequenceClassification"])
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert "lacks a package" in said("--set", "extract.engine=transformers", **quantised)
    as_target = (
        "--set",
        f"target.model={broken}",
        "--set",
        f"sources.code.model={models['target']}",
    )
    assert "lacks a package" in said(*as_target, **quantised)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    assert "damaged or cut short" in said()
    weights.unlink()  # a login node needs none
    ok("extract", "plan", path)
    assert "code can be planned for, not run yet: model folder has no weights" in caplog.text
    assert "no weights" in refused("extract", "run", path, "--dry-run")
    weights.write_bytes(whole)
    (broken / "config.json").write_text(json.dumps(config | quantised))
    engine = ("--set", "extract.engine=transformers")
    assert "lacks a package" in refused("extract", "run", path, "--dry-run", *engine)
    (tmp_path / "run/plan/plan.json").unlink()
    ok("extract", "plan", path, "--set", "extract.engine=auto")
    assert "code needs vLLM in an environment like this one" in caplog.text


def test_text_that_a_tokenizer_cannot_represent(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    words = tiny_tokenizer("wordpiece", ["plain words only"], 60)
    models = {"lossy": tiny_model(tmp_path / "lossy", tokenizer=words)} | {
        "target": tiny_models["target"]
    }
    write_jsonl(
        tmp_path / "docs.jsonl",
        [{"id": "odd", "text": "plain \u6f22", "domain": "d", "split": "train"}],
    )
    path = write_run(tmp_path, models)
    ok("corpus", "build", path)
    line = refused("extract", "plan", path)
    assert "document odd" in line
    assert "tokenizer of lossy" in line
    assert "first difference at byte" in line


def test_context_counts_and_may_leave_no_room(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    rows = [
        {"id": "short", "prompt": "Say it. ", "response": "word " * 200},
        {"id": "long", "prompt": "x y z " * 60, "response": "word"},
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    entry = {"path": str(tmp_path / "p.jsonl"), "domain": "d", "split": "train"}
    path = write_run(tmp_path, tiny_models, corpus={"inputs": [entry]})
    ok("corpus", "build", path)
    assert "context_too_long 1" in ok("extract", "plan", path)
    plan = plan_of(path)
    segments = [s for shard in plan.shards for s in plan.segments(shard)]
    assert len(segments) > 1
    assert {s.document_id for s in segments} == {"short"}
    assert {json.loads(s.context or "")["prompt"] for s in segments} == {"Say it. "}
    for tokenizer in load_tokenizers(load_run(path)).values():
        assert max(len(e.input_ids) for e in tokenizer.encode(segments)) <= 96


def test_messages_need_a_chat_template(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "c.jsonl", [{"id": "c", "messages": messages}])
    entry = {"path": str(tmp_path / "c.jsonl"), "domain": "d", "split": "train"}
    path = write_run(tmp_path, tiny_models, corpus={"inputs": [entry]})
    ok("corpus", "build", path)
    line = refused("extract", "plan", path)
    assert "chat template" in line
    assert "c/turn-0" in line


@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=30),
    shard_tokens=st.integers(10, 200),
)
def test_deal_keeps_order_and_balance(sizes: list[list[int]], shard_tokens: int) -> None:
    shards = assign_to_shards(sizes, shard_tokens)
    flat = [pair for shard in shards for pair in shard]
    assert flat == [(d, n) for d, segments in enumerate(sizes) for n in range(len(segments))]
    assert all(shards)
    total = sum(map(sum, sizes))
    size = total / max(round(total / shard_tokens), 1)
    held = [sum(sizes[d][n] for d, n in shard) for shard in shards]
    assert max(held) <= 1.5 * size + 50
    parts = Counter(d for shard in shards for d in {d for d, _ in shard})
    assert all(sum(sizes[d]) > size for d, number in parts.items() if number > 1)


def test_shuffle_depends_on_seed_and_ids_alone() -> None:
    ids = [f"doc{i}" for i in range(50)]
    order = shuffled(ids, 0)
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    assert order != shuffled(ids, 1)
    assert [ids[i] for i in order] == [ids[::-1][i] for i in shuffled(ids[::-1], 0)]


def test_a_text_that_a_tokenizer_changes_is_refused_or_dropped(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """U+2581 is SentencePiece's own word mark: the Unigram source reads it as a space."""
    documents = [*sample_documents(), sample_documents()[0] | {"id": "marked", "text": "a ▁ mark"}]
    write_jsonl(tmp_path / "docs.jsonl", documents)
    inputs = [{"path": str(tmp_path / "docs.jsonl")}]
    path = write_run(tmp_path, tiny_models, corpus={"inputs": inputs})
    ok("corpus", "build", path)
    line = refused("extract", "plan", path)
    assert "marked" in line
    assert "facts" in line
    other = tmp_path / "dropping"
    other.mkdir()
    path = write_run(
        other, tiny_models, corpus={"inputs": inputs, "on_bad": "drop"}, run_dir=str(other / "run")
    )
    ok("corpus", "build", path)
    assert "tokenizer_changes_text" in ok("extract", "plan", path)
    plan = open_plan(load_run(path))
    kept = {s.document_id for shard in plan.shards for s in plan.segments(shard)}
    assert "marked" not in kept
    assert len(kept) == len(documents) - 1


@pytest.mark.parametrize("longer", ["code", "target"])
def test_a_text_that_reaches_a_token_without_a_row_is_named_or_dropped(
    tmp_path: Path, tiny_models: dict[str, Path], longer: str
) -> None:
    copied = tmp_path / longer
    shutil.copytree(tiny_models[longer], copied)
    add_beyond_rows(copied, "<image>", special=True)
    add_beyond_rows(copied, "[PAD]")
    models = {"code": tiny_models["code"], "target": tiny_models["target"]} | {longer: copied}
    first = sample_documents()[0]
    # A special token written out is text and stays.
    documents = [*sample_documents(), first | {"id": "seen", "text": "an <image> here"}]
    write_jsonl(tmp_path / "docs.jsonl", documents)
    path = plan_run(write_run(tmp_path, models))
    checked = check_source(load_run(path), "code", plan_of(path))
    assert checked.manifest.model.vocab_size == checked.spec.model_vocab_size
    write_jsonl(tmp_path / "docs.jsonl", [*documents, first | {"id": "padded", "text": "a [PAD]"}])
    path = write_run(tmp_path, models, run_dir=str(tmp_path / "other"))
    ok("corpus", "build", path)
    line = refused("extract", "plan", path)
    assert "no row for a token of the text" in line
    assert "document padded" in line
    assert f"tokenizer of {longer}" in line
    assert "'[PAD]'" in line
    corpus = {"inputs": [{"path": str(tmp_path / "docs.jsonl")}], "on_bad": "drop"}
    path = write_run(tmp_path, models, corpus=corpus, run_dir=str(tmp_path / "other"))
    ok("corpus", "build", path)
    assert "token_without_row 1" in ok("extract", "plan", path)
    plan = plan_of(path)
    kept = {s.document_id for shard in plan.shards for s in plan.segments(shard)}
    assert kept == {d["id"] for d in documents}
