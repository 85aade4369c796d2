"""What a model's config and the headers of its weight files say: no weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.causal_config import require_causal_config
from store_schema.model.class_config import model_rows, transformers_config
from store_schema.model.models import (
    config_folder,
    is_gguf,
    local_copy,
    local_folder,
    max_positions,
    model_config,
    resolved_dtype,
)
from store_schema.model.weight_files import absent_weights, require_no_adapter, require_no_damage
from store_schema.model.weight_shapes import stored_tensors

Place = Literal["folder", "GGUF file", "hub"]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as far as it can be seen without its weights.

    Args:
        name: Its name in the run.
        ref: The reference, with the commit of a hub model where it is known.
        place: Where it is.
        architecture: Class in config.json, or its model_type.
        parameters: Number of parameters; None where neither files nor config tell.
        active: Those that a token uses: fewer in a mixture of experts.
        rows: Rows of the embedding.
        dtype: Name of the torch dtype of its weights.
        context: Tokens that it can read; None if its config does not say.
        size_bytes: Weight files on this disk; None where they are not here.
        problem: Why nothing could be read, as a line; None where it could.
        notes: What to know about it, a line each.
    """

    name: str
    ref: ModelRef
    place: Place
    architecture: str | None = None
    parameters: int | None = None
    active: int | None = None
    rows: int | None = None
    dtype: str | None = None
    context: int | None = None
    size_bytes: int | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()


def look_at_model(name: str, ref: ModelRef) -> ModelFacts:
    """The facts of a model. Of a hub model config.json is downloaded, no other file.

    Args:
        name: Its name in the run.
        ref: The model.

    Raises:
        ModelError: A local model is missing, damaged, or no causal language model. A hub model that
            cannot be reached is no error, but a `problem`.
    """
    if is_gguf(ref):
        return _gguf(name, ref)
    place: Place = "hub" if local_folder(ref, name=name) is None else "folder"
    try:
        folder = config_folder(ref)
    except ModelError as error:
        if place == "folder":
            raise
        return ModelFacts(name, ref, place, problem=error.line())
    if folder is None:
        require_no_adapter(Path(ref.model))
        ggufs = sorted(path.name for path in Path(ref.model).glob("*.gguf"))
        raise ModelError(
            f"model folder of {name} has no config.json",
            where=ref.model,
            got=", ".join(ggufs[:4]) or None,
            hint=f"give the file: {Path(ref.model, ggufs[0])}" if ggufs else None,
        )
    config = model_config(folder)
    require_causal_config(config, name=name, folder=folder)
    counted = _parameters(ref, folder, config)
    facts = ModelFacts(
        name,
        _pinned(ref, folder),
        place,
        architecture=_architecture(config),
        parameters=None if counted is None else counted[0],
        active=None if counted is None else counted[1],
        rows=model_rows(ref),
        dtype=resolved_dtype(ref, config),
        context=max_positions(config),
    )
    return _with_weights(facts, folder) if place == "folder" else facts


def _gguf(name: str, ref: ModelRef) -> ModelFacts:
    file = Path(ref.model, ref.gguf_file) if ref.gguf_file else Path(ref.model)
    if not file.is_file():
        raise ModelError(f"GGUF file of {name} not found", where=file)
    note = "GGUF: unpacked once by `extract plan`, which then knows its shape and tokenizer"
    size = file.stat().st_size
    return ModelFacts(name, ref, "GGUF file", "GGUF", size_bytes=size, notes=(note,))


def _pinned(ref: ModelRef, folder: Path) -> ModelRef:
    """The reference with the commit in a hub model's cached folder."""
    commit = folder.name if folder.parent.name == "snapshots" else None
    return ref if ref.revision or commit is None else ref.model_copy(update={"revision": commit})


def _with_weights(facts: ModelFacts, folder: Path) -> ModelFacts:
    require_no_damage(folder)
    absent = absent_weights(folder)
    if absent is not None:
        return replace(facts, notes=(absent.line(),))
    size = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.glob(pattern))
    return replace(facts, size_bytes=size)


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    return None if config.get("model_type") is None else str(config["model_type"])


def parameters_here(ref: ModelRef) -> tuple[int, int] | None:
    """What the headers of weight files on this disk say; no torch, no network, nothing unpacked.

    Args:
        ref: The model.

    Returns:
        Number of parameters, and of those that a token uses; None for a model that is not here, and
        where its files do not tell.
    """
    folder = None if is_gguf(ref) else local_copy(ref)
    if folder is None or not (folder / "config.json").is_file():
        return None
    config = model_config(folder)
    return _counts(_stored_sizes(folder, config), config)


def _parameters(ref: ModelRef, folder: Path, config: Mapping[str, Any]) -> tuple[int, int] | None:
    return _counts(_stored_sizes(folder, config) or _sizes_of_class(ref), config)


def _stored_sizes(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters in weight files by name; {} where there are none, or none that say it."""
    if "quantization_config" in config:  # packed weights have other shapes
        return {}
    return {tensor.name: math.prod(tensor.shape) for tensor in stored_tensors(folder)}


def _counts(sizes: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Number of parameters, and of those that a token uses."""
    if not sizes:
        return None
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    number = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 0)
    used = config.get("num_experts_per_tok")
    if not experts or not number or not isinstance(used, int):
        return total, total
    return total, total - round(experts * (1 - used / number))


def _sizes_of_class(ref: ModelRef) -> dict[str, int]:
    """Parameters of transformers' class of the model, which takes no memory; {} if there is none."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config = transformers_config(ref, of=ref.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a class of a model may raise anything; the number is then unknown
        return {}
    return {name: weight.numel() for name, weight in model.named_parameters()}
