"""A model loaded in the engine that the run file asks for."""

from __future__ import annotations

from extract.engine_kinds import ENGINES
from extract.engines.protocol import Engine, EngineSpec


def open_engine(spec: EngineSpec) -> Engine:
    """Load the model in the engine that the run file asks for.

    Raises:
        ConfigError: The engine is not installed.
        ModelError: The model does not load.
    """
    engine: Engine = ENGINES[spec.section.engine].open(spec)
    return engine
