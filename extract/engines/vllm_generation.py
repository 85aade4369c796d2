"""Answers from vLLM, through its own loop of requests and steps.

Each answer is a request of its own with a seed of its own. A bounded number of them is in vLLM's
hands; a finished one is given away at once and another takes its place, so memory does not grow with
the shard. The engine runs without a tokenizer: stop texts are looked for in the tokens' bytes, and a
request that reached one is aborted.
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

IN_HAND = 2
"""Requests that vLLM holds, in multiples of those that it runs at a time: it never lacks the next."""


def vllm_answers(
    engine: Any, vllm: Any, spec: EngineSpec, prompts: Sequence[Prompt], rules: AnswerRules
) -> Iterator[tuple[int, Answer]]:
    """Generate one answer for each prompt. See `extract.engines.protocol.Engine.answer`.

    Args:
        engine: A started `vllm.LLM(...).llm_engine`, without prefix caching.
        vllm: The module.
        spec: What the engine was started with.
        prompts: Each with room for `max_tokens` more.
        rules: How answers are drawn and what ends them.

    Raises:
        ModelError: vLLM ended an answer for a reason of its own.
    """
    most = IN_HAND * engine.vllm_config.scheduler_config.max_num_seqs
    coming = iter(range(len(prompts)))
    in_hand: dict[str, _Request] = {}
    try:
        while True:
            for i in islice(coming, most - len(in_hand)):
                prompt = {"prompt_token_ids": list(prompts[i].input_ids)}
                params = _sampling_params(vllm, spec, rules, prompts[i].seed)
                own_name = engine.add_request(str(i), prompt, params)
                in_hand[str(i)] = _Request(own_name, spec, rules)
            if not in_hand:
                return
            for output in engine.step():
                request = in_hand.get(output.request_id)
                if request is None:  # aborted while vLLM was a step ahead
                    continue
                finish = request.take(output)
                if finish is None:
                    continue
                del in_hand[output.request_id]
                if not output.finished:
                    engine.abort_request([request.own_name], internal=True)
                yield int(output.request_id), request.answer(finish)
    finally:
        if in_hand:
            engine.abort_request([r.own_name for r in in_hand.values()], internal=True)


class _Request:
    """One answer in vLLM's hands."""

    def __init__(self, own_name: str, spec: EngineSpec, rules: AnswerRules) -> None:
        self.own_name = own_name
        self._spec = spec
        self._growing = GrowingAnswer(rules)

    def take(self, output: Any) -> Finish | None:
        """Take what a step added; gives how the answer ended, None while it goes on."""
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
        """The answer, its tokens up to the one that ended it."""
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
        ignore_eos=True,  # it would add ends of its own; the rules have them all
        # Ids of padding rows: no token of theirs may be drawn.
        logit_bias={i: float("-inf") for i in range(spec.vocab_size, spec.model_vocab_size)},
        detokenize=False,
        # Without stop texts nothing is to be looked at before the end.
        output_kind=kinds.DELTA if rules.stop else kinds.FINAL_ONLY,
    )
