"""`extract generate`: each source's answers to the prompts of the plan, in a store of its own.

Shard n of the store has the answers to the prompts of shard n of the plan. A prompt is the context of a
document's first segment; the document's own text is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from extract.config import GenerateSection
from extract.engines.ending import AnswerRules, end_ids
from extract.engines.protocol import Engine, Prompt
from extract.generation.answers import (
    NO_ANSWER,
    KeptAnswer,
    answer_arrays,
    answer_seed,
    answer_stats,
    kept_answer,
)
from extract.scoring.sources import CheckedSource, check_source
from extract.scoring.stage import Job, Stage
from launch.progress import Progress
from launch.quantities import size_text
from launch.work import range_text, shard_ranges
from store_schema.config import RunConfig
from store_schema.errors import ConfigError, InputError, ModelError, TokenizerError
from store_schema.layout import Arrays
from store_schema.model.models import max_positions, model_config
from store_schema.plan.plan import Plan, Segment, ShardRecord


def check_answering(run: RunConfig, name: str, plan: Plan) -> CheckedSource:
    """Check a source that will answer prompts. Writes nothing.

    Raises:
        InputError: The corpus has no prompt.
        ConfigError: An option does not fit, or answers may be longer than the model's context.
        LogitfuseError: See `check_source`.
    """
    section = run.section("generate", GenerateSection)
    _require_prompts(plan)
    source = check_source(run, name, plan, kind="generated")
    spec = replace(source.spec, longest=_longest(source, plan, section), generates=True)
    shaping = {
        **section.content(),
        "seed": run.seed,
        "end_ids": sorted(end_ids(spec.folder, source.tokenizer)),
        "max_model_tokens": spec.longest,
    }
    settings = source.manifest.settings | shaping
    manifest = source.manifest.model_copy(update={"settings": settings})
    return replace(source, spec=spec, manifest=manifest)


def _longest(source: CheckedSource, plan: Plan, section: GenerateSection) -> int:
    """Tokens of the longest prompt with its answer (a prompt is at most as long as a segment)."""
    longest = int(plan.record.settings["max_tokens"]) + section.max_tokens
    most = max_positions(model_config(source.spec.folder))
    if most is not None and section.max_tokens >= most:
        raise ConfigError(
            f"answers may be longer than the context of {source.name}",
            where="generate.max_tokens",
            expected=f"below {most}",
            got=section.max_tokens,
        )
    return longest if most is None else min(longest, most)


def _require_prompts(plan: Plan) -> None:
    if not any(s.has_prompt for shard in plan.shards for s in plan.segments(shard)):
        raise InputError(
            "the corpus has no prompt to answer",
            where=plan.location.url,
            hint="map columns prompt and response, or messages, of an input (corpus.inputs), and "
            "build and plan under another run name",
        )


def answer_rules(source: CheckedSource) -> AnswerRules:
    """How the source's answers are sampled, and what ends them."""
    return AnswerRules(
        source.run.section("generate", GenerateSection),
        end_ids(source.spec.folder, source.tokenizer),
        source.tokenizer.vocabulary.tokens,
    )


def generate(engine: Engine, job: Job) -> None:
    """Answer the prompts of a job's shards."""
    source, plan = job.source, job.source.plan
    rules = answer_rules(source)
    pending = job.queue.pending
    shards = job.part.mine(plan.shards) if job.part.limit is None else pending
    # Counted in segments, since the number of prompts is not known before they are read.
    total, left = (sum(s.stop - s.start for s in part) for part in (shards, pending))
    with Progress(source.name, total, unit="seg", done=total - left) as progress:

        def on_answer(num_segments: int) -> None:
            job.check()
            progress.add(num_segments, f"{size_text(job.written)} written")

        for shard in job.queue:
            job.session.begun(shard.index)
            try:
                arrays, stats = answer_shard(engine, source, rules, shard, on_answer=on_answer)
            except (ModelError, TokenizerError) as error:
                if not job.leaves(error):
                    raise
                continue
            job.check()
            job.commit(shard, arrays, stats)
            progress.add(0, f"{size_text(job.written)} written")


