"""Counts of token pairs: made once, kept whole, believed only where they are sound and of the text."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.counts import pair_counts
from align.counts.kept_counts import COUNTS_FILE, CountsHead, KeptCounts
from align.counts.pair_counts import DistinctPairs
from align.prepare import counting
from align.prepare.checked import CheckedAlignment, check_alignment
from align.prepare.counting import Counting, count_once
from align.prepare.prepare import make_aligner
from launch.signals import StopFlag
from store_schema.config import load_run
from store_schema.disk.sealed import seal
from store_schema.errors import Stopped
from store_schema.fingerprint import bytes_digest
from tests.test_align_run import NUM_SHARDS, make_run

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("counted"))


@pytest.fixture
def begin(made: Path, tmp_path: Path) -> Callable[..., CheckedAlignment]:
    """Opens the run, in a folder of this test's own, with settings; its aligned store is begun."""
    shutil.copytree(made.parent / "run", tmp_path / "run")

    def opened(*settings: str) -> CheckedAlignment:
        run = load_run(made, [f"run_dir={tmp_path / 'run'}", *settings])
        found = check_alignment(run, "one")
        found.open_store()
        return found

    return opened


def count(checked: CheckedAlignment, stop: StopFlag | None = None, each=lambda: None) -> Pairs:
    """Count the tokens with the same number in their segments, calling `each` at every segment."""
    pairs = DistinctPairs(checked.target.vocab_size)

    def note(text, source_ids, source_ends, target_ids, target_ends) -> None:
        assert source_ends[-1] == target_ends[-1] == len(text)
        shared = min(len(source_ids), len(target_ids))
        pairs.note(source_ids[:shared].astype(np.int64), target_ids[:shared].astype(np.int64))
        each()

    count_once(checked, Counting("same number", pairs, note), stop or StopFlag())
    return pairs.counts()


def same(one: Pairs, other: Pairs) -> None:
    assert len(one[0])
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def forbidden() -> None:
    raise AssertionError("counted again")


def kept_file(checked: CheckedAlignment) -> Path:
    return Path(checked.location.url) / COUNTS_FILE


def test_the_second_worker_does_not_count(begin, caplog: pytest.LogCaptureFixture, capsys) -> None:
    first = count(begin())
    assert "count tokens for one: " in capsys.readouterr().err
    data = kept_file(begin()).read_bytes()
    same(first, count(begin(), each=forbidden))
    assert kept_file(begin()).read_bytes() == data
    assert not caplog.messages


