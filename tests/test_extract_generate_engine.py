"""Answers of the transformers engine, draws, and where an answer ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extract.config import GenerateSection
from extract.engines import transformers_generation
from extract.engines.ending import AnswerRules, GrowingAnswer, end_ids
from extract.engines.protocol import EngineMemoryError, EngineSpec, Prompt
from extract.engines.sampling import PhiloxStream
from extract.engines.transformers_engine import TransformersEngine
from extract.engines.transformers_generation import drawn_tokens
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.layout import Finish
from store_schema.text.tokenizer import SegmentTokenizer
from tests.answer_contract import (
    MAX_TOKENS,
    Answerer,
    answered,
    check_answers,
    check_drawable,
    references,
    rules_of,
    sample_prompts,
)
from tests.engine_contract import spec_of
from tests.tiny import tiny_model, tiny_tokenizer


def answerer(folder: Path, *, whole: bool = False, **options: Any) -> tuple[Answerer, EngineSpec]:
    """The transformers engine's answers, through its head or through the whole model."""
    spec = spec_of(folder, "transformers", **options)
    engine = TransformersEngine(spec)
    engine._probed = whole  # without its probe the engine knows of no head
    return engine.answer, spec


@pytest.mark.parametrize("name", ["code", "prose", "facts", "target"])
def test_contract(tiny_models: dict[str, Path], name: str) -> None:
    check_answers(*answerer(tiny_models[name]))


def test_padding_rows_of_the_model_are_never_drawn(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", tiny_tokenizer(), vocab_padding=610, scale=0.02)
    answer, spec = answerer(folder, batch_tokens=100)
    check_answers(answer, spec)
    rules = rules_of(spec, temperature=2.0, max_tokens=60)
    found = dict(answer(sample_prompts(spec), rules))
    assert max(int(a.token_ids.max()) for a in found.values()) < spec.vocab_size


def test_logits_of_the_whole_model(tiny_models: dict[str, Path]) -> None:
    alone, spec = answerer(tiny_models["code"])
    whole, _ = answerer(tiny_models["code"], whole=True)
    rules = rules_of(spec, temperature=1.0)
    prompts = sample_prompts(spec)
    assert answered(alone, prompts, rules) == answered(whole, prompts, rules)


def test_sliding_windows_and_left_padding(tmp_path: Path) -> None:
    """A window shorter than the prompt: a wrong position or mask would show."""
    folder = tiny_model(tmp_path / "m", "mistral")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config))
    check_answers(*answerer(folder))


