"""Scoring with a plain transformers forward: any architecture, any device, no server.

The base model runs on a padded batch; its hidden states of all real rows are gathered, and the
output head, log-sum-exp and top-k (or draws) run over a few hundred of them at a time, so that
logits [R, V] of a whole batch never exist. Models that change their logits after the head (a scale,
a soft cap) are noticed by a probe and run with the model's own logits instead.

Shapes: B batch, T tokens of the longest input, H hidden, R gathered rows, V vocabulary, K entries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from extract.engine import LOAD_ERRORS, DenseRows, EngineSpec, first_known
from extract.sampling import sampled_rows, segment_uniforms, systematic_points
from store_schema.errors import ConfigError, ModelError
from store_schema.tokenizer import EncodedSegment

logger = logging.getLogger(__name__)

PROBE_TOKENS = 16
PROBE_TOLERANCE = 1e-5
"""Relative to the largest logit, in the model's own type: the same matrix product, so the same."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""ids [R, K] int64, logprobs [R, K] float32, label_logprobs [R] float32."""


class TransformersEngine:
    """See `extract.engine.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model.

        Raises:
            ModelError: It does not load.
            ConfigError: No such device or dtype.
        """
        if spec.section.threads is not None:
            torch.set_num_threads(spec.section.threads)
        self._spec = spec
        self._device = _device(spec.section.device)
        self._model = _load(spec).to(self._device).eval()
        self._head: torch.nn.Module | None = None
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._probed = False

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model, self._head, self._weight, self._bias
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.score`."""
        for batch in batches([s.input_ids for s in segments], self._spec.section.batch_tokens):
            if not self._probed:
                self._probe(segments[batch[0]].input_ids[:PROBE_TOKENS])
            yield from zip(batch, self._score_batch([segments[i] for i in batch]), strict=True)

    def _score_batch(self, segments: Sequence[EncodedSegment]) -> list[DenseRows]:
        inputs = [segment.input_ids for segment in segments]
        T = max(map(len, inputs))
        ids_BT = torch.tensor([ids + [0] * (T - len(ids)) for ids in inputs], device=self._device)
        lengths = torch.tensor([len(ids) for ids in inputs], device=self._device)
        # Rows that predict: logits at i - 1 belong to token i. Padding stands behind, out of sight.
        contexts = torch.tensor(
            [len(s.context_ids) + first_known(s) for s in segments], device=self._device
        )
        place_T = torch.arange(T - 1, device=self._device) + 1
        wanted_BT = (place_T >= contexts[:, None]) & (place_T < lengths[:, None])
        mask_BT = (torch.arange(T, device=self._device) < lengths[:, None]).long()
        labels_R = ids_BT[:, 1:][wanted_BT]
        if self._head is None:
            output = self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            states = output.logits[:, :-1][wanted_BT]
        else:
            output = self._model.base_model(
                input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
            )
            states = output.last_hidden_state[:, :-1][wanted_BT]
        counts = wanted_BT.sum(dim=1).tolist()
        found = self._rows(states, labels_R, self._uniforms(segments, counts))
        ids, logprobs, labels = (part.numpy() for part in found)
        stops = np.cumsum(counts).tolist()
        rows = [slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]
        sampled = self._spec.section.estimator == "sampled"
        return [DenseRows(ids[part], logprobs[part], labels[part], sampled) for part in rows]

    def _uniforms(self, segments: Sequence[EncodedSegment], counts: list[int]) -> torch.Tensor:
        """[R] the number of each row that places its draws; rows are gathered segment by segment."""
        if self._spec.section.estimator == "topk":
            return torch.empty(0)
        seed, source = self._spec.seed, self._spec.source
        parts = [
            segment_uniforms(segment, count, seed=seed, source=source)
            for segment, count in zip(segments, counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def _rows(self, states: torch.Tensor, labels_R: torch.Tensor, uniforms_R: torch.Tensor) -> Rows:
        """Entries and labels of gathered rows, `head_rows` of logits at a time.

        Args:
            states: [R, H] hidden states, or [R, V] logits where there is no head to run.
            labels_R: [R] int64.
            uniforms_R: [R] float64 in [0, 1); empty for topk.
        """
        K = self._spec.section.max_entries
        found: list[Rows] = []
        size = self._spec.section.head_rows
        for start in range(0, len(labels_R), size):
            part, labels = states[start : start + size], labels_R[start : start + size]
            logits_RV = (part if self._head is None else self._logits(part)).float()
            total_R = torch.logsumexp(logits_RV, dim=-1)
            label_R = logits_RV.gather(1, labels[:, None])[:, 0] - total_R
            entries = self._entries(logits_RV, total_R, uniforms_R[start : start + size])
            found.append((*entries, label_R.cpu()))
        if not found:
            return (
                torch.empty(0, K, dtype=torch.int64),
                torch.empty(0, K),
                torch.empty(0),
            )
        ids, logprobs, label_logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, logprobs, label_logprobs

    def _entries(
        self, logits_RV: torch.Tensor, total_R: torch.Tensor, uniforms_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        section = self._spec.section
        if section.estimator == "sampled":
            return sampled_rows(
                logits_RV[:, : self._spec.vocab_size],
                systematic_points(uniforms_R, section.draws),
                head=section.sampled_head,
            )
        top = torch.topk(logits_RV, section.top_k, dim=-1)
        return top.indices.cpu(), (top.values - total_R[:, None]).cpu()

    def _logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        if self._weight is not None:
            return F.linear(hidden_RH.float(), self._weight, self._bias)
        if self._head is None:
            raise TypeError("an engine without a weight of its own has the model's head")
        logits: torch.Tensor = self._head(hidden_RH)
        return logits

    def _probe(self, input_ids: list[int]) -> None:
        """Find out, on the first real text, whether the output head alone gives the logits."""
        self._probed = True
        head = self._model.get_output_embeddings()
        base = self._model.base_model
        ids_BT = torch.tensor([input_ids], device=self._device)
        logits = self._model(input_ids=ids_BT, use_cache=False).logits
        if logits.shape[-1] != self._spec.model_vocab_size:
            raise ModelError(
                "the model's logits are not as wide as its config says",
                where=self._spec.folder,
                expected=self._spec.model_vocab_size,
                got=logits.shape[-1],
            )
        if head is None or base is self._model or _changes_logits(self._model.config):
            logger.info("logits taken from the model itself: its head cannot be run alone")
            return
        alone = head(base(input_ids=ids_BT, use_cache=False).last_hidden_state)
        error = (alone.float() - logits.float()).abs().max()
        if not error <= PROBE_TOLERANCE * logits.float().abs().max():
            logger.info("logits taken from the model itself: it changes what its head gives")
            return
        self._head = head
        if self._spec.fp32_head and isinstance(head, torch.nn.Linear):
            self._weight = head.weight.float()
            self._bias = None if head.bias is None else head.bias.float()


def _changes_logits(config: Any) -> bool:
    """Whether a config names a scale or cap of the logits: near 0 a cap is too small to measure."""
    text = config.get_text_config()
    names = ("final_logit_softcapping", "logit_softcapping", "logit_scale", "logits_scaling")
    return any(getattr(text, name, None) not in (None, 1, 1.0) for name in names)


def batches(inputs: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of inputs in batches of like length, longest first, padding within `batch_tokens`."""
    order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i))
    start = 0
    while start < len(order):
        size = max(batch_tokens // len(inputs[order[start]]), 1)
        yield order[start : start + size]
        start += size


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("no CUDA device", where="extract.device", got=name)
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def _load(spec: EngineSpec) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError("no such floating-point type", where="dtype of a model", got=spec.dtype)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            spec.folder,
            dtype=dtype,
            trust_remote_code=spec.ref.trust_remote_code,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise ModelError(
            "model cannot be loaded",
            where=spec.folder,
            got=f"{type(error).__name__}: {str(error)[:200]}",
        ) from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{len(missing)} weight(s) are not in the checkpoint",
            where=spec.folder,
            got=", ".join(missing[:4]),
        )
    return model
