"""`judge`: score every answer with every judge, choose the best by votes, and write them as a
corpus."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache

from extract.judge_kinds import JUDGES
from extract.judge_kinds.kind import Answer, Judge, JudgeContext, JudgeOptions, Score
from extract.judging.config import JudgeSection
from extract.judging.likelihoods import Likelihoods, open_likelihoods
from extract.judging.questions import AnsweredPrompts, JudgedPrompt, PromptCounts, flat
from extract.judging.records import (
    BestRow,
    JudgedRecord,
    JudgeFigures,
    ScoreRow,
    judged_location,
    kept_record,
    part_key,
    read_part,
    write_judged,
    write_part,
)
from extract.judging.votes import TIE, Scale, judge_votes, passing, settle, totals
from launch.progress import Progress
from launch.signals import StopFlag, stop_on_signals
from store_schema import SCHEMA_VERSION
from store_schema.config import RunConfig
from store_schema.disk.location import Location
from store_schema.errors import ConfigError, InputError, ModelError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import ShardRecord
from store_schema.plan.run_plan import open_plan

JudgeScores = dict[int, list[Score]]
"""Scores of a judge by shard, in the order of its answers."""


def judge_answers(run: RunConfig) -> tuple[JudgedRecord, bool]:
    """Judge all answers of a run, unless that is done.

    Args:
        run: The run file.

    Returns:
        The record, and whether anything was done.

    Raises:
        ConfigError: No judge is named, or one cannot work.
        MissingError: A source has not answered, or a judge needs `scored_in` and there is none.
        ModelError: A judge's score is NaN, or it has the same score for all answers.
        InputError: No prompt has an answer.
        Stopped: On a signal; scores of finished shards are kept.
    """
    section = run.section("judge", JudgeSection)
    if not section.judges:
        raise ConfigError(
            "no judge is named",
            where="judge.judges",
            expected="one or more of " + ", ".join(JUDGES.names()),
        )
    plan = open_plan(run)
    prompts = AnsweredPrompts(run, plan, section)
    likelihoods = cache(lambda: open_likelihoods(run, section.scored_in))
    context = JudgeContext(run, likelihoods)
    identities = [
        [judge.content(), JUDGES[judge.kind].identity(judge, context)] for judge in section.judges
    ]
    known = likelihoods() if section.scored_in is not None else None
    request = fingerprint(
        [
            *("judge", SCHEMA_VERSION, section.content(), identities, list(run.sources)),
            None if known is None else known.digest,
            [prompts.content(shard) for shard in plan.shards],
        ]
    )
    location = judged_location(run)
    kept = kept_record(location)
    if kept is not None and kept.request_fingerprint == request:
        return kept, False
    scoring = Scoring(prompts, section, location)
    scores = []
    with stop_on_signals() as flag:
        for judge, identity in zip(section.judges, identities, strict=True):
            scores.append(scoring.scores(judge, fingerprint(identity), context, flag))
    return _settled(run, section, prompts, scores, known, request, location), True


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores answers shard by shard, and keeps the scores on disk.

    Args:
        prompts: Prompts and answers.
        section: Section `judge` of the run file.
        location: Folder of the scores.
    """

    prompts: AnsweredPrompts
    section: JudgeSection
    location: Location

    def scores(
        self, options: JudgeOptions, identity: str, context: JudgeContext, flag: StopFlag
    ) -> JudgeScores:
        """All scores of one judge, which is opened only if some are missing.

        Raises:
            ModelError: A score is NaN, or all are the same.
        """
        by_shard: JudgeScores = {}
        pending: list[tuple[ShardRecord, int]] = []
        for shard in self.prompts.plan.shards:
            num_answers = len(flat(self.prompts.judged(shard)))
            key, mark = self._part(options, identity, shard)
            kept = read_part(self.location, key, mark, num_answers) if num_answers else []
            if kept is None:
                pending.append((shard, num_answers))
            else:
                by_shard[shard.index] = kept
        if pending:
            done = sum(map(len, by_shard.values()))
            judge = JUDGES[options.kind].open(options, context)
            total = done + sum(number for _, number in pending)
            with closing(judge), Progress(options.title, total, unit="ans", done=done) as progress:
                for shard, _ in pending:
                    by_shard[shard.index] = self._score(judge, options, shard, flag, progress)
                    key, mark = self._part(options, identity, shard)
                    write_part(self.location, key, mark, by_shard[shard.index])
                    flag.progressed = True
        _require_differences(options, by_shard)
        return by_shard

    def _score(
        self, judge: Judge, options: JudgeOptions, shard: ShardRecord, flag: StopFlag,
        progress: Progress,
    ) -> list[Score]:  # fmt: skip
        answers = flat(self.prompts.judged(shard))
        scores = [Score(None, "no score")] * len(answers)
        flag.check()
        for place, score in judge.scores(answers):
            _require_number(score, options, answers[place])
            scores[place] = score
            progress.add(1)
            flag.check()
        return scores

    def _part(self, options: JudgeOptions, identity: str, shard: ShardRecord) -> tuple[str, str]:
        """Key and fingerprint of a judge's scores for a shard."""
        kept = [self.section.drop_cut, self.section.drop_held, self.section.min_answers]
        mark = fingerprint([identity, self.prompts.content(shard), kept])
        return part_key(options.title, shard.index), mark


