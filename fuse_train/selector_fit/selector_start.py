"""The selector that a training starts with: a rule, searched for, resumed, loaded, or pretrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.stream import SampleStream, StreamOptions
from fuse_train.disk.folders import publish_folder
from fuse_train.machine.processes import is_main, progress_stream
from fuse_train.selector_fit.selector_training import (
    known_logprobs,
    new_selector,
    split_batches,
    train_selector,
)
from fuse_train.selectors.by_name import learner
from fuse_train.selectors.features import FEATURES
from fuse_train.selectors.kind import LearnedOptions, SearchedKind
from fuse_train.selectors.selectors import Selector, SourceView
from launch.progress import Progress
from store_schema import __version__
from store_schema.fingerprint import fingerprint


class FrozenSelector(Selector):
    """A trained selector that is not trained further: its weights are buffers, not parameters.

    Args:
        trained: The selector; its parameters are changed into buffers in place.
    """

    def __init__(self, trained: Selector) -> None:
        super().__init__()
        for module in trained.modules():
            for name in list(module._parameters):
                value = module._parameters.pop(name)
                module.register_buffer(name, None if value is None else value.detach())
        self.trained = trained.eval()

    @property
    def hindsight(self) -> bool:
        return self.trained.hindsight

    @property
    def bound(self) -> bool:
        return self.trained.bound

    def forward(self, view: SourceView) -> torch.Tensor:
        weights_BTM: torch.Tensor = self.trained(view)
        return weights_BTM


@dataclass(frozen=True, slots=True)
class SelectorStart:
    """Makes the selector that a training starts with.

    Args:
        section: Train section of the run.
        seed: Seed of the run.
        stream: Stream of the training split; has the sources, and batches for selectors that learn.
        valid: Opens the stores of the split that weights are searched for on.
        device: Device to train on.
        on_step: Called between steps and trials, to check for signals.
        kept_in: Folder where selectors that were trained on the stores alone are kept, by fingerprint;
            None keeps none.
    """

    section: TrainSection
    seed: int
    stream: SampleStream
    valid: Callable[[], AlignedSamples]
    device: torch.device
    on_step: Callable[[], None]
    kept_in: Path | None = None

    def make(self, checkpoint: Path | None = None) -> Selector:
        """The selector, trained or searched for first if the section says so.

        Every process does the same work on the same data, so nothing is communicated.

        Args:
            checkpoint: Folder of a saved selector to resume with, None at the start.

        Raises:
            ConfigError: Weights of unknown sources, or no optuna.
            MissingError: No saved selector there.
            MismatchError: A saved selector that was built with other options.
            ModelError: A loss that is not finite.
        """
        section, kind = self.section, self.section.selector_kind
        options, sources = section.options_of(kind), self.stream.samples.sources
        if kind.by_rule:
            return kind.make(options, sources)
        if isinstance(kind, SearchedKind):
            return self._searched(kind, options)
        selector = untrained(section, self.seed, len(sources))
        if options.frozen:
            selector.load(Path(str(options.start_from)))
            return FrozenSelector(selector)
        if checkpoint is not None:
            selector.load(checkpoint)
        elif options.start_from is not None:
            selector.load(Path(options.start_from))
        elif options.pretrain_steps and options.objective != "fusion":
            return self.trained()
        return selector

    def trained(self) -> Selector:
        """The selector trained on the stores alone, from `start_from` if the section has one.

        If this run's pool estimate, or a training that was stopped, has trained the same one before, it
        is loaded from `kept_in`.
        """
        section, kept = self.section, None
        if self.kept_in is not None:
            name = selector_fingerprint(section, self.seed, self.stream.samples)
            kept = self.kept_in / name[:16]
            if kept.exists():
                loaded = untrained(section, self.seed, len(self.stream.samples.sources))
                loaded.load(kept)
                return loaded.to(self.device).eval()
        selector = self._newly_trained()
        if kept is not None and is_main():
            publish_folder(kept, selector.save)
        return selector

    def _newly_trained(self) -> Selector:
        section, options = self.section, learned_options(self.section)
        alone = pretrain_stream(self.stream, options.pretrain_batch_segments)
        start = None
        if options.start_from is not None:
            start = untrained(section, self.seed, len(alone.samples.sources))
            start.load(Path(options.start_from))
        bar = Progress(
            "train selector", options.pretrain_steps, unit="step", stream=progress_stream()
        )
        with bar as progress:

            def on_step(step: int, nats: float) -> None:
                self.on_step()
                progress.add(1, f"pool {nats:.4f} nats")

            return train_selector(
                alone,
                options,
                learner(section.selector),
                seed=self.seed,
                feedback_weight=section.feedback_weight,
                start=start,
                on_step=on_step,
                device=self.device,
            )

    def _searched(self, kind: SearchedKind, options: Any) -> Selector:
        logprobs_RM = known_logprobs(
            split_batches(self.valid(), self.stream.domains), where=f"selector {kind.name}"
        )
        trials = kind.trials(options)
        with Progress("search weights", trials, unit="trial", stream=progress_stream()) as progress:

            def on_trial(done: int, nats: float) -> None:
                self.on_step()
                progress.add(1, f"pool {nats:.4f} nats")

            return kind.search(options, logprobs_RM, self.seed, on_trial)


def learned_options(section: TrainSection) -> LearnedOptions:
    """Options of the section's selector, which must be one that learns.

    Raises:
        ConfigError: It does not learn.
    """
    options: LearnedOptions = section.options_of(learner(section.selector))
    return options


def untrained(section: TrainSection, seed: int, num_sources: int) -> Selector:
    """An untrained selector of the section, which must be one that learns."""
    return new_selector(learned_options(section), learner(section.selector), seed, num_sources)


def selector_fingerprint(section: TrainSection, seed: int, samples: AlignedSamples) -> str:
    """Fingerprint of recipe, stores and seed of a selector that is trained alone."""
    kind, options = learner(section.selector), learned_options(section)
    recipe = section.model_dump(mode="json", include={kind.field, *kind.made_of})
    content: dict[str, Any] = recipe | {
        "selector": section.selector,
        "feedback_weight": section.feedback_weight,
        "splits": [section.train_split, section.valid_split, section.shuffle_shards],
        "append_eos": samples.append_eos,
        "seed": seed,
        "stores": [[n, reader.manifest.fingerprint()] for n, reader in samples.stores.items()],
        "missing": {name: sorted(shards) for name, shards in samples.missing.items()},
        "features": FEATURES if kind.needs_features(options) else (),
        "by": __version__,
    }
    if section.text_share < 1:
        content["text_share"] = section.text_share
    if options.start_from is not None:
        content["start"] = saved_identity(section, len(samples.sources))
    return fingerprint(content)


def saved_identity(section: TrainSection, num_sources: int) -> str:
    """Fingerprint of the weights in the selector's `start_from`."""
    selector = untrained(section, 0, num_sources)
    selector.load(Path(str(learned_options(section).start_from)))
    return fingerprint({name: t.tolist() for name, t in selector.state_dict().items()})


def pretrain_stream(stream: SampleStream, batch_segments: int) -> SampleStream:
    """The same samples in batches of `batch_segments`, without entries; shares the stream's cache."""
    options = StreamOptions(
        seed=stream.options.seed,
        batch_segments=batch_segments,
        micro_batch_segments=batch_segments,
        shuffle_shards=stream.options.shuffle_shards,
        cache_gib=stream.options.cache_gib,
        text_share=stream.options.text_share,
    )
    return SampleStream(
        stream.samples, options, stream.domains, with_entries=False, cache=stream.cache
    )
