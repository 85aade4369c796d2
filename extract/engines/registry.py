"""Which engine runs a model: the one place that knows them all."""

from __future__ import annotations

from extract.engines.protocol import Engine, EngineSpec


def open_engine(spec: EngineSpec) -> Engine:
    """Load the model in the engine that the run file asks for.

    Raises:
        ConfigError: The engine is not installed.
        ModelError: The model does not load.
    """
    if spec.section.engine == "vllm":
        from extract.engines.vllm_engine import VllmEngine

        return VllmEngine(spec)
    from extract.engines.transformers_engine import TransformersEngine

    return TransformersEngine(spec)
