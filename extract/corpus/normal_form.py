"""Unicode's composed normal form (NFC): who reads text so, and documents brought into it.

Some tokenizers (Qwen's) compose characters before they split a text: "e" and a combining accent become
"é". All models must read the same bytes, so where one of a run does so, the corpus is normalised for
all of them. The normaliser is the tokenizers' own: its Unicode is older than Python's, and only what it
leaves alone is sure to be read as it stands.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers.normalizers import NFC

from extract.config import CorpusSection
from extract.corpus.documents import Document, context_json
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ModelError
from store_schema.model.models import local_folder, local_ref

_NORMALISER = NFC()
_UNDECIDED = re.compile(
    "[^\\u0000-\\u02ff\\u0400-\\u0482\\u048a-\\u052f\\u2010-\\u2027\\u2030-\\u205e"
    "\\u3000-\\u3029\\u3030-\\u3098\\u309b-\\u30ff\\u4e00-\\u9fff\\uac00-\\ud7a3]"
)
"""Text without any of these characters is NFC: most is, and need not be normalised to know it."""
_KEY = re.compile(r'(?<!\\)"normalizer"\s*:\s*(?=[{n])')
"""The key of a tokenizer.json, not the word "normalizer" of its vocabulary: that has a number."""


def nfc(text: str) -> str:
    """The text in NFC, as tokenizers read it that normalise so."""
    return _NORMALISER.normalize_str(text) if _UNDECIDED.search(text) else text


def nfc_document(document: Document) -> Document:
    """The document with text and context in NFC; the very same object where they are."""
    text, context = nfc(document.text), document.context
    if context is not None and _UNDECIDED.search(context):
        context = context_json(_in_nfc(json.loads(context)))
    if (text, context) == (document.text, document.context):
        return document
    return replace(document, text=text, context=context)


def _in_nfc(value: Any) -> Any:
    """Parsed JSON with every text in NFC; escaped JSON must not be: a mark would join its escape."""
    if isinstance(value, dict):
        return {key: _in_nfc(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_in_nfc(part) for part in value]
    return nfc(value) if isinstance(value, str) else value


def reads_nfc(ref: ModelRef) -> bool | None:
    """Whether a model's tokenizer normalises to NFC.

    Its tokenizer.json is looked at, not built: a moment, where building takes seconds.

    Returns:
        None where there is no such file or it cannot be had or read (now): other stages complain.
    """
    try:
        path = _tokenizer_file(ref)
        content = None if path is None else path.read_text(encoding="utf-8")
        found = None if content is None else _KEY.search(content)
        if content is None or found is None:
            return None
        return _composes(json.JSONDecoder().raw_decode(content, found.end())[0])
    except (OSError, ValueError, ModelError):
        return None


def _tokenizer_file(ref: ModelRef) -> Path | None:
    ref = local_ref(ref)
    folder = local_folder(ref)
    if folder is not None:
        return folder / "tokenizer.json"
    from transformers.utils import cached_file

    found = cached_file(ref.model, "tokenizer.json", revision=ref.revision)
    return None if found is None else Path(found)


def _composes(normaliser: Any) -> bool:
    if not isinstance(normaliser, dict):
        return False
    steps = normaliser.get("normalizers")
    if isinstance(steps, list):
        return any(map(_composes, steps))
    return normaliser.get("type") == "NFC"


@dataclass
class NormalForm:
    """What is done with the documents of a run that are not NFC.

    The models are asked only when there is such a document: they may be hub names, and far.

    Args:
        run: The run file.
        not_nfc: Documents met so far that are not NFC as they came.
    """

    run: RunConfig
    not_nfc: int = 0

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Models of the run whose tokenizer is known to normalise to NFC."""
        refs = {**self.run.sources, "target": self.run.target}
        return tuple(name for name, ref in refs.items() if reads_nfc(ref))

    @property
    def wanted(self) -> str:
        """nfc | keep."""
        asked = self.run.section("corpus", CorpusSection).unicode
        return asked or ("nfc" if self.readers else "keep")

    def of(self, document: Document) -> Document:
        """The document as it goes into the corpus; counted."""
        normal = nfc_document(document)
        if normal is document:
            return document
        self.not_nfc += 1
        return normal if self.wanted == "nfc" else document

    def record(self) -> dict[str, Any]:
        """What corpus.json says of it."""
        if not self.not_nfc:
            return {"not_nfc": 0}
        found: dict[str, Any] = {"unicode": self.wanted, "not_nfc": self.not_nfc}
        if self.run.section("corpus", CorpusSection).unicode is None:
            found["nfc_readers"] = self.readers
        return found

    def is_met(self, done: str, not_nfc: int | None) -> bool:
        """Whether a corpus is as it would be built now, as far as this goes.

        Args:
            done: nfc | keep, when it was built.
            not_nfc: Documents of it that were not NFC; None in corpora of earlier versions, which
                were kept as they are.
        """
        asked = self.run.section("corpus", CorpusSection).unicode
        if not_nfc == 0 or asked == done:
            return True
        if asked is not None:
            return False
        # Once normalised it stays so: all models read that, also when the one that asked for it goes.
        return not_nfc is None or done == "nfc" or not self.readers
