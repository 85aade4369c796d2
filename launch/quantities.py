"""Counts, sizes, times, costs and shares as short text."""

from __future__ import annotations

_STEPS = ("", " k", " M", " G", " T", " P")


def count_text(number: float) -> str:
    """A number with three digits, such as "412", "12.3 k", "412 M"."""
    step = 0
    while abs(number) >= 999.5 and step < len(_STEPS) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:#.3g}".rstrip(".") if step else f"{number:.0f}"
    return digits + _STEPS[step]


def size_text(size_bytes: float) -> str:
    """A size, such as "22.3 GB"."""
    text = count_text(size_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def duration_text(seconds: float) -> str:
    """A duration, such as "28 s", "12 min", "2 h 03 min", "4 d 02 h"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def hours_text(hours: float | None) -> str:
    """GPU-hours of an estimate, such as "0.04", "1,234.5"; "?" where they are not known."""
    if hours is None:
        return "?"
    return f"{hours:.2g}" if hours < 0.1 else f"{hours:,.1f}"


def money_text(hours: float | None, rate: float) -> str:
    """The price of GPU-hours at a rate; "?" where they are not known."""
    return "?" if hours is None else f"{hours * rate:,.2f}"


def share_text(probability: float) -> str:
    """A probability, such as "12.3%", "1.23%", "<0.01%"."""
    if probability >= 0.0995:
        return f"{probability:.1%}"
    return f"{probability:.2%}" if probability >= 1e-4 or probability <= 0 else "<0.01%"
