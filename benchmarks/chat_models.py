"""Chat templates to try: published tokenizers', those of `make real`, and shapes of template in words.

Each has two sides that share nothing but files: ours (`SegmentTokenizer`), and plain transformers with
the plain tokenizer of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from store_schema.config import ModelRef, TemplateSettings, load_run
from store_schema.disk.cache_folder import cache_folder
from store_schema.text.tokenizer import SegmentTokenizer
from tests.chat_templates import TEMPLATES, UNSOUND
from tests.published_tokenizers import PACKAGES, tokenizer_folder
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent

RUN_FILES = ("examples/real.yaml", "examples/chat.yaml")
"""Whose models are tried, where their GGUF files were unpacked."""
ENDS = ("<|end|>",)
"""What the shapes in words put behind a turn, besides `</s>`."""

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatModel:
    """A template and its tokenizer, twice.

    Args:
        name: For people.
        ours: As every stage has it.
        theirs: transformers' object.
        tokens: The plain tokenizer.
        settings: What the run file says of the template.
    """

    name: str
    ours: SegmentTokenizer
    theirs: Any
    tokens: Tokenizer
    settings: TemplateSettings

    def whole(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[str]:
        """The chat as plain transformers renders it.

        Templates take calls in one of several forms, so each is tried and those count that write the
        most names of calls; all that do are right.

        Args:
            messages: As OpenAI has them, `reasoning_content` for thoughts.
            tools: Schemas.

        Returns:
            [] where the template refuses them.
        """
        if self.settings.fold_system and messages[0]["role"] == "system":
            system, asked, *rest = messages
            both = f"{system['content']}\n\n{asked['content']}"
            messages = [{"role": "user", "content": both}, *rest]
        own = {} if self.settings.file is None else {"chat_template": self._own}
        found: dict[str, int] = {}
        for as_text in (False, True):
            for empty in ("", None):
                given = [_as_taken(message, as_text, empty) for message in messages]
                try:
                    text = self.theirs.apply_chat_template(
                        given, tools=list(tools) or None, tokenize=False, **own,
                        **self.settings.variables,
                    )  # fmt: skip
                except Exception:  # a template is a program: it raises what it likes
                    continue
                found[text] = sum(text.count(name) for name in _called(messages))
        return [text for text, calls in found.items() if calls == max(found.values())]

    @property
    def _own(self) -> str:
        return Path(str(self.settings.file)).read_text(encoding="utf-8")


def _as_taken(message: Message, as_text: bool, empty: str | None) -> Message:
    import json

    given = dict(message)
    if "reasoning_content" in given:
        given["thinking"] = given["reasoning_content"]
    if given.get("tool_calls"):
        given["content"] = given["content"] or empty
        given["tool_calls"] = [
            call
            | {
                "function": call["function"]
                | {
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    if as_text
                    else call["function"]["arguments"]
                }
            }
            for call in given["tool_calls"]
        ]
    return given


def _called(messages: Sequence[Message]) -> list[str]:
    return [call["function"]["name"] for m in messages for call in m.get("tool_calls") or []]


def published() -> Iterator[tuple[str, ModelRef]]:
    """Published tokenizers that are on this machine, by name."""
    for name in PACKAGES:
        folder = tokenizer_folder(name)
        if folder is not None:
            yield name, ModelRef(model=str(folder))


def of_run_files(files: Sequence[str] = RUN_FILES) -> Iterator[tuple[str, ModelRef]]:
    """Models of run files whose GGUF files lie unpacked in the cache."""
    seen = set()
    for file in files:
        if not (ROOT / file).is_file():
            continue
        run = load_run(ROOT / file)
        for name, ref in {**run.sources, "target": run.target}.items():
            unpacked = sorted((cache_folder() / "gguf").glob(f"{Path(ref.model).stem}-*"))
            key = (ref.model, ref.template.model_dump_json())
            if unpacked and key not in seen:
                seen.add(key)
                newest = max(unpacked, key=lambda folder: folder.stat().st_mtime)
                shown = name if ref.template.file is None else f"{name}, {ref.template.file}"
                yield shown, ref.model_copy(update={"model": str(newest)})


def opened(refs: Mapping[str, ModelRef]) -> tuple[list[ChatModel], list[str]]:
    """Models with a chat template, and the names of those without."""
    models, without = [], []
    for name, ref in refs.items():
        ours = SegmentTokenizer.load(ref, name=name)
        if ours.chat.text is None:
            without.append(name)
            continue
        folder = Path(ref.model)
        theirs = AutoTokenizer.from_pretrained(folder)
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
        models.append(ChatModel(name, ours, theirs, tokens, ref.template))
    return models, without


def in_words(templates: Mapping[str, str] | None = None) -> Iterator[ChatModel]:
    """Shapes of template on a small tokenizer made on the spot.

    Args:
        templates: By name; None takes all, those that cannot be proved too.
    """
    given = TEMPLATES | UNSOUND if templates is None else templates
    for name, text in given.items():
        yield of_text(name, text)
        if "raise_exception('no system')" in text:
            yield of_text(f"{name}, folded", text, fold_system=True)


def of_text(name: str, text: str, **settings: Any) -> ChatModel:
    """A template on a small tokenizer that knows `ENDS`."""
    theirs = tiny_tokenizer("byte_level")
    theirs.add_tokens([AddedToken(end, special=True, normalized=False) for end in ENDS])
    theirs.chat_template = text
    asked = TemplateSettings(**settings)
    ours = SegmentTokenizer(theirs, name=name, template=asked)
    return ChatModel(name, ours, theirs, theirs.backend_tokenizer, asked)
