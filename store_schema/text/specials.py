"""Make sure that plain text is never tokenised as special tokens."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from store_schema.text.tokenizer_files import without_collector


def text_reader(whole: Tokenizer) -> Tokenizer:
    """The same tokenizer with the same ids, which never finds a special token in a text.

    The option `encode_special_tokens` is not enough where special tokens are pieces of the model too:
    Unigram, WordPiece and WordLevel match pieces by spelling, and would read "</s>" in a document as
    the end of the sequence. So special tokens are renamed to what no document has by chance; one that
    has it on purpose is refused, since its tokens do not join to its text. BPE forms pieces only by
    merges, and special tokens have none.
    """
    if type(whole.model).__name__ == "BPE":
        reader = _of_same_model(whole)
    else:
        with without_collector():
            reader = _with_hidden_names(whole)
    reader.encode_special_tokens = True
    return reader


def _of_same_model(backend: Tokenizer) -> Tokenizer:
    """A tokenizer with the same ids, options of its own, and no post-processor.

    The two have one model in memory, with all pieces and merges; to read it again takes a second.
    """
    other = Tokenizer(backend.model)
    other.normalizer = backend.normalizer
    other.pre_tokenizer = backend.pre_tokenizer
    other.decoder = backend.decoder
    other.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return other


def _with_hidden_names(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without post-processor, its special tokens renamed."""
    spec = json.loads(backend.to_str())
    spec["post_processor"] = None
    model = spec["model"]
    hidden = {
        token["content"]: f"\0\0special token {token['id']}\0\0"
        for token in spec.get("added_tokens", [])
        if token["special"]
    }
    for token in spec.get("added_tokens", []):
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    return Tokenizer.from_str(json.dumps(spec))
