"""`train check`: does training accept run file and target? Asked before there is any data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from fuse_train.config import TrainSection
from fuse_train.loop.objective import reference_index
from fuse_train.loop.optimizer import build_optimizer
from fuse_train.loop.schedule import rate_schedule
from fuse_train.loop.trackers import tracker_names
from fuse_train.machine.launchers import check_launcher, check_parallel
from fuse_train.model.adapters import check_lora
from fuse_train.model.models import own_dtype
from fuse_train.model.target import load_target
from fuse_train.publish.dry_save import dry_save
from fuse_train.stages_config import check_stages
from store_schema.config import RunConfig
from store_schema.text.tokenizer import SegmentTokenizer

_SOME_STEPS = 100
"""Stands in for a number of steps that depends on data; any would do to check a schedule."""


def check_recipe(run: RunConfig) -> None:
    """Load the target as `train run` would, and try optimizer, schedule, adapters, packing, last save.

    Needs neither plan nor stores; one step is not tried.

    Raises:
        ConfigError: Options that cannot work, here or with this target.
        ModelError: The target cannot be loaded, trained or saved.
        TokenizerError: Its tokenizer cannot be used.
    """
    section = run.section("train", TrainSection)
    check_stages(run, section.stages)
    check_launcher()
    check_parallel(section)
    tracker_names(section)
    if section.lora is not None:
        check_lora(section.lora)
    sources = list(run.sources)
    reference_index(section, sources)
    kind = section.selector_kind
    if kind.by_rule:
        kind.make(section.options_of(kind), sources)
    for recipe in [section] + ([section.control_section()] if section.control else []):
        rate_schedule(recipe, recipe.max_steps or _SOME_STEPS)
    tokenizer = SegmentTokenizer.load(run.target, name="target")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(
        run.target, tokenizer, section, checkpoint=None, seed=run.seed, device=device
    )
    build_optimizer(target.model, [], section)

    def write(place: Path, save_weights: Any) -> None:
        save_weights(place)
        tokenizer.save_pretrained(place)

    with tempfile.TemporaryDirectory() as place:
        dtype = own_dtype(run.target)
        dry_save(Path(place), target.model, run.target, dtype, section.lora, write)
