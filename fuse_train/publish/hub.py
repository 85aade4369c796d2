"""Uploading a final folder to the Hugging Face Hub, once.

`pushed.json` beside the final folder says what was uploaded where; a rerun uploads only a model that
is new or whose upload failed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import StorageError

PUSHED_FILE = "pushed.json"
_CARD = "README.md"
_RUN_FILE = "run.yaml"


def push_final(folder: Path, repo: str, *, private: bool, fingerprint: str) -> bool:
    """Upload a final folder unless it was uploaded before.

    The run file is not uploaded (it names local folders), and the card's list of base models keeps only
    names of the hub, since the hub refuses others.

    Args:
        folder: Final folder.
        repo: "owner/name", or a name in the user's own account.
        private: Whether a new repository is private.
        fingerprint: Fingerprint of the final folder.

    Returns:
        Whether anything was uploaded.

    Raises:
        StorageError: The hub refused or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Any error of the HTTP client that the hub's package uses.
    client_error: Any = HfHubHTTPError.__bases__[0]
    marker = folder.parent / PUSHED_FILE
    record = {"fingerprint": fingerprint, "repo": repo}
    if _read(marker) == record:
        return False
    try:
        api = HfApi()
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        card = hub_card((folder / _CARD).read_text(encoding="utf-8"))
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=[_CARD, _RUN_FILE],
            commit_message="Model trained with logitfuse",
        )
        api.upload_file(
            repo_id=name,
            path_or_fileobj=card.encode(),
            path_in_repo=_CARD,
            commit_message="Model card",
        )
    except (client_error, HFValidationError, OSError, ValueError) as error:
        raise StorageError(
            "the hub refused the model",
            where=repo,
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint=f"the model is complete in {folder}; log in (`hf auth login`) and rerun to upload it",
        ) from error
    with storage_errors(str(marker)):
        marker.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return True


def hub_card(card: str) -> str:
    """The card without base models that are not on the hub."""
    _, front, text = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    kept = [name for name in fields["base_model"] if _of_hub(name)]
    if kept:
        fields["base_model"] = kept
    else:
        del fields["base_model"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n{text}"


def _of_hub(name: str) -> bool:
    return not Path(name).exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
