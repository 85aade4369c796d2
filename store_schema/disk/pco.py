"""Zarr's codec `numcodecs.pcodec`, for writing and reading the arrays of a store.

It is stored under the name that zarr and numcodecs use, so any Zarr library with pcodec reads the
arrays. This class of our own is needed for writing because numcodecs 0.16 passes pcodec an option that
no longer exists; it is given to zarr as an object and not registered. Reading (`guards`) decompresses
into an array of known size, so hostile bytes cannot make it allocate more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

CODEC_NAME = "numcodecs.pcodec"
DTYPES = frozenset({"uint32", "int64", "float32", "float64"})
"""Types of the arrays of a store; pcodec supports more."""


def compress(values: npt.NDArray[Any], *, level: int, try_delta: bool) -> bytes:
    """A 1-D array as the bytes of a pcodec standalone file."""
    config = ChunkConfig(
        compression_level=level,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.auto() if try_delta else DeltaSpec.no_op(),
    )
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), config))


def decompress_into(data: bytes, out: npt.NDArray[Any]) -> None:
    """Undo `compress`.

    Args:
        data: A pcodec standalone file.
        out: Contiguous array of the expected length and type, which is filled.

    Raises:
        ValueError: `data` is no such file, or has another length or type.
    """
    if out.dtype.name not in DTYPES:
        raise ValueError(f"pcodec is not used for {out.dtype.name}")
    try:
        progress = standalone.simple_decompress_into(data, out)
    except Exception as error:
        raise ValueError(f"pcodec refuses the bytes: {error}") from error
    except BaseException as error:
        # A Rust panic is a BaseException, which `except Exception` does not catch.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"pcodec failed on the bytes: {error}") from error
    if progress.n_processed != len(out) or not progress.finished:
        raise ValueError(f"the pcodec file does not have {len(out)} values")


@dataclass(frozen=True)
class PcoCodec(ArrayBytesCodec):
    """Compresses a chunk; see the module.

    Args:
        level: 0 to 12; a higher level is smaller and slower to write.
        delta_spec: "auto" lets pcodec try differences of neighbours; "none" does not.
    """

    level: int = 8
    delta_spec: Literal["auto", "none"] = "none"
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        """The codec's entry in the array metadata."""
        config = {"level": self.level, "mode_spec": "classic", "delta_spec": self.delta_spec}
        return {"name": CODEC_NAME, "configuration": config}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        data = await asyncio.to_thread(
            compress,
            np.asarray(chunk_data.as_ndarray_like()),
            level=self.level,
            try_delta=self.delta_spec == "auto",
        )
        return chunk_spec.prototype.buffer.from_bytes(data)
