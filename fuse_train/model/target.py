"""The target in training: loaded from its model or from a checkpoint, whole or with adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.model.adapters import (
    add_adapters,
    four_bit_config,
    load_adapters,
    merged,
    new_adapters,
)
from fuse_train.model.empty import saved_buffers
from fuse_train.model.generation_config import correct_generation_config
from fuse_train.model.heads import check_head
from fuse_train.model.models import load_model
from fuse_train.model.packing import check_packing
from fuse_train.sharding.part_files import StoredParts, in_parts
from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.model.models import with_folder
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True)
class Target:
    """A model in training.

    Args:
        model: The causal model, in float32, with adapters in its layers if there are any.
        peft: Wrapper that saves the adapters; None where all weights are trained.
    """

    model: Any
    peft: Any = None

    def save(self, folder: Path) -> None:
        """Write what is trained: the weights, or the adapters alone."""
        (self.model if self.peft is None else self.peft).save_pretrained(folder)

    def save_config(self, folder: Path) -> None:
        """Write the config alone, of the model or of the adapters."""
        if self.peft is None:
            self.model.config.save_pretrained(folder)
        else:
            self.peft.active_peft_config.save_pretrained(folder)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained and saved, by name: weights and buffers, or those of adapters alone."""
        parameters = dict(self.model.named_parameters())
        if self.peft is None:
            return parameters | saved_buffers(self.model)
        return {name: p for name, p in parameters.items() if p.requires_grad}


def load_target(
    ref: ModelRef,
    tokenizer: SegmentTokenizer,
    section: TrainSection,
    *,
    checkpoint: Path | None,
    seed: int,
    device: torch.device,
) -> Target:
    """Load the target, ready for training.

    Args:
        ref: The untrained model.
        tokenizer: Its tokenizer.
        section: The recipe.
        checkpoint: Folder to resume from, None at the start.
        seed: Seed of new adapters.
        device: Device to load 4-bit weights on; other weights are moved there later.

    Raises:
        ModelError: It cannot be loaded or trained.
        ConfigError: Adapters, packing or compiling that the model does not support.
    """
    lora = section.lora
    parts = checkpoint if checkpoint is not None and in_parts(checkpoint) else None
    whole = None if parts is not None else checkpoint
    if whole is not None and lora is None:
        ref = with_folder(ref, whole)
    if lora is not None and lora.four_bit:
        model = load_model(
            ref,
            where="target",
            quantization_config=four_bit_config(),
            device_map={"": device},
        )
    else:
        model = load_model(ref, where="target")
    correct_generation_config(model, where=ref.model)
    check_rows(model, tokenizer, ref)
    check_forward(model, section, ref)
    target = with_adapters(model, section, whole, seed)
    if parts is not None:
        with StoredParts(parts) as stored:
            fill_whole(model, stored)
    set_up(target, section, ref)
    if section.torch_compile is not None:
        model.base_model.compile(backend=section.torch_compile, dynamic=True)
    return target


def check_forward(model: Any, section: TrainSection, ref: ModelRef) -> None:
    """Refuse a model whose head or packed rows do not work as training needs them.

    Raises:
        ModelError: Its logits are computed in an unknown way, or are not finite.
        ConfigError: It does not keep packed segments apart.
    """
    check_head(model, where=ref.model)
    if section.pack_tokens is not None:
        check_packing(model, where=ref.model)


def with_adapters(model: Any, section: TrainSection, checkpoint: Path | None, seed: int) -> Target:
    """The model as a target, with adapters, new or from a checkpoint, where the recipe has some."""
    if section.lora is None:
        return Target(model)
    if checkpoint is None:
        return Target(model, add_adapters(model, section.lora, seed))
    return Target(model, load_adapters(model, checkpoint, trainable=True))


def set_up(target: Target, section: TrainSection, ref: ModelRef) -> None:
    """Set a target's model up for training.

    Raises:
        ModelError: It has nothing to train.
    """
    if not any(p.requires_grad for p in target.model.parameters()):
        raise ModelError("nothing of the target can be trained", where=ref.model)
    if section.gradient_checkpointing:
        target.model.gradient_checkpointing_enable({"use_reentrant": False})


@torch.no_grad()
def fill_whole(model: Any, stored: StoredParts) -> None:
    """Give a model, which is whole, the tensors of a checkpoint that is in parts."""
    buffers = dict(model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        if name in stored.record.tensors:
            tensor.copy_(stored.read(name))


def load_trained(ref: ModelRef, folder: Path, *, adapters: bool, dtype: torch.dtype) -> Any:
    """The plain causal model of a checkpoint, adapters merged (in float32).

    Args:
        ref: The untrained model.
        folder: Folder of the checkpoint.
        adapters: Whether it holds adapters alone.
        dtype: dtype to load it in; with adapters it is float32.
    """
    parts = in_parts(folder)
    if not adapters and not parts:
        return load_model(with_folder(ref, folder), where=f"checkpoint {folder.name}", dtype=dtype)
    base = load_model(ref, where="target", dtype=torch.float32 if adapters else dtype)
    trained = base
    if adapters:
        trained = (new_adapters if parts else load_adapters)(base, folder, trainable=False)
    if parts:
        with StoredParts(folder) as stored:
            fill_whole(base, stored)
    return merged(trained) if adapters else base


def check_rows(model: Any, tokenizer: SegmentTokenizer, ref: ModelRef) -> None:
    """Refuse a model with fewer embeddings than its tokenizer has tokens.

    Raises:
        ModelError: It has.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if rows < tokenizer.vocab_size:
        raise ModelError(
            "target's embedding is smaller than its tokenizer",
            where=ref.model,
            expected=f"at least {tokenizer.vocab_size} rows",
            got=rows,
            hint="the tokenizer belongs to another model, or resize the embedding first",
        )
