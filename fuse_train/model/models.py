"""Loading a causal model, and the torch dtype that it is saved in."""

from __future__ import annotations

from typing import Any

import torch

from fuse_train.model.identity import own_dtype_name
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.causal_model import load_causal_model
from store_schema.model.model_check import require_language_model
from store_schema.model.models import local_folder, local_ref
from store_schema.model.weight_files import require_weights


def load_model(
    ref: ModelRef, *, where: str, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Load a causal model for training or scoring.

    Args:
        ref: Folder or hub name.
        where: Role of the model in the run, for messages.
        dtype: dtype of the weights.
        options: `device`, or arguments of `from_pretrained`, such as `quantization_config`.

    Raises:
        ModelError: It cannot be loaded, or the checkpoint lacks weights.
    """
    ref = local_ref(ref)
    folder = local_folder(ref)
    if folder is not None and not (folder / "config.json").exists():
        raise ModelError(
            f"model of {where} has no config.json",
            where=ref.model,
            hint="give a folder that save_pretrained wrote",
        )
    if folder is not None:
        require_weights(folder)
        require_language_model(ref, folder, name=where, loader="transformers")
    return load_causal_model(ref, of=where, dtype=dtype, **options)


def own_dtype(ref: ModelRef) -> torch.dtype:
    """The dtype of `own_dtype_name`.

    Raises:
        ModelError: The checkpoint's is no floating dtype.
    """
    name = own_dtype_name(ref)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError("unknown dtype", where=ref.model, got=name, expected="float32 or the like")
    return dtype
