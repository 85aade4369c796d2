"""Engine transformers."""

from __future__ import annotations

from typing import Any

from extract.engine_kinds.kind import EngineKind


class Transformers(EngineKind):
    """transformers, on a CPU or one GPU; gives whole distributions."""

    whole_rows = True
    has_branches = True
    loader = "transformers"

    def open(self, spec: Any) -> Any:
        """See `EngineKind.open`."""
        from extract.engines.transformers_engine import TransformersEngine

        return TransformersEngine(spec)

    def check(self, section: Any) -> None:
        """Refuse `quantization`: weights are loaded as they are in the checkpoint."""
        if section.quantization is not None:
            raise ValueError("quantization needs engine vllm")

    def serves(self, section: Any, *, on_cpu: bool, fp32_head: bool) -> bool:
        """True where only this engine can do the work, and on a CPU with a float32 head, where vLLM
        converts the whole output weight twice in every step."""
        needed = section.needs_one or section.device == "cpu" or (on_cpu and fp32_head)
        return needed and section.quantization is None

    def device(self, section: Any) -> str:
        """The device in the run file."""
        device: str = section.device
        return device

    def memory_need(self, spec: Any, on_cpu: bool) -> Any:
        """Weights, activations of a batch, and rows of logits."""
        from extract.engines import memory
        from store_schema.model.causal_head import scale_and_cap
        from store_schema.model.models import model_config

        config, section = model_config(spec.folder), spec.section
        tokens = max(section.answered_tokens, spec.longest)  # the larger of the two
        weights = memory.weight_bytes(spec.folder, config, spec.dtype)
        sizes: dict[str, Any] = {
            "tokens": tokens,
            "token_bytes": memory.token_bytes(config, spec.dtype),
            "fixed": (("weights", weights),),
        }
        if scale_and_cap(config) != (1.0, None):
            # The model's own logits of a batch, before and after its scale or soft cap.
            return memory.need_of(spec, tokens, 2, "batch_tokens", dtype=spec.dtype, **sizes)
        draws = section.estimator != "topk"
        copies = memory.SAMPLED_COPIES if draws else memory.TOPK_COPIES
        rows = min(section.logit_rows(on_cpu=on_cpu), tokens)
        return memory.need_of(spec, rows, copies, "head_rows", **sizes)
