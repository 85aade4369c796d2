"""`extract run`: what is stored, and that kills, stops, workers and full disks lose nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from extract.run import run_source
from extract.scoring.sources import CheckedSource, check_source
from launch.work import Part, Worker
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import ok, refused
from tests.extract_runs import files_of, plan_run, sample_documents, write_jsonl, write_run
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_processes")


PLAIN = sys.executable
"""Loads everything by itself, as a user's does, and so do its children."""


def command(*words: object) -> list[str]:
    """Of a process of its own."""
    return [sys.executable, "-m", "extract", *map(str, words)]


@pytest.fixture
def two_models(tiny_models: dict[str, Path]) -> dict[str, Path]:
    """One source without BOS, and the target."""
    return {name: tiny_models[name] for name in ("prose", "target")}


def planned(folder: Path, models: dict[str, Path], repeat: int = 4) -> Path:
    write_jsonl(folder / "docs.jsonl", sample_documents(repeat))
    return plan_run(write_run(folder, models))


def store_of(path: Path, source: str) -> StoreReader:
    return StoreReader.open(open_location(load_run(path).store_url(source)))


def contents(path: Path, source: str) -> dict[int, str]:
    return {shard: c.content_sha256 for shard, c in store_of(path, source).commits.items()}


def score(path: Path, source: str, worker: Worker | None = None) -> None:
    run_source(load_run(path), source, Part(worker or Worker(), steal=False))


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("source", ["code", "prose", "facts"])
def test_rows_are_the_models_own(tmp_path: Path, tiny_models: dict[str, Path], source: str) -> None:
    """Row i equals log_softmax(logits[i - 1])[token i] of a plain forward; BOS is not a row."""
    from transformers import AutoModelForCausalLM

    models = {source: tiny_models[source], "target": tiny_models["target"]}
    path = planned(tmp_path, models, repeat=1)
    score(path, source)
    run = load_run(path)
    plan, store = open_plan(run), store_of(path, source)
    tokenizer = SegmentTokenizer.load(run.sources[source], name=source)
    assert bool(tokenizer.bos_ids) == (source != "prose")
    model = AutoModelForCausalLM.from_pretrained(tiny_models[source]).eval()
    for shard in plan.shards:
        store.verify(shard.index)
        arrays = store.read(shard.index)
        segments = plan.segments(shard)
        assert arrays["segment_ids"].tolist() == [s.index for s in segments]
        for d, segment in enumerate(segments):
            start, stop = arrays["token_offsets"][d : d + 2]
            ids = [*tokenizer.bos_ids, *tokenizer.encode_text([segment.text])[0]]
            assert arrays["token_ids"][start:stop].tolist() == ids[len(tokenizer.bos_ids) :]
            assert arrays["byte_ends"][stop - 1] == len(segment.text.encode())
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()
            for row in range(stop - start):
                n, i = start + row, row + len(tokenizer.bos_ids)
                entries = slice(*arrays["entry_offsets"][n : n + 2])
                if i == 0:
                    assert entries.start == entries.stop
                    assert arrays["tail_mass"][n] == 1
                    assert np.isnan(arrays["label_logprobs"][n])
                    continue
                truth = logprobs[i - 1]
                assert abs(arrays["label_logprobs"][n] - truth[ids[i]]) < 1e-4
                found = arrays["entry_ids"][entries]
                assert len(found) == 8
                np.testing.assert_allclose(
                    arrays["entry_logprobs"][entries], truth[found], atol=1e-4
                )
                np.testing.assert_allclose(-np.sort(-truth)[:8], truth[found], atol=1e-4)


