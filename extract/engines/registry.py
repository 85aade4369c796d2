"""Load a model in the engine that the run file names."""

from __future__ import annotations

from extract.engine_kinds import ENGINES
from extract.engines.protocol import Engine, EngineSpec


def open_engine(spec: EngineSpec) -> Engine:
    """Load the model in the engine that the run file names.

    Raises:
        ConfigError: The engine is not installed.
        ModelError: The model cannot be loaded.
    """
    engine: Engine = ENGINES[spec.section.engine].open(spec)
    return engine
