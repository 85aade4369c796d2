"""GGUF files as model folders: unpacked once into a cache, and used by every stage as a plain folder.

    <cache>/gguf/<file's name>-<content>-<dtype>/   config.json, model.safetensors, tokenizer.json,
                                                    tokenizer_config.json, gguf.json (its origin)

The cache is that of `store_schema.disk.cache`. A folder is written under another name and renamed, so
it is complete or absent. Workers that need the same file at the same time wait for the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from store_schema.disk.cache_folder import cache_folder
from store_schema.dtypes import DTYPES
from store_schema.errors import ConfigError, ModelError, StorageError
from store_schema.model.gguf_tokenizer import adds_bos, as_trained
from store_schema.model.lfs_pointer import require_no_pointer

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the folders made here: raised when the same file would give another folder."""
_HEAD_BYTES, _SAMPLE_BYTES, _NUM_SAMPLES = 64 << 20, 1 << 20, 16
_STALE_S = 3600.0
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_UNREADABLE = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, OSError),
    *(RuntimeError, NotImplementedError, ImportError, OverflowError, MemoryError),
)
"""Exceptions that readers of the format raise for a damaged file or an unknown format version."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file has besides its weights.

    Args:
        metadata: All fields except the scores of pieces.
        dtype: Name of the torch dtype for the weights: the file's float32 or float16, or bfloat16 for
            all others.
    """

    metadata: dict[str, Any]
    dtype: str


def unpack(file: Path, dtype: str = "auto", *, tokenizer_folder: Path | None = None) -> Path:
    """The model folder of a GGUF file, made on the first call.

    Args:
        file: GGUF file.
        dtype: Name of the torch dtype of the weights; 'auto' takes the file's own if it is not
            quantised, else bfloat16.
        tokenizer_folder: If it has a tokenizer.json, its tokenizer files replace the tokenizer in the
            GGUF file.

    Raises:
        ConfigError: The package `gguf` is not installed.
        ModelError: The file is missing or damaged, or transformers cannot read its architecture.
        TokenizerError: The kind of its tokenizer is not known here.
        StorageError: The cache cannot be written.
    """
    if not file.is_file():
        raise ModelError("GGUF file not found", where=file)
    _require_magic(file)
    own = tokenizer_folder is not None and (tokenizer_folder / "tokenizer.json").is_file()
    beside = tokenizer_folder if own else None
    folder = cache_folder() / "gguf" / f"{file.stem}-{_digest(file, beside)}-{dtype}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(folder):
                if not folder.is_dir():
                    _make(file, folder, dtype, beside)
        except OSError as error:
            raise StorageError(
                "GGUF file cannot be unpacked into the cache",
                where=folder,
                got=str(error),
                hint="free space there, or set LOGITFUSE_CACHE to another folder",
            ) from error
    return folder


def _require_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ModelError("GGUF file cannot be read", where=file, got=str(error)) from error
    if start != b"GGUF":
        require_no_pointer(file)
        raise ModelError(
            "not a GGUF file",
            where=file,
            expected="GGUF as its first bytes",
            got=repr(start)[1:] or "nothing",
        )


def _digest(file: Path, beside: Path | None) -> str:
    """Short digest of all that determines the folder's content: the file's head with the metadata,
    evenly spaced samples of the rest, its size, and the version of transformers."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT} {version('transformers')} {size}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_HEAD_BYTES))
        for i in range(_NUM_SAMPLES if size > _HEAD_BYTES else 0):
            stream.seek((size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    for path in [beside / name for name in _TOKENIZER_FILES] if beside is not None else []:
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, if the file system supports locks; without, the first rename wins."""
    import fcntl

    with folder.with_name(f".{folder.name}.lock").open("w") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(file: Path, folder: Path, dtype: str, beside: Path | None) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.part*"):
        if time.time() - leftover.stat().st_mtime > _STALE_S:
            shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.part{os.getpid()}-{time.time_ns()}")
    part.mkdir()
    started = time.monotonic()
    logger.info("unpacking %s into %s (once)", file, folder)
    try:
        header = read_header(file)
        kept = header.dtype if dtype == "auto" else dtype.removeprefix("torch.")
        if beside is None:
            _save_tokenizer(file, header, part)
        else:
            for name in _TOKENIZER_FILES:
                if (beside / name).is_file():
                    shutil.copy(beside / name, part / name)
        _save_weights(file, kept, part)
        record = {"file": file.name, "dtype": kept, "transformers": version("transformers")}
        (part / "gguf.json").write_text(json.dumps(record, indent=1) + "\n")
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another worker was first
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    logger.info("unpacked %s in %.0f s", file.name, time.monotonic() - started)


def read_header(file: Path) -> GgufHeader:
    """Read and check everything but the weights.

    Raises:
        ConfigError: The package `gguf` is not installed.
        ModelError: The file is truncated, damaged, or one part of several.
    """
    if find_spec("gguf") is None:
        raise ConfigError(
            "the package gguf is not installed, which reads GGUF files",
            where=file,
            hint="pip install gguf",
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name != "tokenizer.ggml.scores"
        }
        ends = [int(t.data_offset) + int(t.n_bytes) for t in reader.tensors]
        kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    except _UNREADABLE as error:
        raise _damaged(file, error) from error
    if max(ends, default=0) > file.stat().st_size:
        raise ModelError(
            "GGUF file is truncated",
            where=file,
            expected=f"{max(ends):,} bytes",
            got=f"{file.stat().st_size:,}",
            hint="get it again",
        )
    if int(metadata.get("split.count") or 1) > 1:
        raise ModelError(
            "GGUF file is one part of several",
            where=file,
            hint="join them (llama-gguf-split --merge)",
        )
    plain = {"F32": "float32", "F16": "float16"}
    return GgufHeader(
        metadata, plain.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"
    )


def _damaged(file: Path, error: BaseException) -> ModelError:
    return ModelError(
        "GGUF file is damaged or truncated",
        where=file,
        got=f"{type(error).__name__}: {str(error)[:160]}",
        hint="get it again",
    )


def _save_weights(file: Path, dtype: str, folder: Path) -> None:
    import transformers

    if dtype not in DTYPES:
        raise ModelError("unknown dtype", where=file, got=dtype, expected=" | ".join(DTYPES))
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=transformers.GgufConfig(gguf_file=file.name, dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise ModelError(
            "GGUF file cannot be read by transformers",
            where=file,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="give the model's own folder instead",
        ) from error
    if report["missing_keys"]:
        raise ModelError(
            f"GGUF file lacks {len(report['missing_keys'])} weights",
            where=file,
            got=", ".join(sorted(report["missing_keys"])[:3]),
            hint="they would be random; give a complete file",
        )
    model.save_pretrained(folder)


def _save_tokenizer(file: Path, header: GgufHeader, folder: Path) -> None:
    from transformers import AutoTokenizer

    metadata = header.metadata
    try:
        made = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        spec = json.loads(made.backend_tokenizer.to_str())
    except _UNREADABLE as error:
        raise ModelError(
            "tokenizer of the GGUF file cannot be read by transformers",
            where=file,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="put the model's own tokenizer.json beside it and give folder and gguf_file",
        ) from error
    spec = as_trained(spec, metadata, where=str(file))
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "padding", "unknown"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and int(index) < len(tokens):
            short = {"padding": "pad", "unknown": "unk"}.get(name, name)
            config[f"{short}_token"] = tokens[int(index)]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
