"""Check a model folder's weight files by names, sizes and first bytes, before a library loads them.

For a file that is missing or incomplete, loaders raise errors of their format that do not tell what is
wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from store_schema.errors import ModelError
from store_schema.model.lfs_pointer import FETCH, is_pointer, require_no_pointer

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt")
_IN_PARTS = "its weights are in `parts/` (train.parallel: fsdp2): give `final/` of that run"
_INDEX = "*.index.json"
_ADAPTER = "adapter_config.json"
_CONFIGS = ("config.json", "generation_config.json")
_SAFETENSORS_HEAD_BYTES = 8


def require_weights(folder: Path) -> None:
    """Refuse a model folder whose weights are missing or damaged.

    Args:
        folder: A local model folder with a config.json.

    Raises:
        ModelError: An adapter without its model, a pointer of git-lfs in place of a file, no weights, a
            missing shard, or a truncated safetensors file.
    """
    require_no_adapter(folder)
    for name in _CONFIGS:
        if (folder / name).is_file():
            require_no_pointer(folder / name)
    absent = absent_weights(folder)
    if absent is not None:
        raise absent
    require_no_damage(folder)


def absent_weights(folder: Path) -> ModelError | None:
    """Check that all of a folder's weights were fetched.

    Args:
        folder: A local model folder.

    Returns:
        An error on what is missing (all weights, a shard, or the content behind a git-lfs pointer),
        for the caller to raise; None if nothing is.
    """
    paths = _weight_files(folder)
    try:
        for path in paths:
            require_no_pointer(path)
        for index in sorted(folder.glob(_INDEX)):
            _require_shards(index)
    except ModelError as error:
        return error
    if paths:
        return None
    return ModelError(
        "model folder has no weights",
        where=folder,
        expected="model.safetensors, or shards with their index",
        hint=_IN_PARTS if (folder / "parts").is_dir() else FETCH,
    )


def require_no_damage(folder: Path) -> None:
    """Refuse damaged or truncated safetensors files; missing files are no error here.

    Raises:
        ModelError: One is damaged or truncated.
    """
    for path in _weight_files(folder):
        if path.suffix == ".safetensors" and not is_pointer(path):
            safetensors_head(path)


def require_no_adapter(folder: Path) -> None:
    """Refuse a folder of adapter weights, which are not a model.

    Raises:
        ModelError: It is one.
    """
    if (folder / _ADAPTER).is_file():
        raise ModelError(
            "folder has an adapter, not a model",
            where=folder,
            got=_ADAPTER,
            hint="merge it into its base model (peft's merge_and_unload) and give the merged folder",
        )


def _weight_files(folder: Path) -> list[Path]:
    paths = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.name not in _NOT_WEIGHTS)


def _require_shards(index: Path) -> None:
    require_no_pointer(index)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "index of weights is unreadable", where=index, got=str(error)[:160], hint=FETCH
        ) from error
    missing = sorted(str(name) for name in names if not (index.parent / str(name)).is_file())
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} files of weights are missing",
            where=index.parent,
            got=", ".join(missing[:3]) + (" and more" if len(missing) > 3 else ""),
            hint=FETCH,
        )


def safetensors_head(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON header of a safetensors file: dtype, shape and data_offsets of each tensor, by name.

    Such a file has the header's length in 8 bytes, the header, and then all tensors.

    Raises:
        ModelError: The file is damaged or truncated.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_SAFETENSORS_HEAD_BYTES), "little")
            if not 0 < length <= size - _SAFETENSORS_HEAD_BYTES:
                raise ValueError(f"its header would be {length} bytes long")
            head: dict[str, dict[str, Any]] = json.loads(file.read(length))
        head.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in head.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            "file of weights is damaged or cut short",
            where=path,
            got=f"{size} bytes ({str(error)[:120]})",
            hint=FETCH,
        ) from error
    expected = _SAFETENSORS_HEAD_BYTES + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            "file of weights is damaged or cut short",
            where=path,
            expected=f"{expected} bytes",
            got=size,
            hint=FETCH,
        )
    return head
