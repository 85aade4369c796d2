"""A training step's work at a given size, done three ways: plain CLM, fused, dense.

`loss` ways go from logits and stored entries to the gradient of the logits: what the ways differ in.
`head` ways go from hidden states and entries to gradients of hidden states and head: three products of
matrices more, the same in all ways. `step` ways are whole: model forward, loss, backward, AdamW.

Shape suffixes: B segments, T positions, R = B * T rows, M sources, K entries, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import dense_fusion
from fuse_train.config import TrainSection
from fuse_train.data.batch import Batch, SourceBatch, to_device
from fuse_train.divergences.divergence import Divergence
from fuse_train.loop.objective import FusionObjective, StepTotals, importance
from fuse_train.losses.head_pass import ChunkSources, Coefficients, losses_to_gradient
from fuse_train.losses.losses import SourceRows, head_loss, row_coefficients
from fuse_train.model.heads import Head, default_chunk_rows
from fuse_train.selector_fit.selector_training import new_selector
from fuse_train.selectors.by_name import learner
from fuse_train.selectors.features import FEATURES
from fuse_train.selectors.kinds.asn import AsnSection

CLM_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class Size:
    """How large the problem is."""

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1_408
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 8
    num_segments: int = 4
    num_tokens: int = 512
    num_sources: int = 4
    num_entries: int = 32
    dtype: str = "float32"

    @property
    def num_rows(self) -> int:
        """Positions of a step."""
        return self.num_segments * self.num_tokens


CPU = Size()
GPU = Size(128_256, 2_048, 8_192, 16, 32, 8, 1, 2_048, dtype="bfloat16")
"""The shape of Llama 3.2 1B."""
SOURCES = [f"s{m}" for m in range(CPU.num_sources)]


def llama_config(size: Size) -> LlamaConfig:
    """Of a Llama of that size, with a head of its own."""
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=4_096,
        pad_token_id=None,
    )


def make_model(size: Size, device: torch.device) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(size)).to(device, getattr(torch, size.dtype))


def make_batch(size: Size, *, seed: int = 0) -> Batch:
    """Random tokens and sources, on the CPU: one input token before each segment's labels."""
    g = torch.Generator().manual_seed(seed)
    shape = (size.num_segments, size.num_tokens)
    labels_BT = torch.randint(size.vocab_size, shape, generator=g)
    inputs_BT = torch.cat([torch.ones(shape[0], 1, dtype=torch.int64), labels_BT[:, :-1]], 1)
    per_source = (*shape, size.num_sources)
    # Distinct ids without a permutation of the vocabulary for each row: a start and steps above 0.
    most = size.vocab_size // (size.num_entries + 1)
    steps = torch.randint(1, most, (*per_source, size.num_entries), generator=g)
    ids_BTMK = steps.cumsum(-1)
    mass = torch.rand((*per_source, size.num_entries + 1), generator=g) ** 4 + 1e-4
    mass = mass / mass.sum(-1, keepdim=True)
    probs_BTMK = mass[..., :-1].sort(-1, descending=True).values
    sources = SourceBatch(
        ids_BTMK.int(),
        probs_BTMK,
        mass[..., -1],
        torch.ones(per_source, dtype=torch.bool),
        torch.rand(per_source, generator=g).log(),
        torch.randn((*per_source, len(FEATURES)), generator=g),
        2 * torch.rand((shape[0], size.num_sources), generator=g),
    )
    return Batch(
        inputs_BT,
        torch.arange(shape[1]).expand(shape).contiguous(),
        labels_BT,
        torch.full(shape, 4),
        torch.zeros(shape[0], dtype=torch.int64),
        ("text",),
        tuple(f"t{b}" for b in range(shape[0])),
        sources,
    )


def stored_logits(batch: Batch) -> list[dense_fusion.StoredLogits]:
    """The batch as FuseLLM's data set would hold it."""
    sources = batch.sources
    assert sources is not None
    return [
        dense_fusion.StoredLogits(
            sources.entry_ids_BTMK[:, :, m].long(),
            sources.entry_probs_BTMK[:, :, m].log(),
            sources.source_bpb_BM[:, m],
        )
        for m in range(sources.tail_BTM.shape[2])
    ]


def source_rows(batch: Batch) -> SourceRows:
    """The sources of all rows."""
    assert batch.sources is not None
    return batch.sources.rows(batch.label_rows())


Way = Callable[..., Any]


