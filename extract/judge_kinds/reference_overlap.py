"""Judge reference_overlap."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from extract.judge_kinds.kind import JudgeContext, JudgeKind, JudgeOptions, Score, TextJudge
from store_schema.errors import ConfigError

_PACKAGES = {"chrf": "sacrebleu", "bleu": "sacrebleu", "rouge_l": "rouge-score"}


class ReferenceOverlapOptions(JudgeOptions):
    """Judge reference_overlap."""

    metric: Literal["chrf", "bleu", "rouge_l"] = "chrf"
    """chrf, bleu: of sacrebleu; rouge_l: F-measure of rouge-score. chrF compares characters, so it
    works in any language and for code; rouge-score ignores everything but the letters a to z and
    digits."""


class ReferenceOverlap(JudgeKind):
    """Overlap of an answer with the reference: chrF, BLEU or ROUGE-L."""

    section = ReferenceOverlapOptions

    def identity(self, options: Any, context: JudgeContext) -> Any:
        """The version of the package."""
        package = _PACKAGES[options.metric]
        try:
            return version(package)
        except PackageNotFoundError as error:
            raise ConfigError(
                f"`metric: {options.metric}` needs the package {package}",
                where="judge.judges",
                hint="pip install 'logitfuse[judge]'",
            ) from error

    def open(self, options: Any, context: JudgeContext) -> TextJudge:
        """As `JudgeKind.open` says."""
        overlap = _overlap(options.metric)
        return TextJudge(lambda answer: Score(overlap(answer.text, answer.question.reference)))


def _overlap(metric: str) -> Callable[[str, str], float]:
    """The metric as a function of answer and reference; 0 for no overlap."""
    if metric == "rouge_l":
        scorer = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
        return lambda text, reference: float(scorer.score(reference, text)["rougeL"].fmeasure)
    metrics = import_module("sacrebleu.metrics")
    # Short texts have no 4-grams: effective order.
    scorer = metrics.CHRF() if metric == "chrf" else metrics.BLEU(effective_order=True)
    return lambda text, reference: float(scorer.sentence_score(text, [reference]).score)
