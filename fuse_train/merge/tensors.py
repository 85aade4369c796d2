"""One tensor of all models, merged block by block.

K models beside the base, E elements of a block
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fuse_train.merge.inputs import Input, Inputs
from fuse_train.merge.kind import Block
from fuse_train.merge.recipe import MergeSettings
from fuse_train.merge.stored_weights import FLOATS
from store_schema.errors import ModelError

_LEAST_ELEMENTS, _MOST_ELEMENTS = 1 << 14, 1 << 20
_PARTS = 16
"""float32 arrays of a block's size that a method may need for each model."""


def block_elements(largest_bytes: int, num_models: int) -> int:
    """Elements of a block, such that merging it takes no more memory than the largest tensor.

    Args:
        largest_bytes: Bytes of the largest tensor of the models.
        num_models: Number of models, with the base.
    """
    fitting = largest_bytes // (4 * _PARTS * (num_models + 1))
    return max(_LEAST_ELEMENTS, min(_MOST_ELEMENTS, fitting))


class Blocks:
    """All blocks of a float tensor, read again at each iteration; a single block is kept in memory.

    Args:
        inputs: The models.
        name: Name of the tensor.
        recipe: Has weights and seed.
        most_elements: Most elements of a block; for methods that need whole rows at least one row.
    """

    def __init__(
        self, inputs: Inputs, name: str, recipe: MergeSettings, most_elements: int
    ) -> None:
        self._inputs, self._name, self._seed = inputs, name, recipe.seed
        self._stored = inputs.kept.weights.tensors[name]
        self._elements = most_elements
        if recipe.kind.whole_rows:
            row = self._stored.row_length
            self._elements = max(1, most_elements // max(row, 1)) * row
        self._weights_K = torch.tensor(recipe.weights_of(len(inputs.models)), dtype=torch.float32)
        self._kept: Block | None = None

    def __iter__(self) -> Iterator[Block]:
        total = self._stored.num_elements
        for start in range(0, total, self._elements):
            if self._kept is not None:
                yield self._kept
                continue
            block = self._read(start, min(self._elements, total - start))
            if self._elements >= total:
                self._kept = block
            yield block

    def _read(self, start: int, count: int) -> Block:
        inputs = self._inputs
        models_KE = torch.empty(len(inputs.models), count)
        for row_E, model in zip(models_KE, inputs.models, strict=True):
            row_E.copy_(self._finite(model, start, count))
        base_E = None
        if inputs.base is not None:
            base_E = self._finite(inputs.base, start, count).float()
        return Block(
            name=self._name,
            start=start,
            row_length=self._stored.row_length,
            models_KE=models_KE,
            base_E=base_E,
            weights_K=self._weights_K,
            seed=self._seed,
        )

    def _finite(self, model: Input, start: int, count: int) -> torch.Tensor:
        values_E = model.weights.read(self._name, start, count)
        # A finite sum has only finite terms; another may just be too large, so terms are checked.
        if not values_E.sum(dtype=torch.float64).isfinite() and not values_E.isfinite().all():
            raise ModelError(
                f"weights of {model.name} are not finite",
                where=model.weights.tensors[self._name].path,
                got=f"NaN or infinity in {self._name}",
                hint="the model is damaged: give an earlier checkpoint",
            )
        return values_E


def merged_bytes(
    blocks: Blocks, recipe: MergeSettings, dtype: str, name: str
) -> Iterator[memoryview]:
    """Bytes of a merged tensor, block by block.

    Args:
        blocks: Blocks of the tensor.
        recipe: Method and options.
        dtype: safetensors' name of the dtype to write.
        name: Name of the tensor, for messages.

    Raises:
        ModelError: A weight is not finite, or the result is beyond what the dtype holds.
    """
    kind, options = recipe.kind, recipe.options
    measured = kind.measure(blocks, options)
    for block in blocks:
        values_E = kind.merge(block, measured, options).to(FLOATS[dtype])
        if not values_E.isfinite().all():
            raise ModelError(
                "merged weights are beyond what their dtype holds",
                where=name,
                got=f"infinity or NaN in {dtype}",
                hint="give a wider one with --dtype, or smaller weights",
            )
        yield values_E.contiguous().view(torch.uint8).numpy().data


def same_bytes(inputs: Inputs, name: str, most_bytes: int) -> Iterator[bytearray]:
    """Bytes of an integer tensor, which must be equal in all models.

    Raises:
        ModelError: A model's differ.
    """
    total = inputs.kept.weights.tensors[name].num_bytes
    for start in range(0, total, most_bytes):
        count = min(most_bytes, total - start)
        kept = inputs.kept.weights.read_bytes(name, start, count)
        for model in inputs.all[1:]:
            stored, own = model.weights.tensors[name], inputs.kept.weights.tensors[name]
            if stored.dtype != own.dtype or model.weights.read_bytes(name, start, count) != kept:
                raise ModelError(
                    f"{model.name} has other whole numbers, which cannot be merged",
                    where=stored.path,
                    expected=f"{name} as {inputs.kept.name} has it",
                    hint="only models of one architecture can be merged",
                )
        yield kept
