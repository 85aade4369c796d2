"""Run files, inputs and small models for the tests of the package `extract`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.command import ok
from tests.run_file import write_run_file
from tests.tiny import SAMPLE_TEXTS


def sample_documents(repeat: int = 4) -> list[dict[str, str]]:
    """Documents of all domains and splits, each text repeated so that some must be cut."""
    splits = ["train", "train", "valid", "test"]
    return [
        {"id": f"{domain}-{i}", "text": text * repeat, "domain": domain, "split": splits[i]}
        for domain, texts in SAMPLE_TEXTS.items()
        for i, text in enumerate(texts)
    ]


def write_jsonl(path: Path, documents: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def write_run(folder: Path, models: Mapping[str, Path], **sections: Any) -> Path:
    """A run file in `folder`; the model named 'target' is the target, the others are sources."""
    if not (folder / "docs.jsonl").exists():
        write_jsonl(folder / "docs.jsonl", sample_documents())
    place = str(folder).replace("$", "$$")  # a dollar in a path is no variable
    usual = {
        "run_dir": f"{place}/run",
        "corpus": {"inputs": [{"path": f"{place}/docs.jsonl"}]},
        "plan": {"max_tokens": 96, "shard_tokens": 256},
        "extract": {"engine": "transformers", "top_k": 8},
        "store": {"preset": "exact"},
    }
    return write_run_file(folder, models, **(usual | sections))


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder but the logs of what commands cost."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "logs" not in path.parts
    }


def plan_run(path: Path) -> Path:
    """The run file, its corpus built and its plan made."""
    ok("corpus", "build", path)
    ok("extract", "plan", path)
    return path
