"""Try an encoding on some distributions: what a store would keep of them, and its size in bytes.

Shapes: R rows, V vocabulary, K candidates, E entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.encoding.encoding import decode, encode, stored_specs
from store_schema.encoding.fidelity import StoredRows
from store_schema.encoding.frequency import Ranking
from store_schema.encoding.group import Coder
from store_schema.encoding.selection import select_entries
from store_schema.encoding.shard_io import shard_files
from store_schema.layout import Arrays
from store_schema.presets import Encoding

DISTRIBUTION_ARRAYS = frozenset(
    {
        "entry_counts",
        "entry_ids_coded",
        "entry_rises",
        "entry_logprobs",
        "tail_codes",
        "tail_mass",
    }
)
"""Arrays on disk that encode distributions; all others are of tokens and labels."""


def engine_arrays(
    logprobs_RV: npt.NDArray[np.float32],
    labels_R: npt.NDArray[np.int64],
    byte_ends_R: npt.NDArray[np.uint32],
    *,
    top_k: int,
) -> Arrays:
    """The `top_k` most probable tokens of each row, as the arrays of a shard with one segment.

    Args:
        logprobs_RV: Nats, normalised.
        labels_R: The text's tokens.
        byte_ends_R: Byte after each of them, within the segment.
        top_k: K; at most V are taken.

    Returns:
        Arrays of a source store's shard.
    """
    num_rows, vocab_size = logprobs_RV.shape
    count = min(top_k, vocab_size)
    ids_RK = np.argpartition(-logprobs_RV, count - 1, axis=1)[:, :count]
    logs_RK = np.take_along_axis(logprobs_RV, ids_RK, axis=1)
    order_RK = np.lexsort((ids_RK, -logs_RK), axis=-1)
    logs_RK = np.minimum(np.take_along_axis(logs_RK, order_RK, axis=1), 0)
    kept_R = np.exp(logs_RK.astype(np.float64)).sum(axis=1)
    return {
        "segment_ids": np.zeros(1, "<i8"),
        "token_offsets": np.array([0, num_rows], "<i8"),
        "token_ids": labels_R.astype("<u4"),
        "byte_ends": byte_ends_R.astype("<u4"),
        "entry_offsets": np.arange(num_rows + 1, dtype="<i8") * count,
        "entry_ids": np.take_along_axis(ids_RK, order_RK, axis=1).ravel().astype("<u4"),
        "entry_logprobs": logs_RK.ravel().astype("<f4"),
        "tail_mass": np.clip(1 - kept_R, 0, 1).astype("<f4"),
        "label_logprobs": np.take_along_axis(logprobs_RV, labels_R[:, None], axis=1)[:, 0],
    }


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Join shards of one segment each (`engine_arrays`) into one shard."""
    lengths = [len(part["token_ids"]) for part in parts]
    counts = np.concatenate([np.diff(part["entry_offsets"]) for part in parts])
    plain = ("token_ids", "byte_ends", "entry_ids", "entry_logprobs", "tail_mass", "label_logprobs")
    return {
        "segment_ids": np.arange(len(parts), dtype="<i8"),
        "token_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"),
        "entry_offsets": np.concatenate([[0], np.cumsum(counts)]).astype("<i8"),
        **{name: np.concatenate([part[name] for part in parts]) for name in plain},
    }


@dataclass(frozen=True, slots=True)
class Trial:
    """Entries after a round trip through an encoding.

    Args:
        rows: The decoded distributions.
        size_bytes: Compressed bytes of each array on disk, and of the metadata, whose size does not
            depend on that of the shard, as "metadata".
    """

    rows: StoredRows
    size_bytes: dict[str, int]

    @property
    def distribution_bytes(self) -> int:
        """Bytes of the arrays that encode distributions."""
        return sum(n for name, n in self.size_bytes.items() if name in DISTRIBUTION_ARRAYS)

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays, without metadata."""
        return sum(n for name, n in self.size_bytes.items() if name != "metadata")


def try_encoding(arrays: Arrays, encoding: Encoding, ranking: Ranking) -> Trial:
    """Select entries, encode, compress and decode.

    Args:
        arrays: From `engine_arrays` or `joined`.
        encoding: The encoding to try.
        ranking: [V] ids by frequency rank.
    """
    coder = Coder(encoding, ranking, "trial")
    stored = encode("source", select_entries(arrays, encoding), coder)
    files = shard_files(stored, stored_specs("source", encoding))
    sizes: Counter[str] = Counter()
    for key, data in files.items():
        name = "metadata" if key.endswith("zarr.json") else key.partition("/")[0]
        sizes[name] += len(data)
    names = ("entry_ids", "entry_logprobs", "entry_offsets", "tail_mass")
    decoded: dict[str, npt.NDArray[Any]] = decode("source", stored, coder, names)
    return Trial(StoredRows(*(decoded[name] for name in names)), dict(sizes))


def half_learned(
    logprobs_RV: npt.NDArray[np.float32], counts_V: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Log-probabilities [R, V] of a made-up student, to measure gradients with: the normalised
    geometric mean of the source's distribution and token frequencies.

    Args:
        logprobs_RV: The source's, in nats.
        counts_V: Token counts.
    """
    unigram_V = (counts_V + 1.0) / (counts_V + 1.0).sum()
    mixed = 0.5 * logprobs_RV + 0.5 * np.log(unigram_V).astype(np.float32)
    top = mixed.max(axis=1, keepdims=True)
    total = np.exp(mixed - top).sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(mixed - (np.log(total) + top), np.float32)
