"""Training with a part of everything in each process: is it the same training, and how large is a part?

    OMP_NUM_THREADS=1 python -m benchmarks.scale_fsdp [--folder FOLDER]

A small target is trained on made-up stores for 20 steps, in one process, and with
`train.parallel: fsdp2` in two and in four, in float32.

- `fsdp_equal`: losses of all steps, evaluations and final weights are within 1e-5 of one process's.
- `fsdp_state_share`: bytes that a process of four holds of the target's weights, gradients and
  optimizer state after a step, the most of the four, over those of the whole.
- `resume_layouts`: killed in the middle and resumed in another layout (2 to 1 process, 1 to 4, 4 to 2,
  fsdp2 to ddp), a training has the same texts in every step and ends within 1e-5; resumed in the same
  layout it ends with the same bits.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from store_schema.errors import ConfigError
from tests.aligned_factory import make_run

forked: Any = import_module("tests.forked_python")

TOLERANCE = 1e-5
STEPS, KILLED_AT, MEASURED_AT = 20, 9, 3
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_segments": 7,
    "micro_batch_segments": 2,
    "checkpoint_every": 4,
    "eval_every": 10,
    "feedback_weight": 0.1,
    "control": False,
    "trackers": [],
    "precision": "float32",
}
Layout = tuple[int, str]
"""Processes, and `train.parallel`."""
RESUMED: dict[str, tuple[Layout, Layout]] = {
    "2 to 1": ((2, "fsdp2"), (1, "fsdp2")),
    "1 to 4": ((1, "fsdp2"), (4, "fsdp2")),
    "4 to 2": ((4, "fsdp2"), (2, "fsdp2")),
    "fsdp2 to ddp": ((2, "fsdp2"), (2, "ddp")),
}


def measure(folder: Path) -> dict[str, Any]:
    """Train in all layouts.

    Args:
        folder: An existing folder for the runs.

    Returns:
        `fsdp_equal`, `fsdp_state_share`, `resume_layouts`, and the differences that were seen: by
        number of processes, by pair of layouts, `same_layout_same_bits`.

    Raises:
        ConfigError: A training failed.
    """
    libraries = (*forked.LIBRARIES, "fuse_train.loop.sharded_layout")
    with forked.forked_python(folder, libraries) as python:
        one = _trained(folder / "one", python, (1, "ddp"))
        equal = {}
        for count in (2, 4):
            run = _trained(folder / f"of{count}", python, (count, "fsdp2"), measured=count == 4)
            equal[str(count)] = _difference(run, one)
        again = _trained(folder / "again", python, (2, "fsdp2"), (2, "fsdp2"))
        resumed = {}
        for name, layouts in RESUMED.items():
            run = _trained(folder / name.replace(" ", "-"), python, *layouts)
            resumed[name] = _difference(run, one)
    same = _weight_bytes(again) == _weight_bytes(folder / "of2")
    whole = _state_bytes(folder / "of4")
    share = max(own for own, _ in whole) / whole[0][1]
    return {
        "fsdp_equal": all(_within(found) for found in equal.values()),
        "fsdp_state_share": round(share, 4),
        "resume_layouts": same and all(_within(found) for found in resumed.values()),
        "fsdp_differences": equal,
        "resume_differences": resumed,
        "same_layout_same_bits": same,
        "whole_state_bytes": whole[0][1],
    }


def _within(found: dict[str, Any]) -> bool:
    return bool(found["same_texts"] and max(found["loss"], found["weights"]) < TOLERANCE)


def _trained(folder: Path, python: Path, *layouts: Layout, measured: bool = False) -> Path:
    """A run that is killed in all layouts but the last."""
    make_run(folder, train=SETTINGS)
    (folder / "notes").mkdir()
    text = (folder / "run.yaml").read_text()
    for number, (count, parallel) in enumerate(layouts):
        (folder / "run.yaml").write_text(f"{text}  parallel: {parallel}\n")
        last = number == len(layouts) - 1
        environment = {"TRAIN_DRIVER_NOTES": str(folder / "notes"), "TMPDIR": str(folder)}
        if not last:
            environment["TRAIN_DRIVER_SIGNAL"] = f"{KILLED_AT} 0 {signal.SIGKILL:d}"
        launcher = _launcher(count) if count > 1 else []
        words = ["-m", "benchmarks.scale_fsdp", "--train", "run", str(folder / "run.yaml")]
        done = subprocess.run(
            [str(python), *launcher, *words],
            env=os.environ
            | {"ACCELERATE_USE_CPU": "true", "FSDP_STATE_NOTES": str(folder) if measured else ""}
            | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if (done.returncode == 0) != last:
            said = " ".join(done.stderr.split())[-400:]
            raise ConfigError("a training ended as it should not", where=folder.name, got=said)
    return folder


def _launcher(count: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--nproc-per-node", str(count), "--master-port", port]
    return ["-m", "torch.distributed.run", *options]


def _difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """Largest relative differences: of a step's loss or an evaluation, of a final tensor (by norm)."""
    from safetensors.torch import load_file

    losses = [_losses(folder) for folder in (ours, theirs)]
    loss = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    ours_by_name, theirs_by_name = (
        load_file(folder / "run/final/model.safetensors") for folder in (ours, theirs)
    )
    weights = max(
        float((ours_by_name[name] - tensor).norm() / tensor.norm())
        for name, tensor in theirs_by_name.items()
    )
    same = len(losses[0]) >= STEPS and _texts(ours) == _texts(theirs)
    return {"loss": loss, "weights": weights, "same_texts": same}


