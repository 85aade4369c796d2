"""Generate answers with vLLM, by its low-level interface of requests and steps.

Each answer is a request with its own seed. A limited number of requests is in vLLM at a time; a
finished answer is yielded at once and replaced by the next request, so memory does not grow with the
shard. vLLM runs without a tokenizer: stop texts are searched in the tokens' bytes, and a request that
reaches one is aborted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from extract.engines.ending import AnswerRules, GrowingAnswer
from extract.engines.protocol import Answer, EngineSpec, Prompt
from store_schema.errors import ModelError
from store_schema.layout import Finish

REQUESTS_AHEAD = 2
"""Requests in vLLM, as a multiple of those that it runs at a time, so that one is always waiting."""


def vllm_answers(
    engine: Any, vllm: Any, spec: EngineSpec, prompts: Sequence[Prompt], rules: AnswerRules
) -> Iterator[tuple[int, Answer]]:
    """Generate one answer for each prompt. See `extract.engines.protocol.Engine.answer`.

    Args:
        engine: A started `vllm.LLM(...).llm_engine`, without prefix caching.
        vllm: The module.
        spec: What the engine was started with.
        prompts: Each leaves room for `generate.max_tokens`.
        rules: How answers are sampled, and what ends them.

    Raises:
        ModelError: vLLM ended an answer for a reason of its own.
    """
    most = REQUESTS_AHEAD * engine.vllm_config.scheduler_config.max_num_seqs
    coming = iter(range(len(prompts)))
    running: dict[str, _Request] = {}
    try:
        while True:
            for i in islice(coming, most - len(running)):
                prompt = {"prompt_token_ids": list(prompts[i].input_ids)}
                params = _sampling_params(vllm, spec, rules, prompts[i].seed)
                own_name = engine.add_request(str(i), prompt, params)
                running[str(i)] = _Request(own_name, spec, rules)
            if not running:
                return
            for output in engine.step():
                request = running.get(output.request_id)
                if request is None:  # aborted while vLLM was a step ahead
                    continue
                finish = request.add(output)
                if finish is None:
                    continue
                del running[output.request_id]
                if not output.finished:
                    engine.abort_request([request.own_name], internal=True)
                yield int(output.request_id), request.answer(finish)
    finally:
        if running:
            engine.abort_request([r.own_name for r in running.values()], internal=True)


class _Request:
    """One answer that vLLM is generating."""

    def __init__(self, own_name: str, spec: EngineSpec, rules: AnswerRules) -> None:
        self.own_name = own_name
        self._spec = spec
        self._growing = GrowingAnswer(rules)

    def add(self, output: Any) -> Finish | None:
        """Add the tokens of a step; returns how the answer ended, None if it continues."""
        [completion] = output.outputs
        for token_id in completion.token_ids:
            finish = self._growing.add(token_id)
            if finish is not None:
                return finish
        if output.finished:
            raise ModelError(
                "vLLM ended an answer for a reason of its own",
                where=self._spec.folder,
                got=f"{completion.finish_reason}, {completion.stop_reason}",
            )
        return None

    def answer(self, finish: Finish) -> Answer:
        """The answer, up to the token that ended it."""
        return Answer(np.array(self._growing.token_ids, np.int64), finish)


def _sampling_params(vllm: Any, spec: EngineSpec, rules: AnswerRules, seed: int) -> Any:
    section = rules.section
    kinds = vllm.sampling_params.RequestOutputKind
    return vllm.SamplingParams(
        max_tokens=section.max_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=seed,
        stop_token_ids=sorted(rules.end_ids),
        ignore_eos=True,  # `rules` has all tokens that end an answer
        # Padding ids of the model must not be sampled.
        logit_bias={i: float("-inf") for i in range(spec.vocab_size, spec.model_vocab_size)},
        detokenize=False,
        # Without stop texts there is nothing to check before the end.
        output_kind=kinds.DELTA if rules.stop else kinds.FINAL_ONLY,
    )
