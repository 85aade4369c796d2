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

from fuse_train.heads import check_head, head_of
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


def test_model_without_linear_head_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ModelError, match="no linear head"):
        check_head(model, where="test")
