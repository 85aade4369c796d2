"""Setting of the C library for memory that a step frees."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of mallopt's settings in glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the kernel each time.

    A step on a CPU frees and allocates the same few hundred megabytes, and the kernel clears them page
    by page. Harmless where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
