"""The training loop: resumable at every step, stopped before a step that would spoil the weights.

Shape suffixes: M sources, G domains.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuse_train.asn import AdaptiveSelector
from fuse_train.batch import Batch, to_device
from fuse_train.checkpoint import (
    BestRecord,
    TrainState,
    best_folder,
    load_optimizer,
    publish_folder,
    save_checkpoint,
)
from fuse_train.config import TrainSection
from fuse_train.losses import importance_cv2
from fuse_train.objective import FusionObjective, StepTotals, Sums, importance
from fuse_train.schedule import build_optimizer, rate_factor, set_rate
from fuse_train.selectors import Selector
from fuse_train.step_log import StepLog
from fuse_train.stream import SampleStream
from fuse_train.validation import ValidSet, valid_bpb
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import ModelError
from store_schema.tokenizer import SegmentTokenizer

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.01
"""A source whose mean weight over the last steps is below it is as good as gone."""

COLLAPSE_STEPS = 50
"""So many: a single step may hold no text of a source's domain."""


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """What a loop is made of.

    Args:
        label: "fused" or "control", for people.
        section: The recipe.
        seed: Of the run.
        stream: Of the training split.
        valid: Segments evaluated on the way, None for no evaluation.
        tokenizer: The target's.
        checkpoints: Folder.
        log: Step log.
    """

    label: str
    section: TrainSection
    seed: int
    stream: SampleStream
    valid: ValidSet | None
    tokenizer: SegmentTokenizer
    checkpoints: Path
    log: StepLog

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        section = self.section
        per_epoch = self.stream.num_samples / section.batch_segments
        return section.max_steps or max(1, math.ceil(section.epochs * per_epoch - 1e-9))


