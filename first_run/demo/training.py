"""Train the demo's small models, and measure them in bits per byte.

Rows are as a fusion run will feed them: the tokenizer's own BOS rule, at most 256 tokens, and
mostly starting in the middle of a document, because the corpus is cut into segments.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from first_run.demo.muon import Muon
from first_run.demo.text import Document, rank, size_bytes
from first_run.demo.tokenizers import MAX_POSITIONS
from launch.progress import Progress

ROW_TOKENS = 256
SEGMENT_BYTES = 600
"""Text is measured in pieces of about this size, near what a segment of 256 tokens holds."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made."""

    architecture: str
    """llama | gpt_neox | mistral."""
    hidden_size: int
    num_layers: int
    num_steps: int
    batch_rows: int
    learning_rate: float
    """Peak; linear warm-up over a twentieth of the steps, then cosine to a tenth."""


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make a model with random weights and heads of 32, which vLLM's CPU attention takes."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.hidden_size // 32,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
    }
    gated = {
        "intermediate_size": recipe.hidden_size * 8 // 3 // 32 * 32,
        "tie_word_embeddings": True,
    }
    if recipe.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, **gated))
    if recipe.architecture == "mistral":
        heads = {"num_key_value_heads": recipe.hidden_size // 64, "sliding_window": None}
        return MistralForCausalLM(MistralConfig(**shared, **gated, **heads, head_dim=32))
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **shared,
            intermediate_size=4 * recipe.hidden_size,
            rotary_pct=0.5,
            hidden_act="gelu",
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    return bool(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)


def packed_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, num_rows: int, seed: int
) -> torch.Tensor:
    """Token rows [num_rows, ROW_TOKENS] over as many shuffled passes as they need.

    Documents are joined by EOS and cut every row, so most rows start inside a document; the cut
    falls elsewhere in every pass.
    """
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    width = ROW_TOKENS - len(prefix)
    encoded = tokenizer(
        [d.text for d in documents],
        add_special_tokens=False,
        split_special_tokens=True,  # "<s>" in somebody's source is four bytes of text, not a BOS
    ).input_ids
    pieces: list[list[int]] = []
    num_tokens, pass_number = 0, 0
    while num_tokens < num_rows * width:
        order = sorted(
            range(len(documents)), key=lambda i: rank(seed, f"{pass_number}/{documents[i].id}")
        )
        for i in order:
            pieces.append([*encoded[i], tokenizer.eos_token_id])
            num_tokens += len(encoded[i]) + 1
        pass_number += 1
    stream = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])[: num_rows * width]
    rows = stream.reshape(num_rows, width)
    rows = np.concatenate([np.tile(np.asarray(prefix, np.int64), (num_rows, 1)), rows], axis=1)
    return torch.from_numpy(rows[np.random.default_rng(seed).permutation(num_rows)])


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to a tenth."""
    warm_up = max(1, num_steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def fast_bfloat16() -> bool:
    """Whether matrix products are faster in bfloat16: only with AMX; emulation is far slower."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases.

    At a few hundred steps Muon goes further: bits per byte on held-out code after 300 steps were
    2.03 with it and 2.41 with AdamW alone (its rate not tuned).
    """
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    parameters = list(model.parameters())
    inner = [p for p in parameters if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in parameters if p.ndim != 2 or id(p) in outer]
    muon = Muon(
        inner,
        lr=recipe.learning_rate,
        weight_decay=0.1,
        momentum=0.95,
        dtype=torch.bfloat16 if fast_bfloat16() else torch.float32,
    )
    adamw = torch.optim.AdamW(
        rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [muon, adamw]


def train(model: PreTrainedModel, rows_BT: torch.Tensor, recipe: Recipe, label: str) -> float:
    """One pass over the rows; weights and loss stay float32.

    Returns:
        Mean loss of the last tenth of the steps, nats per token.
    """
    optimizers = make_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: learning_rate_factor(step, recipe.num_steps)
        )
        for o in optimizers
    ]
    model.train()
    losses: list[float] = []
    mixed = fast_bfloat16()
    with Progress(label, recipe.num_steps, unit="step") as progress:
        for batch_BT in torch.split(rows_BT, recipe.batch_rows):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                logits_BTV = model(input_ids=batch_BT, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), batch_BT[:, 1:].flatten()
            )
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            progress.add(1, f"{np.mean(losses[-20:]):.3f} nats")
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def segments_of(text: str) -> list[str]:
    """Cut a text at line ends into pieces of at most about `SEGMENT_BYTES`; nothing is lost."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        if current and size_bytes(current) + size_bytes(line) > SEGMENT_BYTES:
            pieces.append(current)
            current = ""
        current += line
    return [*pieces, current] if current else pieces


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> float:
    """Bits per UTF-8 byte over all documents.

    A first token without BOS has nothing to be predicted from, so its bytes are left out.
    """
    model.eval()
    segments = sorted((s for d in documents for s in segments_of(d.text)), key=len)
    nats, num_bytes = 0.0, 0
    for start in range(0, len(segments), 16):
        batch = segments[start : start + 16]
        encoded = tokenizer(
            batch,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        ids_BT, mask_BT = (
            encoded.input_ids[:, :MAX_POSITIONS],
            encoded.attention_mask[:, :MAX_POSITIONS],
        )
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].transpose(1, 2), ids_BT[:, 1:], reduction="none"
        )
        nats += float((losses * mask_BT[:, 1:]).sum(dtype=torch.float64))
        for segment, offsets, mask in zip(
            batch, encoded["offset_mapping"], encoded.attention_mask, strict=True
        ):
            kept = min(int(mask.sum()), MAX_POSITIONS)
            num_bytes += size_bytes(segment[int(offsets[0][1]) : int(offsets[kept - 1][1])])
    return nats / math.log(2) / num_bytes
