"""The training loop: resumable at every step, stopped before a step that is not finite.

Shape suffixes: M sources.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuse_train.data.batch import Batch, to_device
from fuse_train.gate.first_reading import FirstReadings
from fuse_train.loop.checkpoint import (
    PREVIOUS_CHECKPOINT_HINT,
    BestRecord,
    TrainState,
    best_folder,
    save_checkpoint,
)
from fuse_train.loop.figures import CollapseWatch, readable, step_figures
from fuse_train.loop.layout import Layout
from fuse_train.loop.loop_inputs import LoopInputs
from fuse_train.loop.objective import FusionObjective, StepTotals, Sums, importance
from fuse_train.loop.optimizer import build_optimizer
from fuse_train.loop.schedule import (
    progress_at,
    rate_schedule,
    set_rate,
    steps_between_checkpoints,
)
from fuse_train.loop.trackers import numbers
from fuse_train.loop.validation import valid_scores
from fuse_train.machine.memory_fit import fitting_size, free_memory, memory_errors
from fuse_train.machine.processes import progress_stream
from fuse_train.model.target import Target
from fuse_train.selectors.selectors import Selector
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.errors import ConfigError, ModelError
from store_schema.model.out_of_memory import is_out_of_memory


class TrainingLoop:
    """One run of the target, from a state to the last step.

    Args:
        inputs: Data, recipe, folders.
        target: The model to train.
        selector: None for ground truth alone.
        state: State to begin with.
        layout: Where model and optimizer are.
        resume_from: Checkpoint to load the optimizer from, None at the start.
    """

    def __init__(
        self,
        inputs: LoopInputs,
        target: Target,
        selector: Selector | None,
        state: TrainState,
        layout: Layout,
        resume_from: Path | None,
    ) -> None:
        self.inputs, self.target, self.selector = inputs, target, selector
        self.state, self._layout, self._accelerator = state, layout, layout.accelerator
        self._model = target.model
        learned = list(selector.parameters()) if selector is not None else []
        self._plain_objective = FusionObjective(
            self._model, selector, inputs.section, inputs.stream.samples.sources
        )
        optimizer = build_optimizer(self._model, learned, inputs.section)
        self._optimizer = layout.prepare(self._plain_objective, optimizer, resume_from)
        self._learned = learned
        self._watch = CollapseWatch()
        self._saved_every = steps_between_checkpoints(inputs.section, inputs.num_steps)
        self._rate = rate_schedule(inputs.section, inputs.num_steps)
        if selector is not None and inputs.reads_again:
            self._plain_objective.readings = FirstReadings()
        if resume_from is not None and self._plain_objective.readings is not None:
            self._plain_objective.readings = FirstReadings.load(
                resume_from / "trainer", hint=PREVIOUS_CHECKPOINT_HINT
            )

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        patience = self.inputs.section.early_stopping_patience
        stale = patience is not None and self.state.stale >= patience
        return stale or self.state.step >= self.inputs.num_steps

    def run(self, stop: StopFlag) -> None:
        """Train to the last step, evaluating, logging and saving on the way.

        Raises:
            ModelError: A loss or gradient that is not finite; nothing was changed by that step.
            ConfigError: A micro-batch does not fit in memory; says how many segments would.
            Stopped: A signal requested to stop; a checkpoint was saved.
            StorageError: The disk refused a checkpoint or the log.
        """
        inputs = self.inputs
        inputs.log.start(self.state.step)
        if self.state.step == 0:
            line: dict[str, Any] = {"step": 0}
            self._evaluate(line)
            if len(line) > 1:
                inputs.log.write(line)
                self._accelerator.log(numbers(line), step=0)
        if self.over:
            return
        self._model.train()
        first, total = self.state.step, inputs.num_steps
        started, seconds_before = time.monotonic(), self.state.seconds
        if first and self._accelerator.is_main_process:
            print(f"train {inputs.label} goes on after step {first:,} of {total:,}", flush=True)
        bar = Progress(
            f"train {inputs.label}", total, unit="step", done=first, stream=progress_stream()
        )
        with closing(inputs.stream.batches(first, total)) as batches, bar as progress:
            while not self.over:
                requested = time.monotonic()
                line = self._step(self.state.step, next(batches), requested)
                self._set(seconds=seconds_before + time.monotonic() - started)
                progress.add(1, f"loss {line['loss']:.3f}")
                self._after_step(line, stop)

    def _after_step(self, line: dict[str, Any], stop: StopFlag) -> None:
        """Evaluate, log and save if due after this step; stop if a signal asked for it."""
        inputs, section, done = self.inputs, self.inputs.section, self.state.step
        due = section.eval_every is not None and done % section.eval_every == 0
        if due or done == inputs.num_steps:
            self._evaluate(line)
        if self.over:
            line["num_steps"] = done  # also where it ends early
        inputs.log.write(line)
        self._accelerator.log(numbers(line), step=done)
        if self._accelerator.is_main_process and (done % section.log_every == 0 or self.over):
            print(readable(line, inputs.num_steps), flush=True)
        stopping = self._stopping(stop)
        if stopping or self.over or done % self._saved_every == 0:
            self._save()
            stop.progressed = True
        if stopping and not self.over:
            self._accelerator.wait_for_everyone()
            stop.check()

    def _step(self, step: int, batches: list[Batch], requested: float) -> dict[str, Any]:
        """Take one optimizer step and return its line for the log.

        Args:
            step: Number of the step, from 0.
            batches: Micro-batches of this process.
            requested: time.monotonic() before `batches` were made.
        """
        section, accelerator = self.inputs.section, self._accelerator
        waited = time.monotonic() - requested
        _seed_step(self.inputs.seed, step, accelerator.process_index)
        batches = [to_device(batch, accelerator.device) for batch in batches]
        stage = self.inputs.stream.order.stage_at(step)
        self._plain_objective.at_progress(progress_at(step, self.inputs.num_steps), stage)
        self._plain_objective.fusion_shares = self.state.fusion_shares
        totals = self._totals(batches)
        parts = self._gradients(step, batches, totals)
        sums = _added(parts)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums)
        if not bool(torch.isfinite(sums["loss"])):
            faulty = [
                batch
                for batch, part in zip(batches, parts, strict=True)
                if not bool(torch.isfinite(part["loss"]))
            ]
            raise self._not_finite(sums["loss"], "loss", step, faulty)
        norm = self._layout.clip(list(self._model.parameters()), section.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise self._not_finite(norm, "gradient", step, batches)
        if self._learned:
            of_selector = self._layout.clip(self._learned, section.max_grad_norm)
            if not bool(torch.isfinite(of_selector)):
                raise self._not_finite(of_selector, "selector's gradient", step, batches)
        factor = self._rate(step)
        set_rate(self._optimizer, factor)
        with memory_errors(
            f"state of optimizer {section.optim}",
            where=f"train {self.inputs.label}, step {step + 1}",
            hint="set train.optim to adafactor, which keeps less, or train.lora",
        ):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._plain_objective.readings is not None:
            self._plain_objective.readings.share(accelerator)
        seconds = time.monotonic() - requested
        done = step + 1
        self._set(step=done, next_sample=done * section.batch_segments)
        line: dict[str, Any] = {"step": done, "num_steps": self.inputs.num_steps}
        number = self.inputs.stream.order.number_at(step)
        if number is not None:
            line["stage"] = number + 1
        line |= self._figures(sums, totals)
        return line | {
            "lr": section.lr * factor,
            "tokens_per_s": totals.labels / seconds,
            "seconds": seconds,
            "wait_seconds": waited,
            "grad_norm": float(norm),
        }

    def _gradients(self, step: int, batches: list[Batch], totals: StepTotals) -> list[Sums]:
        """Sums of each micro-batch; gradients are added up in the parameters."""
        try:
            return self._layout.gradients(batches, totals)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0][:160]
        raise self._too_large(step, totals, reason)

    def _too_large(self, step: int, totals: StepTotals, reason: str) -> ConfigError:
        stream, device = self.inputs.stream, self._accelerator.device
        failed = min(self.inputs.section.micro_batch_segments, len(stream.step_refs(step)))
        self._optimizer.zero_grad(set_to_none=True)

        def attempt(size: int) -> None:
            # The last micro-batch has the longest segments.
            batch = to_device(stream.step_batches(step, micro_batch_segments=size)[-1], device)
            try:
                loss, _ = self._plain_objective(batch, totals)
                self._accelerator.backward(loss)
            finally:
                self._optimizer.zero_grad(set_to_none=True)

        size = fitting_size(failed, attempt) if self._layout.can_probe else failed // 2
        free_memory()
        fits = "which fits" if self._layout.can_probe else "or less"
        hint = f"set train.micro_batch_segments to {size}, {fits}"
        if size == 0:
            hint = (
                "not even one segment fits: set train.gradient_checkpointing, a smaller "
                "train.head_chunk_rows, or plan with a smaller max_tokens"
            )
        return ConfigError(
            "micro-batch does not fit in memory",
            where=f"train {self.inputs.label}, step {step + 1}",
            got=f"{failed} segments ({reason})",
            hint=hint,
        )

    def _totals(self, batches: list[Batch]) -> StepTotals:
        """Counts of the whole step over all processes, before anything is divided by them."""
        counts = torch.zeros(2, dtype=torch.float64)
        importance_M = None
        balanced = self._plain_objective.weights.feedback_weight > 0
        for batch in batches:
            at = batch.label_rows()
            counts[0] += len(at[0])
            if batch.sources is None:
                continue
            known = ~batch.sources.label_logprobs_BTM[at].isnan() & batch.sources.covered_BTM[at]
            counts[1] += int(known.any(-1).sum())
            if balanced and self.selector is not None and self.selector.learns:
                part_M = importance(self.selector, batch)
                importance_M = part_M if importance_M is None else importance_M + part_M
        if self._accelerator.num_processes > 1:
            counts = self._accelerator.reduce(counts.to(self._accelerator.device))
            if importance_M is not None:
                importance_M = self._accelerator.reduce(importance_M)
        labels, pool_rows = (int(count) for count in counts.tolist())
        return StepTotals(max(labels, 1), pool_rows, importance_M)

    def _figures(self, sums: Sums, totals: StepTotals) -> dict[str, Any]:
        stream, selector = self.inputs.stream, self.selector
        learns = selector is not None and selector.learns
        now = {"feedback_weight": self._plain_objective.weights.feedback_weight}
        figures = step_figures(
            sums,
            totals,
            self.inputs.section.model_copy(update=now),
            sources=stream.samples.sources,
            domains=stream.domains,
            learns=learns,
            pool_trains=selector is not None and selector.pool_trains,
        )
        if learns and "weights" in figures and self._accelerator.is_main_process:
            self._watch.add(figures["weights"])
        return figures

    def _not_finite(
        self, value: torch.Tensor, what: str, step: int, batches: list[Batch]
    ) -> ModelError:
        """The error to raise, alike on all processes, with the segments of all of them."""
        names = [name for batch in batches for name in batch.segment_ids]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            names = gather_object(names)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return ModelError(
            f"{what} is not finite; the step was not taken",
            where=f"train {self.inputs.label}, step {step + 1}, segments {shown}",
            got=float(value),
            hint="lower train.lr, or look at these segments; a rerun goes on from the last "
            "checkpoint",
        )

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Score the valid split, note it in the line, and keep the weights if they are the best."""
        inputs, section, valid = self.inputs, self.inputs.section, self.inputs.valid
        if valid is None:
            return
        size = section.micro_batch_segments
        with memory_errors(
            f"evaluation of {size} segments at a time",
            where=f"train {self.inputs.label}, step {line['step']}",
            hint=f"set train.micro_batch_segments to {max(size // 2, 1)} or less",
        ):
            scores = self._layout.scored(
                lambda: valid_scores(
                    self._model,
                    valid,
                    self._accelerator,
                    batch_segments=size,
                    head_chunk_rows=section.head_chunk_rows,
                    label=None if line["step"] else f"evaluate {inputs.label} untrained",
                    most=self._layout.most,
                )
            )
        line["valid_bpb"] = scores.bpb
        if inputs.held_out is not None and self.selector is not None:
            shares = inputs.held_out.shares(self.selector, scores.row_nats, self._accelerator)
            line["fusion_shares"] = shares
            self._set(fusion_shares=shares)
        here = BestRecord(step=line["step"], bpb=scores.bpb)
        if here.step == 0:
            self._set(before=scores.bpb)
        if self.state.best is not None and here.mean >= self.state.best.mean:
            self._set(stale=self.state.stale + 1)
            return
        self._set(best=here, stale=0)
        if section.keep_best and here.step:
            self._layout.save_best(best_folder(self.inputs.checkpoints, here.step), self.target)

    def _save(self) -> None:
        self._layout.save(
            lambda save_tensors: save_checkpoint(
                self.inputs.checkpoints,
                self.state,
                save_tensors,
                self.inputs.tokenizer,
                self.selector,
                self._plain_objective.readings,
                limit=self.inputs.section.save_total_limit,
            ),
            self.target,
        )

    def _set(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)

    def _stopping(self, stop: StopFlag) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self._accelerator.num_processes == 1:
            return stop.asked
        number = torch.tensor(float(stop.number if stop.asked else 0))
        highest = self._accelerator.gather(number.to(self._accelerator.device)).max()
        if highest > 0 and not stop.asked:
            stop.ask(int(highest))
        return stop.asked


def _added(parts: list[Sums]) -> Sums:
    """Sums of a step from those of its micro-batches."""
    total: Sums = {}
    for part in parts:
        total = {name: total.get(name, 0.0) + value for name, value in part.items()}
    return total


def _seed_step(seed: int, step: int, process: int) -> None:
    """Seed random generators (dropout) by the step, so that a resumed run draws the same numbers."""
    state = np.random.SeedSequence([seed, step, process]).generate_state(1)
    torch.manual_seed(int(state[0]))
