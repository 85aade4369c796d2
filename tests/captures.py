"""Captures as DistillKit's documented format has them, written and read number by number.

Plain Python, apart from the product's own code: bits are characters, floats are `struct`'s. A bfloat16
is the upper half of a float32. `theirs` runs DistillKit's own code where a checkout of it is at hand.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

CODES = {"float16": "<e", "float32": "<f", "float64": "<d"}
CHECKOUT = "LOGITFUSE_DISTILLKIT"
"""Environment variable: a folder with a checkout of DistillKit."""

RECOMMENDED = {
    "exact_k": 16, "k": 64, "exact_dtype": "bfloat16", "term_dtype": "float32",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"], "residual_bins": [], "delta_encoding": False,
    "error_diffusion": False,
}  # fmt: skip
BUDGET = RECOMMENDED | {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
QUICK = RECOMMENDED | {
    "exact_k": 32, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2], "delta_encoding": True
}  # fmt: skip
BINS = RECOMMENDED | {
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "exp"],
    "normalize_t": True,
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 8, "num_elements": 16},
        {"scale_dtype": "float32", "element_bits": 3, "num_elements": 21},
        {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 9},
    ],
}
BARE = RECOMMENDED | {
    "k": 20, "exact_k": 4, "polynomial_terms": None,
    "residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 16}],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "recommended": RECOMMENDED, "budget": BUDGET, "quick": QUICK, "bins": BINS, "bare": BARE,
    "all exact": RECOMMENDED | {"k": 9, "exact_k": 9, "polynomial_terms": None},
}  # fmt: skip
"""The README's configurations (with fewer entries), and others that use every part of the format."""


