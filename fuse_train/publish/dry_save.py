"""Tries the final save before the first step, so that a failure costs no training time.

All steps of publishing a final folder are done in a folder that is then deleted: adapters are merged;
config, generation config, tokenizer, model card and records are written and read back. Weights are
those of a copy of the model on the meta device; zeros are written for all weights outside the stack of
layers and for the first layer, since the others are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import LoraSection
from fuse_train.disk.folders import trial_folder
from fuse_train.model.adapters import add_adapters, merged
from fuse_train.model.heads import plain_model
from store_schema.config import ModelRef
from store_schema.errors import LogitfuseError, ModelError
from store_schema.model.class_config import transformers_config
from store_schema.model.models import with_folder
from store_schema.model.weight_files import require_weights

LARGEST_BYTES = 512 << 20
"""A larger tensor is left out, so that no model takes more than seconds."""


def dry_save(
    root: Path,
    model: Any,
    ref: ModelRef,
    dtype: torch.dtype,
    lora: LoraSection | None,
    write: Callable[[Path, Callable[[Path], object]], object],
) -> None:
    """Write a final folder below `root`, read it back, delete it.

    Args:
        root: Folder of the training, on the disk that the final folder will be on.
        model: The causal model in training; it is not changed.
        ref: The untrained model.
        dtype: dtype that it will be saved in.
        lora: Options of the adapters, None if all weights are trained.
        write: Called with a folder to fill and a function that writes the weights into it.

    Raises:
        ModelError: Some part cannot be saved or read back.
        StorageError: A file cannot be written.
    """
    try:
        with trial_folder(root / "final") as place:
            twin = _twin(plain_model(model), dtype, lora)
            weights = _some_weights(twin, dtype)
            write(place, lambda folder: twin.save_pretrained(folder, state_dict=weights))
            require_weights(place)
            transformers_config(with_folder(ref, place), of="target as it would be saved")
    except LogitfuseError:
        raise
    except Exception as error:  # transformers, peft and tokenizers raise what they like
        raise ModelError(
            "the trained model could not be saved, so training was not begun",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:300]}",
            hint="correct that file of the target, or train another",
        ) from error


def _twin(model: Any, dtype: torch.dtype, lora: LoraSection | None) -> Any:
    """A model of the same shapes on the meta device, with adapters merged if there are any."""
    config = deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)  # what is merged and saved is not quantised
    with torch.device("meta"):
        twin = type(model)(config).to(dtype)
        if lora is not None:
            plain = lora.model_copy(update={"four_bit": False})
            twin = merged(add_adapters(twin, plain, seed=0))
    twin.generation_config = model.generation_config
    return twin


def _some_weights(twin: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Zeros for some of the weights (see the module); tied weights stay tied."""
    made: dict[int, torch.Tensor] = {}
    weights = {}
    for name, tensor in twin.state_dict(keep_vars=True).items():
        number = next((part for part in name.split(".") if part.isdigit()), "0")
        size = tensor.numel() * tensor.element_size()
        if int(number) == 0 and size <= LARGEST_BYTES:
            if id(tensor) not in made:
                made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            weights[name] = made[id(tensor)]
    return weights
