"""The contracts on disk: what every stage writes and reads, and how it is checked.

Nothing here imports another room, torch or a model library. Start with `layout` (the one table of
arrays), then `plan`, `manifest`, and `store`: its writer and reader.
"""

__version__ = "0.1.0"

SCHEMA_VERSION = 4
"""Version of everything written to disk. A reader refuses a newer one and reads every older one."""
