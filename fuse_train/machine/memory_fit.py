"""Errors when memory runs out, and a search for the micro-batch size that fits."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from store_schema.errors import ConfigError
from store_schema.model.out_of_memory import is_out_of_memory


@contextmanager
def memory_errors(what: str, *, where: str, hint: str) -> Iterator[None]:
    """Raise a ConfigError that `what` does not fit, if the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:160]
        raise ConfigError(
            f"{what} does not fit in memory", where=where, got=reason or None, hint=hint
        ) from error


def free_memory() -> None:
    """Return unused memory to the device and the system, also what glibc keeps (gigabytes)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # another libc has no such call, or needs none
        ctypes.CDLL(None).malloc_trim(0)


def fitting_size(failed: int, attempt: Callable[[int], None]) -> int:
    """The largest of failed / 2, failed / 4, ... that fits; 0 if not even 1 does.

    Args:
        failed: Number of segments that did not fit.
        attempt: Forward and backward pass of that many segments; raises if they do not fit.
    """
    size = failed // 2
    while size:
        free_memory()
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return size
        size //= 2
    return 0