def _require_number(score: Score, options: JudgeOptions, answer: Answer) -> None:
    if score.value is not None and not math.isfinite(score.value):
        raise ModelError(
            f"judge {options.title} returns {score.value}",
            where=f"answer {answer.number} of {answer.source} to {answer.question.document_id}",
            expected="a finite number",
            hint="correct the judge, or remove it from judge.judges",
        )


def _require_differences(options: JudgeOptions, by_shard: JudgeScores) -> None:
    """Refuse a judge without scores, or with the same score for all answers."""
    scores = [score for part in by_shard.values() for score in part]
    known = {score.value for score in scores if score.value is not None}
    failures = Counter(score.failure for score in scores if score.value is None)
    if scores and not known:
        raise ModelError(
            f"judge {options.title} has no score for any answer",
            where="judge.judges",
            got=", ".join(f"{name} {number:,}" for name, number in failures.most_common()),
            hint="correct the judge or its options, or remove it from judge.judges",
        )
    number = len(scores) - failures.total()
    if len(known) == 1 and number > 1:
        raise ModelError(
            f"judge {options.title} has the same score for all {number:,} answers",
            where="judge.judges",
            got=f"{known.pop():g}",
            hint="correct its options, or remove it from judge.judges",
        )


@dataclass(slots=True)
class _Tables:
    """Rows and counts of the result, collected prompt by prompt."""

    best: list[BestRow] = field(default_factory=list)
    scores: list[ScoreRow] = field(default_factory=list)
    by_domain: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    settled_by: Counter[str] = field(default_factory=Counter)
    chosen: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    none_passes: int = 0
    ties_not_scored: int = 0


def _settled(
    run: RunConfig, section: JudgeSection, prompts: AnsweredPrompts, scores_J: Sequence[JudgeScores],
    known: Likelihoods | None, request: str, location: Location,
) -> JudgedRecord:  # fmt: skip
    """Choose the best answer to every prompt, and write the result."""
    counts, tables = PromptCounts(), _Tables()
    values_J = [_values(scores) for scores in scores_J]
    scales = [Scale.of(values) for values in values_J] if any(values_J) else []
    for shard in prompts.plan.shards:
        at = 0
        for prompt in prompts.judged(shard, counts):
            stop = at + len(prompt.answers)
            scores_JA = [scores[shard.index][at:stop] for scores in scores_J]
            _vote(section, prompt, scores_JA, scales, known, tables)
            at = stop
    if not tables.best:
        held = f", {len(counts.held):,} that contain their answer" if section.drop_held else ""
        cut = "answers cut at generate.max_tokens are not used unless judge.drop_cut is false"
        raise InputError(
            "no prompt has an answer to judge",
            where=location.url,
            got=f"{counts.prompts:,} prompts: {counts.unanswered:,} without a usable answer, "
            f"{counts.too_few:,} with too few, {tables.none_passes:,} with none that has every judge's "
            f"min_score{held}",
            hint=cut if counts.only_cut else None,
        )
    record = JudgedRecord(
        request_fingerprint=request,
        vote=section.vote,
        prompts=counts.prompts,
        silent=counts.unanswered,
        only_cut=counts.only_cut,
        too_few=counts.too_few,
        none_passes=tables.none_passes,
        held=tuple(counts.held),
        held_dropped=section.drop_held,
        left_out={name: dict(sorted(own.items())) for name, own in counts.left_out.items()},
        answers=_answers_by_source(run, section, tables),
        best={domain: dict(own) for domain, own in sorted(tables.by_domain.items())},
        settled_by=dict(sorted(tables.settled_by.items())),
        ties_not_scored=tables.ties_not_scored,
        judges=_judge_figures(section, tables),
        digests={},
    )
    return write_judged(location, record, tables.best, tables.scores, run.resolved())


