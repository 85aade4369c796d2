"""Entropy and white space mass of each position, and which ids begin with white space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.config import ExtractSection
from extract.engines.protocol import DenseRows, EngineSpec
from extract.engines.transformers_engine import TransformersEngine
from extract.scoring.space_ids import space_initial_ids
from store_schema.config import ModelRef
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests.engine_contract import check_engine, check_extras, encoded_samples, spec_of
from tests.tiny import TokenizerKind, tiny_model, tiny_tokenizer

EXTRAS = ["entropy", "space_mass"]


def test_ids_that_end_a_word() -> None:
    written = (
        b"a",
        b" a",
        b" ",
        b"\n\n",
        b"\tx",
        b"\r\n",
        b"\x0b",
        b"\xc2\xa0",
        b"a ",
        b"",
        b"<s>",
        b"",
    )
    special = np.array([False] * 10 + [True, True])
    found = space_initial_ids(Vocabulary(written, special))
    assert np.flatnonzero(found).tolist() == [1, 2, 3, 4, 5, 6, 10]
    assert found.dtype == np.bool_


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "metaspace_bpe", "wordpiece"])
def test_ids_that_end_a_word_in_each_family(kind: TokenizerKind, tmp_path: Path) -> None:
    """However white space is written in the vocabulary, what they decode to begins with it."""
    tokenizer = tiny_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = SegmentTokenizer(tokenizer, name="m").vocabulary
    found = space_initial_ids(vocabulary)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marks = {"byte_level": "Ġ", "unigram": "▁", "metaspace_bpe": "▁"}
    if kind in marks:
        marked = [piece.startswith(marks[kind]) for piece in pieces]
        assert sum(marked) > 5
        assert all(found[i] for i, is_marked in enumerate(marked) if is_marked)
    else:
        assert all(found[i] != piece.startswith("##") for i, piece in enumerate(pieces))
    assert found[tokenizer.eos_token_id]
    words = [
        i for i, p in enumerate(pieces) if p[0].isascii() and p[0].isalpha() and kind != "wordpiece"
    ]
    assert not found[words].any()


@pytest.mark.parametrize("name", ["code", "prose", "facts", "target"])
def test_engine_gives_extras(tiny_models: dict[str, Path], name: str) -> None:
    spec = spec_of(tiny_models[name], "transformers", extras=EXTRAS, head_rows=50)
    check_engine(TransformersEngine(spec), spec)


def test_extras_one_by_one(tiny_models: dict[str, Path]) -> None:
    for name in EXTRAS:
        spec = spec_of(tiny_models["facts"], "transformers", extras=[name])
        check_engine(TransformersEngine(spec), spec)


def test_padding_ids_count_in_the_softmax(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    folder = tiny_model(tmp_path / "m", "llama", tokenizer, vocab_padding=61)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[len(tokenizer) :] *= 3  # much of the mass
    model.save_pretrained(folder)
    spec = spec_of(folder, "transformers", extras=EXTRAS)
    check_engine(TransformersEngine(spec), spec)


def test_sampled_rows_have_exact_extras(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["code"]
    options: dict[str, Any] = {"estimator": "sampled", "draws": 5, "extras": EXTRAS}
    spec = spec_of(folder, "transformers", **options)
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    plain = spec_of(folder, "transformers", extras=EXTRAS)
    exact = dict(TransformersEngine(plain).score(segments))
    for i, rows in TransformersEngine(spec).score(segments):
        assert rows.sampled
        for name in EXTRAS:
            np.testing.assert_array_equal(rows.extras[name], exact[i].extras[name])


def engine_on(logits_RV: torch.Tensor, space_V: np.ndarray) -> TransformersEngine:
    """An engine without a model, for the step from logits to rows."""
    size = logits_RV.shape[1]
    section = ExtractSection(engine="transformers", top_k=4, extras=EXTRAS)
    engine = TransformersEngine.__new__(TransformersEngine)
    engine._spec = EngineSpec(
        "m", Path(), ModelRef(model="m"), section, "float32", size, size, 8, space_ids=space_V
    )
    engine._space_V = torch.from_numpy(space_V).float()
    return engine


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_extras_of_a_large_vocabulary_are_those_of_float64(scale: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 131_072) * scale
    space = np.random.default_rng(0).random(131_072) < 0.4
    engine = engine_on(logits, space)
    kept = engine._kept(logits, torch.zeros(20, dtype=torch.int64), torch.empty(0))
    extras = {name: found.numpy() for name, found in kept.extras.items()}
    exact = torch.log_softmax(logits.double(), -1).numpy()
    entropy = -(np.exp(exact) * exact).sum(axis=1)
    np.testing.assert_allclose(extras["entropy"], entropy, rtol=0, atol=1e-5)
    mass = np.exp(exact)[:, space].sum(axis=1)
    np.testing.assert_allclose(extras["space_mass"], mass, rtol=0, atol=1e-6)
    dense = DenseRows(*(np.zeros((20, 4)),) * 2, np.zeros(20), extras=extras)  # type: ignore[arg-type]
    check_extras(dense, exact, engine._spec)
    best = -np.sort(-exact, axis=1)[:, :4]
    np.testing.assert_allclose(kept.logprobs_RK.numpy(), best, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(kept.label_logprobs_R.numpy(), exact[:, 0], rtol=1e-6, atol=2e-6)
