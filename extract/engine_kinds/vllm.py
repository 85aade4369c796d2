"""Engine vllm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from extract.engine_kinds.kind import EngineKind

LEAST_STEP_TOKENS = 16
"""Steps are not halved below this."""


class Vllm(EngineKind):
    """vLLM, on one or more GPUs or a CPU; supports quantised models."""

    loader = "vllm"

    def open(self, spec: Any) -> Any:
        """See `EngineKind.open`."""
        from extract.engines.vllm_engine import VllmEngine

        return VllmEngine(spec)

    def check(self, section: Any) -> None:
        """Refuse `estimator: sampled` and `branches`."""
        if section.estimator == "sampled":
            raise ValueError(
                "estimator sampled needs engine transformers: vLLM returns whole distributions as "
                "Python lists, which takes longer with every id of the vocabulary"
            )
        super().check(section)

    def serves(self, section: Any, *, on_cpu: bool, fp32_head: bool) -> bool:
        """True: it is used for everything that no engine before it is chosen for."""
        return True

    def memory_need(self, spec: Any, on_cpu: bool) -> Any:
        """Logits of a step; on a CPU also weights and KV cache, which on a GPU are in vLLM's own
        share."""
        from extract.engines import memory
        from store_schema.model.models import model_config

        config, section = model_config(spec.folder), spec.section
        weights = ("weights", memory.weight_bytes(spec.folder, config, spec.dtype))
        rows = min(spec.longest, section.step_tokens(on_cpu=on_cpu))
        cache = ("KV cache", section.kv_cache_gib << 30)
        fixed = (weights, cache) if on_cpu else ()
        option = "max_num_batched_tokens"
        return memory.need_of(spec, rows, memory.VLLM_COPIES, option, fixed=fixed)

    def free_memory(self, spec: Any) -> tuple[int, str]:
        """Free memory beyond vLLM's own share, on the GPU with the least of it."""
        from extract.engines.memory import gpu_bytes

        section, rooms = spec.section, []
        for device in range(section.tensor_parallel_size * section.pipeline_parallel_size):
            free, total = gpu_bytes(device)
            rooms.append((max(int(free - section.gpu_memory_utilization * total), 0), device))
        room, device = min(rooms)
        return room, f"GPU {device}, beside extract.gpu_memory_utilization"

    def halved(self, spec: Any, times: int, on_cpu: bool) -> Any:
        """The spec with vLLM's step size halved, down to `LEAST_STEP_TOKENS`."""
        rows = spec.section.step_tokens(on_cpu=on_cpu)
        fewer = max(rows >> times, min(rows, LEAST_STEP_TOKENS))
        if fewer == rows:
            return spec
        section = spec.section.model_copy(update={"max_num_batched_tokens": fewer})
        return replace(spec, section=section)
