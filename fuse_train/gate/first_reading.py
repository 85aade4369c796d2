"""What the target predicted of each row of the training text when it first read it.

In later passes it has seen the text and knows parts of it by heart: its predictions of it say little
of how well it predicts other text. The posterior gate compares the sources with the first reading.

Shape suffixes: B segments, T rows, R rows with a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fuse_train.data.batch import Batch
from store_schema.disk.parquet import read_parquet

Nats = npt.NDArray[np.float16]
At = tuple[torch.Tensor, torch.Tensor]

READINGS_FILE = "first_readings.parquet"
_SCHEMA = pa.schema([("segment_id", pa.string()), ("nats", pa.large_list(pa.float16()))])
_MAX_SEGMENTS, _MAX_BYTES = 1 << 31, 1 << 40


class FirstReadings:
    """NLL in nats of each row at its first reading, by segment; float16, two bytes a row."""

    def __init__(self) -> None:
        self._nats: dict[str, Nats] = {}
        self._new: dict[str, Nats] = {}

    def __contains__(self, segment_id: str) -> bool:
        return segment_id in self._nats

    def of(self, batch: Batch, at: At) -> torch.Tensor:
        """NLL [R] of the rows at indices `at`, float32, NaN where they are read for the first time."""
        nats_BT = np.full(batch.labels_BT.shape, np.nan, np.float32)
        for row_T, name in zip(nats_BT, batch.segment_ids, strict=True):
            known = self._nats.get(name)
            if known is not None:
                row_T[: len(known)] = known
        return torch.from_numpy(nats_BT).to(batch.labels_BT.device)[at]

    def note(self, batch: Batch, at: At, nll_R: torch.Tensor) -> None:
        """Keep the NLLs of the segments that were not read before, until `share` makes them known."""
        if all(name in self._nats for name in batch.segment_ids):
            return
        nats_BT = torch.full(batch.labels_BT.shape, torch.nan, device=nll_R.device)
        nats_BT[at] = nll_R.detach().float()
        num_rows_B = (batch.predicted_by_BT >= 0).sum(1) + (batch.predicted_by_BT[:, 0] < 0)
        rows = zip(batch.segment_ids, nats_BT.cpu().numpy(), num_rows_B.tolist(), strict=True)
        for name, row_T, count in rows:
            if name not in self._nats:
                self._new[name] = row_T[:count].astype(np.float16)

    def share(self, accelerator: Any) -> None:
        """Make known what any process noted; alike in all, after each step."""
        parts: list[Mapping[str, Nats]] = [self._new]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        for part in parts:
            self._nats |= part
        self._new = {}

    def save(self, folder: Path) -> None:
        """Write `READINGS_FILE` into a folder."""
        columns = [pa.array(list(self._nats), pa.string()), _lists(list(self._nats.values()))]
        pq.write_table(
            pa.table(columns, schema=_SCHEMA), folder / READINGS_FILE, compression="zstd"
        )

    @classmethod
    def load(cls, folder: Path, *, hint: str) -> FirstReadings:
        """Read what `save` wrote; nothing is known where it did not.

        Raises:
            CorruptionError: The file is damaged.
        """
        found, path = cls(), folder / READINGS_FILE
        if path.exists():
            table = read_parquet(
                path.read_bytes(),
                _SCHEMA,
                max_rows=_MAX_SEGMENTS,
                max_bytes=_MAX_BYTES,
                where=str(path),
                hint=hint,
            )
            column = table["nats"].combine_chunks()
            values = column.values.to_numpy(zero_copy_only=False)
            ends = column.offsets.to_numpy()
            names = table["segment_id"].to_pylist()
            found._nats = {
                name: values[start:end].copy()
                for name, start, end in zip(names, ends[:-1], ends[1:], strict=True)
            }
        return found


def _lists(arrays: list[Nats]) -> pa.Array:
    ends = np.cumsum([0, *map(len, arrays)])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.float16)
    return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(values, pa.float16()))
