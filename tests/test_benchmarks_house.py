"""What `make bench-house` counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import bench_house as bench


def test_sizes_are_those_of_the_files() -> None:
    found = bench.sizes()
    packages = bench.lines_by_package()
    alone = len((bench.ROOT / "logitfuse.py").read_text().splitlines())
    assert found["product_lines"] == sum(packages.values()) + alone
    assert 100 < found["largest_file_lines"] < min(packages.values())
    assert found["import_circles"] == 0
    shown = bench.table(found | {"lines_by_room": packages, "coverage": 0.5})
    assert f"{found['product_lines']:,}" in shown
    [coverage] = [line for line in shown.splitlines() if line.startswith("coverage")]
    assert coverage.split() == ["coverage", ">=", "0.92", "0.5", "missed"]
    [speed] = [line for line in shown.splitlines() if line.startswith("align_speed")]
    assert speed.endswith("not measured")


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []

    def rate(tree: Path, out: Path) -> float:
        asked.append(tree)
        assert out.parent.is_dir()
        # The machine slows down meanwhile: a ratio of neighbours does not see it.
        return (2.0 if tree == bench.ROOT else 1.0) / (1 + (len(asked) - 1) // 2)

    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=bench.ROOT, capture_output=True, text=True
    )
    if git.returncode:
        pytest.skip("no git repository")
    monkeypatch.setattr(bench, "_tokens_per_s", rate)
    assert bench.align_speed_ratio("HEAD") == 2.0
    assert len(asked) == 2 * bench.ROUNDS
    before = asked[0]
    assert before != bench.ROOT
    assert asked[:4] == [before, bench.ROOT, bench.ROOT, before]
    assert not before.exists()
