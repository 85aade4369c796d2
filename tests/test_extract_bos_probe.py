"""A source read without the BOS it wants, or with one that hurts, is named before it is scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from extract.engines.protocol import DenseRows
from extract.run import run_source
from extract.scoring.bos_probe import (
    PROBE_SEGMENTS,
    PROBE_TOKENS,
    BosFigures,
    figures_path,
    measured,
    probe_segments,
    read_figures,
)
from launch.work import Part, Worker
from store_schema.config import load_run
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import EncodedSegment
from tests.extract_runs import plan_run, sample_documents, write_jsonl, write_run
from tests.tiny import tiny_model, tiny_tokenizer

LOST = "is much better"


class CarefulEngine:
    """A model that scores each token at `with_bos` nats behind a BOS, else at `without`."""

    def __init__(self, with_bos: float, without: float) -> None:
        self.nats = {True: with_bos, False: without}
        self.asked: list[EncodedSegment] = []
        self.description = "test"

    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        for i, segment in reversed(list(enumerate(segments))):
            self.asked.append(segment)
            has_bos = bool(segment.context_ids)
            rows = len(segment.token_ids) - (not has_bos)
            labels = np.full(rows, -self.nats[has_bos], np.float32)
            if has_bos:
                labels[0] = -50  # of the first token nothing is known without BOS: not compared
            ids = np.zeros((rows, 1), np.int32)
            yield i, DenseRows(ids, np.full((rows, 1), -1, np.float32), labels)

    def close(self) -> None:
        pass


def named_bos(folder: Path) -> Path:
    """A model whose tokenizer has a BOS token and does not put it before a text."""
    return tiny_model(folder, "llama", tiny_tokenizer())


def planned(folder: Path, source: Path, **extra: Any) -> Path:
    write_jsonl(folder / "docs.jsonl", sample_documents(1))
    return plan_run(write_run(folder, {"lost": source, "target": source}, **extra))


def scored(
    path: Path, monkeypatch: pytest.MonkeyPatch, engine: CarefulEngine, worker: Worker | None = None
) -> None:
    monkeypatch.setattr("extract.run.open_engine", lambda spec: engine)
    run_source(load_run(path), "lost", Part(worker or Worker()))


@pytest.mark.parametrize(
    ("with_bos", "without", "warned"), [(1.0, 1.4, True), (1.0, 1.03, False), (1.2, 1.0, False)]
)
def test_a_lost_bos_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    with_bos: float,
    without: float,
    warned: bool,
) -> None:
    path = planned(tmp_path, named_bos(tmp_path / "m"))
    scored(path, monkeypatch, CarefulEngine(with_bos, without))
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(found) == warned
    if warned:
        for words in ("lost reads text without BOS", "bos: always", "stores/lost", "extract plan"):
            assert words in found[0]
        assert "\n" not in found[0]
    kept = json.loads(figures_path(load_run(path), "lost").read_text())
    assert kept["without_bpb"] / kept["with_bpb"] == pytest.approx(without / with_bos, rel=1e-6)
    from extract.report.tables import SourceFigures, source_report

    report = source_report([SourceFigures.read(load_run(path), "lost")])
    assert "lost reads text without BOS: " in report
    assert ("MUCH BETTER" in report) == warned


def test_a_bos_that_hurts_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_model(tmp_path / "m", "llama", tiny_tokenizer(bos=True))
    path = planned(tmp_path, source)
    scored(path, monkeypatch, CarefulEngine(1.4, 1.0))
    assert "lost reads text with BOS" in caplog.text
    assert "bos: never" in caplog.text


def test_once_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = planned(tmp_path, named_bos(tmp_path / "m"))
    second, first = CarefulEngine(1.0, 2.0), CarefulEngine(1.0, 2.0)
    scored(path, monkeypatch, second, Worker(1, 2))
    assert not any(part.context_ids for part in second.asked)  # another worker asks
    assert LOST not in caplog.text
    figures_path(load_run(path), "lost").unlink(missing_ok=True)
    scored(path, monkeypatch, first, Worker(0, 2))
    assert not any(part.context_ids for part in first.asked)  # something is committed


def test_a_kill_between_probe_and_first_commit_asks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned(tmp_path, named_bos(tmp_path / "m"))

    class KilledAfterProbe(CarefulEngine):
        calls = 0

        def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
            self.calls += 1
            if self.calls > 3:  # whether it is causal, with BOS, without
                raise KeyboardInterrupt
            yield from super().score(segments)

    with pytest.raises(KeyboardInterrupt):
        scored(path, monkeypatch, KilledAfterProbe(1.0, 1.0))
    assert figures_path(load_run(path), "lost").exists()
    resumed = CarefulEngine(1.0, 1.0)
    scored(path, monkeypatch, resumed)
    assert not any(part.context_ids for part in resumed.asked)


def test_nothing_is_asked_where_there_is_no_bos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    path = planned(tmp_path, tiny_model(tmp_path / "m", "llama", tokenizer))
    run = load_run(path)
    engine = CarefulEngine(1.0, 2.0)
    scored(path, monkeypatch, engine)
    assert not any(part.context_ids for part in engine.asked)
    assert not figures_path(run, "lost").exists()


def test_figures_of_another_tokenizer_are_not_believed(tmp_path: Path) -> None:
    path = planned(tmp_path, tiny_model(tmp_path / "m", "llama", tiny_tokenizer()))
    run = load_run(path)
    place = figures_path(run, "lost")
    place.parent.mkdir(parents=True)
    place.write_text(
        json.dumps(
            {"tokenizer": "a", "rule": "with", "with_bpb": 1.0, "without_bpb": 1.0}
            | {"num_segments": 1, "num_bytes": 9}
        )
    )
    assert read_figures(run, "lost", "a") is not None
    assert read_figures(run, "lost", "b") is None
    place.write_text("{")
    assert read_figures(run, "lost", "a") is None


def test_both_ways_are_about_the_same_bytes() -> None:
    ends = np.arange(1, 301, dtype=np.uint32) * 3
    part = EncodedSegment((7,), np.zeros(300, np.uint32), ends)
    engine: Any = CarefulEngine(1.0, 2.0)
    tokenizer: Any = SimpleNamespace(bos_ids=(7,), fingerprint="f")
    figures = measured(engine, [part], (7,), PROBE_TOKENS, tokenizer)
    assert {len(p.context_ids) + len(p.token_ids) for p in engine.asked} == {128, 127}
    assert figures.num_bytes == 126 * 3
    assert figures.with_bpb == pytest.approx(126 / np.log(2) / figures.num_bytes)
    assert figures.without_bpb == pytest.approx(2 * figures.with_bpb)


def test_segments_come_from_every_domain_and_have_no_prompt() -> None:
    def segment(i: int, domain: str, context: str | None = None) -> Segment:
        return Segment(i, f"{i}#0", str(i), domain, "train", 0, 1, True, context, "a")

    many = [segment(i, "a") for i in range(20)] + [segment(20, "b"), segment(21, "c", "{}")]
    chosen = probe_segments(many)
    assert len(chosen) == PROBE_SEGMENTS
    assert [part.domain for part in chosen[:3]] == ["a", "b", "a"]


@pytest.mark.parametrize("rule", ["with", "without"])
def test_wrong_both_ways(rule: Any) -> None:
    assert not BosFigures("f", rule, 1.0, 1.0, 8, 99).wrong
    assert BosFigures("f", rule, 1.0, 1.2, 8, 99).wrong == (rule == "without")
    assert BosFigures("f", rule, 1.2, 1.0, 8, 99).wrong == (rule == "with")
    assert not BosFigures("f", rule, float("nan"), 1.0, 8, 99).wrong
