"""Real but tiny tokenizers and models, made on the spot: no hub, no network, a second each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TokenizerKind = Literal["byte_level", "unigram", "metaspace_bpe", "wordpiece"]

SAMPLE_TEXTS: dict[str, list[str]] = {
    "code": [
        "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x: int = 0\n    y: int = 12345\n",
        "for i in range(10):\n\tif i % 2 == 0:\r\n\t\tprint(f'{i:>8}')\r\n",
        "x = {'key': [1, 2, 3]}  # comment\n" + " " * 200 + "pass\n",
    ],
    "prose": [
        "The quick brown fox jumps over the lazy dog. It wasn't amused, naturally.\n\nNext day...",
        "Naïve café façade: “quotes”, dashes — and ellipses… e\u0301 combining n\u0303 marks.",
        "A line that ends in spaces   \n   and one that begins with them; 3.14159, 1,000,000.",
    ],
    "odd": [
        "Emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and CJK 漢字かな交じり文 한국어 العربية हिन्दी.",
        "\x01control\x02 characters\x1b[0m\tand\x7f\u200bzero width\u2028separators",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 97 + "b",
        " leading space, <|endoftext|> and <s> spelt out </s> <unk>",
    ],
}


def tiny_tokenizer(
    kind: TokenizerKind = "byte_level",
    texts: Sequence[str] | None = None,
    vocab_size: int = 400,
    *,
    bos: bool = False,
    dummy_prefix: bool = True,
) -> PreTrainedTokenizerFast:
    """A trained tokenizer of the given family.

    Args:
        kind: byte_level (GPT-2, Llama 3), unigram (T5, Gemma style pieces with byte fallback),
            metaspace_bpe (Llama 2) or wordpiece.
        texts: What it is trained on; None takes SAMPLE_TEXTS.
        vocab_size: Size aimed at.
        bos: Whether it puts BOS before every text.
        dummy_prefix: Whether a SentencePiece-like one puts a word mark before every text.
    """
    texts = [t for ts in SAMPLE_TEXTS.values() for t in ts] if texts is None else list(texts)
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        specials = ["<|endoftext|>", "<s>", "</s>"]
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind in ("unigram", "metaspace_bpe"):
        if kind == "unigram":
            backend = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=vocab_size,
                special_tokens=specials,
                unk_token="<unk>",
                show_progress=False,
            )
        else:
            backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size, special_tokens=specials + bytes_, show_progress=False
            )
        scheme = "always" if dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=specials, show_progress=False
        )
    backend.train_from_iterator(texts, trainer)
    if kind == "unigram":
        backend = _with_byte_fallback(backend, specials, bytes_)
    if kind == "metaspace_bpe":
        backend = _bytes_as_text(backend)
    if bos:
        index = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", index)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _with_byte_fallback(
    backend: Tokenizer, specials: Sequence[str], bytes_: Sequence[str]
) -> Tokenizer:
    """The Unigram trainer makes no byte pieces: add them, so that no text is unknown."""
    import json

    spec = json.loads(backend.to_str())
    pieces = spec["model"]["vocab"]
    head, rest = pieces[: len(specials)], pieces[len(specials) :]
    lowest = min(score for _, score in rest)
    spec["model"]["vocab"] = head + [[b, lowest - 20.0] for b in bytes_] + rest
    spec["model"]["byte_fallback"] = True
    spec["model"]["unk_id"] = 0
    return Tokenizer.from_str(json.dumps(spec))


def _bytes_as_text(backend: Tokenizer) -> Tokenizer:
    """Byte pieces belong to the model, not to the special tokens that the trainer made them."""
    import json

    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def tiny_model(
    folder: Path,
    arch: Literal["llama", "gpt_neox", "qwen2", "mistral"] = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    seed: int = 0,
    vocab_padding: int = 0,
    scale: float = 0.3,
) -> Path:
    """Save a random model of two layers and its tokenizer.

    Args:
        folder: Where to; made if need be.
        arch: Which architecture.
        tokenizer: None trains a byte-level one.
        seed: Of the weights.
        vocab_padding: Rows of the model's vocabulary beyond the tokenizer's.
        scale: Standard deviation of the weights; large enough that distributions differ.

    Returns:
        `folder`.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer) + vocab_padding,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": scale,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    if arch == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **shape))
    elif arch == "mistral":
        model = MistralForCausalLM(MistralConfig(num_key_value_heads=2, **shape))
    elif arch == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **shape))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_beyond_rows(folder: Path, *tokens: str, special: bool = False) -> Path:
    """Add tokens to a saved model's tokenizer that the model has no rows for, and no more rows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special)
    tokenizer.save_pretrained(folder)
    return folder
