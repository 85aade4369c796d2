"""Where a run keeps its plan."""

from __future__ import annotations

from store_schema.config import RunConfig
from store_schema.disk.location import Location, open_location
from store_schema.plan.plan import Plan


def plan_location(run: RunConfig) -> Location:
    """The folder of a run's plan, whether it exists or not."""
    return open_location(run.data_folder).child("plan")


def open_plan(run: RunConfig) -> Plan:
    """A run's plan.

    Raises:
        MissingError: There is none (yet).
        CorruptionError: plan.json is damaged.
    """
    return Plan.open(plan_location(run))
