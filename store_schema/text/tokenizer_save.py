"""Save a model's tokenizer files so that AutoTokenizer tokenises as in training."""

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
"""The class that uses tokenizer.json unchanged; all versions of transformers know this name."""

_BESIDE = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip

_log = logging.getLogger(__name__)


def copy_files(source: Path, folder: Path) -> None:
    """Copy tokenizer.json and the files that belong to it, byte for byte.

    Files that tokenizer.json was made from (vocab.txt, tokenizer.model, tekken.json) are not copied,
    since some loaders would use them instead.
    """
    for name in (TOKENIZER_FILE, *_BESIDE):
        path = source / name
        if path.is_dir():
            shutil.copytree(path, folder / name, dirs_exist_ok=True)
        elif path.exists():
            shutil.copyfile(path, folder / name)


def write_start(folder: Path, start: Tokens, end: Tokens) -> None:
    """Change a folder's tokenizer files so that `start` is put before a text and `end` after it.

    transformers 5 reads this from tokenizer.json only, transformers 4 and converters to other formats
    from tokenizer_config.json too.
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
    """Change tokenizer_config.json until AutoTokenizer tokenises as tokenizer.json does; log a warning
    if no change helps.

    Args:
        folder: Folder with tokenizer files, and config.json if it is a whole model's.
    """

    def read() -> Tokenizer:
        return read_backend(folder / TOKENIZER_FILE, name=folder.name)

    truth = read()
    start = starting_tokens(truth)
    changes: list[dict[str, Any]] = [
        {},
        {"tokenizer_class": GENERIC_CLASS},
        # Models of some types always get their family's class, unless they name Python code of their
        # own. Code that is not trusted is ignored, and the class named with it is used.
        {"auto_map": {"AutoTokenizer": [None, f"tokenization.{GENERIC_CLASS}"]}},
    ]
    named = _config(folder).get("tokenizer_class")
    differences: list[str] = []
    for change in changes:
        if change:
            _change_config(folder, **change)
        try:
            reading = read_class(folder, truth, name=folder.name)
        except ModelError as error:
            differences = [error.line()]
            continue
        differences = reading.differences(truth, start, read)
        if not differences:
            return
    _change_config(folder, tokenizer_class=GENERIC_CLASS, auto_map=None)
    _log.warning(
        "%s: AutoTokenizer tokenises %s differently than in training (class %s); "
        "load this folder with transformers.%s",
        folder, ", ".join(differences), named, GENERIC_CLASS,
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _change_config(folder: Path, **changes: Any) -> None:
    """Set keys of tokenizer_config.json; None removes a key."""
    content = {
        k: v for k, v in (_config(folder) | changes).items() if v is not None or k not in changes
    }
    text = json.dumps(content, ensure_ascii=False, indent=2)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
