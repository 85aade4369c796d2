"""Packed rows: the same loss and gradients as one segment a row, or a refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse_train.data.batch import pack, padded_inputs
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from fuse_train.loop.objective import FusionObjective, StepTotals
from fuse_train.model import packing
from fuse_train.model.heads import hidden_states
from fuse_train.model.packing import check_packing
from store_schema.errors import ConfigError
from tests.aligned_factory import make_run
from tests.selector_views import build_selector
from tests.tiny import tiny_model

ARCHITECTURES = ("llama", "gpt_neox", "qwen2", "mistral")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 40))
def test_packs_hold_every_token_once_and_know_where(lengths, max_tokens) -> None:
    inputs = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    rows, packs = pack(inputs, max_tokens)
    laid = padded_inputs(rows)
    for i, ids in enumerate(inputs):
        row, start = int(packs.row_S[i]), int(packs.start_S[i])
        assert laid[row, start : start + len(ids)].tolist() == ids.tolist()
        positions = packs.position_ids_BL[row, start : start + len(ids)]
        assert positions.tolist() == list(range(len(ids)))
    assert sum(map(len, rows)) == sum(lengths)
    assert all(len(row) <= max(max_tokens, *lengths) for row in rows)
    alone = [n for n in lengths if n > max_tokens]
    assert all(len(row) <= max_tokens or len(row) in alone for row in rows)
    for row, ids in enumerate(rows):
        assert packs.position_ids_BL[row, len(ids) :].eq(0).all()


def test_packing_saves_padding() -> None:
    rows, _ = pack([np.ones(n, np.int64) for n in (9, 1, 1, 1, 5, 4, 3)], 9)
    assert sorted(map(len, rows)) == [6, 9, 9] or sum(map(len, rows)) <= 3 * 9
    assert len(rows) == 3


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("packing"))
    return run, open_inputs(run, run.sections["train"])


def loss_and_gradients(model, section, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    objective = FusionObjective(model, build_selector(section, ("code", "prose", "facts")), section)
    loss, _ = objective(batch, StepTotals(100, 100))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_loss_and_gradients_equal_single_ones(tmp_path, opened, arch, attention) -> None:
    run, inputs = opened
    section = run.sections["train"].model_copy(update={"selector": "uniform"})
    options = stream_options(run, section)
    plain = SampleStream(inputs.samples, options, inputs.domains)
    packed = SampleStream(
        inputs.samples, replace(options, pack_tokens=64), inputs.domains, cache=plain.cache
    )
    folder = tiny_model(
        tmp_path / "m", arch, AutoTokenizer.from_pretrained(run.target.model), scale=0.1
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    model = model.to(torch.float64)
    check_packing(model, where="model")
    (one,), (shared,) = plain.step_batches(0), packed.step_batches(0)
    assert len(shared.input_ids_BL) < len(one.input_ids_BL)
    assert torch.equal(one.labels_BT, shared.labels_BT)
    expected, gradients = loss_and_gradients(model, section, one)
    loss, ours = loss_and_gradients(model, section, shared)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_sight_across_segments_would_be_seen(opened) -> None:
    """The same rows without positions that begin again: another loss, so the test above can fail."""
    run, inputs = opened
    section = run.sections["train"].model_copy(update={"selector": "uniform"})
    packed = replace(stream_options(run, section), pack_tokens=64)
    (batch,) = SampleStream(inputs.samples, packed, inputs.domains).step_batches(0)
    model = AutoModelForCausalLM.from_pretrained(run.target.model)
    right, _ = loss_and_gradients(model, section, batch)
    through = torch.arange(batch.input_ids_BL.shape[1]).expand(batch.input_ids_BL.shape)
    wrong = replace(batch, packs=replace(batch.packs, position_ids_BL=through))
    # A hundred times the tolerance above.
    assert abs(loss_and_gradients(model, section, wrong)[0] - right) > 1e-4 * right


class Blind(torch.nn.Module):
    """A body that heeds no positions: each hidden state is the mean of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)

    def forward(self, input_ids, use_cache=False, position_ids=None):
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        hidden = self.embed(input_ids).cumsum(1) / counts

        class Output:
            last_hidden_state = hidden

        return Output()


def test_a_model_that_mixes_segments_is_refused() -> None:
    class Config:
        vocab_size = 64

        def get_text_config(self):
            return self

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.config = Blind(), Config()
            self.device = torch.device("cpu")

    with pytest.raises(ConfigError, match="keep packed segments apart"):
        check_packing(Model(), where="blind")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rounding_to_bfloat16_is_no_leak(tmp_path, monkeypatch, arch) -> None:
    """Weights that are gathered in bfloat16 (`parallel: fsdp2`) are tested in bfloat16."""
    folder = tiny_model(tmp_path, arch)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.bfloat16
    )
    check_packing(model, where="model")

    def leaking(model, ids, positions=None):
        return hidden_states(model, ids)

    monkeypatch.setattr(packing, "hidden_states", leaking)
    with pytest.raises(ConfigError, match="keep packed segments apart"):
        check_packing(model, where="model")


def test_packed_training_is_the_same_training(tmp_path) -> None:
    from fuse_train.run import train_run
    from tests.test_fuse_train_run import weights

    made = [
        make_run(
            tmp_path / name,
            shards={"train": 2, "valid": 1},
            train={"control": False, "max_steps": 3, "pack_tokens": tokens},
        )
        for name, tokens in (("plain", None), ("packed", 80))
    ]
    plain, packed = (train_run(run)[0] for run in made)
    expected = weights(plain.folder)
    for name, tensor in weights(packed.folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4)
    assert plain.record.fingerprint == packed.record.fingerprint
