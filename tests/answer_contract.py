"""What every engine's answers must be, checked against plain transformers forwards in float32.

No engine says how probable its tokens are: that the model might have drawn them is seen from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extract.config import GenerateSection
from extract.engines.ending import AnswerRules
from extract.engines.protocol import Answer, EngineSpec, Prompt
from store_schema.layout import Finish
from store_schema.text.tokenizer import SegmentTokenizer

TOLERANCE_NATS = 1e-4
TOLERANCE_MASS = 1e-3
MAX_TOKENS = 24
PROMPTS = ["a", "def add(a, b):", "The quick brown fox jumps over the lazy dog.", "x = {", "Naïve"]

Answerer = Callable[[Sequence[Prompt], AnswerRules], Iterator[tuple[int, Answer]]]


def rules_of(spec: EngineSpec, *, ends: Sequence[int] = (), **options: Any) -> AnswerRules:
    """Rules for answers of at most MAX_TOKENS tokens; greedy unless told otherwise."""
    section = GenerateSection(**({"temperature": 0, "max_tokens": MAX_TOKENS} | options))
    tokenizer = SegmentTokenizer.load(spec.ref, name="m")
    return AnswerRules(section, frozenset(ends), tokenizer.vocabulary.tokens)


def sample_prompts(spec: EngineSpec, *, seed: int = 0) -> list[Prompt]:
    """Prompts of several lengths, each with a seed of its own."""
    tokenizer = SegmentTokenizer.load(spec.ref, name="m")
    inputs = [tokenizer.bos_ids + tuple(ids) for ids in tokenizer.encode_text(PROMPTS)]
    return [Prompt(ids, seed * 1000 + i) for i, ids in enumerate(inputs)]


def answered(
    answer: Answerer, prompts: Sequence[Prompt], rules: AnswerRules
) -> list[tuple[list[int], Finish]]:
    """Tokens and end of each answer, in the prompts' order."""
    found = dict(answer(prompts, rules))
    assert sorted(found) == list(range(len(prompts)))
    return [(found[i].token_ids.tolist(), found[i].finish) for i in range(len(prompts))]


def references(
    folder: Path, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[torch.Tensor]:
    """Of each answer the log-probabilities [R, V] float64 of its tokens, read as given text.

    The only shift: logits at input i - 1 say what stands at input i.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt.input_ids, *answer.token_ids.tolist()]])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
            found.append(logprobs[len(prompt.input_ids) - 1 : -1])
    return found


def check_answers(
    answer: Answerer, spec: EngineSpec, reference: Callable[..., list[torch.Tensor]] = references
) -> None:
    """All that is asked of an engine's answers.

    Args:
        answer: `Engine.answer` of an engine loaded with `spec`.
        spec: Of a model whose tokenizer may have fewer ids.
        reference: Gives what `references` gives.
    """
    prompts = sample_prompts(spec)
    greedy = _check_tokens(answer, spec, prompts, rules_of(spec), reference)
    drawn = rules_of(spec, temperature=1.5, top_p=0.9)
    _check_tokens(answer, spec, prompts, drawn, reference)
    _check_seeds(answer, spec, drawn)
    _check_ends(answer, spec, prompts, greedy)


def _check_tokens(
    answer: Answerer,
    spec: EngineSpec,
    prompts: Sequence[Prompt],
    rules: AnswerRules,
    reference: Callable[..., list[torch.Tensor]],
) -> list[Answer]:
    """Tokens are those that the model may give there; the same list, the same tokens."""
    found, again = dict(answer(prompts, rules)), dict(answer(prompts, rules))
    answers = [found[i] for i in range(len(prompts))]
    for i, logprobs in enumerate(reference(spec.folder, prompts, answers)):
        ids = answers[i].token_ids
        assert ids.dtype == np.int64
        assert ids.max() < spec.vocab_size
        assert np.array_equal(ids, again[i].token_ids)
        check_drawable(ids, logprobs[:, : spec.vocab_size], rules.section)
    return answers


def check_drawable(ids: np.ndarray, logprobs: torch.Tensor, section: GenerateSection) -> None:
    """Each token is the best one, or one of the nucleus that tokens are drawn from.

    Args:
        ids: [N] tokens.
        logprobs: [N, V] float64, ids of the tokenizer only.
        section: How they were drawn.
    """
    own = logprobs[np.arange(len(ids)), ids]
    if section.temperature == 0:
        assert (own - logprobs.max(-1).values).abs().max() < TOLERANCE_NATS
        return
    mass = torch.softmax(logprobs / section.temperature, dim=-1)
    better = logprobs > own[:, None] + TOLERANCE_NATS
    assert torch.where(better, mass, 0).sum(-1).max() < section.top_p + TOLERANCE_MASS


def _check_seeds(answer: Answerer, spec: EngineSpec, rules: AnswerRules) -> None:
    """An answer depends on its prompt and seed, not on its neighbours or place."""
    prompts = sample_prompts(spec)
    together = answered(answer, prompts, rules)
    assert answered(answer, prompts[::-1], rules)[::-1] == together
    assert answered(answer, prompts[2:3], rules) == together[2:3]
    others = answered(answer, sample_prompts(spec, seed=1), rules)
    assert all(a != b for a, b in zip(others, together, strict=True))
    twins = [dataclasses.replace(prompts[1], seed=seed) for seed in range(8)]
    assert len({tuple(ids) for ids, _ in answered(answer, twins, rules)}) > 4


def _check_ends(
    answer: Answerer, spec: EngineSpec, prompts: Sequence[Prompt], greedy: Sequence[Answer]
) -> None:
    """End tokens, stop texts and the most tokens end an answer where the rule says."""
    assert {a.finish for a in greedy} == {Finish.LENGTH}
    assert {len(a.token_ids) for a in greedy} == {MAX_TOKENS}
    tokens = rules_of(spec).tokens
    whole = greedy[2].token_ids.tolist()
    # A token that comes first at some place behind the first one, and one that comes at once.
    place = next(i for i in range(1, MAX_TOKENS) if whole[i] not in whole[:i] and tokens[whole[i]])
    ended = dict(answer(prompts, rules_of(spec, ends=[whole[place], tokens.index(b"")])))
    assert ended[2].token_ids.tolist() == whole[: place + 1]
    assert ended[2].finish == Finish.STOP
    at_once = answered(answer, prompts, rules_of(spec, ends=[whole[0]]))
    assert at_once[2] == (whole[:1], Finish.EMPTY)
    # A text over a token's edge; the token that ends it stays in the answer.
    ends = np.cumsum([len(tokens[i]) for i in whole])
    text = b"".join(tokens[i] for i in whole)
    stop = _text_across(text, ends)
    last = int(np.searchsorted(ends, text.index(stop.encode()) + len(stop.encode())))
    found = answered(answer, prompts, rules_of(spec, stop=("never to be seen", stop)))
    assert found[2] == (whole[: last + 1], Finish.STOP_TEXT)


def _text_across(text: bytes, ends: np.ndarray) -> str:
    """A piece of the text that lies across the edge of two tokens."""
    for end in ends[2:-2]:
        piece = text[end - 1 : end + 1]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError("no two characters at a token's edge")
