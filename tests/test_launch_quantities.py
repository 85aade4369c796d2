"""Numbers as people read them."""

from __future__ import annotations

import pytest

from launch.quantities import count_text, duration_text, size_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (9_994, "9.99 k"),
        (12_345, "12.3 k"),
        (412_345_678, "412 M"),
        (999_600, "1.00 M"),
        (9_996, "10.0 k"),
        (2.5e17, "250 P"),
    ],
)
def test_counts(number: float, text: str) -> None:
    assert count_text(number) == text


def test_sizes() -> None:
    assert size_text(0) == "0 B"
    assert size_text(512) == "512 B"
    assert size_text(22.3e9) == "22.3 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (3_540, "59 min"),
        (3_599, "1 h 00 min"),
        (7_380, "2 h 03 min"),
        (48 * 3600, "2 d 00 h"),
        (98.4 * 3600, "4 d 02 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
