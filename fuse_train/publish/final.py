"""The final folder: published once, with the record of `fuse_train.publish.done`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuse_train.disk.checksums import check_files
from fuse_train.disk.folders import publish_folder
from fuse_train.loop.checkpoint import TrainState, best_folder, step_folder
from fuse_train.model.adapters import copy_adapters
from fuse_train.model.generation_config import correct_generation_config, name_turn_end
from fuse_train.model.models import load_model, own_dtype
from fuse_train.model.target import load_trained
from fuse_train.publish.done import CONFIG_FILE, DONE_FILE, DoneRecord
from fuse_train.publish.model_card import CardFacts, model_card
from store_schema.config import ModelRef
from store_schema.disk.sealed import seal
from store_schema.errors import MissingError

TRAIN_AGAIN = "delete the checkpoints to train again"


@dataclass(frozen=True, slots=True)
class FinalChoice:
    """Which weights are published.

    Args:
        step: Step that the weights are from; 0 is the target before training.
        folder: Folder with the weights; None for the target before training.
        bpb: Their valid bits per byte by domain; None if they were not evaluated.
    """

    step: int
    folder: Path | None
    bpb: dict[str, float] | None


def final_choice(state: TrainState, checkpoints: Path, *, keep_best: bool) -> FinalChoice:
    """The weights of the best evaluation with `keep_best`, else those of the last step.

    Raises:
        MissingError: Their folder is gone.
        CorruptionError: One of their files is damaged.
    """
    best = state.best
    if best is None or not keep_best or best.step == state.step:
        same = best is not None and best.step == state.step
        folder = step_folder(checkpoints, state.step)
        choice = FinalChoice(state.step, folder, best.bpb if same and best else None)
    elif best.step == 0:
        choice = FinalChoice(0, None, best.bpb)
    else:
        choice = FinalChoice(best.step, best_folder(checkpoints, best.step), best.bpb)
    if choice.folder is not None and not choice.folder.is_dir():
        raise MissingError("weights to publish are gone", where=choice.folder, hint=TRAIN_AGAIN)
    if choice.folder is not None:
        check_files(choice.folder, hint=TRAIN_AGAIN)
    return choice


@dataclass(frozen=True, slots=True)
class FinalFiles:
    """All files of a final folder besides the weights.

    Args:
        tokenizer: The target's; written by its `save_pretrained`.
        record: Content of done.json.
        facts: Content of the model card.
        resolved_config: The resolved run file.
    """

    tokenizer: Any
    record: DoneRecord
    facts: CardFacts
    resolved_config: str

    def write(self, place: Path, save_weights: Callable[[Path], object]) -> None:
        """Fill the final folder `place`; `save_weights` writes weights and configs into it."""
        tokenizer = self.tokenizer
        save_weights(place)
        tokenizer.save_pretrained(place)
        (place / "README.md").write_text(model_card(self.facts), encoding="utf-8")
        (place / CONFIG_FILE).write_text(self.resolved_config, encoding="utf-8")
        (place / DONE_FILE).write_bytes(seal(self.record))


def publish_trained(
    root: Path, choice: FinalChoice, target: ModelRef, files: FinalFiles, *, adapters: bool
) -> None:
    """Write the final folder, with adapters merged, and the adapters themselves beside it.

    Args:
        root: Folder that `final/` and `adapter/` go into.
        choice: Which weights.
        target: The untrained model.
        files: The other files.
        adapters: Whether checkpoints hold LoRA adapters alone.

    Raises:
        StorageError: A file cannot be written; nothing is published.
        ModelError: The weights cannot be read back.
    """
    dtype = own_dtype(target)
    if choice.folder is None:
        model = load_model(target, where="target", dtype=dtype)
    else:
        model = load_trained(target, choice.folder, adapters=adapters, dtype=dtype)
    correct_generation_config(model, where=target.model)
    name_turn_end(model, files.tokenizer)
    model = model.to(dtype)
    if adapters and choice.folder is not None:
        source = choice.folder
        publish_folder(root / "adapter", lambda place: copy_adapters(source, place))
    publish_folder(root / "final", lambda place: files.write(place, model.save_pretrained))
