"""Two runs' interference: exact ratios, honest intervals, refusals in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fuse_eval.findings import CONTROL, FUSED
from fuse_eval.interference.blocks import Blocks, write_blocks
from fuse_eval.interference.documents import document_differences, interference_record
from fuse_eval.interference.excess import excess_ratio
from fuse_eval.summary import write_json
from store_schema.disk.location import open_location
from tests.command import call
from tests.test_fuse_eval_documents import make_blocks


def _ratio(ours: list[float], theirs: list[float], **given: Any) -> Any:
    options = {"samples": 400, "confidence": 0.95, "seed": 0} | given
    domains = options.pop("domains", ["x"] * len(ours))
    return excess_ratio(np.array(ours), np.array(theirs), domains, **options)


def test_a_run_of_half_the_excess_everywhere_has_no_width() -> None:
    theirs = np.random.default_rng(0).exponential(3, 50)
    found = _ratio((theirs / 2).tolist(), theirs.tolist())
    assert found.nats == pytest.approx(theirs.sum() / 2)
    assert found.against_nats == pytest.approx(theirs.sum())
    for value in (found.value, found.low, found.high):
        assert value == pytest.approx(0.5)


def test_no_excess_on_either_side() -> None:
    none = _ratio([1.0, 2.0], [0.0, 0.0])
    assert (none.value, none.low, none.high) == (None, None, None)
    clean = _ratio([0.0, 0.0], [1.0, 2.0])
    assert (clean.value, clean.low, clean.high) == (0.0, 0.0, 0.0)
    # One document has it all: a draw without it leaves the ratio open on both sides.
    rare = _ratio([3.0, 0.0], [6.0, 0.0])
    assert (rare.value, rare.low, rare.high) == (0.5, 0.0, None)


def test_documents_are_drawn_within_their_domain() -> None:
    """With one document in each domain every draw is the split itself."""
    found = _ratio([1.0, 3.0], [2.0, 2.0], domains=["a", "b"])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        theirs = rng.gamma(2, 5, 60)
        ours = 0.6 * theirs * rng.gamma(20, 0.05, 60)
        found = _ratio(ours.tolist(), theirs.tolist(), confidence=0.9, samples=300, seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 0.83 <= hits / 200 <= 0.96


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.exponential(9, 40).tolist(), rng.exponential(9, 40).tolist()
    assert _ratio(ours, theirs, seed=5) == _ratio(ours, theirs, seed=5)
    assert _ratio(ours, theirs, seed=5) != _ratio(ours, theirs, seed=6)


def _evaluated(folder: Path, blocks: Blocks, *, control: bool = True) -> Path:
    """A run that is nothing but its evaluation; returns its run file."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "name": folder.name,
        "run_dir": str(folder),
        "sources": {"s": {"model": "unused"}},
        "target": {"model": "unused"},
        "corpus": {"inputs": [{"path": "unused.jsonl"}]},
        "evaluate": {"bootstrap_samples": 300},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    report = open_location(str(folder)).child("report")
    content: dict[str, Any] = {"split": "test", "confidence": 0.95, "comparisons": []}
    content["bpb"] = {model: {} for model in blocks.nats}
    if control:
        found = document_differences(blocks, FUSED, CONTROL)
        content["interference"] = interference_record(found, FUSED, CONTROL, 0.95)
    content["blocks"] = write_blocks(report, blocks)
    write_json(report, "evaluation.json", content)
    return file


def _documents(excess: float, count: int = 6) -> Blocks:
    rng = np.random.default_rng(7)
    controls = [rng.exponential(40, 10) for _ in range(count)]
    shifts = [excess * (i + 1) for i in range(count - 1)] + [-5.0]
    return make_blocks(
        {f"doc {i}": (c + s, c) for i, (c, s) in enumerate(zip(controls, shifts, strict=True))}
    )


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Ours with a third of the other's excess."""
    return (
        _evaluated(tmp_path / "ours", _documents(0.1)),
        _evaluated(tmp_path / "other", _documents(0.3)),
    )


def _invoke(*words: object) -> Any:
    return call("eval", "interference", *words)


