"""Engine transformers: a plain forward pass, for any architecture on a CPU or a GPU.

The base model runs on a padded batch. The output head then runs on `head_rows` rows at a time, and
their entries are taken from the logits in one pass (`extract.head.logit_rows`), so logits [R, V] of
a whole batch are never in memory. On CPUs with bf16 units both are one compiled pass, without logits
of whole rows (`extract.head.fused_head`). Models that change their logits after the head (scale, soft
cap) are recognised by a test on the first text, and their own logits are used.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch

from extract.engines.freed_memory import give_back_freed_memory, keep_freed_memory
from extract.engines.pieces import Pieces
from extract.engines.protocol import (
    Answer,
    Branches,
    DenseRows,
    EngineMemoryError,
    EngineSpec,
    Prompt,
    first_known,
)
from extract.engines.sampling import sampled_rows, segment_uniforms, systematic_points
from extract.engines.scored_batch import ScoredBatch, Tensors, no_rows
from extract.engines.transformers_branches import BranchStates, memory_for
from extract.head.logit_rows import row_entries, row_sums
from extract.head.output_head import OutputHead
from store_schema.errors import ConfigError, ModelError
from store_schema.model.causal_head import head_error, scale_and_cap
from store_schema.model.causal_model import load_causal_model
from store_schema.model.models import with_folder
from store_schema.model.out_of_memory import is_out_of_memory
from store_schema.text.prefixes import prefix_groups

if TYPE_CHECKING:
    from extract.engines.ending import AnswerRules
    from extract.head.fused_head import FusedHead
    from store_schema.text.tokenizer import EncodedSegment

logger = logging.getLogger(__name__)

PROBE_TOKENS = 16
PROBE_TOLERANCE = 1e-4
"""Largest `head_error` of logits computed here, in the model's dtype, for a head that runs by
itself."""
BATCHES_AHEAD = 1
"""Batches that are sent to a GPU before the results of an earlier one are awaited."""


class TransformersEngine:
    """See `extract.engines.protocol.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model.

        Raises:
            ModelError: It cannot be loaded.
            EngineMemoryError: It does not fit into memory.
            ConfigError: There is no such device or dtype.
        """
        if spec.section.threads is not None:
            torch.set_num_threads(spec.section.threads)
        self._spec = spec
        self._device = chosen_device(spec.section.device, where="extract.device")
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        self._model = _load(spec, self._device)
        if on_cpu and not has_fast_products(spec.dtype):
            logger.warning(
                "%s: this CPU has no units for %s and is slow with it; `dtype: float32` under "
                "sources.%s is faster, with twice the memory",
                spec.source, spec.dtype, spec.source,
            )  # fmt: skip
        self._head: OutputHead | None = None
        self._fused: FusedHead | None = None
        self._probed = False
        self._branch_states: BranchStates | None = None
        self._pieces = Pieces(
            spec.section.scored_tokens(on_cpu=on_cpu), spec.section.logit_rows(on_cpu=on_cpu)
        )

    @property
    def description(self) -> str:
        """See `Engine.description`."""
        return f"transformers engine ({self._device})"

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model, self._head, self._fused, self._branch_states
        give_back_freed_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(self, segments: Sequence[EncodedSegment]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.score`."""
        inputs = [Input.of(segment) for segment in segments]
        groups = prefix_groups([item.ids for item in inputs])
        order = longest_first([len(inputs[first].ids) for first, *_ in groups])
        under_way: deque[ScoredBatch] = deque()
        ahead = BATCHES_AHEAD if self._device.type == "cuda" else 0
        while order:
            longest = len(inputs[groups[order[0]][0]].ids)
            batch = order[: max(self._pieces.batch_tokens // longest, 1)]
            scored = self._score_batch([groups[k] for k in batch], inputs)
            if scored is None:
                continue  # memory ran out; pieces are smaller
            order = order[len(batch) :]
            under_way.append(scored)
            if len(under_way) > ahead:
                yield from under_way.popleft().rows()
        for scored in under_way:
            yield from scored.rows()

    @torch.inference_mode()
    def branch(self, segments: Sequence[Branches]) -> Iterator[tuple[int, DenseRows]]:
        """See `Engine.branch`."""
        for i, branches in enumerate(segments):
            if not self._probed:
                self._probe(branches.segment.input_ids[:PROBE_TOKENS])
            if self._branch_states is None:
                self._branch_states = BranchStates(self._forward, self._model, self._spec.source)
            with memory_for(branches, self._spec.source):
                states = self._branch_states.of(branches, self._pieces.batch_tokens)
                place_R = torch.arange(len(states), device=self._device)
                ids, logprobs, _ = self._entries(
                    states, place_R, torch.zeros_like(place_R), torch.empty(0)
                )
            no_labels = np.zeros(len(states), np.float32)
            yield i, DenseRows(ids.cpu().numpy(), logprobs.cpu().numpy(), no_labels)

    def _forward(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
        """Last hidden states, or the model's own logits, and its cache."""
        if self._head is None:
            own = self._model(**inputs)
            return own.logits, getattr(own, "past_key_values", None)
        output = self._model.base_model(**inputs)
        return output.last_hidden_state, getattr(output, "past_key_values", None)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], rules: AnswerRules) -> Iterator[tuple[int, Answer]]:
        """See `Engine.answer`."""
        from extract.engines.transformers_generation import LoadedModel, transformers_answers

        if prompts and not self._probed:
            self._probe(prompts[0].input_ids[:PROBE_TOKENS])
        head = None if self._head is None else self._head.logits
        loaded = LoadedModel(self._model, head, self._device)
        yield from transformers_answers(loaded, self._spec, prompts, rules)

    def _score_batch(
        self, batch: Sequence[Sequence[int]], inputs: Sequence[Input]
    ) -> ScoredBatch | None:
        """Rows of a batch, which a GPU may still be computing; None if memory ran out.

        Args:
            batch: Groups of indices into `inputs` (`prefix_groups`).
            inputs: All segments.
        """
        members = [i for group in batch for i in group]
        counts = [inputs[i].num_rows for i in members]
        run = [inputs[first].ids for first, *_ in batch]
        longest = max(map(len, run))
        in_head = False
        try:
            states = self._states(run, longest) if sum(counts) else torch.empty(0)
            in_head = True
            placed = [(b, inputs[i]) for b, group in enumerate(batch) for i in group]
            kept = self._kept_rows(states, placed, longest)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            if self._pieces.shrunk:
                logger.warning("%s: memory ran out; %s", self._spec.source, self._pieces.describe())
            sampled = self._spec.section.estimator == "sampled"
            return ScoredBatch(members, counts, kept, sampled)
        # The error is released here, and with its frames the batch.
        self._free_memory()
        if not self._pieces.shrink(in_head, len(batch), longest, sum(counts)):
            raise EngineMemoryError(
                f"memory ran out on one segment of {longest:,} tokens",
                where=f"source {self._spec.source}",
                got=f"{self._pieces.head_rows:,} rows of logits at a time",
                hint="make shorter segments (plan.max_tokens), load a smaller dtype, or use a device "
                "with more memory",
            )
        return None

    def _states(self, run: Sequence[npt.NDArray[np.int64]], T: int) -> torch.Tensor:
        """[B * T, H] last hidden states of all inputs, or [B * T, V] the model's own logits.

        No attention mask is needed: padding comes after the tokens, where a causal model does not see
        it. Without a mask attention is fastest.
        """
        if not self._probed:
            self._probe(run[0][:PROBE_TOKENS].tolist())
        padded = np.zeros((len(run), T), np.int64)
        for row, ids in zip(padded, run, strict=True):
            row[: len(ids)] = ids
        ids_BT = _sent(padded, self._device)
        states, _ = self._forward(input_ids=ids_BT, use_cache=False)
        return states.flatten(0, 1)

    def _kept_rows(
        self, states: torch.Tensor, placed: Sequence[tuple[int, Input]], T: int
    ) -> Tensors:
        """Entries and label log-probabilities of a batch, segment after segment.

        The hidden state at input i - 1 gives the distribution of input i.

        Args:
            states: From `_states`.
            placed: Index of the input that each segment is a prefix of, and the segment.
            T: Length of the padded inputs.
        """
        inputs = [item for _, item in placed]
        if not any(item.num_rows for item in inputs):
            return no_rows(self._spec.section.max_entries)
        places = [np.arange(item.first - 1, len(item.ids) - 1) + b * T for b, item in placed]
        place_R = _sent(np.concatenate(places), self._device)
        labels = [item.ids[item.first :] for item in inputs]
        label_R = _sent(np.concatenate(labels), self._device)
        uniform_R = torch.from_numpy(np.concatenate([self._uniforms(item) for item in inputs]))
        return self._entries(states, place_R, label_R, uniform_R)

    def _entries(
        self,
        states: torch.Tensor,
        place_R: torch.Tensor,
        label_R: torch.Tensor,
        uniform_R: torch.Tensor,
    ) -> Tensors:
        """Entries and label log-probabilities of some rows of `states`, a piece at a time."""
        size = self._pieces.head_rows
        parts = []
        for start in range(0, len(place_R), size):
            part = slice(start, start + size)
            rows = states.index_select(0, place_R[part])
            kept = None if self._fused is None else self._fused.entries(rows, label_R[part])
            if kept is None:
                logits_RV = rows.float() if self._head is None else self._head.logits(rows)
                kept = self._kept(logits_RV, label_R[part], uniform_R[part])
            parts.append(kept)
        ids, logprobs, of_labels = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(logprobs), torch.cat(of_labels)

    def _kept(
        self, logits_RV: torch.Tensor, labels_R: torch.Tensor, uniforms_R: torch.Tensor
    ) -> Tensors:
        section = self._spec.section
        if section.estimator == "topk":
            return row_entries(logits_RV, labels_R, section.top_k)
        ids_RK, logprobs_RK = sampled_rows(
            logits_RV[:, : self._spec.vocab_size],
            systematic_points(uniforms_R, section.draws),
            head=section.sampled_head,
        )
        label_R = logits_RV.gather(1, labels_R[:, None])[:, 0] - row_sums(logits_RV).log_total_R
        return ids_RK.int(), logprobs_RK.float(), label_R.float()

    def _uniforms(self, item: Input) -> npt.NDArray[np.float64]:
        """[R] random offset of each row's draws; empty for estimator topk."""
        if self._spec.section.estimator == "topk":
            return np.empty(0)
        return segment_uniforms(
            item.segment, item.num_rows, seed=self._spec.seed, source=self._spec.source
        )

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _probe(self, input_ids: Sequence[int]) -> None:
        """Test, on the first text, whether the output head by itself gives the model's logits."""
        layer = self._model.get_output_embeddings()
        base = self._model.base_model
        ids_BT = torch.tensor([list(input_ids)], device=self._device)
        logits = self._model(input_ids=ids_BT, use_cache=False).logits
        if logits.shape[-1] != self._spec.model_vocab_size:
            raise ModelError(
                "the model's logits have another number of ids than its config",
                where=self._spec.folder,
                expected=self._spec.model_vocab_size,
                got=logits.shape[-1],
            )
        self._probed = True
        config = self._model.config.get_text_config()
        changed = scale_and_cap(vars(config)) != (1.0, None)
        if layer is None or base is self._model or changed:
            logger.info("using the model's own logits: its head cannot be run by itself")
            return
        alone = layer(base(input_ids=ids_BT, use_cache=False).last_hidden_state)
        if not head_error(logits.float(), alone.float()) <= PROBE_TOLERANCE:
            logger.info("using the model's own logits: it changes the output of its head")
            return
        self._head = OutputHead(layer, fp32=self._spec.fp32_head)
        section = self._spec.section
        if self._spec.fp32_head and section.estimator == "topk" and self._device.type == "cpu":
            self._fused = _fused_head(layer, section.top_k)


