"""The align stage on disk: resume after a kill, no-ops, changed inputs, worker counts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from align.counts.counted_text import counted_shards
from align.counts.kept_counts import COUNTS_FILE
from align.run import AlignSummary, align_source
from launch.signals import StopFlag
from launch.work import Part
from launch.worklog import read_sessions
from store_schema.config import ModelRef, load_run
from store_schema.disk.location import open_location
from store_schema.errors import Stopped
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import Plan, write_plan
from store_schema.store.reader import MANIFEST_FILE, RANKING_FILE, VOCABULARY_FILE, StoreReader
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import call, ok
from tests.random_source import random_source, segments
from tests.run_file import write_run_file
from tests.tiny import SAMPLE_TEXTS, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_processes")

TEXTS = [text for texts in SAMPLE_TEXTS.values() for text in texts]
NUM_SHARDS = 6


@cache
def trained(kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Training a tokenizer breaks ties at random: runs that are compared share one."""
    return tiny_tokenizer(kind, vocab_size=vocab_size)


def make_run(
    folder: Path,
    kind: str = "byte_level",
    target: str = "unigram",
    target_size: int = 450,
) -> Path:
    """A run with a plan and one complete source store; returns its run file."""
    models = {"one": trained(kind, 400), "target": trained(target, target_size)}
    for name, tokenizer in models.items():
        tokenizer.save_pretrained(folder / "models" / name)
    places = {name: folder / "models" / name for name in models}
    path = write_run_file(folder, places, store={"preset": "exact"})
    source, goal = (
        SegmentTokenizer.load(ModelRef(model=str(place)), name=name)
        for name, place in places.items()
    )
    made = segments(TEXTS * NUM_SHARDS)
    shards = []
    for index in range(NUM_SHARDS):
        part = made[index * len(TEXTS) : (index + 1) * len(TEXTS)]
        count = sum(len(e.token_ids) for e in goal.encode(part))
        shards.append((part, {"one": count, "target": count}))
    plan = write_plan(
        open_location(folder / "run/plan"),
        shards,
        corpus_fingerprint="c",
        request_fingerprint="r",
        tokenizers={"one": source.fingerprint, "target": goal.fingerprint},
        settings={},
    )
    manifest = Manifest(
        kind="source",
        source="one",
        model=ModelIdentity(
            name=str(folder / "models/one"),
            model_fingerprint="m",
            tokenizer_fingerprint=source.fingerprint,
            vocab_size=source.vocab_size,
        ),
        corpus_fingerprint="c",
        plan_fingerprint=plan.fingerprint,
        top_k=12,
        vocabulary_fingerprint=source.vocabulary.fingerprint,
    )
    location = open_location(folder / "run/stores/one")
    writer = StoreWriter.open(location, manifest, source.vocabulary)
    for shard in plan.shards:
        encoded = source.encode(plan.segments(shard))
        arrays = random_source(encoded, source.vocab_size, shard.index)
        arrays["segment_ids"] = np.arange(shard.start, shard.stop, dtype="<i8")
        writer.write(shard, arrays)
    return path


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = call("align", "run", *arguments)
    return result.exit_code, result.stdout, result.stderr


def contents(folder: Path) -> dict[int, str]:
    commits = StoreReader.open(open_location(folder / "run/aligned/one")).commits
    return {index: commit.content_sha256 for index, commit in commits.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    code, out, err = invoke(str(make_run(folder)))
    assert code == 0, err
    assert "coverage" in out
    return folder


def test_every_shard_is_there_and_verifies(finished: Path) -> None:
    reader = StoreReader.open(open_location(finished / "run/aligned/one"))
    assert sorted(reader.commits) == list(range(NUM_SHARDS))
    for index in reader.commits:
        reader.verify(index)
    stats = reader.commits[0].stats
    assert stats["origin_none"] / stats["positions"] < 0.01
    assert stats["source_bytes"] == sum(len(t.encode()) for t in TEXTS)


def test_the_counts_kept_in_a_store_are_nothing_to_its_readers(
    finished: Path, tmp_path: Path
) -> None:
    place = open_location(finished / "run/aligned/one")
    assert place.exists(COUNTS_FILE)
    for command in (["verify"], ["gc", "--older-than", "0"], ["stats"]):
        done = call("store", *command, place.url)
        assert done.exit_code == 0, done.stderr
        assert COUNTS_FILE not in done.output
    assert place.exists(COUNTS_FILE)
    done = call("store", "copy", place.url, tmp_path / "copy")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "copy" / COUNTS_FILE).exists()


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = contents(finished)
    code, out, _ = invoke(str(finished / "run.yaml"))
    assert code == 0
    assert "nothing to do" in out
    assert contents(finished) == before


