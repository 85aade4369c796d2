"""Each constraint of the evaluate section broken once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fuse_eval.config import EvaluateSection


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split", ""),
        ("sources", "perhaps"),
        ("pool_selectors", ["asn", "asn"]),
        ("pool_selectors", ["best"]),
        ("bootstrap_samples", 199),
        ("bootstrap_samples", 100_001),
        ("bootstrap_unit", "token"),
        ("confidence", 0.5),
        ("confidence", 1),
        ("batch_tokens", 0),
        ("device", 3),
        ("unknown", 1),
    ],
)
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        EvaluateSection.model_validate({key: value})


def test_speed_does_not_change_the_content() -> None:
    assert EvaluateSection(batch_tokens=1, device="cpu").content() == EvaluateSection().content()
