"""Paths of the run file: home folders and variables, as a shell takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from store_schema.config import load_run
from store_schema.errors import ConfigError
from store_schema.paths import expand_path, written_path


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/$me")
    monkeypatch.setenv("SCRATCH", "/scratch/~u")
    monkeypatch.setenv("BUCKET", "s3://bucket")
    monkeypatch.delenv("NOBODY_SET_ME", raising=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/home/$me"),
        ("~/runs/x", "/home/$me/runs/x"),
        ("$SCRATCH/x", "/scratch/~u/x"),
        ("${SCRATCH}x/$SCRATCH", "/scratch/~ux//scratch/~u"),
        ("$BUCKET/run", "s3://bucket/run"),
        ("runs/~/x~", "runs/~/x~"),
        ("./~", "./~"),
        ("cost$$5/$", "cost$5/$"),
        ("s3://bucket/$SCRATCH/~", "s3://bucket/$SCRATCH/~"),
        ("org/name", "org/name"),
    ],
)
def test_a_path_means_what_a_shell_takes_it_for(written: str, meant: str) -> None:
    assert expand_path(written) == meant


@pytest.mark.parametrize("written", ["$NOBODY_SET_ME/x", "${NOBODY_SET_ME}/x", "~nobody-here/x"])
def test_what_stands_for_nothing_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"NOBODY_SET_ME|nobody-here"):
        expand_path(written)


@given(st.text(alphabet="~$/ab{}:.é", min_size=1))
def test_what_is_written_is_read_back(path: str) -> None:
    read = expand_path(written_path(path))
    assert read == path or read == f"./{path}"


def test_every_path_of_a_run_file_is_expanded(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "name": "x",
        "run_dir": "~/runs/x",
        "data_dir": "$BUCKET/data",
        "sources": {"a": {"model": "$SCRATCH/a"}},
        "target": {"model": "~/t"},
        "corpus": {"inputs": [{"path": "~/in/*.jsonl"}]},
        "train": {"selector": "asn", "asn": {"start_from": "~/selector"}},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    run = load_run(file)
    assert run.folder == "/home/$me/runs/x"
    assert run.data_folder == "s3://bucket/data"
    assert run.sources["a"].model == "/scratch/~u/a"
    assert run.target.model == "/home/$me/t"
    assert run.sections["corpus"].inputs[0].path == "/home/$me/in/*.jsonl"  # type: ignore[attr-defined]
    assert run.sections["train"].asn.start_from == "/home/$me/selector"  # type: ignore[attr-defined]
    file.write_text(run.resolved())  # what a child process reads
    assert load_run(file) == run


def test_a_variable_that_is_not_set_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: x\nrun_dir: $NOBODY_SET_ME/x\nsources: {a: {model: a}}\ntarget: {model: t}\n"
    )
    with pytest.raises(ConfigError, match=r"run_dir: the environment variable NOBODY_SET_ME"):
        load_run(file)