def test_run_reports_and_is_a_no_op(
    tmp_path: Path, two_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", PLAIN)
    path = planned(tmp_path, two_models)
    finished = subprocess.run(command("run", path), capture_output=True, text=True, check=True)
    assert "engine (cpu) ready in" in finished.stderr
    assert re.search(r"prose: (1,991)/\1 tok, .* kB written", finished.stderr)
    assert re.search(r"prose +(\d+)/\1 ", finished.stdout)
    assert "bytes/position" in finished.stdout
    assert "bits per byte" in finished.stdout
    stats = [c.stats for c in store_of(path, "prose").commits.values()]
    assert {"tokens", "nats", "bytes", "tail_mass_mean", "seconds", "tokens_per_s"} <= set(stats[0])
    # Bytes of first tokens, of which nothing is known, are not counted.
    num_bytes = sum(s.num_bytes for s in open_plan(load_run(path)).shards)
    assert 0.8 * num_bytes < sum(s["bytes"] for s in stats) < num_bytes
    before = files_of(tmp_path / "run" / "stores" / "prose" / "commits")
    assert ok("extract", "run", path) == "extract complete, nothing to do\n"
    assert files_of(tmp_path / "run" / "stores" / "prose" / "commits") == before


def test_stored_stats_give_the_sources_bits_per_byte(
    tmp_path: Path, two_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, two_models, repeat=1)
    score(path, "prose")
    store = store_of(path, "prose")
    for shard, commit in store.commits.items():
        labels = store.read(shard)["label_logprobs"].astype(np.float64)
        assert commit.stats["nats"] == pytest.approx(-np.nansum(labels), rel=1e-6)
        by_domain = [v for k, v in commit.stats.items() if k.startswith("nats/")]
        assert sum(by_domain) == pytest.approx(commit.stats["nats"], rel=1e-9)


def test_two_workers_share_the_shards(tmp_path: Path, two_models: dict[str, Path]) -> None:
    path = planned(tmp_path, two_models)
    score(path, "prose", Worker(0, 2))
    half = contents(path, "prose")
    assert half
    assert all(shard % 2 == 0 for shard in half)
    score(path, "prose", Worker(1, 2))
    both = contents(path, "prose")
    assert len(both) == len(open_plan(load_run(path)).shards)
    shutil.rmtree(tmp_path / "run" / "stores")
    # Another number of workers goes on where the first left off.
    score(path, "prose", Worker(1, 3))
    for index in range(2):
        score(path, "prose", Worker(index, 2))
    assert contents(path, "prose") == both


def test_a_limit_is_of_the_whole_run(tmp_path: Path, two_models: dict[str, Path]) -> None:
    path = planned(tmp_path, two_models)
    ok("extract", "run", path, "--limit", 1)
    assert len(contents(path, "prose")) == 1
    ok("extract", "run", path, "--limit", 1, "--worker", "0/2")
    assert len(contents(path, "prose")) == 2


@pytest.mark.slow
def test_kill_and_rerun_equals_an_uninterrupted_run(
    tmp_path: Path, two_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, two_models, repeat=14)
    commits = tmp_path / "run" / "stores" / "prose" / "commits"
    words = command("run-source", path, "--source", "prose")
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        wait_for(lambda: commits.is_dir() and len(list(commits.glob("*.json"))) >= 2, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    killed = contents(path, "prose")
    num_shards = len(open_plan(load_run(path)).shards)
    assert 2 <= len(killed) < num_shards
    ok("extract", "run", path)
    resumed = contents(path, "prose")
    assert len(resumed) == num_shards
    assert {shard: resumed[shard] for shard in killed} == killed
    store_of(path, "prose").verify(max(resumed))
    shutil.rmtree(tmp_path / "run" / "stores")
    ok("extract", "run", path)
    assert contents(path, "prose") == resumed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_parent_stops_its_child(
    tmp_path: Path,
    two_models: dict[str, Path],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a killed parent leaves
    path = planned(tmp_path, two_models, repeat=20)
    store = tmp_path / "run" / "stores" / "prose"
    process = subprocess.Popen(command("run", path), stderr=subprocess.PIPE)
    wait_for(lambda: (store / "commits").is_dir() and os.listdir(store / "commits"), process)
    process.send_signal(number)
    # The pipe closes only when parent and child are gone: communicate waits for both.
    _, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.decode().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "stopped by SIGTERM" in lines[0]
    # 75: something was finished, run again.
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    num_commits = len(contents(path, "prose"))
    assert 0 < num_commits < len(open_plan(load_run(path)).shards)
    # The current shard was dropped: data without a commit is removed on the way out.
    assert len(os.listdir(store / "data")) == num_commits
    time.sleep(0.5)
    assert len(contents(path, "prose")) == num_commits


def test_bad_options_and_models_leave_nothing_behind(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, {name: tiny_models[name] for name in ("code", "prose", "target")})
    assert "at most" in refused("extract", "run", path, "--set", "extract.top_k=100000")
    assert "no such source" in refused("extract", "run", path, "--source", "gone")
    assert "worker refused" in refused("extract", "run", path, "--worker", "2/2")
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(vocab_size=310))
    line = refused("extract", "run", path, "--set", f"sources.prose.model={other}")
    assert "another tokenizer of prose than the model" in line
    bare = tmp_path / "bare"
    shutil.copytree(tiny_models["prose"], bare)
    (bare / "model.safetensors").unlink()
    line = refused("extract", "run", path, "--set", f"sources.prose.model={bare}")
    assert "has no weights" in line
    assert not (tmp_path / "run" / "stores").exists()


def test_no_plan_yet(tmp_path: Path, two_models: dict[str, Path]) -> None:
    assert "no plan" in refused("extract", "run", write_run(tmp_path, two_models))


def test_changed_options_or_weights_are_a_mismatch(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    path = planned(tmp_path, {name: tiny_models[name] for name in ("code", "prose", "target")})
    score(path, "prose")
    before = files_of(tmp_path / "run")
    line = refused("extract", "run", path, "--set", "extract.top_k=9")
    assert "the store was made with another top_k" in line
    weights = tiny_model(
        tmp_path / "other", "gpt_neox", tiny_tokenizer("byte_level", vocab_size=330), seed=9
    )
    line = refused("extract", "run", path, "--set", f"sources.prose.model={weights}")
    assert "another model" in line
    line = refused("extract", "run", path, "--set", "extract.engine=vllm")
    assert "another settings" in line
    assert files_of(tmp_path / "run") == before  # no store of `code` was begun either
    plan_line = refused("extract", "plan", path, "--set", "plan.max_tokens=64")
    assert "segments of the plan are too long" in plan_line


def test_nan_commits_nothing(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(folder)
    path = planned(tmp_path, {"broken": folder, "target": tiny_models["target"]})
    line = refused("extract", "run-source", path, "--source", "broken")
    assert re.search(r"NaN from the model in segment \S+#\d+, source broken, position \d+", line)
    assert contents(path, "broken") == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_full_disk_is_one_line_and_a_rerun_finishes(
    tmp_path: Path, two_models: dict[str, Path], small_disk: Path
) -> None:
    write_jsonl(tmp_path / "docs.jsonl", sample_documents(40))
    sections = {"plan": {"max_tokens": 96, "shard_tokens": 1024}}
    path = plan_run(write_run(tmp_path, two_models, run_dir=str(small_disk / "run"), **sections))
    line = refused("extract", "run-source", path, "--source", "prose")
    assert "No space left" in line
    assert "free space and rerun" in line
    done = contents(path, "prose")
    num_shards = len(open_plan(load_run(path)).shards)
    assert 0 < len(done) < num_shards
    remount(small_disk, "16m")
    score(path, "prose")
    resumed = contents(path, "prose")
    assert len(resumed) == num_shards
    assert {shard: resumed[shard] for shard in done} == done


def test_full_disk_in_corpus_and_plan(
    tmp_path: Path, two_models: dict[str, Path], small_disk: Path
) -> None:
    generator = np.random.default_rng(0)
    text = "".join(map(chr, generator.integers(0x4E00, 0x9000, 100_000)))  # does not compress
    write_jsonl(
        tmp_path / "docs.jsonl", [{"id": "a", "text": text, "domain": "d", "split": "train"}]
    )
    path = write_run(tmp_path, two_models, run_dir=str(small_disk / "run"))
    for stage in (("corpus", "build"), ("extract", "plan")):
        used = sum(file.stat().st_size for file in small_disk.rglob("*") if file.is_file())
        remount(small_disk, f"{used // 1024 + 100}k")
        assert "No space left" in refused(*stage, path)
        remount(small_disk, "16m")
        found = {file.name for file in small_disk.rglob("*.parquet")}
        assert found == ({"documents.parquet"} if stage[1] == "plan" else set())
        assert "nothing to do" not in ok(*stage, path)


def test_an_object_store_holds_a_run_as_well(
    tmp_path: Path, two_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = planned(tmp_path, two_models, repeat=1)
    score(local, "prose")
    remote = plan_run(write_run(tmp_path, two_models, run_dir=f"memory://{tmp_path.name}/run"))
    score(remote, "prose")
    local = write_run(tmp_path, two_models)
    stored = contents(local, "prose")
    remote = write_run(tmp_path, two_models, run_dir=f"memory://{tmp_path.name}/run")
    assert contents(remote, "prose") == stored
    assert ok("extract", "run", remote) == "extract complete, nothing to do\n"


def test_an_open_engine_is_the_one_a_store_was_begun_with(
    tmp_path: Path, two_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be chosen for the machine that goes on; the manifest says which it was."""
    path = planned(tmp_path, two_models, repeat=1)
    run = yaml.safe_load(path.read_text())
    del run["extract"]["engine"]
    path.write_text(yaml.safe_dump(run))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def checked() -> CheckedSource:
        loaded = load_run(path)
        return check_source(loaded, "prose", open_plan(loaded))

    chosen = checked()  # float32 on a CPU
    assert chosen.spec.section.engine == chosen.manifest.settings["engine"] == "vllm"
    run["sources"]["prose"]["dtype"] = "bfloat16"
    path.write_text(yaml.safe_dump(run))
    begun = checked()
    assert begun.spec.section.engine == begun.manifest.settings["engine"] == "transformers"
    begun.open_store()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checked().manifest == begun.manifest