def test_any_worker_writes_the_same_bytes(begin) -> None:
    count(begin())
    data = kept_file(begin()).read_bytes()
    kept_file(begin()).unlink()
    count(begin())
    assert kept_file(begin()).read_bytes() == data


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def hostile(data: bytes) -> bytes:
    """A digest that is right, on ids that no vocabulary has."""
    end = data.index(b"\n}\n") + 3
    body = np.frombuffer(data[end:], "<u4").copy()
    body[0] = 1 << 30
    request = {"what": "same number"}
    head = CountsHead(request=request, num_pairs=len(body) // 4, sha256=bytes_digest(body.data))
    return seal(head) + body.tobytes()


DAMAGES = {
    "head": lambda data: flipped(data, 40),
    "first pair": lambda data: flipped(data, data.index(b"\n}\n") + 3),
    "last count": lambda data: flipped(data, len(data) - 3),
    "cut": lambda data: data[:-16],
    "cut in the head": lambda data: data[:50],
    "empty": lambda data: b"",
    "longer": lambda data: data + bytes(16),
    "much longer": lambda data: data + bytes(1 << 24),
    "foreign": lambda data: b"\x93NUMPY" + bytes(500),
    "newer": lambda data: data.replace(b'"schema_version": ', b'"schema_version": 9'),
    "another's": hostile,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_counted_again(
    begin, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checked = begin()
    first = count(checked)
    data = kept_file(checked).read_bytes()
    kept_file(checked).write_bytes(DAMAGES[damage](data))
    with caplog.at_level(logging.WARNING):
        same(first, count(begin()))
    (line,) = caplog.messages
    assert COUNTS_FILE in line
    assert "\n" not in line
    assert kept_file(checked).read_bytes() == data


def test_ids_that_no_vocabulary_has_are_refused(begin) -> None:
    """The digest says only that bytes are as they were written."""
    checked = begin()
    source, target, counts = count(checked)
    sizes = (len(checked.reader.vocabulary), checked.target.vocab_size)
    kept = KeptCounts(checked.location, {"what": "x"}, sizes, 10**6)
    for wrong in (
        (source + sizes[0], target, counts),
        (source, np.where(target == target.max(), sizes[1], target), counts),
        (source, target, counts - counts.max()),
        (source[::-1], target[::-1], counts),
        (np.append(source, source[-1]), np.append(target, target[-1]), np.append(counts, 1)),
    ):
        pairs = DistinctPairs(1 << 20)
        pairs.counts = lambda wrong=wrong: wrong
        kept.write(pairs)
        with pytest.raises(counting.StoreError, match="not counts of two vocabularies"):
            kept.read_into(DistinctPairs(sizes[1]))


@pytest.mark.parametrize("name", ["plan", "source_store", "target_tokenizer", "counting_version"])
def test_counts_of_something_else_are_not_taken(begin, caplog, name: str) -> None:
    checked = begin()
    first = count(checked)
    kept = counting._kept(checked, "same number", counting.shards_to_count(checked))
    pairs = DistinctPairs(checked.target.vocab_size)
    pairs.restore(*(part[:1] for part in first))
    replace(kept, request=kept.request | {name: "other"}).write(pairs)
    with caplog.at_level(logging.WARNING):
        same(first, count(begin()))
    (line,) = caplog.messages
    assert name in line


def test_fewer_tokens_to_count_are_other_counts(begin, caplog: pytest.LogCaptureFixture) -> None:
    every = count(begin())
    with caplog.at_level(logging.WARNING):
        fewer = count(begin("align.statistics_tokens=1"))
    assert every[2].sum() == NUM_SHARDS * fewer[2].sum()
    assert "statistics_tokens" in caplog.messages[0]
    same(fewer, count(begin("align.statistics_tokens=1"), each=forbidden))


def test_two_workers_that_count_at_once_do_no_harm(begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are done before either writes."""
    both = threading.Barrier(2, timeout=60)
    write = KeptCounts.write

    def together(self, pairs) -> None:
        both.wait()
        write(self, pairs)

    monkeypatch.setattr(KeptCounts, "write", together)
    found: list[Pairs] = []
    workers = [
        threading.Thread(target=lambda checked=checked: found.append(count(checked)))
        for checked in (begin(), begin())
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    same(*found)
    same(found[0], count(begin(), each=forbidden))


def test_a_worker_leaves_off_when_another_was_faster(begin) -> None:
    checked = begin()
    left = len(checked.plan.segments(checked.plan.shards[0]))
    faster: list[Pairs] = []

    def first_shard_only() -> None:
        nonlocal left
        left -= 1
        assert left >= 0, "went on counting"
        if left == 0:
            faster.append(count(begin()))

    same(count(checked, each=first_shard_only), faster[0])


def test_a_signal_ends_the_counting(begin) -> None:
    stop, noted = StopFlag(), []

    def ask() -> None:
        noted.append(1)
        stop.ask(signal.SIGTERM)

    with pytest.raises(Stopped):
        count(begin(), stop, ask)
    assert len(noted) == len(begin().plan.segments(begin().plan.shards[0]))
    assert not kept_file(begin()).exists()


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("align.method=bytes", True),
        ("align.continuation=tail", True),
        ("align.continuation=first_token", False),
        ("align.method=stats", True),
        ("align.method=mined", False),
    ],
)
def test_methods_that_count_keep_what_they_counted(
    begin, monkeypatch: pytest.MonkeyPatch, setting: str, counts: bool
) -> None:
    """And make the same aligner of it."""
    checked = begin(setting)
    first = make_aligner(checked, StopFlag())
    assert kept_file(checked).exists() == counts
    monkeypatch.setattr(counting, "_count", lambda *_: forbidden())
    again = make_aligner(begin(setting), StopFlag())
    if setting.startswith("align.continuation") or setting.endswith("bytes"):
        same_map(first.mapping.continuation, again.mapping.continuation)
    else:
        np.testing.assert_array_equal(first.token_map, again.token_map)


def same_map(one, other) -> None:
    for name in ("offsets", "targets", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_counts_of_one_method_are_not_those_of_another(begin, caplog) -> None:
    make_aligner(begin("align.method=bytes"), StopFlag())
    with caplog.at_level(logging.WARNING):
        make_aligner(begin("align.method=stats"), StopFlag())
    assert "another what" in caplog.messages[0]


def test_folding_early_or_late_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noted = [(rng.integers(0, 9, 40), rng.integers(0, 7, 40)) for _ in range(20)]
    found = []
    for least in (1, 1 << 20):
        monkeypatch.setattr(pair_counts, "_LEAST_PENDING", least)
        pairs = DistinctPairs(7)
        for source, target in noted:
            pairs.note(source, target)
            pairs.merge()
        found.append(pairs.counts())
    same(*found)
    source, target, counts = found[0]
    assert counts.sum() == 800
    expected = {}
    for a, b in noted:
        for pair in zip(a.tolist(), b.tolist(), strict=True):
            expected[pair] = expected.get(pair, 0) + 1
    places = zip(source.tolist(), target.tolist(), strict=True)
    assert dict(zip(places, counts.tolist(), strict=True)) == expected
    assert np.all(np.diff(source * 7 + target) > 0)
