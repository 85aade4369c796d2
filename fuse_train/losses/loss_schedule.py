"""Weights of the loss as functions of progress in the run: nothing to save or to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fuse_train.config import TrainSection
from fuse_train.divergences.divergence import Divergence
from fuse_train.loss_config import ScheduleSection


@dataclass(frozen=True, slots=True)
class StepWeights:
    """The scheduled numbers at one step.

    Args:
        clm_weight: lambda.
        feedback_weight: alpha.
        threshold: tau of a selector that learns; None leaves it as it is.
        divergence: The divergence with its temperature and TAID's share.
    """

    clm_weight: float
    feedback_weight: float
    threshold: float | None
    divergence: Divergence


def weights_at(section: TrainSection, progress: float) -> StepWeights:
    """The weights at a point of the run, from 0 at the first step to 1 at the last."""
    loss = section.loss
    threshold = None
    if loss.threshold_schedule is not None and section.learned is not None:
        threshold = scheduled(section.learned.threshold, loss.threshold_schedule, progress)
    share = loss.source_share
    if share is not None:
        share = scheduled(share, loss.source_share_schedule, progress)
    return StepWeights(
        scheduled(section.clm_weight, loss.clm_weight_schedule, progress),
        scheduled(section.feedback_weight, loss.feedback_schedule, progress),
        threshold,
        Divergence(loss.divergence, loss.options, loss.target_temperature, share),
    )


def scheduled(start: float, schedule: ScheduleSection | None, progress: float) -> float:
    """The value of a scheduled number at a point of the run.

    Args:
        start: Value at the beginning: the field that the schedule belongs to.
        schedule: None keeps `start`.
        progress: From 0 to 1.

    constant keeps it, linear and cosine go to `end`, hard_and_decay goes linearly to 1 (as lambda does
    in FuseLLM's public code, so that the fusion loss fades out).
    """
    if schedule is None or schedule.kind == "constant":
        return start
    if schedule.kind == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    end = 1.0 if schedule.end is None else schedule.end
    return start + (end - start) * progress
