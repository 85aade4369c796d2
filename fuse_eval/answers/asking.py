"""Lets one model answer prompts with greedy decoding, in its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from extract.config import ExtractSection, GenerateSection
from extract.engines.ending import AnswerRules, end_ids
from extract.engines.protocol import Answer, Prompt, engine_spec
from extract.engines.registry import open_engine
from extract.generation.answers import answer_text
from extract.scoring.sources import model_folder
from launch.progress import Progress
from launch.signals import StopFlag
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ConfigError
from store_schema.model.models import max_positions, model_config
from store_schema.plan.plan import Segment
from store_schema.text.tokenizer import SegmentTokenizer

TOO_LONG = "prompt too long"
_GREEDY = {"answers": 1, "temperature": 0.0, "top_p": 1.0}


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """One answer.

    Args:
        text: "" for an empty answer, one that is not UTF-8, and a prompt that is too long.
        finish: How it ended: a `Finish` in words, "no UTF-8", or `TOO_LONG`.
    """

    text: str
    finish: str


def ask_model(
    run: RunConfig,
    name: str,
    ref: ModelRef,
    prompts: Sequence[Segment],
    max_tokens: int,
    stop: StopFlag,
) -> list[ModelAnswer]:
    """Answers of one model to the contexts of segments, in their order.

    Args:
        run: Its `extract` section has the engine, its `generate` section what ends an answer.
        name: Name of the model, for messages.
        ref: The model.
        prompts: Segments that have a context.
        max_tokens: Most tokens of an answer.
        stop: Checked after each answer.

    Raises:
        ModelError: The model cannot be used.
        ConfigError: No prompt fits.
        TokenizerError: It has no chat template.
        Stopped: `stop` was set.
    """
    alone = run.model_copy(update={"sources": {name: ref}})
    folder = model_folder(alone, name)
    tokenizer = SegmentTokenizer.load(ref, name=name)
    inputs = [
        tokenizer.contexts.prompt(s.context, where=f"segment {s.segment_id}, tokenizer of {name}")
        for s in prompts
    ]
    longest = max(map(len, inputs)) + max_tokens
    most = max_positions(model_config(folder))
    longest = longest if most is None else min(longest, most)
    spec = engine_spec(
        name, folder, ref, run.section("extract", ExtractSection).answering(),
        vocab_size=tokenizer.vocab_size, longest=longest, seed=run.seed,
    )  # fmt: skip
    section = run.section("generate", GenerateSection)
    section = section.model_copy(update={**_GREEDY, "max_tokens": max_tokens})
    rules = AnswerRules(section, end_ids(folder, tokenizer), tokenizer.vocabulary.tokens)
    opening = " " if tokenizer.puts_space else ""  # not part of an answer
    fitting = [i for i, ids in enumerate(inputs) if 0 < len(ids) <= longest - max_tokens]
    if not fitting:
        raise ConfigError(
            f"no prompt leaves {name} room for an answer",
            where="evaluate.answers.max_tokens",
            expected=f"less than the {most} positions of the model without its prompts",
            got=max_tokens,
        )
    answers = [ModelAnswer("", TOO_LONG)] * len(prompts)
    with (
        closing(open_engine(replace(spec, generates=True))) as engine,
        Progress(name, len(prompts), unit="ans", done=len(prompts) - len(fitting)) as progress,
    ):
        asked = [
            Prompt(inputs[i], seed=0, where=f"answer to segment {prompts[i].segment_id}, {name}")
            for i in fitting
        ]
        for index, answer in engine.answer(asked, rules):
            stop.check()
            answers[fitting[index]] = _as_text(answer, rules, opening)
            progress.add(1)
    return answers


def _as_text(answer: Answer, rules: AnswerRules, opening: str) -> ModelAnswer:
    """The engine's answer as text, without `opening`."""
    ids = [i for i in answer.token_ids.tolist() if i not in rules.end_ids]
    text = answer_text(b"".join(rules.tokens[i] for i in ids), answer.finish)
    if text is None:
        return ModelAnswer("", "no UTF-8")
    return ModelAnswer(text.removeprefix(opening), answer.finish.name.lower().replace("_", " "))