def test_command_gives_the_ratio_as_text_and_json(runs: tuple[Path, Path]) -> None:
    ours, other = runs
    for against in (other, other.parent):  # by its run file or its folder
        done = _invoke(ours, "--against", against, "--json")
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        found = content["other_run"]
        # Five documents of ten blocks, 0.1 to 0.5 nats each.
        assert found["worse_by_point"]["nats"] == pytest.approx(15.0)
        assert found["worse_by_point"]["against_nats"] == pytest.approx(45.0)
        for key in ("worse", "worse_by_point"):
            for end in ("value", "low", "high"):
                assert found[key][end] == pytest.approx(1 / 3)
        assert found["documents"] == found["against_documents"] == {"total": 6, "worse": 5}
        assert content["interference"]["documents"]["worse"] == 5
    text = _invoke(ours, "--against", other)
    assert text.exit_code == 0, text.output
    for words in (
        "Documents: 5 of 6 are worse than the control beyond the noise",
        "15.0 nats, there 45.0: ratio 0.333 (95 % interval 0.333 to 0.333)",
        "x: doc 4",
        "beyond the noise",
    ):
        assert words in text.stdout


def test_command_alone_tells_the_run(runs: tuple[Path, Path]) -> None:
    done = _invoke(runs[0])
    assert done.exit_code == 0, done.output
    assert "5 of 6" in done.stdout
    assert "ratio" not in done.stdout
    assert "other_run" not in json.loads(_invoke(runs[0], "--json").stdout)


def _refused(*words: object) -> str:
    done = _invoke(*words)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_other_documents_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    fewer = _evaluated(tmp_path / "fewer", _documents(0.3, count=5))
    line = _refused(runs[0], "--against", fewer)
    assert "not evaluated on the same text" in line
    assert "got 5 documents, 5 of the same names, 5 of the same bytes" in line
    blocks = _documents(0.3)
    blocks.num_bytes[0] += 1
    line = _refused(runs[0], "--against", _evaluated(tmp_path / "longer", blocks))
    assert "got 6 documents, 6 of the same names, 5 of the same bytes" in line


def test_runs_without_a_control_are_measured_against_anothers(tmp_path: Path) -> None:
    def alone(name: str, excess: float) -> Path:
        blocks = _documents(excess)
        del blocks.nats[CONTROL]
        return _evaluated(tmp_path / name, blocks, control=False)

    clm = _documents(0.0)
    plain = {FUSED: clm.nats[CONTROL]}  # a run that is itself the control
    third = _evaluated(tmp_path / "third", replace(clm, nats=plain), control=False)
    ours, other = alone("ours", 0.1), alone("other", 0.3)
    assert "--control" in _refused(ours)
    assert "--control" in _refused(ours, "--against", other)
    done = _invoke(ours, "--against", other, "--control", third, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["other_run"]["worse_by_point"]["value"] == pytest.approx(1 / 3)
    assert content["interference"]["documents"]["worse"] == 5
    (comparison,) = content["comparisons"]
    expected = (clm.nats[CONTROL].sum() + 15 - 50) / clm.nats[CONTROL].sum() - 1
    assert comparison["domains"]["x"]["value"] == pytest.approx(expected)
    fewer = _evaluated(tmp_path / "fewer", _documents(0.3, count=5))
    line = _refused(ours, "--control", fewer)
    assert "the control was not evaluated on the same text" in line
    assert "expected 60 blocks" in line


def test_what_is_missing_is_told_in_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    ours, other = runs
    blocks = _documents(0.3)
    del blocks.nats[CONTROL]
    without = _evaluated(tmp_path / "without", blocks, control=False)
    assert "no CLM control was evaluated" in _refused(ours, "--against", without)
    assert "no CLM control was evaluated" in _refused(without)
    assert "nowhere.yaml" in _refused(ours, "--against", tmp_path / "nowhere.yaml")
    evaluation = other.parent / "report" / "evaluation.json"
    content = json.loads(evaluation.read_text())
    del content["blocks"]
    evaluation.write_text(json.dumps(content))
    assert "no NLL of single blocks was kept" in _refused(ours, "--against", other)
    evaluation.write_text("[")
    assert "not valid JSON" in _refused(ours, "--against", other)
    shutil.rmtree(other.parent / "report")
    line = _refused(ours, "--against", other)
    assert "the run is not evaluated" in line
    assert "logitfuse eval run" in line


def test_damaged_blocks_are_told_in_one_line(runs: tuple[Path, Path]) -> None:
    ours, other = runs
    (other.parent / "report" / "blocks.parquet").write_bytes(b"PAR1")
    line = _refused(ours, "--against", other)
    assert "blocks.parquet" in line
    assert "rerun `logitfuse eval run`" in line
    (other.parent / "report" / "blocks.parquet").unlink()
    assert "no NLL of single blocks" in _refused(ours, "--against", other)