def test_a_source_that_became_another_model(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "all")
    path = tmp_path / "all/run.yaml"
    text = path.read_text().replace(str(finished / "run"), str(tmp_path / "all/run"))
    path.write_text(text.replace("models/one", "models/target", 1))
    for options in ([], ["--dry-run"]):
        code, _, err = invoke(str(path), *options)
        assert code == 2, err
        assert "made from another model than the run file's source one" in err
        assert f"got {finished / 'models/one'}" in err
    path.write_text(text)
    assert invoke(str(path))[0] == 0


def test_workers_make_what_one_process_makes(finished: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path)
    for worker in ("2/3", "0/3"):
        assert invoke(str(path), "--worker", worker, "--no-steal")[0] == 0
    assert sorted(contents(tmp_path)) == [0, 2, 3, 5]
    assert invoke(str(path))[0] == 0
    assert contents(tmp_path) == contents(finished)


def test_a_worker_that_stands_still_delays_nothing(finished: Path, tmp_path: Path) -> None:
    path = make_run(tmp_path)
    words = [sys.executable, "-m", "align", "run", str(path), "--worker", "1/2"]
    slow = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        while not list((tmp_path / "run").glob("logs/align/one/worker-1-of-2.jsonl")):
            assert slow.poll() is None
            time.sleep(0.002)
        slow.send_signal(signal.SIGSTOP)
        assert invoke(str(path), "--worker", "0/2")[0] == 0
        assert contents(tmp_path) == contents(finished)
        before = stored_bytes(tmp_path)
    finally:
        slow.send_signal(signal.SIGCONT)
    _, err = slow.communicate(timeout=60)
    assert slow.returncode == 0, err
    assert stored_bytes(tmp_path) == before  # it has nothing to add
    sessions = {str(s.worker): s for s in read_sessions(load_run(path), "align", "one")}
    assert {f.shard for f in sessions["0/2"].finished} > {0, 2, 4}
    ok("store", "verify", path)


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """All that readers of the store may see; without the names of attempts, and of models' folders."""
    place = folder / "run/aligned/one"
    names = (VOCABULARY_FILE, RANKING_FILE, COUNTS_FILE)
    found = {name: (place / name).read_bytes() for name in names}
    reader = StoreReader.open(open_location(place))
    found["manifest"] = reader.manifest.fingerprint().encode()
    for index, commit in reader.commits.items():
        for path in (place / commit.path).rglob("*"):
            if path.is_file():
                found[f"{index}/{path.relative_to(place / commit.path)}"] = path.read_bytes()
        content = commit.model_dump(mode="json", exclude={"path"})
        found[f"{index}/commit"] = json.dumps(content, sort_keys=True).encode()
    return found


KILLED_AT = ("manifest.json", COUNTS_FILE, "data/*", "commits/*.json")
"""What appears as the store is begun, text is counted, a shard is begun, a shard is finished."""


def test_killed_at_any_moment_and_rerun_equals_uninterrupted(
    finished: Path, tmp_path: Path
) -> None:
    path = make_run(tmp_path)
    command = [sys.executable, "-m", "align", "run", str(path)]
    store_folder = tmp_path / "run/aligned/one"
    kills = 0
    for sign in KILLED_AT:
        there = 0 if sign == COUNTS_FILE else len(list(store_folder.glob(sign)))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(store_folder.glob(sign))) > there:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.communicate()
    assert kills >= 2  # a machine that is busy may let one finish
    assert invoke(str(path))[0] == 0
    assert contents(tmp_path) == contents(finished)
    assert stored_bytes(tmp_path) == stored_bytes(finished)


def test_sigterm_stops_cleanly(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "align", "run", str(path)], stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "run/aligned/one"
    while process.poll() is None and not (folder / MANIFEST_FILE).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # text is counted now, all shards are still to come
    _, err = process.communicate(timeout=60)
    some = list(folder.glob("commits/*.json"))
    assert len(some) < NUM_SHARDS
    assert process.returncode == (75 if some else 143)  # 75: something was finished, run again
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err
    assert invoke(str(path))[0] == 0


