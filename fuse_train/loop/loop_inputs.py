"""What a training loop is made of, and how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fuse_train.config import TrainSection
from fuse_train.data.stream import SampleStream
from fuse_train.gate.held_out import HeldOutText
from fuse_train.loop.schedule import steps_in_all
from fuse_train.loop.step_log import StepLog
from fuse_train.loop.validation import ValidSet
from store_schema.text.tokenizer import SegmentTokenizer


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """What a loop is made of.

    Args:
        label: "fused" or "control", for people.
        section: The recipe.
        seed: Of the run.
        stream: Of the training split.
        valid: Segments evaluated on the way, None for no evaluation.
        tokenizer: The target's.
        checkpoints: Folder.
        log: Step log.
        held_out: The evaluated segments as the sources see them, where the fusion gate asks for it.
    """

    label: str
    section: TrainSection
    seed: int
    stream: SampleStream
    valid: ValidSet | None
    tokenizer: SegmentTokenizer
    checkpoints: Path
    log: StepLog
    held_out: HeldOutText | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        stream = self.stream
        return steps_in_all(self.section, stream.num_samples, stream.order.num_steps)
