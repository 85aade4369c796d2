"""Checks of a model before any of its weights are loaded: whether it is a causal language model, and
whether its loader supports it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from store_schema.disk.cache import kept_fact
from store_schema.errors import ModelError
from store_schema.fingerprint import bytes_digest
from store_schema.model.causal_config import require_causal_config
from store_schema.model.class_config import knows_type, transformers_config
from store_schema.model.models import model_config, with_folder
from store_schema.model.weight_files import require_no_adapter
from store_schema.model.weight_shapes import require_fitting_weights, stored_tensors

if TYPE_CHECKING:
    from store_schema.config import ModelRef

Loader = Literal["transformers", "vllm", "auto"]
"""What loads a model; auto: one of the two, depending on the machine."""


def require_language_model(ref: ModelRef, folder: Path, *, name: str, loader: Loader) -> None:
    """Refuse a model that cannot be run as a causal language model, by its config and by the headers of
    its weight files, if they are there.

    If vLLM will load it and transformers does not know its type, only the config is checked. That a
    model passed is kept by the content of its config and those headers (see `kept_fact`), but not for
    a model with Python code of its own that is run.

    Args:
        ref: The model in the run file.
        folder: Its local folder.
        name: The model's name in the run.
        loader: What will load it.

    Raises:
        ModelError: It cannot be run; names the file and what is wrong.
    """
    require_no_adapter(folder)
    own = model_config(folder)
    require_causal_config(own, name=name, folder=folder)
    kind = own.get("model_type")

    def passes() -> bool:
        if loader != "vllm" or not isinstance(kind, str) or knows_type(kind):
            place = with_folder(ref, folder)
            require_fitting_weights(place, transformers_config(place, of=name), name=name)
        return True

    if ref.trust_remote_code:
        passes()
        return
    config = bytes_digest((folder / "config.json").read_bytes())
    tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in stored_tensors(folder)]
    kept_fact("language-model", [config, tensors, loader], passes)


def require_packages(folder: Path, *, name: str) -> None:
    """Refuse a quantised checkpoint for which transformers lacks a package.

    A missing GPU is no error here: another machine may have one.

    Args:
        folder: Folder of a model that passed `require_language_model`.
        name: The model's name in the run.

    Raises:
        ModelError: A package is missing; names it.
    """
    quantization = model_config(folder).get("quantization_config")
    if not isinstance(quantization, dict):
        return
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment()
    except ImportError as error:
        raise ModelError(
            f"transformers lacks a package for the quantised weights of {name}",
            where=f"{folder}, config.json",
            got=f"quantization_config: {str(error)[:200]}",
            hint="install it, or give the model in bfloat16; vLLM has kernels of its own "
            "(`extract.engine: vllm`)",
        ) from error
    except Exception:  # any other fault is left to the loader
        return
