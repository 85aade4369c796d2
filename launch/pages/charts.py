"""Charts as inline SVG strings: axes, labels, units and a <title> on every mark.

Each chart is one narrow panel (WIDTH units across), so that it is as legible on a phone as on a
wide screen: the page lays panels side by side where there is room. Colours are CSS classes (c0, c1,
...) that the page defines for light and dark; text has the page's colour. Names come from users, so
everything goes through Markup.format, which escapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 340
_TOP = 8
_ROW = 22
_CHARACTER = 6.9
"""Average width of a character at the page's 11.5-unit chart font, on the wide side."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of `bar_chart`: a label, a value and its colour class."""

    label: str
    value: float
    colour: str
    shown: str


@dataclass(frozen=True, slots=True)
class Range:
    """One row of `interval_chart`: a value with its interval, as shares (0.01 is 1 %)."""

    label: str
    value: float
    low: float
    high: float
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One series of `line_chart`."""

    label: str
    colour: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """One row of `stack_chart`: parts that add up to 1, in the legend's order."""

    label: str
    parts: tuple[float, ...]


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, without exponent from 1e-4 to 1e7."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def share_of(share: float, digits: int = 1) -> str:
    """A share as per cent, with a narrow space, such as "12.3 %"."""
    return f"{share * 100:.{digits}f}\u202f%"


