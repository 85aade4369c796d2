"""Four tokenizers that agree on nothing: three byte-level BPE of different rules, one Unigram.

Every one gives any text back to the byte, which the alignment stage relies on. They differ in
merges, vocabulary size, digit grouping and the BOS rule, as real families do:

========  ==========================  =======================  ==============================
model     kind                        digits                   first token
========  ==========================  =======================  ==============================
code      byte-level BPE              groups of three          ``<s>`` added by itself
prose     byte-level BPE, GPT-2 rule  as merged                none; ``<|endoftext|>`` exists
facts     Unigram, byte fallback, ▁   one by one               none; the model has no BOS
target    byte-level BPE              one by one               ``<|bos|>`` added by itself
========  ==========================  =======================  ==============================

One exception is inherited from SentencePiece: a literal U+2581 in the text comes back as a space.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

GROUPED_DIGITS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Word rule of the Llama 3 family."""

MAX_POSITIONS = 512


def _split_rule(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "code":
        split = pre_tokenizers.Split(Regex(GROUPED_DIGITS), behavior="isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "prose":
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def train_byte_level_bpe(
    name: str, texts: Sequence[str], vocab_size: int, bos: str, adds_bos: bool, eos: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ``adds_bos`` puts the BOS before every text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split_rule(name)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys([bos, eos])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def train_unigram(texts: Sequence[str], vocab_size: int, eos: str) -> PreTrainedTokenizerFast:
    """Unigram with word marks and byte fallback, laid out as SentencePiece models are converted.

    Characters outside ASCII are kept from the trainer, which must give each one it sees a place in
    the vocabulary; they are spelled with the 256 byte tokens instead.
    """
    word_marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
        ]
    )
    draft = Tokenizer(models.Unigram())
    draft.normalizer, draft.pre_tokenizer = word_marks, split
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 256 - 1,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=[*map(chr, range(32, 127)), "\n", "▁"],
        max_piece_length=12,
        show_progress=False,
    )
    ascii_texts = ("".join(c if c.isascii() else " " for c in text) for text in texts)
    draft.train_from_iterator(ascii_texts, trainer)
    # Its sums of floats depend on the order of threads and hash maps, in the last digits.
    scores = {piece: round(score, 5) for piece, score in _piece_scores(draft).items()}
    pieces = sorted(scores, key=lambda piece: (-scores[piece], piece))
    lowest = min(scores.values()) - 10.0
    byte_pieces = [(f"<0x{value:02X}>", lowest) for value in range(256)]
    learned = [(piece, scores[piece]) for piece in pieces if piece != "<unk>"]
    never = lowest - 1000.0  # "</s>" that stands in a text is spelled out, not an end
    vocabulary = [("<unk>", never), (eos, never), *byte_pieces, *learned]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = word_marks, split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=eos,
        pad_token=eos,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _piece_scores(tokenizer: Tokenizer) -> dict[str, float]:
    import json

    return {
        piece: float(score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]
    }
