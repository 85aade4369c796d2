"""A text behind a chat is read in the tokens that the model was trained on: those of the whole chat.

Tokenizers that put a space before every text (SentencePiece's) put none behind a line's end.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from store_schema.errors import TokenizerError
from store_schema.plan.plan import Segment
from store_schema.text.space_prefix import read_without_space
from store_schema.text.tokenizer import SegmentTokenizer
from tests.published_tokenizers import tokenizer_folder
from tests.tiny import tiny_tokenizer

TEMPLATES = {
    "line": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "space": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "glued": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}=>"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "special": "{% for m in messages %}{{ eos_token if m.role == 'assistant' else bos_token or '' }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}",
}
ANSWERS = (
    "The answer is 4.",
    "4",
    "  two spaces",
    "\nA line",
    "\n\nTwo lines",
    ".dots",
    "é: ja",
    "▁a",
)
QUESTION = {"role": "user", "content": "What is 2 + 2?"}


def tokenizers() -> dict[str, Any]:
    found = {
        "unigram": tiny_tokenizer("unigram"),
        "metaspace": tiny_tokenizer("metaspace_bpe", vocab_size=500),
        "byte_level": tiny_tokenizer("byte_level", bos=True),
    }
    folder = tokenizer_folder("llama2")
    if folder is not None:
        found["llama2"] = AutoTokenizer.from_pretrained(folder)
    return found


def segment(text: str, context: dict[str, Any] | None) -> Segment:
    written = None if context is None else json.dumps(context)
    return Segment(0, "s", "d", "x", "train", 0, len(text.encode()), True, written, text)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["unigram", "metaspace", "byte_level", "llama2"])
def test_tokens_are_those_of_the_whole_chat(name: str, template: str) -> None:
    hf = tokenizers().get(name)
    if hf is None:
        pytest.skip("fetch them with `python tests/published_tokenizers.py`")
    hf.chat_template = TEMPLATES[template]
    ours = SegmentTokenizer(hf, name="m")
    same = 0
    for answer in ANSWERS:
        try:
            [read] = ours.encode([segment(answer, {"messages": [QUESTION]})])
        except (
            TokenizerError
        ):  # a text that the tokenizer cannot give back, whatever stands before it
            with pytest.raises(TokenizerError):
                ours.encode([segment(answer, None)])
            continue
        chat = [QUESTION, {"role": "assistant", "content": answer}]
        whole = hf.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        tokens = [ours.vocabulary.tokens[i] for i in read.token_ids]
        if read.input_ids == whole[: len(read.input_ids)]:
            same += 1
        else:  # one token of what stands before it and of the answer: ours begins with the answer
            assert answer[0] in " \n.▁", (answer, tokens)
        ends = [*read.byte_ends]
        assert ends == sorted(ends)
        assert ends[-1] == len(answer.encode())
    assert same >= 4, same


def test_what_a_model_is_asked_with_stands_before_what_it_reads() -> None:
    for name, hf in tokenizers().items():
        for template in TEMPLATES.values():
            hf.chat_template = template
            ours = SegmentTokenizer(hf, name=name)
            context = json.dumps({"messages": [QUESTION]})
            asked = ours.contexts.prompt(context, where="here")
            assert asked == ours.contexts.read(context, where="here").ids


def test_a_response_behind_a_prompt_is_a_text_of_its_own() -> None:
    """As in stores of before: nothing says that the prompt was a chat."""
    ours = SegmentTokenizer(tiny_tokenizer("unigram"), name="m")
    for prompt in "Q: 2 + 2?\nA:\n", "Q: ", "":
        [read] = ours.encode([segment("four", {"prompt": prompt})])
        assert read.token_ids.tolist() == ours.encode_text(["four"])[0]
        assert [*read.context_ids] == [*ours.bos_ids, *ours.encode_text([prompt])[0]]


def test_others_read_as_before() -> None:
    ours = SegmentTokenizer(tiny_tokenizer("byte_level", bos=True), name="m")
    text = "plain text"
    [alone] = ours.encode([segment(text, None)])
    [behind] = ours.encode([segment(text, {"prompt": "Why?\n"})])
    assert alone.token_ids.tolist() == behind.token_ids.tolist()


@given(st.lists(st.tuples(st.text(st.characters(codec="ascii"), min_size=1), st.booleans())))
def test_bytes_are_kept_whatever_the_text(items: list[tuple[str, bool]]) -> None:
    ours = SegmentTokenizer(tiny_tokenizer("unigram"), name="m")
    texts, opens = [text for text, _ in items], [flag for _, flag in items]
    where = [f"text {i}" for i in range(len(texts))]
    found = ours.read_texts(texts, where, opens)
    assert len(found) == len(texts)
    for (ids, ends), text, opening in zip(found, texts, opens, strict=True):
        assert len(ids) == len(ends)
        assert ends[-1] == len(text)
        written = b"".join(ours.vocabulary.tokens[i] for i in ids).decode()
        assert written in (text, f" {text}")
        assert not opening or ids == ours.encode_text([text])[0]


def test_a_text_that_joins_with_every_mark_keeps_the_space() -> None:
    import numpy as np

    def read(texts: list[str], where: list[str]) -> list[tuple[list[int], Any]]:
        """A tokenizer of one token a text, but for a mark with "a"."""
        found = []
        for text in texts:
            split = text[1:] == "a"
            ends = [1, len(text)] if split else [len(text)]
            found.append((list(range(len(ends))), np.array(ends, np.uint32)))
        return found

    [(ids, ends)] = read_without_space(["word"], ["here"], [False], read)  # type: ignore[arg-type]
    assert (ids, ends.tolist()) == ([0], [4])
