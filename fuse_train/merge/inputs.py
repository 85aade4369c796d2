"""Models to merge: located, opened, and compared with each other before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fuse_train.merge.stored_weights import StoredWeights
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, ModelError
from store_schema.fingerprint import model_fingerprint
from store_schema.model.class_config import transformers_config
from store_schema.model.model_check import require_language_model
from store_schema.model.models import model_config, resolve_model, with_folder
from store_schema.text.tokenizer import SegmentTokenizer
from store_schema.validation import validation_line

_log = logging.getLogger(__name__)

_SAME_ALWAYS = (
    *("model_type", "architectures", "hidden_act", "hidden_activation", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "tie_word_embeddings"),
)
"""Config fields that change what weights of the same shapes compute."""
_NO_MATTER = (
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"),
)
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Input:
    """One model.

    Args:
        name: Name as the user gave it.
        folder: Folder of the model.
        fingerprint: Fingerprint of config and weights.
        weights: Its weights, open for reading.
    """

    name: str
    folder: Path
    fingerprint: str
    weights: StoredWeights


@dataclass(frozen=True, slots=True)
class Inputs:
    """All models of a merge; every one has the tensors of the first.

    Args:
        base: None for methods without one.
        models: In the order given.
        tokenizer_fingerprint: Fingerprint of the merged model's tokenizer.
        differences: Config fields in which a model differs from `kept`, by model.
    """

    base: Input | None
    models: tuple[Input, ...]
    tokenizer_fingerprint: str
    differences: dict[str, tuple[str, ...]]

    @property
    def kept(self) -> Input:
        """The model whose config, tokenizer and list of tensors the merged model gets."""
        return self.base or self.models[0]

    @property
    def all(self) -> tuple[Input, ...]:
        """All models, `kept` first."""
        return self.models if self.base is None else (self.base, *self.models)


def open_inputs(base: str | None, models: Sequence[str], files: ExitStack) -> Inputs:
    """Locate and open the models, and compare them.

    Args:
        base: Folder, GGUF file or hub name; None for methods without a base.
        models: Likewise.
        files: Will close their files.

    Raises:
        ConfigError: A name that cannot be a model's, such as one with a variable that is not set.
        ModelError: One cannot be loaded, is no causal model, or differs from the first in architecture,
            names or shapes of tensors.
        TokenizerError: A tokenizer cannot be read.
    """
    names = [*([] if base is None else [base]), *models]
    refs = [_local(name) for name in names]
    for name, ref in zip(names, refs, strict=True):
        _require_plain(name, Path(ref.model))
        require_language_model(ref, Path(ref.model), name=name, loader="transformers")
    differences = {
        name: _same_architecture(names[0], refs[0], name, ref)
        for name, ref in zip(names[1:], refs[1:], strict=True)
    }
    tokenizer_fingerprint = _one_tokenizer(names, refs)
    inputs = tuple(
        Input(name, Path(ref.model), model_fingerprint(Path(ref.model)), weights)
        for name, ref in zip(names, refs, strict=True)
        for weights in [files.enter_context(StoredWeights(Path(ref.model), name=name))]
    )
    for other in inputs[1:]:
        require_same_tensors(inputs[0].weights, other.weights, tied=_is_tied(refs[0]))
    return Inputs(
        base=None if base is None else inputs[0],
        models=inputs if base is None else inputs[1:],
        tokenizer_fingerprint=tokenizer_fingerprint,
        differences={name: fields for name, fields in differences.items() if fields},
    )


def _local(name: str) -> ModelRef:
    try:
        ref = ModelRef(model=name)
    except ValidationError as error:
        raise ConfigError("model refused", where="merge", got=validation_line(error)) from error
    return with_folder(ref, resolve_model(ref))


def _require_plain(name: str, folder: Path) -> None:
    if model_config(folder).get("quantization_config") is not None:
        raise ModelError(
            f"weights of {name} are quantised and cannot be merged",
            where=folder / "config.json",
            got="quantization_config",
            hint="give the model as it was before",
        )


def _same_architecture(
    first_name: str, first: ModelRef, name: str, ref: ModelRef
) -> tuple[str, ...]:
    """Fields in which two configs differ, if the weights still mean the same.

    Raises:
        ModelError: They differ in a field of `_SAME_ALWAYS`.
    """
    kept, other = _config(first, first_name), _config(ref, name)
    fields = sorted(
        field
        for field in kept.keys() | other.keys()
        if field not in _NO_MATTER and kept.get(field) != other.get(field)
    )
    wrong = [field for field in _SAME_ALWAYS if field in fields]
    if None in (kept.get("architectures"), other.get("architectures")):
        wrong = [field for field in wrong if field != "architectures"]
    if wrong:
        raise ModelError(
            f"{name} has another architecture",
            where=Path(ref.model) / "config.json",
            expected=f"{wrong[0]} {kept.get(wrong[0])}, as {first_name} has",
            got=other.get(wrong[0]),
            hint="only models of one architecture can be merged",
        )
    if fields:
        _log.warning(
            "config of %s differs from that of %s, which is kept, in %s",
            name, first_name, ", ".join(fields),
        )  # fmt: skip
    return tuple(fields)


def _config(ref: ModelRef, name: str) -> dict[str, Any]:
    config = transformers_config(ref, of=name)
    whole: dict[str, Any] = config.to_dict()
    text: dict[str, Any] = config.get_text_config().to_dict()
    return text | {k: v for k, v in whole.items() if not isinstance(v, dict) or k not in text}


def _is_tied(ref: ModelRef) -> bool:
    return bool(_config(ref, ref.model).get("tie_word_embeddings"))


def _one_tokenizer(names: Sequence[str], refs: Sequence[ModelRef]) -> str:
    """Fingerprint of the first model's tokenizer; the others must tokenize text as it does."""
    whole, rules = _fingerprints(names[0], refs[0])
    for name, ref in zip(names[1:], refs[1:], strict=True):
        other, its_rules = _fingerprints(name, ref)
        if its_rules != rules:
            raise ModelError(
                f"{name} has another tokenizer",
                where=ref.model,
                expected=f"fingerprint {rules}, as {names[0]} has",
                got=f"fingerprint {its_rules}",
                hint="only models that read the same tokens can be merged",
            )
        if other != whole:
            _log.warning(
                "%s differs from %s, which is kept, in chat template or in tokens before a text",
                name, names[0],
            )  # fmt: skip
    return whole


