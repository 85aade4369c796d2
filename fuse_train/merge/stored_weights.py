"""Weights of a checkpoint read piece by piece, from one safetensors file or several.

safetensors' own reader maps files into memory: pages that were read count as the process's memory until
the system needs them, so that limits (cgroups, ulimit) may end a merge of large models. Here each piece
is read into a buffer of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from store_schema.errors import ModelError
from store_schema.model.weight_files import require_weights, safetensors_head

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
WHOLE_NUMBERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of dtypes that are copied, not merged: buffers such as masks and counters."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is stored.

    Args:
        path: Path of its file.
        dtype: safetensors' name of its dtype.
        shape: Its shape.
        offset: Position of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def element_bytes(self) -> int:
        return FLOATS[self.dtype].itemsize if self.is_float else WHOLE_NUMBERS[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.element_bytes

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def row_length(self) -> int:
        """Elements of the last axis."""
        return self.shape[-1] if self.shape else 1


class StoredWeights:
    """All tensors of a model folder. A context manager, which closes the files at its end.

    Args:
        folder: Folder with safetensors files.
        name: Name of the model, for messages.

    Raises:
        ModelError: No safetensors, a file that is missing or damaged, or a dtype that cannot be merged.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        require_weights(folder)
        self.folder, self.name = folder, name
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._open = ExitStack()
        for path in _weight_files(folder, name):
            self.tensors |= _tensors_of(path, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def read(self, tensor: str, start: int, count: int) -> torch.Tensor:
        """Elements of a float tensor from element `start` on, flat [count], in the stored dtype.

        Raises:
            ModelError: The file is too short.
        """
        stored = self.tensors[tensor]
        values = torch.empty(count, dtype=FLOATS[stored.dtype])
        self._fill(stored, start * stored.element_bytes, values.view(torch.uint8).numpy().data)
        return values

    def read_bytes(self, tensor: str, start: int, count: int) -> bytearray:
        """`count` bytes of a tensor of any dtype, from its byte `start` on.

        Raises:
            ModelError: The file is too short.
        """
        buffer = bytearray(count)
        self._fill(self.tensors[tensor], start, memoryview(buffer))
        return buffer

    def _fill(self, stored: StoredTensor, start: int, buffer: memoryview) -> None:
        if stored.path not in self._files:
            opened = self._open.enter_context(stored.path.open("rb", buffering=0))
            self._files[stored.path] = opened
        file, done = self._files[stored.path], 0
        file.seek(stored.offset + start)
        while done < len(buffer):
            got = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not got:
                raise ModelError(f"file of weights of {self.name} ends too soon", where=stored.path)
            done += got


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Files that loaders would read: the single file, or those that the index names."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"weights of {name} are no safetensors",
            where=folder,
            expected=f"{SINGLE_FILE}, or shards with {INDEX_FILE}",
            got=", ".join(sorted(path.name for path in folder.iterdir())[:6]),
            hint="load the model with transformers and save it again",
        )
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    return [folder / str(file) for file in sorted(set(index["weight_map"].values()))]


def _tensors_of(path: Path, name: str) -> dict[str, StoredTensor]:
    head = safetensors_head(path)
    first = path.stat().st_size - max((e["data_offsets"][1] for e in head.values()), default=0)
    return dict(_checked(path, name, head, first))


def _checked(
    path: Path, name: str, head: dict[str, dict[str, Any]], first: int
) -> Iterator[tuple[str, StoredTensor]]:
    for tensor, entry in head.items():
        dtype = str(entry["dtype"])
        if dtype not in FLOATS and dtype not in WHOLE_NUMBERS:
            raise ModelError(
                f"weights of {name} are in a dtype that cannot be merged",
                where=path,
                expected=", ".join(FLOATS),
                got=f"{tensor} in {dtype}",
                hint="give the model as it was before it was quantised",
            )
        begin, end = entry["data_offsets"]
        stored = StoredTensor(path, dtype, tuple(entry["shape"]), first + begin)
        if end - begin != stored.num_bytes:
            raise ModelError(
                f"file of weights of {name} is damaged",
                where=path,
                expected=f"{stored.num_bytes} bytes of {tensor}",
                got=end - begin,
                hint="fetch it again",
            )
        yield tensor, stored
