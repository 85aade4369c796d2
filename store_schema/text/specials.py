"""Special tokens out of the reach of plain text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer


def specials_out_of_reach(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, ids and all, whose model cannot find a special token in a text.

    Telling the backend to take special tokens as text is not enough where they are pieces of the
    model too: Unigram, WordPiece and WordLevel look pieces up by their spelling and would read "</s>"
    in a document as the end of the sequence. Their spelling here begins with NUL, which no document
    may hold. BPE reaches a piece by merges only, and special tokens have none.
    """
    spec = json.loads(backend.to_str())
    spec["post_processor"] = None
    model = spec["model"]
    hidden = {t["content"]: f"\0{t['id']}" for t in spec.get("added_tokens", []) if t["special"]}
    for token in spec.get("added_tokens", []):
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    return Tokenizer.from_str(json.dumps(spec))
