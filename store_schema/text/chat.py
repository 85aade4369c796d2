"""A chat as its model reads it: rendered by the chat template that came with the tokenizer."""

from __future__ import annotations

from typing import Any

from store_schema.errors import TokenizerError


def rendered_chat(roles: Any, messages: Any, *, where: str) -> str:
    """The text of some messages, up to where the model's answer begins.

    Args:
        roles: transformers' tokenizer object, which has the template.
        messages: As a document's context holds them.
        where: Segment, for messages.

    Raises:
        TokenizerError: There is no template, or it refuses the messages.
    """
    if getattr(roles, "chat_template", None) is None:
        raise TokenizerError(
            "messages need a chat template",
            where=where,
            hint="use a chat model, or map columns to prompt and response",
        )
    try:
        text: str = roles.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's: it raises what it likes
        raise TokenizerError(
            "the chat template refuses the messages",
            where=where,
            got=f"{type(error).__name__}: {str(error)[:160]}",
            hint="change the messages, or leave such documents out with `corpus.on_bad: drop`",
        ) from error
    return text
