"""Where model, gradients and optimizer are: whole in every process, or in parts (`sharded_layout.py`).

The training loop is the same for both; a layout loads, adds up gradients, clips and saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch
from fuse_train.disk.checksums import with_checksums
from fuse_train.disk.folders import publish_folder
from fuse_train.loop.objective import FusionObjective, StepTotals, Sums
from fuse_train.loop.optimizer import load_optimizer, load_spread, save_optimizer
from fuse_train.model.target import Target, load_target
from fuse_train.sharding.part_files import StoredParts, in_parts
from store_schema.config import ModelRef
from store_schema.text.tokenizer import SegmentTokenizer

Result = TypeVar("Result")


class Layout(Protocol):
    """What the training loop asks of a layout."""

    accelerator: Any
    """Of accelerate."""
    can_probe: bool
    """Whether a process may use the model while the others do not, to look for a size that fits."""

    def load(
        self, ref: ModelRef, tokenizer: SegmentTokenizer, *, checkpoint: Path | None, seed: int
    ) -> Target:
        """The target, ready for training; arguments as of `load_target`."""

    def prepare(
        self, objective: FusionObjective, optimizer: torch.optim.Optimizer, resume: Path | None
    ) -> torch.optim.Optimizer:
        """Take over objective and optimizer, whose state is that of the checkpoint `resume`."""

    def gradients(self, batches: Sequence[Batch], totals: StepTotals) -> list[Sums]:
        """Sums of each micro-batch; gradients, summed over all processes, are in the parameters."""

    def clip(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> torch.Tensor:
        """Scale gradients down to a norm; returns the norm before, the same in all processes."""

    def scored(self, call: Callable[[], Result]) -> Result:
        """Call a function that uses the model without gradients, in all processes together."""

    def most(self, count: int) -> int:
        """The largest count of all processes that must use the model equally often."""

    def save(self, publish: Callable[[Callable[[Path], None]], object], target: Target) -> None:
        """Save target and optimizer, in all processes together: `publish` is called in the main one
        with a function that writes them into a folder."""

    def save_best(self, place: Path, target: Target) -> None:
        """Publish the target's weights as a folder, in all processes together."""


class WholeLayout:
    """One process, or several that each have the whole model (DDP).

    Args:
        accelerator: Of accelerate.
        section: The recipe.
    """

    can_probe = True

    def __init__(self, accelerator: Any, section: TrainSection) -> None:
        self.accelerator, self._section = accelerator, section
        self._objective: Any = None
        self._optimizer: Any = None

    def load(
        self, ref: ModelRef, tokenizer: SegmentTokenizer, *, checkpoint: Path | None, seed: int
    ) -> Target:
        device = self.accelerator.device
        return load_target(
            ref, tokenizer, self._section, checkpoint=checkpoint, seed=seed, device=device
        )

    def prepare(
        self, objective: FusionObjective, optimizer: torch.optim.Optimizer, resume: Path | None
    ) -> torch.optim.Optimizer:
        self._objective, self._optimizer = self.accelerator.prepare(objective, optimizer)
        if resume is not None and in_parts(resume):
            with StoredParts(resume) as stored:
                load_spread(self._optimizer, objective, stored)
        elif resume is not None:
            load_optimizer(resume / "trainer", self._optimizer)
        prepared: torch.optim.Optimizer = self._optimizer
        return prepared

    def gradients(self, batches: Sequence[Batch], totals: StepTotals) -> list[Sums]:
        parts = []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self._objective):
                loss, part = self._objective(batch, totals)
                # DDP averages over processes what is a sum here.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            parts.append(part)
        return parts

    def clip(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    def scored(self, call: Callable[[], Result]) -> Result:
        return call()

    def most(self, count: int) -> int:
        return count

    def save(self, publish: Callable[[Callable[[Path], None]], object], target: Target) -> None:
        def write(folder: Path) -> None:
            target.save(folder)
            save_optimizer(folder / "trainer", self._optimizer)

        if self.accelerator.is_main_process:
            publish(write)
        self.accelerator.wait_for_everyone()

    def save_best(self, place: Path, target: Target) -> None:
        if self.accelerator.is_main_process:
            publish_folder(place, with_checksums(target.save))
        self.accelerator.wait_for_everyone()
