"""Entries of rows in one pass over the output head's weight, on CPUs that multiply bf16 numbers.

It gives what `OutputHead.logits` and `row_entries` give, to the rounding of float32 sums, and is the
faster way where it is possible. Each thread takes a part of the vocabulary and their results are merged
in order, so the same number of threads gives the same bits.

Shapes: R rows, H hidden, V vocabulary, N threads, P panels of WIDTH rows, K entries.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from extract.head.bf16_dot import WIDTH, has_bf16_dot
from extract.head.logit_rows import Entries
from extract.head.output_head import is_plain
from extract.head.vocabulary_pass import LOWEST, TILE, Buffers, Rows, add_ids

MOST_ENTRIES = 1024
"""More would take longer to be kept in order than logits of the whole vocabulary."""


class FusedHead:
    """The output layer of a bf16 model with float32 logits, and the choice of entries, in one pass."""

    def __init__(self, layer: torch.nn.Linear, top_k: int) -> None:
        """See `of`, which says whether this is possible."""
        bias_V = layer.bias
        self._weight = layer.weight.detach().view(torch.int16).numpy()
        self._bias = np.empty(0, np.float32) if bias_V is None else bias_V.detach().float().numpy()
        self._top_k = top_k

    @classmethod
    def of(cls, layer: torch.nn.Module, top_k: int) -> Self | None:
        """For a model's output layer; None where it, the CPU or the number of entries forbids it.

        Args:
            layer: From `get_output_embeddings`.
            top_k: K.
        """
        if not is_plain(layer) or not has_bf16_dot():
            return None
        weight_VH = layer.weight
        possible = (
            weight_VH.device.type == "cpu"
            and weight_VH.dtype == torch.bfloat16
            and weight_VH.is_contiguous()
            and weight_VH.shape[1] % 2 == 0
            and 0 < top_k <= min(MOST_ENTRIES, len(weight_VH))
        )
        return cls(layer, top_k) if possible else None

    def entries(self, hidden_RH: torch.Tensor, labels_R: torch.Tensor) -> Entries | None:
        """Entries and labels of some rows, as `row_entries` gives them.

        Args:
            hidden_RH: Of the model's dtype.
            labels_R: int64 ids.

        Returns:
            None where a row has NaN, +inf, or fewer than K ids of a probability above 0, or where the
            hidden states are not bf16: then they are for `OutputHead` and `row_entries`.
        """
        if hidden_RH.dtype != torch.bfloat16:
            return None
        tiles = -(-len(self._weight) // TILE)
        N = min(torch.get_num_threads(), tiles)
        ends = [min(n * tiles // N * TILE, len(self._weight)) for n in range(N + 1)]
        panels = _panels(hidden_RH)
        rows = _no_ids_yet(N, len(panels), len(hidden_RH), self._top_k)
        label_ids = labels_R.numpy()

        def add_part(n: int) -> None:
            buffers = Buffers(*(_floats(*shape) for shape in ((TILE, WIDTH), (WIDTH,), (WIDTH,))))
            part = Rows(*(array[n] for array in rows))
            bounds = ends[n], ends[n + 1]
            add_ids(*bounds, self._weight, self._bias, panels, label_ids, part, buffers)

        with ThreadPoolExecutor(N, initializer=_take_cores, initargs=(_cores(),)) as pool:
            for _ in pool.map(add_part, range(N)):
                pass
        return _merged(rows, len(hidden_RH), self._top_k)


def _panels(hidden_RH: torch.Tensor) -> np.ndarray[Any, Any]:
    """[P, H / 2, WIDTH, 2] int16: pairs of neighbouring numbers of WIDTH rows side by side."""
    R, H = hidden_RH.shape
    padded = hidden_RH.new_zeros(-(-R // WIDTH) * WIDTH, H)
    padded[:R] = hidden_RH
    pairs = padded.view(torch.int16).view(-1, WIDTH, H // 2, 2)
    return pairs.transpose(1, 2).contiguous().numpy()


def _no_ids_yet(N: int, P: int, R: int, K: int) -> Rows:
    """`Rows` of N threads."""
    return Rows(
        peaks=np.full((N, P, WIDTH), LOWEST),
        sums=np.zeros((N, P, WIDTH)),
        values=np.full((N, R, K), -np.inf, np.float32),
        ids=np.zeros((N, R, K), np.int32),
        labels=np.full((N, R), -np.inf, np.float32),
    )


def _merged(rows: Rows, R: int, K: int) -> Entries | None:
    """What all threads have found; see `FusedHead.entries`."""
    N = len(rows.peaks)
    peaks_NR, sums_NR = (
        torch.from_numpy(found.reshape(N, -1)[:, :R]).double() for found in (rows.peaks, rows.sums)
    )
    total_R = torch.logsumexp(peaks_NR + sums_NR.log(), dim=0)
    values, ids = (
        torch.from_numpy(found).transpose(0, 1).reshape(R, N * K)
        for found in (rows.values, rows.ids)
    )
    best = values.topk(K, dim=-1)
    if not (total_R.isfinite().all() and best.values.isfinite().all()):
        return None
    logprobs_RK = best.values - total_R[:, None]
    labels_R = torch.from_numpy(rows.labels.max(0)) - total_R
    return ids.gather(1, best.indices), logprobs_RK.float(), labels_R.float()


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    """Memory that begins on a cache line, as torch allocates it."""
    return torch.empty(shape).numpy()


def _cores() -> set[int]:
    """Cores that the threads of this process may use. OMP_PROC_BIND gives each of OpenMP's threads
    its own, also the one that runs Python, and threads begin on the core of the one that starts them.
    """
    cores: set[int] = set()
    with suppress(OSError, AttributeError):  # threads end; not all systems have this
        for task in Path("/proc/self/task").iterdir():
            cores |= os.sched_getaffinity(int(task.name))
    return cores


def _take_cores(cores: set[int]) -> None:
    with suppress(OSError, AttributeError, ValueError):
        os.sched_setaffinity(0, cores)
