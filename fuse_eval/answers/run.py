"""`eval answers`: how many held-out prompts each model of a run answers right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np

from extract.config import ExtractSection, GenerateSection
from extract.engines.ending import end_ids
from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import JudgeContext, Question, Score
from extract.judging.questions import long_references, question_of
from extract.scoring.sources import model_folder
from fuse_eval.answers.asking import TOO_LONG, ModelAnswer, ask_model
from fuse_eval.answers.figures import Floats, difference, mean_scores
from fuse_eval.answers.held_out import (
    UNANSWERED,
    held_out_prompts,
    judged,
    most_tokens,
    no_likelihoods,
)
from fuse_eval.config import EvaluateSection
from fuse_eval.findings import BEFORE, CONTROL, FUSED
from fuse_eval.run import StageResult, models_to_score
from fuse_eval.summary import ANSWERS_FILE, read_json, report_location, write_json
from fuse_train.model.identity import identity
from launch.signals import StopFlag
from store_schema import __version__
from store_schema.config import ModelRef, RunConfig
from store_schema.errors import ModelError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan, Segment
from store_schema.plan.run_plan import open_plan
from store_schema.store.same_source import require_run_sources
from store_schema.text.tokenizer import SegmentTokenizer


def count_right(run: RunConfig, stop: StopFlag) -> StageResult:
    """Let every model of the evaluation answer the split's prompts, and judge the answers.

    Raises:
        MissingError: Nothing planned or trained yet, or the split has no prompt.
        ConfigError: The judge cannot work.
        ModelError: A model cannot answer, or the judge gives scores outside [0, 1].
        Stopped: On a signal; answers of models that are finished are kept.
    """
    section = run.section("evaluate", EvaluateSection)
    plan = open_plan(run)
    judge = section.answers.judge
    context = JudgeContext(run, no_likelihoods)
    models = models_to_score(run, section)
    require_run_sources(run, plan)
    requests = {name: _request(run, plan, name, ref, section) for name, (ref, _) in models.items()}
    judging = [judge.content(), JUDGES[judge.kind].identity(judge, context)]
    request = fingerprint(
        [requests, judging, section.bootstrap_samples, section.confidence, run.seed, __version__]
    )
    report = report_location(run)
    before = read_json(report, ANSWERS_FILE)
    if before is not None and before.get("fingerprint") == request:
        return StageResult(before, fresh=False)
    prompts = held_out_prompts(plan, section)
    references = long_references(plan)
    questions = [question_of(segment, references) for segment in prompts]
    answers = {
        name: _answers(run, name, ref, prompts, section, requests[name], stop)
        for name, (ref, _) in models.items()
    }
    with closing(JUDGES[judge.kind].open(judge, context)) as opened:
        scores = {
            name: judged(opened, judge, name, questions, of_model, stop)
            for name, of_model in answers.items()
        }
    content = {"fingerprint": request, "split": section.split, "judge": judge.title}
    content |= figures(questions, answers, scores, section, run.seed)
    write_json(report, ANSWERS_FILE, content)
    return StageResult(content, fresh=True)


def _request(run: RunConfig, plan: Plan, name: str, ref: ModelRef, section: EvaluateSection) -> str:
    """Fingerprint of all that shapes one model's answers.

    Raises:
        LogitfuseError: The model cannot answer.
    """
    generate = run.section("generate", GenerateSection)
    tokenizer = SegmentTokenizer.load(ref, name=name)
    ends = end_ids(model_folder(run.model_copy(update={"sources": {name: ref}}), name), tokenizer)
    return fingerprint(
        [
            *(identity(ref), tokenizer.fingerprint, sorted(ends)),
            *(plan.fingerprint, section.split, section.answers.limit),
            *(most_tokens(run, section), list(generate.stop), __version__),
            run.section("extract", ExtractSection).engine,
        ]
    )


def _answers(
    run: RunConfig,
    name: str,
    ref: ModelRef,
    prompts: Sequence[Segment],
    section: EvaluateSection,
    request: str,
    stop: StopFlag,
) -> list[ModelAnswer]:
    """Answers of a model: kept ones if they were made by the same request."""
    report, key = report_location(run), f"answers/{name}.json"
    kept = read_json(report, key)
    if kept is not None and kept.get("fingerprint") == request:
        return [ModelAnswer(answer["text"], answer["finish"]) for answer in kept["answers"]]
    answers = ask_model(run, name, ref, prompts, most_tokens(run, section), stop)
    records = [
        {"document_id": segment.document_id} | asdict(answer)
        for segment, answer in zip(prompts, answers, strict=True)
    ]
    write_json(report, key, {"fingerprint": request, "model": name, "answers": records})
    stop.progressed = True
    return answers


def figures(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[ModelAnswer]],
    scores: Mapping[str, Sequence[Score]],
    section: EvaluateSection,
    seed: int,
) -> dict[str, Any]:
    """The figures of answers.json.

    A prompt for which the judge scores no model's answer is left out of all figures; for other prompts
    an answer without a score counts as wrong. Both are counted.

    Args:
        questions: The prompts.
        answers: Answers by model.
        scores: Scores of these answers, by model.
        section: Evaluate section of the run file.
        seed: Seed of the resampling.

    Returns:
        `prompts` {domain: number}, `left_out` {reason: number}, `scores` {model: {domain: mean}},
        `mean_score` {model: value}, `ended` {model: share of answers that ended by themselves},
        `failures` {model: {reason: number}}, `comparisons`.

    Raises:
        ModelError: The judge scored no answer.
    """
    kept, left_out = _kept(len(questions), scores)
    if not kept:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in left_out.most_common())
        raise ModelError(
            "the judge has a score for no answer", where="evaluate.answers.judge", got=reasons
        )
    domains = [questions[i].domain for i in kept]
    values: dict[str, Floats] = {
        name: np.array([row[i].value or 0.0 for i in kept]) for name, row in scores.items()
    }
    means = {name: mean_scores(values_P, domains) for name, values_P in values.items()}
    pairs = [(FUSED, against) for against in (CONTROL, BEFORE) if against in values]
    comparisons = [
        {"model": model, "against": against}
        | difference(
            values[model],
            values[against],
            domains,
            samples=section.bootstrap_samples,
            confidence=section.confidence,
            seed=seed,
        )
        for model, against in pairs
    ]
    return {
        "confidence": section.confidence,
        "prompts": dict(sorted(Counter(domains).items())),
        "left_out": dict(left_out),
        "scores": means,
        "mean_score": {name: float(np.mean(list(by.values()))) for name, by in means.items()},
        "ended": {
            name: sum(row[i].finish in ("stop", "stop text") for i in kept) / len(kept)
            for name, row in answers.items()
        },
        "failures": {
            name: dict(Counter(filter(None, (_failure(answers[name][i], row[i]) for i in kept))))
            for name, row in scores.items()
        },
        "comparisons": comparisons,
    }


def _kept(
    num_prompts: int, scores: Mapping[str, Sequence[Score]]
) -> tuple[list[int], Counter[str]]:
    """Prompts that count, and the number of prompts left out, by reason."""
    kept, left_out = [], Counter[str]()
    for i in range(num_prompts):
        asked = [row[i] for row in scores.values() if row[i] is not UNANSWERED]
        if asked and all(score.value is None for score in asked):
            left_out[asked[0].failure or "no score"] += 1
        else:
            kept.append(i)
    return kept, left_out


def _failure(answer: ModelAnswer, score: Score) -> str | None:
    return answer.finish if answer.finish == TOO_LONG else score.failure
