"""Every family of models with its published tokenizer, through every stage, as source and as target.

Needs the tokenizers that `python tests/published_tokenizers.py` fetches; skipped where they are not
there, an error where LOGITFUSE_REQUIRE_PUBLISHED is set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml

from align.chain.first_token import PieceTable, piece_table
from align.prepare import prepare
from store_schema.disk.location import open_location
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.vocabulary import Vocabulary
from tests.command import ok, refused
from tests.families import FAMILIES, save_family
from tests.published_tokenizers import tokenizer_folder
from tests.tiny import SAMPLE_TEXTS, tiny_model
from tests.vllm_families import SOURCE

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ENGINE_TOLERANCE_NATS = 2e-3
"""Between two implementations of one model in float32; soft caps left out or a mask that is wrong show
as more at these weights."""


class VllmForks:
    """The process of `tests.vllm_families`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm_families"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, config: Path) -> None:
        """Begin with a run file's source, behind those that were asked before."""
        sink = self._pipe(self._process.stdin)
        sink.write(f"{config}\n")
        sink.flush()

    def answer(self, config: Path) -> tuple[int, str]:
        """Exit code of a run file, and what it said; answers that nobody waited for are passed over."""
        while True:
            found = json.loads(self._pipe(self._process.stdout).readline())
            if found["config"] == str(config):
                return found["code"], found["said"]

    def close(self) -> None:
        """End the process."""
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()
        self._process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture(scope="module")
def vllm_forks() -> Iterator[VllmForks]:
    pytest.importorskip("vllm")
    forks = VllmForks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("toy") / "model", seed=3)


@pytest.fixture(scope="module", autouse=True)
def _tables_once() -> Iterator[None]:
    """Pieces of one vocabulary in another: made once for all families of one tokenizer."""
    made: dict[Any, PieceTable] = {}

    def once(source: Vocabulary, target: SegmentTokenizer) -> PieceTable:
        pair = (tuple(source.tokens), target.fingerprint, tuple(target.vocabulary.tokens))
        if pair not in made:
            made[pair] = piece_table(source, target)
        return made[pair]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "piece_table", once)
        yield


def published(name: str) -> Path:
    """Folder of a family's tokenizer, or the test is skipped."""
    folder = tokenizer_folder(FAMILIES[name].tokenizer)
    if folder is None:
        if os.environ.get("LOGITFUSE_REQUIRE_PUBLISHED"):
            pytest.fail("published tokenizers are missing: python tests/published_tokenizers.py")
        pytest.skip("published tokenizers: python tests/published_tokenizers.py")
    return folder


def write_runs(folder: Path, model: Path, toy: Path) -> Path:
    """Run files of a family as a source (run.yaml, vllm.yaml) and as the target (target.yaml).

    The other side is a toy model each time: tables from one vocabulary to another take seconds where
    both are large, and alignment's own tests go through all pairs of kinds.
    """
    documents = [
        {"id": f"{split}-{domain}-{i}", "text": text, "domain": domain, "split": split}
        for split in ("train", "valid")
        for domain, texts in SAMPLE_TEXTS.items()
        for i, text in enumerate(texts)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    this, other = ({"model": str(path), "dtype": "float32"} for path in (model, toy))
    as_source = {
        "name": "family",
        "run_dir": str(folder / "run"),
        "sources": {SOURCE: this, "toy": other},
        "target": other,
        "corpus": {"inputs": [{"path": str(folder / "text.jsonl")}], "splits": ["train", "valid"]},
        "plan": {"max_tokens": 96, "shard_tokens": 100_000},
        "extract": {"engine": "transformers", "top_k": 8, "device": "cpu"},
    }
    through_vllm = as_source | {
        "run_dir": str(folder / "vllm"),
        "extract": {"engine": "vllm", "top_k": 8, "kv_cache_gib": 1},
    }
    as_target = as_source | {
        "run_dir": str(folder / "target"),
        "data_dir": str(folder / "run"),
        "sources": {"toy": other},
        "target": this,
        "train": {
            "selector": "uniform",
            "max_steps": 3,
            "checkpoint_every": 3,  # each is published, with a tokenizer that takes seconds to save
            "batch_segments": 4,
            "micro_batch_segments": 2,
            "control": False,
        },
    }
    for name, config in (("run", as_source), ("vllm", through_vllm), ("target", as_target)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def stage(config: Path, *words: str) -> None:
    """Run one stage, which must succeed."""
    ok(*words[:2], config, *words[2:])


def label_logprobs(url: Path) -> np.ndarray:
    """Of all positions of a store, in the plan's order."""
    reader = StoreReader.open(open_location(str(url)))
    return np.concatenate(
        [reader.read(index)["label_logprobs"] for index in sorted(reader.commits)]
    )


WORKING = [name for name, family in FAMILIES.items() if family.refused is None]
REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.filterwarnings("default")  # what model code of libraries warns of is theirs
def test_a_family_goes_all_the_way(
    name: str, toy: Path, vllm_forks: VllmForks, tmp_path: Path
) -> None:
    model = save_family(name, published(name), tmp_path / "model")
    config, as_target = write_runs(tmp_path, model, toy), tmp_path / "target.yaml"
    stage(config, "corpus", "build")
    stage(config, "extract", "plan")
    for part in ("corpus", "plan"):
        (tmp_path / "vllm").mkdir(exist_ok=True)
        (tmp_path / "vllm" / part).symlink_to(tmp_path / "run" / part)
    vllm_forks.ask(tmp_path / "vllm.yaml")
    stage(config, "extract", "run-source", "--source", SOURCE)
    stage(config, "extract", "run-source", "--source", "toy")
    stage(config, "align", "run", "--source", SOURCE)
    stage(as_target, "align", "run")
    stage(as_target, "train", "run")
    code, said = vllm_forks.answer(tmp_path / "vllm.yaml")
    check_final(tmp_path / "target/final")
    pattern = FAMILIES[name].vllm_refused
    if pattern is not None and not torch.cuda.is_available():
        assert code == 2, said
        line = said.strip().splitlines()[-1]
        assert re.search(f"^error: .*({pattern})", line), line
        return
    assert code == 0, said
    ours = label_logprobs(tmp_path / "run/stores" / SOURCE)
    theirs = label_logprobs(tmp_path / "vllm/stores" / SOURCE)
    np.testing.assert_allclose(ours, theirs, atol=ENGINE_TOLERANCE_NATS)


def check_final(folder: Path) -> None:
    """The fused model loads in plain transformers, tokenizer and all, and scores a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer("def add(a, b):\n    return a + b").input_ids])
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("default")
def test_what_cannot_be_supported_is_refused_before_the_plan(
    name: str, toy: Path, tmp_path: Path
) -> None:
    model = save_family(name, published(name), tmp_path / "model")
    config = write_runs(tmp_path, model, toy)
    stage(config, "corpus", "build")
    line = refused("extract", "plan", config)
    assert re.search(FAMILIES[name].refused or "", line), line
    assert not (tmp_path / "run/plan/plan.json").exists()
