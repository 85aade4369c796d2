"""Location of the aligned store of a source, for a run that uses the data of another run.

An alignment depends on target and method. `aligned_dir` names its folder. Without it, a run that has
the same of both uses the aligned stores of the run whose data it uses; any other keeps its aligned
stores in its own folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from store_schema.disk.location import open_location
from store_schema.errors import StoreError
from store_schema.manifest import Manifest
from store_schema.store.reader import MANIFEST_FILE, StoreReader

if TYPE_CHECKING:
    from store_schema.config import RunConfig


def aligned_store_url(run: RunConfig, source: str, manifest: Manifest | None = None) -> str:
    """URL of the store in `aligned_dir` if that is given; else of the run's own aligned store if it
    exists, else of the other run's if it is what this run needs, else of the run's own.

    Args:
        run: The run file.
        source: Name of the source.
        manifest: Manifest of the store that the run needs. None, where the target's tokenizer is not
            loaded: only the settings of section `align` are compared.
    """
    if run.aligned_dir is not None:
        return run.aligned_url(source)
    own, shared = (f"{folder}/aligned/{source}" for folder in (run.folder, run.data_folder))
    if own == shared or open_location(own).exists(MANIFEST_FILE):
        return own
    if manifest is not None:
        return shared if _fits(shared, lambda other: other.request() == manifest.request()) else own
    section = run.sections.get("align")
    wanted = {} if section is None else section.content()

    def same_settings(other: Manifest) -> bool:
        return all(other.settings.get(key, value) == value for key, value in wanted.items())

    return shared if _fits(shared, same_settings) else own


def _fits(url: str, condition: Callable[[Manifest], bool]) -> bool:
    """Whether there is a store whose manifest fulfils a condition."""
    location = open_location(url)
    if not location.exists(MANIFEST_FILE):
        return False
    try:
        return condition(StoreReader.open(location).manifest)
    except StoreError:
        return False  # the run that owns the damaged store reports it
