"""Where a run keeps its plan."""

from __future__ import annotations

from pathlib import Path

from store_schema.config import RunConfig
from store_schema.disk.location import Location, open_location
from store_schema.plan.plan import Plan


def plan_location(folder: str | Path) -> Location:
    """The folder of the plan, whether it exists or not, of a run with this `data_folder`."""
    return open_location(folder).child("plan")


def open_plan(run: RunConfig) -> Plan:
    """A run's plan.

    Raises:
        MissingError: There is none (yet).
        CorruptionError: plan.json is damaged.
    """
    return Plan.open(plan_location(run.data_folder))
