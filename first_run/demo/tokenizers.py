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

import io
from collections.abc import Iterator, Sequence

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

    SentencePiece learns the pieces; the Unigram trainer of tokenizers gives others each time.
    Characters outside ASCII are kept from it; they are spelled with the 256 byte tokens instead.
    """
    import sentencepiece

    word_marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never"),
        ]
    )
    learned_model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_ascii_lines(texts),
        model_writer=learned_model,
        model_type="unigram",
        vocab_size=vocab_size - 256 - 2,  # bytes, end of text, end of line
        max_sentencepiece_length=12,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars="".join(map(chr, range(33, 127))),
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # with more, the sums of floats have no fixed order
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=learned_model.getvalue())
    scores = {model.id_to_piece(i): model.get_score(i) for i in range(1, model.vocab_size())}
    scores["\n"] = max(scores.values())  # stands alone, so that any score will do
    lowest = min(scores.values()) - 10.0
    byte_pieces = [(f"<0x{value:02X}>", lowest) for value in range(256)]
    never = lowest - 1000.0  # "</s>" that stands in a text is spelled out, not an end
    vocabulary = [("<unk>", never), (eos, never), *byte_pieces, *scores.items()]
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


def _ascii_lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for line in "".join(c if c.isascii() else " " for c in text).split("\n"):
            if line:
                yield line