@pytest.mark.parametrize("batch_tokens", [1, 70, 150, 100_000])
def test_batches_hold_whole_answers(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    answer, spec = answerer(tiny_models["code"], batch_tokens=batch_tokens)
    prompts, rules = sample_prompts(spec), rules_of(spec)
    sizes = []
    inner = transformers_generation._answer_batch

    def noted(loaded: Any, spec: Any, batch: list[Prompt], rules: Any) -> Any:
        sizes.append([len(prompt.input_ids) + MAX_TOKENS for prompt in batch])
        return inner(loaded, spec, batch, rules)

    monkeypatch.setattr(transformers_generation, "_answer_batch", noted)
    answered(answer, prompts, rules)
    assert sorted(n for batch in sizes for n in batch) == sorted(
        len(prompt.input_ids) + MAX_TOKENS for prompt in prompts
    )
    assert all(len(batch) == 1 or len(batch) * max(batch) <= batch_tokens for batch in sizes)
    assert {1: 5, 70: 4, 150: 2, 100_000: 1}[batch_tokens] >= len(sizes)


def test_memory_that_runs_out_halves_the_batch(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer, spec = answerer(tiny_models["code"])
    prompts, rules = sample_prompts(spec), rules_of(spec)
    whole = answered(answer, prompts, rules)
    inner = transformers_generation._answer_batch
    most = 2

    def small(loaded: Any, spec: Any, batch: list[Prompt], rules: Any) -> Any:
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(loaded, spec, batch, rules)

    monkeypatch.setattr(transformers_generation, "_answer_batch", small)
    assert answered(answer, prompts, rules) == whole
    assert "memory ran out; going on with 2 prompts at a time" in caplog.text
    most = 0
    with pytest.raises(EngineMemoryError, match=r"on one prompt of 5\d tokens.*max_tokens"):
        list(answer(prompts, rules))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_ends_an_answer_wherever_it_comes(
    tiny_models: dict[str, Path], bad: float, temperature: float
) -> None:
    """At the first token and at a later one; what comes of an answer that has ended does not matter."""
    answer, spec = answerer(tiny_models["code"])
    prompts = [replace(p, where=f"prompt {i}") for i, p in enumerate(sample_prompts(spec))]
    rules = rules_of(spec, temperature=temperature, max_tokens=6)
    for row, position in ((0, 0), (3, 4)):
        with spoilt(bad, row, position):
            with pytest.raises(ModelError) as caught:
                list(answer(prompts, rules))
        assert re.match(
            rf"NaN from the model in prompt \d, position {position}; check the weights",
            caught.value.line(),
        )
    whole = answered(answer, prompts, rules)
    place = next(
        i for i, (ids, _) in enumerate(whole) if ids[0] not in {o[0] for o, _ in whole[:i]}
    )
    ends = rules_of(spec, temperature=temperature, max_tokens=6, ends=[whole[place][0][0]])
    expected = answered(answer, prompts, ends)
    assert expected[place] == (whole[place][0][:1], Finish.EMPTY)
    batch_row = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].input_ids), i))
    with spoilt(bad, batch_row.index(place), 2):
        assert answered(answer, prompts, ends) == expected


@contextmanager
def spoilt(bad: float, row: int, position: int) -> Iterator[None]:
    """One logit of a row of a batch at a position."""
    inner = transformers_generation._Decoder._logits
    count = 0

    def logits(self: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nonlocal count
        found = inner(self, ids, positions).clone()
        if count == position:
            found[row, 5] = bad
        count += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_generation._Decoder, "_logits", logits)
        yield


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.01)]
)
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    """Each id comes as often as it is probable, within five standard deviations and three draws."""
    V, draws = 300, 20_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 3
    probabilities = torch.softmax(logits.double() / temperature, 0)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    probabilities /= probabilities.sum()
    streams = [PhiloxStream(key) for key in range(draws)]
    tokens = drawn_tokens(logits.expand(draws, V), streams, temperature=temperature, top_p=top_p)
    counts = torch.bincount(tokens, minlength=V).double()
    spread = (probabilities * (1 - probabilities) * draws).sqrt()
    assert ((counts - probabilities * draws).abs() <= 5 * spread + 3).all()
    assert (counts[probabilities == 0] == 0).all()


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """Logits of the same text differ by some 1e-6 between batches: no draw of 5,000 may see it."""
    V, draws = 500, 5_000
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(V, generator=generator) * 2
    moved = logits + torch.randn(V, generator=generator) * 1e-6
    tokens = [
        drawn_tokens(
            row.expand(draws, V),
            [PhiloxStream(key) for key in range(draws)],
            temperature=1.5,
            top_p=0.9,
        )
        for row in (logits, moved)
    ]
    assert (tokens[0] != tokens[1]).sum() == 0


def test_a_stream_goes_on_where_it_stopped() -> None:
    stream = PhiloxStream(7)
    parts = np.concatenate([stream.uniforms(3), stream.uniforms(4)])
    assert np.array_equal(parts, PhiloxStream(7).uniforms(7))
    noise = PhiloxStream(7).gumbel(200_000)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.03


def test_no_temperature_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    streams = [PhiloxStream(key) for key in range(2)]
    assert drawn_tokens(logits, streams, temperature=0, top_p=0.5).tolist() == [1, 0]


