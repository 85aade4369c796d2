"""Figures of starting: each stage over the imports, and only of a run that is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import scale_start
from store_schema.errors import MissingError
from tests.run_file import write_run_file
from tests.tiny import tiny_model


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = write_run_file(tmp_path, {"a": "m", "target": "m"}, run_dir="run")
    (tmp_path / "run/logs").mkdir(parents=True)
    return path


def pretend(monkeypatch: pytest.MonkeyPatch, unfinished: str = "") -> list[str]:
    """Processes that take a second for the imports and half of one for all else."""
    called: list[str] = []

    def timed(words: Sequence[str], folder: str) -> tuple[float, str]:
        assert Path(folder, "run/logs").is_dir()
        assert Path(folder, "run.yaml").is_file()
        called.append(" ".join(words))
        said = "3 shards" if unfinished in words else "nothing to do"
        return (1.0 if words[0] == "-c" else 0.5) + len(called) % 7, said

    monkeypatch.setattr(scale_start, "_timed", timed)
    return called


def test_ratios_are_of_the_shortest_of_several(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = pretend(monkeypatch)
    tokenizer = tiny_model(tmp_path / "model")
    figures = scale_start.start_figures(run_file, [tokenizer], repeats=14)
    assert set(figures["noop_seconds_ratio"]) == set(scale_start.STAGES)
    assert set(figures["noop_seconds_ratio"].values()) == {0.5}
    assert set(figures["tokenizer_open_ratio"]) == {"model"}
    assert figures["tokenizer_open_ratio"]["model"] > 0
    assert called.count("-m logitfuse train run run.yaml") == 15  # once to warm up
    assert called.count("-m logitfuse --version") == 14


def test_a_run_that_is_not_finished_has_no_figures(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, unfinished="align")
    with pytest.raises(MissingError, match=r"not finished.*align run.*3 shards"):
        scale_start.noop_seconds(run_file, repeats=1)
    with pytest.raises(MissingError, match="make_real"):
        scale_start.start_figures(run_file, ["gone.gguf"])


def test_a_process_is_timed_and_heard(tmp_path: Path) -> None:
    seconds, said = scale_start._timed(("-c", "print('hello')"), str(tmp_path))
    assert seconds > 0
    assert said == "hello\n"
    with pytest.raises(MissingError, match=r"the command failed.*no good"):
        scale_start._timed(("-c", "raise SystemExit('no good')"), str(tmp_path))
