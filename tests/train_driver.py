"""The train command for tests: notes which segments each step of each process had, and may be killed.

    python -m tests.train_driver run RUN_FILE [options]

TRAIN_DRIVER_NOTES: folder for `<process>.jsonl`, one line [step, [segments]] per step taken.
TRAIN_DRIVER_SIGNAL: "STEP PROCESS NUMBER", the signal that this process sends itself in that step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fuse_train.cli import train
from fuse_train.loop.trainer import TrainingLoop
from fuse_train.machine.processes import process_index


def main() -> None:
    notes = os.environ.get("TRAIN_DRIVER_NOTES")
    asked = [int(word) for word in os.environ.get("TRAIN_DRIVER_SIGNAL", "").split()]
    original = TrainingLoop._gradients

    def noted(self, step, batches, totals):
        if notes is not None:
            ids = [name for batch in batches for name in batch.segment_ids]
            with (Path(notes) / f"{process_index()}.jsonl").open("a") as file:
                file.write(json.dumps([step, ids]) + "\n")
        if asked[:2] == [step, process_index()]:
            os.kill(os.getpid(), asked[2])
        return original(self, step, batches, totals)

    TrainingLoop._gradients = noted
    train()


if __name__ == "__main__":
    main()
