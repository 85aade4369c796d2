"""The error of one document, which may be dropped and counted instead."""

from __future__ import annotations

from typing import Any

from store_schema.errors import InputError


class DocumentError(InputError):
    """A document that cannot be used; `reason` is the short name it is counted under."""

    def __init__(self, what: str, *, reason: str, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.reason = reason