def percent(share: float, digits: int = 1) -> str:
    """A signed change in per cent with a true minus and a narrow space."""
    text = f"{share * 100:+.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−") + "\u202f%"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values across [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _shown_tick(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return f"{value:,.{digits}f}".replace("-", "−")


def _axis_labels(values: Sequence[float]) -> list[str]:
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return [_shown_tick(value, step) for value in values]


def _axis_marks(low: float, high: float, length: float) -> list[tuple[float, str]]:
    """Ticks of an axis with their labels, as many as stand side by side in its length."""
    marks: list[float] = []
    labels: list[str] = []
    for count in (4, 3, 2, 1):
        marks = ticks(low, high, count)
        labels = _axis_labels(marks)
        step = marks[1] - marks[0] if len(marks) > 1 else high - low
        if _CHARACTER * (1 + max(map(len, labels), default=0)) * (high - low) <= length * step:
            break
    return list(zip(marks, labels, strict=True))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _label_width(labels: Sequence[str], limit: int = 16) -> float:
    return 10 + _CHARACTER * max((len(_cut(label, limit)) for label in labels), default=0)


def svg_chart(height: float, name: str, parts: Sequence[Markup]) -> Markup:
    """An SVG element with these parts; `name` is for screen readers."""
    return Markup(
        '<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{name}">{body}</svg>'
    ).format(width=WIDTH, height=height, name=name, body=Markup("").join(parts))


def svg_text(x: float, y: float, text: str, anchor: str = "start", css: str = "") -> Markup:
    """SVG text at a position; `css` is its class."""
    return Markup('<text x="{x:.1f}" y="{y:.1f}" text-anchor="{a}" class="{c}">{t}</text>').format(
        x=x, y=y, a=anchor, c=css, t=text
    )


def svg_rule(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """SVG line between two points."""
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(
        x1, y1, x2, y2, css
    )


def row_label(label: str, x: float, y: float) -> Markup:
    """A row's name, cut to fit, and whole in the tooltip."""
    return Markup("<g><title>{}</title>{}</g>").format(
        label, svg_text(x, y, _cut(label, 16), "end")
    )


def bar_chart(name: str, rows: Sequence[Bar], *, unit: str, top: float | None = None) -> Markup:
    """Horizontal bars from zero, each with its value at its end.

    Args:
        name: What is shown, for screen readers.
        rows: From top to bottom.
        unit: Unit of the values, under the axis.
        top: End of the axis; None takes the largest value. Panels to be compared share it.
    """
    left = _label_width([row.label for row in rows])
    room = WIDTH - left - 52
    top = max(top or max((row.value for row in rows), default=1.0), 1e-12)
    bottom = _TOP + _ROW * len(rows)
    parts = []
    for value, shown in _axis_marks(0, top, room):
        x = left + room * value / top
        parts += [
            svg_rule(x, _TOP, x, bottom, "grid"),
            svg_text(x, bottom + 14, shown, "middle", "tick"),
        ]
    for i, row in enumerate(rows):
        y = _TOP + _ROW * i
        width = room * max(row.value, 0) / top
        parts.append(
            Markup(
                '<g>{label}<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="14" rx="2" '
                'class="fill {c}"><title>{title}</title></rect>{shown}</g>'
            ).format(
                label=row_label(row.label, left - 6, y + 15),
                x=left,
                y=y + 4,
                w=width,
                c=row.colour,
                title=f"{row.label}: {row.shown} {unit}",
                shown=svg_text(left + width + 5, y + 15, row.shown, css="value"),
            )
        )
    parts += [
        svg_rule(left, _TOP, left, bottom, "axis"),
        svg_text(left + room / 2, bottom + 29, unit, "middle", "unit"),
    ]
    return svg_chart(bottom + 34, name, parts)


def interval_chart(name: str, rows: Sequence[Range], *, unit: str, good: str, bad: str) -> Markup:
    """Dots with whiskers around a zero line; left of it is better.

    Args:
        name: What is shown, for screen readers.
        rows: From top to bottom; `strong` ones have larger dots.
        unit: Unit of the axis, written under it.
        good: Written left of zero.
        bad: Written right of zero.
    """
    left = _label_width([row.label for row in rows])
    room = WIDTH - left - 16
    low = min([0.0, *(row.low for row in rows)]) * 100
    high = max([0.0, *(row.high for row in rows)]) * 100
    pad = max((high - low) * 0.12, 0.2)
    low, high = low - pad, high + pad

    def place(share_percent: float) -> float:
        return left + room * (share_percent - low) / (high - low)

    head = _TOP + 14
    bottom = head + (_ROW + 4) * len(rows)
    parts = []
    for value, shown in _axis_marks(low, high, room):
        x = place(value)
        parts += [
            svg_rule(x, head, x, bottom, "grid"),
            svg_text(x, bottom + 14, shown, "middle", "tick"),
        ]
    zero = place(0)
    parts.append(svg_rule(zero, _TOP, zero, bottom, "axis"))
    if zero - left > len(good) * _CHARACTER:
        parts.append(svg_text(zero - 6, _TOP + 8, good, "end", "unit"))
    if left + room - zero > len(bad) * _CHARACTER:
        parts.append(svg_text(zero + 6, _TOP + 8, bad, "start", "unit"))
    for i, row in enumerate(rows):
        y = head + (_ROW + 4) * i + 12
        colour = "c1" if row.low > 0 else "c0" if row.high < 0 else "cmuted"
        shown = f"{percent(row.value, 2)} [{percent(row.low, 2)}, {percent(row.high, 2)}]"
        parts.append(
            Markup(
                "<g><title>{title}</title>{label}{whisker}"
                '<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" class="fill {c}"/></g>'
            ).format(
                title=f"{row.label}: {shown}",
                label=row_label(row.label, left - 6, y + 4),
                whisker=svg_rule(
                    place(row.low * 100), y, place(row.high * 100), y, f"stroke whisker {colour}"
                ),
                x=place(row.value * 100),
                y=y,
                r=6 if row.strong else 4.5,
                c=colour,
            )
        )
    parts.append(svg_text(left + room / 2, bottom + 29, unit, "middle", "unit"))
    return svg_chart(bottom + 34, name, parts)


def thinned(
    points: Sequence[tuple[float, float]], limit: int = 65
) -> tuple[tuple[float, float], ...]:
    """At most `limit` points: means of equally many consecutive points, without infinite values."""
    clean = [(x, y) for x, y in points if math.isfinite(y)]
    size = max(1, math.ceil(len(clean) / limit))
    runs = [clean[i : i + size] for i in range(0, len(clean), size)]
    return tuple(
        (sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs
    )


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_unit: str,
    y_unit: str,
    span: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common axis, with a legend on top.

    Args:
        name: What is shown, for screen readers.
        lines: Series; empty ones are left out.
        x_unit: Written under the horizontal axis.
        y_unit: Written over the vertical axis.
        span: Ends of the vertical axis; None fits the values.
    """
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points] or [0.0]
    ys = [y for line in lines for _, y in line.points] or [0.0]
    if span is None:
        pad = (max(ys) - min(ys)) * 0.06 or abs(ys[0]) * 0.1 or 1.0
        span = (min(ys) - pad, max(ys) + pad)
    legend, head = _legend([(line.label, line.colour) for line in lines], "stroke")
    head += 22
    left, right, height = 46.0, WIDTH - 12.0, 150.0
    bottom = head + height
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * (x - x_low) / (x_high - x_low)
        return across, bottom - height * (y - span[0]) / (span[1] - span[0])

    parts = [legend, svg_text(4, head - 11, y_unit, css="unit")]
    marks = ticks(*span)
    for value, shown in zip(marks, _axis_labels(marks), strict=True):
        y = place(x_low, value)[1]
        parts += [
            svg_rule(left, y, right, y, "grid"),
            svg_text(left - 5, y + 4, shown, "end", "tick"),
        ]
    marks = ticks(x_low, x_high, 5)
    for value, shown in zip(marks, _axis_labels(marks), strict=True):
        parts.append(svg_text(place(value, span[0])[0], bottom + 14, shown, "middle", "tick"))
    parts.append(svg_rule(left, bottom, right, bottom, "axis"))
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        first, last = line.points[0][1], line.points[-1][1]
        title = f"{line.label}: from {significant(first, 4)} to {significant(last, 4)} {y_unit}"
        parts.append(
            Markup(
                '<g><title>{}</title><polyline points="{}" class="stroke line {}"/>'
                '<circle cx="{:.1f}" cy="{:.1f}" r="3" class="fill {}"/></g>'
            ).format(title, path, line.colour, *placed[-1], line.colour)
        )
    parts.append(svg_text((left + right) / 2, bottom + 29, x_unit, "middle", "unit"))
    return svg_chart(bottom + 34, name, parts)


def stack_chart(
    name: str, rows: Sequence[Stack], parts_shown: Sequence[tuple[str, str]], *, unit: str
) -> Markup:
    """Horizontal bars cut into shares of 1.

    Args:
        name: What is shown, for screen readers.
        rows: From top to bottom.
        parts_shown: Label and colour class of each part, in order.
        unit: Under the axis.
    """
    legend, head = _legend(parts_shown, "fill")
    left = _label_width([row.label for row in rows])
    room = WIDTH - left - 18
    bottom = head + 6 + _ROW * len(rows)
    body = [legend]
    for i, row in enumerate(rows):
        y, x = head + 6 + _ROW * i, left
        body.append(row_label(row.label, left - 6, y + 15))
        for share, (label, colour) in zip(row.parts, parts_shown, strict=True):
            width = room * share
            body.append(
                Markup(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" class="fill part {}">'
                    "<title>{}</title></rect>"
                ).format(
                    x, y + 4, max(width, 0), colour, f"{row.label}, {label}: {share_of(share)}"
                )
            )
            x += width
    for value in (0, 25, 50, 75, 100):
        place = left + room * value / 100
        body.append(svg_text(place, bottom + 14, str(value), "middle", "tick"))
    body.append(svg_text(left + room / 2, bottom + 29, unit, "middle", "unit"))
    return svg_chart(bottom + 34, name, body)


def _legend(items: Sequence[tuple[str, str]], kind: str) -> tuple[Markup, float]:
    """Swatches and names in as many lines as needed, and the y at which they end."""
    parts, x, y = [], 4.0, 12.0
    for label, colour in items:
        shown = _cut(label, 32)
        width = 26 + _CHARACTER * len(shown)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + 16
        swatch = (
            Markup('<rect x="{:.1f}" y="{:.1f}" width="12" height="10" rx="2" class="fill {}"/>')
            if kind == "fill"
            else Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="12" height="3" rx="1.5" class="fill {}"/>'
            )
        )
        offset = 9 if kind == "fill" else 5.5
        parts += [swatch.format(x, y - offset, colour), svg_text(x + 17, y, shown)]
        x += width
    return Markup("").join(parts), y + 6
