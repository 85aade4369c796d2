"""Recognise errors of a CPU or GPU that ran out of memory."""

from __future__ import annotations

_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a memory object",
    "cublas_status_alloc_failed",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that a CPU or GPU ran out of memory.

    Recognised by text, since torch has a class of its own only for CUDA's.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, RuntimeError | OSError):
            text = str(seen).lower()
            if any(words in text for words in _PHRASES):
                return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False
