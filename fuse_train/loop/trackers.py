"""Experiment trackers through accelerate: TensorBoard, Weights & Biases, Trackio.

The step log is the record; trackers get the same numbers, under names such as `weights/coder`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fuse_train.config import TrainSection
from store_schema.errors import ConfigError


def tracker_names(section: TrainSection) -> list[str]:
    """Trackers to use: those asked for, or TensorBoard where it is installed.

    Raises:
        ConfigError: One that is asked for is not installed.
    """
    if section.trackers is None:
        return ["tensorboard"] if find_spec("tensorboard") is not None else []
    for name in section.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                "tracker is not installed",
                where="train.trackers",
                got=name,
                hint=f"pip install {name}, or leave it out",
            )
    return list(section.trackers)


def tracker_folder(logs: Path, label: str) -> Path:
    """Where TensorBoard's files of one training go."""
    return logs / "tensorboard" / label


def start_trackers(
    accelerator: Any, run_name: str, label: str, fingerprint: str, *, step: int
) -> None:
    """Begin or go on with the training's runs; what was told after `step` is told again.

    Args:
        accelerator: Made with `log_with` and the folder above.
        run_name: Names the project.
        label: "fused" or "control": names the run in it.
        fingerprint: Of the training; the same training goes on in the same run.
        step: Resumed from.
    """
    if not accelerator.log_with:
        return
    accelerator.init_trackers(
        run_name,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1 if step else None},
            "wandb": {"name": label, "id": f"{label}-{fingerprint[:16]}", "resume": "allow"},
            "trackio": {"name": f"{label}-{fingerprint[:16]}", "resume": "allow"},
        },
    )


def stop_trackers(accelerator: Any) -> None:
    """Write out what they still hold."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def numbers(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a step log line, nested names joined by '/'; the step itself is left out."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix or name not in ("step", "num_steps")):
            found[prefix + name] = float(value)
    return found
