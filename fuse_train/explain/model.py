"""Which weights stand for the target where one segment is explained."""

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
from fuse_train.publish.final import read_done
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, MismatchError, MissingError
from store_schema.model.models import with_folder
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.text.tokenizer_files import TOKENIZER_FILE

_ADAPTERS = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model to look at.

    Args:
        words: Which it is, for people.
        where: Folder or hub name.
        folder: That holds trained weights; None for the run file's own target.
        given: Whether a person named the folder, so that nothing is known of it.
    """

    words: str
    where: str
    folder: Path | None = None
    given: bool = False


def choose_model(
    inputs: Inputs,
    section: TrainSection,
    name: str | None,
    checkpoint: tuple[Path, TrainState] | None,
) -> Chosen:
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
    before = Chosen("the target before training", inputs.run.target.model)
    if name == "target":
        return before
    if name in ("final", "control"):
        label = "fused" if name == "final" else name
        found = _final(inputs, section, label)
        if found is None:
            raise MissingError(
                f"the {label} training has no final model",
                where=final_folder(inputs.run, label),
                hint="`logitfuse train run` makes it; --model target shows the target before it",
            )
        return found
    if name is not None:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                "no such model",
                where="--model",
                expected="target, final, control, or a model's folder",
                got=ascii(name)[1:-1],
            )
        return Chosen(f"the model in {folder}", str(folder), folder, given=True)
    if checkpoint is not None:
        path = checkpoint[0]
        return Chosen(f"checkpoint {path.name}", str(path), path)
    untrained = Chosen("the target as it is, no checkpoint yet", before.where)
    return _final(inputs, section, "fused") or untrained


def _final(inputs: Inputs, section: TrainSection, label: str) -> Chosen | None:
    recipe = section if label == "fused" else section.control_section()
    folder = final_folder(inputs.run, label)
    mark = final_fingerprint(inputs.run, job_fingerprint(inputs, label, recipe))
    if read_done(folder, mark) is None:
        return None
    return Chosen(f"the final {label} model", str(folder), folder)


def load_chosen(
    run: RunConfig, chosen: Chosen, tokenizer: SegmentTokenizer, segment: Segment
) -> Any:
    """The causal model in float32, proved to read the segment as the target does.

    Args:
        run: The run file.
        chosen: Which model.
        tokenizer: The target's.
        segment: It will be fed.

    Raises:
        ModelError: It cannot be loaded, fed, or seen as hidden states and a head.
        MismatchError: It reads other tokens than the target.
    """
    encoded = tokenizer.encode([segment])
    if chosen.folder is None:
        model = load_model(run.target, where="target")
    else:
        if chosen.given and (chosen.folder / TOKENIZER_FILE).exists():
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
