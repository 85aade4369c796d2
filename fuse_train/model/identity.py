"""What identifies a model's weights, and the dtype that it is saved in: read from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store_schema.config import ModelRef
from store_schema.fingerprint import model_fingerprint
from store_schema.model.class_config import config_fact, transformers_config
from store_schema.model.models import local_ref, model_config, resolved_dtype


def identity(ref: ModelRef) -> dict[str, Any]:
    """What identifies a model's weights: a folder's fingerprint, or a hub name and its revision; and
    the dtype that they are rounded to, by its full name if there is a config."""
    ref = local_ref(ref)
    folder = Path(ref.model)
    if (folder / "config.json").exists():
        dtype = resolved_dtype(ref, model_config(folder))
        return {"fingerprint": model_fingerprint(folder), "dtype": dtype}
    return {"name": ref.model, "revision": ref.revision, "dtype": ref.dtype}


def own_dtype_name(ref: ModelRef) -> str:
    """Name of the dtype that the trained model is saved in: the run file's, else the checkpoint's."""
    if ref.dtype != "auto":
        return ref.dtype
    return config_fact(ref, "dtype", lambda: _checkpoint_dtype(ref))


def _checkpoint_dtype(ref: ModelRef) -> str:
    config = transformers_config(ref, of="target")
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
