"""Packing of whole numbers to bits, in the two ways that DistillKit has, and its types of floats.

Shapes: R rows, N numbers of a row, C bytes of a row, W words of a row.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FloatName = Literal["float16", "bfloat16", "float32", "float64"]
FLOATS: tuple[FloatName, ...] = get_args(FloatName)
WORD_BITS = 64


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` numbers of `bits` each, padded to whole bytes."""
    return -(-count * bits // 8)


def pack_bits(numbers_RN: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Each row's numbers one after the other, the highest bit first, padded with zeros to whole bytes.

    Args:
        numbers_RN: Not negative, below 2 ** bits.
        bits: Of a number, 1 to 63.

    Returns:
        [R, C].
    """
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint64)
    ones = (numbers_RN.astype(np.uint64)[:, :, None] >> shifts) & np.uint64(1)
    return np.packbits(ones.astype(np.uint8).reshape(len(numbers_RN), -1), axis=1)


def unpack_bits(packed_RC: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int64]:
    """[R, N] the `count` numbers of each row: the inverse of `pack_bits`."""
    ones = np.unpackbits(packed_RC, axis=1, count=bits * count).reshape(-1, count, bits)
    numbers_RN = np.zeros((len(packed_RC), count), np.int64)
    for bit in range(bits):
        numbers_RN <<= 1
        numbers_RN |= ones[:, :, bit]
    return numbers_RN


def row_words(count: int, bits: int) -> int:
    """64-bit words of a row of `count` numbers, none of which lies in two words."""
    return -(-count // (WORD_BITS // bits))


def pack_words(numbers_RN: Array, bits: int) -> npt.NDArray[np.uint64]:
    """[R, W]: as many numbers in each word as fit whole, the first in its lowest bits."""
    each = WORD_BITS // bits
    words = row_words(numbers_RN.shape[1], bits)
    padded = np.zeros((len(numbers_RN), words * each), np.uint64)
    padded[:, : numbers_RN.shape[1]] = numbers_RN
    shifts = np.arange(each, dtype=np.uint64) * np.uint64(bits)
    packed: npt.NDArray[np.uint64] = np.bitwise_or.reduce(
        padded.reshape(-1, words, each) << shifts, axis=2
    )
    return packed


def unpack_words(packed_RW: Array, bits: int, count: int) -> npt.NDArray[np.int64]:
    """[R, N]: the inverse of `pack_words`."""
    shifts = np.arange(WORD_BITS // bits, dtype=np.uint64) * np.uint64(bits)
    mask = np.uint64((1 << bits) - 1)
    numbers = (packed_RW.astype(np.uint64)[:, :, None] >> shifts) & mask
    return numbers.reshape(len(packed_RW), -1)[:, :count].astype(np.int64)


# ------------------------------------------------------------------------------- floats


def float_bytes(name: FloatName) -> int:
    """Bytes of a number."""
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


def rounded(values: Array, name: FloatName) -> npt.NDArray[np.float64]:
    """The values as that type has them."""
    if name == "bfloat16":
        return from_bfloat16(to_bfloat16(values)).astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype(name).astype(np.float64)


def pack_floats(values_RN: Array, name: FloatName) -> npt.NDArray[np.uint8]:
    """[R, C] little-endian bytes of each row's numbers."""
    if name == "bfloat16":
        stored: Array = to_bfloat16(values_RN)
    else:
        stored = values_RN.astype(np.dtype(name).newbyteorder("<"))
    return as_bytes(stored)


def unpack_floats(packed_RC: npt.NDArray[np.uint8], name: FloatName) -> npt.NDArray[np.float64]:
    """[R, N]: the inverse of `pack_floats`."""
    contiguous = np.ascontiguousarray(packed_RC)
    shape = (len(packed_RC), packed_RC.shape[1] // float_bytes(name))
    if name == "bfloat16":
        return from_bfloat16(contiguous.view("<u2")).astype(np.float64).reshape(shape)
    dtype = np.dtype(name).newbyteorder("<")
    return contiguous.view(dtype).astype(np.float64).reshape(shape)


def as_bytes(values_RN: Array) -> npt.NDArray[np.uint8]:
    """[R, C] the bytes of each row of a matrix."""
    size = values_RN.shape[1] * values_RN.dtype.itemsize
    return np.ascontiguousarray(values_RN).view(np.uint8).reshape(len(values_RN), size)


def to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The upper half of float32, rounded to nearest, ties to even; infinities stay."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bfloat16(halves: Array) -> npt.NDArray[np.float32]:
    """The float32 that a bfloat16 stands for."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
