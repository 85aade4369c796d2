"""Loading a model through transformers: all weights from the checkpoint, in its shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from store_schema.errors import ModelError
from store_schema.model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from store_schema.config import ModelRef

_LOADER = "transformers.modeling_utils"
_REPORT = "LOAD REPORT"


def load_causal_model(ref: ModelRef, *, of: str, **options: Any) -> Any:
    """Load a causal language model; as `load_whole_model` says."""
    import transformers

    return load_whole_model(transformers.AutoModelForCausalLM, ref, of=of, **options)


def load_whole_model(
    auto_class: Any, ref: ModelRef, *, of: str, device: Any = None, **options: Any
) -> Any:
    """Load a model of which no weight is missing and none has another shape.

    Args:
        auto_class: Of transformers, with `from_pretrained`.
        ref: Folder or hub name, and what the run file says of it.
        of: What it is in the run, for messages.
        device: Of torch, to move it to; None leaves it where it is loaded.
        options: Further ones of `from_pretrained`.

    Returns:
        The model, as transformers makes it, its soft cap of attention scores kept.

    Raises:
        ModelError: It cannot be loaded, or weights are missing or have other shapes than the config
            says: transformers puts random numbers in their place, or tells of it in a table. Where
            memory ran out, `is_out_of_memory` of the error says so.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with _table_kept_back() as tables:
            loaded, report = auto_class.from_pretrained(
                ref.model,
                revision=ref.revision,
                trust_remote_code=ref.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        _require_whole(report, of, ref.model)
        keep_soft_cap(loaded)
        if device is not None:
            loaded = loaded.to(device)
    except ModelError:
        raise
    except Exception as error:  # what a damaged folder raises, no library's list of errors names
        fits = not is_out_of_memory(error)
        raise ModelError(
            f"model of {of} cannot be loaded",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="give a whole model folder, or a hub name that this machine can reach"
            if fits
            else "load a smaller dtype, or take a device with more memory",
        ) from error
    for table in tables:
        logging.getLogger(table.name).handle(table)
    return loaded


def _require_whole(report: Any, of: str, model: str) -> None:
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


def keep_soft_cap(model: Any) -> None:
    """Let a loaded model compute the soft cap of attention scores that its config has (Gemma 2).

    transformers 5.19 picks PyTorch's fused kernel for it, which knows no cap and leaves it out.

    Args:
        model: Of transformers; changed in place.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


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
