"""What a tokenizer is loaded from: a folder's tokenizer.json, or a transformers tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from store_schema.config import ModelRef
from store_schema.errors import ModelError
from store_schema.fingerprint import (
    bytes_digest,
    canonical_json,
    canonical_list,
    canonical_rows,
)
from store_schema.text.specials import text_reader
from store_schema.text.tokenizer_class import Roles, Tokens, model_rules, read_class
from store_schema.text.tokenizer_files import (
    TEKKEN_FILE,
    TOKENIZER_FILE,
    read_backend,
    require_content,
    require_tokenizer_files,
    tokenizer_config,
)
from store_schema.text.tokenizer_save import GENERIC_CLASS, copy_files

_GENERIC_CLASSES = ("TokenizersBackend", GENERIC_CLASS)
"""Classes that follow the folder's files without rules of their own."""


class _Readers:
    """The two tokenizers of a source, shared by all who use it: change neither."""

    def open(self) -> Tokenizer:
        """A new copy of the tokenizer."""
        raise NotImplementedError

    @cached_property
    def whole(self) -> Tokenizer:
        """The tokenizer as it is, which recognises special tokens."""
        return self.open()

    @cached_property
    def text(self) -> Tokenizer:
        """It reads special tokens in a text as text."""
        return text_reader(self.whole)


