"""The error for a single bad document, which may be dropped and counted instead of raised."""

from __future__ import annotations

from typing import Any

from store_schema.errors import InputError


class DocumentError(InputError):
    """A document that cannot be used; `reason` is the key under which it is counted."""

    def __init__(self, what: str, *, reason: str, **facts: Any) -> None:
        super().__init__(what, **facts)
        self.reason = reason
