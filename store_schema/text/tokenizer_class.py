"""Load a model's transformers tokenizer for its special tokens and chat template, and find how it
differs from tokenizer.json.

transformers chooses a class by the model's type and its files, and some classes rebuild the tokenizer
from its vocabulary with their own rules for white space, digits or BOS. So ids are taken from
tokenizer.json, and the class is loaded only for special tokens and chat template: with a vocabulary of
a few dozen pieces (a stand-in), which takes milliseconds.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from store_schema.disk.cache import kept_fact
from store_schema.errors import ModelError
from store_schema.fingerprint import bytes_digest
from store_schema.model.lfs_pointer import require_no_pointer
from store_schema.text.tokenizer_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    without_collector,
)

PROBES = {
    "a space before the text": " Once upon a time",
    "white space": "a  b\t c\r\n\r\n    d \n\n\n e ",
    "digits": "7 42 365 1024 31415 271828 1000000 3.14 2024-11-28",
    "punctuation and contractions": "don't (stop), e.g. WE'LL f(x)[0] != {'a': 1}; /* -- */ ///",
    "letters of other scripts": "na\u00efve \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 \u6f22\u5b57"
    "\u304b\u306a\u4ea4\u3058\u308a\u6587 \ud55c\uad6d\uc5b4 "
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "combined characters": "e\u0301 \u00bd \ufb01 \u2460 \uff21\uff22 \u1112\u1161\u11ab \u00a0\u200b",
    "emoji": "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "capital letters": "HTTPServer McDonald iPhone X\u00c9NON",
}
"""Texts that tokenizers with different rules tokenise differently, by the kind of difference."""

Tokens = tuple[tuple[str, int], ...]

EVERYTHING = "every text"
START = "the start of a text (BOS)"
ADDED = "added tokens"

_COMPANIONS = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges", "unk_token")
_LETTERS = ("a", "\u2581", "\u0120")


@dataclass(frozen=True, slots=True)
class ClassReading:
    """A transformers tokenizer with the stand-in vocabulary.

    Args:
        roles: The tokenizer, for special tokens and chat template. Its ids mean nothing.
        backend: Backend of the class that transformers chooses; None where that cannot be loaded.
        class_name: Name of that class, or the error.
    """

    roles: Any
    backend: Tokenizer | None
    class_name: str

    def differences(
        self, truth: Tokenizer, start: Tokens, again: Callable[[], Tokenizer]
    ) -> list[str]:
        """Kinds of texts that the class tokenises differently than `truth`; [] where they agree.

        Args:
            truth: The tokenizer of tokenizer.json.
            start: Tokens before a text by the run's rule.
            again: Returns a copy of `truth`, on which the class's rules are tried; called if needed.
        """
        theirs = self.backend
        if theirs is None or type(theirs.model) is not type(truth.model):
            return [EVERYTHING]
        kinds = _differing_texts(theirs, truth, again)
        if [token for token, _ in starting_tokens(theirs)] != [token for token, _ in start]:
            kinds.append(START)
        missing = {t.content for t in truth.get_added_tokens_decoder().values() if not t.special}
        missing -= {t.content for t in theirs.get_added_tokens_decoder().values()}
        return [*kinds, ADDED] if missing else kinds


def starting_tokens(backend: Tokenizer) -> Tokens:
    """The tokens that a post-processor puts before a text, each with its id."""
    return around_a_text(backend)[0]


def around_a_text(backend: Tokenizer) -> tuple[Tokens, Tokens]:
    """The tokens that a post-processor puts before and after a text, each with its id."""
    for text in ("a", " ", "1"):
        encoding = backend.encode(text)
        whole = list(zip(encoding.tokens, encoding.ids, strict=True))
        bare = backend.encode(text, add_special_tokens=False)
        plain = list(zip(bare.tokens, bare.ids, strict=True))
        if not plain:  # not in the vocabulary
            continue
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


class Roles:
    """Special tokens and chat template of a folder's tokenizer, as transformers reads them.

    They are kept by the content of its files (see `kept_fact`), but not for a tokenizer class that
    comes with the model. The tokenizer itself is loaded to render a chat.

    Args:
        folder: Folder with tokenizer_config.json and so on; its config.json influences the class.
        backend: The tokenizer of the folder's tokenizer.json.
        name: Name of the model, for messages.
        trust_remote_code: Run a tokenizer class that comes with the model.

    Raises:
        ModelError: transformers cannot read the files beside tokenizer.json.
    """

    def __init__(
        self,
        folder: Path,
        backend: Tokenizer,
        *,
        name: str,
        trust_remote_code: bool = False,
    ) -> None:
        # Some models have thousands of added tokens, of which nothing here needs one.
        stand_in = _few_pieces(backend, with_added=False)
        self._arguments = (folder, stand_in, name, trust_remote_code)
        files = _companions(folder)
        content = [[str(f.relative_to(folder)), bytes_digest(f.read_bytes())] for f in files]
        found = (
            self._names()
            if trust_remote_code
            else kept_fact("roles", [stand_in, content], self._names)
        )
        self.bos_token: str | None = found["bos_token"]
        self.eos_token: str | None = found["eos_token"]
        self.chat_template: Any = found["chat_template"]

    @cached_property
    def _tokenizer(self) -> Any:
        return _read_stand_in(*self._arguments, with_added=False).roles

    def _names(self) -> dict[str, Any]:
        tokens = {name: getattr(self._tokenizer, name, None) for name in ("bos_token", "eos_token")}
        names = {name: None if token is None else str(token) for name, token in tokens.items()}
        return names | {"chat_template": getattr(self._tokenizer, "chat_template", None)}

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        """Render a chat: see transformers."""
        return self._tokenizer.apply_chat_template(*args, **options)


def read_class(
    folder: Path,
    backend: Tokenizer,
    *,
    name: str,
    trust_remote_code: bool = False,
) -> ClassReading:
    """Load the transformers tokenizer of a folder with the stand-in vocabulary and all added tokens.

    Args:
        folder: Folder with tokenizer_config.json and so on; its config.json influences the class.
        backend: The tokenizer of the folder's tokenizer.json.
        name: Name of the model, for messages.
        trust_remote_code: Run a tokenizer class that comes with the model.

    Raises:
        ModelError: transformers cannot read the files beside tokenizer.json.
    """
    stand_in = _few_pieces(backend, with_added=True)
    return _read_stand_in(folder, stand_in, name, trust_remote_code, with_added=True)


def _read_stand_in(
    folder: Path, stand_in: str, name: str, trust_remote_code: bool, *, with_added: bool
) -> ClassReading:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _stand_in(folder, stand_in) as place, _without_warnings():
        if not with_added:
            _drop_added(place / TOKENIZER_CONFIG)
        try:
            picked = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            theirs = getattr(picked, "backend_tokenizer", None)
            if isinstance(theirs, Tokenizer):
                return ClassReading(picked, theirs, type(picked).__name__)
            fault = f"{type(picked).__name__}, which has no tokenizers backend"
        except Exception as error:  # tokenizer classes may raise anything
            fault = f"{type(error).__name__}: {str(error)[:120]}"
        try:
            generic = PreTrainedTokenizerFast.from_pretrained(place)
        except Exception as error:  # as above
            raise ModelError(
                f"tokenizer of {name} cannot be loaded: the files beside {TOKENIZER_FILE} are wrong",
                where=folder,
                got=f"{type(error).__name__}: {str(error)[:160]}",
                hint="correct tokenizer_config.json (and special_tokens_map.json), or fetch them again",
            ) from error
    return ClassReading(generic, None, fault)


@contextmanager
def _stand_in(folder: Path, tokenizer_json: str) -> Iterator[Path]:
    """A temporary folder with copies of the files beside tokenizer.json, and the given
    tokenizer.json."""
    with tempfile.TemporaryDirectory(prefix="logitfuse-") as made:
        place = Path(made)
        for file in _companions(folder):
            require_no_pointer(file)
            copy = place / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        (place / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        yield place


def _companions(folder: Path) -> list[Path]:
    """The files beside tokenizer.json that transformers may read."""
    paths = [*(folder / companion for companion in _COMPANIONS), *sorted(folder.glob("*.py"))]
    return [file for path in paths for file in [path, *sorted(path.glob("*"))] if file.is_file()]


def _drop_added(path: Path) -> None:
    """Empty the list of added tokens in tokenizer_config.json, which transformers prefers to others."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("added_tokens_decoder"):
        path.write_text(json.dumps(content | {"added_tokens_decoder": {}}), encoding="utf-8")