def to_bytes(value: float, name: str) -> bytes:
    """A number, little-endian."""
    if name != "bfloat16":
        return struct.pack(CODES[name], value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    rest, bits = bits & 0xFFFF, bits >> 16
    bits += rest > 0x8000 or (rest == 0x8000 and bits & 1)
    return struct.pack("<H", bits)


def from_bytes(data: bytes, name: str) -> list[float]:
    """Numbers that lie one after the other."""
    if name != "bfloat16":
        return [value for (value,) in struct.iter_unpack(CODES[name], data)]
    halves = [bits for (bits,) in struct.iter_unpack("<H", data)]
    return [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in halves]


def to_bits(numbers: Sequence[int], bits: int) -> bytes:
    """Whole numbers, the highest bit first, padded with zeros to whole bytes."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def from_bits(data: bytes, bits: int, count: int) -> list[int]:
    """The inverse of `to_bits`."""
    text = "".join(format(byte, "08b") for byte in data)
    return [int(text[i * bits : (i + 1) * bits], 2) for i in range(count)]


def size_of(name: str) -> int:
    """Bytes of a number."""
    return 2 if name == "bfloat16" else struct.calcsize(CODES[name])


def terms_at(rank: int, config: Mapping[str, Any]) -> list[float]:
    """Each term of the curve at a rank."""
    count = config["k"] - config["exact_k"]
    t = rank / max(count - 1, 1) if config.get("normalize_t") else float(rank)
    special = {"sqrt": math.sqrt, "exp": math.exp}
    terms = config["polynomial_terms"] or []
    return [special[term](t) if isinstance(term, str) else t**term for term in terms]


def read_values(data: bytes, config: Mapping[str, Any]) -> list[float]:
    """The k log-probabilities of a position."""
    at = config["exact_k"] * size_of(config["exact_dtype"])
    values = from_bytes(data[:at], config["exact_dtype"])
    terms = len(config["polynomial_terms"] or [])
    stop = at + terms * size_of(config["term_dtype"])
    coefficients = from_bytes(data[at:stop], config["term_dtype"])
    rest = [0.0] * (config["k"] - config["exact_k"])
    first = 0
    for part in config["residual_bins"]:
        at, stop = stop, stop + size_of(part["scale_dtype"])
        [scale] = from_bytes(data[at:stop], part["scale_dtype"])
        bits, count = part["element_bits"], part["num_elements"]
        at, stop = stop, stop + -(-bits * count // 8)
        for i, code in enumerate(from_bits(data[at:stop], bits, count)):
            multiple = 2 * code - 1 if bits == 1 else code - 2 ** (bits - 1)
            rest[first + i] = multiple * scale
        first += count
    assert stop == len(data)
    for rank in range(len(rest)):
        rest[rank] = from_bytes(to_bytes(rest[rank], config["exact_dtype"]), config["exact_dtype"])[
            0
        ]
        here = zip(coefficients, terms_at(rank, config), strict=True)
        rest[rank] += sum(c * term for c, term in here)
    values += rest
    if config["delta_encoding"]:
        values = np.cumsum(values).tolist()
    return values


def write_values(values: Sequence[float], config: Mapping[str, Any]) -> bytes:
    """A position's bytes, from k falling log-probabilities."""
    if config["delta_encoding"]:
        values = [values[0], *(b - a for a, b in pairwise(values))]
    exact, rest = values[: config["exact_k"]], list(values[config["exact_k"] :])
    data = b"".join(to_bytes(value, config["exact_dtype"]) for value in exact)
    if config["polynomial_terms"]:
        basis = np.array([terms_at(rank, config) for rank in range(len(rest))])
        coefficients = np.linalg.lstsq(basis, np.array(rest), rcond=None)[0].tolist()
        stored = b"".join(to_bytes(c, config["term_dtype"]) for c in coefficients)
        curve = basis @ np.array(from_bytes(stored, config["term_dtype"]))
        rest = [value - at for value, at in zip(rest, curve.tolist(), strict=True)]
        data += stored
    first = 0
    for part in config["residual_bins"]:
        here = rest[first : first + part["num_elements"]]
        half = 2 ** (part["element_bits"] - 1)
        scale_bytes = to_bytes(max(map(abs, here)) / half or 1.0, part["scale_dtype"])
        [scale] = from_bytes(scale_bytes, part["scale_dtype"])
        if half == 1:
            codes = [int(value > 0) for value in here]
        else:
            codes = [min(max(round(value / scale), -half), half - 1) + half for value in here]
        data += scale_bytes + to_bits(codes, part["element_bits"])
        first += part["num_elements"]
    return data


def id_bits(vocab_size: int) -> int:
    """Bits of an id."""
    return math.ceil(math.log2(vocab_size))


def write_capture(
    folder: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[float]]]]],
    config: Mapping[str, Any],
    *,
    masks: Sequence[Sequence[int]] | None = None,
    file_rows: int = 2,
) -> Path:
    """A capture's folder.

    Args:
        folder: Is made.
        rows: Tokens of each row, and ids and log-probabilities of each of its positions.
        config: Compression parameters, with `d`.
        masks: Column `attention_mask`.
        file_rows: Rows of a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(dict(config)))
    bits, kind = id_bits(config["d"]), pa.list_(pa.list_(pa.uint8()))
    for number, first in enumerate(range(0, len(rows), file_rows)):
        part = rows[first : first + file_rows]
        columns = {
            "input_ids": pa.array([list(ids) for ids, _ in part], pa.list_(pa.uint64())),
            "compressed_logprobs": pa.array(
                [[list(write_values(v, config)) for _, v in entries] for _, entries in part], kind
            ),
            "bytepacked_indices": pa.array(
                [[list(to_bits(i, bits)) for i, _ in entries] for _, entries in part], kind
            ),
        }
        if masks is not None:
            columns["attention_mask"] = pa.array(masks[first : first + file_rows])
        pq.write_table(pa.table(columns), folder / f"data_{number}.parquet")
    return folder


def read_capture(folder: Path) -> list[dict[str, Any]]:
    """Rows of a capture, each with its tokens, labels, ids and log-probabilities."""
    config = yaml.safe_load((folder / "compression_config.yaml").read_text())
    rows = []
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            row["ids"] = [
                from_bits(bytes(data), id_bits(config["d"]), config["k"])
                for data in row.pop("bytepacked_indices")
            ]
            row["logprobs"] = [
                read_values(bytes(data), config) for data in row.pop("compressed_logprobs")
            ]
            rows.append(row)
    return rows


def theirs() -> Any:
    """DistillKit's own package `distillkit.compression`; skips the test where there is none."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        pytest.skip(f"no checkout of DistillKit ({CHECKOUT})")
    sys.path.insert(0, checkout)
    try:
        import distillkit.compression as package
    finally:
        sys.path.remove(checkout)
    return package
