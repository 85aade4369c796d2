"""The model whose predictions `train explain` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.inputs import Inputs, final_fingerprint, final_folder, job_fingerprint
from fuse_train.loop.checkpoint import TrainState
from fuse_train.loop.likelihood import check_inputs
from fuse_train.model.heads import check_head
from fuse_train.model.models import load_model
from fuse_train.model.target import load_trained
from fuse_train.publish.done import read_done
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, MismatchError, MissingError
from store_schema.model.models import with_folder
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.tokenizer_files import TOKENIZER_FILE

_ADAPTERS = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model to show.

    Args:
        title: Which it is, in words.
        where: Folder or hub name.
        folder: Folder with trained weights; None for the run file's own target.
        named: Whether the user named the folder, so that its tokenizer must be checked.
    """

    title: str
    where: str
    folder: Path | None = None
    named: bool = False


def choose_model(
    inputs: Inputs,
    section: TrainSection,
    name: str | None,
    checkpoint: tuple[Path, TrainState] | None,
) -> ChosenModel:
    """The model that `--model` names.

    Args:
        inputs: Of the run.
        section: Its train section.
        name: "target" as it is before training, "final", "control", or a folder; None is the newest
            checkpoint, else the final model, else the target.
        checkpoint: The newest one of the fused training.

    Raises:
        ConfigError: None of these.
        MissingError: That training is not finished.
        MismatchError: It was made from another config, plan or store.
    """
    before = ChosenModel("the target before training", inputs.run.target.model)
    if name == "target":
        return before
    if name in ("final", "control"):
        label = "fused" if name == "final" else name
        final = _final(inputs, section, label)
        if final is None:
            raise MissingError(
                f"the {label} training has no final model",
                where=final_folder(inputs.run, label),
                hint="`logitfuse train run` makes it; --model target shows the target before it",
            )
        return final
    if name is not None:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                "no such model",
                where="--model",
                expected="target, final, control, or a model's folder",
                got=ascii(name)[1:-1],
            )
        return ChosenModel(f"the model in {folder}", str(folder), folder, named=True)
    if checkpoint is not None:
        path = checkpoint[0]
        return ChosenModel(f"checkpoint {path.name}", str(path), path)
    untrained = ChosenModel("the target as it is, no checkpoint yet", before.where)
    return _final(inputs, section, "fused") or untrained


def _final(inputs: Inputs, section: TrainSection, label: str) -> ChosenModel | None:
    recipe = section if label == "fused" else section.control_section()
    folder = final_folder(inputs.run, label)
    expected = final_fingerprint(inputs.run, job_fingerprint(inputs, label, recipe))
    if read_done(folder, expected) is None:
        return None
    return ChosenModel(f"the final {label} model", str(folder), folder)


def load_chosen(
    run: RunConfig, chosen: ChosenModel, tokenizer: SegmentTokenizer, segment: Segment
) -> Any:
    """Load the causal model in float32; its tokenizer must read the segment as the target's does.

    Args:
        run: The run file.
        chosen: Which model.
        tokenizer: The target's.
        segment: The segment to explain.

    Raises:
        ModelError: It cannot be loaded or take the segment, or has no plain output head.
        MismatchError: It reads other tokens than the target.
    """
    encoded = tokenizer.encode([segment])
    if chosen.folder is None:
        model = load_model(run.target, where="target")
    else:
        if chosen.named and (chosen.folder / TOKENIZER_FILE).exists():
            _require_same_tokens(run, chosen.folder, encoded[0].input_ids, segment)
        adapters = (chosen.folder / _ADAPTERS).exists()
        model = load_trained(run.target, chosen.folder, adapters=adapters, dtype=torch.float32)
    check_inputs(model, encoded)
    check_head(model, where=chosen.where)
    return model


def _require_same_tokens(
    run: RunConfig, folder: Path, expected: list[int], segment: Segment
) -> None:
    own = SegmentTokenizer.load(with_folder(run.target, folder), name="--model")
    (read,) = own.encode([segment])
    if read.input_ids != expected:
        raise MismatchError(
            "the model reads other tokens than the target",
            where=f"{folder}, segment {ascii(segment.segment_id)[1:-1]}",
            expected=f"{len(expected)} ids, the first {expected[:5]}",
            got=f"{len(read.input_ids)} ids, the first {read.input_ids[:5]}",
            hint="name a model with the target's tokenizer, such as a checkpoint of this run",
        )
