"""LoRA and QLoRA through peft: adapters are trained, the target's own weights stay as they are.

The adapters are inside the target's own layers, so all other code works on the plain causal model;
only loading, saving and merging differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import LoraSection
from store_schema.errors import ConfigError, CorruptionError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_lora(lora: LoraSection) -> None:
    """Refuse LoRA options that this machine cannot run, before any model is loaded.

    Raises:
        ConfigError: peft is missing, or for four_bit bitsandbytes or a CUDA device.
    """
    if find_spec("peft") is None:
        raise ConfigError("LoRA needs peft", where="train.lora", hint="pip install peft")
    if not lora.four_bit:
        return
    lacking = [] if find_spec("bitsandbytes") is not None else ["package bitsandbytes"]
    lacking += [] if torch.cuda.is_available() else ["CUDA device"]
    if lacking:
        raise ConfigError(
            "QLoRA cannot run here",
            where="train.lora.four_bit",
            expected="bitsandbytes and a CUDA device",
            got="no " + ", no ".join(lacking),
            hint="set it to false: LoRA needs neither",
        )


def four_bit_config() -> Any:
    """bitsandbytes config of QLoRA's frozen weights.

    Source: QLoRA (2305.14314): NF4, double quantisation, products in bfloat16.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapters(model: Any, lora: LoraSection, seed: int) -> Any:
    """Put new adapters into the model, which is changed in place.

    Source: LoRA (2106.09685): W + alpha / r * B A, A random and B zero, so nothing changes at first.

    Args:
        model: Causal model.
        lora: Rank, scale, layers.
        seed: Seed of A; torch's global random state is not changed.

    Returns:
        The PeftModel around the model, for saving.

    Raises:
        ConfigError: The model has no such layers, or one of them is its head or embedding.
    """
    peft: Any = import_module("peft")
    if lora.four_bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets: str | list[str] = lora.targets if isinstance(lora.targets, str) else [*lora.targets]
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    _refuse_head(model, lora.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                "model has no such layers",
                where="train.lora.targets",
                got=str(lora.targets),
                expected="ends of the names of linear layers, such as q_proj",
            ) from error


def _refuse_head(model: Any, targets: str | Sequence[str]) -> None:
    """Refuse adapters on head or embedding: the loss reads the head's weight without them."""
    if isinstance(targets, str):
        return
    ends = [(model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding")]
    for name, module in model.named_modules():
        for end, what in ends:
            hit = [t for t in targets if name == t or name.endswith(f".{t}")]
            if module is end and hit:
                raise ConfigError(
                    f"adapters on the {what} are not supported",
                    where="train.lora.targets",
                    got=hit[0],
                    hint="leave it out",
                )


def load_adapters(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Put saved adapters into the model they were trained on.

    Raises:
        CorruptionError: They cannot be read, or belong to another model.
    """
    from safetensors import SafetensorError

    peft: Any = import_module("peft")
    try:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CorruptionError("adapters unreadable", where=folder, got=str(error)[:200]) from error


def new_adapters(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Put adapters into a model as the config in a folder says; their weights are to be filled in."""
    peft: Any = import_module("peft")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    return peft.get_peft_model(model, config)


def save_adapters(peft_model: Any, folder: Path) -> None:
    """Write the files of `copy_adapters` into an existing folder."""
    peft_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def copy_adapters(source: Path, folder: Path) -> None:
    """Copy the adapters of a checkpoint into an existing folder."""
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, folder / name)


def merged(peft_model: Any) -> Any:
    """The plain causal model with the adapters' products added to its weights."""
    return peft_model.merge_and_unload()
