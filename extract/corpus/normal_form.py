"""Convert documents to Unicode's composed normal form (NFC), if a tokenizer of the run does so.

Some tokenizers (Qwen's) compose characters before they split a text: "e" and a combining accent
become "é". All models must read the same bytes, so if one tokenizer does this, the corpus is
normalised for all models. The normaliser is that of the package tokenizers, whose Unicode version is
older than Python's, since text must be what tokenizers leave unchanged.
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
"""Text without any of these characters is in NFC: a fast test, true for most text."""
_KEY = re.compile(r'(?<!\\)"normalizer"\s*:\s*(?=[{n])')
"""The key "normalizer" of tokenizer.json, not the same word in its vocabulary (followed by a
number)."""


def nfc(text: str) -> str:
    """The text in NFC."""
    return _NORMALISER.normalize_str(text) if _UNDECIDED.search(text) else text


def nfc_document(document: Document) -> Document:
    """The document with text and context in NFC; the same object if they already are."""
    text, context = nfc(document.text), document.context
    if context is not None and _UNDECIDED.search(context):
        context = context_json(_in_nfc(json.loads(context)))
    if (text, context) == (document.text, document.context):
        return document
    return replace(document, text=text, context=context)


def _in_nfc(value: Any) -> Any:
    """Parsed JSON with every text in NFC (a combining mark could change escapes of unparsed JSON)."""
    if isinstance(value, dict):
        return {key: _in_nfc(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_in_nfc(part) for part in value]
    return nfc(value) if isinstance(value, str) else value


def reads_nfc(ref: ModelRef) -> bool | None:
    """Whether a model's tokenizer normalises to NFC, by its tokenizer.json alone.

    The tokenizer is not built, which would take seconds.

    Returns:
        None where there is no such file or it cannot be read (later stages report that).
    """
    try:
        path = _tokenizer_file(ref)
        content = None if path is None else path.read_text(encoding="utf-8")
        key = None if content is None else _KEY.search(content)
        if content is None or key is None:
            return None
        return _composes(json.JSONDecoder().raw_decode(content, key.end())[0])
    except (OSError, ValueError, ModelError):
        return None


def _tokenizer_file(ref: ModelRef) -> Path | None:
    ref = local_ref(ref)
    folder = local_folder(ref)
    if folder is not None:
        return folder / "tokenizer.json"
    from transformers.utils import cached_file

    path = cached_file(ref.model, "tokenizer.json", revision=ref.revision)
    return None if path is None else Path(path)


def _composes(normaliser: Any) -> bool:
    """Whether a normaliser of tokenizer.json has the step NFC."""
    if not isinstance(normaliser, dict):
        return False
    steps = normaliser.get("normalizers")
    if isinstance(steps, list):
        return any(map(_composes, steps))
    return normaliser.get("type") == "NFC"


@dataclass
class NormalForm:
    """Normalises the documents of a run if needed, and counts those that are not in NFC.

    The models' tokenizer files are read (and downloaded) only once there is such a document.

    Args:
        run: The run file.
        not_nfc: Number of documents so far that were not in NFC.
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
        """What is done with documents not in NFC: nfc | keep."""
        option = self.run.section("corpus", CorpusSection).unicode
        return option or ("nfc" if self.readers else "keep")

    def of(self, document: Document) -> Document:
        """The document as it is put into the corpus; counts it if it was not in NFC."""
        normal = nfc_document(document)
        if normal is document:
            return document
        self.not_nfc += 1
        return normal if self.wanted == "nfc" else document

    def record(self) -> dict[str, Any]:
        """Its fields of corpus.json (`CorpusRecord`)."""
        if not self.not_nfc:
            return {"not_nfc": 0}
        values: dict[str, Any] = {"unicode": self.wanted, "not_nfc": self.not_nfc}
        if self.run.section("corpus", CorpusSection).unicode is None:
            values["nfc_readers"] = self.readers
        return values

    def is_met(self, done: str, not_nfc: int | None) -> bool:
        """Whether the documents of an existing corpus would be normalised in the same way now.

        Args:
            done: nfc | keep, when it was built.
            not_nfc: Its documents that were not in NFC; None in corpora of earlier versions, which
                did not normalise.
        """
        option = self.run.section("corpus", CorpusSection).unicode
        if not_nfc == 0 or option == done:
            return True
        if option is not None:
            return False
        # A normalised corpus stays valid, even if the model that needed it is no longer in the run.
        return not_nfc is None or done == "nfc" or not self.readers
