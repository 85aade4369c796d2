"""The optimizer, chosen by its name in transformers, and its state saved as plain tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fuse_train.config import TrainSection
from fuse_train.sharding.part_files import StateTensor, StoredParts, num_rows
from fuse_train.sharding.root import like_spread
from store_schema.errors import ConfigError, CorruptionError

OPTIMIZER_FILE = "optimizer.safetensors"
_RECORD = "record"
"""The only metadata key: safetensors writes several keys in an order that varies."""

_BETAS: dict[str, Any] = {"betas": (0.9, 0.95)}


def build_optimizer(
    model: torch.nn.Module, selector: Iterable[torch.nn.Parameter], section: TrainSection
) -> torch.optim.Optimizer:
    """The optimizer of `train.optim`, weight decay on the target's matrices only, and the selector at
    its own rate.

    Source: FuseLLM's recipe (AdamW, betas 0.9, 0.95, weight decay 0.1). Departure: biases, norms and
    the selector do not decay.

    Raises:
        ConfigError: `train.optim_kwargs` do not fit that optimizer.
    """
    selector_lr = section.lr if section.learned is None else section.learned.lr
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim >= 2],
            "peak_lr": section.lr,
            "weight_decay": section.weight_decay,
        },
        {
            "params": [p for p in trainable if p.ndim < 2],
            "peak_lr": section.lr,
            "weight_decay": 0.0,
        },
        {"params": list(selector), "peak_lr": selector_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind, defaults = _kind(section.optim)
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in section.optim_kwargs.items()
    }
    for name, field in (("weight_decay", "train.weight_decay"), ("lr", "train.lr")):
        if name in arguments:
            raise ConfigError(
                "has a field of its own",
                where=f"train.optim_kwargs.{name}",
                hint=f"use {field}",
            )
    try:
        optimizer: torch.optim.Optimizer = kind(groups, lr=section.lr, **(defaults | arguments))
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"do not fit optimizer {section.optim}", where="train.optim_kwargs", got=str(error)
        ) from error
    return optimizer


def _kind(name: str) -> tuple[Any, dict[str, Any]]:
    """Class and defaults of an optimizer by its name in transformers."""
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor, {"scale_parameter": False, "relative_step": False}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "adamw_torch": (torch.optim.AdamW, _BETAS),
        "adamw_torch_fused": (torch.optim.AdamW, _BETAS | {"fused": True}),
        "sgd": (torch.optim.SGD, {}),
        "adagrad": (torch.optim.Adagrad, {}),
        "rmsprop": (torch.optim.RMSprop, {}),
    }
    return kinds[name]


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of every parameter into an existing folder, by number, without pickle."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    record = json.dumps({"shapes": _shapes(optimizer), "plain": plain}, sort_keys=True)
    save_file(tensors, folder / OPTIMIZER_FILE, {_RECORD: record})


def parameter_names(objective: Any) -> dict[int, str]:
    """Names of the parameters of a `FusionObjective`, by `id`."""
    names = {id(p): name for name, p in objective.model.named_parameters()}
    if objective.selector is not None:
        names |= {id(p): f"selector.{name}" for name, p in objective.selector.named_parameters()}
    return names


def optimizer_state(
    optimizer: torch.optim.Optimizer, objective: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of every parameter as `PARAMETER/KEY`: tensors, and values that are none."""
    names = parameter_names(objective)
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            kind = tensors if isinstance(value, torch.Tensor) else plain
            kind[f"{names[id(parameter)]}/{key}"] = value
    return tensors, plain


def load_spread(
    optimizer: torch.optim.Optimizer, objective: Any, stored: StoredParts | NumberedState
) -> None:
    """Put saved state into an optimizer whose parameters, or whose saved state, are spread over
    processes; each reads its own rows.

    Raises:
        CorruptionError: A file is damaged.
    """
    names = parameter_names(objective)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for number, parameter in enumerate(parameters):
        found = stored.state_of(names[id(parameter)], number)
        if found:
            state[number] = {key: _own_part(parameter, value) for key, value in found.items()}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _own_part(parameter: torch.Tensor, stored: StateTensor | Any) -> Any:
    if not isinstance(stored, StateTensor):
        return stored
    if tuple(parameter.shape) == stored.shape:
        return like_spread(parameter, stored.read)
    return stored.read(0, num_rows(stored.shape))


class NumberedState:
    """What `save_optimizer` wrote, read by rows. A context manager, which closes the file.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CorruptionError: The file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        where = folder / "trainer" / OPTIMIZER_FILE
        self._open = ExitStack()
        try:
            self._file = self._open.enter_context(safe_open(where, framework="pt"))
            self._plain = json.loads((self._file.metadata() or {})[_RECORD])["plain"]
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise CorruptionError("optimizer unreadable", where=where, got=error) from error
        self._names: list[str] = list(self._file.keys())

    def __enter__(self) -> NumberedState:
        return self

    def __exit__(self, *ended: object) -> None:
        self._open.close()

    def state_of(self, parameter: str, number: int) -> dict[str, StateTensor | Any]:
        """As of `StoredParts`, by the number alone."""
        head = f"{number}."
        found = {n.removeprefix(head): v for n, v in self._plain.items() if n.startswith(head)}
        for name in self._names:
            if name.startswith(head):
                shape = tuple(self._file.get_slice(name).get_shape())
                found[name.removeprefix(head)] = StateTensor(shape, partial(self._rows, name))
        return found

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._file.get_slice(name)
        if not stored.get_shape():
            whole: torch.Tensor = self._file.get_tensor(name)
            return whole
        rows: torch.Tensor = stored[start:stop]
        return rows


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put saved state back into an optimizer over the same parameters.

    Raises:
        CorruptionError: The file is damaged, or is of other parameters.
    """
    where = folder / OPTIMIZER_FILE
    try:
        with safe_open(where, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RECORD])
            values: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes, plain = record["shapes"], record["plain"]
        values |= plain
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise CorruptionError("optimizer unreadable", where=where, got=error) from error
    if shapes != _shapes(optimizer):
        raise CorruptionError("optimizer of other parameters", where=where)
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
