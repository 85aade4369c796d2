"""A short run of the fuzzer on every change; the long one is `benchmarks/fuzz_store.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz_store

INPUTS = 4000


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_records_and_data_are_refused_or_sound(tmp_path: Path, seed: int) -> None:
    figures = fuzz_store.fuzz(tmp_path, INPUTS, seed, data_share=20)
    assert figures["refused"] + figures["read"] == INPUTS
    assert set(figures["refused_by_kind"]) == {"manifest", "commit", "plan", "data"}
    # Some changes leave a record sound (a name, a figure): else the fields were never reached.
    assert all(figures["read_by_kind"].get(kind, 0) > 0 for kind in ("manifest", "commit", "plan"))


def test_the_fuzzer_lets_other_errors_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(fuzz_store, "unseal", broken)
    with pytest.raises(KeyError) as caught:
        fuzz_store.fuzz(tmp_path, 10, 0)
    assert "of seed 0" in caught.value.__notes__[0]
