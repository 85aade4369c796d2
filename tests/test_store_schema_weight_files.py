from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from store_schema.errors import ModelError
from store_schema.model.weight_files import require_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def folder_of(place: Path, *names: str) -> Path:
    (place / "config.json").write_text("{}")
    for name in names:
        save_file({name: torch.ones(3, 5)}, place / name, {"format": "pt"})
    return place


def test_whole_folders_pass(tmp_path: Path) -> None:
    require_weights(folder_of(tmp_path, "model.safetensors"))
    (tmp_path / "empty.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    require_weights(tmp_path)


def test_shards_with_their_index_pass(tmp_path: Path) -> None:
    folder_of(tmp_path, "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
    index = {"weight_map": {"x": "a-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    require_weights(tmp_path)


def _adapter(place: Path) -> None:
    (place / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


def _pointer(place: Path) -> None:
    (place / "pytorch_model.bin").write_text(POINTER)


def _no_weights(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "training_args.bin").write_bytes(b"PK")


def _missing_shard(place: Path) -> None:
    index = {"weight_map": {"x": "model.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_nothing(place: Path) -> None:
    (place / "model.safetensors.index.json").write_text("[]")


def _pointer_for_index(place: Path) -> None:
    (place / "model.safetensors.index.json").write_text(POINTER)


def _in_parts(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "parts").mkdir()


def _pointer_for_config(place: Path) -> None:
    (place / "config.json").write_text(POINTER)


def _pointer_for_generation_config(place: Path) -> None:
    (place / "generation_config.json").write_text(POINTER)


def _cut_short(place: Path) -> None:
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _empty_file(place: Path) -> None:
    (place / "model.safetensors").write_bytes(b"")


def _other_bytes(place: Path) -> None:
    (place / "model.safetensors").write_bytes(b"<!doctype html><p>Too many requests</p>")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_adapter, "adapter, not a model"),
        (_pointer, "pointer of git-lfs"),
        (_no_weights, "no weights.*git lfs pull"),
        (_in_parts, "no weights.*parts/.*give `final/`"),
        (_missing_shard, "1 of 2 files of weights are missing.*model-00002-of-00002"),
        (_index_of_nothing, "index of weights is unreadable"),
        (_pointer_for_index, "pointer of git-lfs"),
        (_pointer_for_config, "pointer of git-lfs.*/config.json"),
        (_pointer_for_generation_config, "pointer of git-lfs.*/generation_config.json"),
        (_cut_short, "cut short.*expected [0-9]+ bytes"),
        (_empty_file, "cut short"),
        (_other_bytes, "cut short"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    tmp_path: Path, break_it: Callable[[Path], None], said: str
) -> None:
    folder_of(tmp_path, "model.safetensors")
    break_it(tmp_path)
    with pytest.raises(ModelError, match=said):
        require_weights(tmp_path)
