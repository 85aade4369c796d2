"""Generate answers with a plain transformers model: batches of similar length, with a KV cache.

Prompts are padded on the left, so that every row's last token is in the last column; positions count
real tokens only. Each answer has random numbers of its own, and a token is the largest sum of a logit
and Gumbel noise. So a token depends on the batch only where the two largest sums are equal up to
rounding.

Shapes: B batch, T input tokens, H hidden, V ids of the model, N tokens of an answer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from extract.engines.ending import AnswerRules, GrowingAnswer
from extract.engines.protocol import CHECK_WEIGHTS, Answer, EngineMemoryError, EngineSpec, Prompt
from extract.engines.sampling import PhiloxStream
from store_schema.errors import ModelError
from store_schema.layout import Finish
from store_schema.model.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The loaded model of the transformers engine.

    Args:
        model: A causal language model, in evaluation mode.
        head: Computes float32 logits [B, V] from the base model's last hidden states [B, H]; None where
            the model's own logits are used.
        device: The model's device.
    """

    model: Any
    head: Callable[[torch.Tensor], torch.Tensor] | None
    device: torch.device


@torch.inference_mode()
def transformers_answers(
    loaded: LoadedModel, spec: EngineSpec, prompts: Sequence[Prompt], rules: AnswerRules
) -> Iterator[tuple[int, Answer]]:
    """Generate one answer for each prompt. See `extract.engines.protocol.Engine.answer`.

    Args:
        loaded: The model.
        spec: What it was loaded with.
        prompts: Each leaves room for `generate.max_tokens`.
        rules: How answers are sampled, and what ends them.

    Raises:
        EngineMemoryError: Memory ran out on a single prompt.
        ModelError: The model's logits are NaN; names prompt and position.
    """
    lengths = [len(prompt.input_ids) + rules.section.max_tokens for prompt in prompts]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch_tokens = spec.section.answered_tokens
    while order:
        batch = order[: max(batch_tokens // lengths[order[0]], 1)]
        answers = None
        try:
            answers = _answer_batch(loaded, spec, [prompts[i] for i in batch], rules)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if answers is None:  # the error is released here, and with its frames the batch
            batch_tokens = _halved(len(batch), lengths[batch[0]], spec)
            continue
        order = order[len(batch) :]
        yield from zip(batch, answers, strict=True)


def _halved(num_prompts: int, longest: int, spec: EngineSpec) -> int:
    """Tokens of a batch after memory ran out: of half as many prompts."""
    if num_prompts == 1:
        raise EngineMemoryError(
            f"memory ran out on one prompt of {longest:,} tokens with its answer",
            where=f"source {spec.source}",
            hint="lower generate.max_tokens, load a smaller dtype, or use a device with more memory",
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    fewer = num_prompts // 2
    logger.warning("%s: memory ran out; going on with %d prompts at a time", spec.source, fewer)
    return fewer * longest


def _answer_batch(
    loaded: LoadedModel, spec: EngineSpec, prompts: Sequence[Prompt], rules: AnswerRules
) -> list[Answer]:
    section = rules.section
    decoder = _Decoder(loaded, [prompt.input_ids for prompt in prompts])
    streams = [PhiloxStream(prompt.seed) for prompt in prompts]
    growing = [GrowingAnswer(rules) for _ in prompts]
    finish_B: list[Finish | None] = [None] * len(prompts)
    logits_BV = decoder.begin()
    for position in count():
        numbers_B = logits_BV.amax(-1).isfinite().tolist()  # amax is NaN if any logit is
        for prompt, is_number, finish in zip(prompts, numbers_B, finish_B, strict=True):
            if not is_number and finish is None:
                where = f"{prompt.where}, position {position}"
                raise ModelError("NaN from the model", where=where, hint=CHECK_WEIGHTS)
        tokens_B = drawn_tokens(
            logits_BV[:, : spec.vocab_size],
            streams,
            temperature=section.temperature,
            top_p=section.top_p,
        )
        for row, token_id in enumerate(tokens_B.tolist()):
            if finish_B[row] is None:  # finished answers stay in the batch until all are finished
                finish_B[row] = growing[row].add(token_id)
        finishes = [finish for finish in finish_B if finish is not None]
        if len(finishes) == len(finish_B):
            break
        logits_BV = decoder.next(tokens_B)
    return [
        Answer(np.array(answer.token_ids, np.int64), finish)
        for answer, finish in zip(growing, finishes, strict=True)
    ]


class _Decoder:
    """A batch of prompts with its KV cache."""

    def __init__(self, loaded: LoadedModel, inputs: Sequence[Sequence[int]]) -> None:
        device = loaded.device
        self._head = loaded.head
        self._forward = loaded.model if self._head is None else loaded.model.base_model
        takes = inspect.signature(self._forward.forward).parameters
        self._takes_positions = "position_ids" in takes
        T = max(map(len, inputs))
        padded = [[0] * (T - len(ids)) + list(ids) for ids in inputs]
        self._ids_BT = torch.tensor(padded, device=device)
        lengths_B = torch.tensor([len(ids) for ids in inputs], device=device)
        self._mask_BT = (torch.arange(T, device=device) >= T - lengths_B[:, None]).long()
        self._cache: Any = None

    def begin(self) -> torch.Tensor:
        """Logits [B, V] float32 of the first tokens after the prompts."""
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp_(min=0)
        return self._logits(self._ids_BT, positions_BT)

    def next(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append one token to each row; returns the logits [B, V] float32 of the tokens after them."""
        ids_B1 = tokens_B[:, None].to(self._mask_BT.device)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(ids_B1)], dim=1)
        positions_B1 = self._mask_BT.sum(-1, keepdim=True) - 1
        return self._logits(ids_B1, positions_B1)

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        options = {"position_ids": positions} if self._takes_positions else {}
        output = self._forward(
            input_ids=ids,
            attention_mask=self._mask_BT,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        self._cache = output.past_key_values
        if self._head is None:
            logits_BV: torch.Tensor = output.logits[:, -1].float()
            return logits_BV
        return self._head(output.last_hidden_state[:, -1])


def drawn_tokens(
    logits_BV: torch.Tensor, streams: Sequence[PhiloxStream], *, temperature: float, top_p: float
) -> torch.Tensor:
    """Sample one token for each row: the one with the largest sum of logit and standard Gumbel noise.

    Inverting the cumulative distribution would need one random number for each row; but the rounding of
    every id moves the bounds of all later ids, so a batch of another size could give another token.

    Args:
        logits_BV: float32, without the model's padding ids.
        streams: B streams of random numbers, from each of which V are taken; none if the temperature is
            0.
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Tokens are sampled from the smallest set of most probable tokens with at least this mass.

    Returns:
        [B] int64 token ids, on the CPU.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1).cpu()
    scaled_BV = logits_BV / temperature
    if top_p < 1:
        scaled_BV = _nucleus(scaled_BV, top_p)
    noise = np.stack([stream.gumbel(logits_BV.shape[1]) for stream in streams])
    return (scaled_BV + torch.from_numpy(noise).to(scaled_BV.device)).argmax(dim=-1).cpu()


def _nucleus(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logits with -inf outside of the smallest set of most probable ids with a mass of `top_p`.

    Sums are computed on the CPU, since a GPU's cumulative sum is not deterministic.
    """
    order = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    mass_BV = torch.softmax(order.values, dim=-1).cpu().double()
    before_BV = mass_BV.cumsum(-1) - mass_BV
    outside_BV = (before_BV >= top_p).to(logits_BV.device)
    return logits_BV.masked_fill(outside_BV.gather(1, order.indices.argsort(-1)), -torch.inf)
