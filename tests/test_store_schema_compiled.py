"""Machine code that is kept must be of the code as it stands, whichever file was changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba import config

from store_schema.compiled import cpu_features

REPOSITORY = Path(__file__).resolve().parent.parent
CALLEE = (
    "from store_schema.compiled import compiled\n@compiled\ndef number(x):\n    return x + {}\n"
)
CALLER = (
    "from store_schema.compiled import compiled\nfrom package.callee import number\n"
    "@compiled\ndef twice(x):\n    return 2 * number(x)\n"
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "callee.py").write_text(CALLEE.format(1))
    (folder / "caller.py").write_text(CALLER)
    return folder


def call(package: Path, module: str = "package.caller", **more: str) -> tuple[int, int]:
    """What `twice(1)` gives in a new process, and how many signatures came from the kept code."""
    script = (
        f"from {module} import twice\nprint(twice(1))\n"
        "print(sum(twice.stats.cache_hits.values()) if twice._cache.cache_path else 0)\n"
    )
    paths = os.pathsep.join((str(package.parent), str(REPOSITORY)))
    environment = os.environ | {"PYTHONPATH": paths} | more
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    value, hits = map(int, done.stdout.split())
    return value, hits


def test_a_change_in_a_callee_is_seen_by_its_callers(package: Path) -> None:
    assert call(package) == (4, 0)
    assert call(package) == (4, 1)
    when = (package / "caller.py").stat()
    (package / "callee.py").write_text(CALLEE.format(2))
    os.utime(package / "caller.py", ns=(when.st_atime_ns, when.st_mtime_ns))
    assert call(package) == (6, 0)
    kept = list((package / "__pycache__").glob("compiled-*"))
    assert len(kept) == 1, "code of the former state is removed"


def test_a_change_in_a_sub_folder_is_seen_by_another(package: Path) -> None:
    """The caller stands in one sub-folder, what it calls in another; they share one cache."""
    for name in ("lower", "upper/inner"):
        (package / name).mkdir(parents=True)
    for name in ("lower", "upper", "upper/inner"):
        (package / name / "__init__.py").touch()
    (package / "callee.py").rename(package / "lower/callee.py")
    (package / "caller.py").unlink()
    (package / "upper/inner/caller.py").write_text(
        CALLER.replace("package.callee", "package.lower.callee")
    )
    module = "package.upper.inner.caller"
    assert call(package, module) == (4, 0)
    assert call(package, module) == (4, 1)
    (package / "lower/callee.py").write_text(CALLEE.format(2))
    assert call(package, module) == (6, 0)
    kept = [path.relative_to(package).parts[0] for path in package.rglob("compiled-*")]
    assert kept == ["__pycache__"], "one place, at the top of the package"


def test_where_nothing_can_be_written_code_is_compiled_again(package: Path, tmp_path: Path) -> None:
    (package / "__pycache__").write_text("a file in the way")
    home = tmp_path / "home"
    home.write_text("and another")
    assert call(package, HOME=str(home)) == (4, 0)


def test_the_home_folder_is_next(package: Path, tmp_path: Path) -> None:
    (package / "__pycache__").write_text("a file in the way")
    assert call(package, HOME=str(tmp_path)) == (4, 0)
    assert call(package, HOME=str(tmp_path)) == (4, 1)


def test_other_users_of_numba_keep_their_own_place() -> None:
    import store_schema.compiled  # noqa: F401

    assert "compiled-" not in config.CACHE_DIR


EMITTED = """
from store_schema.compiled import compiled, emitted

@emitted("int64", "int64", "int64")
def difference(builder, first, second):
    return builder.sub(first, second)

@compiled
def twice(x):
    return difference(5, x) + difference(3, x)
"""


def test_emitted_instructions_are_called_and_kept(package: Path) -> None:
    (package / "emitting.py").write_text(EMITTED)
    assert call(package, "package.emitting") == (6, 0)
    assert call(package, "package.emitting") == (6, 1)


@pytest.mark.parametrize(
    ("more", "features"),
    [
        ({"NUMBA_CPU_FEATURES": "+one,-two,+three-four"}, ["one", "three-four"]),
        ({"NUMBA_DISABLE_JIT": "1"}, []),
        ({"NUMBA_CPU_NAME": "generic"}, []),
    ],
)
def test_features_of_the_cpu_are_those_that_are_compiled_for(
    more: dict[str, str], features: list[str]
) -> None:
    script = "from store_schema.compiled import cpu_features; print(*sorted(cpu_features()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | more,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == features


def test_features_of_this_cpu() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or " avx2 " not in flags.read_text():
        pytest.skip("needs Linux and AVX2")
    assert "avx2" in cpu_features()
    assert ("avx512bf16" in cpu_features()) == (" avx512_bf16 " in flags.read_text())