TOKENS = (b"", b"a", b"b", b"\xe2\x82", b"\xac", b"ab", b"END", b"")


def grown(token_ids: list[int], **options: Any) -> Finish | None:
    section = GenerateSection(**({"max_tokens": 4} | options))
    growing = GrowingAnswer(AnswerRules(section, frozenset({0, 6}), TOKENS))
    ends = [growing.add(token_id) for token_id in token_ids]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert growing.token_ids == token_ids
    return ends[-1]


def test_how_answers_end() -> None:
    assert grown([1, 2]) is None
    assert grown([1, 2, 0]) == Finish.STOP
    assert grown([1, 6]) == Finish.STOP
    assert grown([0]) == Finish.EMPTY
    assert grown([6]) == Finish.EMPTY  # an end token stands for no text, however it is written
    assert grown([7, 7, 0]) == Finish.EMPTY
    assert grown([1, 1, 1, 1]) == Finish.LENGTH
    assert grown([7, 7, 7, 7]) == Finish.LENGTH
    assert grown([1, 1, 1, 0]) == Finish.STOP
    assert grown([1, 1, 1, 5], stop=("b",)) == Finish.STOP_TEXT
    assert grown([3, 4], stop=("€",)) == Finish.STOP_TEXT
    assert grown([1, 3, 2], stop=("€",)) is None
    assert grown([1, 2, 1], stop=("aba", "zzzzzz")) == Finish.STOP_TEXT
    with pytest.raises(ModelError, match="does not have: expected below 8, got 8"):
        grown([8])


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_texts_are_found_at_the_first_token_that_completes_one(
    token_ids: list[int], stop: list[str]
) -> None:
    section = GenerateSection(max_tokens=100, stop=tuple(stop))
    growing = GrowingAnswer(AnswerRules(section, frozenset(), TOKENS))
    joined = b""
    for token_id in token_ids:
        joined += TOKENS[token_id]
        expected = Finish.STOP_TEXT if any(s.encode() in joined for s in stop) else None
        assert growing.add(token_id) == expected
        if expected is not None:
            break


def test_end_tokens_of_a_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="m")
    eos = tokenizer.eos_id
    path = folder / "generation_config.json"

    def found(eos_token_id: object) -> set[int]:
        path.write_text(json.dumps({"eos_token_id": eos_token_id}))
        return set(end_ids(folder, tokenizer))

    assert found([5, 7]) == {5, 7, eos}
    assert found(9) == {9, eos}
    assert found(None) == {eos}
    assert found([3, 100_000]) == {3, eos}  # a padding row's id is never drawn
    for wrong in ("</s>", [1.5], [True], -1):
        with pytest.raises(ModelError, match=r"eos_token_id is neither .*generation_config\.json"):
            found(wrong)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"unreadable in .*generation_config\.json"):
        end_ids(folder, tokenizer)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(ModelError, match=r"pointer of git-lfs.*generation_config\.json"):
        end_ids(folder, tokenizer)
    path.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [4, 6]}
    (folder / "config.json").write_text(json.dumps(config))
    assert set(end_ids(folder, tokenizer)) == {4, 6, eos}


def test_a_shift_by_one_would_be_seen(tiny_models: dict[str, Path]) -> None:
    """The reference itself: tokens moved by one are none that might be drawn."""
    answer, spec = answerer(tiny_models["code"])
    prompts = sample_prompts(spec)
    for rules in (rules_of(spec), rules_of(spec, temperature=0.5, top_p=0.5)):
        found = dict(answer(prompts, rules))
        answers = [found[i] for i in range(len(prompts))]
        for one, logprobs in zip(answers, references(spec.folder, prompts, answers), strict=True):
            check_drawable(one.token_ids, logprobs[:, : spec.vocab_size], rules.section)
            with pytest.raises(AssertionError):
                check_drawable(one.token_ids[1:], logprobs[:-1, : spec.vocab_size], rules.section)
