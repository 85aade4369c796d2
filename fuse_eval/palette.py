"""The CSS colour class of each model, the same in every chart."""

from __future__ import annotations

from collections.abc import Iterable

from fuse_eval.findings import BEFORE, CONTROL, FUSED

_SOURCE_COLOURS = ("c2", "c3", "c4", "c5", "c6", "c7")


def colours_of(sources: Iterable[str]) -> dict[str, str]:
    """Colour class by model; with more sources than colours, some share one."""
    colours = {FUSED: "c0", CONTROL: "c1", BEFORE: "cmuted"}
    for i, source in enumerate(sources):
        colours[source] = _SOURCE_COLOURS[i % len(_SOURCE_COLOURS)]
    return colours
