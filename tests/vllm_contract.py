"""Runs the engine contract on vLLM in a process of its own: `python -m tests.vllm_contract FOLDER`.

vLLM changes classes of the process it runs in, and its libraries warn; neither belongs in pytest's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import extract.run  # noqa: F401 - vLLM must start beside all that `extract run` loads
from extract.engine import open_engine
from store_schema.tokenizer import SegmentTokenizer
from tests.engine_contract import check_engine, encoded_samples, reference_logprobs, spec_of


def main(folder: Path) -> None:
    """Compute the reference first: afterwards transformers cannot load the same architecture."""
    # Groups smaller than the samples, and steps smaller than the longest of them.
    spec = spec_of(folder, "vllm", group_tokens=300, max_num_batched_tokens=64, threads=2)
    samples = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    references = reference_logprobs(folder, samples)
    engine = open_engine(spec)
    try:
        check_engine(engine, spec, references)
    finally:
        engine.close()
    print("contract holds")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
