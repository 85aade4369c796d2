"""The files of a run, shared by all stages: formats, writing, reading and checks.

Nothing here imports another top package, torch or a model library. Start with `layout` (the table of
arrays), then `plan`, `manifest` and `store` (reader and writer).
"""

__version__ = "0.1.0"

SCHEMA_VERSION = 4
"""Version of everything written to disk. Stores and plans of another one are refused."""
