"""Model folders: from a hub name to a local folder, and what its config says before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store_schema.errors import ModelError
from store_schema.weight_files import require_no_adapter

if TYPE_CHECKING:
    from store_schema.config import ModelRef

_NOT_NEEDED = ["*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.pth", "original/*", "onnx/*"]


def resolve_model(ref: ModelRef) -> Path:
    """The local folder of a model; a hub model is taken from the cache, else downloaded.

    Raises:
        ModelError: There is no such folder, or the hub has or gives no such model.
    """
    folder = Path(ref.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            require_no_adapter(folder)
            raise ModelError("model folder has no config.json", where=ref.model)
        return folder
    if ref.model.startswith((".", "/", "~")) or ref.model.count("/") > 1:
        raise ModelError("model folder not found", where=ref.model)
    return _from_hub(ref)


def _from_hub(ref: ModelRef) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                ref.model,
                revision=ref.revision,
                ignore_patterns=_NOT_NEEDED,
                local_files_only=local_files_only,
            )
        )

    try:
        try:
            return snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            return snapshot(local_files_only=False)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            "model is neither a folder nor to be had from the hub",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:160]}",
            hint="check name, revision and network, or give a local folder",
        ) from error


def model_config(folder: Path) -> dict[str, Any]:
    """config.json, the text part of a model with several.

    Raises:
        ModelError: It is missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "model's config is unreadable", where=path, got=str(error)[:160]
        ) from error
    if not isinstance(config, dict):
        raise ModelError("model's config is not an object", where=path)
    text = config.get("text_config")
    return config | text if isinstance(text, dict) else config


def max_positions(config: dict[str, Any]) -> int | None:
    """Most tokens the model was made to read, as its config says; None where it says nothing."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def resolved_dtype(ref: ModelRef, config: dict[str, Any]) -> str:
    """torch dtype by name: the run file's, else the checkpoint's, else float32.

    Engines must not choose by themselves: 'auto' means another type to each of them.
    """
    if ref.dtype != "auto":
        return ref.dtype.removeprefix("torch.")
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(found).removeprefix("torch.")
