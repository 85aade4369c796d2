"""What the heads of a model's safetensors files say, against its config.

A file's names and shapes show a model whose config is another's, and a classifier or reward model that
a loader would give an output head of its own (the embedding, where the two are tied).
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
"""Modules that a text model may lie in; towers for pictures and sound have other names."""
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
)
_OUTPUTS = frozenset({"lm_head", "embed_out", "output"})
_OTHER_TASKS = frozenset(
    {"score", "classifier", "classification_head", "regression_head", "reward_head", "qa_outputs"}
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the head of its file describes it.

    Args:
        name: In the checkpoint.
        dtype: By safetensors' name.
        shape: Of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The last module of its name that holds no text model: "lm_head" of `model.lm_head.weight`;
        empty for one deeper inside a model."""
        *modules, _ = self.name.split(".")
        inner = [m for m in modules if m not in _OUTER]
        return inner[0] if inner and modules[-len(inner) :] == inner else ""

    def is_matrix(self, modules: frozenset[str]) -> bool:
        """Whether it is the plain floating matrix of one of these modules."""
        plain = self.dtype in _FLOATS and len(self.shape) == 2 and self.name.endswith(".weight")
        return plain and self.module in modules and self.name.split(".")[-2] in modules


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of a model folder, in the order of their files.

    Args:
        folder: Of the model.

    Returns:
        None of a folder without safetensors, or with weights that are not fetched yet.

    Raises:
        ModelError: A file is damaged or cut short.
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
    """Refuse weights that are no language model's, or another model's than the config describes.

    Embedding and output head are compared with the config's numbers. Where these differ, or there is no
    head, which some models have by design, transformers says whether its class of that model fits.

    Args:
        ref: A local folder; its weights need not be there.
        config: As transformers reads it.
        name: Of the model in the run.

    Raises:
        ModelError: Names the first tensor that does not fit.
    """
    folder = Path(ref.model)
    tensors = stored_tensors(folder)
    _require_no_other_task(folder, tensors, name)
    if not _raises_doubt(tensors, config):
        return
    require_shapes_of_class(ref, name=name)


def require_shapes_of_class(ref: ModelRef, *, name: str) -> None:
    """Refuse weights that do not fit transformers' class of the model. Reads them all and keeps none:
    they go to a device without memory.

    Args:
        ref: A local folder, with its weights.
        name: Of the model in the run.

    Raises:
        ModelError: Names the first weight that is missing or of another shape.
    """
    try:
        load_causal_model(ref, of=name, device_map="meta")
    except ModelError as error:
        if error.__cause__ is None:  # else vLLM may know more; the loader will tell
            raise


def _require_no_other_task(folder: Path, tensors: list[StoredTensor], name: str) -> None:
    other = next((t for t in tensors if t.module in _OTHER_TASKS), None)
    if other is not None and not any(t.module in _OUTPUTS for t in tensors):
        raise ModelError(
            f"{name} is no language model: its weights are a classifier's or a reward model's",
            where=folder,
            expected="an output head over the vocabulary, or an embedding that is one",
            got=f"{other.name} of {list(other.shape)}",
            hint="give the causal model of that family",
        )


def _raises_doubt(tensors: list[StoredTensor], config: Any) -> bool:
    """Whether embedding and output head are not what the config alone lets expect."""
    embedding = next((t for t in tensors if t.is_matrix(_EMBEDDINGS)), None)
    head = next((t for t in tensors if t.is_matrix(_OUTPUTS)), None)
    try:
        text = config.get_text_config()
    except ValueError:  # it has several, and a loader knows which is meant
        return False
    size = (getattr(text, "vocab_size", None), getattr(text, "hidden_size", None))
    if embedding is None or not isinstance(size[0], int):
        return False
    if any(t is not None and t.shape != size for t in (embedding, head)):
        return True
    tied = {getattr(part, "tie_word_embeddings", None) for part in (config, text)} != {False}
    others = (t for t in tensors if t is not embedding)
    return not tied and not any(embedding.shape[0] in t.shape for t in others)
