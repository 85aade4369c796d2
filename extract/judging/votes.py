"""Choose the best answer to a prompt from the scores of several judges. Pure functions.

Shapes: J judges, A answers to a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from extract.judging.config import Vote

TIE = 1e-9
"""Totals that differ by less count as equal, because of rounding."""

SettledBy = Literal["votes", "likelihood", "order"]
Scores = Sequence[float | None]
"""[A] scores of one judge; None where it has none."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A judge's scores over all prompts.

    Args:
        mean: Mean of its scores.
        spread: Their standard deviation; 1 if they are all the same.
        least: The lowest score.
    """

    mean: float
    spread: float
    least: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Scale:
        """The scale of one or more scores."""
        least, greatest = min(scores), max(scores)
        if least == greatest:  # the computed mean may differ by rounding
            return cls(least, 1.0, least)
        mean = math.fsum(scores) / len(scores)
        # Deviations are divided by the largest, so that squares of large scores do not overflow.
        most = max(abs(score - mean) for score in scores)
        squares = math.fsum(((score - mean) / most) ** 2 for score in scores)
        return cls(mean, most * math.sqrt(squares / len(scores)), least)

    def z(self, score: float) -> float:
        """Standard deviations from the mean."""
        return (score - self.mean) / self.spread


def judge_votes(vote: Vote, scores_A: Scores, scale: Scale) -> list[float | None]:
    """One judge's votes for the answers to a prompt.

    A judge without a score for any answer abstains. An answer without a score counts as the judge's
    worst: no share of its vote, the last rank, its lowest z.

    Args:
        vote: majority, mean_rank or mean_z.
        scores_A: The judge's scores of the answers.
        scale: The judge's scale.

    Returns:
        [A] majority: shares of one vote, divided equally among the answers with the highest score;
        mean_rank: ranks from 1 (the best), equal scores have the mean of their ranks; mean_z: standard
        deviations from the mean. None for all if the judge abstains.
    """
    known = [score for score in scores_A if score is not None]
    if not known:
        return [None] * len(scores_A)
    if vote == "mean_z":
        return [scale.z(scale.least if score is None else score) for score in scores_A]
    floored = [-math.inf if score is None else score for score in scores_A]
    if vote == "majority":
        best = max(known)
        share = 1.0 / floored.count(best)
        return [share * (score == best) for score in floored]
    return [
        sum(other > score for other in floored) + (floored.count(score) + 1) / 2
        for score in floored
    ]


def totals(vote: Vote, votes_JA: Sequence[Scores]) -> list[float]:
    """The total of each answer over all judges, independent of their order; higher is better.

    Args:
        vote: See `judge_votes`.
        votes_JA: Results of `judge_votes`, by judge.

    Returns:
        [A] mean over the judges that do not abstain (of ranks its negative); 0 if all abstain.
    """
    sign = -1.0 if vote == "mean_rank" else 1.0
    totals_A = []
    for votes_J in zip(*votes_JA, strict=True):
        known = [float(one) for one in votes_J if one is not None]
        totals_A.append(sign * math.fsum(known) / len(known) if known else 0.0)
    return totals_A


def passing(least_J: Scores, scores_JA: Sequence[Scores]) -> list[int]:
    """Indices of the answers that have at least every judge's `min_score`.

    Args:
        least_J: `min_score` of the judges; None for no limit.
        scores_JA: Scores by judge.
    """
    return [
        place
        for place, scores_J in enumerate(zip(*scores_JA, strict=True))
        if all(
            least is None or (score is not None and score >= least)
            for least, score in zip(least_J, scores_J, strict=True)
        )
    ]


def settle(
    totals_A: Sequence[float], likelihoods_A: Scores, places: Sequence[int]
) -> tuple[int, SettledBy]:
    """Choose the best answer.

    Args:
        totals_A: From `totals`; answers are in the order of the run file's sources.
        likelihoods_A: Log-probabilities under the other sources; None where not known.
        places: Indices of the answers to choose from, one or more, in order.

    Returns:
        Index of the answer with the highest total, and what decided. Of several such answers it is the
        most likely; of equally likely ones, or if one's likelihood is not known, the first.
    """
    most = max(totals_A[i] for i in places)
    tied = [i for i in places if totals_A[i] >= most - TIE]
    if len(tied) == 1:
        return tied[0], "votes"
    known = [(value, i) for i in tied if (value := likelihoods_A[i]) is not None]
    if len(known) < len(tied):
        return tied[0], "order"
    best = max(value for value, _ in known)
    likeliest = [i for value, i in known if value == best]
    return likeliest[0], "likelihood" if len(likeliest) == 1 else "order"
