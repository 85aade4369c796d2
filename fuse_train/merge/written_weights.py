"""Writes weights of a model folder piece by piece.

A safetensors file is 8 bytes with the length of its header, the header (JSON: name, dtype, shape and
offsets of each tensor), and the tensors' bytes in order. The library needs all tensors in memory; here
sizes are known before the first weight is merged, so the header can be written first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from fuse_train.merge.stored_weights import INDEX_FILE, SINGLE_FILE
from store_schema.manifest import FileRecord

MAX_FILE_BYTES = 5 * 10**9
"""Default limit of a file of weights; larger models are split into several files."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written.

    Args:
        name: Name in the model.
        dtype: safetensors' name of its dtype.
        shape: Its shape.
        num_bytes: Bytes of all its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def write_weights(
    folder: Path,
    tensors: Sequence[NewTensor],
    content: Callable[[str], Iterable[bytes | bytearray | memoryview]],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> dict[str, FileRecord]:
    """Write all tensors into one file, or into several and their index.

    Args:
        folder: Folder of the model.
        tensors: The tensors, in the order in which they are written.
        content: From a tensor's name to its bytes, in pieces.
        max_file_bytes: Most bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        Size and checksum of each file of weights.

    Raises:
        OSError: A file cannot be written.
    """
    parts = _parts(tensors, max_file_bytes)
    names = [SINGLE_FILE]
    if len(parts) > 1:
        names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
            "weight_map": {
                t.name: file for file, part in zip(names, parts, strict=True) for t in part
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {
        name: write_file(folder / name, part, content)
        for name, part in zip(names, parts, strict=True)
    }


def _parts(tensors: Sequence[NewTensor], max_file_bytes: int) -> list[list[NewTensor]]:
    parts: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.num_bytes > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.num_bytes
    return parts


def write_file(
    path: Path,
    tensors: Sequence[NewTensor],
    content: Callable[[str], Iterable[bytes | bytearray | memoryview]],
) -> FileRecord:
    """Write one file of weights.

    Args:
        path: Path of the file.
        tensors: Its tensors, in order.
        content: As in `write_weights`.

    Raises:
        OSError: The file cannot be written.
    """
    checksum, size = google_crc32c.Checksum(), 0
    with path.open("wb", buffering=0) as file:

        def write(piece: bytes | bytearray | memoryview) -> int:
            checksum.update(bytes(piece))
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
            return len(piece)

        size += write(_head(tensors))
        for tensor in tensors:
            written = sum(write(piece) for piece in content(tensor.name))
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name}: {written} bytes for {tensor.num_bytes}")
            size += written
    return FileRecord(size=size, crc32c=int.from_bytes(checksum.digest(), "big"))


def _head(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.num_bytes],
        }
        place += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
