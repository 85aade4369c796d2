"""Pairwise fusion: one training for each pair of pivot and source; the trained models are merged.

Source: FuseChat (2408.07990). Each pair is a run of its own over the same data, in `pairs/<source>` of
the run's folder, so that it is stopped, resumed and submitted by itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fuse_train.config import TrainSection
from fuse_train.disk.folders import sweep
from fuse_train.inputs import final_folder
from fuse_train.publish.done import CONFIG_FILE, DONE_FILE, DoneRecord, read_done
from launch.progress import Progress
from store_schema.config import RunConfig
from store_schema.disk.sealed import seal
from store_schema.errors import ConfigError
from store_schema.fingerprint import fingerprint
from store_schema.model.models import resolve_model

_COPIED = ("generation_config.json",)
"""Files copied from a pair's final folder, where they were corrected for the target."""


def pair_runs(run: RunConfig, section: TrainSection) -> dict[str, RunConfig]:
    """The run of each pair, by the source that is fused with the pivot.

    Raises:
        ConfigError: The pivot is none of the sources, or is alone.
    """
    pairwise = section.pairwise
    if pairwise is None:
        raise TypeError("a run without pairwise has no pairs")
    partners = [name for name in run.sources if name != pairwise.pivot]
    if len(partners) == len(run.sources) or not partners:
        raise ConfigError(
            "the pivot must be one of two sources or more",
            where="train.pairwise.pivot",
            expected=", ".join(run.sources),
            got=pairwise.pivot,
            hint="name the source that is the target itself, such as `base: target` under sources",
        )
    # A pair's folder has no stores: those of the run are used, wherever they are.
    folders = {run.aligned_url(name).rpartition("/")[0] for name in run.sources}
    aligned_folder = folders.pop() if len(folders) == 1 else None
    own = section.model_copy(update={"pairwise": None, "control": False, "push_to_hub": None})
    return {
        name: run.model_copy(
            update={
                "name": f"{run.name}-{name}",
                "run_dir": f"{run.folder}/pairs/{name}",
                "data_dir": run.data_folder,
                "aligned_dir": aligned_folder,
                "sources": {kept: run.sources[kept] for kept in (pairwise.pivot, name)},
                "sections": run.sections | {"train": own},
            }
        )
        for name in partners
    }


def merge_pairs(run: RunConfig, section: TrainSection, pairs: dict[str, Path]) -> tuple[Path, bool]:
    """Merge the models of all pairs into the run's final folder, with the target as base.

    Args:
        run: The run.
        section: Its train section.
        pairs: Final folder of each pair.

    Returns:
        The final folder, and whether it was made now.

    Raises:
        MismatchError: The final folder holds another model.
        ModelError: The pairs' models cannot be merged.
        StorageError: A file cannot be written.
    """
    pairwise = section.pairwise
    if pairwise is None:
        raise TypeError("a run without pairwise has nothing to merge")
    recipe, out = pairwise.merge, final_folder(run, "fused")
    done = {name: _finished(folder) for name, folder in pairs.items()}
    expected = fingerprint(
        {
            "merge": recipe.content(),
            "pairs": {name: record.fingerprint for name, record in done.items()},
        }
    )
    sweep(out.parent)
    if read_done(out, expected) is not None:
        return out, False
    from fuse_train.merge.run import merge_models

    first = next(iter(pairs.values()))
    record = _record(expected, list(done.values()))

    def write_other_files(place: Path) -> None:
        for name in _COPIED:
            if (first / name).is_file():
                shutil.copyfile(first / name, place / name)
        (place / CONFIG_FILE).write_text(run.resolved(), encoding="utf-8")
        (place / DONE_FILE).write_bytes(seal(record))

    bar: list[Progress] = []

    def on_bytes(done: int, total: int) -> None:
        if not bar:
            bar.append(Progress("merge pairs", total, unit="B"))
        bar[0].add(done)

    models = [str(folder) for folder in pairs.values()]
    recipe.require_models(len(models), with_base=recipe.kind.needs_base)
    base = str(resolve_model(run.target)) if recipe.kind.needs_base else None
    merge_models(out, recipe, models, base, write_extra=write_other_files, on_bytes=on_bytes)
    if bar:
        bar[0].__exit__(None, None, None)
    return out, True


def _record(fingerprint: str, pairs: list[DoneRecord]) -> DoneRecord:
    """Record of the merged model: steps and seconds of all pairs; it is not evaluated."""
    return DoneRecord(
        fingerprint=fingerprint,
        label="fused",
        num_steps=sum(record.num_steps for record in pairs),
        step=sum(record.step for record in pairs),
        before=pairs[0].before,
        after=None,
        seconds=sum(record.seconds for record in pairs),
    )


def _finished(folder: Path) -> DoneRecord:
    record = read_done(folder)
    if record is None:
        raise TypeError(f"{folder} is not finished")
    return record
