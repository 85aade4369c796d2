"""Estimate whether a source fits into memory, before it is loaded.

Counted are the weights, the activations of one batch, and the rows of logits that are in memory at a
time, which grow with the vocabulary. Not counted are the libraries' own memory (about 1 GB on a GPU),
results that wait to be written (`extract.queue_mib`), and fragmentation. On a GPU vLLM allocates
weights and KV cache within its own share, so only the logits are compared with the memory beyond that
share.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.quantities import size_text
from store_schema.dtypes import DTYPES
from store_schema.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from extract.engine_kinds.kind import EngineKind
    from extract.engines.protocol import EngineSpec

VLLM_COPIES = 3
"""vLLM: logits, their log-softmax and the label's rank; measured on vLLM 0.32."""
TOPK_COPIES, SAMPLED_COPIES = 2, 4
"""transformers: logits and candidates of `best`; for sampled rows also two arrays of exponentials."""
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Need:
    """Memory for scoring a source.

    Args:
        rows: Rows of logits in memory at a time.
        vocab_size: Ids of a row.
        copies: Arrays of the size of these rows, at a time.
        bytes: Everything that is counted, in bytes.
        option: The field of section `extract` that determines `rows`.
        dtype: dtype of the logits.
        tokens: Tokens of a batch, with padding; 0 where the engine allocates them itself.
        token_bytes: Bytes of activations for each token.
        fixed: Name and bytes of what no option changes (weights, KV cache).
    """

    rows: int
    vocab_size: int
    copies: int
    bytes: int
    option: str
    dtype: str = "float32"
    tokens: int = 0
    token_bytes: int = 0
    fixed: tuple[tuple[str, int], ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with all its copies."""
        return self.vocab_size * self.copies * DTYPES.get(self.dtype, 4)

    def against(self, free_bytes: int, where: str) -> str:
        """Need and free memory as text."""
        return f"{self}; free {size_text(free_bytes)} ({where})"

    def __str__(self) -> str:
        parts = [f"{name} {size_text(size)}" for name, size in self.fixed]
        if self.tokens:
            size = size_text(self.tokens * self.token_bytes)
            parts.append(f"activations of {self.tokens:,} tokens {size}")
        parts.append(
            f"logits of {self.rows:,} rows x {self.vocab_size:,} ids in {self.dtype}, "
            f"{self.copies} times"
        )
        return f"{', '.join(parts)}: {size_text(self.bytes)}"


def memory_need(spec: EngineSpec, on_cpu: bool) -> Need | None:
    """Memory for scoring a source, from the run file, config.json and the sizes of weight files.

    Args:
        spec: The source.
        on_cpu: Whether it runs on the CPU.

    Returns:
        The need; None where the engine has no estimate.

    Raises:
        ModelError: config.json is unreadable.
    """
    need: Need | None = _kind_of(spec).memory_need(spec, on_cpu)
    return need


def _kind_of(spec: EngineSpec) -> EngineKind:
    from extract.engine_kinds import ENGINES  # here, since `head` is used without a run file

    return ENGINES[spec.section.engine]


def require_memory(need: Need, free_bytes: int, where: str) -> None:
    """Refuse a source that does not fit.

    Args:
        need: From `memory_need`.
        free_bytes: Free memory.
        where: Device, for the message: "CPU", "GPU 0".

    Raises:
        ConfigError: It does not fit; says which value of an option would.
    """
    if need.bytes > free_bytes:
        raise ConfigError(
            f"not enough memory: {need.against(free_bytes, where)}",
            hint=_suggest_fix(need, free_bytes),
        )


def check_memory(spec: EngineSpec) -> str:
    """Compare the memory that a source needs with what is free now on its device.

    It initialises CUDA, which then takes some hundred MB of the GPU until the process ends: call it in
    the process that loads the model, or in one that ends soon.

    Returns:
        Need and free memory as text.

    Raises:
        ConfigError: It does not fit; says which value of an option would.
    """
    import torch

    device = _kind_of(spec).device(spec.section)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    need = memory_need(spec, on_cpu)
    free, where = free_memory(spec, on_cpu)
    if need is None:
        return f"memory need not known; free {size_text(free)} ({where})"
    require_memory(need, free, where)
    return need.against(free, where)


def _shard_names(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            "index of weights is unreadable", where=index, got=str(error)[:160]
        ) from error


def weight_bytes(folder: Path, config: dict[str, Any], dtype: str) -> int:
    """Bytes of a checkpoint's weights once loaded as `dtype`, from its files' sizes.

    For a quantised checkpoint, or one of unknown dtype, it is the size on disk.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shard_names(index)
        files: list[Path] = [folder / name for name in names]
    else:
        files = [*folder.glob("model.safetensors")] or [*folder.glob("*.safetensors")]
        files = files or [*folder.glob("*.bin")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    saved = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if "quantization_config" in config or not {saved, dtype} <= DTYPES.keys():
        return size
    return size * DTYPES[dtype] // DTYPES[saved]


def free_memory(spec: EngineSpec, on_cpu: bool) -> tuple[int, str]:
    """Bytes that a source may use, and the device's name for messages."""
    if on_cpu:
        return free_host_bytes(), "CPU"
    return _kind_of(spec).free_memory(spec)


def check_gpus(count: int) -> None:
    """Refuse a process that was given GPUs by a scheduler but does not see them.

    Raises:
        ConfigError: It sees fewer than `count`.
    """
    if count == 0:
        return
    import torch

    seen = torch.cuda.device_count()
    if seen < count:
        raise ConfigError(
            "a worker does not see its GPUs",
            where="--gpus-per-worker",
            expected=count,
            got=seen,
            hint="check the driver (nvidia-smi) and torch's build on its node, or ask for no GPUs",
        )


def gpu_bytes(device: int) -> tuple[int, int]:
    """Free and total memory of a GPU, in bytes."""
    import torch

    figures: tuple[int, int] = torch.cuda.mem_get_info(device)
    return figures


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still use: the least of the kernel's MemAvailable and what its
    control groups leave.

    Args:
        root: Folder with /proc and /sys.

    Returns:
        Bytes; `sys.maxsize` on a system without these figures.
    """
    return max(min([_available(root), *_cgroups_free(root)]), 0)


def need_of(
    spec: EngineSpec,
    rows: int,
    copies: int,
    option: str,
    *,
    dtype: str = "float32",
    tokens: int = 0,
    token_bytes: int = 0,
    fixed: tuple[tuple[str, int], ...] = (),
) -> Need:
    """A `Need` with the sum of its parts; arguments are fields of `Need`."""
    logits = rows * spec.model_vocab_size * copies * DTYPES.get(dtype, 4)
    total = logits + tokens * token_bytes + sum(size for _, size in fixed)
    return Need(
        rows, spec.model_vocab_size, copies, total, option, dtype, tokens, token_bytes, fixed
    )


def token_bytes(config: dict[str, Any], dtype: str) -> int:
    """Bytes of activations of a token in a forward pass without gradients: about four hidden states and
    three of the MLP."""
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    return (4 * hidden + 3 * inner) * DTYPES.get(dtype, 4)


def _suggest_fix(need: Need, free: int) -> str:
    """The option that makes it fit, with its largest such value."""
    room = free - sum(size for _, size in need.fixed)
    if need.option == "batch_tokens":
        choices = [("batch_tokens", room // (need.row_bytes + need.token_bytes))]
    else:
        choices = [(need.option, (room - need.tokens * need.token_bytes) // need.row_bytes)]
        if need.tokens:
            rest = room - need.rows * need.row_bytes
            choices.append(("batch_tokens", rest // need.token_bytes))
    for option, most in choices:
        if most >= LEAST_ROWS:
            return f"set extract.{option} to at most {most:,}"
    if room > LEAST_ROWS * (need.row_bytes + need.token_bytes) and need.tokens:
        return "lower extract.head_rows and extract.batch_tokens, and plan.max_tokens if need be"
    if not need.fixed:
        return "lower extract.gpu_memory_utilization: logits need memory besides what it reserves"
    return "free memory, take a machine with more, or load a smaller dtype"


def _available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except OSError:
        pass
    return sys.maxsize


def _cgroups_free(root: Path) -> list[int]:
    """Limit minus use, in bytes, of every control group of this process, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount /= "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's; the container's own group is then the mount.
        group = mount / os.path.normpath(path).lstrip("/")
        for folder in [group, *group.parents]:
            size = _cgroup_free(folder, *names)
            if size is not None:
                free.append(size)
            if folder == mount:
                break
    return free


def _cgroup_free(folder: Path, limit: str, use: str, cache: str) -> int | None:
    """Bytes that a control group leaves, None without a limit; inactive file cache counts as free."""
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / use).read_text(encoding="ascii"))
        figures = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    stat = dict(zip(figures[::2], figures[1::2], strict=False))
    return most - used + int(stat.get(cache, 0))
