"""What `train.parallel: fsdp2` is made of, without processes: files, empty models, refusals."""

from __future__ import annotations

import errno
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fuse_train.config import LoraSection, TrainSection
from fuse_train.loop import sharded_layout
from fuse_train.machine.launchers import as_launched, check_launcher, check_parallel
from fuse_train.merge.stored_weights import StoredWeights
from fuse_train.model.adapters import add_adapters
from fuse_train.model.empty import empty_model, saved_names, stand_ins, stored_name, stored_rows
from fuse_train.sharding.part_files import (
    PARTS_FOLDER,
    Part,
    PartsRecord,
    StoredParts,
    in_parts,
    part_file,
    row_bounds,
    write_index,
    write_part,
)
from fuse_train.sharding.root import blocks_of, named_places
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, CorruptionError, ModelError, StorageError
from tests.tiny import tiny_model


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_cut_as_torch_cuts_them(count, processes) -> None:
    bounds = row_bounds(count, processes)
    sizes = [part.shape[0] for part in torch.zeros(count, 2).chunk(processes)]
    sizes += [0] * (processes - len(sizes))
    assert [b - a for a, b in pairwise(bounds)] == sizes


WHOLE = {
    "a.weight": torch.arange(21.0).view(7, 3),
    "a.weight/exp_avg": -torch.arange(21.0).view(7, 3),
    "a.weight/step": torch.tensor(5.0),
    "b.bias": torch.arange(2.0).to(torch.bfloat16),
    "counts": torch.tensor([3, 4, 5]),
}


def written(folder, processes: int, alone: tuple[str, ...] = ("a.weight/step", "counts")) -> None:
    """`WHOLE` as so many processes write it; `alone` is not spread."""
    (folder / PARTS_FOLDER).mkdir(parents=True)
    for process in range(processes):
        parts = {}
        for name, tensor in WHOLE.items():
            rows = tensor if tensor.ndim else tensor.reshape(1)
            bounds = row_bounds(len(rows), processes)
            own = rows if name in alone else rows[bounds[process] : bounds[process + 1]]
            parts[name] = Part(own, tuple(tensor.shape), spread=name not in alone)
        tensors = write_part(folder, parts, process, processes)
    record = PartsRecord(num_processes=processes, tensors=tensors, plain={"a.weight/kind": "x"})
    write_index(folder, record)


@pytest.mark.parametrize("processes", [1, 2, 4, 9])
def test_any_rows_are_read_back(tmp_path, processes) -> None:
    assert not in_parts(tmp_path)
    written(tmp_path, processes)
    assert in_parts(tmp_path)
    with StoredParts(tmp_path) as stored:
        for name, tensor in WHOLE.items():
            assert torch.equal(stored.read(name), tensor)
            assert stored.read(name).dtype == tensor.dtype
        for start in range(8):
            for stop in range(start, 8):
                assert torch.equal(
                    stored.read("a.weight", start, stop), WHOLE["a.weight"][start:stop]
                )
        state = stored.state_of("a.weight", 0)
        assert set(state) == {"exp_avg", "step", "kind"}
        assert state["kind"] == "x"
        assert state["exp_avg"].shape == (7, 3)
        assert torch.equal(state["exp_avg"].read(2, 5), WHOLE["a.weight/exp_avg"][2:5])
        assert stored.state_of("b.bias", 1) == {}


