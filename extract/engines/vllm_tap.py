"""Take prompt log-probabilities as arrays from inside vLLM, instead of Python lists.

vLLM's output processor turns every entry into Python objects, which for 128 entries takes longer than
the model's forward pass on a fast machine. The tap takes the arrays before that. It is not a public
interface of vLLM, so `extract.engines.vllm_engine` compares it with the public lists first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


class Tap:
    """Collects the prompt log-probabilities of the requests that it watches."""

    def __init__(self, output_processor: Any) -> None:
        """Wrap an output processor.

        Args:
            output_processor: `LLMEngine.output_processor` (vLLM 0.32); changed in place.

        Raises:
            AttributeError: It has no method `process_outputs`.
        """
        self._parts: dict[str, list[tuple[Any, Any]]] = {}
        self._pass_on = output_processor.process_outputs
        output_processor.process_outputs = self._process

    def watch(self, name: str) -> None:
        """Collect the rows of this request (vLLM's own name) from now on."""
        self._parts[name] = []

    @property
    def watched(self) -> bool:
        """Whether there is a watched request whose rows were not taken yet."""
        return bool(self._parts)

    def take(self, name: str) -> tuple[Any, Any]:
        """Ids and log-probabilities [R, K+1] of a finished request, without its first token.

        Raises:
            KeyError: The request is not watched.
        """
        parts = self._parts.pop(name)
        if not parts:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        if len(parts) == 1:
            return parts[0]
        ids, logprobs = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(logprobs)

    def forget(self, names: Iterable[str]) -> None:
        """Drop the rows of requests that will not be finished."""
        for name in names:
            self._parts.pop(name, None)

    def _process(self, outputs: list[Any], *args: Any, **options: Any) -> Any:
        for output in outputs:
            tensors = output.new_prompt_logprobs_tensors
            if tensors is not None and output.request_id in self._parts:
                ids, logprobs = tensors.logprob_token_ids, tensors.logprobs
                self._parts[output.request_id].append((np.asarray(ids), np.asarray(logprobs)))
                output.new_prompt_logprobs_tensors = None
        return self._pass_on(outputs, *args, **options)
