"""`judge show`: prompts with their best answer, and all scores and votes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from extract.judging.records import BestRow, ScoreRow, open_judged, read_best, read_scores
from launch.visible import table, visible
from store_schema.config import RunConfig
from store_schema.errors import ConfigError

_RULE = "-" * 72


def shown_prompts(
    run: RunConfig,
    *,
    prompts: Sequence[str] = (),
    authors: Sequence[str] = (),
    domains: Sequence[str] = (),
    disputed: bool = False,
    limit: int | None = None,
) -> Iterator[str]:
    """Yield prompts with their best answer as text.

    Args:
        run: The run file.
        prompts: Only these documents; empty for all.
        authors: Only prompts whose best answer is by one of these sources; empty for all.
        domains: Only these domains; empty for all.
        disputed: Only prompts for which the judges have different best answers.
        limit: Prompts, at most.

    Raises:
        MissingError: Nothing is judged yet.
        ConfigError: There is no such prompt, source or domain.
    """
    record, location = open_judged(run)
    best = read_best(location)
    _require("prompt", prompts, {row.prompt_id for row in best})
    _require("source", authors, set(record.answers))
    _require("domain", domains, set(record.best))
    scores: defaultdict[str, list[ScoreRow]] = defaultdict(list)
    for row in read_scores(location):
        scores[row.prompt].append(row)
    chosen = [
        row
        for row in best
        if (not prompts or row.prompt_id in prompts)
        and (not authors or row.author in authors)
        and (not domains or row.domain in domains)
        and (not disputed or _disputed(scores[row.prompt_id]))
    ][:limit]
    judges = list(record.judges)
    return (
        _shown(row, scores[row.prompt_id], judges, f"{number}/{len(chosen)}")
        for number, row in enumerate(chosen, 1)
    )


def _require(what: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            few = ", ".join(sorted(known)[:8]) + (", ..." if len(known) > 8 else "")
            raise ConfigError(f"no such {what} was judged", got=name, expected=few)


def _disputed(rows: Sequence[ScoreRow]) -> bool:
    """Whether no answer has the highest score of every judge."""
    by_judge: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row.score is not None:
            by_judge[row.judge][row.source, row.answer] = row.score
    firsts = [
        {answer for answer, score in own.items() if score == max(own.values())}
        for own in by_judge.values()
    ]
    return bool(firsts) and not set.intersection(*firsts)


def _shown(row: BestRow, scores: Sequence[ScoreRow], judges: Sequence[str], place: str) -> str:
    lines = [_RULE, f"{place}  {row.prompt_id}  domain {row.domain}  split {row.split}"]
    for role, content in row.turns:
        lines += _labelled(role, content)
    how = {"votes": "", "likelihood": ", a tie settled by likelihood", "order": ", a tie"}
    lines += _labelled(f"best, of {row.author}{how[row.settled_by]}", row.response)
    by_answer: defaultdict[tuple[str, int], dict[str, ScoreRow]] = defaultdict(dict)
    for one in scores:
        by_answer[one.source, one.answer][one.judge] = one
    cells = [
        [
            f"{source} {number}" + " *" * any(one.best for one in own.values()),
            *(_cell(own[judge]) for judge in judges),
        ]
        for (source, number), own in by_answer.items()
    ]
    lines += table(["answer", *(f"{judge} (vote)" for judge in judges)], cells)
    return "\n".join(lines) + "\n"


def _labelled(label: str, text: str) -> list[str]:
    first, *rest = visible(text, keep="\n\t", backslash="\\").split("\n")
    return [f"{visible(label)}: {first}", *(f"    {line}" for line in rest)]


def _cell(row: ScoreRow) -> str:
    if row.score is None:
        return row.failure or "-"
    vote = "-" if row.vote is None else f"{row.vote:.3g}"
    return f"{row.score:.4g} ({vote})"
