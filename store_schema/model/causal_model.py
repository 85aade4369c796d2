"""Loading a model through transformers: all weights from the checkpoint, in its shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from store_schema.errors import ModelError

_LOADER = "transformers.modeling_utils"
_REPORT = "LOAD REPORT"


def load_causal_model(model: str, *, of: str, **options: Any) -> Any:
    """Load a causal language model; as `load_whole_model` says."""
    import transformers

    return load_whole_model(transformers.AutoModelForCausalLM, model, of=of, **options)


def load_whole_model(auto_class: Any, model: str, *, of: str, **options: Any) -> Any:
    """Load a model of which no weight is missing and none has another shape.

    Args:
        auto_class: Of transformers, with `from_pretrained`.
        model: Folder or hub name.
        of: What it is in the run, for messages.
        options: Of `from_pretrained`.

    Returns:
        The model, as transformers makes it.

    Raises:
        ModelError: Weights are missing, or have other shapes than the config says: transformers puts
            random numbers in their place, or tells of it in a table.
        Exception: Whatever transformers raises else.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with _table_kept_back() as tables:
        loaded, report = auto_class.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if report["mismatched_keys"]:
        name, stored, made = sorted(report["mismatched_keys"], key=lambda found: str(found[0]))[0]
        others = len(report["mismatched_keys"]) - 1
        raise ModelError(
            f"weights of {of} do not fit its config",
            where=model,
            expected=f"{name} of {list(made)}, as config.json says",
            got=f"{list(stored)}" + (f" (and {others} more that do not fit)" if others else ""),
            hint="config.json and weights must be of one model: fetch both again",
        )
    if report["missing_keys"]:
        missing = sorted(map(str, report["missing_keys"]))
        raise ModelError(
            f"model of {of} lacks {len(missing)} weights",
            where=model,
            got=", ".join(missing[:3]),
            hint="they would be random; give a complete checkpoint",
        )
    for table in tables:
        logging.getLogger(table.name).handle(table)
    return loaded


@contextmanager
def _table_kept_back() -> Iterator[list[logging.LogRecord]]:
    """Keep back transformers' table of weights that it found otherwise; most of it ends in an error."""
    kept: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        if _REPORT not in record.getMessage():
            return True
        kept.append(record)
        return False

    logger = logging.getLogger(_LOADER)
    logger.addFilter(passes)
    try:
        yield kept
    finally:
        logger.removeFilter(passes)
