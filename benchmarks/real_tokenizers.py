"""Opening published tokenizers: `tokenizer_open_ratio`, seconds over transformers' own load.

    python -m benchmarks.real_tokenizers models/gemma models/qwen

Each folder holds a tokenizer.json and what lies beside it. Both sides read the same files in one
process, fresh objects each time and in turn: ours up to the byte table, the tokens before a text and
the fingerprint, which every stage compares, with an empty cache each time; theirs plain AutoTokenizer.
CPU seconds of the process, medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from store_schema.config import ModelRef
from store_schema.text.tokenizer import SegmentTokenizer


def tokenizer_open_ratio(
    folders: Mapping[str, str | Path], *, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Time to open each tokenizer, ours over transformers'.

    Args:
        folders: Model folder by name.
        repeats: Times that each side opens each of them.

    Returns:
        By name: `ratio` of the medians, `seconds` and `theirs` (CPU seconds), `num_ids`.
    """
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = {}
    for name, folder in folders.items():
        num_ids = _open(folder).vocab_size  # libraries are loaded, too
        AutoTokenizer.from_pretrained(folder)
        ours, theirs = [], []
        for _ in range(repeats):
            with _empty_cache():
                ours.append(_seconds(lambda folder=folder: _open(folder)))
            theirs.append(_seconds(lambda folder=folder: AutoTokenizer.from_pretrained(folder)))
        mine, other = statistics.median(ours), statistics.median(theirs)
        found[name] = {
            "ratio": round(mine / other, 3),
            "seconds": round(mine, 3),
            "theirs": round(other, 3),
            "num_ids": num_ids,
        }
    return found


def _open(folder: str | Path) -> SegmentTokenizer:
    tokenizer = SegmentTokenizer.load(ModelRef(model=str(folder)), name="model")
    assert tokenizer.fingerprint
    return tokenizer


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Nothing that transformers said earlier is kept."""
    with tempfile.TemporaryDirectory() as empty:
        with patch.dict(os.environ, LOGITFUSE_CACHE=empty):
            yield


def _seconds(open_one: Callable[[], Any]) -> float:
    gc.collect()
    begin = time.process_time()
    opened = open_one()
    seconds = time.process_time() - begin
    del opened
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="model folders")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    figures = tokenizer_open_ratio(
        {Path(folder).name: folder for folder in options.folders}, repeats=options.repeats
    )
    for name, figure in figures.items():
        print(
            f"{name:<20} {figure['num_ids']:>8,} ids  {figure['seconds']:6.2f} s  "
            f"transformers {figure['theirs']:6.2f} s  ratio {figure['ratio']:.2f}"
        )
    print(json.dumps({"tokenizer_open_ratio": {n: f["ratio"] for n, f in figures.items()}}))


if __name__ == "__main__":
    main()
