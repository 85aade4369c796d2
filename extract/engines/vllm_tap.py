"""Prompt log-probabilities as vLLM's engine hands them to its front end: arrays, not Python lists.

The front end turns every entry into Python objects, which at 128 entries takes longer than the
model's forward on a fast machine. The tap stands before it. It is no public interface of vLLM's, so
`extract.engines.vllm_engine` compares it with the public lists before it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


class Tap:
    """Takes the prompt log-probabilities of the requests it watches, and no others."""

    def __init__(self, output_processor: Any) -> None:
        """Stand before a front end.

        Args:
            output_processor: `LLMEngine.output_processor` (vLLM 0.32).

        Raises:
            AttributeError: It is not as expected.
        """
        self._parts: dict[str, list[tuple[Any, Any]]] = {}
        self._pass_on = output_processor.process_outputs
        output_processor.process_outputs = self._process

    def watch(self, name: str) -> None:
        """Take the rows of this request (vLLM's own name) from here on."""
        self._parts[name] = []

    @property
    def watched(self) -> bool:
        """Whether there is a request whose rows were not taken yet."""
        return bool(self._parts)

    def take(self, name: str) -> tuple[Any, Any]:
        """Ids and log-probabilities [R, K+1] of a finished request, its first token left out.

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
        """Drop what was taken of requests that will not be finished."""
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
