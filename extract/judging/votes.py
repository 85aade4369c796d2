"""Votes: the scores of several judges for the answers to one prompt become one choice. Pure functions.

Shapes: J judges, A answers to a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from extract.judging.config import Vote

TIE = 1e-9
"""Sums of votes that differ by less are equal: they may have been added up from other roundings."""

SettledBy = Literal["votes", "likelihood", "order"]
Scores = Sequence[float | None]
"""[A] scores of one judge; None where it has none."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A judge's scores over all prompts.

    Args:
        mean: Of those that it gave.
        spread: Their standard deviation; 1 where they are all the same.
        least: The lowest.
    """

    mean: float
    spread: float
    least: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Scale:
        """The scale of some scores; one or more."""
        least, greatest = min(scores), max(scores)
        if least == greatest:  # their mean may lie beside them by a rounding
            return cls(least, 1.0, least)
        mean = math.fsum(scores) / len(scores)
        # Of what is left of them divided by the largest, lest squares of large scores overflow.
        most = max(abs(score - mean) for score in scores)
        squares = math.fsum(((score - mean) / most) ** 2 for score in scores)
        return cls(mean, most * math.sqrt(squares / len(scores)), least)

    def z(self, score: float) -> float:
        """Standard deviations from the mean."""
        return (score - self.mean) / self.spread


def judge_votes(vote: Vote, scores_A: Scores, scale: Scale) -> list[float | None]:
    """What one judge's scores count for.

    A judge that has no score for any of the answers abstains. One answer that it has none for counts as
    its worst: no share of its vote, the last rank, its lowest z.

    Args:
        vote: majority, mean_rank or mean_z.
        scores_A: Of the answers to a prompt.
        scale: Of the judge.

    Returns:
        [A] majority: the share of the judge's one vote, split among those that it scores highest;
        mean_rank: from 1, the best, those that are equal sharing the mean of their ranks; mean_z:
        standard deviations. None for all where the judge abstains.
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
    """What answers have of all judges together, whatever the order of the judges; more is better.

    Args:
        vote: As for `judge_votes`.
        votes_JA: Its results, by judge.

    Returns:
        [A] the mean over the judges that do not abstain, of ranks its negative; 0 where all do.
    """
    sign = -1.0 if vote == "mean_rank" else 1.0
    found = []
    for votes_J in zip(*votes_JA, strict=True):
        known = [float(one) for one in votes_J if one is not None]
        found.append(sign * math.fsum(known) / len(known) if known else 0.0)
    return found


def passing(least_J: Scores, scores_JA: Sequence[Scores]) -> list[int]:
    """Places of the answers that every judge scores at least as high as it asks for.

    Args:
        least_J: `min_score` of the judges; None asks for nothing.
        scores_JA: By judge.
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
    """The best answer, and what decided.

    Args:
        totals_A: From `totals`; answers stand in the order of the run file's sources.
        likelihoods_A: Under the other sources; None where it is not known.
        places: Of the answers to choose from, one or more, in order.

    Returns:
        Place of the best answer. Of those that tie the most likely; of those that tie again, or of
        which no likelihood is known, the first.
    """
    most = max(totals_A[i] for i in places)
    tied = [i for i in places if totals_A[i] >= most - TIE]
    if len(tied) == 1:
        return tied[0], "votes"
    known = [(likelihoods_A[i], i) for i in tied]
    best = max((value for value, _ in known if value is not None), default=None)
    if best is None:
        return tied[0], "order"
    likeliest = [i for value, i in known if value == best]
    return likeliest[0], "likelihood" if len(likeliest) == 1 else "order"