def _values(scores: JudgeScores) -> list[float]:
    return [s.value for part in scores.values() for s in part if s.value is not None]


def _vote(
    section: JudgeSection, prompt: JudgedPrompt, scores_JA: Sequence[Sequence[Score]],
    scales: Sequence[Scale], known: Likelihoods | None, tables: _Tables,
) -> None:  # fmt: skip
    """Choose the best answer to a prompt."""
    votes_JA = [
        judge_votes(section.vote, [score.value for score in scores_A], scale)
        for scores_A, scale in zip(scores_JA, scales, strict=True)
    ]
    totals_A = totals(section.vote, votes_JA)
    likelihoods_A = [None if known is None else known.by_other_sources(a) for a in prompt.answers]
    values_JA = [[score.value for score in scores_A] for scores_A in scores_JA]
    places = passing([judge.min_score for judge in section.judges], values_JA)
    best = None
    if places:
        best, settled_by = settle(totals_A, likelihoods_A, places)
        row = BestRow.of(prompt.answers[best], totals_A[best], settled_by)
        tables.best.append(row)
        tables.by_domain[row.domain][row.author] += 1
        tables.settled_by[settled_by] += 1
        tied = [likelihoods_A[i] for i in places if totals_A[i] >= totals_A[best] - TIE]
        tables.ties_not_scored += known is not None and len(tied) > 1 and None in tied
    else:
        tables.none_passes += 1
    for judge, scores_A, votes_A in zip(section.judges, scores_JA, votes_JA, strict=True):
        values = [score.value for score in scores_A if score.value is not None]
        if best is not None:
            tables.judged[judge.title] += bool(values)
            tables.chosen[judge.title] += bool(values) and scores_A[best].value == max(values)
        for i, (answer, score, vote) in enumerate(
            zip(prompt.answers, scores_A, votes_A, strict=True)
        ):
            tables.scores.append(
                ScoreRow(
                    prompt=answer.question.document_id,
                    source=answer.source,
                    answer=answer.number,
                    judge=judge.title,
                    score=score.value,
                    vote=vote,
                    failure=score.failure,
                    best=i == best,
                )
            )


def _answers_by_source(run: RunConfig, section: JudgeSection, tables: _Tables) -> dict[str, int]:
    first = section.judges[0].title
    counts = Counter(row.source for row in tables.scores if row.judge == first)
    return {name: counts[name] for name in run.sources}


def _judge_figures(section: JudgeSection, tables: _Tables) -> dict[str, JudgeFigures]:
    values: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    failures: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in tables.scores:
        if row.score is None:
            failures[row.judge][row.failure or ""] += 1
        else:
            values[row.judge][row.source].append(row.score)
    return {
        title: JudgeFigures(
            scores=sum(map(len, values[title].values())),
            failures=dict(sorted(failures[title].items())),
            means={name: math.fsum(part) / len(part) for name, part in values[title].items()},
            chosen=tables.chosen[title],
            judged=tables.judged[title],
        )
        for title in (judge.title for judge in section.judges)
    }
