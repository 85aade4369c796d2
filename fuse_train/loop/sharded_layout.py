"""Every process has a part of model, gradients and optimizer (`train.parallel: fsdp2`).

All processes must use the model equally often, since each use gathers its weights from all of them:
whoever has fewer micro-batches or texts to score makes up for it with passes that count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch
from fuse_train.disk.checksums import with_checksums
from fuse_train.disk.folders import publish_folder
from fuse_train.loop.objective import FusionObjective, StepTotals, Sums
from fuse_train.loop.optimizer import NumberedState, load_spread, optimizer_state
from fuse_train.merge.stored_weights import StoredWeights
from fuse_train.model.empty import (
    empty_model,
    fill_buffers,
    saved_names,
    stand_ins,
    stored_name,
    stored_rows,
    weights_folder,
)
from fuse_train.model.generation_config import correct_generation_config
from fuse_train.model.target import Target, check_forward, check_rows, set_up, with_adapters
from fuse_train.sharding.part_files import (
    PARTS_FOLDER,
    PartsRecord,
    StoredParts,
    in_parts,
    part_of,
    write_index,
    write_part,
)
from fuse_train.sharding.root import ReadRows, WholeAround, fill, run_whole, spread, whole_norm
from store_schema.config import ModelRef
from store_schema.errors import ModelError, StorageError
from store_schema.model.models import with_folder
from store_schema.text.tokenizer import SegmentTokenizer

Result = TypeVar("Result")


class ShardedLayout:
    """Several processes with a part of everything that is trained each.

    The selector is small: every process has the whole.

    Args:
        accelerator: Of accelerate.
        section: The recipe.
    """

    can_probe = False

    def __init__(self, accelerator: Any, section: TrainSection) -> None:
        self.accelerator, self._section = accelerator, section
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._root: WholeAround | None = None
        self._objective: FusionObjective | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def root(self) -> WholeAround:
        """The spread model, once it is loaded."""
        if self._root is None:
            raise TypeError("nothing was loaded")
        return self._root

    def load(
        self, ref: ModelRef, tokenizer: SegmentTokenizer, *, checkpoint: Path | None, seed: int
    ) -> Target:
        """As `load_target`; no process ever holds more than its part and one tensor."""
        section, device = self._section, self.accelerator.device
        parts = checkpoint if checkpoint is not None and in_parts(checkpoint) else None
        whole = None if parts is not None else checkpoint
        own = ref if whole is None or section.lora is not None else with_folder(ref, whole)
        folder = weights_folder(own, where="target")
        model = empty_model(own, folder, where="target")
        correct_generation_config(model, where=ref.model)
        check_rows(model, tokenizer, ref)
        saved = saved_names(model)
        with stand_ins(model):
            target = with_adapters(model, section, whole, seed)
        set_up(target, section, ref)
        with ExitStack() as files:
            stored = files.enter_context(StoredWeights(folder, name="target"))
            trained = None if parts is None else files.enter_context(StoredParts(parts))
            fill_buffers(model, stored)
            self._root = spread(model, self._mesh, narrow=section.precision == "bfloat16")
            lacking = fill(self._root, _reader(model, stored, trained, saved), device)
        if lacking:
            raise ModelError(
                f"model of target lacks {len(lacking)} weights under the names of its own layers",
                where=folder,
                got=", ".join(lacking[:3]),
                hint="give a complete checkpoint; or, if its weights are stored in another form, set "
                "train.parallel to ddp",
            )
        self.scored(lambda: check_forward(model, section, ref))
        return target

    def prepare(
        self, objective: FusionObjective, optimizer: torch.optim.Optimizer, resume: Path | None
    ) -> torch.optim.Optimizer:
        self._objective, self._optimizer = objective, optimizer
        if objective.selector is not None:
            objective.selector.to(self.accelerator.device)
        if resume is not None:
            kind = StoredParts if in_parts(resume) else NumberedState
            with kind(resume) as stored:
                load_spread(optimizer, objective, stored)
        return optimizer

    def gradients(self, batches: Sequence[Batch], totals: StepTotals) -> list[Sums]:
        parts: list[Sums] = []
        count = self.accelerator.num_processes
        for number in range(self.most(len(batches))):
            counts = number < len(batches)
            batch = batches[number if counts else 0]
            with self.accelerator.autocast():
                loss, part = self.root(self._objective, batch, totals)
            # Averaged over processes, which is a sum here.
            (loss * (count if counts else 0)).backward()
            if counts:
                parts.append(part)
        self._sum_selector()
        return parts

    def _sum_selector(self) -> None:
        selector = None if self._objective is None else self._objective.selector
        learned = [] if selector is None else [p for p in selector.parameters() if p.requires_grad]
        if not learned:
            return
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in learned]
        )
        dist.all_reduce(flat)
        flat /= self.accelerator.num_processes
        for p, part in zip(learned, torch.split(flat, [p.numel() for p in learned]), strict=True):
            p.grad = part.view_as(p).clone()

    def clip(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> torch.Tensor:
        chosen = [p for p in parameters if p.grad is not None]
        norm = whole_norm([p.grad for p in chosen if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(chosen, limit, norm)
        return norm

    def scored(self, call: Callable[[], Result]) -> Result:
        result: Result = run_whole(self.root, call)
        return result

    def most(self, count: int) -> int:
        highest = torch.tensor(count, device=self.accelerator.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def save(self, publish: Callable[[Callable[[Path], None]], object], target: Target) -> None:
        tensors = target.tensors()
        plain: dict[str, Any] = {}
        if self._objective is not None and self._optimizer is not None:
            state, plain = optimizer_state(self._optimizer, self._objective)
            tensors |= state
        self._together(publish, target, tensors, plain)

    def save_best(self, place: Path, target: Target) -> None:
        self._together(
            lambda write: publish_folder(place, with_checksums(write)),
            target,
            target.tensors(),
            {},
        )

    def _together(
        self,
        publish: Callable[[Callable[[Path], None]], object],
        target: Target,
        tensors: Mapping[str, torch.Tensor],
        plain: dict[str, Any],
    ) -> None:
        """Each process writes its part into the folder that the main one is about to publish."""

        def write(folder: Path) -> None:
            (folder / PARTS_FOLDER).mkdir()
            target.save_config(folder)
            self._write(folder, tensors, plain)

        if self.accelerator.is_main_process:
            publish(write)
        else:
            self._write(None, tensors, plain)
        self.accelerator.wait_for_everyone()

    def _write(
        self, folder: Path | None, tensors: Mapping[str, torch.Tensor], plain: dict[str, Any]
    ) -> None:
        from accelerate.utils import broadcast_object_list, gather_object

        process, count = self.accelerator.process_index, self.accelerator.num_processes
        (place,) = broadcast_object_list([None if folder is None else str(folder)])
        faults, spread_tensors = [], {}
        try:
            parts = {name: part_of(tensors[name]) for name in sorted(tensors)}
            spread_tensors = write_part(Path(place), parts, process, count)
        except OSError as error:
            faults = [(f"process {process}: {error}", error.errno in (ENOSPC, EDQUOT))]
        faults = gather_object(faults)
        if faults:
            got, full = faults[0]
            hint = "check that all processes see the same run folder" if not full else "free space"
            raise StorageError(
                "cannot write a part of a checkpoint",
                where=place,
                got=got,
                hint=f"{hint}, then rerun: earlier checkpoints are kept",
            )
        if folder is not None:
            record = PartsRecord(num_processes=count, tensors=spread_tensors, plain=plain)
            write_index(folder, record)


def _reader(
    model: Any, stored: StoredWeights, trained: StoredParts | None, saved: Mapping[str, str]
) -> ReadRows:
    """Rows of a parameter from a checkpoint's parts, else from the folder of the model."""
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}

    def read(names: list[str], start: int, stop: int) -> torch.Tensor | None:
        if trained is not None:
            own = next((name for name in names if name in trained.record.tensors), None)
            if own is not None:
                return trained.read(own, start, stop)
        name = stored_name(stored, names, saved)
        return None if name is None else stored_rows(stored, name, start, stop, shapes[names[0]])

    return read