def test_stopped_before_anything_was_finished(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    flag = StopFlag()
    flag.ask(signal.SIGUSR1)
    with pytest.raises(Stopped) as caught:
        align_source(run, "one", Part(), flag)
    assert caught.value.exit_code == 143
    (session,) = read_sessions(run, "align", "one")
    assert (session.reason, session.in_hand, session.finished) == ("stopped", 0, ())


def test_the_speed_told_leaves_out_the_shard_that_waits_for_the_compiler() -> None:
    assert AlignSummary("s", (), ((100, 50.0), (100, 1.0), (300, 1.0))).tokens_per_s == 200
    assert AlignSummary("s", (), ((100, 50.0),)).tokens_per_s == 2
    assert AlignSummary("s", (), ()).tokens_per_s is None


def test_a_part_of_the_shards_and_what_the_log_says_of_it(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    assert invoke(str(path), "--shards", "1-4", "--worker", "1/2", "--limit", "1")[0] == 0
    assert sorted(contents(tmp_path)) == [1]
    words = ("--shards", "1-4", "--worker", "1/2", "--no-steal")
    assert invoke("--config", str(path), *words)[0] == 0
    assert sorted(contents(tmp_path)) == [1, 3]
    run = load_run(path)
    first, second = read_sessions(run, "align", "one")
    assert [set(s.pending) for s in (first, second)] == [{1}, {3}]
    assert [str(s.worker) for s in (first, second)] == ["1/2", "1/2"]
    assert first.reason == second.reason == "done"
    commit = StoreReader.open(open_location(run.aligned_url("one"))).commits[1]
    assert first.finished[0].tokens == commit.counts.positions
    log = tmp_path / "run/logs/align/one/worker-1-of-2.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    line = next(line for line in lines if line["event"] == "shard")
    assert line["size_bytes"] == sum(file.size for file in commit.files.values())
    assert 0 < line["seconds"] < 60
    assert "at most 5" in one_line_error(path, "--shards", "4-6")


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = files()
    code, out, _ = invoke(str(path), "--dry-run", "--shards", "0-2,5")
    assert code == 0
    plan = Plan.open(open_location(tmp_path / "run/plan"))
    tokens = sum(plan.shards[i].num_tokens["target"] for i in (0, 1, 2, 5))
    assert out == f"align one: would do 4 shards (0-2,5), {tokens:,} tokens\n"
    assert files() == before
    assert invoke(str(path), "--shards", "0-4")[0] == 0
    before = files()
    assert "would do 1 shard (5)" in invoke(str(path), "--dry-run")[1]
    assert "nothing to do" in invoke(str(path), "--dry-run", "--shards", "0-4")[1]
    assert "settings" in one_line_error(path, "--dry-run", "--set", "align.max_entries=5")
    (tmp_path / "run/stores/one/commits/00005.json").unlink()
    assert "(5)" in one_line_error(path, "--dry-run")
    del before[tmp_path / "run/stores/one/commits/00005.json"]
    assert files() == before


def one_line_error(path: Path, *arguments: str) -> str:
    code, _, err = invoke(str(path), *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def test_changed_settings_are_refused(finished: Path) -> None:
    line = one_line_error(finished / "run.yaml", "--set", "align.max_entries=5")
    assert "settings" in line
    assert "expected" in line
    assert "got" in line


def test_another_target_tokenizer_is_refused(finished: Path, tmp_path: Path) -> None:
    tiny_tokenizer("byte_level", vocab_size=333).save_pretrained(tmp_path / "other")
    line = one_line_error(finished / "run.yaml", "--set", f"target.model={tmp_path / 'other'}")
    assert "tokenizer" in line


def test_a_model_folder_without_tokenizer_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = one_line_error(finished / "run.yaml", "--set", f"target.model={tmp_path / 'empty'}")
    assert "no tokenizer" in line


def test_exact_between_two_vocabularies_is_refused(finished: Path) -> None:
    assert "one vocabulary" in one_line_error(finished / "run.yaml", "--set", "align.method=exact")


def test_exact_on_one_vocabulary_copies(tmp_path: Path) -> None:
    path = make_run(tmp_path, "byte_level", "byte_level", target_size=400)
    code, _, err = invoke(str(path), "--set", "align.method=exact")
    assert code == 0, err
    source = StoreReader.open(open_location(tmp_path / "run/stores/one")).read(1)
    copied = StoreReader.open(open_location(tmp_path / "run/aligned/one")).read(1)
    for name, array in source.items():
        np.testing.assert_array_equal(copied[name], array)


def test_unknown_source_and_missing_store(finished: Path, tmp_path: Path) -> None:
    assert "no such source" in one_line_error(finished / "run.yaml", "--source", "two")
    line = one_line_error(finished / "run.yaml", "--set", f"run_dir={tmp_path}")
    assert "no plan" in line


def test_a_missing_source_shard_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    (tmp_path / "run/stores/one/commits/00003.json").unlink()
    line = one_line_error(path)
    assert "(3)" in line
    assert not list((tmp_path / "run/aligned/one").glob("commits/*"))


def test_a_flipped_byte_in_the_source_store_is_found(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    victim = next((tmp_path / "run/stores/one/data").glob("00002-*/entry_ids_coded/c/0"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    line = one_line_error(path)
    assert "shard 2" in line
    assert "entry_ids" in line


def test_only_training_text_is_counted(tmp_path: Path) -> None:
    """Held-out text must not shape the map that is then measured on it."""
    made = segments(TEXTS)
    held_out = [replace(segment, split="test") for segment in made[:4]]
    training = made[4:]
    plan = write_plan(
        open_location(tmp_path),
        [(held_out, {"target": 1}), (training, {"target": 1})],
        corpus_fingerprint="c",
        request_fingerprint="r",
        tokenizers={},
        settings={},
    )
    assert [shard.split for shard in counted_shards(plan)] == ["train"]


def test_figures_are_of_what_the_store_keeps(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    code, _, err = invoke(str(path), "--set", "store.preset=tiny")
    assert code == 0, err
    reader = StoreReader.open(open_location(tmp_path / "run/aligned/one"))
    for shard, commit in reader.commits.items():
        kept = 1.0 - reader.read(shard, ["tail_mass"])["tail_mass"].astype(np.float64)
        assert commit.stats["mass_out"] == pytest.approx(kept.sum(), rel=0.02)
        assert commit.stats["tail_mass_mean"] == pytest.approx(1 - kept.mean(), abs=1e-6)


# ---- another target, another method: side by side ----------------------------------------------------


def beside(folder: Path, name: str, **changes: object) -> Path:
    """A run that uses the data of the run in `folder`."""
    content = yaml.safe_load((folder / "run.yaml").read_text())
    content |= {"name": name, "run_dir": str(folder / name), "data_dir": str(folder / "run")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    code, _, err = invoke(str(make_run(folder)))
    assert code == 0, err
    trained("byte_level", 330).save_pretrained(folder / "models/other")
    return folder


def test_another_target_and_method_have_their_own_stores(shared: Path) -> None:
    first = {p: p.read_bytes() for p in (shared / "run/aligned").rglob("*") if p.is_file()}
    other = beside(shared, "other", target={"model": str(shared / "models/other")})
    code, out, err = invoke(str(other), "--dry-run")
    assert (code, "would do" in out) == (0, True), err
    assert not (shared / "run/plan/tokens").exists()
    assert not (shared / "other").exists()
    for path in (other, beside(shared, "spans", align={"method": "spans"})):
        code, out, err = invoke(str(path))
        assert code == 0, err
        assert "coverage" in out
        run = load_run(path)
        assert run.aligned_url("one") == f"{run.folder}/aligned/one"
        reader = StoreReader.open(open_location(run.aligned_url("one")))
        plan = Plan.open(open_location(shared / "run/plan"))
        assert reader.committed(plan.shards) == set(range(NUM_SHARDS))
        target = SegmentTokenizer.load(run.target, name="target")
        assert reader.manifest.target is not None
        assert reader.manifest.target.tokenizer_fingerprint == target.fingerprint
        for index in reader.commits:
            reader.verify(index)
            expected = sum(
                len(e.token_ids) for e in target.encode(plan.segments(plan.shards[index]))
            )
            assert reader.commits[index].counts.positions == expected
        ok("store", "verify", path)
    again = {p: p.read_bytes() for p in (shared / "run/aligned").rglob("*") if p.is_file()}
    assert again == first


def test_a_run_that_asks_for_the_same_alignment_uses_the_same(shared: Path) -> None:
    path = beside(shared, "same")
    assert load_run(path).aligned_url("one") == str(shared / "run/aligned/one")
    code, out, err = invoke(str(path))
    assert code == 0, err
    assert "nothing to do" in out + err
    assert not (shared / "same/aligned").exists()
    # Before it is aligned, a run with other settings does not take the data's store for its own.
    asked = load_run(beside(shared, "asked", align={"max_entries": 7}))
    assert asked.aligned_url("one") == str(shared / "asked/aligned/one")


def test_a_target_that_cannot_read_the_segments_is_refused(shared: Path) -> None:
    folder = shared / "models/short"
    trained("byte_level", 330).save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": 16, "vocab_size": 330})
    )
    code, _, err = invoke(str(beside(shared, "short", target={"model": str(folder)})))
    assert code == 2
    assert "a segment of the plan is longer than target can read" in err
    assert not (shared / "short/aligned").exists()
