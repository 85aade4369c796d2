"""What a method of merging is to the rest of the program; read with the command line: no torch.

A tensor is merged block by block, so that a merge of many models takes no more memory than one of
two. A method that must know something of a whole tensor (a norm, the k-th largest entry) measures it
first, over the same blocks.

K models beside the base, E elements of a block, N elements of a tensor
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from store_schema.registry import Kind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive elements of one tensor, of all models. Methods leave it as it is.

    Args:
        name: Of the tensor.
        start: Index of the first element in the flat tensor.
        row_length: Elements of the tensor's last axis.
        models_KE: float32 weights of the models.
        base_E: float32 weights of the base; None for methods without one.
        weights_K: float32, one for each model.
        seed: Of the merge.
    """

    name: str
    start: int
    row_length: int
    models_KE: torch.Tensor
    base_E: torch.Tensor | None
    weights_K: torch.Tensor
    seed: int

    def deltas(self) -> torch.Tensor:
        """What each model is away from the base: float32 [K, E], new at each call."""
        return self.models_KE - self.required_base

    @property
    def required_base(self) -> torch.Tensor:
        """float32 [E] weights of the base, for methods that have one (`needs_base`)."""
        if self.base_E is None:
            raise TypeError("the method has no base")
        return self.base_E


class MergeKind(Kind):
    """Base of all methods of merging."""

    needs_base: ClassVar[bool] = False
    """Whether it merges differences from a base; without one it merges the weights themselves."""
    weighted: ClassVar[bool] = True
    """Whether it takes a weight for each model; else it finds its own."""
    default_weight: ClassVar[float] = 1.0
    """Of each model where none is given."""
    fewest: ClassVar[int] = 2
    """Least number of models, the base not counted."""
    most: ClassVar[int | None] = None
    """Largest number of models; None for any."""
    whole_rows: ClassVar[bool] = False
    """Whether blocks must hold whole rows of the tensor's last axis."""
    draws: ClassVar[bool] = False
    """Whether the result depends on the seed."""
    paper: ClassVar[str] = ""
    """Where it is from, for the model card."""

    def check(self, options: Any, weights: tuple[float, ...]) -> None:
        """Refuse options and weights that it cannot work with.

        Args:
            options: Its own.
            weights: One for each model.

        Raises:
            ValueError: Says what it needs.
        """

    def measure(self, blocks: Iterable[Block], options: Any) -> Any:
        """What `merge` has to know of a whole tensor.

        Args:
            blocks: Of the tensor, in order; may be gone through as often as need be.
            options: Its own.
        """
        return None

    def merge(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        """Merged weights [E], float32.

        Args:
            block: What is merged.
            measured: What `measure` gave for the tensor.
            options: Its own.
        """
        raise NotImplementedError
