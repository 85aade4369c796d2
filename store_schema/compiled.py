"""Compile functions with Numba, and keep their machine code in a cache that is never stale.

Numba compiles a cached function again when that function's own file changes. But its machine code has
the functions it calls inlined, so a change in another file would leave stale code. Here the cache
folder is named by a digest of all source files of the top package: any change compiles again.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import config, njit, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from store_schema.fingerprint import sources_digest

_NAME = "compiled-"


def compiled(function: Callable[..., Any]) -> Any:
    """Compile in nopython mode at the first call; the function runs without the GIL."""
    return _compile(function)


def bare(function: Callable[..., Any]) -> Any:
    """As `compiled`, for functions that allocate nothing and keep no reference to their arrays, called
    by compiled functions alone.

    They run without Numba's reference counting (one atomic operation for each array), which takes a
    third of the time of a call with many arrays. The caller must hold the arrays. There is no way into
    them from Python, since to compile that for many arrays takes as long as the function itself.
    """
    return _compile(function, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def compiled_fast(function: Callable[..., Any]) -> Any:
    """As `compiled`, where the compiler may change the order of sums."""
    return _compile(function, fastmath={"reassoc", "contract"})


def emitted(result: str | None, *parameters: str) -> Callable[[Callable[..., Any]], Any]:
    """For compiled code: a function whose instructions a Python function writes.

    Args:
        result: Numba's name of the result's type ("float32"); None for no result.
        parameters: Names of the arguments' types; arguments are converted to them.

    Returns:
        Decorator of the function that writes: it takes llvmlite's builder and a value for each
        argument, and returns the value of the result.
    """
    signature = getattr(types, result or "void")(*(getattr(types, name) for name in parameters))

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            value = emit(builder, *arguments)
            return context.get_dummy_value() if result is None else value

        def typed(*_: Any) -> Any:
            return signature, generate

        # Numba reads the names of the arguments from it; the first is its own.
        typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate


def cpu_features() -> frozenset[str]:
    """What the CPU has, by LLVM's names ("avx512bf16"), as far as compiled code uses it; empty where
    the environment switches compiling off."""
    if config.DISABLE_JIT:
        return frozenset()
    told = config.CPU_FEATURES
    named = (get_host_cpu_features() if told is None else told).split(",")
    return frozenset(name[1:] for name in named if name.startswith("+"))


def _compile(function: Callable[..., Any], **flags: Any) -> Any:
    folder = _cache_folder(_room_of(Path(inspect.getfile(function)).parent))
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder or before)
    try:
        return njit(cache=folder is not None, nogil=True, **flags)(function)
    finally:
        config.CACHE_DIR = before


def _room_of(folder: Path) -> Path:
    """The top package that a folder belongs to; the folder itself where it is in no package."""
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


@cache
def _cache_folder(package: Path) -> Path | None:
    """Cache folder for the functions of a package; None where none can be written to."""
    name = _NAME + sources_digest(*sorted({package, Path(__file__).parent}))[:16]
    for parent in (package / "__pycache__", Path.home() / ".cache" / "logitfuse" / package.name):
        try:
            (parent / name).mkdir(parents=True, exist_ok=True)
            (parent / name / "writable").touch()
        except OSError:
            continue
        for other in parent.glob(f"{_NAME}*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)
        return parent / name
    return None
