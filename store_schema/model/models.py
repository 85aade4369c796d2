"""Find a model's local folder, downloading it if needed, and read its config without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store_schema.errors import LogitfuseError, ModelError
from store_schema.model.gguf_file import unpack
from store_schema.model.lfs_pointer import require_no_pointer
from store_schema.model.weight_files import require_no_adapter, require_weights

if TYPE_CHECKING:
    from store_schema.config import ModelRef

_NOT_NEEDED = ["*.msgpack", "*.h5", "*.onnx", "*.gguf", "*.pth", "original/*", "onnx/*"]
_TOKENIZER_FILES = [
    "tokenizer*", "*token*.json", "config.json", "chat_template*", "additional_chat_templates/*",
    "tekken.json", "vocab.*", "merges.txt", "*.model", "*.py",
]  # fmt: skip


_WEIGHTS = ("*.safetensors", "*.bin")


def resolve_model(ref: ModelRef) -> Path:
    """The local folder of a model. A hub model is taken from the cache or downloaded; a GGUF file is
    unpacked on the first call.

    Raises:
        ModelError: There is no such folder, or the model cannot be downloaded.
    """
    if is_gguf(ref):
        return _unpacked(ref)
    folder = local_folder(ref)
    if folder is None:
        return _from_hub(ref)
    if not (folder / "config.json").is_file():
        require_no_adapter(folder)
        ggufs = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))[:4])
        raise ModelError(
            "model folder has no config.json",
            where=ref.model,
            got=ggufs or None,
            hint="name the GGUF file with gguf_file" if ggufs else None,
        )
    return folder


def local_folder(ref: ModelRef, *, name: str | None = None) -> Path | None:
    """The local folder that `ref.model` names; None where it can only be a name on the hub.

    Args:
        ref: The model in the run file.
        name: Its name in the run, for messages.

    Raises:
        ModelError: `ref.model` is a file, or a path to a folder that does not exist.
    """
    folder = Path(ref.model)
    of = "" if name is None else f" of {name}"
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"`model`{of} is a file, not a model folder",
            where=ref.model,
            hint=_instead_of_file(folder, ref),
        )
    if ref.model.startswith((".", "/", "~")) or ref.model.count("/") > 1:
        raise ModelError(f"model folder{of} not found", where=ref.model)
    return None


def _instead_of_file(file: Path, ref: ModelRef) -> str:
    if ref.gguf_file is None:
        return f"give the folder with config.json and weights: {file.parent}"
    if file.suffix == ".gguf":
        return f"remove gguf_file ({ref.gguf_file}), or give the folder as model: {file.parent}"
    return f"give the folder with {ref.gguf_file}, such as {file.parent}"


def local_copy(ref: ModelRef) -> Path | None:
    """The folder of a model that is complete on this machine, with weights; downloads nothing.

    Args:
        ref: The model in the run file; a local GGUF file is unpacked on the first call.

    Returns:
        The folder; None for a model that is not on this machine, incomplete or damaged.
    """
    try:
        if is_gguf(ref):
            is_local = Path(ref.model, ref.gguf_file or "").is_file()
        else:
            is_local = Path(ref.model).is_dir()
        folder = resolve_model(ref) if is_local else _cached(ref)
        if folder is None or not (folder / "config.json").is_file():
            return None
        require_weights(folder)
        model_config(folder)
    except LogitfuseError:
        return None
    return folder


def _cached(ref: ModelRef) -> Path | None:
    """The cached snapshot of a hub model, perhaps incomplete; None where there is none."""
    if is_gguf(ref):
        return None  # not worth unpacking
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ref.model, revision=ref.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def resolve_tokenizer(ref: ModelRef, *, name: str) -> Path:
    """The local folder of a model's tokenizer files; of a hub model only these are downloaded.

    Args:
        ref: The model in the run file.
        name: Its name in the run, for messages.

    Raises:
        ModelError: There is no such folder, or the model cannot be downloaded.
    """
    ref = local_ref(ref)
    needed = ("tokenizer*", "tekken.json")
    return local_folder(ref, name=name) or _from_hub(ref, only=_TOKENIZER_FILES, needed=needed)


def is_gguf(ref: ModelRef) -> bool:
    """Whether the model is a GGUF file."""
    return ref.gguf_file is not None or ref.model.endswith(".gguf")


def local_ref(ref: ModelRef) -> ModelRef:
    """A reference that transformers can load: for a GGUF file its unpacked folder, else `ref` itself.

    Raises:
        ModelError: The GGUF file is missing or cannot be unpacked.
    """
    if not is_gguf(ref):
        return ref
    return with_folder(ref, _unpacked(ref))


def with_folder(ref: ModelRef, folder: Path) -> ModelRef:
    """The same reference with its files from a folder, without revision and GGUF file; all other
    options of the run file stay."""
    return ref.model_copy(update={"model": str(folder), "revision": None, "gguf_file": None})


def _unpacked(ref: ModelRef) -> Path:
    if ref.gguf_file is None:
        return unpack(Path(ref.model), ref.dtype)
    folder = local_folder(ref)
    if folder is None:
        files = [ref.gguf_file, "tokenizer*", "*.jinja", "special_tokens*"]
        folder = _from_hub(ref, only=files, needed=(ref.gguf_file,))
    return unpack(folder / ref.gguf_file, ref.dtype, tokenizer_folder=folder)


def _from_hub(
    ref: ModelRef, *, only: list[str] | None = None, needed: tuple[str, ...] = _WEIGHTS
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                ref.model,
                revision=ref.revision,
                allow_patterns=only,
                ignore_patterns=None if only else _NOT_NEEDED,
                local_files_only=local_files_only,
            )
        )

    try:
        try:
            cached = snapshot(local_files_only=True)
            # A cached snapshot may have only a few of the model's files.
            if any(True for pattern in needed for _ in cached.glob(pattern)):
                return cached
        except LocalEntryNotFoundError:
            pass
        return snapshot(local_files_only=False)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            "model is neither a folder nor available from the hub",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:160]}",
            hint="check name, revision and network, or give a local folder",
        ) from error


def model_config(folder: Path, *, whole: bool = False) -> dict[str, Any]:
    """config.json as a dict; values of `text_config` (models of several parts) replace those outside
    it.

    Args:
        folder: The model's folder.
        whole: Return the dict as it is in the file instead.

    Raises:
        ModelError: It is missing, a pointer of git-lfs, or not JSON.
    """
    path = folder / "config.json"
    try:
        if path.exists():
            require_no_pointer(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "model's config is unreadable", where=path, got=str(error)[:160]
        ) from error
    if not isinstance(config, dict):
        raise ModelError("model's config is not an object", where=path)
    text = config.get("text_config")
    return config | text if isinstance(text, dict) and not whole else config


def config_folder(ref: ModelRef) -> Path | None:
    """The folder with config.json; of a hub model no other file is downloaded.

    Returns:
        The folder; None for a folder without config.json (only a tokenizer).

    Raises:
        ModelError: There is no such folder, or the model cannot be downloaded.
    """
    ref = local_ref(ref)
    folder = local_folder(ref)
    if folder is not None:
        return folder if (folder / "config.json").is_file() else None
    from transformers.utils import cached_file

    try:
        path = cached_file(ref.model, "config.json", revision=ref.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            "model is neither a folder nor available from the hub",
            where=ref.model,
            got=str(error)[:160],
            hint="check name, revision and network, or give a local folder",
        ) from error
    return None if path is None else Path(path).parent


def model_positions(ref: ModelRef) -> int | None:
    """`max_positions` of a model's config.json; None where there is no config.json.

    Raises:
        ModelError: See `config_folder` and `model_config`.
    """
    folder = config_folder(ref)
    return None if folder is None else max_positions(model_config(folder))


def max_positions(config: dict[str, Any]) -> int | None:
    """The model's context length in tokens by its config; None where the config has none.

    Args:
        config: The text part of config.json, or of a loaded model's config, as a dict.
    """
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def resolved_dtype(ref: ModelRef, config: dict[str, Any]) -> str:
    """Name of the torch dtype: the run file's, else the checkpoint's, else float32.

    Engines are always given a dtype, because 'auto' means a different one to each of them.
    """
    if ref.dtype != "auto":
        return ref.dtype
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype).removeprefix("torch.")