@dataclass(frozen=True, slots=True)
class Input:
    """A segment as input of the model.

    Args:
        segment: Context and text.
        ids: [T] int64 tokens of both.
        first: Index of the first token with a row: the first of the text that has a token before it.
    """

    segment: EncodedSegment
    ids: npt.NDArray[np.int64]
    first: int

    @classmethod
    def of(cls, segment: EncodedSegment) -> Self:
        """The input for a segment."""
        ids = np.concatenate([np.array(segment.context_ids, np.int64), segment.token_ids])
        return cls(segment, ids.astype(np.int64), len(segment.context_ids) + first_known(segment))

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return len(self.ids) - self.first


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, so that batches have similar lengths and the largest comes first."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _sent(numbers: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for its work to finish."""
    tensor = torch.from_numpy(numbers)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def chosen_device(name: str, *, where: str) -> torch.device:
    """The device that an option `device` names.

    Raises:
        ConfigError: There is no such device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("no CUDA device", where=where, got=name)
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def has_fast_products(dtype: str) -> bool:
    """Whether this CPU has fast matrix products of a dtype."""
    names = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    is_supported = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return is_supported is None or bool(is_supported())


def _fused_head(layer: torch.nn.Module, top_k: int) -> FusedHead | None:
    """The faster way to entries, where there is one."""
    try:
        from extract.head.fused_head import FusedHead
    except ImportError:  # Numba is not installed
        return None
    return FusedHead.of(layer, top_k)


def _load(spec: EngineSpec, device: torch.device) -> Any:
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError("no such floating-point type", where="dtype of a model", got=spec.dtype)
    ref = with_folder(spec.ref, spec.folder)
    try:
        return load_causal_model(ref, of=spec.source, dtype=dtype, device=device).eval()
    except ModelError as error:
        if not is_out_of_memory(error):
            raise
        raise EngineMemoryError(
            error.what, where=error.where, got=error.got, hint=error.hint
        ) from error
