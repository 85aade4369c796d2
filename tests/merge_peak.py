"""Peak memory of a merge over the largest tensor.

    python -m tests.merge_peak FOLDER          makes four checkpoints of 40 tensors of 8 MB
    python -m tests.merge_peak FOLDER METHOD   merges them, and prints one JSON object: growth of the
                                               process's peak in bytes, bytes of the largest tensor, and
                                               the first over the second

Small checkpoints are merged before, so that all code is loaded.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from fuse_train.merge.inputs import Input, Inputs
from fuse_train.merge.recipe import MergeSettings, parse_recipe
from fuse_train.merge.run import write_merged
from fuse_train.merge.stored_weights import StoredWeights

NUM_MODELS, NUM_TENSORS, SHAPE = 4, 40, (1024, 2048)
LARGEST_BYTES = 4 * SHAPE[0] * SHAPE[1]


def memory_bytes(field: str) -> int:
    """Memory of this process: VmRSS now, VmHWM at most since it was started or since `forget_peak`.

    `ru_maxrss` would be that of the process that started it, where that had more.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Let the peak begin again with what there is now; where that is not allowed, more is measured."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def make_weights(folder: Path, seed: int, num_tensors: int, shape: tuple[int, ...]) -> None:
    """A folder of random weights in two files, and no model around them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    drawn = np.random.default_rng(seed)
    places: dict[str, str] = {}
    for half in range(2):
        file = f"model-{half + 1:05d}-of-00002.safetensors"
        tensors = {
            f"layers.{i}.weight": drawn.standard_normal(shape, np.float32)
            for i in range(half, num_tensors, 2)
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def merge_weights(out: Path, folders: list[Path], recipe: MergeSettings) -> None:
    """Merge folders of weights; the first is the base where there is one."""
    out.mkdir(parents=True)
    with ExitStack() as files:
        opened = [
            Input(folder.name, folder, "", files.enter_context(StoredWeights(folder, name="one")))
            for folder in folders
        ]
        base = opened.pop(0) if recipe.kind.needs_base else None
        models = tuple(opened[: recipe.kind.most])
        write_merged(out, recipe, Inputs(base, models, "", {}))


def make(root: Path) -> None:
    """All checkpoints."""
    for i in range(NUM_MODELS):
        make_weights(root / f"big-{i}", 100 + i, NUM_TENSORS, SHAPE)
        make_weights(root / f"small-{i}", i, 2, (64, 64))


def measure(root: Path, method: str) -> dict[str, float]:
    """Growth of the peak, the largest tensor, and their ratio."""
    torch.set_num_threads(1)
    recipe = parse_recipe({"method": method})
    out = root / f"merged-{method}"
    merge_weights(out / "small", [root / f"small-{i}" for i in range(NUM_MODELS)], recipe)
    forget_peak()
    before = memory_bytes("VmRSS")
    merge_weights(out / "big", [root / f"big-{i}" for i in range(NUM_MODELS)], recipe)
    grown = memory_bytes("VmHWM") - before
    shutil.rmtree(out)
    return {"grown": grown, "largest": LARGEST_BYTES, "ratio": grown / LARGEST_BYTES}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make(Path(sys.argv[1]))
    else:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
