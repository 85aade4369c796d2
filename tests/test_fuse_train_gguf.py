"""A target that is a GGUF file, as training sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuse_train.model.identity import identity
from fuse_train.model.models import load_model, own_dtype
from store_schema.config import ModelRef
from store_schema.fingerprint import model_fingerprint
from store_schema.model.models import resolve_model, with_folder
from tests.tiny import tiny_model
from tests.tiny_gguf import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


def test_a_gguf_target_loads_is_distinguished_and_goes_on_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITFUSE_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "llama", "llama")
    write_gguf(folder, tmp_path / "m.gguf")
    ref = ModelRef(model=str(tmp_path), gguf_file="m.gguf")
    model = load_model(ref, where="target")
    assert own_dtype(ref) == torch.bfloat16
    assert identity(ref)["fingerprint"] == model_fingerprint(resolve_model(ref))
    (tmp_path / "step").mkdir()
    model.save_pretrained(tmp_path / "step")
    again = load_model(with_folder(ref, tmp_path / "step"), where="checkpoint")
    for name, values in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], values), name
