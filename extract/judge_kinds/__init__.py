"""Judges, which score the answers of the sources. JUDGES lists them."""

from extract.judge_kinds.kind import JudgeKind
from store_schema.registry import Registry

JUDGES = Registry(
    "judge",
    JudgeKind,
    {
        "reward_model": "extract.judge_kinds.reward_model:RewardModel",
        "exact_answer": "extract.judge_kinds.exact_answer:ExactAnswer",
        "reference_overlap": "extract.judge_kinds.reference_overlap:ReferenceOverlap",
        "likelihood": "extract.judge_kinds.likelihood:Likelihood",
        "python": "extract.judge_kinds.python:Python",
    },
)