class FolderSource(_Readers):
    """A model folder with tokenizer.json.

    Args:
        folder: The model's folder.
        name: Name of the model, for messages.
        trust_remote_code: Run a tokenizer class that comes with the model.
    """

    def __init__(self, folder: Path, *, name: str, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._name = name
        self._trust = trust_remote_code

    def open(self) -> Tokenizer:
        """A new copy of the tokenizer."""
        return read_backend(self._folder / TOKENIZER_FILE, name=self._name)

    @cached_property
    def adds_bos(self) -> bool | None:
        """`add_bos_token` in tokenizer_config.json; None where it is not there.

        transformers 5 ignores it if there is a tokenizer.json. Earlier versions, with which models were
        trained, did not.
        """
        value = tokenizer_config(self._folder, name=self._name).get("add_bos_token")
        return value if isinstance(value, bool) else None

    @cached_property
    def roles(self) -> Roles:
        """Special tokens and chat template, as transformers reads them."""
        return Roles(self._folder, self.whole, name=self._name, trust_remote_code=self._trust)

    def read_model(self) -> dict[str, Any]:
        """The model part of tokenizer.json."""
        return _model_of((self._folder / TOKENIZER_FILE).read_bytes())

    def differences(self, start: Tokens) -> tuple[str, list[str]]:
        """The class that transformers chooses, and kinds of texts that it tokenises differently."""
        reading = read_class(
            self._folder, self.whole, name=self._name, trust_remote_code=self._trust
        )
        return reading.class_name, reading.differences(self.whole, start, self.open)

    def save(self, folder: Path) -> None:
        """Copy the files into another folder."""
        copy_files(self._folder, folder)


class ObjectSource(_Readers):
    """A transformers tokenizer, made in memory or converted from other files.

    Args:
        tokenizer: A tokenizer with a `tokenizers` backend.
        adds_bos: Whether its model was trained with BOS before a text; None to follow the tokenizer.
    """

    def __init__(self, tokenizer: Any, *, adds_bos: bool | None = None) -> None:
        self.roles = tokenizer
        self.adds_bos = adds_bos

    def open(self) -> Tokenizer:
        """A copy of its backend."""
        backend = Tokenizer.from_str(self.roles.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return backend

    def read_model(self) -> dict[str, Any]:
        """The model part of its tokenizer.json."""
        return _model_of(self.roles.backend_tokenizer.to_str())

    def differences(self, start: Tokens) -> tuple[str, list[str]]:
        """Its class, and no differences."""
        return type(self.roles).__name__, []

    def save(self, folder: Path) -> None:
        """Save it with transformers."""
        self.roles.save_pretrained(folder)


Source = FolderSource | ObjectSource


def _model_of(tokenizer_json: str | bytes) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(tokenizer_json)["model"]
    return model


def text_rules(source: Source) -> list[bytes]:
    """Everything that determines the ids of a text and the bytes of ids.

    Returns:
        Parts for a fingerprint, each as canonical JSON: the model, its pieces, the other steps, and
        added tokens.
    """
    backend = source.whole
    steps = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    rules = [None if step is None else step.__getstate__().decode() for step in steps]
    added = sorted(backend.get_added_tokens_decoder().items())
    tokens = [[index, token.__getstate__()] for index, token in added]
    return [*_model_rules(source), canonical_json(rules), canonical_json(tokens)]


def _model_rules(source: Source) -> tuple[bytes, bytes]:
    """The parts of `text_rules` on the model and on its pieces."""
    backend = source.whole
    if type(backend.model).__name__ != "BPE":
        state = canonical_json([bytes_digest(backend.model.__getstate__())])
        return state, _in_order(backend.get_vocab(with_added_tokens=False))
    model = source.read_model()
    merges = model.get("merges", [])
    if merges and isinstance(merges[0], str):
        merges = [merge.split(" ") for merge in merges]
    options = canonical_json(sorted(model_rules(backend).items()))
    return canonical_list([options, canonical_rows(merges)]), _in_order(model["vocab"])


def _in_order(pieces: Mapping[str, int]) -> bytes:
    return canonical_rows(sorted(pieces.items(), key=itemgetter(1)))


def converted(folder: Path, ref: ModelRef, *, name: str) -> ObjectSource:
    """Convert other tokenizer files than tokenizer.json with transformers.

    Args:
        folder: Folder with sentencepiece, tiktoken or tekken files, or vocabulary and merges.
        ref: The model in the run file.
        name: Name of the model, for messages.

    Raises:
        ModelError: There are no such files, or transformers cannot convert them.
    """
    require_tokenizer_files(folder, name=name)
    tekken = is_tekken_alone(folder)
    merges = [*folder.glob("vocab.*"), *folder.glob("merges.txt")]
    for path in [folder / TEKKEN_FILE] if tekken else [*folder.glob("*.model")] or merges:
        require_content(path, name=name)
    try:
        made = _of_tekken(folder) if tekken else _of_class(folder, ref, name=name)
    except ModelError:
        raise
    except Exception as error:  # converters and a model's own code may raise anything
        raise ModelError(
            f"tokenizer of {name} cannot be converted",
            where=ref.model,
            expected=f"{TOKENIZER_FILE}, or files that transformers can convert",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint=f"save it as {TOKENIZER_FILE} beside the weights",
        ) from error
    if not isinstance(getattr(made, "backend_tokenizer", None), Tokenizer):
        raise ModelError(
            f"tokenizer of {name} has no fast backend",
            where=ref.model,
            got=type(made).__name__,
            hint=f"save it as {TOKENIZER_FILE} beside the weights",
        )
    # tekken.json does not have the BOS rule; Mistral's library always puts BOS first.
    return ObjectSource(made, adds_bos=True if tekken else None)


def _of_class(folder: Path, ref: ModelRef, *, name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    named = tokenizer_config(folder, name=name).get("tokenizer_class")
    loader = PreTrainedTokenizerFast if named in _GENERIC_CLASSES else AutoTokenizer
    return loader.from_pretrained(folder, trust_remote_code=ref.trust_remote_code)


def _of_tekken(folder: Path) -> Any:
    from transformers.integrations.mistral import convert_tekken_tokenizer

    return convert_tekken_tokenizer(str(folder / TEKKEN_FILE))


def is_tekken_alone(folder: Path) -> bool:
    """Whether Mistral's tekken.json is the only tokenizer file that can be read."""
    alternatives = [*folder.glob("*.model"), *folder.glob("vocab.*"), folder / TOKENIZER_FILE]
    return (folder / TEKKEN_FILE).exists() and not any(path.exists() for path in alternatives)
