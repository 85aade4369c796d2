"""Ways from vLLM's outputs to something kept, side by side on one engine: ours and plain readings.

`dicts` is vLLM's default: a list with a dict for each token, converted token by token.

`distillkit` is our own plain reading of how DistillKit captures (its `sample_logits_vllm`): flat
lists, macrobatches of samples in one `generate` call (256 there, 32 here, so that several follow one
another and its pool works beside the next), after which each sample is a job of a
thread pool: a Python loop over its entries by rank, the compressor, `tolist`, a row for a thread
that writes Parquet. The compressor is numpy here (`store_recipes`), with the least-squares solve
done once, which is a gift; the published one solves with torch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.store_recipes import DistillKit, id_bits

MACROBATCH = 32
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
    ]
)


def sampling_params(vllm: Any, top_k: int, *, flat: bool) -> Any:
    """What all ways ask of vLLM: every prompt position's best entries, one token generated."""
    return vllm.SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        prompt_logprobs=top_k,
        flat_logprobs=flat,
    )


def generate(llm: Any, params: Any, inputs: Sequence[list[int]]) -> list[Any]:
    """vLLM's own `generate`."""
    prompts = [{"prompt_token_ids": ids} for ids in inputs]
    outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False)
    return outputs


def dicts(llm: Any, params: Any, inputs: Sequence[list[int]]) -> int:
    """Convert lists of dicts token by token; gives the number of entries."""
    count = 0
    for output in generate(llm, params, inputs):
        for row in output.prompt_logprobs[1:]:
            ids = np.array(list(row), np.int32)
            logprobs = np.array([entry.logprob for entry in row.values()], np.float32)
            count += len(ids) + len(logprobs)
    return count // 2


def distillkit(
    llm: Any, params: Any, inputs: Sequence[list[int]], recipe: DistillKit, bits: int, folder: Path
) -> None:
    """Everything to Parquet, DistillKit's way."""
    with ParquetQueue(folder / "data_0.parquet") as writer, ThreadPoolExecutor() as executor:
        waiting: list[Future[None]] = []
        for start in range(0, len(inputs), MACROBATCH):
            batch = inputs[start : start + MACROBATCH]
            for ids, output in zip(batch, generate(llm, params, batch), strict=True):
                waiting.append(
                    executor.submit(_sample, ids, output.prompt_logprobs, recipe, bits, writer)
                )
            while len(waiting) > 2 * MACROBATCH:
                waiting.pop(0).result()
        for future in waiting:
            future.result()


def _sample(
    input_ids: list[int], flat: Any, recipe: DistillKit, bits: int, writer: ParquetQueue
) -> None:
    ids_RK, logprobs_RK = ranked(flat, recipe.num_entries)
    packed_RC = recipe.pack_entries(ids_RK, logprobs_RK, bits)
    id_bytes = -(-recipe.num_entries * bits // 8)
    writer.write(
        {
            "input_ids": input_ids,
            "compressed_logprobs": packed_RC[:, id_bytes:].tolist(),
            "bytepacked_indices": packed_RC[:, :id_bytes].tolist(),
        }
    )


def ranked(flat: Any, num_entries: int) -> tuple[Any, Any]:
    """Ids and log-probabilities [R, K] by rank, gathered entry by entry; the first token has none."""
    num_rows = len(flat) - 1
    ids_RK = np.zeros((num_rows, num_entries), np.int64)
    logprobs_RK = np.full((num_rows, num_entries), -np.inf, np.float32)
    rows, places, ids, logprobs = [], [], [], []
    for row in range(num_rows):
        for i in range(flat.start_indices[row + 1], flat.end_indices[row + 1]):
            rank = flat.ranks[i]
            if rank is None or rank > num_entries:
                continue
            rows.append(row)
            places.append(rank - 1)
            ids.append(flat.token_ids[i])
            logprobs.append(flat.logprobs[i])
    ids_RK[rows, places] = ids
    logprobs_RK[rows, places] = logprobs
    return ids_RK, logprobs_RK


class ParquetQueue:
    """A thread that writes rows to one Parquet file, a thousand at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(2 * MACROBATCH)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def write(self, row: dict[str, Any]) -> None:
        """Hand over one sample."""
        self._queue.put(row)

    def _work(self) -> None:
        with pq.ParquetWriter(self._path, SCHEMA) as writer:
            rows: list[dict[str, Any]] = []
            while (row := self._queue.get()) is not None:
                rows.append(row)
                if len(rows) == 1000:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))

    def __enter__(self) -> ParquetQueue:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        self._thread.join()


def recipe_of(top_k: int, vocab_size: int) -> tuple[DistillKit, int]:
    """DistillKit's recommended terms for so many entries, and bits of an id."""
    return DistillKit(top_k, min(16, top_k // 2), (0, 1, 2, 3, 4, 0.5)), id_bits(vocab_size)


@dataclass(slots=True)
class FrontEnd:
    """CPU seconds of the front end's thread, apart from the model's."""

    seconds: float = 0.0


@contextmanager
def front_end_timed(engine: Any) -> Iterator[FrontEnd]:
    """Count what the calling thread does outside of the engine core.

    Args:
        engine: vLLM's LLMEngine, in this process.

    Yields:
        Whose `seconds` hold, after the block, the thread's CPU time less that of getting outputs
        from the engine core.
    """
    spent = FrontEnd()
    core = engine.engine_core
    get_output = core.get_output

    def timed_get_output(*args: Any) -> Any:
        start = time.thread_time()
        try:
            return get_output(*args)
        finally:
            spent.seconds -= time.thread_time() - start

    core.get_output = timed_get_output
    start = time.thread_time()
    try:
        yield spent
    finally:
        spent.seconds += time.thread_time() - start
        core.get_output = get_output
