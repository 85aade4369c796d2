"""Compare the tensor names and shapes in a model's safetensors headers with its config.

This finds weights of another model than the config's, and classifiers or reward models, to which a
loader would add an output head (random, or the embedding where the two are tied).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store_schema.errors import ModelError
from store_schema.model.causal_model import load_causal_model
from store_schema.model.weight_files import absent_weights, safetensors_head

if TYPE_CHECKING:
    from store_schema.config import ModelRef

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_OUTER = frozenset(
    {"model", "language_model", "text_model", "transformer", "gpt_neox", "decoder", "backbone"}
)
"""Modules that a text model may be part of; image and audio towers have other names."""
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
)
_OUTPUTS = frozenset({"lm_head", "embed_out", "output"})
_OTHER_TASKS = frozenset(
    {"score", "classifier", "classification_head", "regression_head", "reward_head", "qa_outputs"}
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as described in its file's header.

    Args:
        name: Its name in the checkpoint.
        dtype: safetensors' name of its dtype.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The outermost module of its name that is not in `_OUTER`, such as "lm_head" of
        `model.lm_head.weight`; "" if modules of `_OUTER` come after it."""
        *modules, _ = self.name.split(".")
        inner = [m for m in modules if m not in _OUTER]
        return inner[0] if inner and modules[-len(inner) :] == inner else ""

    def is_matrix(self, modules: frozenset[str]) -> bool:
        """Whether it is the weight matrix, unquantised, of one of these modules."""
        plain = self.dtype in _FLOATS and len(self.shape) == 2 and self.name.endswith(".weight")
        return plain and self.module in modules and self.name.split(".")[-2] in modules


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of a model folder, in the order of their files.

    Args:
        folder: The model's folder.

    Returns:
        The tensors; [] for a folder without safetensors, or whose weights are not fetched yet.

    Raises:
        ModelError: A file is damaged or truncated.
    """
    if absent_weights(folder) is not None:
        return []
    paths = [folder / _SINGLE]
    if not paths[0].is_file():
        if not (folder / _INDEX).is_file():
            return []
        weights = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / str(name) for name in sorted(set(weights.values()))]
    return [
        StoredTensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
        for path in paths
        for name, entry in safetensors_head(path).items()
    ]


def require_fitting_weights(ref: ModelRef, config: Any, *, name: str) -> None:
    """Refuse weights that are not a language model's, or of another model than the config's.

    Shapes of embedding and output head are compared with the config. Where they differ, or there is no
    head (which some models have by design), all shapes are compared with transformers' class.

    Args:
        ref: The model's local folder; its weights need not be there.
        config: The config as transformers reads it.
        name: The model's name in the run.

    Raises:
        ModelError: They do not fit; names the first such tensor.
    """
    folder = Path(ref.model)
    tensors = stored_tensors(folder)
    _require_no_other_task(folder, tensors, name)
    if not _may_not_fit(tensors, config):
        return
    require_shapes_of_class(ref, name=name)


def require_shapes_of_class(ref: ModelRef, *, name: str) -> None:
    """Refuse weights that do not fit transformers' class of the model. They are all read, but to the
    meta device, which takes no memory.

    Args:
        ref: The model's local folder, with its weights.
        name: The model's name in the run.

    Raises:
        ModelError: A weight is missing or of another shape; names the first.
    """
    try:
        load_causal_model(ref, of=name, device_map="meta")
    except ModelError as error:
        if error.__cause__ is None:  # else transformers failed, and vLLM may still load it
            raise


def _require_no_other_task(folder: Path, tensors: list[StoredTensor], name: str) -> None:
    other = next((t for t in tensors if t.module in _OTHER_TASKS), None)
    if other is not None and not any(t.module in _OUTPUTS for t in tensors):
        raise ModelError(
            f"{name} is no language model: its weights are of a classifier or a reward model",
            where=folder,
            expected="an output head over the vocabulary, or a tied embedding",
            got=f"{other.name} of {list(other.shape)}",
            hint="give the causal model of that family",
        )


def _may_not_fit(tensors: list[StoredTensor], config: Any) -> bool:
    """Whether embedding and output head differ from the config, or the head is missing."""
    embedding = next((t for t in tensors if t.is_matrix(_EMBEDDINGS)), None)
    head = next((t for t in tensors if t.is_matrix(_OUTPUTS)), None)
    try:
        text = config.get_text_config()
    except ValueError:  # it has several text parts: left to the loader
        return False
    size = (getattr(text, "vocab_size", None), getattr(text, "hidden_size", None))
    if embedding is None or not isinstance(size[0], int):
        return False
    if any(t is not None and t.shape != size for t in (embedding, head)):
        return True
    tied = {getattr(part, "tie_word_embeddings", None) for part in (config, text)} != {False}
    rest = (t for t in tensors if t is not embedding)
    return not tied and not any(embedding.shape[0] in t.shape for t in rest)
