"""Load a model through transformers, and make sure that all its weights are from the checkpoint."""

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
    """Load a causal language model: see `load_whole_model`."""
    import transformers

    return load_whole_model(transformers.AutoModelForCausalLM, ref, of=of, **options)


def load_whole_model(
    auto_class: Any, ref: ModelRef, *, of: str, device: Any = None, **options: Any
) -> Any:
    """Load a model, and refuse it if weights are missing or have other shapes than its config says.

    transformers would initialise such weights at random and only log a table.

    Args:
        auto_class: An auto class of transformers.
        ref: The model in the run file.
        of: Its name in the run, for messages.
        device: torch device to move it to; None leaves it where it is loaded.
        options: Further options of `from_pretrained`.

    Returns:
        The transformers model; see also `keep_soft_cap`.

    Raises:
        ModelError: It cannot be loaded, or weights are missing or of other shapes. For one that ran out
            of memory, `is_out_of_memory` of the error is true.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with _load_report_held_back() as reports:
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
    except Exception as error:  # a damaged folder may raise anything
        fits = not is_out_of_memory(error)
        raise ModelError(
            f"model of {of} cannot be loaded",
            where=ref.model,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="give a whole model folder, or a hub name that this machine can reach"
            if fits
            else "load a smaller dtype, or take a device with more memory",
        ) from error
    for record in reports:
        logging.getLogger(record.name).handle(record)
    return loaded


def _require_whole(report: Any, of: str, model: str) -> None:
    if report["mismatched_keys"]:
        name, stored, made = sorted(report["mismatched_keys"], key=lambda item: str(item[0]))[0]
        num_more = len(report["mismatched_keys"]) - 1
        raise ModelError(
            f"weights of {of} do not fit its config",
            where=model,
            expected=f"{name} of {list(made)}, as config.json says",
            got=f"{list(stored)}" + (f" (and {num_more} more)" if num_more else ""),
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
    """Make a loaded model apply the soft cap of attention scores that its config has (Gemma 2).

    transformers 5.19 selects PyTorch's fused kernel for it, which ignores the cap.

    Args:
        model: A transformers model; changed in place.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


@contextmanager
def _load_report_held_back() -> Iterator[list[logging.LogRecord]]:
    """Collect transformers' log records on missing and mismatched weights instead of showing them: most
    lead to an error of our own."""
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