def _losses(folder: Path) -> list[float]:
    found: list[float] = []
    for line in (folder / "run/logs/train_steps.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found += [entry["loss"]] if "loss" in entry else []
        found += entry.get("valid_bpb", {}).values()
    return found


def _texts(folder: Path) -> dict[int, list[str]]:
    """Segments of each step over all processes; a step that was taken again had the same."""
    found: dict[int, set[str]] = {}
    for path in (folder / "notes").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, names = json.loads(line)
            found.setdefault(step, set()).update(names)
    return {step: sorted(names) for step, names in found.items()}


def _weight_bytes(folder: Path) -> list[bytes]:
    place = folder / f"run/checkpoints/step-{STEPS:06d}"
    return [path.read_bytes() for path in sorted(place.rglob("*-of-*.safetensors"))]


def _state_bytes(folder: Path) -> list[tuple[int, int]]:
    """Of each process: bytes that it holds, and bytes of the whole."""
    notes = sorted(folder.glob("state-*.json"))
    return [tuple(json.loads(path.read_text())) for path in notes]


def _train(words: Sequence[str]) -> None:
    """A training as of `tests.train_driver`, which notes the size of its state after a step."""
    place = os.environ.get("FSDP_STATE_NOTES")
    if place:
        _note_state(Path(place))
    sys.argv = [sys.argv[0], *words]
    driver: Any = import_module("tests.train_driver")
    driver.main()


def _note_state(place: Path) -> None:
    import torch

    from fuse_train.loop.sharded_layout import ShardedLayout
    from fuse_train.loop.trainer import TrainingLoop

    gradients: list[torch.Tensor] = []
    clip, after = ShardedLayout.clip, TrainingLoop._after_step

    def clipped(self: Any, parameters: Sequence[torch.nn.Parameter], limit: float) -> Any:
        if hasattr(parameters[0], "to_local"):
            gradients[:] = [p.grad for p in parameters if p.grad is not None]
        return clip(self, parameters, limit)

    def noted(self: Any, line: dict[str, Any], stop: Any) -> None:
        if line["step"] == MEASURED_AT:
            parameters = list(self._model.parameters())
            state = [self._optimizer.state[p] for p in parameters]
            tensors = [*parameters, *gradients, *chain(*(entry.values() for entry in state))]
            whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            process = self._accelerator.process_index
            sizes = json.dumps([_own_bytes(tensors), whole])
            (place / f"state-{process}.json").write_text(sizes)
        after(self, line, stop)

    ShardedLayout.clip = clipped  # type: ignore[method-assign]
    TrainingLoop._after_step = noted  # type: ignore[method-assign]


def _own_bytes(tensors: Sequence[Any]) -> int:
    """Bytes of the memory behind what this process has of some tensors; several may share some."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = [part.untyped_storage() for part in parts]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the runs in this new folder")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train is not None:
        _train(options.train)
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True)
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measure(Path(place))))


if __name__ == "__main__":
    main()
