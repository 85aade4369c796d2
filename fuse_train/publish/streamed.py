"""The final folder of weights that are spread over files of a checkpoint: no process loads a model.

One tensor at a time is read from the files, merged with its adapter if there is one, and written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuse_train.disk.folders import publish_folder
from fuse_train.merge.stored_weights import StoredWeights
from fuse_train.merge.written_weights import NewTensor, write_weights
from fuse_train.model.adapters import new_adapters, save_adapters
from fuse_train.model.empty import (
    empty_model,
    plain_name,
    saved_buffers,
    saved_names,
    stand_ins,
    stored_name,
    stored_rows,
    weights_folder,
)
from fuse_train.model.generation_config import correct_generation_config, name_turn_end
from fuse_train.model.models import own_dtype
from fuse_train.model.target import fill_whole
from fuse_train.publish.final import TRAIN_AGAIN, FinalChoice, FinalFiles
from fuse_train.sharding.part_files import DTYPE_NAMES, StoredParts, num_rows, pieces
from fuse_train.sharding.root import named_places
from store_schema.config import ModelRef
from store_schema.errors import ModelError


def publish_streamed(
    root: Path, choice: FinalChoice, target: ModelRef, files: FinalFiles, *, adapters: bool
) -> None:
    """As `publish_trained`, of a checkpoint in parts or of the target before training.

    Raises:
        StorageError: A file cannot be written; nothing is published.
        ModelError: The target's weights cannot be read.
        CorruptionError: The checkpoint's cannot.
    """
    folder, dtype = weights_folder(target, where="target"), own_dtype(target)
    plain = empty_model(target, folder, where="target")
    correct_generation_config(plain, where=target.model)
    name_turn_end(plain, files.tokenizer)
    with ExitStack() as opened:
        stored = opened.enter_context(StoredWeights(folder, name="target"))
        parts, model = None, empty_model(target, folder, where="target")
        if choice.folder is not None:
            parts = opened.enter_context(StoredParts(choice.folder, hint=TRAIN_AGAIN))
        if adapters and parts is not None and choice.folder is not None:
            with stand_ins(model):
                peft = new_adapters(model, choice.folder, trainable=False)
            fill_whole(model, parts)
            publish_folder(root / "adapter", lambda place: save_adapters(peft, place))
        weights = _Weights(model, stored, parts, dtype, saved_names(plain))

        def write(place: Path) -> None:
            plain.to(dtype).save_pretrained(place, state_dict={})
            write_weights(place, weights.listed(), weights.content)

        publish_folder(root / "final", lambda place: files.write(place, write))


class _Weights:
    """The final weights, made when they are asked for.

    Args:
        model: Without weights, but with those of adapters.
        stored: The target before training.
        parts: What was trained; None for nothing.
        dtype: Of the final weights.
        saved: From `saved_names`.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: StoredWeights,
        parts: StoredParts | None,
        dtype: torch.dtype,
        saved: Mapping[str, str],
    ) -> None:
        self._stored, self._parts, self._dtype, self._saved = stored, parts, dtype, saved
        self._tensors: dict[str, tuple[list[str], torch.Tensor]] = {}
        for names, ((module, own), *_) in named_places(model).items():
            if ".lora_" not in names[0]:
                self._tensors[self._final_name(names[0])] = ([*names], module.get_parameter(own))
        for name, buffer in saved_buffers(model).items():
            self._tensors[self._final_name(name)] = ([name], buffer)
        self._adapted: dict[str, Any] = {
            self._final_name(f"{name}.weight"): module
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }

    def listed(self) -> list[NewTensor]:
        """All tensors, tied ones once, in the order of the model."""
        found = []
        for name, (_, tensor) in self._tensors.items():
            dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
            shape = tuple(tensor.shape)
            size = math.prod(shape) * dtype.itemsize
            found.append(NewTensor(name, DTYPE_NAMES[dtype], shape, size))
        return found

    def content(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor."""
        names, like = self._tensors[name]
        value = self._value(names, like)
        layer = self._adapted.get(name)
        if layer is not None:
            value = value.float() + layer.get_delta_weight("default")
        yield from pieces(value.to(self._dtype) if value.is_floating_point() else value)

    def _final_name(self, name: str) -> str:
        plain = plain_name(name)
        return self._saved.get(plain, plain)

    def _value(self, names: list[str], like: torch.Tensor) -> torch.Tensor:
        if self._parts is not None:
            own = next((name for name in names if name in self._parts.record.tensors), None)
            if own is not None:
                return self._parts.read(own)
        name = stored_name(self._stored, names, self._saved)
        if name is not None and like.is_floating_point():
            count = num_rows(tuple(like.shape))
            return stored_rows(self._stored, name, 0, count, like.shape)
        if like.is_meta:
            raise ModelError(
                "model of target lacks a weight", where=self._stored.folder, got=names[0]
            )
        return like