def _few_pieces(backend: Tokenizer, *, with_added: bool) -> str:
    """The stand-in tokenizer.json: the same rules and added tokens, but hardly any pieces."""
    listed = backend.get_added_tokens_decoder() if with_added else {}
    added = [token for _, token in sorted(listed.items())]
    model = model_rules(backend)
    unknown = model.get("unk_token")
    names = list(dict.fromkeys([*([unknown] if unknown else []), *(t.content for t in added)]))
    names += [letter for letter in _LETTERS if letter not in names]
    ids = {token: index for index, token in enumerate(names)}
    if model["type"] == "Unigram":
        model["vocab"] = [[token, 0.0] for token in names]
        model["unk_id"] = ids.get(model.pop("unk_token"))
    else:
        model["vocab"] = ids
    tokens = [token.__getstate__() | {"id": ids[token.content]} for token in added]
    steps = {
        "normalizer": backend.normalizer,
        "pre_tokenizer": backend.pre_tokenizer,
        "post_processor": backend.post_processor,
        "decoder": backend.decoder,
    }
    rules = {part: None if s is None else json.loads(s.__getstate__()) for part, s in steps.items()}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    return json.dumps(spec | rules | {"model": model}, ensure_ascii=False)


def model_rules(backend: Tokenizer) -> dict[str, Any]:
    """The model part of tokenizer.json without its pieces."""
    model = backend.model
    kind = type(model).__name__
    if kind == "BPE":
        # Without `__getstate__`, which would write the whole vocabulary and all merges.
        fields = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", *_FLAGS)
        return {"type": kind, "merges": []} | {field: getattr(model, field) for field in fields}
    with without_collector():
        state: dict[str, Any] = json.loads(model.__getstate__())
    pieces = state.pop("vocab")
    if kind == "Unigram":
        unknown = state.get("unk_id")
        state["unk_token"] = None if unknown is None else pieces[unknown][0]
    return state


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers' warnings, which are about the stand-in."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _differing_texts(
    theirs: Tokenizer, truth: Tokenizer, again: Callable[[], Tokenizer]
) -> list[str]:
    """Kinds of `PROBES` that are tokenised differently."""
    same_rules = all(_flag(theirs, flag) == _flag(truth, flag) for flag in _FLAGS)
    if same_rules and all(_parts(theirs, t) == _parts(truth, t) for t in PROBES.values()):
        return []
    # Other splits may give the same tokens, if no merge crosses them.
    tried = again()
    tried.normalizer = theirs.normalizer
    tried.pre_tokenizer = theirs.pre_tokenizer
    for flag in _FLAGS:
        if hasattr(tried.model, flag):
            setattr(tried.model, flag, getattr(theirs.model, flag))
    copy = again()
    return [kind for kind, text in PROBES.items() if _ids(tried, text) != _ids(copy, text)]


def _flag(backend: Tokenizer, flag: str) -> Any:
    return getattr(backend.model, flag, None)


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _parts(backend: Tokenizer, text: str) -> list[str]:
    """The normalised text, split by the pre-tokenizer."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
