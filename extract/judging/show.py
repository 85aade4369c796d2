"""`judge show`: prompts with their best answer, and what each judge gave each source."""

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
    """Prompts as text, one after the other.

    Args:
        run: The run file.
        prompts: Ids of documents; all where there are none.
        authors: Of the best answer, likewise.
        domains: Likewise.
        disputed: Only those of which judges hold different answers for the best.
        limit: At most so many.

    Raises:
        MissingError: Nothing is judged yet.
        ConfigError: A name is not there.
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


def _require(what: str, asked: Sequence[str], there: set[str]) -> None:
    for name in asked:
        if name not in there:
            few = ", ".join(sorted(there)[:8]) + (", ..." if len(there) > 8 else "")
            raise ConfigError(f"no such {what} was judged", got=name, expected=few)


def _disputed(rows: Sequence[ScoreRow]) -> bool:
    """Whether no answer is the best, or one of the best, to every judge."""
    by_judge: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row.score is not None:
            by_judge[row.judge][row.source, row.answer] = row.score
    firsts = [
        {answer for answer, score in found.items() if score == max(found.values())}
        for found in by_judge.values()
    ]
    return bool(firsts) and not set.intersection(*firsts)


def _shown(row: BestRow, scores: Sequence[ScoreRow], judges: Sequence[str], place: str) -> str:
    lines = [_RULE, f"{place}  {row.prompt_id}  domain {row.domain}  split {row.split}"]
    for role, content in row.turns:
        lines += _said(role, content)
    how = {"votes": "", "likelihood": ", a tie settled by likelihood", "order": ", a tie"}
    lines += _said(f"best, of {row.author}{how[row.settled_by]}", row.response)
    by_answer: defaultdict[tuple[str, int], dict[str, ScoreRow]] = defaultdict(dict)
    for one in scores:
        by_answer[one.source, one.answer][one.judge] = one
    cells = [
        [
            f"{source} {number}" + " *" * any(one.best for one in found.values()),
            *(_cell(found[judge]) for judge in judges),
        ]
        for (source, number), found in by_answer.items()
    ]
    lines += table(["answer", *(f"{judge} (vote)" for judge in judges)], cells)
    return "\n".join(lines) + "\n"


def _said(who: str, text: str) -> list[str]:
    first, *rest = visible(text, keep="\n\t", backslash="\\").split("\n")
    return [f"{visible(who)}: {first}", *(f"    {line}" for line in rest)]


def _cell(row: ScoreRow) -> str:
    if row.score is None:
        return row.failure or "-"
    vote = "-" if row.vote is None else f"{row.vote:.3g}"
    return f"{row.score:.4g} ({vote})"
