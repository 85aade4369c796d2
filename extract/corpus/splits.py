"""Check early that the splits which later stages need have text."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from extract.config import KNOWN_SPLITS
from store_schema.config import RunConfig
from store_schema.errors import InputError


def require_splits(
    run: RunConfig, present: Collection[str], *, where: str, left_out: Mapping[str, int]
) -> list[str]:
    """Check that the splits which later stages need have text, before anything is scored.

    Args:
        run: The run file.
        present: Splits that have text.
        where: Corpus or plan, for messages.
        left_out: Number of documents by split that the run does not use.

    Returns:
        A line for each missing split that only a stage without a section in the run file needs.

    Raises:
        InputError: A section of the run file needs a split that has no text.
    """
    lines = []
    for section in run.sections.values():
        for option, split in section.splits_needed().items():
            if split in present:
                continue
            shown = ", ".join(f"{name} (left out)" for name in left_out)
            got = ", ".join(filter(None, [*present, shown]))
            if section.model_fields_set:
                known = KNOWN_SPLITS.get(split)
                hint = f"add documents of it, map names by corpus.split_names, or set {option} to "
                raise InputError(
                    f"no text of split {split}, which {option} needs",
                    where=where,
                    expected=split,
                    got=got or "no split",
                    hint=f"set {option} to {known}, the name of that split here"
                    if known in present
                    else hint + "another split",
                )
            lines.append(f"no text of split {split}, which {option} needs by default")
    return lines