class TrainingLoop:
    """One run of the target, from a state to the last step.

    Args:
        inputs: Data, recipe, places.
        model: The target, in float32.
        selector: None for ground truth alone.
        state: Where to begin.
        accelerator: Of accelerate.
        resume_from: Checkpoint that holds the optimizer, None at the start.
    """

    def __init__(
        self,
        inputs: LoopInputs,
        model: Any,
        selector: Selector | None,
        state: TrainState,
        accelerator: Any,
        resume_from: Path | None,
    ) -> None:
        self.inputs, self.model, self.selector = inputs, model, selector
        self.state, self._accelerator = state, accelerator
        learned = list(selector.parameters()) if selector is not None else []
        if inputs.section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        objective = FusionObjective(model, selector, inputs.section)
        optimizer = build_optimizer(model, learned, inputs.section)
        self._objective, self._optimizer = accelerator.prepare(objective, optimizer)
        self._learned = learned
        self._warned = False
        self._heard: deque[dict[str, float]] = deque(maxlen=COLLAPSE_STEPS)
        if resume_from is not None:
            load_optimizer(resume_from, self._optimizer)

    def run(self, stop: StopFlag) -> None:
        """Train to the last step, evaluating, logging and saving on the way.

        Raises:
            ModelError: A loss or gradient that is not finite; nothing was changed by that step.
            Stopped: A signal asked to stop; a checkpoint was saved.
            StorageError: The disk refused a checkpoint or the log.
        """
        inputs, section = self.inputs, self.inputs.section
        inputs.log.start(self.state.step)
        if self.state.step == 0:
            self._evaluate({"step": 0})
        started, seconds_before = time.monotonic(), self.state.seconds
        main = self._accelerator.is_main_process
        self.model.train()
        first, total = self.state.step, inputs.num_steps
        batches_of_steps = inputs.stream.batches(first, total)
        with Progress(f"train {inputs.label}", total, unit="step", done=first) as progress:
            for step, batches in zip(range(first, total), batches_of_steps, strict=True):
                line = self._step(step, batches)
                done = step + 1
                self._set(
                    step=done,
                    next_sample=done * section.batch_segments,
                    seconds=seconds_before + time.monotonic() - started,
                )
                due = section.eval_every is not None and done % section.eval_every == 0
                if due or done == total:
                    self._evaluate(line)
                else:
                    inputs.log.write(line)
                progress.add(1, f"loss {line['loss']:.3f}")
                if main and (done % section.log_every == 0 or done == total):
                    print(_readable(line, total), flush=True)
                stopping = self._any(stop.asked)
                if stopping or done == total or done % section.checkpoint_every == 0:
                    self._save()
                    stop.progressed = True
                if stopping and done < total:
                    batches_of_steps.close()
                    self._accelerator.wait_for_everyone()
                    stop.check()

    def _step(self, step: int, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step; the line for the log."""
        section, accelerator = self.inputs.section, self._accelerator
        started = time.monotonic()
        _seed_step(self.inputs.seed, step, accelerator.process_index)
        batches = [to_device(batch, accelerator.device) for batch in batches]
        totals = self._totals(batches)
        sums: Sums = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else accelerator.no_sync(self._objective):
                loss, part = self._objective(batch, totals)
                # DDP averages over processes what is a sum here.
                accelerator.backward(loss * accelerator.num_processes)
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums)
        self._check_finite(sums["loss"], "loss", step, batches)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), section.max_grad_norm)
        self._check_finite(norm, "gradient", step, batches)
        if self._learned:
            norm_selector = accelerator.clip_grad_norm_(self._learned, section.max_grad_norm)
            self._check_finite(norm_selector, "selector's gradient", step, batches)
        factor = rate_factor(
            step,
            self.inputs.num_steps,
            warmup_ratio=section.warmup_ratio,
            floor=section.min_lr_ratio,
        )
        set_rate(self._optimizer, factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        line = {"step": step + 1, "num_steps": self.inputs.num_steps}
        line |= self._figures(sums, totals)
        seconds = time.monotonic() - started
        return line | {
            "lr": section.lr * factor,
            "tokens_per_s": totals.labels / seconds,
            "seconds": seconds,
            "grad_norm": float(norm),
        }

    def _totals(self, batches: list[Batch]) -> StepTotals:
        """Counts of the whole step over all processes, before anything is divided by them."""
        counts = torch.zeros(2, dtype=torch.float64)
        importance_M = None
        balanced = self.inputs.section.feedback_weight > 0
        for batch in batches:
            at = batch.label_rows()
            counts[0] += len(at[0])
            if batch.sources is None:
                continue
            known = ~batch.sources.label_logprobs_BTM[at].isnan() & batch.sources.covered_BTM[at]
            counts[1] += int(known.any(-1).sum())
            if balanced and isinstance(self.selector, AdaptiveSelector):
                part_M = importance(self.selector, batch)
                importance_M = part_M if importance_M is None else importance_M + part_M
        if self._accelerator.num_processes > 1:
            counts = self._accelerator.reduce(counts.float().to(self._accelerator.device))
            if importance_M is not None:
                importance_M = self._accelerator.reduce(importance_M)
        labels, pool_rows = (int(count) for count in counts.tolist())
        return StepTotals(max(labels, 1), pool_rows, importance_M)

    def _figures(self, sums: Sums, totals: StepTotals) -> dict[str, Any]:
        """The log line's losses and weights; sums become means here and nowhere else."""
        labels = totals.labels
        loss, clm = float(sums["loss"]) / labels, float(sums["clm"]) / labels
        if "fusion" not in sums:
            return {"loss": loss, "clm": clm}
        section, names = self.inputs.section, self.inputs.stream.samples.sources
        covered, pool = float(sums["covered"]), float(sums["pool"]) / max(totals.pool_rows, 1)
        feedback = float(importance_cv2(sums["weights_GM"].sum(0)))
        if isinstance(self.selector, AdaptiveSelector):
            loss += section.feedback_weight * feedback
            loss += section.pool_weight * pool if section.asn.objective != "fusion" else 0.0
        weights_M = (sums["weights_GM"].sum(0) / max(covered, 1.0)).tolist()
        by_domain = (sums["weights_GM"] / sums["covered_G"].clamp(min=1)[:, None]).tolist()
        self._warn_of_collapse(dict(zip(names, weights_M, strict=True)))
        return {
            "loss": loss,
            "clm": clm,
            "fusion": float(sums["fusion"]) / max(covered, 1.0),
            "feedback": feedback,
            "pool": pool,
            "uncovered": 1.0 - covered / labels,
            "weights": dict(zip(names, weights_M, strict=True)),
            "weights_by_domain": {
                domain: dict(zip(names, row, strict=True))
                for domain, row, rows in zip(
                    self.inputs.stream.domains, by_domain, sums["covered_G"].tolist(), strict=True
                )
                if rows
            },
        }

    def _warn_of_collapse(self, weights: dict[str, float]) -> None:
        self._heard.append(weights)
        if len(self._heard) < COLLAPSE_STEPS:
            return
        means = {name: sum(step[name] for step in self._heard) / COLLAPSE_STEPS for name in weights}
        gone = [name for name, weight in means.items() if weight < COLLAPSE_SHARE]
        learned = isinstance(self.selector, AdaptiveSelector)
        if gone and learned and not self._warned and self._accelerator.is_main_process:
            self._warned = True
            logger.warning(
                "the selector hardly hears %s any more (mean weight below %g); "
                "raise train.feedback_weight if that is not wanted",
                ", ".join(gone),
                COLLAPSE_SHARE,
            )

    def _check_finite(
        self, value: torch.Tensor, what: str, step: int, batches: list[Batch]
    ) -> None:
        if not bool(torch.isfinite(value).all()):
            names = [name for batch in batches for name in batch.segment_ids]
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ModelError(
                f"{what} is not finite; the step was not taken",
                where=f"train {self.inputs.label}, step {step + 1}, segments {shown}",
                got=float(value),
                hint="lower train.lr, or look at these segments; a rerun goes on from the last "
                "checkpoint",
            )

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Score the valid split, note it, and keep the weights if they are the best so far."""
        section, valid = self.inputs.section, self.inputs.valid
        if valid is None:
            if line["step"]:
                self.inputs.log.write(line)
            return
        bpb = valid_bpb(
            self.model,
            valid,
            self._accelerator,
            batch_segments=section.micro_batch_segments,
            head_chunk_rows=section.head_chunk_rows,
        )
        line["valid_bpb"] = bpb
        self.inputs.log.write(line)
        here = BestRecord(step=line["step"], bpb=bpb)
        if here.step == 0:
            self._set(before=bpb)
        if self.state.best is None or here.mean < self.state.best.mean:
            self._set(best=here)
            if section.keep_best and here.step and self._accelerator.is_main_process:
                folder = best_folder(self.inputs.checkpoints, here.step)
                publish_folder(folder, self.model.save_pretrained)
            self._accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            save_checkpoint(
                self.inputs.checkpoints,
                self.state,
                self.model,
                self.inputs.tokenizer.hf,
                self._optimizer,
                self.selector,
                limit=self.inputs.section.save_total_limit,
            )
        self._accelerator.wait_for_everyone()

    def _set(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)

    def _any(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self._accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag) > 0)


def _seed_step(seed: int, step: int, process: int) -> None:
    """Generators (dropout) depend on the step alone, so a resumed run draws what it would have."""
    state = np.random.SeedSequence([seed, step, process]).generate_state(1)
    torch.manual_seed(int(state[0]))


def _readable(line: dict[str, Any], total: int) -> str:
    parts = [f"step {line['step']}/{total}", f"loss {line['loss']:.4f}", f"clm {line['clm']:.4f}"]
    if "fusion" in line:
        parts += [f"fusion {line['fusion']:.4f}", f"pool {line['pool']:.4f}"]
        shown = " ".join(f"{name} {weight:.2f}" for name, weight in line["weights"].items())
        parts += [f"uncovered {line['uncovered']:.1%}", f"weights {shown}"]
    parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,.0f} tok/s"]
    if "valid_bpb" in line:
        shown = " ".join(f"{name} {value:.4f}" for name, value in line["valid_bpb"].items())
        parts.append(f"valid bpb {shown}")
    return "  ".join(parts)