def loss_ways(size: Size, device: torch.device) -> dict[str, Way]:
    """From logits and entries to the gradient of the logits: each call does one.

    Ours has its chunk of logits copied into its buffer, where the head's product would write it.
    """
    torch.manual_seed(1)
    logits_RV = torch.randn(size.num_rows, size.vocab_size, device=device).requires_grad_()
    batch = make_batch(size)
    stored, rows = stored_logits(batch), source_rows(batch)
    labels_R = batch.labels_BT.flatten().to(device)
    shape = (size.num_segments, size.num_tokens, size.vocab_size)
    weights_RM = torch.full((size.num_rows, size.num_sources), 1 / size.num_sources)
    covered_RM = torch.ones_like(weights_RM, dtype=torch.bool)
    chunk = default_chunk_rows(size.vocab_size, device)

    def plain() -> None:
        torch.autograd.grad(cross_entropy(logits_RV, labels_R), logits_RV)

    def fused() -> None:
        clm_R, fusion_RM = row_coefficients(weights_RM, covered_RM, CLM_WEIGHT)
        entries = (rows.entry_ids_RMK, rows.entry_probs_RMK, rows.tail_RM)
        sources = ChunkSources(*(tensor.to(device) for tensor in entries))
        coefficients = Coefficients(clm_R.to(device), fusion_RM.to(device))
        with torch.no_grad():
            buffer_CV = torch.empty(chunk, size.vocab_size, device=device)
            for start in range(0, size.num_rows, chunk):
                at = slice(start, min(start + chunk, size.num_rows))
                part_CV = buffer_CV[: at.stop - start].copy_(logits_RV[at])
                losses_to_gradient(
                    part_CV, labels_R[at], coefficients[at], sources[at], Divergence()
                )

    def dense() -> None:
        targets = [t.to(device) for t in dense_fusion.collate(stored, size.vocab_size)]
        ce_MB = torch.stack([source.ce_B for source in stored]).to(device)
        args = (labels_R.view(shape[:2]), targets, ce_MB, CLM_WEIGHT)
        torch.autograd.grad(dense_fusion.loss(logits_RV.view(shape), *args), logits_RV)

    return {"plain": plain, "fused": fused, "dense": dense}


def head_ways(size: Size, device: torch.device) -> dict[str, Way]:
    """From hidden states and entries to gradients: each call does one."""
    torch.manual_seed(1)
    dtype = getattr(torch, size.dtype)
    hidden_RH = torch.randn(size.num_rows, size.hidden_size, device=device, dtype=dtype)
    weight_VH = 0.02 * torch.randn(size.vocab_size, size.hidden_size, device=device, dtype=dtype)
    hidden_RH.requires_grad_()
    weight_VH.requires_grad_()
    batch = make_batch(size)
    stored, rows = stored_logits(batch), source_rows(batch)
    labels_R = batch.labels_BT.flatten().to(device)
    shape = (size.num_segments, size.num_tokens, size.vocab_size)

    def gradients(total: torch.Tensor) -> None:
        torch.autograd.grad(total, (hidden_RH, weight_VH))

    def plain() -> None:
        gradients(cross_entropy((hidden_RH @ weight_VH.T).float(), labels_R))

    def fused() -> None:
        weights_RM = torch.full((size.num_rows, size.num_sources), 1 / size.num_sources)
        covered_RM = torch.ones_like(weights_RM, dtype=torch.bool)
        clm_R, fusion_RM = row_coefficients(weights_RM, covered_RM, CLM_WEIGHT)
        moved = SourceRows(
            rows.entry_ids_RMK.to(device), rows.entry_probs_RMK.to(device), rows.tail_RM.to(device)
        )
        coefficients = (clm_R.to(device), moved, fusion_RM.to(device))
        loss = head_loss(hidden_RH, Head(weight_VH), labels_R, *coefficients)
        gradients(loss.total / size.num_rows)

    def dense() -> None:
        targets = [t.to(device) for t in dense_fusion.collate(stored, size.vocab_size)]
        dense_loss(targets)

    def dense_loss(targets: list[torch.Tensor]) -> None:
        logits_BTV = (hidden_RH @ weight_VH.T).float().view(shape)
        ce_MB = torch.stack([source.ce_B for source in stored]).to(device)
        labels_BT = labels_R.view(shape[:2])
        gradients(dense_fusion.loss(logits_BTV, labels_BT, targets, ce_MB, CLM_WEIGHT))

    return {"plain": plain, "fused": fused, "dense": dense}


def step_ways(size: Size, device: torch.device) -> dict[str, Way]:
    """Whole training steps on one model: plain, fused and dense on the same tokens.

    Also `on`, the fused step on another batch, and `prepare`, which makes the optimizer's state.
    """
    model = make_model(size, device)
    batch_cpu = make_batch(size)
    batch, stored = to_device(batch_cpu, device), stored_logits(batch_cpu)
    section = TrainSection(selector="asn", clm_weight=CLM_WEIGHT)
    selector = new_selector(AsnSection(), learner("asn"), 0, num_sources=size.num_sources).to(
        device
    )
    objective = FusionObjective(model, selector, section, SOURCES)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)

    def totals(of: Batch) -> StepTotals:
        return StepTotals(of.num_labels, of.num_labels, importance(selector, of))

    def finish(loss: torch.Tensor) -> float:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def plain() -> float:
        logits_BTV = model(input_ids=batch.input_ids_BL, use_cache=False).logits
        flat_RV = logits_BTV.view(-1, size.vocab_size).float()
        return finish(cross_entropy(flat_RV, batch.labels_BT.flatten()))

    def fused() -> float:
        return finish(objective(batch, totals(batch))[0])

    def on(other: Batch) -> float:
        moved = to_device(other, device)
        return finish(objective(moved, totals(moved))[0])

    def prepare() -> None:
        for parameter in objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def dense() -> float:
        targets = [t.to(device) for t in dense_fusion.collate(stored, size.vocab_size)]
        logits_BTV = model(input_ids=batch.input_ids_BL, use_cache=False).logits.float()
        ce_MB = torch.stack([source.ce_B for source in stored]).to(device)
        labels = batch.labels_BT
        return finish(dense_fusion.loss(logits_BTV, labels, targets, ce_MB, CLM_WEIGHT))

    return {"plain": plain, "fused": fused, "dense": dense, "on": on, "prepare": prepare}
