"""`align run` beside a commit's: whose code runs, which shards count, in what order."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import scale_align
from store_schema.errors import MissingError
from tests.run_file import write_run_file


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = write_run_file(
        tmp_path, {"a": "m", "b": "m", "target": "m"}, run_dir=str(tmp_path / "run")
    )
    for part in ("corpus", "plan", "stores/a", "stores/b", "aligned/old"):
        (tmp_path / "run" / part).mkdir(parents=True)
    return path


def aligned(
    monkeypatch: pytest.MonkeyPatch, shards: dict[str, list[tuple[int, float]]], code: int = 0
) -> list[tuple[str, Path]]:
    """Alignments that only write logs; code that is not of a checkout is twice as fast.

    Args:
        shards: Tokens and seconds of each shard, by source.
        code: Exit code of each alignment.

    Returns:
        PYTHONPATH and folder of each, in order.
    """
    asked: list[tuple[str, Path]] = []

    def run(words: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert words[1:-1] == ["-P", "-m", "logitfuse", "align", "run"]
        folder = Path(yaml.safe_load(Path(words[-1]).read_text())["run_dir"])
        assert (folder / "stores/b").is_dir()
        assert not (folder / "aligned").exists()
        (folder / "aligned").mkdir()
        asked.append((env["PYTHONPATH"], folder))
        factor = 1 if env["PYTHONPATH"] == str(scale_align.ROOT) else 2
        for source, done in shards.items():
            log = folder / "logs/align" / source / "worker-0-of-1.jsonl"
            assert not log.exists()
            log.parent.mkdir(parents=True)
            lines: list[dict[str, Any]] = [{"event": "begin"}]
            lines += [{"event": "shard", "tokens": n, "seconds": s * factor} for n, s in done]
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(words, code, "", "no such store")

    monkeypatch.setattr(scale_align, "checked_out", lambda commit: _Folder(Path(commit)))
    monkeypatch.setattr(scale_align.subprocess, "run", run)
    return asked


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        pass


def test_the_first_shard_of_each_source_does_not_count(
    monkeypatch: pytest.MonkeyPatch, run_file: Path
) -> None:
    shards = {"a": [(100, 9.0), (100, 1.0), (60, 1.0)], "b": [(100, 7.0), (40, 2.0)]}
    asked = aligned(monkeypatch, shards)
    found = scale_align.align_figures(run_file, "c0ffee", rounds=3)
    assert found == {
        "align_run_ratio": 2.0,
        "align_run_tokens_per_s": {"now": 50, "before": 25},
        "align_before": "c0ffee",
    }
    now, before = str(scale_align.ROOT), "c0ffee"
    assert [path for path, _ in asked] == [before, now, now, before, before, now, now, before]
    assert len({folder for _, folder in asked}) == 2
    assert (run_file.parent / "run/aligned/old").is_dir()


def test_what_gives_no_figure_says_so(monkeypatch: pytest.MonkeyPatch, run_file: Path) -> None:
    aligned(monkeypatch, {"a": [(100, 9.0)]})
    with pytest.raises(MissingError, match="no source has more than one shard"):
        scale_align.align_figures(run_file, "c0ffee", rounds=1)
    aligned(monkeypatch, {}, code=2)
    with pytest.raises(MissingError, match="no such store"):
        scale_align.align_figures(run_file, "c0ffee", rounds=1)
