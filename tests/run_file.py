"""Run files as the tests write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_run_file(folder: Path, models: Mapping[str, Any], **sections: Any) -> Path:
    """Write `folder/run.yaml`.

    Args:
        folder: Is made; the run's folder is `run` in it.
        models: By name; the one named 'target' is the target, the others are sources. A folder or
            name, or the whole mapping of a model with its options.
        sections: The rest of the run file, `name`, `run_dir` and `seed` too.

    Returns:
        The run file.
    """
    refs = {n: m if isinstance(m, Mapping) else {"model": str(m)} for n, m in models.items()}
    target = refs.pop("target")
    head = {"name": "t", "run_dir": f"{folder}/run", "sources": refs, "target": target}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(head | sections, sort_keys=False), encoding="utf-8")
    return path