def answer_shard(
    engine: Engine,
    source: CheckedSource,
    rules: AnswerRules,
    shard: ShardRecord,
    *,
    on_answer: Callable[[int], None],
) -> tuple[Arrays, dict[str, float]]:
    """Answer the prompts of one shard.

    Args:
        engine: The loaded model.
        source: The engine's source.
        rules: How answers are sampled, and what ends them.
        shard: The plan's shard.
        on_answer: Called for each answer with the number of segments that it completes, 0 or more; may
            raise to stop.

    Returns:
        All arrays of a generated store's shard, and its figures.

    Raises:
        ModelError: The model's logits are NaN.
        TokenizerError: A prompt has no tokens.
    """
    start = time.monotonic()
    segments = source.plan.segments(shard)
    asked = [segment for segment in segments if segment.has_prompt]
    inputs = [_input_ids(source, segment) for segment in asked]
    on_answer(len(segments) - len(asked))
    per_prompt = rules.section.answers
    # Prompt and number of every answer, in the order of the store.
    places = [(i, number) for i in range(len(asked)) for number in range(per_prompt)]
    room = source.spec.longest - rules.section.max_tokens
    fitting = [place for place in places if len(inputs[place[0]]) <= room]
    kept: dict[tuple[int, int], KeptAnswer] = {
        (i, number): kept_answer(asked[i], number, NO_ANSWER, rules)
        for i, number in places
        if len(inputs[i]) > room
    }
    on_answer(len({i for i, _ in kept}))
    for place, answer in _answered(engine, source, rules, asked, inputs, fitting):
        kept[place] = answer
        on_answer(int(all((place[0], number) in kept for number in range(per_prompt))))
    answers = [kept[place] for place in places]
    stats = answer_stats(
        segments,
        answers,
        prompt_tokens=sum(map(len, inputs)),
        seconds=time.monotonic() - start,
    )
    return answer_arrays(answers), stats


def _answered(
    engine: Engine,
    source: CheckedSource,
    rules: AnswerRules,
    asked: Sequence[Segment],
    inputs: Sequence[tuple[int, ...]],
    places: Sequence[tuple[int, int]],
) -> Iterator[tuple[tuple[int, int], KeptAnswer]]:
    """Yield (prompt, number) and the answer, in the order in which they are finished."""
    prompts = [
        Prompt(
            inputs[i],
            answer_seed(source.run.seed, source.name, asked[i].segment_id, number),
            where=f"answer {number} to segment {asked[i].segment_id}, source {source.name}",
        )
        for i, number in places
    ]
    for index, answer in engine.answer(prompts, rules):
        i, number = places[index]
        yield places[index], kept_answer(asked[i], number, answer, rules)


def _input_ids(source: CheckedSource, segment: Segment) -> tuple[int, ...]:
    where = f"segment {segment.segment_id}, tokenizer of {source.name}"
    ids = source.tokenizer.contexts.prompt(segment.context, where=where)
    if not ids:
        raise TokenizerError(
            "prompt has no tokens",
            where=where,
            hint="leave empty prompts out of the corpus: this tokenizer puts no BOS before them",
        )
    return ids


def outlook(source: CheckedSource, pending: Sequence[ShardRecord]) -> str:
    """The line of a dry run."""
    what = f"generate {source.name}"
    if not pending:
        return f"{what}: nothing to do"
    shards = range_text(shard_ranges(shard.index for shard in pending))
    prompts = sum(s.has_prompt for shard in pending for s in source.plan.segments(shard))
    section = source.run.section("generate", GenerateSection)
    return (
        f"{what}: would do {len(pending):,} shards ({shards}), {prompts:,} prompts, answers to "
        f"each: {section.answers:,} of at most {section.max_tokens:,} tokens"
    )


ANSWERING = Stage("generate", "generate-source", check_answering, generate, outlook, False)
