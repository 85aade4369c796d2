"""The commands of `store`: what they take, what they refuse, and that they start where they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from store_schema.disk.location import open_location
from store_tools.cli import ranges, store
from store_tools.places import find_places
from tests.planned_store import (
    make_plan,
    make_run,
    make_writer,
    ok,
    refused,
    shard_arrays,
    store_folder,
)

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {"verify", "repair", "gc", "stats", "show", "copy", "export"}


def test_all_tools_are_there() -> None:
    assert set(store.commands) >= COMMANDS


@pytest.mark.parametrize("module", ["store_tools", "logitfuse"])
def test_it_starts_as_a_process(tmp_path: Path, module: str) -> None:
    make_run(tmp_path, leave_out=[1])
    group = ["store"] if module == "logitfuse" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *group, "verify", str(store_folder(tmp_path))],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[0] == "missing shards: 1"
    assert done.stdout.endswith("2 shards sound, 0 damaged, 1 missing\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["verify", "repair", "gc", "stats", "show"])
def test_targets_that_are_refused(tmp_path: Path, command: str) -> None:
    run_file = make_run(tmp_path)
    folder = store_folder(tmp_path)
    assert "no store and no run file" in refused(command, tmp_path / "nothing")
    assert "no such source" in refused(command, run_file, "--source", "other")
    assert "no store yet" in refused(command, run_file, "--kind", "aligned")
    assert "in --source" in refused(command, folder, "--source", "s")
    assert "in --kind" in refused(command, folder, "--kind", "source")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: [")
    assert "run file cannot be read" in refused(command, wrong)


@pytest.mark.parametrize("command", ["repair", "gc", "stats", "show"])
def test_a_folder_that_is_no_store(tmp_path: Path, command: str) -> None:
    extra = ["--shard", "0"] if command == "repair" else []
    assert "no store" in refused(command, tmp_path, *extra)


def test_a_plan_that_is_named_must_be_there(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert "no plan" in refused("stats", store_folder(tmp_path), "--plan", tmp_path / "nothing")


def test_the_plan_beside_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    monkeypatch.chdir(store_folder(tmp_path))
    (place,) = find_places(".")
    assert place.plan_location == open_location(tmp_path / "run/plan")
    (place,) = find_places("s3://bucket/runs/demo/stores/code/")
    assert place.plan_location == open_location("s3://bucket/runs/demo/plan")
    (place,) = find_places("s3://bucket/code")
    assert place.plan_location is None
    (place,) = find_places("s3://bucket/stores/code")
    assert place.plan_location == open_location("s3://bucket/plan")


def test_stores_of_a_run_by_url(tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    plan = make_plan(tmp_path / "plan")
    for file in (tmp_path / "plan").iterdir():
        open_location("memory://bucket/run/plan").write_atomic(file.name, file.read_bytes())
    writer = make_writer(open_location("memory://bucket/run/stores/s"), plan)
    for record in plan.shards:
        writer.write(record, shard_arrays(plan, record.index))
    run_file = tmp_path / "run.yaml"
    run = {"name": "t", "run_dir": "memory://bucket/run", "sources": {"s": {"model": "m"}}}
    run_file.write_text(json.dumps(run | {"target": {"model": "m"}}))
    assert ok("verify", run_file) == "stores/s: 3 shards sound, 0 damaged, 0 missing\n"
    assert ok("verify", "memory://bucket/run/stores/s").endswith(
        "s: 3 shards sound, 0 damaged, 0 missing\n"
    )
    ok("stats", run_file)
    page = "memory://bucket/page.html"
    ok("show", run_file, "--segment", "d1#0", "--html", page)
    assert open_location("memory://bucket").read_bytes("page.html").startswith(b"<!doctype html>")
    ok("repair", run_file, "--shard", 2)
    assert "missing shards: 2" in ok("verify", run_file, "--allow-missing")


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(list(range(0, 100, 2))).endswith("38 ...")
