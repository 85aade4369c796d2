"""Base class of methods of merging; imported for the command line, so it does not import torch.

A tensor is merged block by block, so that a merge of many models takes no more memory than one of
two. A method that needs a figure of the whole tensor (a norm, the k-th largest entry) measures it
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
    """Consecutive elements of one tensor, of all models. Methods must not change it.

    Args:
        name: Name of the tensor.
        start: Index of the first element in the flat tensor.
        row_length: Elements of the tensor's last axis.
        models_KE: float32 weights of the models.
        base_E: float32 weights of the base; None for methods without one.
        weights_K: float32, one for each model.
        seed: Seed of the merge.
    """

    name: str
    start: int
    row_length: int
    models_KE: torch.Tensor
    base_E: torch.Tensor | None
    weights_K: torch.Tensor
    seed: int

    def deltas(self) -> torch.Tensor:
        """Each model minus the base: float32 [K, E], a new tensor at each call."""
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
    """Whether it takes a weight for each model; else it computes its own."""
    default_weight: ClassVar[float] = 1.0
    """Weight of each model if the recipe has none."""
    fewest: ClassVar[int] = 2
    """Least number of models, the base not counted."""
    most: ClassVar[int | None] = None
    """Largest number of models; None for any."""
    whole_rows: ClassVar[bool] = False
    """Whether blocks must hold whole rows of the tensor's last axis."""
    draws: ClassVar[bool] = False
    """Whether the result depends on the seed."""
    paper: ClassVar[str] = ""
    """Its paper, for the model card."""

    def check(self, options: Any, weights: tuple[float, ...]) -> None:
        """Refuse options and weights that it cannot work with.

        Args:
            options: Its options.
            weights: One for each model.

        Raises:
            ValueError: The message says what it needs.
        """

    def measure(self, blocks: Iterable[Block], options: Any) -> Any:
        """What `merge` needs to know of a whole tensor; None for nothing.

        Args:
            blocks: Blocks of the tensor, in order; may be iterated several times.
            options: Its options.
        """
        return None

    def merge(self, block: Block, measured: Any, options: Any) -> torch.Tensor:
        """Merged weights [E], float32.

        Args:
            block: The block to merge.
            measured: Result of `measure` for the tensor.
            options: Its options.
        """
        raise NotImplementedError