def test_a_damaged_part_is_named(tmp_path) -> None:
    written(tmp_path, 2)
    path = tmp_path / PARTS_FOLDER / part_file(1, 2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with StoredParts(tmp_path) as stored, pytest.raises(CorruptionError, match=path.name):
        stored.read("a.weight")
    path.unlink()
    with StoredParts(tmp_path) as stored:
        assert torch.equal(stored.read("a.weight", 0, 4), WHOLE["a.weight"][:4])
        with pytest.raises(CorruptionError, match=path.name):
            stored.read("a.weight", 3, 5)
    (tmp_path / PARTS_FOLDER / "parts.json").unlink()
    with pytest.raises(CorruptionError, match=r"parts\.json"):
        StoredParts(tmp_path)


def test_parts_in_each_others_place_are_named(tmp_path) -> None:
    """Also if their checksums were made anew: rows of another shape would be repeated silently."""
    written(tmp_path, 2)
    one, other = (tmp_path / PARTS_FOLDER / part_file(r, 2) for r in range(2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    for name, rows in (
        ("a.weight", "F32 [3, 3] for F32 [4, 3]"),
        ("counts", "I64 [0] for I64 [3]"),
    ):
        with StoredParts(tmp_path) as stored, pytest.raises(CorruptionError) as raised:
            stored.read(name)
        assert f"{one}: got {name}: {rows}" in raised.value.line()


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free space, then rerun"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "see the same run folder, then rerun"),
    ],
)
def test_a_part_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch, fault, hint) -> None:
    def refuse(*_: object) -> None:
        raise fault

    monkeypatch.setattr(sharded_layout, "init_device_mesh", lambda *_: None)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    layout = sharded_layout.ShardedLayout(accelerator, TrainSection(parallel="fsdp2"))
    target = SimpleNamespace(tensors=lambda: WHOLE, save_config=lambda folder: None)
    layout.save_best(tmp_path / "best-000001", target)
    with StoredParts(tmp_path / "best-000001") as stored:
        assert torch.equal(stored.read("a.weight"), WHOLE["a.weight"])
    monkeypatch.setattr(sharded_layout, "write_part", refuse)
    with pytest.raises(StorageError, match=f"{fault.strerror}; .*{hint}"):
        layout.save_best(tmp_path / "best-000002", target)
    assert [path.name for path in tmp_path.iterdir()] == ["best-000001"]


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "qwen2"])
def test_a_model_without_weights_takes_those_of_its_folder(tmp_path, arch) -> None:
    folder = tiny_model(tmp_path, arch)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    model = empty_model(ModelRef(model=str(folder)), folder, where="target")
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    saved = saved_names(model)
    with StoredWeights(folder, name="target") as stored:
        assert set(saved.values()) == set(stored.tensors)
        for names, places in named_places(model).items():
            name = stored_name(stored, names, saved)
            count = places[0][0].get_parameter(places[0][1]).shape[0]
            shape = expected.get_parameter(names[0]).shape
            rows = [stored_rows(stored, name, a, b, shape) for a, b in ((0, 1), (1, count))]
            for module, own in places:
                setattr(module, own, torch.nn.Parameter(torch.cat(rows)))
        with pytest.raises(ModelError, match="do not fit its config"):
            stored_rows(stored, name, 0, 1, torch.Size([3, 3]))
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_adapters_of_an_empty_model_keep_their_values(tmp_path) -> None:
    folder = tiny_model(tmp_path)
    ref = ModelRef(model=str(folder))
    lora = LoraSection(r=2)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    add_adapters(expected, lora, seed=3)
    model = empty_model(ref, folder, where="target")
    with stand_ins(model):
        add_adapters(model, lora, seed=3)
    for (name, ours), (theirs_name, theirs) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == theirs_name
        assert ours.shape == theirs.shape
        assert ours.requires_grad == theirs.requires_grad
        assert ours.is_meta == (".lora_" not in name)
        if not ours.is_meta:
            assert torch.equal(ours, theirs)


def test_blocks_are_the_decoder_layers(tmp_path) -> None:
    for arch, layers in (("llama", "model.layers"), ("gpt_neox", "gpt_neox.layers")):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / arch, arch))
        assert list(blocks_of(model)) == list(model.get_submodule(layers))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"optim": "adafactor"}, "train.optim"),
        ({"torch_compile": "eager"}, "train.torch_compile"),
        ({"lora": {"four_bit": True}}, "train.lora.four_bit"),
    ],
)
def test_options_that_do_not_go_with_it(options, where) -> None:
    check_parallel(TrainSection.model_validate(options))
    with pytest.raises(ConfigError, match=r"does not go with train\.parallel: fsdp2") as raised:
        check_parallel(TrainSection.model_validate(options | {"parallel": "fsdp2"}))
    assert raised.value.where == where


def test_the_layout_is_no_part_of_what_is_trained() -> None:
    section = TrainSection(parallel="fsdp2")
    assert section.content() == TrainSection().content()
    assert section.control_section().parallel == "fsdp2"


def test_version_2_of_accelerates_config_is_ours(monkeypatch) -> None:
    section = TrainSection()
    assert as_launched(section) is section
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version in ("1", ""):
        monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(ConfigError, match="FSDP version"):
            check_launcher()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launcher()
    assert as_launched(section).parallel == "fsdp2"
    assert as_launched(section) is section  # neither accelerate nor transformers sees it any more


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: expected false, got true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.gradient_checkpointing does the same"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "train.gradient_checkpointing"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision: expected no or bf16, got fp8"),
    ],
)
def test_what_accelerates_config_asks_for_in_vain_is_refused(
    monkeypatch, variable, value, words
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for harmless in ("no", "bf16") if "MIXED" in variable else ("false", ""):
        monkeypatch.setenv(variable, harmless)
        check_launcher()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as raised:
        check_launcher()
    assert words in raised.value.line()
