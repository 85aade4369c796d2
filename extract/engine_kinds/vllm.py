"""Engine vllm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from extract.engine_kinds.kind import EngineKind

LEAST_STEP_TOKENS = 16
"""Steps are not halved below it."""


class Vllm(EngineKind):
    """vLLM, on one or more GPUs or a CPU; knows quantised models and kernels of its own."""

    loader = "vllm"

    def open(self, spec: Any) -> Any:
        """As `EngineKind.open` says."""
        from extract.engines.vllm_engine import VllmEngine

        return VllmEngine(spec)

    def check(self, section: Any) -> None:
        """It hands out the best log-probabilities only."""
        if section.estimator == "sampled":
            raise ValueError(
                "estimator sampled needs engine transformers: vLLM hands out whole distributions as "
                "Python lists, with 4,096 ids at a ninth of its speed, with more at less"
            )

    def serves(self, section: Any, *, on_cpu: bool, fp32_head: bool) -> bool:
        """Whatever is left."""
        return True

    def memory_need(self, spec: Any, on_cpu: bool) -> Any:
        """Rows of a step; on a CPU also weights and cache, which lie in its own share on a GPU."""
        from extract.engines import memory
        from store_schema.model.models import model_config

        config, section = model_config(spec.folder), spec.section
        weights = ("weights", memory.weight_bytes(spec.folder, config, spec.dtype))
        rows = min(spec.longest, section.step_tokens(on_cpu=on_cpu))
        cache = ("cache of keys and values", section.kv_cache_gib << 30)
        fixed = (weights, cache) if on_cpu else ()
        option = "max_num_batched_tokens"
        return memory.need_of(spec, rows, memory.VLLM_COPIES, option, fixed=fixed)

    def free_memory(self, spec: Any) -> tuple[int, str]:
        """What it leaves on the fullest GPU beside its share of the whole memory."""
        from extract.engines.memory import gpu_bytes

        section, rooms = spec.section, []
        for device in range(section.tensor_parallel_size * section.pipeline_parallel_size):
            free, total = gpu_bytes(device)
            rooms.append((max(int(free - section.gpu_memory_utilization * total), 0), device))
        room, device = min(rooms)
        return room, f"GPU {device}, beside extract.gpu_memory_utilization"

    def halved(self, spec: Any, times: int, on_cpu: bool) -> Any:
        """Its steps halved, as far as that goes."""
        rows = spec.section.step_tokens(on_cpu=on_cpu)
        fewer = max(rows >> times, min(rows, LEAST_STEP_TOKENS))
        if fewer == rows:
            return spec
        section = spec.section.model_copy(update={"max_num_batched_tokens": fewer})
        return replace(spec, section=section)
