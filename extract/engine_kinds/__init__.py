"""Engines, which run models. ENGINES lists them; for `engine: auto` the first that `serves` is
taken."""

from extract.engine_kinds.kind import EngineKind
from store_schema.registry import Registry

ENGINES = Registry(
    "engine",
    EngineKind,
    {
        "transformers": "extract.engine_kinds.transformers:Transformers",
        "vllm": "extract.engine_kinds.vllm:Vllm",
    },
)
