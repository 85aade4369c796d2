"""A model whose weights are spread over processes by torch's `fully_shard` (FSDP2).

Every decoder block is a group of its own, gathered while it is used. The other weights, head and
embedding among them, are the root's group: they are whole while `WholeAround` runs a function, which is
where the fused loss reads the head's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from fuse_train.sharding.part_files import row_bounds

ReadRows = Callable[[list[str], int, int], torch.Tensor | None]
"""From a parameter's names (several where it is tied) and its rows to their values; None keeps them."""


class WholeAround(nn.Module):
    """Calls a function while the model's root group is whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: the decoder blocks."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)


def spread(model: nn.Module, mesh: DeviceMesh, *, narrow: bool) -> WholeAround:
    """Spread a model's parameters, real or on the meta device, over the processes of a mesh.

    Args:
        model: Changed in place; its parameters become DTensors.
        mesh: Of one axis.
        narrow: Whether weights are gathered in bfloat16; parameters and sums of gradients are float32.

    Returns:
        The root, through which every use of the model must go.
    """
    root = WholeAround(model)
    dtype = torch.bfloat16 if narrow else None
    for block in blocks_of(model):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a batch holds log-probabilities, which stay as they are
    )
    fully_shard(root, mesh=mesh, mp_policy=policy)
    return root


def run_whole(root: WholeAround, call: Callable[[], Any]) -> Any:
    """Call a function that uses the model without gradients; afterwards all is spread again."""
    result = root(call)
    if isinstance(root, FSDPModule):
        root.reshard()  # what has a backward pass is spread again by that
    return result


@torch.no_grad()
def fill(root: WholeAround, read: ReadRows, device: torch.device) -> list[str]:
    """Give the model's parameters values, each process reading its own rows, a tensor at a time.

    Args:
        root: From `spread`.
        read: Gives the rows.
        device: Device for them.

    Returns:
        Names of parameters on the meta device that have got no values.
    """
    lacking = []
    for names, places in named_places(root.model).items():
        module, name = places[0]
        parameter = module.get_parameter(name)
        if not isinstance(parameter, DTensor):
            raise TypeError(f"{names[0]} is not spread")
        start, stop = own_rows(parameter)
        rows = read(list(names), start, stop)
        local = parameter.to_local()
        if rows is None:
            if local.is_meta:
                lacking.append(names[0])
        elif local.is_meta:
            values = rows.to(device=device, dtype=parameter.dtype)
            made = nn.Parameter(_spread(parameter, values), parameter.requires_grad)
            for holder, own_name in places:
                setattr(holder, own_name, made)
        else:
            local.copy_(rows)
    return lacking


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """First row of this process's part of a spread tensor, and the one behind its last."""
    mesh = tensor.device_mesh
    bounds = row_bounds(tensor.shape[0], mesh.size())
    rank = mesh.get_local_rank()
    return bounds[rank], bounds[rank + 1]


def like_spread(tensor: torch.Tensor, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Stored values of the same shape, spread in the same way; whole if the tensor is.

    Args:
        tensor: On the device that the values go to.
        read: From a first row and the one behind the last to these rows.
    """
    if not isinstance(tensor, DTensor):
        return read(0, tensor.shape[0] if tensor.ndim else 1)
    return _spread(tensor, read(*own_rows(tensor)).to(tensor.device))


def _spread(like: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        like.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def named_places(model: nn.Module) -> dict[tuple[str, ...], list[tuple[nn.Module, str]]]:
    """All names of each parameter, and the modules that hold it under their own name for it."""
    names: dict[int, list[str]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
            places.setdefault(id(parameter), []).append((module, name))
    return {tuple(names[key]): places[key] for key in names}


def whole_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of gradients, of which some may be spread, the same in all processes."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
