"""The target in training: loaded from its model or from a checkpoint, whole or with adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.model.adapters import add_adapters, four_bit_config, load_adapters, merged
from fuse_train.model.generation_config import correct_generation_config
from fuse_train.model.heads import check_head
from fuse_train.model.models import load_model
from fuse_train.model.packing import check_packing
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
    if checkpoint is not None and lora is None:
        ref = with_folder(ref, checkpoint)
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
    _check_rows(model, tokenizer, ref)
    check_head(model, where=ref.model)
    if section.pack_tokens is not None:
        check_packing(model, where=ref.model)
    peft = None
    if lora is not None:
        if checkpoint is None:
            peft = add_adapters(model, lora, seed)
        else:
            peft = load_adapters(model, checkpoint, trainable=True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("nothing of the target can be trained", where=ref.model)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.torch_compile is not None:
        model.base_model.compile(backend=section.torch_compile, dynamic=True)
    return Target(model, peft)


def load_trained(ref: ModelRef, folder: Path, *, adapters: bool, dtype: torch.dtype) -> Any:
    """The plain causal model of a checkpoint, adapters merged (in float32).

    Args:
        ref: The untrained model.
        folder: Folder of the checkpoint.
        adapters: Whether it holds adapters alone.
        dtype: dtype to load it in; with adapters it is float32.
    """
    if not adapters:
        return load_model(with_folder(ref, folder), where=f"checkpoint {folder.name}", dtype=dtype)
    base = load_model(ref, where="target")
    return merged(load_adapters(base, folder, trainable=False))


def _check_rows(model: Any, tokenizer: SegmentTokenizer, ref: ModelRef) -> None:
    rows = int(model.get_input_embeddings().weight.shape[0])
    if rows < tokenizer.vocab_size:
        raise ModelError(
            "target's embedding is smaller than its tokenizer",
            where=ref.model,
            expected=f"at least {tokenizer.vocab_size} rows",
            got=rows,
            hint="the tokenizer belongs to another model, or resize the embedding first",
        )
