"""Reward models: check, load and run them on answers.

Options are those of judge reward_model (extract/judge_kinds/reward_model.py).

Shapes: B answers of a batch, L tokens.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from extract.engines.transformers_engine import chosen_device
from extract.judge_kinds.kind import Answer, Score
from store_schema.errors import ModelError, TokenizerError
from store_schema.model.causal_model import load_whole_model
from store_schema.model.class_config import transformers_config
from store_schema.model.models import (
    max_positions,
    model_config,
    resolve_model,
    resolve_tokenizer,
    resolved_dtype,
    with_folder,
)
from store_schema.model.out_of_memory import is_out_of_memory
from store_schema.model.weight_files import require_weights
from store_schema.text.chat_template import ChatTemplate
from store_schema.text.tokenizer_files import TOKENIZER_FILE
from store_schema.text.tokenizer_source import FolderSource, converted

logger = logging.getLogger(__name__)

TOO_LONG = "too long for the model"
_ANOTHER = "name a sequence classification model that was trained as a reward model"


def check_reward_model(options: Any) -> Path:
    """The folder of a reward model, which is checked without loading it.

    Raises:
        ModelError: It is missing or damaged, a language model, or has more labels than one.
    """
    of = f"judge {options.title}"
    folder = resolve_model(options.ref)
    require_weights(folder)
    config = transformers_config(options.ref, of=of)
    classes = [str(name) for name in getattr(config, "architectures", None) or []]
    if classes and all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise ModelError(
            f"the model of {of} is a language model, not a reward model",
            where=options.model,
            expected="architectures that end in ForSequenceClassification",
            got=", ".join(classes),
            hint=_ANOTHER,
        )
    if config.num_labels != 1:
        raise ModelError(
            f"the model of {of} is a classifier, not a reward model",
            where=options.model,
            expected="one label (num_labels)",
            got=config.num_labels,
            hint=_ANOTHER,
        )
    return folder


def tokenizer_of(options: Any, folder: Path) -> tuple[Tokenizer, ChatTemplate]:
    """A reward model's tokenizer and chat template.

    Raises:
        ModelError: There is no tokenizer that can be read.
        TokenizerError: There is no template.
    """
    of = f"judge {options.title}"
    place = resolve_tokenizer(options.ref, name=of)
    if (place / TOKENIZER_FILE).exists():
        source: Any = FolderSource(place, name=of, trust_remote_code=options.trust_remote_code)
    else:
        source = converted(place, options.ref, name=of)
    backend, chat = source.whole, ChatTemplate(source.roles, options.template)
    if chat.text is None:
        raise TokenizerError(
            f"the model of {of} has no chat template",
            where=options.model,
            hint="give a file with the template of its training: `template: {file: ...}`",
        )
    return backend, chat


class RewardJudge:
    """See `extract.judge_kinds.kind.Judge`."""

    def __init__(self, options: Any) -> None:
        """Load the model.

        Raises:
            ModelError: It is no reward model, or cannot be loaded.
            ConfigError: There is no such device or dtype.
        """
        folder = check_reward_model(options)
        self._options = options
        self._backend, self._chat = tokenizer_of(options, folder)
        config = model_config(folder)
        self._most = options.max_tokens or max_positions(config)
        self._device = chosen_device(options.device, where=f"judge {options.title}")
        self._model = _load(options, folder, resolved_dtype(options.ref, config), self._device)
        self._batch_tokens = options.batch_tokens

    def close(self) -> None:
        """See `Judge.close`."""
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def scores(self, answers: Sequence[Answer]) -> Iterator[tuple[int, Score]]:
        """See `Judge.scores`. Longest first, in batches of similar length."""
        ids = [self._ids(answer) for answer in answers]
        fitting = []
        for i, answer_ids in enumerate(ids):
            if self._most is not None and len(answer_ids) > self._most:
                yield i, Score(None, TOO_LONG)
            else:
                fitting.append(i)
        fitting.sort(key=lambda i: (-len(ids[i]), i))
        while fitting:
            size = max(self._batch_tokens // max(len(ids[fitting[0]]), 1), 1)
            batch = fitting[:size]
            rewards = self._rewards([ids[i] for i in batch])
            if rewards is None:
                continue  # memory ran out; batches are smaller
            yield from ((i, Score(reward)) for i, reward in zip(batch, rewards, strict=True))
            fitting = fitting[size:]

    def _ids(self, answer: Answer) -> list[int]:
        """Tokens of the rendered chat with the answer; BOS only if the template renders it."""
        question = answer.question
        context = {"messages": question.messages}
        if question.context.get("tools"):
            context["tools"] = question.context["tools"]
        where = f"prompt {question.document_id}, judge {self._options.title}"
        around = self._chat.around(context, where=where)
        whole = around.before + answer.text + around.after
        ids: list[int] = self._backend.encode(whole, add_special_tokens=False).ids
        return ids

    @torch.inference_mode()
    def _rewards(self, ids: Sequence[Sequence[int]]) -> list[float] | None:
        """Rewards of a batch; None if memory ran out, and the next batch will have half the size."""
        longest = max(map(len, ids))
        # transformers reads the score at the last token that is not padding.
        config = self._model.config.get_text_config()
        own = pad = config.pad_token_id
        if pad is None:
            last = {part[-1] for part in ids}
            pad = next(i for i in range(len(last) + 1) if i not in last)
            config.pad_token_id = pad
        ids_BL = torch.tensor([[*part, *[pad] * (longest - len(part))] for part in ids])
        mask_BL = torch.tensor([[1] * len(part) + [0] * (longest - len(part)) for part in ids])
        try:
            made = self._model(
                input_ids=ids_BL.to(self._device), attention_mask=mask_BL.to(self._device)
            )
        except Exception as error:
            if len(ids) == 1 or not is_out_of_memory(error):
                raise
            self._batch_tokens = max(longest * (len(ids) // 2), 1)
            logger.warning("%s: memory ran out, batches are halved", self._options.title)
            return None
        finally:
            config.pad_token_id = own
        rewards: list[float] = made.logits.float().reshape(len(ids)).tolist()
        return rewards


def _load(options: Any, folder: Path, dtype: str, device: torch.device) -> Any:
    import transformers

    ref, of = with_folder(options.ref, folder), f"judge {options.title}"
    auto_class = transformers.AutoModelForSequenceClassification
    dtype = getattr(torch, dtype)
    try:
        return load_whole_model(auto_class, ref, of=of, device=device, dtype=dtype).eval()
    except ModelError as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            error.what, where=error.where, expected=error.expected, got=error.got, hint=_ANOTHER
        ) from error
