"""A model's tokenizer files written again, so that AutoTokenizer reads them as it was trained."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from store_schema.errors import ModelError
from store_schema.text.tokenizer_class import Tokens, read_class, starting_tokens
from store_schema.text.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_FILE, read_backend

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, by a name that all versions of transformers know."""

_BESIDE = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip

_log = logging.getLogger(__name__)


def copy_files(source: Path, folder: Path) -> None:
    """Copy tokenizer.json and what lies beside it to be read with it, byte for byte.

    The files that tokenizer.json was once made from (vocab.txt, tokenizer.model, tekken.json) stay:
    some loaders would take them for the tokenizer.
    """
    for name in (TOKENIZER_FILE, *_BESIDE):
        path = source / name
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        elif path.exists():
            shutil.copyfile(path, folder / name)


def write_start(folder: Path, start: Tokens, end: Tokens) -> None:
    """Let the tokenizer of a folder put `start` before a text, `end` after it.

    transformers 5 looks for this in tokenizer.json alone, transformers 4 and converters to other
    formats in tokenizer_config.json as well.
    """
    path = folder / TOKENIZER_FILE
    spec = json.loads(path.read_text(encoding="utf-8"))
    steps = _steps_without_templates(spec.get("post_processor"))
    if start or end:
        steps.append(_template(start, end))
    spec["post_processor"] = (
        {"type": "Sequence", "processors": steps}
        if len(steps) > 1
        else (steps[0] if steps else None)
    )
    path.write_text(json.dumps(spec, ensure_ascii=False, indent=2), encoding="utf-8")
    _change_config(folder, add_bos_token=bool(start))


def _steps_without_templates(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if post_processor is None:
        return []
    if post_processor["type"] == "Sequence":
        return [s for part in post_processor["processors"] for s in _steps_without_templates(part)]
    return [post_processor] if post_processor["type"] == "ByteLevel" else []


def _template(start: Tokens, end: Tokens) -> dict[str, Any]:
    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def special(token: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": token, "type_id": type_id}}

        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*(special(t) for t, _ in start), text, *(special(t) for t, _ in end)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in [*start, *end]},
    }


def make_faithful(folder: Path) -> None:
    """Change tokenizer_config.json until AutoTokenizer reads a folder as its tokenizer.json says.

    Args:
        folder: With tokenizer files and, of a whole model, config.json.
    """

    def read() -> Tokenizer:
        return read_backend(folder / TOKENIZER_FILE, name=folder.name)

    truth = read()
    start = starting_tokens(truth)
    changes: list[dict[str, Any]] = [
        {},
        {"tokenizer_class": GENERIC_CLASS},
        # Models of some types get their family's class whatever is named, but for those that name
        # code of their own; code that nobody trusts is passed over and the class then taken.
        {"auto_map": {"AutoTokenizer": [None, f"tokenization.{GENERIC_CLASS}"]}},
    ]
    named = _config(folder).get("tokenizer_class")
    found: list[str] = []
    for change in changes:
        if change:
            _change_config(folder, **change)
        try:
            reading = read_class(folder, truth, truth.post_processor, name=folder.name)
        except ModelError as error:
            found = [error.line()]
            continue
        found = reading.differences(truth, start, read)
        if not found:
            return
    _change_config(folder, tokenizer_class=GENERIC_CLASS, auto_map=None)
    _log.warning(
        "%s: AutoTokenizer reads %s otherwise than the model was trained on (class %s); "
        "load this folder with transformers.%s",
        folder, ", ".join(found), named, GENERIC_CLASS,
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _change_config(folder: Path, **changes: Any) -> None:
    """Set keys of tokenizer_config.json; None takes a key out."""
    content = {
        k: v for k, v in (_config(folder) | changes).items() if v is not None or k not in changes
    }
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
