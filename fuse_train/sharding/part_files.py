"""Tensors whose rows are spread over processes, written by each process into a file of its own.

    parts/00000-of-00004.safetensors   rows of process 0: `NAME`, `NAME/STATE` for the optimizer's
    parts/parts.json                   sealed: shape, dtype and row boundaries of every tensor

Why not torch.distributed.checkpoint: its `.metadata` is a pickle, and its safetensors writer does not
hold the optimizer's plain values. Rows are enough here, since `fully_shard` cuts the first axis alone:
any number of processes reads its rows from whatever files have them. Checksums are those of the folder
(`fuse_train.disk.checksums`).

A tensor that is not spread (the selector's state, counters) is in the file of process 0. A number
(shape []) is stored as one row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from fuse_train.merge.written_weights import NewTensor, write_file
from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import CorruptionError

PARTS_FOLDER = "parts"
INDEX_FILE = "parts.json"
_PIECE_BYTES = 16 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""safetensors' names of dtypes."""


class SpreadTensor(StrictModel):
    """A tensor of parts.json."""

    shape: tuple[int, ...]
    dtype: str
    bounds: tuple[int, ...]
    """Process r has rows bounds[r] to bounds[r + 1]."""


class PartsRecord(StrictModel):
    """parts.json."""

    schema_version: int = SCHEMA_VERSION
    num_processes: int = Field(gt=0)
    tensors: dict[str, SpreadTensor]
    """By name; state of the optimizer as `PARAMETER/STATE`."""
    plain: dict[str, Any] = Field(default_factory=dict)
    """State of the optimizer that is no tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """What this process has of a tensor.

    Args:
        rows: Its rows; for a tensor of shape [] one row.
        shape: Of the whole tensor.
        spread: Whether other processes have further rows; else all have the same.
    """

    rows: torch.Tensor
    shape: tuple[int, ...]
    spread: bool


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of the optimizer's state in a checkpoint.

    Args:
        shape: Of the whole.
        read: From its first row and the one behind its last to these rows.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor as they are spread."""
    return shape[0] if shape else 1


def row_bounds(count: int, processes: int) -> tuple[int, ...]:
    """Where `fully_shard` cuts `count` rows: parts of one size, the last ones smaller or empty."""
    size = math.ceil(count / processes)
    return tuple(min(r * size, count) for r in range(processes + 1))


def part_of(tensor: torch.Tensor) -> Part:
    """This process's part of a tensor: of a DTensor its rows, else the whole."""
    shape = tuple(tensor.shape)
    local = getattr(tensor, "to_local", None)
    rows = tensor.detach() if local is None else local().detach()
    return Part(rows if shape else rows.reshape(1), shape, spread=local is not None)


def part_file(process: int, num_processes: int) -> str:
    """Name of a process's file."""
    return f"{process:05d}-of-{num_processes:05d}.safetensors"


def in_parts(folder: Path) -> bool:
    """Whether a folder of weights is in parts."""
    return (folder / PARTS_FOLDER).is_dir()


def write_part(
    folder: Path, parts: Mapping[str, Part], process: int, num_processes: int
) -> dict[str, SpreadTensor]:
    """Write this process's file into `folder`/parts, which must exist, a tensor at a time.

    Returns:
        The tensors for `PartsRecord`, the same in all processes.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, SpreadTensor] = {}
    own: list[NewTensor] = []
    for name, part in parts.items():
        total = num_rows(part.shape)
        bounds = row_bounds(total, num_processes) if part.spread else (0, *(total,) * num_processes)
        dtype = DTYPE_NAMES[part.rows.dtype]
        tensors[name] = SpreadTensor(shape=part.shape, dtype=dtype, bounds=bounds)
        size = (bounds[process + 1] - bounds[process], *part.shape[1:])
        num_bytes = math.prod(size) * part.rows.element_size()
        own.append(NewTensor(name, dtype, size, num_bytes))
    sizes = {tensor.name: tensor.num_bytes for tensor in own}
    path = folder / PARTS_FOLDER / part_file(process, num_processes)
    write_file(path, own, lambda name: pieces(parts[name].rows) if sizes[name] else ())
    return tensors


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order, on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(flat), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES]


def write_index(folder: Path, record: PartsRecord) -> None:
    """Write parts.json."""
    (folder / PARTS_FOLDER / INDEX_FILE).write_bytes(seal(record))


class StoredParts:
    """Tensors that `write_part` wrote, read by rows. A context manager, which closes the files.

    Args:
        folder: Folder that has `parts/`.
        hint: What to do when it is damaged.

    Raises:
        CorruptionError: The index is gone or damaged.
    """

    def __init__(self, folder: Path, *, hint: str = "delete the folder") -> None:
        self._folder, self._hint = folder / PARTS_FOLDER, hint
        path = self._folder / INDEX_FILE
        if not path.is_file():
            raise CorruptionError("parts without an index", where=path, hint=hint)
        self.record = unseal(PartsRecord, path.read_bytes(), where=str(path), hint=hint)
        self._open, self._files = ExitStack(), dict[int, Any]()
        self._state = _by_parameter(self.record.tensors)
        self._plain = _by_parameter(self.record.plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (None: to the end) of a tensor; shape [] for one of that shape.

        Raises:
            CorruptionError: A file is gone, cut short or has other tensors.
        """
        tensor = self.record.tensors[name]
        stop = num_rows(tensor.shape) if stop is None else stop
        rows = torch.empty((stop - start, *tensor.shape[1:]), dtype=_DTYPES[tensor.dtype])
        for process in range(self.record.num_processes):
            first, end = tensor.bounds[process : process + 2]
            low, high = max(first, start), min(end, stop)
            if low < high:
                rows[low - start : high - start] = self._rows(
                    process, name, low - first, high - first
                )
        return rows if tensor.shape else rows.reshape(())

    def _rows(self, process: int, name: str, start: int, stop: int) -> torch.Tensor:
        path = self._folder / part_file(process, self.record.num_processes)
        expected = self.record.tensors[name]
        shape = (expected.bounds[process + 1] - expected.bounds[process], *expected.shape[1:])
        try:
            if process not in self._files:
                opened = safe_open(path, framework="pt")
                self._files[process] = self._open.enter_context(opened)
            stored = self._files[process].get_slice(name)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() != expected.dtype:
                got = f"{stored.get_dtype()} {stored.get_shape()}"
                raise ValueError(f"{got} for {expected.dtype} {list(shape)}")
            rows: torch.Tensor = stored[start:stop]
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise CorruptionError(
                "part unreadable", where=path, got=f"{name}: {error}", hint=self._hint
            ) from error
        return rows

    def state_of(self, parameter: str, number: int) -> dict[str, StateTensor | Any]:
        """The optimizer's state of a parameter: tensors to be read, other values as they are.

        Args:
            parameter: Its name.
            number: Among the optimizer's parameters; not needed here.
        """
        found = {key: self.record.plain[name] for key, name in self._plain[parameter]}
        return found | {
            key: StateTensor(self.record.tensors[name].shape, partial(self.read, name))
            for key, name in self._state[parameter]
        }


def _by_parameter(names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of the key and the whole name of `PARAMETER/KEY`, by parameter."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        parameter, slash, key = name.rpartition("/")
        if slash:
            found[parameter].append((key, name))
    return found
