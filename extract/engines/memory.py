"""Whether a source fits into memory, told before it is loaded.

Counted are the weights, what a forward pass holds of one batch, and the rows of logits that exist
side by side, which grow with the vocabulary and surprise most. Not counted: what the libraries take
for themselves (about 1 GB on a GPU), results that wait to be written (`extract.queue_mib`), and
allocators' waste. On a GPU vLLM plans weights and cache inside its own share, so only what comes on
top of that share is compared with what the share leaves.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.quantities import size_text
from store_schema.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from extract.engine_kinds.kind import EngineKind
    from extract.engines.protocol import EngineSpec

VLLM_COPIES = 3
"""Logits, their log-softmax and what ranks the label: measured on vLLM 0.32."""
TOPK_COPIES, SAMPLED_COPIES = 2, 4
"""transformers: logits and the candidates of the best; for draws also the exponentials, twice."""
LEAST_ROWS = 16

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that scoring a source takes.

    Args:
        rows: Rows of logits that exist at a time.
        vocab_size: Ids of a row.
        copies: How often these rows exist side by side.
        bytes: Of all that is counted.
        option: The field of `extract` that `rows` follows.
        dtype: Type of the logits.
        tokens: Tokens of a batch, padding included; 0 where the engine plans them itself.
        token_bytes: What a forward pass holds of each.
        fixed: Name and bytes of what no option changes: weights, cache.
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
        """Bytes of one row in all its copies."""
        return self.vocab_size * self.copies * _ITEM_BYTES.get(self.dtype, 4)

    def against(self, free_bytes: int, where: str) -> str:
        """For people, beside what is free."""
        return f"{self}; free {size_text(free_bytes)} ({where})"

    def __str__(self) -> str:
        parts = [f"{name} {size_text(size)}" for name, size in self.fixed]
        if self.tokens:
            held = size_text(self.tokens * self.token_bytes)
            parts.append(f"activations of {self.tokens:,} tokens {held}")
        parts.append(
            f"logits of {self.rows:,} rows x {self.vocab_size:,} ids in {self.dtype}, "
            f"{self.copies} times"
        )
        return f"{', '.join(parts)}: {size_text(self.bytes)}"


def memory_need(spec: EngineSpec, on_cpu: bool) -> Need | None:
    """What scoring takes, from the run file, config.json and the sizes of the weight files.

    Args:
        spec: The source.
        on_cpu: Whether it runs there.

    Returns:
        None where the engine does not know.

    Raises:
        ModelError: config.json is unreadable.
    """
    need: Need | None = _kind_of(spec).memory_need(spec, on_cpu)
    return need


def _kind_of(spec: EngineSpec) -> EngineKind:
    from extract.engine_kinds import ENGINES  # of the run file; the head is used without one

    return ENGINES[spec.section.engine]


def require_memory(need: Need, free_bytes: int, where: str) -> None:
    """Refuse what does not fit.

    Args:
        need: From `memory_need`.
        free_bytes: That can be taken.
        where: Whose they are, for the message: "CPU", "GPU 0".

    Raises:
        ConfigError: It does not fit; says which value would.
    """
    if need.bytes > free_bytes:
        raise ConfigError(
            f"not enough memory: {need.against(free_bytes, where)}",
            hint=_way_out(need, free_bytes),
        )


def check_memory(spec: EngineSpec) -> str:
    """Compare what a source needs with what is free now where it will run.

    Asks CUDA, which then holds some hundred MB of the GPU until the process ends: call it in the
    process that loads the model, or in one that ends soon.

    Returns:
        Both in words.

    Raises:
        ConfigError: It does not fit; says which value would.
    """
    import torch

    asked = _kind_of(spec).device(spec.section)
    on_cpu = asked == "cpu" or not torch.cuda.is_available()
    need = memory_need(spec, on_cpu)
    free, where = free_memory(spec, on_cpu)
    if need is None:
        return f"not known what it takes; free {size_text(free)} ({where})"
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

    A checkpoint that is quantised, or says nothing of its type, counts as it stands on disk.
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
    if "quantization_config" in config or not {saved, dtype} <= _ITEM_BYTES.keys():
        return size
    return size * _ITEM_BYTES[dtype] // _ITEM_BYTES[saved]


def free_memory(spec: EngineSpec, on_cpu: bool) -> tuple[int, str]:
    """Bytes that a source may take, and whose they are."""
    if on_cpu:
        return free_host_bytes(), "CPU"
    return _kind_of(spec).free_memory(spec)


def gpu_bytes(device: int) -> tuple[int, int]:
    """Free and all memory of a GPU."""
    import torch

    figures: tuple[int, int] = torch.cuda.mem_get_info(device)
    return figures


def free_host_bytes(root: Path = Path("/")) -> int:
    """The least of what the kernel calls available and what control groups leave to this process.

    Args:
        root: Where /proc and /sys stand.

    Returns:
        Bytes; `sys.maxsize` on a system that does not tell.
    """
    found = [_available(root), *_cgroup_rooms(root)]
    return max(min(size for size in found if size is not None), 0)


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
    """What an engine counts of a source, summed; arguments as in `Need`."""
    logits = rows * spec.model_vocab_size * copies * _ITEM_BYTES.get(dtype, 4)
    total = logits + tokens * token_bytes + sum(size for _, size in fixed)
    return Need(
        rows, spec.model_vocab_size, copies, total, option, dtype, tokens, token_bytes, fixed
    )


def token_bytes(config: dict[str, Any], dtype: str) -> int:
    """What a forward pass without gradients holds of a token: about four states, three of the MLP."""
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    return (4 * hidden + 3 * inner) * _ITEM_BYTES.get(dtype, 4)


def _way_out(need: Need, free: int) -> str:
    """The option that makes it fit, and its largest value that does."""
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
        return "lower extract.gpu_memory_utilization: logits come on top of what it reserves"
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


def _cgroup_rooms(root: Path) -> list[int]:
    """Limit less use of every control group above this process, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rooms = []
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
        # Inside a container the path may be the host's; its own group then stands at the mount.
        group = mount / os.path.normpath(path).lstrip("/")
        for folder in [group, *group.parents]:
            room = _cgroup_room(folder, *names)
            if room is not None:
                rooms.append(room)
            if folder == mount:
                break
    return rooms


def _cgroup_room(folder: Path, limit: str, use: str, cache: str) -> int | None:
    """Bytes that a control group leaves; file cache that the kernel would drop is not use."""
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / use).read_text(encoding="ascii"))
        figures = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    stat = dict(zip(figures[::2], figures[1::2], strict=False))
    return most - used + int(stat.get(cache, 0))
