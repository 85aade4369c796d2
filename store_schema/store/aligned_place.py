"""Where the aligned store of a source lies, for a run that uses the data of another.

An alignment belongs to a target and a method. A run with its own of either keeps its aligned stores in
its own folder, beside those of the run whose data it uses; one that asks for the same uses the same.
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
    """The run's own where there is one, else the data's where that is what the run asks for.

    Args:
        run: The run file.
        source: Name of the source.
        manifest: Of the store that is to be there; None goes by the section `align` alone, since
            the target's tokenizer is not known to those who only look.
    """
    own, shared = (f"{folder}/aligned/{source}" for folder in (run.folder, run.data_folder))
    if own == shared or open_location(own).exists(MANIFEST_FILE):
        return own
    if manifest is not None:
        return shared if _is(shared, lambda found: found.request() == manifest.request()) else own
    section = run.sections.get("align")
    asked = {} if section is None else section.content()

    def as_asked(found: Manifest) -> bool:
        return all(found.settings.get(key, value) == value for key, value in asked.items())

    return shared if _is(shared, as_asked) else own


def _is(url: str, wanted: Callable[[Manifest], bool]) -> bool:
    location = open_location(url)
    if not location.exists(MANIFEST_FILE):
        return False
    try:
        return wanted(StoreReader.open(location).manifest)
    except StoreError:
        return False  # told by whoever uses it under its own run's name
