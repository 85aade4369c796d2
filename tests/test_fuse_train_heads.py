"""Hidden states and head equal a model's own logits, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fuse_train.losses.losses import head_loss
from fuse_train.model.heads import check_head, head_of, hidden_states
from store_schema.errors import ModelError

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.5,
    "pad_token_id": None,
}


def test_softcap_and_scales_are_followed() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0))
    assert head_of(capped, where="test").softcap == 2.0
    check_head(capped, where="test")
    scaled = CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))
    assert head_of(scaled, where="test").scale == 0.25
    check_head(scaled, where="test")
    divided = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0))
    assert head_of(divided, where="test").scale == 0.125
    check_head(divided, where="test")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_habit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=30.0)).to(dtype)
    check_head(capped, where="test")
    divided = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=6.0)).to(dtype)
    check_head(divided, where="test")
    plain = divided.forward

    def other(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.2
        return output

    divided.forward = other
    with pytest.raises(ModelError, match="not supported"):
        check_head(divided, where="test")


def test_tied_head() -> None:
    tied = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert head_of(tied, where="test").weight_VH is tied.get_input_embeddings().weight
    check_head(tied, where="test")


def test_unknown_habit_is_refused() -> None:
    class Doubling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(ModelError, match="not supported"):
        check_head(Doubling(LlamaConfig(**SHAPE)), where="test")


def test_weights_that_are_not_finite_are_said_to_be_so() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(
        ModelError, match=r"not finite.*NaN.*in 1 of its weights: model\.norm\.weight"
    ):
        check_head(model, where="test")
    with torch.no_grad():  # finite, and too large to multiply
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.fill_(1e38)
    with pytest.raises(ModelError, match=r"not finite.*though all its weights are finite"):
        check_head(model, where="test")


def test_model_without_linear_head_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ModelError, match="no linear head"):
        check_head(model, where="test")


def lora(model, **options):
    """The model with adapters that are not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_heard_and_get_the_models_own_gradients(tied) -> None:
    model = lora(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))).double()
    check_head(model, where="test")
    ids = torch.randint(50, (2, 9))
    hidden = hidden_states(model, ids[:, :-1]).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    head = head_of(model, where="test")
    assert not head.weight_VH.requires_grad
    ours = head_loss(hidden, head, labels, torch.ones(len(labels))).total
    plain = torch.nn.functional.cross_entropy(
        model(input_ids=ids[:, :-1]).logits.flatten(0, 1), labels, reduction="sum"
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    for got, want in zip(
        torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_head_that_is_trained_whole_beside_adapters() -> None:
    model = lora(LlamaForCausalLM(LlamaConfig(**SHAPE)), modules_to_save=["lm_head"])
    trained = [
        name for name, p in model.named_parameters() if p.requires_grad and "lm_head" in name
    ]
    head = head_of(model, where="test")
    assert head.weight_VH is dict(model.named_parameters())[trained[0]]
    with torch.no_grad():
        head.weight_VH.mul_(1.5)
    check_head(model, where="test")


def test_adapters_on_the_head_are_refused() -> None:
    """At their start they are zero, so a comparison of logits would not notice them."""
    model = lora(LlamaForCausalLM(LlamaConfig(**SHAPE)), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"head has an adapter.*leave lm_head out"):
        head_of(model, where="test")


def test_a_packed_head_is_refused() -> None:
    """4-bit weights are bytes in a column."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(800, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ModelError, match=r"no linear head.*uint8"):
        head_of(model, where="test")


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_of_real_architectures_equals_their_logits(kind, dtype) -> None:
    torch.manual_seed(0)
    model = {
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    }[kind]()
    model = model.to(dtype)
    ids = torch.randint(50, (3, 12))
    hidden = hidden_states(model, ids[:, :-1]).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    ours = head_loss(hidden, head_of(model, where="test"), labels, torch.ones(len(labels))).total
    logits = model(input_ids=ids[:, :-1]).logits.flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    exact = dtype == torch.float64
    assert ours.item() == pytest.approx(plain.item(), rel=1e-9 if exact else 2e-3)
    weights = [model.lm_head.weight, model.get_input_embeddings().weight, *model.parameters()]
    weights = list({id(p): p for p in weights if p.requires_grad}.values())
    for got, want in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True
    ):
        error = float((got - want).double().norm() / want.double().norm().clamp(min=1e-12))
        assert error < (1e-8 if exact else 0.1)
