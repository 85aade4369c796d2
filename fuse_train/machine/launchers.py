"""Checks of what started this training: srun, or accelerate's launcher and its config."""

from __future__ import annotations

import os
from typing import Any

from fuse_train.config import TrainSection
from launch.work import step_task
from store_schema.errors import ConfigError

_FSDP = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "it takes the optimizer's step and writes the checkpoints itself, and would not leave the head "
        "whole for the loss",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it replaces the model's own layers"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism config",
        "it would cut the head or the text that the loss needs whole",
    ),
}
"""Variables by which `accelerate launch` passes its config to the processes."""

_FSDP_OPTIONS = {
    "fsdp_offload_params": "set it to false; more processes or train.lora need less memory",
    "fsdp_activation_checkpointing": "set it to false; train.gradient_checkpointing does the same",
    "fsdp_activation_checkpointing_offload": "set it to false; train.gradient_checkpointing computes "
    "activations again and keeps none",
}
"""Options of accelerate's FSDP config that would be left undone, which may then not fit in memory."""
_PRECISIONS = ("no", "bf16")

_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")


def check_launcher() -> None:
    """Refuse launchers that the trainer does not work under, before accelerate sets anything up.

    FSDP version 2 is no launcher's doing here: see `as_launched`.

    Raises:
        ConfigError: DeepSpeed (ZeRO), FSDP version 1, an option or precision that is not supported or
            the like is asked for, or srun started several processes that were not told their ranks.
    """
    tasks = step_task().count
    if tasks > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ConfigError(
            f"srun started {tasks} tasks, and each would do the same training by itself",
            where="SLURM_NTASKS",
            expected="1 task, or a launcher that tells each process its rank (WORLD_SIZE)",
            got=tasks,
            hint="`srun -n 1 logitfuse train run ...`, or on each node one `accelerate launch`",
        )
    for variable, (name, reason) in _REFUSED.items():
        if _is_on(variable):
            raise _refusal(name, reason)
    version = os.environ.get("FSDP_VERSION", "1")
    if _is_on(_FSDP) and version != "2":
        raise _refusal(f"FSDP version {version}", "it would not leave the head whole for the loss")
    for option, hint in _FSDP_OPTIONS.items():
        if _is_on(_FSDP) and _is_on(option.upper()):
            raise _unsupported(option, "false", "true", hint)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in _PRECISIONS:
        hint = "set it to no; train.precision says what products are computed in"
        raise _unsupported("mixed_precision", " or ".join(_PRECISIONS), precision, hint)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def as_launched(section: TrainSection) -> TrainSection:
    """The section with `parallel: fsdp2` if accelerate's config asks for FSDP version 2.

    The variable is then removed: transformers and accelerate would follow it too, and on a CPU
    accelerate (1.15) would train with plain data parallelism instead.
    """
    if not _is_on(_FSDP):
        return section
    os.environ.pop(_FSDP)
    return section.model_copy(update={"parallel": "fsdp2"})


def check_parallel(section: TrainSection) -> None:
    """Refuse options that `parallel: fsdp2` cannot have.

    Raises:
        ConfigError: Such an option.
    """
    if section.parallel != "fsdp2":
        return
    unfit = {
        "train.optim": (
            section.optim == "adafactor",
            "it needs whole matrices",
        ),
        "train.torch_compile": (
            section.torch_compile is not None,
            "blocks are gathered one by one",
        ),
        "train.lora.four_bit": (
            section.lora is not None and section.lora.four_bit,
            "rows of weights in 4 bits cannot be spread",
        ),
    }
    for where, (given, reason) in unfit.items():
        if given:
            raise ConfigError(
                f"does not go with train.parallel: fsdp2, since {reason}",
                where=where,
                hint="change it, or set train.parallel to ddp",
            )


def check_accelerator(accelerator: Any, section: TrainSection) -> None:
    """Refuse an accelerator that the trainer does not work under, or more processes than segments.

    Raises:
        ConfigError: Parameters are sharded, gradients accumulated or the loss compiled by the launcher,
            or there are more processes than segments in a batch.
    """
    kind = str(accelerator.distributed_type.value)
    if kind not in _PLAIN:
        raise _refusal(kind, "the trainer spreads the model itself")
    if section.batch_segments < accelerator.num_processes:
        raise ConfigError(
            "fewer segments in a batch than processes",
            where="train.batch_segments",
            expected=f"at least {accelerator.num_processes}",
            got=section.batch_segments,
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "launcher accumulates gradients, which would divide the loss once more",
            where="accelerate config, gradient_accumulation_steps",
            expected=1,
            got=accelerator.gradient_accumulation_steps,
            hint="train.batch_segments and train.micro_batch_segments say how a step is divided",
        )
    backend = str(accelerator.state.dynamo_plugin.backend.value)
    if backend not in ("NO", "no"):
        raise ConfigError(
            "launcher compiles the whole loss, which this trainer does not support",
            where="accelerate config, dynamo_backend",
            expected="no",
            got=backend,
            hint="train.torch_compile compiles the target without its head",
        )


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"launcher shards the model or its optimizer, which this trainer does not support: {reason}",
        where="accelerate config",
        expected="distributed_type NO, MULTI_GPU or MULTI_CPU, or FSDP version 2",
        got=name,
        hint="train.parallel: fsdp2 spreads weights, gradients and optimizer over processes",
    )


def _unsupported(option: str, expected: str, got: str, hint: str) -> ConfigError:
    return ConfigError(
        "launcher asks for what this trainer does not support",
        where=f"accelerate config, {option}",
        expected=expected,
        got=got,
        hint=hint,
    )
