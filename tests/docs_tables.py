"""Tables of docs/ that come from registries: `python -m tests.docs_tables` writes them again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from align.methods import METHODS
from extract.engine_kinds import ENGINES
from extract.judge_kinds import JUDGES
from fuse_train.divergences import DIVERGENCES
from fuse_train.merge import MERGES
from fuse_train.selectors import SELECTORS
from store_schema.registry import Registry

DOCS = Path(__file__).resolve().parent.parent / "docs"

TABLES: dict[str, tuple[str, Registry[Any]]] = {
    "engines": ("extraction.md", ENGINES),
    "judges": ("judging.md", JUDGES),
    "methods": ("alignment.md", METHODS),
    "selectors": ("training.md", SELECTORS),
    "divergences": ("training.md", DIVERGENCES),
    "merges": ("merging.md", MERGES),
}
"""Mark in the page: the page and where the table comes from."""


def written(mark: str) -> tuple[str, str]:
    """The page as it is, and with its table as the registry has it."""
    page, registry = TABLES[mark]
    before = (DOCS / page).read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, count = place.subn(lambda m: m[1] + registry.markdown() + m[2], before)
    assert count == 1, f"{page} has no place for {mark}"
    return before, after


if __name__ == "__main__":
    for mark, (page, _) in TABLES.items():
        (DOCS / page).write_text(written(mark)[1], encoding="utf-8")
