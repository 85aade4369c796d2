"""Checks of what started this training: srun, or accelerate's launcher and its config."""

from __future__ import annotations

import os
from typing import Any

from fuse_train.config import TrainSection
from launch.work import step_task
from store_schema.errors import ConfigError

_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Variables by which `accelerate launch` passes its config to the processes."""

_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")


def check_launcher() -> None:
    """Refuse launchers that the trainer does not work under, before accelerate sets anything up.

    The loss needs the head's whole weight, and checkpoints hold whole tensors. On a CPU accelerate
    would ignore an FSDP config and train with plain data parallelism instead.

    Raises:
        ConfigError: DeepSpeed (ZeRO), FSDP or the like is asked for, or srun started several
            processes that were not told their ranks.
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
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise _refusal(name)


def check_accelerator(accelerator: Any, section: TrainSection) -> None:
    """Refuse an accelerator that the trainer does not work under, or more processes than segments.

    Raises:
        ConfigError: Parameters are sharded, gradients accumulated or the loss compiled by the launcher,
            or there are more processes than segments in a batch.
    """
    kind = str(accelerator.distributed_type.value)
    if kind not in _PLAIN:
        raise _refusal(kind)
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


def _refusal(name: str) -> ConfigError:
    return ConfigError(
        "launcher shards the model or its optimizer, which this trainer does not support",
        where="accelerate config",
        expected="one process or plain data parallelism (distributed_type NO, MULTI_GPU or MULTI_CPU)",
        got=name,
        hint="train.lora, train.gradient_checkpointing and a smaller train.micro_batch_segments save "
        "memory",
    )