def _fingerprints(name: str, ref: ModelRef) -> tuple[str, str]:
    tokenizer = SegmentTokenizer.load(ref, name=name)
    return tokenizer.fingerprint, tokenizer.rules_fingerprint


def require_same_tensors(first: StoredWeights, other: StoredWeights, *, tied: bool = False) -> None:
    """Refuse weights whose tensors are not those of the first.

    An output head that is tied to the embedding may be stored or not: where `first` has it and `other`
    does not, the embedding of `other` takes its place; where only `other` has it, it is ignored.

    Args:
        first: Weights with the expected tensors.
        other: Weights to compare.
        tied: Whether output head and embedding are one matrix.

    Raises:
        ModelError: Names the first tensor that is missing, too much, or of another shape.
    """
    missing = [tensor for tensor in first.tensors if tensor not in other.tensors]
    extra = [tensor for tensor in other.tensors if tensor not in first.tensors]
    if tied:
        heads = [tensor for tensor in missing if tensor.endswith(_OUTPUT_HEADS)]
        for head in heads:
            embedding = _embedding(other, first.tensors[head].shape)
            if embedding is not None:
                other.tensors[head] = other.tensors[embedding]
                missing.remove(head)
        extra = [tensor for tensor in extra if not tensor.endswith(_OUTPUT_HEADS)]
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has more", extra)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ModelError(
            f"{other.name} {what} tensors"
            + (f" that {first.name} has" if missing else f" than {first.name}"),
            where=other.folder,
            got=", ".join(names[:_SHOWN]) + more,
            hint="only models of one shape can be merged",
        )
    wrong = [
        tensor
        for tensor, stored in first.tensors.items()
        if other.tensors[tensor].shape != stored.shape
        or other.tensors[tensor].is_float != stored.is_float
    ]
    if wrong:
        kept, got = first.tensors[wrong[0]], other.tensors[wrong[0]]
        more = f" (and {len(wrong) - 1} more that do not fit)" if len(wrong) > 1 else ""
        raise ModelError(
            f"{other.name} has tensors of other shapes",
            where=other.folder,
            expected=f"{wrong[0]} of {list(kept.shape)} in {kept.dtype}, as {first.name} has",
            got=f"{list(got.shape)} in {got.dtype}{more}",
            hint="only models of one shape can be merged",
        )


def _embedding(weights: StoredWeights, shape: tuple[int, ...]) -> str | None:
    """Name of the only tensor with the shape of the output head; None if there are several or none."""
    fitting = [tensor for tensor, stored in weights.tensors.items() if stored.shape == shape]
    return fitting[0] if len(fitting) == 1 else None
