"""One tokenizer of a run, as every stage uses it: segments in, proved tokens and byte ends out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from store_schema.config import ModelRef
from store_schema.errors import ModelError, TokenizerError
from store_schema.fingerprint import fingerprint
from store_schema.models import local_ref
from store_schema.plan import Segment
from store_schema.vocabulary import Vocabulary, vocabulary_of

_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""What a folder states when tokenizer.json alone says how it splits."""


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A segment as one model reads it.

    Args:
        context_ids: Tokens before the text: BOS, or the rendered prompt. Context, not rows.
        token_ids: [N] uint32 tokens of the text: one row each.
        byte_ends: [N] uint32 end of each token in the text's UTF-8 bytes.
        num_changed: Tokens whose bytes in the vocabulary are not the text's: 0 but where the
            tokenizer changes text and the run's file accepts it.
    """

    context_ids: tuple[int, ...]
    token_ids: npt.NDArray[np.uint32]
    byte_ends: npt.NDArray[np.uint32]
    num_changed: int = 0

    @property
    def input_ids(self) -> list[int]:
        """Everything the model is fed."""
        return [*self.context_ids, *self.token_ids.tolist()]


class SegmentTokenizer:
    """Tokenizer of one model.

    The text of a segment is tokenised by itself, so that it starts at a token boundary for every
    model whatever stands before it. Special tokens spelt out in the text are text.
    """

    def __init__(self, tokenizer: Any, *, name: str, by_offsets: bool = False) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: With a `tokenizers` backend.
            name: Of the model, for messages.
            by_offsets: Accept that it changes text (lower case, NFKC, dropped white space): byte
                ends come from its offsets where the tokens do not join to the text. Such text is
                refused otherwise.

        Raises:
            TokenizerError: It has no `tokenizers` backend, or its bytes are not known.
        """
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(
                "tokenizer has no fast backend",
                where=name,
                got=type(tokenizer).__name__,
                hint="save it as tokenizer.json first",
            )
        self.name = name
        self.hf = tokenizer
        self.json = backend.to_str()
        self.by_offsets = by_offsets
        self._template = Tokenizer.from_str(self.json)
        self._text = Tokenizer.from_str(_without_post_processor(_specials_out_of_reach(self.json)))
        for copy in (self._template, self._text):
            copy.no_padding()
            copy.no_truncation()
        self._text.encode_special_tokens = True
        self.vocabulary: Vocabulary = vocabulary_of(self.json, where=name, exact=not by_offsets)

    @classmethod
    def load(cls, ref: ModelRef, *, name: str) -> SegmentTokenizer:
        """Load the tokenizer of `ref`.

        Args:
            ref: Folder or hub name.
            name: Of the model, for messages.

        Raises:
            ModelError: The folder or hub name has no tokenizer that loads.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        ref = local_ref(ref)
        folder = Path(ref.model)
        tokenizer_files = [*folder.glob("tokenizer*"), *folder.glob("*.model")]
        if folder.is_dir() and not tokenizer_files:
            raise ModelError(
                f"model of {name} has no tokenizer",
                where=ref.model,
                expected="tokenizer.json",
                got=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "empty folder",
                hint="save the tokenizer beside the weights",
            )
        try:
            stated = get_tokenizer_config(ref.model, revision=ref.revision).get("tokenizer_class")
            # The auto class goes by the model's type first and puts that family's pre-tokenizer in
            # place of the one in tokenizer.json, even where the folder names the generic class.
            loader = PreTrainedTokenizerFast if stated in _GENERIC_CLASSES else AutoTokenizer
            tokenizer = loader.from_pretrained(
                ref.model, revision=ref.revision, trust_remote_code=ref.trust_remote_code
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelError(
                f"tokenizer of {name} cannot be loaded",
                where=ref.model,
                got=str(error)[:200],
                hint="give a model folder, or a hub name that this machine can reach",
            ) from error
        loaded = cls(tokenizer, name=name, by_offsets=ref.by_offsets)
        if (folder / "tokenizer.json").exists():
            loaded._require_file(folder / "tokenizer.json")
        return loaded

    def _require_file(self, path: Path) -> None:
        """Refuse a loader that rebuilt the tokenizer instead of reading its file.

        transformers picks some tokenizers by the model's type alone: a Qwen2 model with a Unigram
        tokenizer is read as byte-level BPE, with other ids than the model was trained on.
        """
        try:
            written = json.loads(path.read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError) as error:
            raise TokenizerError("unreadable tokenizer", where=path, got=str(error)) from error
        read = json.loads(self.json)["model"]
        same = read["type"] == written.get("type") and read["vocab"] == written.get("vocab")
        if not same:
            raise TokenizerError(
                "transformers does not read this tokenizer as it was saved",
                where=path,
                expected=f"{written.get('type')} with {len(written.get('vocab', ()))} pieces",
                got=f"{read['type']} with {len(read['vocab'])} pieces ({type(self.hf).__name__})",
                hint="save model and tokenizer under an architecture that goes with this tokenizer",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all that decides ids and byte ends (the serialised tokenizer)."""
        spec = json.loads(self.json)
        for runtime in ("padding", "truncation"):
            spec.pop(runtime, None)
        ends = ["offsets"] if self.by_offsets else []
        return fingerprint([spec, getattr(self.hf, "chat_template", None), *ends])

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return len(self.vocabulary)

    @property
    def eos_id(self) -> int | None:
        """End of sequence, if there is one."""
        eos = self.hf.eos_token_id
        return None if eos is None else int(eos)

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text by its own rule; () when it puts nothing."""
        with_specials = self._template.encode("a").ids
        plain = self._template.encode("a", add_special_tokens=False).ids
        for start in range(len(with_specials) - len(plain) + 1):
            if with_specials[start : start + len(plain)] == plain:
                return tuple(with_specials[:start])
        return ()

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, no special tokens added, specials in the text taken as text."""
        batch = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def read_texts(
        self, texts: Sequence[str], where: Sequence[str]
    ) -> list[tuple[list[int], npt.NDArray[np.uint32]]]:
        """Ids of plain texts as `encode_text` gives them, and the byte end of each token, proved.

        Args:
            texts: Each read whole.
            where: Document or segment of each, for messages.

        Raises:
            TokenizerError: Tokens do not join to a text. With `by_offsets`, only where a part of the
                text has no piece, or a text no token.
        """
        table = self.vocabulary
        if not self.by_offsets:
            return [
                (ids, table.byte_ends(ids, text.encode(), where=place))
                for ids, text, place in zip(self.encode_text(texts), texts, where, strict=True)
            ]
        batch = self._text.encode_batch(list(texts), add_special_tokens=False)
        return [
            (read.ids, table.offset_ends(read.ids, read.offsets, text, where=place))
            for read, text, place in zip(batch, texts, where, strict=True)
        ]

    def token_ends(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Proved byte ends of the tokens of plain texts."""
        where = [f"text, tokenizer of {self.name}"] * len(texts)
        return [ends for _, ends in self.read_texts(texts, where)]

    def encode(self, segments: Sequence[Segment]) -> list[EncodedSegment]:
        """Segments as this model reads them.

        Raises:
            TokenizerError: Tokens of a segment do not join to its text, or a chat has no template.
        """
        encoded = []
        places = [f"segment {s.segment_id}, tokenizer of {self.name}" for s in segments]
        read = self.read_texts([s.text for s in segments], places)
        for segment, (ids, ends), where in zip(segments, read, places, strict=True):
            context = self.context_ids(segment.context, where=where)
            changed = 0
            if self.by_offsets:
                changed = self.vocabulary.num_changed(ids, ends, segment.text.encode())
            encoded.append(EncodedSegment(context, np.asarray(ids, np.uint32), ends, changed))
        return encoded

    def context_ids(self, context: str | None, *, where: str) -> tuple[int, ...]:
        """Tokens that stand before the text.

        Args:
            context: None for plain text; else JSON, {"prompt": text} or {"messages": [...]}.
            where: Segment, for messages.

        Raises:
            TokenizerError: Messages without a chat template, or with one that refuses them or renders
                them to nothing.
        """
        if context is None:
            return self.bos_ids
        parsed = json.loads(context)
        if "prompt" in parsed:
            return (*self.bos_ids, *self.encode_text([parsed["prompt"]])[0])
        if getattr(self.hf, "chat_template", None) is None:
            raise TokenizerError(
                "messages need a chat template",
                where=where,
                hint="use a chat model, or map columns to prompt and response",
            )
        try:
            rendered = self.hf.apply_chat_template(
                parsed["messages"], tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's: it raises what it likes
            raise TokenizerError(
                "the chat template refuses the messages",
                where=where,
                got=f"{type(error).__name__}: {str(error)[:160]}",
                hint="change the messages, or leave such documents out with `corpus.on_bad: drop`",
            ) from error
        ids = tuple(self._template.encode(rendered, add_special_tokens=False).ids)
        if not ids:
            raise TokenizerError("the chat template renders the messages to nothing", where=where)
        return ids


def _specials_out_of_reach(tokenizer_json: str) -> str:
    """The same tokenizer, ids and all, whose model cannot find a special token in a text.

    Telling the backend to take special tokens as text is not enough where they are pieces of the
    model too: Unigram, WordPiece and WordLevel look pieces up by their spelling and would read "</s>"
    in a document as the end of the sequence. Their spelling here begins with NUL, which no document
    may hold. BPE reaches a piece by merges only, and special tokens have none.
    """
    spec = json.loads(tokenizer_json)
    model = spec["model"]
    if model["type"] == "BPE":
        return tokenizer_json
    hidden = {t["content"]: f"\0{t['id']}" for t in spec.get("added_tokens", []) if t["special"]}
    for token in spec.get("added_tokens", []):
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    return json.dumps(spec)


def _without_post_processor(tokenizer_json: str) -> str:
    """The same tokenizer without what it puts around a text: that may move offsets too."""
    spec = json.loads(tokenizer_json)
    spec["post_processor"] = None
    return json.dumps(spec)
