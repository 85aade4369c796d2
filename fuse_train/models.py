"""Loading the target: weights in float32 for training, and back to its own dtype at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.fingerprint import model_fingerprint
from store_schema.models import local_ref

_UNLOADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises for folders and names that hold no model, or a damaged one."""


def load_model(
    ref: ModelRef, *, where: str, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A causal model for training or scoring.

    Args:
        ref: Folder or hub name.
        where: What the model is in the run, for messages.
        dtype: Of the weights.
        options: Further ones of `from_pretrained`, such as `quantization_config`.

    Raises:
        ModelError: It cannot be loaded, or the checkpoint lacks weights.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    ref = local_ref(ref)
    folder = Path(ref.model)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(
            f"model of {where} has no config.json",
            where=ref.model,
            hint="give a folder that save_pretrained wrote",
        )
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            ref.model,
            revision=ref.revision,
            trust_remote_code=ref.trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except _UNLOADABLE as error:
        raise ModelError(
            f"model of {where} cannot be loaded",
            where=ref.model,
            got=str(error)[:200],
            hint="give a whole model folder, or a hub name that this machine can reach",
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model of {where} lacks {len(missing)} weights",
            where=ref.model,
            got=", ".join(missing[:3]),
            hint="they would be random; give a complete checkpoint",
        )
    return model


def identity(ref: ModelRef) -> dict[str, Any]:
    """What fixes a model's weights: a folder's fingerprint, or a hub name and its revision."""
    ref = local_ref(ref)
    folder = Path(ref.model)
    if (folder / "config.json").exists():
        return {"fingerprint": model_fingerprint(folder), "dtype": ref.dtype}
    return {"name": ref.model, "revision": ref.revision, "dtype": ref.dtype}


def own_dtype(ref: ModelRef, model: Any) -> torch.dtype:
    """The dtype that the trained model is saved in: the one asked for, else the checkpoint's.

    Raises:
        ModelError: No floating dtype of that name.
    """
    ref = local_ref(ref)
    name = ref.dtype
    if name == "auto":
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            ref.model, revision=ref.revision, trust_remote_code=ref.trust_remote_code
        )
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError("unknown dtype", where=ref.model, got=name, expected="float32 or the like")
    return dtype
