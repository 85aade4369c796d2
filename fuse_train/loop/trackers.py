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
    """Start or resume the training's run in each tracker; figures after `step` are logged again.

    Args:
        accelerator: Made with `log_with` and `tracker_folder`.
        run_name: Name of the project.
        label: "fused" or "control", the name of the run in it.
        fingerprint: Of the training; the same training resumes the same run.
        step: Step that is resumed from.
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
    """Close all trackers, which writes what they have buffered."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def numbers(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a step log line, nested names joined by '/'; the step itself is left out."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (
            prefix or name not in ("step", "num_steps", "stage")
        ):
            flat[prefix + name] = float(value)
    return flat
