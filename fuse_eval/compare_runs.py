"""`logitfuse eval interference`: a run's interference, alone or beside another run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuse_eval.blocks import read_blocks
from fuse_eval.config import EvaluateSection
from fuse_eval.excess import excess_ratio, require_same_documents
from fuse_eval.findings import CONTROL, FUSED
from fuse_eval.interference import DocumentDifferences, document_differences
from fuse_eval.summary import EVALUATION_FILE, REPORT_FOLDER, read_json, report_location
from store_schema.config import RunConfig, load_run
from store_schema.errors import MissingError
from store_schema.location import Location, open_location

EVALUATE_FIRST = "run `logitfuse eval run` on it first"


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """An evaluation that has a control.

    Args:
        report: The run's folder report/.
        evaluation: Content of its evaluation.json.
    """

    report: Location
    evaluation: Mapping[str, Any]

    def differences(self) -> DocumentDifferences:
        """Fused against control by document."""
        return document_differences(read_blocks(self.report, self.evaluation), FUSED, CONTROL)


def run_interference(run: RunConfig, against: str | None) -> dict[str, Any]:
    """What `eval run` found of interference, JSON-like.

    Args:
        run: The run.
        against: Run file or folder of another run; None compares with none.

    Returns:
        `split`, `confidence`, `comparisons` and `interference` of evaluation.json, and with another
        run `other_run`: counts of documents of both and the ratios of their summed excess.

    Raises:
        MissingError: One of the runs is not evaluated, or has no control.
        MismatchError: The other was not evaluated on the same text.
    """
    ours = evaluated_run(report_location(run))
    kept = ("split", "confidence", "comparisons", "interference")
    content = {"name": run.name} | {key: ours.evaluation[key] for key in kept}
    if against is not None:
        theirs = evaluated_run(_other_report(against))
        section = run.section("evaluate", EvaluateSection)
        content["other_run"] = {"run": against} | compare_interference(
            ours, theirs, section, confidence=content["confidence"], seed=run.seed
        )
    return content


def compare_interference(
    ours: EvaluatedRun,
    theirs: EvaluatedRun,
    section: EvaluateSection,
    *,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Counts and ratios of two runs, each against its own control.

    Args:
        ours: This run.
        theirs: The other.
        section: Number of resamples.
        confidence: Of the tests of both runs and of the intervals.
        seed: Of the resampling.
    """
    here, there = ours.differences(), theirs.differences()
    require_same_documents(here, there, where=ours.report.url, other=theirs.report.url)
    worse = [found.worse(confidence) for found in (here, there)]
    pairs = {
        "worse_by_point": (here.excess_nats, there.excess_nats),
        "worse": (here.excess_nats * worse[0], there.excess_nats * worse[1]),
    }
    return {
        "documents": {"total": len(worse[0]), "worse": int(worse[0].sum())},
        "against_documents": {"total": len(worse[1]), "worse": int(worse[1].sum())},
        **{
            name: asdict(
                excess_ratio(
                    *pair,
                    here.domains,
                    samples=section.bootstrap_samples,
                    confidence=confidence,
                    seed=seed,
                )
            )
            for name, pair in pairs.items()
        },
    }


def evaluated_run(report: Location) -> EvaluatedRun:
    """The evaluation in a run's folder report/.

    Raises:
        MissingError: There is none, or it has no control to measure interference against.
    """
    evaluation = read_json(report, EVALUATION_FILE)
    where = f"{report.url}/{EVALUATION_FILE}"
    if evaluation is None:
        raise MissingError("the run is not evaluated", where=where, hint=EVALUATE_FIRST)
    if "blocks" not in evaluation:
        raise MissingError(
            "the evaluation holds no interference by document", where=where, hint=EVALUATE_FIRST
        )
    if "interference" not in evaluation:
        raise MissingError(
            "no CLM control was evaluated",
            where=where,
            expected="a control to measure interference against",
            hint="set train.control: true, then run `logitfuse train run` and `logitfuse eval run`",
        )
    return EvaluatedRun(report, evaluation)


def _other_report(against: str) -> Location:
    """Folder report/ of a run given by its run file or its folder."""
    if "://" in against or Path(against).is_dir():
        return open_location(against).child(REPORT_FOLDER)
    return report_location(load_run(against))
