"""Inputs of a training loop, and its number of steps."""

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
    """Data, recipe and folders of a training loop.

    Args:
        label: "fused" or "control", for messages.
        section: The recipe.
        seed: Seed of the run.
        stream: Batches of the training split.
        valid: Segments evaluated during training, None for no evaluation.
        tokenizer: The target's.
        checkpoints: Folder of the checkpoints.
        log: Step log.
        held_out: `valid` with the sources' log-probabilities, where the fusion gate needs them.
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

    @property
    def reads_again(self) -> bool:
        """Whether the posterior gate meets rows that the target has read before."""
        gated = self.section.fusion_gate.kind == "posterior"
        drawn = self.num_steps * self.section.batch_segments
        return gated and (bool(self.section.stages) or drawn > self.stream.num_samples)
