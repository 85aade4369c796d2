"""Runs the contract of answers on vLLM in a process of its own: `python -m tests.vllm_answers FOLDER`.

vLLM changes classes of the process it runs in, and its libraries warn; neither belongs in pytest's.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from extract.engines.protocol import Answer, EngineSpec, Prompt
from extract.engines.registry import open_engine
from store_schema.layout import Finish
from tests.answer_contract import (
    Answerer,
    answered,
    check_answers,
    references,
    rules_of,
    sample_prompts,
)
from tests.engine_contract import spec_of


def elsewhere(folder: Path, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list:
    """`references` in another process: here transformers' classes are no longer its own."""
    with tempfile.TemporaryDirectory() as name:
        pairs = zip(prompts, answers, strict=True)
        inputs = [[list(p.input_ids), a.token_ids.tolist()] for p, a in pairs]
        Path(name, "inputs.json").write_text(json.dumps(inputs))
        words = [sys.executable, "-m", "tests.vllm_answers", "--reference", str(folder), name]
        subprocess.run(words, check=True)
        found = np.load(Path(name, "found.npz"))
        return [torch.from_numpy(found[str(i)]) for i in range(len(answers))]


def write_references(folder: Path, name: Path) -> None:
    """The other process."""
    pairs = json.loads((name / "inputs.json").read_text())
    prompts = [Prompt(tuple(ids), 0) for ids, _ in pairs]
    answers = [Answer(np.array(ids), Finish.LENGTH) for _, ids in pairs]
    found = references(folder, prompts, answers)
    np.savez(name / "found.npz", **{str(i): part.numpy() for i, part in enumerate(found)})


def greedy_of_transformers(folder: Path) -> list:
    """What the other engine answers, before vLLM is loaded."""
    spec = spec_of(folder, "transformers")
    return answered(open_engine(spec).answer, sample_prompts(spec), rules_of(spec))


def main(folder: Path) -> None:
    """The contract, and greedy answers as the transformers engine gives them."""
    import extract.run  # noqa: F401 - vLLM must start beside all that `extract generate` loads

    # Fewer sequences at a time than answers, so that some wait for others.
    spec = spec_of(folder, "vllm", max_num_batched_tokens=16, threads=2)
    spec = dataclasses.replace(spec, generates=True)
    expected = greedy_of_transformers(folder)
    engine = open_engine(spec)
    try:
        check_answers(engine.answer, spec, elsewhere)
        assert answered(engine.answer, sample_prompts(spec), rules_of(spec)) == expected
        _check_many(engine.answer, spec)
    finally:
        engine.close()
    print("contract holds")


def _check_many(answer: Answerer, spec: EngineSpec) -> None:
    """More answers than vLLM holds at a time; stopping midway leaves nothing behind."""
    prompts = [p for seed in range(20) for p in sample_prompts(spec, seed=seed)]
    rules = rules_of(spec, temperature=1.0, max_tokens=6, stop=("e", "a"))
    whole = answered(answer, prompts, rules)
    assert len({tuple(ids) for ids, _ in whole}) > 40
    broken_off = answer(prompts, rules)
    for _ in range(3):
        next(broken_off)
    broken_off.close()  # type: ignore[attr-defined]
    assert answered(answer, prompts, rules) == whole


if __name__ == "__main__":
    if sys.argv[1] == "--reference":
        write_references(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
