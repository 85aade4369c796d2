"""What `make bench-finish` measures, on stand-ins for the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import bench_finish as bench
from benchmarks.bench_finish import Asked, MeasureError

REPORT = bench.REPORT.as_posix()
DEMO = f"""\
VENV ?= .venv
$(VENV)/.ready:
	mkdir -p $(VENV)
	touch $@ installed
demo: $(VENV)/.ready
	BURN
	mkdir -p $(dir {REPORT})
	env > {REPORT}
"""


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *own, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits whose demos burn 0.8 and 0.2 CPU seconds."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    for seconds in ("0.8", "0.2"):
        code = f"import time; [None for _ in iter(lambda: time.process_time() < {seconds}, False)]"
        burn = f"\t{sys.executable} -S -c '{code}'"
        lines = [burn if "BURN" in line else line for line in DEMO.splitlines()]
        (root / "Makefile").write_text("\n".join(lines) + "\n")
        git(root, "add", "Makefile")
        git(root, "commit", "--quiet", "-m", seconds)
    return root


def test_first_report_is_that_of_a_clone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    seen: list[Path] = []
    demo = bench._demo

    def watched(words: Any, tree: Path, environment: Any) -> None:
        demo(words, tree, environment)
        seen.append(tree)
        said = (tree / REPORT).read_text()
        assert (tree / "installed").exists()
        assert "PYTHONPATH" not in said
        assert f"LOGITFUSE_CACHE={tree.parent}/cache" in said

    monkeypatch.setattr(bench, "_demo", watched)
    found = bench.first_report(Asked(), repository)
    assert 0.2 <= found["first_report_seconds"] < 60
    assert len(seen) == 1
    assert not seen[0].exists()


def test_cpu_is_counted_without_installing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.bench_house.ROOT", repository)
    prefix = tmp_path / "environment"
    before = git(repository, "rev-parse", "HEAD~1")
    found = bench.demo_cpu(Asked(before=before), str(prefix))
    assert found["demo_cpu_before_s"] == pytest.approx(0.8, rel=0.4)
    assert found["demo_cpu_now_s"] == pytest.approx(0.2, rel=0.8)
    assert 0.1 < found["demo_cpu_seconds"] < 0.6
    assert not prefix.exists()
    with pytest.raises(MeasureError, match="--before COMMIT"):
        bench.demo_cpu(Asked())


def test_a_demo_that_fails_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("demo:\n\tfalse\nnothing:\n\ttrue\n")
    with pytest.raises(MeasureError, match="make demo: exit code"):
        bench._demo(["demo"], tmp_path, os.environ)
    with pytest.raises(MeasureError, match=f"make nothing wrote no {REPORT}"):
        bench._demo(["nothing"], tmp_path, os.environ)


def test_figures_are_those_that_tests_record(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('error', [1e-5, 3e-4])\n"
        "def test_some(error, record_property):\n"
        "    record_property('import_capture_max_error', error)\n"
        "    record_property('other', 7)\n"
    )
    (folder / "test_red.py").write_text("def test_red():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")  # as pyproject.toml
    name = "import_capture_max_error"
    assert bench.recorded(["test_some.py"], name, tmp_path) == [1e-5, 3e-4]
    with pytest.raises(MeasureError, match=r"test_red\.py: exit code 1"):
        bench.recorded(["test_some.py", "test_red.py"], name, tmp_path)
    with pytest.raises(MeasureError, match="no test records none"):
        bench.recorded(["test_some.py"], "none", tmp_path)


def test_tests_that_are_asked_record_the_figures() -> None:
    for test in ("test_docs_blocks.py", *bench.CAPTURE_TESTS):
        text = (bench.ROOT / "tests" / test).read_text()
        name = "docs_blocks_run" if "blocks" in test else "import_capture_max_error"
        assert f'record_property("{name}"' in text


def test_parts_are_chosen_and_misses_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(asked: Asked) -> dict[str, Any]:
        raise MeasureError("no demo")

    parts = {
        "first_report": fails,
        "mutants": lambda asked: {"mutants_killed": 0.5, "count": asked.count},
        "docs_blocks": lambda asked: {"docs_blocks_run": 0.95},
    }
    monkeypatch.setattr(bench, "PARTS", parts)
    run = CliRunner().invoke
    done = run(bench.main, ["--parts", "mutants,docs_blocks", "--count", "9"])
    assert done.exit_code == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mutants_killed"] == 0.5
    assert found["count"] == 9
    assert found["first_report_seconds"] is None
    [missed] = [line for line in done.stdout.splitlines() if line.endswith("missed")]
    assert missed.startswith("mutants_killed")
    done = run(bench.main, ["--parts", "first_report,docs_blocks,mutants", "--skip", "mutants"])
    assert done.exit_code == 1
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["not_measured"] == {"first_report": "no demo"}
    assert found["docs_blocks_run"] == 0.95
    assert found["mutants_killed"] is None
    done = run(bench.main, ["--parts", "none"])
    assert done.exit_code == 1
    assert "no part none: one of first_report" in done.output
