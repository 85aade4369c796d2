"""A causal model without its weights, and weights of a model folder by their names.

Parameters are on the meta device, buffers are real. So a process that will hold a part of the model
never holds the whole: it reads the rows of its part (`fuse_train.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuse_train.merge.stored_weights import FLOATS, StoredWeights
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.causal_model import keep_soft_cap
from store_schema.model.class_config import transformers_config
from store_schema.model.model_check import require_language_model
from store_schema.model.models import local_ref, resolve_model, with_folder
from store_schema.model.weight_files import require_weights

_BASE = ".base_layer."
"""What peft puts into the names of weights that have adapters."""


def weights_folder(ref: ModelRef, *, where: str) -> Path:
    """The folder of a model's safetensors, from the hub if need be.

    Raises:
        ModelError: It cannot be had, or is quantised.
    """
    folder = resolve_model(local_ref(ref))
    require_weights(folder)
    require_language_model(with_folder(ref, folder), folder, name=where, loader="transformers")
    return folder


def empty_model(ref: ModelRef, folder: Path, *, where: str) -> Any:
    """A causal model of transformers in float32 without weights.

    Args:
        ref: The model.
        folder: Its `weights_folder`.
        where: Its role in the run, for messages.

    Raises:
        ModelError: It cannot be made, or is quantised.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = transformers_config(with_folder(ref, folder), of=where)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"weights of {where} are quantised, so that their rows cannot be spread over processes",
            where=ref.model,
            hint="give the model as it was before, or set train.parallel to ddp",
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=ref.trust_remote_code
            )
        model.tie_weights()
        keep_soft_cap(model)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a damaged folder may raise anything
        raise ModelError(
            f"model of {where} cannot be made from its config",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:200]}",
        ) from error
    model.config.name_or_path = ref.model
    return model.eval()


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Within, parameters on the meta device are zeros of the same shape that need no memory.

    peft puts an adapter where the weight of its layer is, so that on the meta device it would lose its
    values.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                own = made.setdefault(id(parameter), nn.Parameter(zeros, parameter.requires_grad))
                setattr(module, name, own)
    yield
    back: dict[int, nn.Parameter] = {}
    ours = {id(parameter) for parameter in made.values()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in ours:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                own = back.setdefault(
                    id(parameter), nn.Parameter(empty, requires_grad=parameter.requires_grad)
                )
                setattr(module, name, own)


def plain_name(name: str) -> str:
    """Name of a weight as in a model without adapters."""
    return name.replace(_BASE, ".")


def saved_names(model: Any) -> dict[str, str]:
    """Names under which transformers saves a model's weights, by their names in the model.

    Weights that it saves in another form (experts of a layer one by one) are left out.

    Args:
        model: From `empty_model`, without adapters.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | saved_buffers(model)
    saved = {id(t): name for name, t in revert_weight_conversion(model, dict(tensors)).items()}
    return {name: saved[id(t)] for name, t in tensors.items() if id(t) in saved}


def stored_name(
    stored: StoredWeights, names: Iterable[str], saved: Mapping[str, str]
) -> str | None:
    """The first of a parameter's names that a folder has a tensor for.

    Args:
        stored: Weights of the folder.
        names: The parameter's names in the model.
        saved: From `saved_names`.
    """
    plain = [plain_name(name) for name in names]
    tried = [*plain, *(saved[name] for name in plain if name in saved)]
    return next((name for name in tried if name in stored.tensors), None)


def stored_rows(
    stored: StoredWeights, name: str, start: int, stop: int, shape: torch.Size
) -> torch.Tensor:
    """Rows of a stored float tensor, in its dtype.

    Raises:
        ModelError: It has another shape than `shape`, is no float tensor, or its file is damaged.
    """
    tensor = stored.tensors[name]
    if tensor.shape != tuple(shape) or not tensor.is_float:
        raise ModelError(
            f"weights of {stored.name} do not fit its config",
            where=tensor.path,
            expected=f"{name} of {list(shape)}, as config.json says",
            got=f"{list(tensor.shape)} in {tensor.dtype}",
            hint="config.json and weights must be of one model: fetch both again",
        )
    row = tensor.num_elements // max(shape[0], 1) if shape else 1
    values = stored.read(name, start * row, (stop - start) * row)
    return values.view(stop - start, *shape[1:]) if shape else values.view(())


@torch.no_grad()
def fill_buffers(model: nn.Module, stored: StoredWeights) -> None:
    """Give buffers that are saved with a model their stored values."""
    for name, buffer in saved_buffers(model).items():
        plain = plain_name(name)
        tensor = stored.tensors.get(plain)
        if tensor is None or tensor.shape != tuple(buffer.shape):
            continue
        dtype = FLOATS.get(tensor.dtype, buffer.dtype)
        if tensor.num_elements * dtype.itemsize == tensor.num_bytes and tensor.num_elements:
            values = torch.frombuffer(stored.read_bytes(plain, 0, tensor.num_bytes), dtype=dtype)
            buffer.copy_(values.view(buffer.shape))


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are saved with a model, by name."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict(keep_vars=True) if name in buffers}
