"""`logitfuse eval interference`: a run's interference, alone or compared with another run's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fuse_eval.config import EvaluateSection
from fuse_eval.findings import CONTROL, FUSED
from fuse_eval.interference.blocks import Blocks, read_blocks
from fuse_eval.interference.documents import (
    DocumentDifferences,
    document_differences,
    interference_record,
)
from fuse_eval.interference.excess import SAME_TEXT, excess_ratio, require_same_documents
from fuse_eval.intervals import DomainUnits, compare, units_by_domain
from fuse_eval.summary import EVALUATION_FILE, REPORT_FOLDER, read_json, report_location
from store_schema.config import RunConfig, load_run
from store_schema.disk.location import Location, open_location
from store_schema.errors import MismatchError, MissingError

EVALUATE_FIRST = "run `logitfuse eval run` on it first"


def run_interference(
    run: RunConfig, *, against: str | None = None, control: str | None = None
) -> dict[str, Any]:
    """Interference from the output of `eval run`, JSON-like; no model is scored.

    Args:
        run: The run.
        against: Run file or folder of another run; None compares with none.
        control: Run file or folder of the run whose control both are compared with: its CLM control,
            or its fused model if it has none. None takes each run's own.

    Returns:
        `split`, `confidence`, `comparisons` and `interference` as in evaluation.json, and with
        another run `other_run`: counts of documents of both and the ratios of their summed excess.

    Raises:
        MissingError: One of the runs is not evaluated, or has no control.
        MismatchError: They were not evaluated on the same text.
    """
    section = run.section("evaluate", EvaluateSection)
    report = report_location(run)
    evaluation = evaluation_of(report)
    level = {"samples": section.bootstrap_samples, "confidence": evaluation["confidence"]}
    shared = None if control is None else _EvaluatedBlocks.read(_report_of(control))
    ours = _EvaluatedBlocks.read(report).with_control(shared)
    here = document_differences(ours.blocks, FUSED, CONTROL)
    content = {
        "name": run.name,
        "split": evaluation["split"],
        "confidence": level["confidence"],
        "comparisons": evaluation["comparisons"]
        if shared is None
        else [compare(_units(ours.blocks), FUSED, CONTROL, seed=run.seed, **level)],
        "interference": interference_record(here, FUSED, CONTROL, level["confidence"]),
    }
    if against is not None:
        theirs = _EvaluatedBlocks.read(_report_of(against)).with_control(shared)
        there = document_differences(theirs.blocks, FUSED, CONTROL)
        require_same_documents(here, there, where=ours.url, other=theirs.url)
        compared = compare_interference(here, there, seed=run.seed, **level)
        content["other_run"] = {"run": against} | compared
    return content


def compare_interference(
    here: DocumentDifferences,
    there: DocumentDifferences,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Counts and ratios of two runs on the same documents.

    Args:
        here: Differences of this run.
        there: Differences of the other run.
        samples: Number of resamples.
        confidence: Level of the tests of both runs and of the intervals.
        seed: Seed of the resampling.
    """
    worse = [run.worse(confidence) for run in (here, there)]
    pairs = {
        "worse_by_point": (here.excess_nats, there.excess_nats),
        "worse": (here.excess_nats * worse[0], there.excess_nats * worse[1]),
    }
    ratios = {
        name: excess_ratio(*pair, here.domains, samples=samples, confidence=confidence, seed=seed)
        for name, pair in pairs.items()
    }
    return {
        "documents": {"total": len(worse[0]), "worse": int(worse[0].sum())},
        "against_documents": {"total": len(worse[1]), "worse": int(worse[1].sum())},
        **{name: asdict(ratio) for name, ratio in ratios.items()},
    }


def evaluation_of(report: Location) -> dict[str, Any]:
    """evaluation.json of a run's folder report/.

    Raises:
        MissingError: There is none, or an older logitfuse wrote it without blocks.
    """
    evaluation = read_json(report, EVALUATION_FILE)
    where = f"{report.url}/{EVALUATION_FILE}"
    if evaluation is None:
        raise MissingError("the run is not evaluated", where=where, hint=EVALUATE_FIRST)
    if "blocks" not in evaluation:
        raise MissingError("no NLL of single blocks was kept", where=where, hint=EVALUATE_FIRST)
    return evaluation


@dataclass(frozen=True, slots=True)
class _EvaluatedBlocks:
    """Blocks of an evaluated run, and the URL of its report folder."""

    url: str
    blocks: Blocks

    @classmethod
    def read(cls, report: Location) -> _EvaluatedBlocks:
        return cls(report.url, read_blocks(report, evaluation_of(report)))

    def with_control(self, shared: _EvaluatedBlocks | None) -> _EvaluatedBlocks:
        """These blocks with the control to compare with: their own, or the shared run's."""
        nats = self.blocks.nats
        if shared is not None:
            _require_same_blocks(self, shared)
            nats = nats | {CONTROL: shared.blocks.nats.get(CONTROL, shared.blocks.nats[FUSED])}
        if CONTROL not in nats:
            raise MissingError(
                "no CLM control was evaluated",
                where=self.url,
                expected="a control to measure interference against",
                hint="name a run that has one with --control, or set train.control: true and run "
                "`logitfuse train run` and `logitfuse eval run`",
            )
        return replace(self, blocks=replace(self.blocks, nats=nats))


def _require_same_blocks(run: _EvaluatedBlocks, control: _EvaluatedBlocks) -> None:
    one, two = run.blocks, control.blocks
    same_text = one.segment_ids == two.segment_ids
    if not (same_text and np.array_equal(one.num_bytes, two.num_bytes)):
        raise MismatchError(
            "the control was not evaluated on the same text as the run",
            where=run.url,
            expected=f"{len(one.num_bytes)} blocks of the same segments and sizes",
            got=f"{len(two.num_bytes)} in {control.url}",
            hint=SAME_TEXT,
        )


def _units(blocks: Blocks) -> dict[str, DomainUnits]:
    sizes = blocks.num_bytes.astype(np.float64)
    return units_by_domain(blocks.nats, sizes, blocks.domains, blocks.document_ids)


def _report_of(named: str) -> Location:
    """Folder report/ of a run, from its run file or its folder."""
    if "://" in named or Path(named).is_dir():
        return open_location(named).child(REPORT_FOLDER)
    return report_location(load_run(named))
