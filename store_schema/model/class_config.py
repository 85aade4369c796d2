"""What transformers says about a model by its config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store_schema.errors import ModelError
from store_schema.fingerprint import bytes_digest
from store_schema.model.models import config_folder, local_ref, model_config

if TYPE_CHECKING:
    from store_schema.config import ModelRef
    from store_schema.disk.cache import Fact


def config_fact(ref: ModelRef, what: str, find: Callable[[], Fact]) -> Fact:
    """A fact that depends on a model's config.json alone, kept as in `kept_fact`.

    It is found again each time for a model with Python code of its own that is run.

    Args:
        ref: The model in the run file.
        what: Kind of the fact.
        find: Finds it.

    Raises:
        ModelError: See `config_folder`.
    """
    folder = None if ref.trust_remote_code else config_folder(ref)
    if folder is None:
        return find()
    from store_schema.disk.cache import kept_fact  # here, since an engine runs without pydantic

    return kept_fact(what, bytes_digest((folder / "config.json").read_bytes()), find)


def model_rows(ref: ModelRef) -> int | None:
    """The number of rows of the model's embedding and output head.

    It is `vocab_size` in config.json, in `text_config` for a model of several parts; without it, the
    default of transformers' class (Gemma 3 4B, 12B and 27B as published).

    Returns:
        The rows, with padding; None for a folder without config.json (only a tokenizer).

    Raises:
        ModelError: config.json is unreadable, or neither it nor transformers has the number.
    """
    folder = config_folder(ref)
    if folder is None:
        return None
    named = _named_rows(model_config(folder, whole=True))
    return config_fact(ref, "rows", lambda: _class_rows(ref)) if named is None else named


def _named_rows(config: dict[str, Any]) -> int | None:
    """`vocab_size` in config.json: of `text_config` if there is one; None if it has none."""
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def _class_rows(ref: ModelRef) -> int:
    try:
        config = transformers_config(ref, of=ref.model)
    except ModelError as error:
        if "vocab_size" in str(error.got):  # there is one, of the wrong type
            raise
        raise ModelError(
            "the model's config has no vocab_size, and transformers cannot read it",
            where=error.where,
            got=error.got,
            hint="write vocab_size into it",
        ) from error
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        raise ModelError(
            "the model's config has no vocab_size",
            where=f"{ref.model}, config.json",
            got=f"model_type {config.model_type or 'none'}, which has no default either",
            hint="write vocab_size into it",
        )
    return rows


def transformers_config(ref: ModelRef, *, of: str) -> Any:
    """A model's config as transformers reads it: checked, with the defaults of the model's class.

    Args:
        ref: The model in the run file.
        of: Its name in the run, for messages.

    Raises:
        ModelError: There is none, or transformers cannot read it: a field of the wrong type, an unknown
            model_type, or a model with Python code of its own without `trust_remote_code`.
    """
    from transformers import AutoConfig

    ref = local_ref(ref)
    try:
        return AutoConfig.from_pretrained(
            ref.model, revision=ref.revision, trust_remote_code=ref.trust_remote_code
        )
    except Exception as error:  # config classes may raise anything
        what, got, hint = _config_fault(ref, error)
        raise ModelError(
            what.format(of=of), where=f"{ref.model}, config.json", got=got, hint=hint
        ) from error


def _config_fault(ref: ModelRef, error: Exception) -> tuple[str, str, str]:
    """The parts what, got and hint of the error message, by what config.json has."""
    try:
        config = model_config(Path(ref.model), whole=True)
    except ModelError:
        config = {}
    kind = config.get("model_type")
    known = isinstance(kind, str) and knows_type(kind)
    if config.get("auto_map") and not known and not ref.trust_remote_code:
        return (
            "model of {of} comes with Python code of its own, which is not run by default",
            f"auto_map, model_type {kind}",
            "read that code; `trust_remote_code: true` beside the model in the run file runs it",
        )
    if isinstance(kind, str) and not known:
        return (
            "transformers does not know the model of {of}",
            f"model_type {kind}",
            "a newer transformers may; a source that only vLLM knows needs `extract.engine: vllm`",
        )
    return (
        "transformers cannot read the config of {of}",
        f"{type(error).__name__}: {str(error)[:200]}",
        "correct config.json, or fetch it again",
    )


def knows_type(model_type: str) -> bool:
    """Whether the installed transformers has a config class for a `model_type`."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
