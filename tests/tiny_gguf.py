"""A tiny Llama as a GGUF file, written with the format's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    quantization: str = "Q8_0",
    pre: str | None = "smollm",
    bos: bool | None = True,
    architecture: str = "llama",
    template: str | None = TEMPLATE,
    bos_id: int | None = 1,
) -> dict[str, npt.NDArray[np.float32]]:
    """Write the model of `tiny.tiny_model(folder)`, its tokenizer byte-level BPE, as a GGUF file.

    Args:
        folder: The model.
        file: Where to.
        quantization: Of the matrices, a name of the format's.
        pre: Name of the rule by which text is cut; None leaves it out.
        bos: The flag for BOS; None leaves it out.
        architecture: As the file states it.
        template: Chat template; None leaves it out.
        bos_id: Id of BOS, 1 in the model; None leaves it out.

    Returns:
        What the format's library makes of each written tensor, by the name in the model.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    heads = config.num_attention_heads
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, pre=pre, bos=bos, template=template, bos_id=bos_id)

    kind = gguf.GGMLQuantizationType[quantization]
    written = {}
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy()
        stored = _swapped(values, heads) if name.split(".")[-2] in ("q_proj", "k_proj") else values
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(_gguf_name(name), stored)
            written[name] = values
            continue
        packed = gguf.quants.quantize(stored, kind)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=kind)
        back = gguf.quants.dequantize(packed, kind).astype(np.float32)
        written[name] = _swapped_back(back, heads) if stored is not values else back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(
    writer: Any,
    folder: Path,
    *,
    pre: str | None,
    bos: bool | None,
    template: str | None,
    bos_id: int | None,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: piece for piece, index in tokenizer.get_vocab().items()}
    special = {token["id"] for token in spec["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id[i] for i in range(len(by_id))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(by_id))])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if bos is not None:
        writer.add_add_bos_token(bos)
    if template is not None:
        writer.add_chat_template(template)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(rest[:-1])]}.weight"


def _swapped(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of rotary halves interleaved, as the format has them for a Llama."""
    rows, columns = values.shape
    split = values.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))


def _swapped_back(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    rows, columns = values.shape
    split = values.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))
